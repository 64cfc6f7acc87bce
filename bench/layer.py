"""One layer, forward and backward, compared with other layers that do the same work.

    python -m bench moe [--compile 1] [--dtype bfloat16]
    python -m bench head
moe: the MoE layer, a dense MLP, a loop over masks, transformers' Qwen3 MoE block. head: the loss head."""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from bench.measure import alternate, memory_bytes
from layers.linear_cross_entropy import linear_cross_entropy
from layers.mlp import MLP
from mixture_of_experts import MoE
from model import GPTConfig

MOE_SIZES = ((4096, 256, 8, 2, 1024), (2048, 768, 8, 2, 3072), (4096, 384, 64, 8, 192))  # tokens, C, E, K, H
HEAD_SIZES = ((2048, 768, 50304), (2048, 384, 8192), (2048, 128, 384))  # tokens, C, V


class MaskLoop(nn.Module):
    """The naive layer: one expert after the other selects its tokens by a mask and adds their results."""

    def __init__(self, C: int, E: int, K: int, H: int):
        super().__init__()
        experts = (nn.Sequential(nn.Linear(C, H), nn.GELU("tanh"), nn.Linear(H, C)) for _ in range(E))
        self.gate, self.experts, self.K = nn.Linear(C, E, bias=False), nn.ModuleList(experts), K

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        tokens = x.view(-1, x.size(-1))  # (N, C)
        weight, index = self.gate(tokens.float()).softmax(-1).topk(self.K)
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            rows = expert(tokens[token]) * weight[token, slot, None]
            y.index_add_(0, token, rows.to(y.dtype))
        return y.view_as(x)


def bench_moe(options) -> list[dict]:
    """A row per MoE layer and size, relative to a dense MLP of equal active FLOPs."""
    return [row for sizes in MOE_SIZES for row in compare_moe(options, *sizes)]


def compare_moe(options, N: int, C: int, E: int, K: int, H: int) -> list[dict]:
    """bench_moe's rows of one size."""
    N, device = options.tokens or N, options.device
    config = GPTConfig(n_embd=C, n_head=1, num_experts=E, num_experts_per_tok=K, expert_hidden_size=H)
    # Qwen3's experts have three matrices (SwiGLU), so 2/3 H gives them the same FLOPs.
    sizes = dict(hidden_size=C, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=2 * H // 3)
    qwen3 = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(norm_topk_prob=True, **sizes))
    for parameter in qwen3.parameters():
        nn.init.normal_(parameter, std=0.02)
    layers = {"dense": MLP(config, K * H), "ours": MoE(config), "ours, grouped_mm": MoE(config),
              "mask loop": MaskLoop(C, E, K, H), "transformers, its loop": qwen3}  # fmt: skip
    layers["ours, grouped_mm"].experts.engine = "grouped_mm"
    if options.compile and options.dtype == "float32":
        del layers["ours, grouped_mm"]  # it compiles in bf16 only
    torch.manual_seed(0)
    x, direction = torch.randn(2, 1, N, C, device=device)  # (1, N, C) each

    def forward(layer: nn.Module) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return layer(x.detach().requires_grad_())

    def forward_and_backward(layer: nn.Module) -> None:
        y = forward(layer)
        y.backward(direction.to(y.dtype))
        layer.zero_grad(set_to_none=True)

    for layer in layers.values():
        layer.to(device).train()
        if options.compile:
            layer.compile()
    runs = {name: partial(forward_and_backward, layer) for name, layer in layers.items()}
    seconds = alternate(runs, device, options.rounds)
    return [{"tokens,C,E,K,H": f"{N},{C},{E},{K},{H}", "layer": name, "ms": 1000 * seconds[name],
             "x dense": seconds[name] / seconds["dense"],
             "saved activations MiB": memory_bytes(partial(forward, layer), device)[1] / 2**20}
            for name, layer in layers.items()]  # fmt: skip


def bench_head(options) -> list[dict]:
    """A row per loss head and size, relative to all logits at once."""
    return [row for sizes in HEAD_SIZES for row in compare_heads(options, *sizes)]


def compare_heads(options, N: int, C: int, V: int) -> list[dict]:
    """bench_head's rows of one size."""
    # Each method gives the mean cross-entropy of x (N, C), weight (V, C), targets (N,).
    methods = {"all logits": lambda x, weight, targets: F.cross_entropy(F.linear(x, weight).float(), targets)}
    for name, chunk in {"auto": -1, "128 rows": 128, "512 rows": 512, "1024 rows": 1024}.items():
        methods[f"ours, {name}"] = partial(linear_cross_entropy, chunk=chunk)
    if hasattr(nn, "LinearCrossEntropyOptions"):
        settings = nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        methods["torch's, 512 rows"] = partial(F.linear_cross_entropy, options=settings)
    N, device = options.tokens or N, options.device
    torch.manual_seed(0)
    x = torch.randn(N, C, device=device).requires_grad_()
    weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)

    def forward_and_backward(method) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = method(x, weight, targets)
        loss.backward()
        x.grad = weight.grad = None
        return loss.detach()

    runs = {name: partial(forward_and_backward, method) for name, method in methods.items()}
    seconds = alternate(runs, device, options.rounds, warmup=1)
    peaks = {name: memory_bytes(run, device)[0] for name, run in runs.items()}
    with torch.no_grad():
        exact = F.cross_entropy(x.double() @ weight.double().t(), targets)
    return [{"tokens,C,V": f"{N},{C},{V}", "head": name, "ms": 1000 * seconds[name],
             "x all": seconds[name] / seconds["all logits"], "peak MiB": peaks[name] / 2**20,
             "memory x all": peaks[name] / peaks["all logits"],
             "loss off by": f"{(run() - exact).abs().item():.0e}"} for name, run in runs.items()]  # fmt: skip
