"""Whole models: optimizer steps, compiled or not, compared with nanoGPT; HellaSwag's questions per second.

    python -m bench train --size d12 --dtype bfloat16 --compile 2 --nanogpt DIR
    python -m bench hellaswag --data FILE
References: https://github.com/karpathy/nanoGPT (train.py, model.py), https://github.com/karpathy/nanochat"""

import contextlib
import importlib.util
import io
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import hellaswag as hs
from bench.measure import RandomBatch, alternate, make_run, memory_bytes
from layers.attention import BACKENDS, time_backend
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import train_step
from training.parallel import Layout, World, compile_blocks, make_layout, place, stop

SMALL, MOE8X2 = dict(n_layer=4, n_head=6, n_embd=384), dict(num_experts=8, num_experts_per_tok=2)
D4, D12 = dict(n_layer=4, n_head=4, n_embd=128), dict(n_layer=12, n_head=12, n_embd=768)
MODEL_SIZES = {
    "d4": D4 | dict(use_moe=False),  # nanoGPT's for a CPU
    "d4-moe4x2": D4 | dict(num_experts=4, num_experts_per_tok=2, expert_hidden_size=256),
    "d6": dict(n_layer=6, n_head=6, n_embd=384, use_moe=False),  # nanoGPT's for Shakespeare
    "d4-384": SMALL | dict(use_moe=False), "d4-384-moe8x2": SMALL | MOE8X2,
    "d4-384-moe8x2-equal": SMALL | MOE8X2 | dict(expert_hidden_size=768),  # FLOPs equal to d4-384's
    "d12": D12 | dict(use_moe=False), "d24": dict(n_layer=24, n_head=16, n_embd=1024, use_moe=False),
    "d12-moe8x2": D12 | MOE8X2 | dict(expert_hidden_size=1536),
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


class Nanochat:
    """nanochat's GPT in training with its MuonAdamW and its schedules (gpt.py, optim.py and base_train.py of
    revision 92d63d4). Its learning rates are for 2^19 tokens per step: scale multiplies all of them.
    fields: those of its GPTConfig. FileNotFoundError if folder has no nanochat/gpt.py."""

    MATRICES, HEAD, EMBEDDINGS, SCALARS, DECAY = 0.02, 0.008, 0.3, 0.5, 0.28  # the flags of base_train.py
    WARMUP, WARMDOWN, LAST = 40, 0.65, 0.05

    def __init__(self, folder: str, device: torch.device, scale: float, **fields):
        if not (Path(folder) / "nanochat" / "gpt.py").is_file():
            mend = f"git clone https://github.com/karpathy/nanochat {folder}"
            raise FileNotFoundError(f"nanochat={folder!r} has no nanochat/gpt.py; {mend}")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        nanochat = importlib.import_module("nanochat.gpt")
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = nanochat.GPT(nanochat.GPTConfig(window_pattern="L", **fields)).to(device)
            self.model.init_weights()
            self.optimizer = self.model.setup_optimizer(
                scale * self.HEAD, scale * self.EMBEDDINGS, scale * self.MATRICES, self.DECAY,
                scale * self.SCALARS)  # fmt: skip

    def step(self, x: torch.Tensor, y: torch.Tensor, step: int, max_steps: int) -> None:
        """One optimizer step on x, y (B, T) each, as nanochat's base_train.py does it."""
        self.model(x, y).backward()
        done = max(0.0, (step / max_steps - 1 + self.WARMDOWN) / self.WARMDOWN)  # of the warmdown
        rate = min((step + 1) / self.WARMUP, 1 - done * (1 - self.LAST))
        momentum = 0.97 - 0.07 * done if done else 0.85 + 0.12 * min(1, step / 400)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                decay = self.DECAY * 0.5 * (1 + math.cos(math.pi * step / max_steps))
                group.update(momentum=momentum, weight_decay=decay)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def alone(name: str, device: torch.device) -> Layout:
    """A layout of this process: "none" without a group, or "fsdp" or "ep" in a group of one process."""
    world = World(0, 0, 1, device)
    if name == "none":
        return Layout(world)
    how = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **how)
    if name == "fsdp":
        return make_layout(world, "fsdp", 0, 1)
    # ep_size=2 chooses the code of expert parallelism. The group's one process has all experts.
    mesh = init_device_mesh(device.type, (1, 1), mesh_dim_names=("replica", "expert"))
    return Layout(world, ep_size=2, mesh=mesh)


def bench_train(options) -> list[dict]:
    """A row per model that --size names. Dense ones take turns with nanoGPT from --nanogpt, if given."""
    sizes = {name: size_of(name) for name in options.size.split(",")}
    device, dtype, models, steps, rows = options.device, options.dtype, {}, {}, []
    B, T, V, nanogpt = options.B, options.T, options.vocab_size, options.nanogpt
    dense = [name for name, fields in sizes.items() if not fields.get("use_moe", True)]
    if dense and options.layout == "ep":
        raise ValueError(f"layout='ep': size {dense[0]} has no experts to share; leave it out of --size")
    layout = alone(options.layout, device)
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
            if nanogpt and name in dense:
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
    stop()  # of the group, if there is one
    return rows


def bench_attention(options) -> list[dict]:
    """A row per backend: one layer's attention, forward and backward; inf if it cannot run."""
    config, dtype = GPTConfig(**size_of(options.size)), getattr(torch, options.dtype)
    how = config, options.B, options.T, options.device, dtype
    return [{"attention": name, "ms": 1e3 * time_backend(kind, *how)} for name, kind in BACKENDS.items()]


def bench_hellaswag(options) -> list[dict]:
    """Questions per second of an untrained model. "plain" scores each question alone, with all logits."""
    device, size = options.device, size_of(options.size)
    if options.data == "random":  # tokens, about as many as in HellaSwag
        context, *endings = torch.randint(256, (5, 80)).tolist()
        rows = [(context, ending[: 20 + 5 * i]) for i, ending in enumerate(endings)]
        questions = [hs.Question(rows, [1] * 4, 0, False)] * options.limit
    else:
        path = Path(options.data) if options.data else hs.download("val")
        every = hs.load_questions(path, None, "completion", "gpt2", 1024, 50304)
        questions = every[:: max(1, len(every) // options.limit)][: options.limit]
    torch.manual_seed(0)
    model = GPTLMHeadModel(GPTConfig(vocab_size=50304, **size)).to(device).eval()

    def score(method):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return method(model, questions)

    runs = {"plain": partial(score, hs.score_one_by_one), "ours": partial(score, hs.score_batched)}
    seconds = alternate(runs, device, options.rounds, warmup=1)
    losses = {method: run() for method, run in runs.items()}  # (n, 4) each
    return [{"method": method, "model": options.size, "questions": len(questions), "s": seconds[method],
             "questions/s": len(questions) / seconds[method], "x plain": seconds["plain"] / seconds[method],
             "same choices": (losses[method].argmin(1) == losses["plain"].argmin(1)).sum().item(),
             "losses off by": f"{(losses[method] - losses['plain']).abs().max().item():.0e}"}
            for method in runs]  # fmt: skip
