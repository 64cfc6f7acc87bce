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
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    keep: list[Path] = dataclasses.field(default_factory=list)


# ---------------------------------------------------------------------------- ODD THINGS

RED, DOUBLED = "\x1b[31mred\nline\r\x9b2J\u202e", []
for _ in range(40):
    DOUBLED = [DOUBLED, DOUBLED]  # a few bytes in a pickle, 2^40 entries when printed
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
NUMBERS = [0, -1, 1, 2, 3, True, 2**31, 2**63, 2**70, 10**400, 0.5, 1e-320, 1e300, math.nan, math.inf]
ODD_JSON = [None, *NUMBERS, "", "x", "1", "../../x", "x" * 100_000, RED, "\ud800", [], {}, [[[[[[[[[]]]]]]]]]]
ODD_JSON += [{"a": {"b": {"c": [None]}}}, [0] * 1000, [None], ["x", 1]]
ODD_TENSORS = [torch.tensor([]), torch.tensor(math.nan), torch.zeros(3, dtype=torch.int8)]
ODD_TENSORS += [torch.full((32,), math.inf), torch.zeros(256, 32)]  # those below are in no safetensors file
ODD_TENSORS += [torch.eye(3).to_sparse(), torch.zeros(1).expand(2**40), torch.empty(9, device="meta")]
ODD_VALUES = [*ODD_JSON, 10**5000, (), b"bytes", {1, 2}, {(1, 2): 3}, 1j, DOUBLED, *ODD_TENSORS]
ODD_LINES = ["", "x", "1 val nan", "9" * 40 + " val 1", "-1 train 2", "1 val 1e999", "1 train 2 3", DEEP]
ODD_LINES += [RED, "{}", "\0", '{"step": "x"}', '{"step": -5, "lr": {}}', '{"run": 1}', '{"step": 1e400}']
ODD_LINES += ['{"step": 1, "loss": NaN, "val_loss": [1], "expert_load": [[1], [1, 2]]}', "\udcff", "[" * 9**5]
ODD_PATHS = ["", ".", "..", "data", "fifo", "/dev/zero", "/dev/null/x", "nope/nope", "a/" * 3000, "n" * 300]
ODD_PATHS += ["\udc80", RED, "data/meta.json", "log/latest", "log", "*", "~", "-"]
ODD_TEXTS = [*map(str, NUMBERS), "1_0", "\uff11", "0x10", "1e3", " 1", "None", "yes", *ODD_PATHS]
WORDS = ["the words of a book ", "слова одной книги ", "书中的文字没有空格", "كلمات كتاب ", "ACGTGCA", "😀"]
WORDS += ["a", " ", "\n", "\0", "<|endoftext|>", "def f(x):\n\treturn x\n", "\u2028\ufeff", "\ufffd", RED]
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


def forge_json(chance: random.Random, path: Path) -> list[str]:
    """Forge an entry of a JSON file, or nest it deeply. Returns the keys that lead to the entry."""
    tree = json.loads(path.read_text())
    keys = forge(chance, tree, ODD_JSON)
    path.write_text(DEEP if chance.random() < 0.02 else json.dumps(tree))
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
def use_of(chance: random.Random, path: Path, what: str, *names: str) -> Case:
    """One of the commands that read a checkpoint or an exported folder."""
    flag, short = "--checkpoint" if path.name.startswith("model") else "--model", ["--max_new_tokens", "2"]
    dense = "--use_moe False --num_experts 2 --num_experts_per_tok 1".split() if path.name == "stock" else []
    uses = [("checkpoint", ["verify", path]), ("checkpoint", ["export", path, "new"]),
            ("sample", [flag, path, "--prompt", "a", *short]),
            ("hellaswag", ["--model", path, "--data", "questions.jsonl", "--limit", "2"]),
            ("train_gpt_moe", training("--resume", path, "--max_steps", 3)),
            ("train_gpt_moe", training("--init_from", path, "--log_dir", "new", *dense))]  # fmt: skip
    script, arguments = chance.choice(uses if flag == "--checkpoint" else [*uses[2:4], uses[5]])
    return Case(what, script, list(map(str, arguments)), [path.stem, *names])


def checkpoints(chance: random.Random) -> Case:
    """A checkpoint file: a forged entry, or damage."""
    path = Path("log/model_00002.pt")
    if chance.random() < 0.3:
        return use_of(chance, path, damage(chance, path))
    content = torch.load(path)
    keys = forge(chance, content, ODD_VALUES)
    torch.save(content, path)
    return use_of(chance, path, f"{path}: {'.'.join(keys)}")


def folders(chance: random.Random) -> Case:
    """A checkpoint's folder: a forged entry of index.json or rest.pt, with right checksums, or damage."""
    path, kind = Path("parts/model_00002"), chance.choice(["index.json", "rest.pt", "damage"])
    if kind == "damage":
        return use_of(chance, path, damage(chance, *sorted(path.iterdir())))
    index = json.loads(json.loads((path / "index.json").read_text())["index"])
    content = torch.load(path / kind) if kind == "rest.pt" else index
    keys = forge(chance, content, ODD_VALUES if kind == "rest.pt" else ODD_JSON)
    if kind == "rest.pt":
        torch.save(content, path / kind)
        index["files"][kind] = size_and_checksum(path / kind)
    processes.write_index(path, index)
    return use_of(chance, path, f"{path / kind}: {'.'.join(keys)}")


def exports(chance: random.Random) -> Case:
    """An exported folder: forged settings or tensors, damage, or weights in another format or place."""
    folder, odd = Path(chance.choice(["exported", "stock"])), chance.choice(ODD_TENSORS[:5])
    kinds = "config config damage legacy outside renamed missing added forged cast nan reshaped"
    kind, weights = chance.choice(kinds.split()), folder / "model.safetensors"
    if kind == "config":
        path = chance.choice([folder / "config.json"] * 4 + sorted(folder.glob("*.json")))
        keys = forge_json(chance, path)
        return use_of(chance, folder, f"{path}: {'.'.join(keys)}", *keys)
    if kind == "damage":
        return use_of(chance, folder, damage(chance, weights, *sorted(folder.iterdir())))
    tensors = load_file(weights)
    name = chance.choice(list(tensors))
    old = tensors[name]
    if kind == "legacy":
        weights.unlink()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif kind == "outside":
        weights.rename("outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../outside.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        if kind in ("renamed", "missing"):
            del tensors[name]
        news = {"cast": old.to(torch.int64), "nan": old * math.nan, "reshaped": old[None], "forged": odd}
        tensors |= {name: news[kind]} if kind in news else {}
        tensors |= {RED: old} if kind == "renamed" else {"odd": odd} if kind == "added" else {}
        save_file(tensors, weights, {"format": "pt"})
    return use_of(chance, folder, f"{weights}: {name} {kind}", name, "odd")


def data(chance: random.Random) -> Case:
    """Shards and meta.json."""
    path, kinds = Path("data/train_000000.bin"), ["header", "token", "format", "meta.json", "damage"]
    kind, names = chance.choice(kinds), [path.stem, "meta.json"]
    what = f"{path}: {kind}"
    if kind == "meta.json":
        names += forge_json(chance, path.with_name(kind))
        what = f"{kind}: {'.'.join(names[2:])}"
    elif kind == "damage":
        what = damage(chance, *sorted(path.parent.iterdir()))
        names += ["val_000000", "no train shard", "no val shard"]
    elif kind == "format":
        contents = [b"text\n" * 999, b"\x93NUMPY" + chance.randbytes(200), bytes(9999), b"x"]
        path.write_bytes(chance.choice(contents))
        if chance.random() < 0.5:
            path.unlink()
            array = np.array(chance.choice([[], [1.5], ["x"], [[1, 2]], [-1] * 999]))
            np.save(path.with_suffix(".npy"), array)
    else:
        words = np.fromfile(path, dtype="<i4")
        place = chance.randrange(4) if kind == "header" else 256 + chance.randrange(len(words) - 256)
        words[place] = chance.choice([0, -1, 1, 2**31 - 1, 20240520, 20240801, chance.randrange(2**31)])
        words.tofile(path)
    return Case(what, "train_gpt_moe", training("--log_dir", "new"), names)


def sources(chance: random.Random) -> Case:
    """Text sources: languages, encodings, sizes, separators, formats, names."""
    between = chance.choice(["", "", "\n", "\r\n", "\n\n", "<|endoftext|>", "\0", "\r", "\u2028"])
    text = between.join(chance.choices(chance.sample(WORDS, 2), k=chance.choice([0, 1, 9, 999, 99_999])))
    coding, suffix = chance.choice(ENCODINGS), chance.choice(SUFFIXES)
    path = Path(chance.choice(["odd", "odd", "odd", f"odd{RED}", "odd ü", "odd\udc80"]) + suffix)
    if suffix.startswith(".json"):
        rows = [{"text": text[i : i + 999]} for i in range(0, len(text), 999)] or [{}]
        if len(rows) > 1 and chance.random() < 0.5:
            forge(chance, rows, ODD_JSON)
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    content = text.encode(coding, errors="replace")
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    what = f"{path}, {coding}, {len(content)} bytes"
    if chance.random() < 0.25:
        what = damage(chance, path)
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
    folder, keep = Path("log"), []
    kind = chance.choice(["line", "line", "json", "damage", "user's file", "link", "latest"])
    names = ["metrics.jsonl"] if kind == "json" else ["metrics.jsonl", "log.txt", "main.log"]
    file = folder / chance.choice(names)
    lines = file.read_bytes().splitlines()
    what, at = f"{file}: {kind}", chance.randrange(len(lines))
    if kind == "line":
        lines[at : at + chance.randrange(2)] = [chance.choice(ODD_LINES).encode(errors="surrogateescape")]
    elif kind == "json":
        tree = json.loads(lines[at])
        what = f"{file}, line {at + 1}: {'.'.join(forge(chance, tree, ODD_JSON))}"
        lines[at] = json.dumps(tree).encode()
    file.write_bytes(b"\n".join([*lines, b""]))
    if kind == "damage":
        what = damage(chance, file, folder / "latest", folder / "model_00002.pt")
    elif kind == "user's file":
        mine = "model_card.md training.log .notes.tmp model_x.pt model_00009.txt log.txt.bak".split()
        keep = [folder / chance.choice([*mine, f"notes{RED}"])]
        keep[0].write_text(what := f"user's file {keep[0].name}")
    elif kind == "link":
        keep = [Path(name := chance.choice([file.name, "model_00002.pt", "latest"]))]
        (folder / name).rename(name)
        (folder / name).symlink_to(Path("..", name))
        what = f"{folder / name}: a link"
    elif kind == "latest":
        odd = ["", "x", "../model_00002.pt", "/etc/passwd", "model_99999.pt", RED, "model_0000\uff12.pt"]
        (folder / kind).write_text(chance.choice(odd))
    uses = [("plot_log", ["log"]), ("checkpoint", ["list", "log"])]
    more = [["--plot", True], ["--resume", "auto"], ["--resume", "log/latest"]]
    uses += [("train_gpt_moe", training("--max_steps", 3, *each)) for each in more]
    return Case(what, *chance.choice(uses), ["log/", "latest", "model_"], keep=keep)


def ranks(chance: random.Random) -> Case:
    """What a launcher sets in the environment of a rank: one or two variables are odd or missing."""
    odd = ["", "0", "1", "x", "-1", "1_0", "\uff11", "1.0", " 1", "1 ", RED, str(2**70), "9" * 5000]
    addresses = ["", "nope.invalid", "256.1.1.1", "1" * 999, "::1", RED, "127.0.0.1", "http://localhost"]
    values = {"MASTER_ADDR": addresses, "MASTER_PORT": [*odd, "99999"]}  # 99999 ranks would be waited for
    port = str(processes.free_port())
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
    chosen, what = chance.sample(list(environment), chance.choice([1, 1, 2])), []
    for name in chosen:
        environment[name] = chance.choice(values.get(name, odd))
        if chance.random() < 0.15:
            del environment[name]
        what.append(f"{name}={environment.get(name)}")
    return Case(", ".join(what), "train_gpt_moe", training("--log_dir", "new"), chosen, environment)


MAKERS = (checkpoints, folders, exports, data, sources, flags, logs, ranks)
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


def use(case: Case) -> int:
    os.environ.update(case.environment)
    return importlib.import_module(case.script).main(case.arguments)


def in_child(work: Callable[[], int], limit: float) -> tuple[int | None, str, str]:
    """Run work() in a forked process in the current folder. Returns its exit code (None: it did not end),
    stdout, stderr. At the limit of time it gets SIGTERM, and as much time again."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:

        def child() -> None:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", 1, errors="backslashreplace")
            torch.set_num_threads(1)
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
        code, out, err = in_child(lambda: use(case), LIMIT)
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
