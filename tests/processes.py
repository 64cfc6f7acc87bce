"""Training processes for tests: real ones, which can be killed, without the seconds that importing takes.

    process = start(["--max_steps", "9"], "out.txt")            # python train_gpt_moe.py --max_steps 9
    ranks = start_ranks(2, ["--max_steps", "9"], "out.txt")     # what torchrun starts
    assert finish(process) == 0
    run_ranks(2, ["--max_steps", "9"], "out.txt")               # starts them, and waits for a good end

With script="test_x", test_x.main runs in its place. It returns an exit code, or what run_ranks is to return.
A server process imports the program once; every training process is forked from it (multiprocessing's
forkserver), so it has an id, memory, signals and an exit code of its own."""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import socket
import sys
import time
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from model import GPTLMHeadModel
from tokens import shards
from tokens.encodings import get_encoding
from tokens.shard_writer import describe
from training.checkpoints import list_checkpoints, load_checkpoint, step_of

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = "train_gpt_moe fineweb torch.utils.tensorboard bench.measure pytest hypothesis"
CONTEXT.set_forkserver_preload(PRELOADED.split())
PORTS = itertools.count(101 * os.getpid())  # other processes begin elsewhere

STEPS = 12
TINY = """--n_layer 2 --n_head 2 --n_embd 32 --num_experts 4 --num_experts_per_tok 2 --T 32 --B 4
    --total_batch_size 256 --max_steps 12 --warmup_steps 2 --max_lr 3e-3 --min_lr 3e-4 --infer_step 4
    --val_steps 2 --sample_every 0 --prompt Return --use_compile False --device cpu --checkpoint_every 3
    --tensorboard False --plot False --dropout 0.1 --router_bias_update_rate 0.01
    --router_z_loss_coef 0.001""".split()


def start(arguments, output, environment: Mapping = {}, sick: Mapping = {}, script: str = "train_gpt_moe"):
    """Start `script` with its arguments; stdout and stderr are appended to `output`. sick: see `poisoned`."""
    texts = [str(argument) for argument in arguments]
    process = CONTEXT.Process(target=_run, args=(script, texts, str(output), dict(environment), dict(sick)))
    here = Path(__file__).resolve().parent
    places = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(places)):  # for the server
        process.start()
    return process


def free_port() -> int:
    """A port from 20000 to 29999 at which nobody listens. The system gives out none of these by itself."""
    while True:
        port = 20_000 + next(PORTS) % 10_000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def start_ranks(size: int, arguments: list, output: str | Path, sick: Mapping = {},
                script: str = "train_gpt_moe", environment: Mapping = {}) -> list:  # fmt: skip
    """Start `size` processes that train together, as torchrun would."""
    names = dict(WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), **environment)
    each = ({**names, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size))
    return [start(arguments, output, names, sick, script) for names in each]


def run_ranks(size: int, arguments: list, output: Path, **options) -> list:
    """start_ranks, and wait for their end. AssertionError with the output unless all exit codes are 0.
    Returns what the ranks' mains have returned, if that is no exit code."""
    ranks = start_ranks(size, arguments, output, **options)
    assert [finish(rank) for rank in ranks] == [0] * size, output.read_text()
    return [torch.load(path) for path in sorted(output.parent.glob(f"{output.name}.rank*"))]


def finish(process, timeout: float = 600) -> int:
    """Wait for the process's end; its exit code, or minus the signal that ended it."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"process {process.pid} still ran after {timeout} s")
    return process.exitcode


def made_up_text() -> str:
    """Some 300 kB of words, the same every time; a few are frequent, so that there is something to learn."""
    chance = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(chance.choice(letters, size)) for size in chance.integers(1, 9, 500)]
    return " ".join(words[i % 500] for i in chance.zipf(1.3, 60_000))


def write_data(folder: str | Path) -> str:
    """Write the made-up text as training and validation shards of bytes; returns the folder's name."""
    os.makedirs(folder)
    tokens = np.frombuffer(made_up_text().encode(), dtype=np.uint8).astype(np.uint16)
    parts = {"train_000000.bin": tokens[:-20000], "val_000000.bin": tokens[-20000:]}
    for name, part in parts.items():
        shards.write_shard(os.path.join(folder, name), part)
    sizes = {name: len(part) for name, part in parts.items()}
    Path(folder, "meta.json").write_text(json.dumps(describe(get_encoding("bytes"), sizes, complete=True)))
    return str(folder)


def flags(data, log_dir, *more) -> list[str]:
    return [*TINY, "--data_dir", str(data), "--log_dir", str(log_dir), *map(str, more)]


def read_rows(log_dir) -> list[dict]:
    """The steps' records of metrics.jsonl."""
    lines = (Path(log_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def metrics(log_dir) -> list[dict]:
    """The steps' records of metrics.jsonl without times and memory."""
    clock = {"ms", "tok_per_s", "elapsed_s", "memory"}
    return [{k: v for k, v in record.items() if k not in clock} for record in read_rows(log_dir)]


def losses(log_dir: Path, kind: str = "train") -> list[float]:
    """The numbers of this kind in log.txt."""
    lines = (log_dir / "log.txt").read_text().split("\n")
    return [float(line.split()[2]) for line in lines if f" {kind} " in line]


def newest(log_dir: Path) -> int:
    """The last step whose line in log.txt is complete, -1 for none."""
    steps = re.findall(r"^(\d+) train .*\n", (log_dir / "log.txt").read_text(), re.MULTILINE)
    return max(map(int, steps), default=-1)


def steps_saved(log_dir: Path) -> list[int]:
    """The steps of the folder's checkpoints, the newest first."""
    return [step_of(path) for path in list_checkpoints(log_dir)]


def same_run(a, b) -> None:
    """Fails unless two log folders hold the same run: all numbers logged, all bits of the last checkpoint."""
    assert (a / "log.txt").read_bytes() == (b / "log.txt").read_bytes()
    assert metrics(a) == metrics(b)
    first, second = (load_checkpoint(folder / "latest") for folder in (a, b))
    assert first.keys() == second.keys()
    for name in first.keys() - {"train_config", "elapsed_s"}:
        assert equal(first[name], second[name]), name


def equal(a, b) -> bool:
    """Whether two nested structures are equal to the bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def wait_for(path: Path, wanted: int | str, timeout: float = 300) -> None:
    """Until the file has so many lines, or holds the text."""
    found = lambda text: text.count("\n") >= wanted if isinstance(wanted, int) else wanted in text  # noqa: E731
    end = time.monotonic() + timeout
    while not path.exists() or not found(path.read_text()):
        assert time.monotonic() < end, f"{path} did not get {wanted!r}"
        time.sleep(0.003)


@contextlib.contextmanager
def limited(kind: int, size: int):
    """This process gets no more than `size` of this kind of resource."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def full_disk(size: int):
    """No file can grow beyond `size` bytes: writes fail with OSError, as they do where the disk is full."""
    return limited(resource.RLIMIT_FSIZE, size)


def little_memory(megabytes: int):
    """This process can take so much more memory."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return limited(resource.RLIMIT_AS, now + (megabytes << 20))


def _run(script: str, arguments: list[str], output: str, environment: dict, sick: dict) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if sick:
        GPTLMHeadModel.forward = poisoned(GPTLMHeadModel.forward, sick, int(os.environ.get("RANK", 0)))
    found = __import__(script).main(arguments)
    if not isinstance(found, int):
        torch.save(found, f"{output}.rank{os.environ['RANK']}")
        found = 0
    sys.exit(found)


def poisoned(forward: Callable, sick: Mapping[int, int], rank: int = 0) -> Callable:
    """A model's `forward` whose embedding gives NaN in some training forwards of a process.
    sick: {number of the forward, from 0: the rank that gets the NaN, or -1 for all}."""
    numbers = itertools.count()

    def sick_forward(self, *args, **kwargs):
        training = self.training and kwargs.get("targets") is not None
        if not training or sick.get(next(numbers)) not in (-1, rank):
            return forward(self, *args, **kwargs)
        spoil = lambda module, inputs, output: output * float("nan")  # noqa: E731
        with self.transformer.drop.register_forward_hook(spoil):
            return forward(self, *args, **kwargs)

    return sick_forward


def at_call(monkeypatch, owner, name: str, numbers: Container[int], action) -> list:
    """Do action(arguments) before these calls (from 0) of owner's function; returns a list of all calls."""
    function, calls = getattr(owner, name), []

    def with_action(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 in numbers:
            action(*args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, with_action)
    return calls


def write_index(path: Path, index: dict) -> None:
    """Write the index of a checkpoint's folder with its right checksum."""
    text = json.dumps(index)
    (path / "index.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "index": text}))
