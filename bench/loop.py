"""The cost of training besides its steps: the loop's work (logging, terminal, signals), and checkpoints.

    python -m bench loop [--device cuda --size d12]
    python -m bench checkpoint --size d12

Whenever the loop asks for a step, train_step is called twice. The first call's time, plus the loop's time
since the previous call, is a step of the loop. The second call's time is a step without the loop."""

import contextlib
import io
import tempfile
import time
from functools import partial
from itertools import pairwise
from statistics import median

import torch

from bench.measure import alternate
from bench.models import size_of
from layers.attention import prefer_backend
from model import GPTConfig, GPTLMHeadModel
from tokens.demo import prepare_demo
from train_gpt_moe import parse_config, train, train_step
from training import faults
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import load_checkpoint, verify_checkpoint
from training.parallel import World
from training.setup import Run, open_log, set_up

SKIPPED = 5  # first steps, not measured: kernels and caches warm up


def bench_loop(options) -> list[dict]:
    """Medians over 4 * rounds steps of a run of train_gpt_moe.py with the demo's data: of the demo, or of a
    model of --size."""
    flags = f"""--B {options.B} --T {options.T} --total_batch_size {options.B * options.T} --warmup_steps 1
        --max_steps {4 * options.rounds + SKIPPED} --infer_step 0 --sample_every 0 --val_steps 1 --plot False
        --device {options.device} --dtype {options.dtype} --use_compile {bool(options.compile)}""".split()
    own = dict(vocab_size=options.vocab_size)
    fields = size_of(options.size) | own if options.size else dict(preset="demo")
    flags += [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    ends = []  # of the first and the second train_step, in seconds, for each step of the loop

    def train_twice(run: Run, step: int) -> dict:
        record = train_step(run, step)  # waits for the device once, before the update
        first = time.perf_counter()
        train_step(run, step)
        ends.append((first, time.perf_counter()))
        return record

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prepare_demo(f"{folder}/data")
        config, given = parse_config([*flags, "--data_dir", f"{folder}/data", "--log_dir", f"{folder}/log"])
        run = set_up(config, given, World(0, 0, 1, options.device))
        open_log(run)
        with prefer_backend(config.attention_backend, options.device):
            if train(run, train_twice) != faults.OK:
                raise ValueError("the run of the loop failed")
    pairs = pairwise(ends[SKIPPED - 1 :])
    steps = [(first - before, second - first) for (_, before), (first, second) in pairs]
    whole, alone = map(median, zip(*steps, strict=True))
    own = median(step - without for step, without in steps)
    parts = {"a step of the loop": whole, "train_step alone": alone, "the loop's own": own}
    return [{"part": part, "ms": 1000 * s, "% of a step": 100 * s / whole} for part, s in parts.items()]


def bench_checkpoint(options) -> list[dict]:
    """Milliseconds of each part of a checkpoint, for a model of --size with AdamW's moments."""
    model = GPTLMHeadModel(GPTConfig(**size_of(options.size))).to(options.device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), model.device.type)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    state = dict(model=model.state_dict(), config=model.config.to_dict(), optimizer=optimizer.state_dict())
    pauses, writing = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may be in memory
        writer = CheckpointWriter(folder, keep_last=1, say=lambda line: None)
        for step in range(options.rounds + 1):
            pauses.append(writer.save(state | {"step": step}))
            if error := writer.wait():
                raise error
            writing.append(writer.seconds)
        reads = {"verifying": verify_checkpoint, "verifying and loading": load_checkpoint}
        reads = {part: partial(read, writer.path) for part, read in reads.items()}
        seconds = alternate(reads, options.device, options.rounds, warmup=0)
        gigabytes = writer.path.stat().st_size / 1e9
    seconds = {"first pause": pauses[0], "pause of training": median(pauses[1:]),
               "writing and reading back, in the background": median(writing)} | seconds  # fmt: skip
    return [{"part": part, "GB": gigabytes, "ms": 1e3 * s, "ms per GB": 1e3 * s / gigabytes}
            for part, s in seconds.items()]  # fmt: skip
