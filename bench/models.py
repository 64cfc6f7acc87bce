"""Whole models: optimizer steps, compiled or not, compared with nanoGPT; HellaSwag's questions per second.

    python -m bench step                  # a small model, dense and with 8 experts top-2
    python -m bench train --size d12 --dtype bfloat16 --compile 2 --nanogpt DIR
    python -m bench hellaswag --data FILE
Reference: train.py and model.py of https://github.com/karpathy/nanoGPT"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import hellaswag as hs
from bench.measure import RandomBatch, alternate, make_run, memory_bytes
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import train_step
from training.parallel import Layout, World, compile_blocks, place

D4, D12 = dict(n_layer=4, n_head=4, n_embd=128), dict(n_layer=12, n_head=12, n_embd=768)
MODEL_SIZES = {
    "d4": D4 | dict(use_moe=False),  # nanoGPT's for a CPU
    "d4-moe4x2": D4 | dict(num_experts=4, num_experts_per_tok=2, expert_hidden_size=256),
    "d6": dict(n_layer=6, n_head=6, n_embd=384, use_moe=False),  # nanoGPT's for Shakespeare
    "d12": D12 | dict(use_moe=False), "d24": dict(n_layer=24, n_head=16, n_embd=1024, use_moe=False),
    "d12-moe8x2": D12 | dict(num_experts=8, num_experts_per_tok=2, expert_hidden_size=1536),
    "d12-moe64x8": D12 | dict(num_experts=64, num_experts_per_tok=8, expert_hidden_size=384)}  # fmt: skip


def size_of(name: str) -> dict:
    """The fields of GPTConfig of one size. ValueError for an unknown name."""
    if name not in MODEL_SIZES:
        raise ValueError(f"size={name!r}: choose from {', '.join(MODEL_SIZES)}")
    return MODEL_SIZES[name]


class NanoGPT:
    """nanoGPT in training. fields: those of its GPTConfig. FileNotFoundError if folder has no model.py."""

    def __init__(self, folder: str, device: torch.device, lr: float = 1e-4, beta2: float = 0.95, **fields):
        path = Path(folder) / "model.py"
        if not path.is_file():
            mend = f"git clone https://github.com/karpathy/nanoGPT {folder}"
            raise FileNotFoundError(f"nanogpt={folder!r} has no model.py; {mend}")
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)  # not our model.py
        nanogpt = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for its dataclasses
        spec.loader.exec_module(nanogpt)
        with contextlib.redirect_stdout(io.StringIO()):  # nanoGPT prints its size
            self.model = self.forward = nanogpt.GPT(nanogpt.GPTConfig(**fields)).to(device)
            self.optimizer = self.model.configure_optimizers(0.1, lr, (0.9, beta2), device.type)

    def step(self, x: torch.Tensor, y: torch.Tensor, lr: float = 1e-4, dtype: str = "float32") -> None:
        """One optimizer step on x, y (B, T) each, as nanoGPT's train.py does it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = self.forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def bench_step(options) -> list[dict]:
    """4 layers, 384 wide, dense and 8 experts top-2, at B = 8, T = 256, V = 8192."""
    small = dict(n_layer=4, n_head=6, n_embd=384)
    experts = small | dict(num_experts=8, num_experts_per_tok=2)
    sizes = {"dense": small | dict(use_moe=False), "8 experts top-2": experts,
             "8 experts top-2, same active FLOPs": experts | dict(expert_hidden_size=768)}  # fmt: skip
    return compare_models(options, sizes, B=8, T=256, V=8192)


def bench_train(options) -> list[dict]:
    """The sizes that --size names."""
    sizes = {name: size_of(name) for name in options.size.split(",")}
    return compare_models(options, sizes, options.B, options.T, options.vocab_size, options.nanogpt)


def compare_models(options, sizes: dict[str, dict], B: int, T: int, V: int, nanogpt: str = "",
                   layout: Layout | None = None) -> list[dict]:  # fmt: skip
    """A row per model. Each dense size takes turns with nanoGPT from the checkout `nanogpt`, if given.
    layout: None for one process without a group."""
    device, dtype, models, steps, rows = options.device, options.dtype, {}, {}, []
    layout = layout or Layout(World(0, 0, 1, device))
    for compiled in {0: (False,), 1: (True,), 2: (False, True)}[options.compile]:
        for name, fields in sizes.items():
            torch.manual_seed(0)
            model = GPTLMHeadModel(GPTConfig(block_size=T, vocab_size=V, **fields))
            place(model, layout, dtype, ())
            model.loss_chunk = -1
            run = make_run(model, RandomBatch(model, B, T), dtype=dtype, layout=layout)
            if compiled:
                compile_blocks(model, run.layout)
            key = name, compiled, "ours"
            models[key], steps[key] = model, partial(train_step, run, 0)
            if nanogpt and not fields.get("use_moe", True):
                shape = {field: fields[field] for field in ("n_layer", "n_head", "n_embd")}
                theirs = NanoGPT(nanogpt, device, block_size=T, vocab_size=V, dropout=0.0, **shape)
                if compiled:
                    theirs.forward = torch.compile(theirs.model)
                key, batch = (name, compiled, "nanoGPT"), run.train_loader.next_batch()
                models[key], steps[key] = theirs.model, partial(theirs.step, *batch, dtype=dtype)
    seconds = alternate(steps, device, options.rounds, warmup=2)
    peaks = {key: memory_bytes(step, device)[0] for key, step in steps.items()}
    for key, model in models.items():
        name, compiled, whose = key
        ours, theirs = models[name, compiled, "ours"], (name, compiled, "nanoGPT")
        mfu = ours.estimate_mfu(B, seconds[key])
        row = {"model": name, "compiled": "yes" if compiled else "no"} | ({"whose": whose} if nanogpt else {})
        row |= {"parameters": f"{sum(p.numel() for p in model.parameters()):,}",
                "active": f"{ours.get_num_active_params():,}", "B x T": f"{B} x {T}", "V": f"{V}",
                "dtype": dtype, "ms": 1000 * seconds[key], "tokens/s": round(B * T / seconds[key]),
                "MFU %": "" if mfu is None else 100 * mfu, "peak MiB": peaks[key] / 2**20}  # fmt: skip
        for what, found in (("time", seconds), ("memory", peaks)) if nanogpt else ():
            row[f"{what} x nanoGPT"] = found[key] / found[theirs] if theirs in found else ""
        rows.append(row)
    return rows


def bench_hellaswag(options) -> list[dict]:
    """HellaSwag's questions, taken evenly from the whole file."""
    size_of(options.size)  # an unknown name must not wait for a download
    path = Path(options.data) if options.data else hs.download("val")
    every = hs.load_questions(path, None, "completion", "gpt2", 1024, 50304)
    return compare_scoring(options, every[:: max(1, len(every) // options.limit)][: options.limit])


def compare_scoring(options, questions: Sequence[hs.Question]) -> list[dict]:
    """Questions per second of an untrained model. "plain" scores each question alone, with all logits."""
    device = options.device
    torch.manual_seed(0)
    model = GPTLMHeadModel(GPTConfig(vocab_size=50304, **size_of(options.size))).to(device).eval()

    def score(method):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return method(model, questions)

    runs = {"plain": partial(score, hs.score_one_by_one), "ours": partial(score, hs.score_batched)}
    seconds = alternate(runs, device, options.rounds, warmup=1)
    losses = {method: run() for method, run in runs.items()}  # (n, 4) each
    same = {method: each.argmin(1) == losses["plain"].argmin(1) for method, each in losses.items()}
    return [{"method": method, "model": options.size, "questions": len(questions), "s": seconds[method],
             "questions/s": len(questions) / seconds[method], "x plain": seconds["plain"] / seconds[method],
             "same choices": same[method].sum().item(),
             "losses off by": f"{(losses[method] - losses['plain']).abs().max().item():.0e}"}
            for method in runs]  # fmt: skip
