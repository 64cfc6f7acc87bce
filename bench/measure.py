"""What the benchmarks share: times in turns, peak memory, a run for train_step, tables and pictures."""

import csv
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from layers.attention import synchronize
from model import GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training.parallel import Layout, World
from training.setup import Run

DRAWN = ("tokens/s", "questions/s", "ms", "s", "MFU %", "peak MiB")  # columns that a picture shows


def alternate(
    contenders: dict[Any, Callable], device: torch.device, rounds: int, warmup: int = 3
) -> dict[Any, float]:
    """Median seconds of each function. They take turns, `rounds` times, so that noise meets all alike."""
    times = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def memory_bytes(call: Callable, device: torch.device) -> tuple[int, int]:
    """(peak, kept): the most bytes that tensors made by call() take at once, and those alive when it returns.

    On CUDA by the allocator's counters. On a CPU by torch's profiler, which makes the call slow.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        kept = torch.cuda.memory_allocated(device) - before
        return torch.cuda.max_memory_allocated(device) - before, kept
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()  # noqa: F841
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(live), live[-1]


# ---------------------------------------------------------------------------- TRAINING STEPS


class RandomBatch:
    """A loader that returns the same random tokens at every step."""

    def __init__(self, model: GPTLMHeadModel, B: int, T: int):
        tokens = torch.randint(0, model.config.vocab_size, (B, T + 1), device=model.device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, (B, T) each."""
        return self.batch


def one_process(device: torch.device) -> Layout:
    """The layout of a run that has this device for itself."""
    return Layout(World(0, 0, 1, device))


def make_run(model: GPTLMHeadModel, loader: Any, **fields: Any) -> Run:
    """A run whose steps train_step(run, step) can do: by default AdamW, learning rate 1e-4, one process.

    loader: whatever has next_batch(). fields: those of Run, in place of the defaults.
    """
    if "optimizer" not in fields:
        fields["optimizer"] = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), model.device.type)
    defaults = dict(
        config=TrainConfig(max_lr=1e-4, min_lr=1e-4, warmup_steps=0), layout=one_process(model.device)
    )
    run = Run(model=model, train_loader=loader, **defaults | fields)
    run.model.update_routers()  # as train() does: from here on the routers count whole optimizer steps
    return run


# ---------------------------------------------------------------------------- TABLES


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def print_table(rows: list[dict], csv_path: str = "", picture: str = "") -> None:
    """Print the rows as a Markdown table; with a path, write them as CSV and as a picture as well."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        values = (f"{row[n]:.2f}" if isinstance(row[n], float) else str(row[n]) for n in names)
        print("| " + " | ".join(values) + " |")
    if csv_path:
        with open(csv_path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    if picture:
        draw_bars(rows, picture)


def draw_bars(rows: list[dict], path: str) -> None:
    """Draw the columns of DRAWN as bars, one panel each. ValueError if the table has none of them."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    shown = [name for name in DRAWN if any(isinstance(row.get(name), int | float) for row in rows)]
    if not shown:
        raise ValueError(f"png={path!r}: this table has none of the columns {', '.join(DRAWN)} to draw")
    labels = [", ".join(v for v in row.values() if isinstance(v, str) and v) for row in rows]
    figure = Figure(figsize=(2.5 + 3.2 * len(shown), 1.2 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, shown, strict=True):
        values = [row[name] if isinstance(row[name], int | float) else 0 for row in rows]
        axes.bar_label(axes.barh(range(len(rows)), values), [f"{value:,.4g}" for value in values])
        axes.set_title(name)
        axes.margins(x=0.25)  # room for the numbers
    panels[0].set_yticks(range(len(rows)), labels)
    panels[0].invert_yaxis()
    figure.savefig(path)
