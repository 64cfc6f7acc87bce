"""All that one GPU can tell about this project, in one command, the most important first.

    python -m bench gpu --minutes 8 --csv gpu.csv
    python -m bench gpu --device cpu      # the same parts at tiny sizes, to see what the command does

Each part is a process of its own, because a kernel that fails or hangs can take its process with it. A part
may use its share of the time that is left. Its rows are printed, and appended to the CSV file, at once."""

import contextlib
import csv
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.ladder import bench_ladder
from bench.layer import HEAD_SIZES, compare_heads
from bench.loop import bench_checkpoint, bench_loop
from bench.measure import print_row
from bench.models import compare_models, compare_scoring, size_of
from hellaswag import Question
from layers.attention import BACKENDS, time_backend
from model import GPTConfig
from training.parallel import Layout, World, make_layout

SIZES = {  # the options of the other commands, and the parts' own
    "cuda": dict(dtype="bfloat16", compile=1, rounds=8, size="d12", vocab_size=50304, B=16, T=1024,
                 tokens=8192, models=("d12", "d12-moe8x2", "d12-moe64x8"), batches=(16, 32, 64)),
    "cpu": dict(dtype="float32", compile=0, rounds=1, size="d4", vocab_size=384, B=1, T=16,
                tokens=32, models=("d4", "d4-moe4x2"), batches=(1, 2))}  # fmt: skip
OTHERS = "(cuda or triton or kernel or grouped_product) and not on_a_gpu"  # in the names of tests or files


def run_tests(paths: str, names: str, o: SimpleNamespace) -> Iterator[dict]:
    """Results of the tests in these files and folders whose names match the expression `names` of pytest."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=line", "-m", "not slow"]
    command += ["-k", names, *paths.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    *lines, last = (done.stdout + done.stderr).strip().splitlines()
    ok = "no" if done.returncode else "yes"
    yield from ({"tests": line, "ok": ok} for line in lines if line.startswith(("FAILED", "ERROR")))
    yield {"tests": last, "ok": ok}


def measure_models(o: SimpleNamespace) -> Iterator[dict]:
    """Tokens per second and MFU of training steps, for several models and B."""
    for B in o.batches:
        for name in o.models:
            torch._dynamo.reset()  # otherwise torch compiles the second B for any B
            try:
                yield from compare_models(o, {name: size_of(name)}, B, o.T, o.vocab_size)
            except torch.OutOfMemoryError:
                yield {"model": name, "B x T": f"{B} x {o.T}", "ms": "out of memory"}


def measure_layouts(o: SimpleNamespace) -> Iterator[dict]:
    """FSDP and expert parallelism in a group of one process, beside a process without a group."""
    how = dict(backend="nccl", device_id=o.device) if o.device.type == "cuda" else dict(backend="gloo")
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **how)
    mesh = init_device_mesh(o.device.type, (1, 1), mesh_dim_names=("replica", "expert"))
    world = World(0, 0, 1, o.device)
    # ep_size=2 chooses the code of expert parallelism. The group's one process has all experts.
    layouts = {"none": Layout(world), "fsdp": make_layout(world, "fsdp", 0, 1),
               "ep": Layout(world, ep_size=2, mesh=mesh)}  # fmt: skip
    for name, layout in layouts.items():
        (row,) = compare_models(o, {o.models[1]: size_of(o.models[1])}, o.B, o.T, o.vocab_size, layout=layout)
        yield {"layout": name} | row
    dist.destroy_process_group()


def measure_attention(o: SimpleNamespace) -> Iterator[dict]:
    """Milliseconds of one layer's attention, forward and backward, by each backend; inf if it cannot run."""
    config, dtype = GPTConfig(**size_of(o.size)), getattr(torch, o.dtype)
    for name, backend in BACKENDS.items():
        yield {"attention": name, "ms": 1000 * time_backend(backend, config, o.B, o.T, o.device, dtype)}


def measure_hellaswag(o: SimpleNamespace) -> list[dict]:
    """Questions per second. They are random tokens, about as long as HellaSwag's."""
    draw = random.Random(0)
    context, *endings = ([draw.randrange(256) for _ in range(n)] for n in (80, 20, 25, 30, 35))
    question = Question([(context, ending) for ending in endings], [1] * 4, 0, False, False)
    return compare_scoring(o, [question] * (o.tokens // 16))


ENGINES = ("loop", "grouped_mm", "triton", "gather")  # of layers/experts.py
ENGINE_TESTS = "tests/layers/test_experts.py tests/bench/test_gpu.py"
PARTS = {  # name: (its share of the time, its function)
    **{f"{name} engine": (2, partial(run_tests, ENGINE_TESTS, f"on_a_gpu and {name}")) for name in ENGINES},
    "loss head": (1, partial(run_tests, "tests/layers/test_linear_cross_entropy.py", "kernel")),
    "tests": (4, partial(run_tests, "tests/layers", OTHERS)), "models": (10, measure_models),
    "ladder": (8, bench_ladder), "head": (1, lambda o: compare_heads(o, *HEAD_SIZES[o.compile - 1])),
    "attention": (1, measure_attention), "hellaswag": (1, measure_hellaswag), "loop": (2, bench_loop),
    "layouts": (3, measure_layouts), "checkpoint": (2, bench_checkpoint)}  # fmt: skip


def run_part(name: str, o: SimpleNamespace, path: str) -> None:
    """In the part's process: print its rows. Exit code 1 if it failed."""
    os.setsid()  # one group, so that the processes which it starts can be stopped with it
    screen, row, failed = sys.stdout, {}, False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for number, now in enumerate(PARTS[name][1](o)):
                print_row(now, row, screen)
                row, failed = now, failed or now.get("ok") == "no"
                with open(path or os.devnull, "a", newline="") as file:
                    csv.writer(file).writerows([name, number, *item] for item in row.items())
    except Exception as error:
        (file, line, *_), kind = traceback.extract_tb(error.__traceback__)[-1], type(error).__name__
        text = " ".join(str(error).split())[:200]
        print(f"failed: {kind}: {text} ({file}:{line})", file=screen, flush=True)
        failed = True
    sys.exit(failed)


def bench_gpu(options) -> list[dict]:
    """A row per part: its seconds, and how it ended. The parts' own rows are printed before."""
    kind, path, options.csv, summary = options.device.type, options.csv, "", []
    o = SimpleNamespace(device=options.device, **SIZES[kind])
    skipped = () if kind == "cuda" else ("engine", "tests")  # all of their tests need a GPU
    parts = {name: share for name, (share, _) in PARTS.items() if not name.endswith(skipped)}
    context = multiprocessing.get_context("forkserver")  # its server imports this file, and uses no GPU
    context.set_forkserver_preload(["bench.gpu"])
    end = time.monotonic() + 60 * options.minutes
    for number, (name, share) in enumerate(parts.items()):
        begin = time.monotonic()
        limit = max(0.0, end - begin) * share / sum(list(parts.values())[number:])
        print(f"\n{name}: at most {limit:.0f} s", flush=True)
        process = context.Process(target=run_part, args=(name, o, path))
        process.start()
        try:
            process.join(limit)
        finally:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        result = {None: "stopped", 0: "done", 1: "failed"}.get(process.exitcode, f"code {process.exitcode}")
        summary.append({"part": name, "seconds": time.monotonic() - begin, "result": result})
    return summary
