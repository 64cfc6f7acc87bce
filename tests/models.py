"""Small models and texts that many tests share."""

import torch

from model import GPTConfig


def tiny(**fields) -> GPTConfig:
    """Two layers of four experts, a text of 24 tokens out of 97."""
    sizes = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=97, block_size=24)
    return GPTConfig(**sizes | dict(num_experts=4, num_experts_per_tok=2) | fields)


def strong(model, std=0.2, seed=0):
    """The model with weights so large that no non-linearity looks linear, norms around one; in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_norm = ("ln_" in name or "norm" in name) and name.endswith("weight")
            parameter.copy_(noise + 1 if is_norm else noise)
    return model.eval()


def tokens(B=3, T=24, V=97, seed=0):
    """Random token numbers (B, T) below V."""
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))
