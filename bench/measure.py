"""How bench.py and its like measure: alternating times, peak memory, tables as Markdown, CSV and picture."""

import csv
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn as nn

from layers.attention import synchronize

PICTURES = (".png", ".svg", ".pdf")
# Columns that a picture shows, as far as a table has them.
DRAWN = ("tokens/s", "questions/s", "ms", "s", "MFU %", "peak MiB")


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


def training_step(
    model, B: int, T: int, dtype: str = "float32", optimizer: torch.optim.Optimizer | None = None,
    next_batch: Callable | None = None,
) -> Callable:  # fmt: skip
    """A function that does one optimizer step: forward, backward, clip, update; as the training loop does,
    but for freeze_idle_experts, which only reads the counts while every expert is busy.

    optimizer: AdamW where it is None. next_batch() -> x, y (B, T) each; random tokens, always the same, where
    it is None.
    """
    device = model.device
    optimizer = optimizer or model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    if next_batch is None:
        tokens = torch.randint(0, model.config.vocab_size, (B, T + 1), device=device)
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run():
        x, y = next_batch() if next_batch else batch
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(x, targets=y, return_dict=True).loss
        loss.backward()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        model.update_routers()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def in_words(device: torch.device) -> str:
    """The device's name, or how many CPU threads there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def report(rows: list[dict], csv_path: str = "", picture: str = "") -> None:
    """Print the rows as a Markdown table; write them as CSV and as a picture if paths are given."""
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
        draw(rows, picture)


def draw(rows: list[dict], path: str) -> None:
    """The columns of DRAWN as bars, a panel each, into a file of PICTURES. ValueError if there are none."""
    from matplotlib.figure import Figure  # without pyplot: no window

    shown = [name for name in DRAWN if any(isinstance(row.get(name), int | float) for row in rows)]
    if not shown:
        raise ValueError(f"png={path!r}: this table has none of the columns {', '.join(DRAWN)} to draw")
    labels = [", ".join(str(v) for v in row.values() if isinstance(v, str) and v) for row in rows]
    size = (2.5 + 3.2 * len(shown), 1.2 + 0.32 * len(rows))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    for number, (axes, name) in enumerate(
        zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True)
    ):
        values = [row[name] if isinstance(row[name], int | float) else 0 for row in rows]
        bars = axes.barh(range(len(rows)), values, color="#0072B2")
        axes.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3, fontsize=8)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_yticks(range(len(rows)), labels if number == 0 else [""] * len(rows), fontsize=8)
        axes.margins(x=0.25)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def load_nanogpt(folder: str):
    """The module model.py of a checkout of nanoGPT, under another name than ours. FileNotFoundError."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"nanogpt={folder!r} has no model.py; git clone https://github.com/karpathy/nanoGPT {folder}"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module
