"""Turn a dense model into a Mixture-of-Experts: --init_from gpt2 --use_moe True (docs/huggingface.md).

Reference: Sparse Upcycling, arXiv 2212.05055"""

import torch

from mixture_of_experts import ROUTER_SCORES, MoE
from model import GPTConfig, GPTLMHeadModel


@torch.no_grad()
def upcycle(dense: GPTLMHeadModel, config: GPTConfig) -> GPTLMHeadModel:
    """A Mixture-of-Experts in which every expert is a copy of the dense model's MLP: equal logits (to 1e-5).
    If the weights of the chosen K experts sum to 1, the router starts as in any new model. If they do not
    (K = 1, or norm_topk_prob=False), all scores must be equal: the router's weights are almost zero, and the
    copies are scaled by the inverse of the sum. Such a router spreads tokens slowly (docs/measurements.md),
    so prefer K = 2. ValueError if the model has experts, or an MLP of another size."""
    if dense.config.use_moe:
        raise ValueError("init_from: the model has experts already; upcycling needs a dense one")
    if (number := config.num_shared_experts) > 0:
        raise ValueError(f"num_shared_experts={number}: it would add to the dense output; upcycle with 0")
    model = GPTLMHeadModel(config)
    source, target = dense.state_dict(), model.state_dict()
    K, scale, router_scale = config.num_experts_per_tok, 1.0, 1.0
    if K == 1 or not config.norm_topk_prob:
        score, _ = ROUTER_SCORES[config.router_score]
        equal = score(torch.zeros(config.num_experts, dtype=torch.float64))[0].item()
        scale, router_scale = 1 / (K * equal), 1e-7 / 0.02
    for prefix in [f"{name}." for name, module in model.named_modules() if isinstance(module, MoE)]:
        for name in [name.removeprefix(prefix) for name in source if name.startswith(prefix)]:
            tensor = source.pop(prefix + name)
            stacked = name.removesuffix(".weight").replace(".", "_")  # c_fc, c_fc_bias, ...
            experts = target[f"{prefix}experts.{stacked}"]
            if experts.shape[1:] != tensor.shape:
                size, H = config.expert_hidden_size, dense.config.mlp_hidden_size or 4 * dense.config.n_embd
                raise ValueError(f"expert_hidden_size={size}: the MLP has {H}; use --expert_hidden_size {H}")
            experts.copy_(tensor * (scale if name.startswith("c_proj") else 1.0))  # (E, ...) from (...)
        target[f"{prefix}gate.weight"].mul_(router_scale)
    for name, tensor in source.items():
        if name not in target or tensor.shape != target[name].shape:
            raise ValueError(f"init_from: {name} does not fit the new model; keep the dense architecture")
        target[name].copy_(tensor)
    return model
