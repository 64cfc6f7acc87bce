"""What of a training step's time is the loop's own: logging, the terminal, signals, bookkeeping.

    python -m bench loop [--device cuda --size d12]

Each turn is a real run of train_gpt_moe.py's loop with the demo's data, and by default with the demo's model.
A step of the loop lasts from one line of metrics.jsonl to the next. After the run, train_step is called
directly with the same model, optimizer and data. The difference between the two is the loop's own.
"""

import contextlib
import io
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from bench.measure import alternate, one_process
from bench.models import size_of
from layers.attention import prefer_backend
from tokens.demo import prepare_demo
from train_gpt_moe import parse_config, train, train_step
from training import faults
from training.setup import Run, open_log, set_up

TURNS = 3
SKIPPED = 5  # first steps, which are not measured: kernels and caches get ready in them


def bench_loop(options) -> list[dict]:
    """Medians of TURNS runs, each of 4 * rounds measured steps."""
    steps = 4 * options.rounds + SKIPPED + 1
    flags = f"""--preset demo --B {options.B} --T {options.T} --total_batch_size {options.B * options.T}
        --max_steps {steps} --warmup_steps 1 --optimizer adamw --max_lr 1e-3 --min_lr 1e-4 --infer_step 0
        --sample_every 0 --val_steps 1 --plot False --device {options.device} --dtype {options.dtype}
        --use_compile {bool(options.compile)}""".split()
    if options.size:
        fields = size_of(options.size) | dict(vocab_size=options.vocab_size)
        flags += [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_demo(f"{folder}/data")
        flags += ["--data_dir", f"{folder}/data", "--log_dir"]
        turns = [time_turn([*flags, f"{folder}/{turn}"], options.device) for turn in range(TURNS)]
    whole, alone, passes = (median(times) for times in zip(*turns, strict=True))
    parts = {
        "a step of the loop": whole, "train_step alone": alone, "forward and backward alone": passes,
        "the loop's own": median(loop - step for loop, step, _ in turns),
    }  # fmt: skip
    return [{"part": part, "ms": 1000 * s, "% of a step": 100 * s / whole} for part, s in parts.items()]


def time_turn(flags: list[str], device: torch.device) -> tuple[float, float, float]:
    """Median seconds of a step of the loop, of train_step alone, and of forward and backward alone."""
    config, given = parse_config(flags)
    with contextlib.redirect_stdout(io.StringIO()):
        run = set_up(config, given, one_process(device).world)
        open_log(run)
        with prefer_backend(config.attention_backend, device):
            if train(run) != faults.OK:
                raise ValueError("the run of the loop failed")
    with open(Path(config.log_dir) / "metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    logged = [record["elapsed_s"] for record in records if "loss" in record]
    with faults.collector_paused(), prefer_backend(config.attention_backend, device):
        called = []
        for step in range(config.max_steps):
            train_step(run, step)  # waits for the device once, as it does in the loop
            called.append(time.perf_counter())
        passes = forward_and_backward_seconds(run, config.max_steps)
    return median_step(logged), median_step(called), passes


def median_step(marks: list[float]) -> float:
    """Median seconds between the ends of two steps, without the first SKIPPED."""
    return median(end - begin for begin, end in pairwise(marks[SKIPPED:]))


def forward_and_backward_seconds(run: Run, rounds: int) -> float:
    """Median seconds of the forward and backward pass of one micro-step."""
    x, y = run.train_loader.next_batch()  # (B, T), (B, T)

    def forward_and_backward():
        with run.autocast():
            loss = run.parallel_model(x, targets=y, return_dict=True).loss
        loss.backward()
        run.optimizer.zero_grad(set_to_none=True)

    (seconds,) = alternate({"": forward_and_backward}, run.layout.world.device, rounds, SKIPPED).values()
    return seconds
