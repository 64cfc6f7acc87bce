"""Most of what one GPU can tell about this project, in one command, the most important first.

    python -m bench gpu --minutes 8 --csv gpu.csv
    python -m bench gpu --device cpu      # the same parts at tiny sizes, to see what the command does

Each part is a command of its own, because a kernel that fails or hangs can take its process with it. A part
may use its share of the time that is left. Its table is printed, and written to a file as gpu_loop.csv."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ENGINES = ("loop", "grouped_mm", "triton")  # of layers/experts.py
TEST = "-m pytest -o addopts= -q --tb=line -m 'not slow' {} -k '{}'"
ENGINE_TESTS = "tests/layers/test_experts.py tests/bench/test_gpu.py"
TESTS = {f"{name} engine": (2, TEST.format(ENGINE_TESTS, f"on_a_gpu and {name}")) for name in ENGINES} | {
    "loss head": (1, TEST.format("tests/layers/test_linear_cross_entropy.py", "kernel")),
    "tests": (4, TEST.format(
        "tests/layers", "(cuda or triton or kernel or grouped_product) and not on_a_gpu"))}  # fmt: skip


def list_parts(on_cuda: bool) -> dict[str, tuple[int, str]]:
    """name: (share of the time, Python's arguments). On a CPU tiny sizes, and no tests: they need a GPU."""
    how, low = "--device cpu --rounds 1", ""
    dense, moe, B, tokens, shape = "d4", "d4-moe4x2", 1, 32, "--T 16 --vocab_size 384"
    if on_cuda:
        how, low = "--device cuda --rounds 8", "--dtype bfloat16"
        dense, moe, B, tokens, shape = "d12", "d12-moe8x2", 16, 8192, "--T 1024"
    compiled, more = f"{how} {low} {shape} --compile {int(on_cuda)}", ",d12-moe64x8" if on_cuda else ""
    sizes = {f"models_B{B * n}": f"--size {dense},{moe}{more} --B {B * n}" for n in (1, 2, 4)}
    layouts = {f"layout_{name}": f"--size {moe} --B {B} --layout {name}" for name in ("none", "fsdp", "ep")}
    return (TESTS if on_cuda else {}) | {
        **{name: (3, f"-m bench train {compiled} {which}") for name, which in sizes.items()},
        "ladder": (8, f"-m bench ladder {how}"), "head": (1, f"-m bench head {how} {low} --tokens {tokens}"),
        "attention": (1, f"-m bench attention {how} {low} --size {dense} --B {B} --T {tokens // 8}"),
        "hellaswag": (
            1, f"-m bench hellaswag {how} {low} --size {dense} --data random --limit {tokens // 16}"),
        "loop": (2, f"-m bench loop {compiled} --size {dense} --B {B}"),
        **{name: (1, f"-m bench train {compiled} {which}") for name, which in layouts.items()},
        "checkpoint": (2, f"-m bench checkpoint {how} --size {dense}")}  # fmt: skip


def bench_gpu(options) -> list[dict]:
    """A row per part: its seconds, and how it ended. The parts print their own tables before."""
    parts, path, summary = list_parts(options.device.type == "cuda"), Path(options.csv), []
    end = time.monotonic() + 60 * options.minutes
    for number, (name, (share, arguments)) in enumerate(parts.items()):
        begin = time.monotonic()
        limit = max(0.0, end - begin) * share / sum(share for share, _ in list(parts.values())[number:])
        print(f"\n{name}: at most {limit:.0f} s", flush=True)
        if options.csv and arguments.startswith("-m bench"):
            arguments += f" --csv {shlex.quote(str(path.with_stem(f'{path.stem}_{name}')))}"
        # A session of its own: the processes that it starts are stopped with it.
        process = subprocess.Popen([sys.executable, *shlex.split(arguments)], start_new_session=True)
        try:
            result = {0: "done"}.get(process.wait(limit), f"failed, code {process.returncode}")
        except subprocess.TimeoutExpired:
            result = "stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        summary.append({"part": name, "seconds": time.monotonic() - begin, "result": result})
    return summary
