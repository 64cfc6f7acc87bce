"""Measurements. Everything that is compared alternates (A B A B ...) in one run; figures are medians.

    python bench.py moe [--compile 1]     # MoE layer against dense MLP, mask loop, Hugging Face's experts
    python bench.py step                  # one optimizer step, dense against 8 experts top-2
    python bench.py train --size d12 --dtype bfloat16 --compile 1         # whole models

--csv FILE writes the table as well. MFU = FLOPs of GPT.flops_per_token (active parameters, attention counted)
x tokens per second / the device's dense bf16 peak; unknown on CPUs. Memory: on CUDA the allocator's peak; on
CPU the largest sum of live allocations, from the profiler, in a run of its own.
BENCHMARKS.md holds results with command, machine and versions.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixture_of_experts import MLP, MoE
from model import GPTConfig, GPTLMHeadModel

MOE_SIZES = ((4096, 256, 8, 2, 1024), (2048, 768, 8, 2, 3072), (4096, 384, 64, 8, 192))  # tokens, C, E, K, H
MODEL_SIZES = {
    "d12": dict(n_layer=12, n_head=12, n_embd=768, use_moe=False),
    "d12-moe8x2": dict(
        n_layer=12, n_head=12, n_embd=768, num_experts=8, num_experts_per_tok=2, expert_hidden_size=1536
    ),  # as many active FLOPs as d12
    "d24": dict(n_layer=24, n_head=16, n_embd=1024, use_moe=False),
}  # fmt: skip

# ---------------------------------------------------------------------------- MEASURING


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    contenders: dict[str, Callable], device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of each function, called in turn `rounds` times: noise meets all alike."""
    times = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, run in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def memory_bytes(run: Callable, device: torch.device) -> tuple[int, int]:
    """(peak, kept): most bytes that tensors made by run() took at once, and those alive while it returns."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        kept = torch.cuda.memory_allocated(device) - before
        return torch.cuda.max_memory_allocated(device) - before, kept
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = run()  # noqa: F841
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(live), live[-1]


def report(rows: list[dict], path: str = "") -> None:
    """Print the rows as a Markdown table, and write them as CSV if a path is given."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{row[n]:.2f}" if isinstance(row[n], float) else str(row[n]) for n in names)
            + " |"
        )
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


# ---------------------------------------------------------------------------- MOE


class MaskLoop(nn.Module):
    """The naive layer: for every expert, pick its tokens by a mask and add their results."""

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
    """transformers' Qwen3 MoE block (SwiGLU: its hidden size is 2/3 H, for the same FLOPs)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=C,
        num_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=2 * H // 3,
        norm_topk_prob=True,
    )
    layer = Qwen3MoeSparseMoeBlock(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def moe_config(C: int, E: int, K: int, H: int) -> GPTConfig:
    """A configuration whose MoE layer has these sizes."""
    return GPTConfig(
        n_embd=C, n_head=1, num_experts=E, num_experts_per_tok=K, expert_hidden_size=H, mlp_hidden_size=K * H
    )


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
    device, rows = torch.device(options.device), []
    for N, C, E, K, H in MOE_SIZES:
        N = options.tokens or N
        config = moe_config(C, E, K, H)
        layers = {"dense": MLP(config, K * H), "ours": MoE(config)}
        if not (options.compile and options.dtype == "float32"):  # grouped_mm compiles in bf16 only
            layers["ours, grouped_mm"] = MoE(config)
            layers["ours, grouped_mm"].experts.engine = "grouped_mm"
        layers |= {"mask loop": MaskLoop(C, E, K, H), "transformers": huggingface_layer(C, E, K, H)}
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


# ---------------------------------------------------------------------------- WHOLE MODELS


def training_step(model: GPTLMHeadModel, B: int, T: int, dtype: str) -> Callable:
    """A function that does one optimizer step on random tokens: forward, backward, clip, AdamW, routers."""
    device = model.device
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    tokens = torch.randint(0, model.config.vocab_size, (B, T + 1), device=device)

    def run():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_routers()

    return run


def bench_models(options, sizes: dict[str, dict], B: int, T: int, vocab_size: int) -> list[dict]:
    """Optimizer steps of whole models, alternating."""
    device = torch.device(options.device)
    models = {}
    for name, fields in sizes.items():
        torch.manual_seed(0)
        model = GPTLMHeadModel(GPTConfig(block_size=T, vocab_size=vocab_size, **fields)).to(device).train()
        model.update_routers()
        if options.compile:
            for block in model.transformer.h:
                block.compile(fullgraph=True)
        models[name] = model
    runs = {name: training_step(model, B, T, options.dtype) for name, model in models.items()}
    seconds = alternate(runs, device, options.rounds)
    rows = []
    for name, model in models.items():
        mfu = model.estimate_mfu(B, seconds[name])
        rows.append({
            "model": name, "parameters": f"{model.get_num_params(False):,}",
            "active": f"{model.get_num_active_params():,}", "B": B, "T": T, "dtype": options.dtype,
            "compiled": bool(options.compile), "ms": 1000 * seconds[name],
            "tokens/s": round(B * T / seconds[name]), "MFU %": "" if mfu is None else 100 * mfu,
            "peak MiB": memory_bytes(runs[name], device)[0] / 2**20,
        })  # fmt: skip
    return rows


def bench_step(options) -> list[dict]:
    """4 layers, 384 wide, dense and 8 experts top-2, at B = 8, T = 256, V = 8192."""
    small = dict(n_layer=4, n_head=6, n_embd=384)
    sizes = {
        "dense": small | dict(use_moe=False),
        "8 experts top-2": small | dict(num_experts=8, num_experts_per_tok=2),
    }
    sizes["8 experts top-2, same active FLOPs"] = sizes["8 experts top-2"] | dict(expert_hidden_size=768)
    return bench_models(options, sizes, B=8, T=256, vocab_size=8192)


def bench_train(options) -> list[dict]:
    """The named sizes of MODEL_SIZES at the GPT-2 vocabulary."""
    sizes = {name: MODEL_SIZES[name] for name in (options.size.split(",") if options.size else MODEL_SIZES)}
    return bench_models(options, sizes, B=options.B, T=options.T, vocab_size=50304)


# ---------------------------------------------------------------------------- COMMAND LINE

COMMANDS = {"moe": bench_moe, "step": bench_step, "train": bench_train}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", type=int, default=0, help="1: torch.compile")
    parser.add_argument("--rounds", type=int, default=15, help="measured calls of each contender")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--tokens", type=int, default=0, help="moe: tokens, instead of each size's own")
    parser.add_argument("--size", default="", help=f"train: of {', '.join(MODEL_SIZES)}, separated by commas")
    parser.add_argument("--B", type=int, default=4)
    parser.add_argument("--T", type=int, default=1024)
    parser.add_argument("--csv", default="", help="write the table here as well")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"torch {torch.__version__}, {name}, {options.dtype}, medians of {options.rounds} alternating calls\n"
    )
    report(COMMANDS[options.command](options), options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
