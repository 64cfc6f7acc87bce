"""Give odd inputs to the public commands, for minutes. Each must be accepted, or refused in one line.

    python tests/fuzz.py --minutes 10                           # all groups, in turn
    python tests/fuzz.py --minutes 10 --seed 3 --group flags
    python tests/fuzz.py --seed 3 --group flags --number 17     # repeat one input; show what it prints

An input is a pure function of (seed, group, number). A forked process runs the command on it in a fresh copy
of the folders of a small run, with limits of time and memory. The outcome is one of
    accepted  exit code 0; or 143, if the command still worked at the limit of time and then got SIGTERM
    refused   exit code 2 or 1, and one line on stderr that names the field or the file
    wrong     a traceback, a hang, a crash, another exit code, several lines, a long line, control characters,
              much output, a message that names nothing, a changed file of the user's
Exit code 0 if none is wrong. Needs Linux. Not collected by pytest."""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import processes
import torch
from models import make_examples
from safetensors.torch import load_file, save_file

import checkpoint
from train_gpt_moe import TrainConfig
from train_gpt_moe import main as train
from training.archives import size_and_checksum

for script in ("fineweb", "hellaswag", "plot_log", "sample"):  # once, before any process is forked
    importlib.import_module(script)

LIMIT, MEMORY = 20, 3000  # seconds; MB
LONGEST, MOST_OUTPUT = 600, 20_000  # characters of a message, of all output
UNSAFE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\udc80-\udcff]")
NOISE = re.compile(r"it/s\]|^(\w+: )?warning: ", re.I)  # lines that do not count: progress bars, warnings
GOOD = ("accepted", "refused")


@dataclasses.dataclass
class Case:
    """An odd input: `python SCRIPT.py ARGUMENTS` in the current folder. what: the oddity, in words. names: a
    refusal must hold one of them. keep: files of the user's that must stay, and may at most grow."""

    what: str
    script: str
    arguments: list[str]
    names: list[str]
    keep: list[Path] = dataclasses.field(default_factory=list)


# ---------------------------------------------------------------------------- ODD THINGS

RED, DOUBLED = "\x1b[31mred\nline\r\x9b2J\u202e", []
for _ in range(40):
    DOUBLED = [DOUBLED, DOUBLED]  # a few bytes in a pickle, 2^40 entries when printed
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
NUMBERS = [0, -1, 1, 2, 3, True, 2**31, 2**63, 2**70, 10**400, 0.5, 1e-320, 1e300, math.nan, math.inf]
ODD_JSON = [None, *NUMBERS, "", "x", "1", "../../x", "x" * 100_000, RED, "\ud800", [], {}]
ODD_JSON += [[[[[[[]]]]]], [0] * 1000, [None], {"a": {"b": [1]}}]
ODD_TENSORS = [torch.tensor([]), torch.tensor(math.nan), torch.full((32,), math.inf), torch.zeros(256, 32)]
ODD_VALUES = [*ODD_JSON, *ODD_TENSORS, 10**5000, (), b"bytes", {1, 2}, {(1, 2): 3}, 1j, DOUBLED]
ODD_VALUES += [torch.eye(3).to_sparse(), torch.zeros(1).expand(2**40), torch.empty(9, device="meta")]
ODD_LINES = ["", "x", "1 val nan", "9" * 40 + " val 1", "-1 train 2", "1 val 1e999", DEEP, RED, "{}", "\0"]
ODD_LINES += ['{"step": "x"}', '{"step": -5, "lr": {}}', '{"run": 1}', '{"step": 1e400}', "\udcff"]
ODD_PATHS = ["", ".", "data", "fifo", "/dev/zero", "/dev/null/x", "nope/nope", "a/" * 3000, "n" * 300]
ODD_PATHS += ["\udc80", RED, "data/meta.json", "log/latest", "log", "*", "~", "-"]
ODD_TEXTS = [*map(str, NUMBERS), "1_0", "\uff11", "0x10", "1e3", " 1", "None", "yes", *ODD_PATHS]
WORDS = ["the words of a book ", "слова одной книги ", "书中的文字没有空格", "ACGTGCA", "😀", " ", "\n", "\0"]
WORDS += ["<|endoftext|>", "\r\n", "\u2028\ufeff", "\ufffd", RED]
ENCODINGS = "utf-8 utf-8 utf-8-sig utf-16 utf-16-le utf-32 latin-1 cp1251 shift_jis gb18030".split()
SUFFIXES = ".txt .txt .txt .TXT .md .jsonl .jsonl .json .csv .jsonl.gz .jsonl.zst .parquet .pdf".split()
# Legal, but they take long within one step or before the first, where no signal is answered.
SLOW = [("use_compile", "True"), ("total_batch_size", str(2**31)), ("preset", "demo")]


def forge(chance: random.Random, tree: Any, odd: list) -> list[str]:
    """Replace, remove or add an entry somewhere in nested containers. Returns the keys that lead to it."""
    keys = []
    while True:
        key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        keys.append(str(key))
        if not isinstance(tree[key], dict | list) or not tree[key] or chance.random() < 0.3:
            break
        tree = tree[key]
    action, value = chance.random(), chance.choice(odd)
    if action < 0.1:
        del tree[key]
    elif action < 0.2 and isinstance(tree, dict):
        keys[-1] = chance.choice(["odd", "skips", "__class__", RED, "x" * 10_000])
        tree[keys[-1]] = value
    else:
        tree[key] = value
    return keys


def forge_file(chance: random.Random, file: Path) -> list[str]:
    """Forge an entry of a file of JSON or tensors; checksums stay right. Returns the keys that lead to it."""
    if file.suffix == ".safetensors":
        keys = forge(chance, content := load_file(file), ODD_TENSORS)
        save_file(content, file, {"format": "pt"})
    elif file.suffix == ".pt":
        keys = forge(chance, content := torch.load(file), ODD_VALUES)
        torch.save(content, file)
    elif file.name != "index.json":
        keys = forge(chance, content := json.loads(file.read_text()), ODD_JSON)
        file.write_text(json.dumps(content))
    if file.name in ("index.json", "rest.pt"):
        path = file.with_name("index.json")
        index = json.loads(json.loads(path.read_text())["index"])
        if file == path:
            keys = forge(chance, index, ODD_JSON)
        else:
            index["files"][file.name] = size_and_checksum(file)
        processes.write_index(file.parent, index)
    return keys


def damage(chance: random.Random, *paths: Path) -> str:
    """Damage one of the files, or put something else in its place. Returns what was done."""
    path = chance.choice(paths)
    kind = chance.choice("flip flip flip cut cut zeros fifo device folder loop missing".split())
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content) or 1)
    path.unlink()
    if kind == "flip":
        for _ in range(min(len(content), chance.choice([1, 1, 9, 999]))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind in ("cut", "zeros"):
        path.write_bytes(content[:at] + bytes(4096 if kind == "zeros" else 0))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    return f"{path}: {kind}"


def training(*more: object) -> list[str]:
    return processes.flags("data", "log", "--max_steps", 1, "--warmup_steps", 0, *more)


# ---------------------------------------------------------------------------- GROUPS
def models(chance: random.Random) -> Case:
    """A checkpoint, as a file or as a folder, or an exported folder: a forged entry, or damage."""
    names = ["log/model_00002.pt", "log/model_00002.pt", "parts/model_00002", "exported", "stock"]
    path = Path(chance.choice(names))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if chance.random() < 0.3:
        what = damage(chance, *files)
    else:
        file = chance.choice([file for file in files if file.suffix in (".json", ".pt", ".safetensors")])
        what = f"{file}: {'.'.join(forge_file(chance, file))}"
    init = training("--init_from", path, "--log_dir", "new")
    init += "--use_moe False --num_experts 2 --num_experts_per_tok 1".split() * (path.name == "stock")
    flag, short = "--checkpoint" if "model" in path.name else "--model", ["--max_new_tokens", "2"]
    uses = [("sample", [flag, path, "--prompt", "a", *short]), ("train_gpt_moe", init),
            ("hellaswag", ["--model", path, "--data", "questions.jsonl", "--limit", "2"])]  # fmt: skip
    if flag == "--checkpoint":
        uses += [("checkpoint", ["verify", path]), ("checkpoint", ["export", path, "new"])]
        uses += [("train_gpt_moe", training("--resume", path, "--max_steps", 3))]
    script, arguments = chance.choice(uses)
    return Case(what, script, list(map(str, arguments)), [path.stem])


def data(chance: random.Random) -> Case:
    """Shards and meta.json: a forged entry, an odd number, another format, or damage."""
    path, kind = Path("data/train_000000.bin"), chance.choice(["header", "token", "format", "json", "damage"])
    what, names, meta = f"{path}: {kind}", [path.stem, "meta.json"], path.with_name("meta.json")
    if kind == "json":
        names += forge_file(chance, meta)
        what = f"{meta}: {'.'.join(names[2:])}"
    elif kind == "damage":
        what = damage(chance, *sorted(path.parent.iterdir()))
        names += ["val_000000", "no train shard", "no val shard"]
    elif kind == "format":
        contents = [b"text\n" * 999, b"\x93NUMPY" + chance.randbytes(200), bytes(9999), b"x"]
        path.write_bytes(chance.choice(contents))
    else:
        words = np.fromfile(path, dtype="<i4")
        place = chance.randrange(4) if kind == "header" else 256 + chance.randrange(len(words) - 256)
        words[place] = chance.choice([0, -1, 1, 2**31 - 1, 20240520, 20240801, chance.randrange(2**31)])
        words.tofile(path)
    return Case(what, "train_gpt_moe", training("--log_dir", "new"), names)


def sources(chance: random.Random) -> Case:
    """Text sources: languages, encodings, sizes, formats, names."""
    text = "".join(chance.choices(chance.sample(WORDS, 3), k=chance.choice([0, 1, 9, 999, 99_999])))
    coding, suffix = chance.choice(ENCODINGS), chance.choice(SUFFIXES)
    path = Path(chance.choice(["odd", "odd", "odd", f"odd{RED}", "odd ü", "odd\udc80"]) + suffix)
    if suffix.startswith(".json"):
        rows = [{"text": text[i : i + 999]} for i in range(0, len(text) + 1, 999)]
        if chance.random() < 0.5:
            forge(chance, rows, ODD_JSON)
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    content = text.encode(coding, errors="replace")
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    what = damage(chance, path) if chance.random() < 0.25 else f"{path}, {coding}, {len(content)} bytes"
    encoding = chance.choice(["bytes", "gpt2"]) if "TIKTOKEN_CACHE_DIR" in os.environ else "bytes"
    arguments = f"--out new --workers 1 --shard_size 20000000 --val_tokens 100 --encoding {encoding}".split()
    return Case(f"{what}, {encoding}", "fineweb", ["--source", str(path), *arguments], ["odd", "source"])


def flags(chance: random.Random) -> Case:
    """Flags of train_gpt_moe.py: one or two with odd values."""
    os.mkfifo("fifo")
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    chosen = chance.sample(known, chance.choice([1, 1, 1, 2]))
    odd = [(name, str(chance.choice(chance.choice([NUMBERS, ODD_TEXTS])))) for name in chosen]
    given = [f"--{name}={value}" for name, value in odd if (name, value) not in SLOW]
    names = [*chosen, *(value[:9].strip() for _, value in odd if value.strip())]
    return Case(" ".join(given), "train_gpt_moe", training("--log_dir", "new", *given), names)


def logs(chance: random.Random) -> Case:
    """A folder of logs: odd lines, odd files, links, files of the user's; read, resumed, or used afresh."""
    file, keep = Path("log", chance.choice(["metrics.jsonl", "log.txt", "main.log"])), []
    kind = chance.choice(["line", "line", "damage", "user's file", "link", "latest"])
    what = f"{file}: {kind}"
    if kind == "line":
        lines = file.read_bytes().splitlines()
        lines[chance.randrange(len(lines))] = chance.choice(ODD_LINES).encode(errors="surrogateescape")
        file.write_bytes(b"\n".join([*lines, b""]))
    elif kind == "damage":
        what = damage(chance, file, Path("log/latest"), Path("log/model_00002.pt"))
    elif kind == "user's file":
        mine = "model_card.md training.log .notes.tmp model_x.pt model_00009.txt log.txt.bak".split()
        keep = [Path("log", chance.choice([*mine, f"notes{RED}"]))]
        keep[0].write_text(what := f"user's file {keep[0].name}")
    elif kind == "link":
        keep = [Path(name := chance.choice([file.name, "model_00002.pt", "latest"]))]
        Path("log", name).rename(name)
        Path("log", name).symlink_to(Path("..", name))
        what = f"log/{name}: a link"
    elif kind == "latest":
        odd = ["", "x", "../model_00002.pt", "/etc/passwd", "model_99999.pt", RED, "model_0000\uff12.pt"]
        Path("log/latest").write_text(chance.choice(odd))
    more = [["--plot", True], ["--resume", "auto"], ["--resume", "log/latest"]]
    uses = [("train_gpt_moe", training("--max_steps", 3, *each)) for each in more]
    uses += [("plot_log", ["log"]), ("checkpoint", ["list", "log"])]
    return Case(what, *chance.choice(uses), ["log/", "latest", "model_"], keep)


MAKERS = (models, data, sources, flags, logs)
GROUPS: dict[str, Callable[[random.Random], Case]] = {make.__name__: make for make in MAKERS}


# ---------------------------------------------------------------------------- TRIAL
def prepare() -> int:
    """Make what every input begins with: data, a run, its checkpoint as a folder, exports, questions."""
    processes.write_data("data")
    Path("questions.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(3)))
    codes = [train(training("--max_steps", 2)), train(training("--log_dir", "dense", "--use_moe", False))]
    codes += [checkpoint.main(["convert", "log/model_00002.pt", "parts/model_00002"])]
    codes += [checkpoint.main(["export", "log/model_00002.pt", "exported"])]
    codes += [checkpoint.main(["export", "dense/model_00001.pt", "stock", "--format", "gpt2"])]
    return max(codes)


def in_child(work: Callable[[], int], limit: float) -> tuple[int | None, str, str]:
    """Run work() in a forked process in the current folder. Returns its exit code (None: it did not end),
    stdout, stderr. At the limit of time it gets SIGTERM, and as much time again."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:

        def child() -> None:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", 1, errors="backslashreplace")
            with processes.little_memory(MEMORY):
                sys.exit(work())

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(limit)
        if process.is_alive():
            process.terminate()
            process.join(limit)
        code = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also the processes that it has started
        process.join()
        return code, *(os.pread(f.fileno(), 1 << 24, 0).decode(errors="surrogateescape") for f in (out, err))


def judge(case: Case, code: int | None, out: str, err: str) -> str:
    """One of GOOD, or what is wrong."""
    lines = [line for line in err.splitlines() if line.strip() and not NOISE.search(line)]
    if code in (None, -signal.SIGTERM):
        return "hangs"
    if "Traceback (most recent call last)" in out + err:
        return f"traceback, exit code {code}: {lines[-1][:200] if lines else ''}"
    if code not in (0, 1, 2, 128 + signal.SIGTERM):
        return f"exit code {code}"
    if unsafe := UNSAFE.search(err if case.script == "sample" else out + err):  # a pipe gets raw samples
        return f"prints {unsafe[0]!a}"
    if len(out + err) > MOST_OUTPUT and code != 128 + signal.SIGTERM:  # which has trained for LIMIT seconds
        return f"prints {len(out + err)} characters"
    if code in (0, 128 + signal.SIGTERM):
        return "accepted"
    if len(lines) != 1 or len(lines[0]) > LONGEST:
        return f"{len(lines)} lines of {len(err)} characters, exit code {code}: {err[:150]} ... {err[-150:]}"
    return "refused" if any(name in lines[0] for name in case.names) else f"names nothing: {lines[0][:300]}"


def trial(make: Callable[[random.Random], Case], key: str, world: Path) -> tuple[Case, str, str]:
    """Make an input in a copy of the folder `world`, and try it. Returns it, the verdict, all output."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(shutil.copytree(world, f"{folder}/here")):
        case = make(random.Random(key))
        before = [path.read_bytes() for path in case.keep]
        script = importlib.import_module(case.script)
        code, out, err = in_child(lambda: script.main(case.arguments), LIMIT)
        verdict = judge(case, code, out, err)
        for path, content in zip(case.keep, before, strict=True):
            if not path.is_file() or not path.read_bytes().startswith(content):
                verdict = f"the user's file has changed or is gone: {path}"
        return case, verdict, out + err


def main(arguments: list[str] | None = None) -> int:
    """Try inputs of all groups in turn; 0 if none is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="most inputs per group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", choices=GROUPS, help="this group only")
    parser.add_argument("--number", type=int, help="this input only; show what it prints")
    options = parser.parse_args(arguments)
    groups, end = [options.group] if options.group else list(GROUPS), time.monotonic() + 60 * options.minutes
    numbers = range(options.inputs) if options.number is None else [options.number]
    tally = {group: collections.Counter() for group in groups}
    with tempfile.TemporaryDirectory() as world, contextlib.chdir(world):
        code, *printed = in_child(prepare, 300)
        if code != 0:
            raise RuntimeError(f"the folders could not be made: {''.join(printed)}")
        for number, group in itertools.product(numbers, groups):
            if time.monotonic() > end:
                break
            case, verdict, printed = trial(GROUPS[group], f"{options.seed} {group} {number}", Path(world))
            tally[group][verdict if verdict in GOOD else "wrong"] += 1
            if verdict not in GOOD:
                print(f"WRONG python tests/fuzz.py --seed {options.seed} --group {group} --number {number}")
            if verdict not in GOOD or options.number is not None:
                print(f"    {case.script}.py, {case.what[:200]!a}: {verdict!a}", flush=True)
            if options.number is not None:
                print(f"{case.arguments!a:.2000}\n{ascii(printed)[:9000]}")
    for group, counts in tally.items():
        print(f"{group:12} {counts.total():6} tried", *(f"{counts[key]:6} {key}" for key in (*GOOD, "wrong")))
    return 1 if any(counts["wrong"] for counts in tally.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
