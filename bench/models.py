"""Optimizer steps of whole models: dense and MoE, compiled and not, beside nanoGPT's.

python -m bench step                  # a small model, dense and with 8 experts top-2
python -m bench train --size d12 --dtype bfloat16 --compile 2
python -m bench train --size d12 --nanogpt DIR
"""

from functools import partial

import torch

from bench.measure import RandomBatch, alternate, make_run, memory_bytes
from bench.nanogpt import NanoGPT
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import train_step
from training.parallel import compile_blocks

MODEL_SIZES = {
    "d4": dict(n_layer=4, n_head=4, n_embd=128, use_moe=False),  # nanoGPT's for a CPU
    "d6": dict(n_layer=6, n_head=6, n_embd=384, use_moe=False),  # nanoGPT's for Shakespeare
    "d12": dict(n_layer=12, n_head=12, n_embd=768, use_moe=False),
    "d12-moe8x2": dict(
        n_layer=12, n_head=12, n_embd=768, num_experts=8, num_experts_per_tok=2, expert_hidden_size=1536
    ),  # as many active FLOPs as d12
    "d24": dict(n_layer=24, n_head=16, n_embd=1024, use_moe=False),
}  # fmt: skip


def size_of(name: str) -> dict:
    """The fields of GPTConfig of one size. ValueError for an unknown name."""
    if name not in MODEL_SIZES:
        raise ValueError(f"size={name!r}: choose of {', '.join(MODEL_SIZES)}")
    return MODEL_SIZES[name]


def bench_step(options) -> list[dict]:
    """4 layers, 384 wide, dense and 8 experts top-2, at B = 8, T = 256, V = 8192."""
    small = dict(n_layer=4, n_head=6, n_embd=384)
    sizes = {
        "dense": small | dict(use_moe=False),
        "8 experts top-2": small | dict(num_experts=8, num_experts_per_tok=2),
    }
    sizes["8 experts top-2, same active FLOPs"] = sizes["8 experts top-2"] | dict(expert_hidden_size=768)
    return compare_models(options, sizes, B=8, T=256, V=8192)


def bench_train(options) -> list[dict]:
    """The sizes that --size names."""
    sizes = {name: size_of(name) for name in options.size.split(",")}
    return compare_models(options, sizes, options.B, options.T, options.vocab_size, options.nanogpt)


def compare_models(options, sizes: dict[str, dict], B: int, T: int, V: int, nanogpt: str = "") -> list[dict]:
    """A row per model: time, speed, memory. Every dense size takes turns with nanoGPT's model of that size.

    nanogpt: the folder of nanoGPT's checkout; "" leaves nanoGPT out.
    """
    device, dtype, models, steps, rows = options.device, options.dtype, {}, {}, []
    for compiled in {0: (False,), 1: (True,), 2: (False, True)}[options.compile]:
        for name, fields in sizes.items():
            torch.manual_seed(0)
            model = GPTLMHeadModel(GPTConfig(block_size=T, vocab_size=V, **fields)).to(device)
            model.loss_chunk = -1
            run = make_run(model, RandomBatch(model, B, T), dtype=dtype)
            if compiled:
                compile_blocks(model, run.layout)
            key = name, compiled, "ours"
            models[key], steps[key] = model, partial(train_step, run, 0)
            if nanogpt and not fields.get("use_moe", True):
                shape = {field: fields[field] for field in ("n_layer", "n_head", "n_embd")}
                theirs = NanoGPT(
                    nanogpt, device, dtype, compiled, block_size=T, vocab_size=V, dropout=0.0, **shape
                )
                key = name, compiled, "nanoGPT"
                models[key], steps[key] = theirs.model, partial(theirs.step, *run.train_loader.next_batch())
    seconds = alternate(steps, device, options.rounds, warmup=2)
    peaks = {key: memory_bytes(step, device)[0] for key, step in steps.items()}
    for key, model in models.items():
        name, compiled, whose = key
        ours = models[name, compiled, "ours"]
        mfu = ours.estimate_mfu(B, seconds[key])
        row = {"model": name, "compiled": "yes" if compiled else "no"}
        row |= {"whose": whose} if nanogpt else {}
        row |= {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "active": f"{ours.get_num_active_params():,}", "B x T": f"{B} x {T}", "V": f"{V}",
            "dtype": dtype, "ms": 1000 * seconds[key], "tokens/s": round(B * T / seconds[key]),
            "MFU %": "" if mfu is None else 100 * mfu, "peak MiB": peaks[key] / 2**20,
        }  # fmt: skip
        if nanogpt:
            theirs = name, compiled, "nanoGPT"
            row["time x nanoGPT"] = seconds[key] / seconds[theirs] if theirs in seconds else ""
            row["memory x nanoGPT"] = peaks[key] / peaks[theirs] if theirs in seconds else ""
        rows.append(row)
    return rows
