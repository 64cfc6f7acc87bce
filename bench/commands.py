"""Measurements. Everything that is compared alternates (A B A B ...) in one run; figures are medians.

    python bench.py moe [--compile 1]     # MoE layer against dense MLP, mask loop, Hugging Face's experts
    python bench.py step                  # one optimizer step, dense against 8 experts top-2
    python bench.py train --size d12 --dtype bfloat16 --compile 2         # whole models, compiled and not
    python bench.py train --size d12 --nanogpt DIR    # in turns with nanoGPT's, of a checkout in DIR
    python bench.py ladder                # the optimisation ladder, rung by rung (ladder.py)
    python bench.py head                  # the loss head: all logits at once, and in chunks
    python bench.py hellaswag --data FILE # HellaSwag: the plain method against ours
    python bench.py checkpoint            # the pause of a save, its writing, verifying, loading
    python bench.py loop                  # where a step of the training loop spends its time
    python bench.py time_to_loss --text FILE --nanogpt DIR --png FILE     # loss against seconds (recipes.py)
    python bench.py moe_pays --text FILE  # 8 experts top-2 against dense, equally active (recipes.py)
    python bench.py scale                 # forecasts for up to 1,024 ranks (scaling.py)

--csv FILE and --png FILE write the table as well. MFU = FLOPs of GPT.flops_per_token (active parameters,
attention counted) x tokens per second / the device's dense bf16 peak; unknown on CPUs. Memory is what a step
takes beyond parameters and optimizer state: on CUDA by the allocator's peak; on CPU the largest sum of live
allocations, from the profiler, in a run of its own.
BENCHMARKS.md holds results with command, machine and versions.
"""

import argparse
import contextlib
import gc
import io
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import hellaswag as hs
from bench.ladder import bench_ladder
from bench.measure import PICTURES, alternate, in_words, load_nanogpt, memory_bytes, report, training_step
from bench.recipes import moe_pays, time_to_loss
from bench.scaling import add_flags, bench_scale
from fineweb import prepare_demo
from layers.linear_cross_entropy import linear_cross_entropy
from layers.mlp import MLP
from mixture_of_experts import MoE
from model import GPTConfig, GPTLMHeadModel
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import load_checkpoint, verify_checkpoint
from training.parallel import choose_device

MOE_SIZES = ((4096, 256, 8, 2, 1024), (2048, 768, 8, 2, 3072), (4096, 384, 64, 8, 192))  # tokens, C, E, K, H
MODEL_SIZES = {
    "d4": dict(n_layer=4, n_head=4, n_embd=128, use_moe=False),  # nanoGPT's for a CPU
    "d6": dict(n_layer=6, n_head=6, n_embd=384, use_moe=False),  # nanoGPT's for Shakespeare
    "d12": dict(n_layer=12, n_head=12, n_embd=768, use_moe=False),
    "d12-moe8x2": dict(
        n_layer=12, n_head=12, n_embd=768, num_experts=8, num_experts_per_tok=2, expert_hidden_size=1536
    ),  # as many active FLOPs as d12
    "d24": dict(n_layer=24, n_head=16, n_embd=1024, use_moe=False),
}  # fmt: skip
HEAD_SIZES = ((2048, 768, 50304), (2048, 384, 8192), (2048, 128, 384))  # tokens, C, V

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
    """transformers' Qwen3 MoE block (SwiGLU: its hidden size is 2/3 H, for the same FLOPs).

    Built by itself it loops over the experts; within a model transformers may choose grouped_mm.
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


# ---------------------------------------------------------------------------- WHOLE MODELS


def nanogpt_step(folder: str, fields: dict, B: int, T: int, V: int, options, compiled: bool) -> Callable:
    """nanoGPT's model and a step as its train.py does one, with its optimizer and its compile."""
    nanogpt, device = load_nanogpt(folder), torch.device(options.device)
    sizes = {name: fields[name] for name in ("n_layer", "n_head", "n_embd")}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        raw = nanogpt.GPT(nanogpt.GPTConfig(block_size=T, vocab_size=V, dropout=0.0, **sizes)).to(device)
        optimizer = raw.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    model = torch.compile(raw) if compiled else raw
    tokens = torch.randint(0, V, (B, T + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run():
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run.model = raw
    return run


def bench_models(options, sizes: dict[str, dict], B: int, T: int, V: int, nanogpt: str = "") -> list[dict]:
    """Optimizer steps of whole models, alternating; those of a size in turns with nanoGPT's, if there."""
    device, runs, rows = torch.device(options.device), {}, []
    for compiled in {0: (False,), 1: (True,), 2: (False, True)}[options.compile]:
        for name, fields in sizes.items():
            torch.manual_seed(0)
            model = GPTLMHeadModel(GPTConfig(block_size=T, vocab_size=V, **fields)).to(device).train()
            model.update_routers()
            model.loss_chunk = -1
            if compiled:
                for block in model.transformer.h:
                    block.compile(fullgraph=True)
            run = training_step(model, B, T, options.dtype)
            run.model = model
            runs[name, compiled, "ours"] = run
            if nanogpt and not fields.get("use_moe", True):
                run = nanogpt_step(nanogpt, fields, B, T, V, options, compiled)
                runs[name, compiled, "nanoGPT"] = run
    seconds = alternate(runs, device, options.rounds, warmup=2)
    peaks = {key: memory_bytes(run, device)[0] for key, run in runs.items()}
    for key, run in runs.items():
        name, compiled, whose = key
        ours = runs[name, compiled, "ours"].model
        mfu = ours.estimate_mfu(B, seconds[key])
        row = {"model": name, "compiled": "yes" if compiled else "no"}
        row |= {"whose": whose} if nanogpt else {}
        row |= {
            "parameters": f"{sum(p.numel() for p in run.model.parameters()):,}",
            "active": f"{ours.get_num_active_params():,}", "B x T": f"{B} x {T}", "V": f"{V}",
            "dtype": options.dtype, "ms": 1000 * seconds[key], "tokens/s": round(B * T / seconds[key]),
            "MFU %": "" if mfu is None else 100 * mfu, "peak MiB": peaks[key] / 2**20,
        }  # fmt: skip
        if nanogpt:
            theirs = (name, compiled, "nanoGPT")
            row["time x nanoGPT"] = seconds[key] / seconds[theirs] if theirs in runs else ""
            row["memory x nanoGPT"] = peaks[key] / peaks[theirs] if theirs in runs else ""
        rows.append(row)
    return rows


def sizes_of(options, default: str) -> dict[str, dict]:
    """The fields of GPTConfig of those of MODEL_SIZES that --size names. ValueError for others."""
    names = (options.size or default).split(",")
    if not MODEL_SIZES.keys() >= set(names) or (len(names) > 1 and "," not in default):
        raise ValueError(f"size={options.size!r}: choose of {', '.join(MODEL_SIZES)}")
    return {name: MODEL_SIZES[name] for name in names}


def bench_step(options) -> list[dict]:
    """4 layers, 384 wide, dense and 8 experts top-2, at B = 8, T = 256, V = 8192."""
    small = dict(n_layer=4, n_head=6, n_embd=384)
    sizes = {
        "dense": small | dict(use_moe=False),
        "8 experts top-2": small | dict(num_experts=8, num_experts_per_tok=2),
    }
    sizes["8 experts top-2, same active FLOPs"] = sizes["8 experts top-2"] | dict(expert_hidden_size=768)
    return bench_models(options, sizes, B=8, T=256, V=8192)


def bench_train(options) -> list[dict]:
    """The named sizes of MODEL_SIZES, at the GPT-2 vocabulary unless said otherwise."""
    sizes = sizes_of(options, "d12,d12-moe8x2,d24")
    B, T = options.B or 4, options.T or 1024
    return bench_models(options, sizes, B, T, options.vocab_size, options.nanogpt)


# ---------------------------------------------------------------------------- LOSS HEAD


def head_methods(chunks: tuple[int, ...]) -> dict[str, Callable]:
    """Functions of x (N, C), weight (V, C), targets (N,) that give the mean cross-entropy."""
    methods = {"all logits": lambda x, weight, targets: F.cross_entropy(F.linear(x, weight).float(), targets)}
    for chunk in chunks:
        name = "ours, auto" if chunk == -1 else f"ours, {chunk} rows"
        methods[name] = partial(linear_cross_entropy, chunk=chunk)
    if hasattr(nn, "LinearCrossEntropyOptions"):
        settings = nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        methods["torch's, 512 rows"] = partial(F.linear_cross_entropy, options=settings)
    return methods


def bench_head(options) -> list[dict]:
    """Forward and backward of the loss head, relative to all logits at once."""
    device, rows = torch.device(options.device), []
    for N, C, V in HEAD_SIZES:
        N = options.tokens or N
        torch.manual_seed(0)
        x = torch.randn(N, C, device=device).requires_grad_()
        weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
        targets = torch.randint(0, V, (N,), device=device)

        def run(method, x=x, weight=weight, targets=targets):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                loss = method(x, weight, targets)
            loss.backward()
            x.grad = weight.grad = None
            return loss.detach()

        runs = {name: partial(run, method) for name, method in head_methods((-1, 128, 512, 1024)).items()}
        seconds = alternate(runs, device, options.rounds, warmup=1)
        peaks = {name: memory_bytes(each, device)[0] for name, each in runs.items()}
        with torch.no_grad():
            exact = F.cross_entropy(x.double() @ weight.double().t(), targets)
        for name, each in runs.items():
            rows.append({
                "tokens,C,V": f"{N},{C},{V}", "head": name, "ms": 1000 * seconds[name],
                "x all": seconds[name] / seconds["all logits"], "peak MiB": peaks[name] / 2**20,
                "memory x all": peaks[name] / peaks["all logits"],
                "loss off by": f"{(each() - exact).abs().item():.0e}",
            })  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- HELLASWAG


def bench_hellaswag(options) -> list[dict]:
    """Questions per second: four padded rows and all logits for each, against hellaswag.py's way."""
    device, ((name, fields),) = torch.device(options.device), sizes_of(options, "d12").items()
    torch.manual_seed(0)
    model = GPTLMHeadModel(GPTConfig(vocab_size=50304, **fields)).to(device).eval()
    path = Path(options.data) if options.data else hs.download("val")
    every = hs.load_questions(path, None, "completion", "gpt2", 1024, 50304)
    questions = every[:: max(1, len(every) // options.limit)][: options.limit]  # from the whole file

    def score(method):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return method(model, questions)

    methods = {"plain": hs.score_one_by_one, "ours": hs.score_batched}
    runs = {method: partial(score, function) for method, function in methods.items()}
    seconds = alternate(runs, device, options.rounds, warmup=1)
    losses = {method: run() for method, run in runs.items()}
    choices = {method: hs.tally(questions, each).choices for method, each in losses.items()}
    return [
        {
            "method": method, "model": name, "questions": len(questions), "s": seconds[method],
            "questions/s": len(questions) / seconds[method], "x plain": seconds["plain"] / seconds[method],
            "same choices": sum(map(int.__eq__, choices[method], choices["plain"])),
            "losses off by": f"{(losses[method] - losses['plain']).abs().max().item():.0e}",
        }
        for method in methods
    ]  # fmt: skip


# ---------------------------------------------------------------------------- CHECKPOINTS


def bench_checkpoint(options) -> list[dict]:
    """What a checkpoint costs: model and AdamW's moments of a --size, d12 unless said otherwise."""
    (fields,) = sizes_of(options, "d12").values()
    model = GPTLMHeadModel(GPTConfig(**fields)).to(options.device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), model.device.type)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now it has its moments
    state = {
        "model": model.state_dict(), "config": model.config.to_dict(), "optimizer": optimizer.state_dict()
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may be in memory
        writer = CheckpointWriter(folder, keep_last=1, say=lambda line: None)
        seconds: dict[str, list[float]] = defaultdict(list)
        for step in range(options.rounds + 1):
            pause = writer.save(state | {"step": step})
            if error := writer.wait():
                raise error
            seconds["pause of training" if step else "first pause"].append(pause)
            seconds["writing and reading back, in the background"].append(writer.seconds)
            for part, read in (("verifying", verify_checkpoint), ("verifying and loading", load_checkpoint)):
                begin = time.perf_counter()
                read(writer.path)
                seconds[part].append(time.perf_counter() - begin)
        gigabytes = writer.path.stat().st_size / 1e9
    times = {part: 1e3 * median(taken) for part, taken in seconds.items()}
    return [{"part": p, "GB": gigabytes, "ms": ms, "ms per GB": ms / gigabytes} for p, ms in times.items()]


# ---------------------------------------------------------------------------- THE LOOP

SKIPPED = 5  # steps at the beginning that are not measured: they make kernels and caches ready


def run_loop(folder: str, log: str, steps: int, B: int, T: int, more: list[str]) -> None:
    """A silent run of train_gpt_moe.py with the demo's model and the data in folder/data, logged to
    folder/log; more: flags. ValueError if it fails."""
    import train_gpt_moe

    flags = f"""--preset demo --B {B} --T {T} --total_batch_size {B * T} --max_steps {steps} --warmup_steps 1
        --optimizer adamw --max_lr 1e-3 --min_lr 1e-4 --infer_step 0 --sample_every 0 --val_steps 1
        --plot False""".split()
    flags += ["--data_dir", f"{folder}/data", "--log_dir", f"{folder}/{log}", *more]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train_gpt_moe.main(flags)
    if code != 0:
        raise ValueError(f"the run of the loop ended with exit code {code}")


@contextlib.contextmanager
def timed(owner, name: str, part: str, spent: dict[str, list]) -> Iterator[None]:
    """Within it, every call of owner.name adds (when it began, its seconds) to spent[part]."""
    original = getattr(owner, name)

    def call(*arguments, **named):
        start = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            spent[part].append((start, time.perf_counter() - start))

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def loop_times(folder: str, steps: int, B: int, T: int, collector: str) -> dict[str, float]:
    """Milliseconds per step, by part, of train_gpt_moe.py with the demo's model on a CPU.

    folder: with the demo's data; the log is written beside them. collector: "frozen", as the loop has the
    garbage collector, or "python", as Python has it.
    """
    import train_gpt_moe
    from training import parallel
    from training.log import RunLog

    spent, collections = defaultdict(list), []
    places = {
        "forward": [(GPTLMHeadModel, "forward")], "backward": [(torch.Tensor, "backward")],
        "norm, clip, AdamW": [
            (parallel, "gradient_norm"), (parallel, "clip_gradients"), (torch.optim.AdamW, "step"),
            (torch.optim.AdamW, "zero_grad"),
        ],
        "next batch": [(train_gpt_moe.faults, "next_batch")], "log": [(RunLog, "step")],
    }  # fmt: skip

    def collected(phase, info):
        collections.append(time.perf_counter())

    with contextlib.ExitStack() as stack:
        for part, calls in places.items():
            for owner, name in calls:
                stack.enter_context(timed(owner, name, part, spent))
        gc.callbacks.append(collected)
        stack.callback(gc.callbacks.remove, collected)
        if collector == "python":
            for name in ("freeze", "disable"):
                stack.enter_context(mock.patch.object(gc, name))
        run_loop(folder, collector, steps, B, T, ["--device", "cpu"])
    spent["in the garbage collector"] = [(a, b - a) for a, b in zip(*[iter(collections)] * 2, strict=True)]
    # A step lasts from one call of the log to the next.
    marks = [start for start, _ in spent["log"]][SKIPPED:]
    took, first, last = [b - a for a, b in pairwise(marks)], marks[0], marks[-1]
    means = {
        part: sum(seconds for start, seconds in calls if first <= start < last) / len(took)
        for part, calls in spent.items()
    }
    collecting, step = means.pop("in the garbage collector"), sum(took) / len(took)
    means |= {"the rest": step - sum(means.values()), "in the garbage collector": collecting}
    means |= {"a step": step, "the slowest step": max(took)}
    return {part: 1000 * seconds for part, seconds in means.items()}


def step_times(folder: str, steps: int, B: int, T: int, device: torch.device, more: list[str]) -> list[float]:
    """Milliseconds of a step of train_gpt_moe.py's loop, and of its forward, backward and update alone.

    The latter is done as often after the run, with its model and optimizer, on a batch of it. The device is
    waited for where the timing begins and where it ends: in between it may fall as far behind as the loop
    lets it.
    """
    import train_gpt_moe
    from bench.measure import synchronize
    from training.log import RunLog

    marks, log, train, measured = [], RunLog.step, train_gpt_moe.train, steps - 1 - SKIPPED

    def mark():
        synchronize(device)
        marks.append(time.perf_counter())

    def marked_log(self, record):
        if record["step"] in (SKIPPED, steps - 1):
            mark()
        log(self, record)

    def train_and_again(run):
        code, batch = train(run), run.train_loader.next_batch()
        alone = training_step(run.model.train(), B, T, run.dtype, run.optimizer, lambda: batch)
        gc.disable()  # as in the loop
        for number in range(SKIPPED + 1 + measured):
            if number == SKIPPED + 1:
                mark()
            alone()
        mark()
        gc.enable()
        return code

    patch = mock.patch.object
    with patch(RunLog, "step", marked_log), patch(train_gpt_moe, "train", train_and_again):
        run_loop(folder, "run", steps, B, T, ["--device", str(device), *more])
    return [1000 * (marks[i + 1] - marks[i]) / measured for i in (0, 2)]


def loop_share(options, folder: str, turns: int = 3) -> list[dict]:
    """What of a step is the loop's own, on any device: medians of `turns` runs, with the demo's model or one
    of the sizes of --size."""
    device, more = choose_device(options.device, 0), ["--dtype", options.dtype]
    more += ["--use_compile", str(bool(options.compile))]
    if options.size:
        (fields,) = sizes_of(options, "d12").values()
        more += ["--vocab_size", str(options.vocab_size)]
        more += [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    sizes = (4 * options.rounds + 10, options.B or 16, options.T or 128)
    times = [step_times(folder, *sizes, device, more) for _ in range(turns)]
    whole, alone = median(loop for loop, _ in times), median(alone for _, alone in times)
    own = median(loop - alone for loop, alone in times)
    parts = {"a step of the loop": whole, "forward, backward, update alone": alone, "the loop's own": own}
    return [{"part": part, "ms": ms, "% of a step": 100 * ms / whole} for part, ms in parts.items()]


def bench_loop(options) -> list[dict]:
    """Where a step of train_gpt_moe.py's loop spends its time, with the demo's model. By part on a CPU only:
    elsewhere calls return before their work is done."""
    kind = torch.device(options.device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={options.device!r}: the loop is measured on cpu and cuda")
    B, T, steps = options.B or 16, options.T or 128, 4 * options.rounds + 10
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_demo(f"{folder}/data")
        if kind == "cuda":
            return loop_share(options, folder)
        ours, stock = (loop_times(folder, steps, B, T, collector) for collector in ("frozen", "python"))
    return [
        {
            "part": part, "ms": ours[part], "% of a step": 100 * ours[part] / ours["a step"],
            "ms, Python's collector": stock[part],
        }
        for part in ours
    ]  # fmt: skip


# ---------------------------------------------------------------------------- COMMAND LINE

COMMANDS = {
    "moe": bench_moe, "step": bench_step, "train": bench_train, "ladder": bench_ladder, "head": bench_head,
    "hellaswag": bench_hellaswag, "checkpoint": bench_checkpoint, "loop": bench_loop,
    "time_to_loss": time_to_loss, "moe_pays": moe_pays,
    "scale": lambda options: bench_scale(options, MODEL_SIZES),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", type=int, default=0, choices=(0, 1, 2), help="1: yes; 2: with, without")
    parser.add_argument("--rounds", type=int, default=15, help="measured calls of each contender")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--tokens", type=int, default=0, help="moe: tokens, instead of each size's own")
    parser.add_argument("--size", default="", help=f"of a model: {', '.join(MODEL_SIZES)}")
    parser.add_argument("--B", type=int, default=0, help="sequences; 0 = the command's own number")
    parser.add_argument("--T", type=int, default=0, help="tokens per sequence; 0 = the command's own")
    parser.add_argument("--vocab_size", type=int, default=50304, help="train: ids")
    parser.add_argument("--nanogpt", default="", help="train, time_to_loss: a checkout to run in turns with")
    parser.add_argument("--data", default="", help="hellaswag: its questions; empty = downloaded once")
    parser.add_argument("--limit", type=int, default=30, help="hellaswag: questions, from the whole file")
    parser.add_argument("--text", default="", help="time_to_loss, moe_pays: the text to train on")
    parser.add_argument("--steps", type=int, default=0, help="time_to_loss: the baseline's; moe_pays: all")
    parser.add_argument("--seeds", type=int, default=3, help="moe_pays: runs of each model")
    add_flags(parser)
    parser.add_argument("--csv", default="", help="write the table here as well")
    parser.add_argument("--png", default="", help="and draw it here (or .svg, .pdf)")
    options = parser.parse_args(arguments)
    for name in ("threads", "tokens", "B", "T", "steps"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} {getattr(options, name)}: must not be negative")
    for name in ("rounds", "limit", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    for name in ("csv", "png"):
        if not Path(getattr(options, name)).parent.is_dir():
            parser.error(f"--{name} {getattr(options, name)}: there is no such folder")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.png and Path(options.png).suffix not in PICTURES:
        parser.error(f"png={options.png!r}: the name must end in {', '.join(PICTURES)}")
    try:
        setting = f"torch {torch.__version__}, {in_words(choose_device(options.device, 0))}"
        if options.command not in ("time_to_loss", "moe_pays", "scale", "loop"):  # they say it themselves
            setting += f", {options.dtype}, medians of {options.rounds} calls in turns"
        print(f"{setting}\n")
        rows = COMMANDS[options.command](options)
        report(rows, options.csv, options.png if options.command != "time_to_loss" else "")  # has its own
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
