"""One MoE layer, forward and backward: ours against a dense MLP of equal active FLOPs and other MoE layers.

    python -m bench moe [--compile 1] [--dtype bfloat16]

MoE layers: ours with both of its engines, a loop over masks, and transformers' Qwen3 MoE block.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.measure import alternate, memory_bytes
from layers.mlp import MLP
from mixture_of_experts import MoE
from model import GPTConfig

MOE_SIZES = ((4096, 256, 8, 2, 1024), (2048, 768, 8, 2, 3072), (4096, 384, 64, 8, 192))  # tokens, C, E, K, H


class MaskLoop(nn.Module):
    """The naive layer: each expert in turn picks its tokens by a mask and adds their results."""

    def __init__(self, C: int, E: int, K: int, H: int):
        super().__init__()
        self.gate = nn.Linear(C, E, bias=False)
        self.up = nn.ModuleList(nn.Linear(C, H) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(H, C) for _ in range(E))
        self.K = K

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.view(-1, x.size(-1))  # (N, C)
        weight, index = self.gate(tokens.float()).softmax(-1).topk(self.K)
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, slot = torch.where(index == e)
            rows = down(F.gelu(up(tokens[token]), approximate="tanh"))
            y.index_add_(0, token, (rows * weight[token, slot, None]).to(y.dtype))
        return y.view_as(x)


def huggingface_layer(C: int, E: int, K: int, H: int) -> nn.Module:
    """transformers' Qwen3 MoE block. It has three matrices (SwiGLU), so 2/3 H gives it the same FLOPs.

    Outside a model it loops over the experts; inside one, transformers may choose grouped_mm.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=C, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=2 * H // 3,
        norm_topk_prob=True,
    )  # fmt: skip
    layer = Qwen3MoeSparseMoeBlock(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def layer_forward(layer: Callable, x: torch.Tensor, dtype: str) -> torch.Tensor:
    """One training forward of a layer, x (1, N, C) -> (1, N, C)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return layer(x.detach().requires_grad_())


def layer_step(layer: nn.Module, forward: Callable, direction: torch.Tensor) -> None:
    """Forward, and backward from a gradient `direction` (1, N, C)."""
    y = forward()
    y.backward(direction.to(y.dtype))
    layer.zero_grad(set_to_none=True)


def bench_moe(options) -> list[dict]:
    """Forward and backward of one layer: ours, a dense MLP of equal active FLOPs, and other MoE layers."""
    device, rows = options.device, []
    for N, C, E, K, H in MOE_SIZES:
        N = options.tokens or N
        config = GPTConfig(
            n_embd=C, n_head=1, num_experts=E, num_experts_per_tok=K, expert_hidden_size=H
        )  # fmt: skip
        layers = {"dense": MLP(config, K * H), "ours": MoE(config)}
        if not (options.compile and options.dtype == "float32"):  # grouped_mm compiles in bf16 only
            layers["ours, grouped_mm"] = MoE(config)
            layers["ours, grouped_mm"].experts.engine = "grouped_mm"
        layers |= {"mask loop": MaskLoop(C, E, K, H), "transformers, its loop": huggingface_layer(C, E, K, H)}
        torch.manual_seed(0)
        x, direction = torch.randn(2, 1, N, C, device=device)  # (1, N, C) each
        for layer in layers.values():
            layer.to(device).train()
        forwards, both = {}, {}
        for name, layer in layers.items():
            forward = torch.compile(layer) if options.compile else layer
            forwards[name] = partial(layer_forward, forward, x, options.dtype)
            both[name] = partial(layer_step, layer, forwards[name], direction)
        seconds = alternate(both, device, options.rounds)
        for name in layers:
            rows.append({
                "tokens,C,E,K,H": f"{N},{C},{E},{K},{H}", "layer": name, "ms": 1000 * seconds[name],
                "x dense": seconds[name] / seconds["dense"],
                "saved activations MiB": memory_bytes(forwards[name], device)[1] / 2**20,
            })  # fmt: skip
    return rows
