"""The optimisation ladder of the GPT-2 124M lecture, and the rungs added here, measured on this machine.

    python -m bench ladder                             # CUDA: 124M, B = 16, T = 1024
    python -m bench ladder --device cpu --rounds 3     # CPU: a small model, without the rungs of CUDA

Every rung keeps the changes of all earlier rungs, and takes turns with the rung before it. On a CPU only
--compile 1 compiles the blocks. Reference: A. Karpathy, https://github.com/karpathy/build-nanogpt"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.measure import alternate, make_run, memory_bytes
from layers.attention import prefer_backend
from model import GPTConfig, GPTLMHeadModel
from tokens.shards import DistributedDataLoader, write_shard
from train_gpt_moe import train_step
from training.muon import has_fast_bf16

START = dict(tf32=False, dtype="float32", compile=False, attention="written out", vocab_size=50257,
             fused=False, loss_chunk=0, times_B=1, prefetch=0, moe=False)  # fmt: skip
RUNGS = {
    "fp32, attention written out": {}, "TF32": dict(tf32=True), "bf16": dict(dtype="bfloat16"),
    "torch.compile": dict(compile=True), "flash attention": dict(attention="flash"),
    "vocabulary 50257 -> 50304": dict(vocab_size=50304), "fused AdamW": dict(fused=True),
    "chunked loss head": dict(loss_chunk=-1), "cuDNN attention": dict(attention="cudnn"),
    "micro-batch twice as large": dict(times_B=2), "prefetched batches": dict(prefetch=2),
    "8 experts top-2, same active FLOPs": dict(moe=True)}  # fmt: skip
SHAPES = {"cuda": (12, 12, 768, 16, 1024), "cpu": (4, 4, 256, 4, 128)}  # n_layer, n_head, C, B, T


def rungs_for(device: torch.device, compiled: bool) -> dict[str, dict]:
    """The settings of every rung that this device can run. compiled: include the rung with torch.compile."""
    able = dict.fromkeys(("TF32", "cuDNN attention"), device.type == "cuda")
    able |= {"bf16": has_fast_bf16(device.type), "torch.compile": compiled}
    settings, rungs = START, {}
    for name, change in RUNGS.items():
        if able.get(name, True):
            settings = rungs[name] = settings | change
    return rungs


def climb(settings: dict, options, shard: str) -> tuple[Callable, GPTLMHeadModel, int]:
    """A rung's training step, its model, and the tokens of a step."""
    device = options.device
    n_layer, n_head, C, B, T = SHAPES["cuda" if device.type == "cuda" else "cpu"]
    B *= settings["times_B"]
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=n_layer, n_head=n_head, n_embd=C, block_size=T, vocab_size=settings["vocab_size"],
        use_moe=settings["moe"], num_experts=8, num_experts_per_tok=2, expert_hidden_size=2 * C,
        attn_implementation="eager" if settings["attention"] == "written out" else "sdpa")  # fmt: skip
    model = GPTLMHeadModel(config).to(device)
    model.loss_chunk = settings["loss_chunk"]
    if settings["compile"]:
        # Each rung has its own backend. Rungs must share no graph, because a graph keeps an attention kernel.
        backend = partial(torch._dynamo.lookup_backend("inductor"))
        for block in model.transformer.h:
            block.compile(fullgraph=True, backend=backend)
    loader = DistributedDataLoader([shard], B, T, device=device, prefetch=settings["prefetch"])
    run = make_run(model, loader, dtype=settings["dtype"])
    if not settings["fused"]:
        for group in run.optimizer.param_groups:
            group["fused"] = None  # torch's default: one call per operation and group

    def step():
        torch.set_float32_matmul_precision("high" if settings["tf32"] else "highest")
        with prefer_backend(settings["attention"], device):
            train_step(run, 0)

    return step, model, B * T


def bench_ladder(options) -> Iterator[dict]:
    """A row per rung."""
    device, total, before = options.device, 1.0, None
    rungs = rungs_for(device, compiled=device.type == "cuda" or bool(options.compile))
    precision = torch.get_float32_matmul_precision()
    more_graphs = torch._dynamo.config.patch(recompile_limit=8 * len(rungs))  # of one block's code
    with tempfile.TemporaryDirectory() as folder, more_graphs:
        shard = str(Path(folder) / "train_000000.bin")
        write_shard(shard, np.random.default_rng(0).integers(0, 50257, 2_000_000, dtype=np.uint16))
        for name, settings in rungs.items():
            step, model, tokens = climb(settings, options, shard)
            pair = {"before": before[0], "now": step} if before else {"now": step}
            seconds = alternate(pair, device, options.rounds, warmup=2)
            speed = tokens / seconds["now"]
            gain = speed / (before[1] / seconds["before"]) if before else 1.0
            total *= gain
            mfu = model.estimate_mfu(tokens // model.config.block_size, seconds["now"])
            yield {
                "rung": name, "tokens/s": round(speed), "ms": 1000 * seconds["now"],
                "MFU %": "" if mfu is None else 100 * mfu, "peak MiB": memory_bytes(step, device)[0] / 2**20,
                "x rung before": gain, "x first": total}  # fmt: skip
            print(f"{name}: {round(speed):,} tokens/s, {gain:.2f} x the rung before", flush=True)
            before = step, tokens
    torch.set_float32_matmul_precision(precision)
