"""Shared code of the benchmarks: times in turns, peak memory, a run for train_step, tables."""

import csv
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from layers.attention import synchronize
from model import GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training.parallel import Layout, World
from training.setup import Run


def alternate(contenders: dict[Any, Callable], device: torch.device, rounds: int, warmup: int = 3) -> dict:
    """Median seconds of each function. They take turns, `rounds` times, so that noise affects all equally."""
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
    """(peak, kept): the most bytes that call()'s tensors take at once, and the bytes left when it returns."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        kept = torch.cuda.memory_allocated(device) - before
        return torch.cuda.max_memory_allocated(device) - before, kept
    # On a CPU torch's profiler counts the bytes. It makes the call slow.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()  # noqa: F841
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    return max(live), live[-1]


class RandomBatch:
    """A loader whose next_batch() returns the same random inputs and targets at every step, (B, T) each."""

    def __init__(self, model: GPTLMHeadModel, B: int, T: int):
        tokens = torch.randint(0, model.config.vocab_size, (B, T + 1), device=model.device)
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.next_batch = lambda: batch


def make_run(model: GPTLMHeadModel, loader: Any, **fields: Any) -> Run:
    """A run for train_step(run, step): by default AdamW, learning rate 1e-4, one process.
    loader: any object with next_batch(). fields: fields of Run that replace the defaults."""
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), model.device.type)
    defaults = dict(config=TrainConfig(max_lr=1e-4, min_lr=1e-4, warmup_steps=0), optimizer=optimizer,
                    layout=Layout(World(0, 0, 1, model.device)))  # fmt: skip
    run = Run(model=model, train_loader=loader, **defaults | fields)
    run.model.update_routers()  # as in train(): from now on routing statistics cover whole steps
    return run


def print_table(rows: list[dict], csv_path: str) -> None:
    """Print the rows as a Markdown table; unless the path is empty, also write them as CSV."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    texts = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in line] for line in lines]
    head, *rest = (f"| {' | '.join(line)} |" for line in texts)
    print("", head, "|" + "---|" * len(lines[0]), *rest, sep="\n")
    if csv_path:
        with open(csv_path, "w", newline="") as file:
            csv.writer(file).writerows(lines)
