"""Small models and texts that many tests share."""

import random

import torch

from model import GPTConfig, GPTLMHeadModel

WORDS = "a man is seen sitting on the roof he pulls up shingles and then throws them down to café".split()

# What a checkout of nanoGPT offers, as far as the benchmarks use it; a bigram model.
NANOGPT = """
import torch, torch.nn.functional as F

class GPTConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        print("number of parameters: few")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


def tiny(**fields) -> GPTConfig:
    """Two layers of four experts, a text of 24 tokens out of 97."""
    sizes = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=97, block_size=24)
    return GPTConfig(**sizes | dict(num_experts=4, num_experts_per_tok=2) | fields)


def dense_model(**fields) -> GPTLMHeadModel:
    """A small dense model, to make one with experts from."""
    torch.manual_seed(5)
    return GPTLMHeadModel(tiny(use_moe=False, **fields)).eval()


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


def small_checkpoint(step: int = 3, **more) -> dict:
    """A dictionary that can be saved as a checkpoint; no model fits it. Its numbers depend on the step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(5, 7, generator=generator), "b": torch.arange(3) + step}
    moments = {"step": torch.tensor(2.0), "exp_avg": torch.randn(5, 7, generator=generator)}
    optimizer = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
    return {"model": weights, "config": {"n_layer": 1}, "step": step, "optimizer": optimizer, **more}


def make_examples(n: int, seed: int = 0, longest: int = 9) -> list[dict]:
    """Questions of random words, of very different lengths, with ctx_a and ctx_b."""
    rng = random.Random(seed)

    def text(length):
        return " ".join(rng.choices(WORDS, k=length))

    return [
        dict(
            ctx=f"{(a := text(rng.randint(1, longest)))} {(b := text(2))}", ctx_a=a, ctx_b=b,
            activity_label="Roofing", label=rng.randrange(4),
            endings=[text(rng.randint(1, longest)) for _ in range(4)],
        )
        for _ in range(n)
    ]  # fmt: skip
