"""From text to tokens to batches: the shards on disk, the loader that reads them, the script that makes them.

    python fineweb.py                                  # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --demo                           # prose that every Python carries -> demo_data/
    python fineweb.py --source book.txt --out book --val_tokens 20000
    python fineweb.py --source corpus/ --out corpus    # .txt .jsonl .jsonl.gz .jsonl.zst .parquet
    python fineweb.py --num_parts 8 --part 3           # the fourth of eight machines: train_p0003_*.bin

Killed at any moment and started again with the same command, it goes on after the last complete shard and
ends with the same bytes. sources.py reads texts, shards.py shards; below: flags, demo corpus, tokenising.

A shard is llm.c's (https://github.com/karpathy/llm.c, dev/data/data_common.py): 256 little-endian int32
(magic 20240520, version 1, number of tokens, zeros), then the tokens as uint16. Documents follow one another,
each beginning with <|endoftext|>, and run over from shard to shard. meta.json beside them names the encoding.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import glob
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import signal
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from tokens import sources
from tokens.files import write_atomically
from tokens.shards import (  # noqa: F401 (handed on)
    EOT,
    HEADER_INTS,
    MAGIC,
    VERSION,
    DistributedDataLoader,
    count_tokens,
    describe,
    encode,
    find_shards,
    get_encoding,
    load_metas,
    permute,
    read_meta,
    read_shard,
    write_shard,
)

FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"


def _flag(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Job:
    """What a run of the script does: its flags. All but the last three decide which bytes come out."""

    source: str = _flag(FINEWEB, "file or folder of .txt, .jsonl[.gz|.zst], .parquet; or a Hub dataset")
    subset: str | None = _flag(None, "of a Hub dataset; FineWeb-Edu's is sample-10BT")
    split: str = _flag("train", "of a Hub dataset")
    revision: str | None = _flag(None, "of a Hub dataset: branch, tag or commit")
    text_field: str = _flag("text", "where .jsonl, .parquet and Hub datasets keep the text")
    encoding: str | None = _flag(None, "gpt2 (default), bytes (the demo's), or another of tiktoken's")
    shard_size: int = _flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = _flag(None, "tokens at the start kept for validation; one shard if not given")
    limit_docs: int | None = _flag(None, "stop after so many documents (of this part)")
    num_parts: int = _flag(1, "machines that share the work")
    part: int = _flag(0, "which of them this is, from 0; part 0 writes the validation shard")
    out: str | None = _flag(None, "folder of the shards; edu_fineweb10B for FineWeb-Edu, or demo_data")
    workers: int | None = _flag(None, "tokenising processes; one a core if not given")
    demo: bool = _flag(False, "prose that every Python carries, in place of a source")


# ----------------------------------------------------------------------------------------------------------
# DEMO CORPUS


def demo_documents() -> Iterator[str]:
    """Prose that every Python carries: the language's help topics and each standard module's docstrings.

    About 1.8 MB, in the same order every time for one version of Python; nothing is imported or run.
    Paragraphs that repeat earlier ones are left out (docstrings are copied between modules, help topics
    contain one another), so that a document held out for validation has no twin in training.
    Raises FileNotFoundError if this Python came without its library's sources.
    """
    library = sysconfig.get_paths()["stdlib"]
    skip = set("test tests idlelib lib2to3 turtledemo site-packages dist-packages __pycache__".split())
    seen: set[tuple[str, ...]] = set()
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - skip)
        for path in sorted(os.path.join(folder, name) for name in names if name.endswith(".py")):
            try:
                with open(path, "rb") as file:
                    tree = ast.parse(file.read())
            except (SyntaxError, ValueError):
                continue
            if path.endswith(os.path.join("pydoc_data", "topics.py")):
                tables = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
                texts = [ast.literal_eval(text) for table in tables for text in table.values]
            else:
                texts = ["\n\n".join(_docstrings(tree))]
            yield from filter(None, (_only_new(text, seen) for text in texts))
    if not seen:
        raise FileNotFoundError(f"the demo corpus needs the standard library's .py files; {library} has none")


def _docstrings(module: ast.Module) -> Iterator[str]:
    """Those of the module, its classes and functions, in the order of ast.walk, which would also look into
    every expression: most of the time."""
    nodes: deque[ast.AST] = deque([module])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from filter(None, [ast.get_docstring(node)])
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):  # of statements
            nodes.extend(getattr(node, part, ()))


def _only_new(text: str, seen: set[tuple[str, ...]]) -> str:
    """The paragraphs of which at least half of the runs of eight words are not in `seen`, which grows."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"\w+", paragraph.lower())
        runs = {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}
        if words and 2 * len(runs - seen) >= len(runs):
            kept.append(paragraph.strip("\n"))
        seen |= runs
    return "\n\n".join(kept)


def prepare_demo(out: str | os.PathLike = "demo_data", encoding: str = "bytes") -> dict:
    """Write the demo corpus as a train and a validation shard unless they are there; returns their meta.json.

    Validation gets whole documents, in the order of their hashes until they are a twentieth of the text.
    What another version of Python has made is taken as it is. Raises ValueError if `out` holds other data.
    """
    out, corpus = os.fspath(out), "demo corpus of Python"
    for meta in load_metas(out).values():
        made = meta.get("source", "").startswith(corpus) and meta.get("encoding") == encoding
        if made and all_there(out, meta):
            return meta
    job = Job(source=f"{corpus} {sys.version.split()[0]}", encoding=encoding, out=out)
    writer = ShardWriter(job, {"source": job.source, "encoding": encoding})
    documents = list(demo_documents())
    held_out, room = set(), sum(map(len, documents)) // 20
    for text in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if room > 0:
            held_out.add(text)
            room -= len(text)
    val = encode_pieces(encoding, [(True, text) for text in documents if text in held_out])
    train = encode_pieces(encoding, [(True, text) for text in documents if text not in held_out])
    writer.job = replace(job, val_tokens=len(val), shard_size=len(train))
    place, skip = writer.resume()
    writer.add(np.concatenate((val, train)), place, skip)
    return writer.finish({**place, "documents": len(documents)})


def all_there(out: str, meta: dict) -> bool:
    """Whether a meta.json is final and all the shards it lists are whole."""
    shards = meta.get("shards", {})
    whole = (count_tokens(os.path.join(out, name)) == n for name, n in shards.items())
    return meta.get("complete", False) and all(whole)


# ----------------------------------------------------------------------------------------------------------
# TOKENISING


def encode_pieces(name: str, pieces: list[tuple[bool, str]]) -> np.ndarray:
    """Tokens of (begins a document, text) pieces, uint16."""
    encoding, arrays = get_encoding(name), []
    for begins, text in pieces:
        if begins:
            arrays.append(np.array([encoding.eot_token], dtype=np.uint16))
        arrays.append(encode(encoding, text))
    return np.concatenate(arrays)


Task = tuple[dict, list[tuple[bool, str]]]  # the place before them, pieces


def cut_tasks(stream: Iterator[tuple[bool, str]], place: dict) -> Iterator[Task]:
    """The stream in tasks of sources.TASK_CHARS characters and what it takes to end with a piece."""
    start, pieces, size = dict(place), [], 0
    for piece in stream:
        pieces.append(piece)
        size += len(piece[1])
        if size >= sources.TASK_CHARS:
            yield start, pieces
            start, pieces, size = dict(place), [], 0
    if pieces:
        yield start, pieces


def _work(connection: multiprocessing.connection.Connection, name: str) -> None:
    """Body of a worker process: encodes what comes, until the other end is closed or its process killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(encode_pieces(name, connection.recv()))


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def encode_tasks(tasks: Iterator[Task], name: str, workers: int) -> Iterator[tuple[dict, np.ndarray]]:
    """(place before them, tokens) of the tasks, in their order, by `workers` processes.

    Processes, because documents are short and threads would wait for the interpreter's lock most of the time.
    Each has a pipe of its own and a thread here that waits for it: unlike Python's pools, this cannot hang
    when a process is killed. Raises ChildProcessError then.
    """
    if workers == 1:
        yield from ((place, encode_pieces(name, pieces)) for place, pieces in tasks)
        return
    spawn, idle, running = multiprocessing.get_context("spawn"), queue.SimpleQueue(), deque()
    processes = []
    for _ in range(workers):
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=_work, args=(theirs, name), daemon=True))
        # A worker that is still importing must not show Ctrl-C's traceback: ignored signals are inherited.
        with _sigint_ignored():
            processes[-1].start()
        theirs.close()
        idle.put(ours)

    def encode_elsewhere(pieces: list[tuple[bool, str]]) -> np.ndarray:
        connection = idle.get()
        try:
            connection.send(pieces)
            return connection.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError("a tokenising process died; out of memory? lower --workers") from error
        finally:
            idle.put(connection)

    threads = ThreadPoolExecutor(workers)
    try:
        for place, pieces in tasks:
            running.append((place, threads.submit(encode_elsewhere, pieces)))
            if len(running) > 3 * workers:
                place, tokens = running.popleft()
                yield place, tokens.result()
        for place, tokens in running:
            yield place, tokens.result()
    finally:
        threads.shutdown(cancel_futures=True)
        for _ in processes:
            idle.get().close()
        for process in processes:
            process.join()


class ShardWriter:
    """Cuts a stream of tokens into shards and notes in meta.json where in the source each of them begins.

    Before shard n gets its name, the places of n and n + 1 are in meta.json: however many shards a kill
    leaves, the place of the next is known. Without it everything is read again, and must equal what is there.
    A shard is written only when more tokens follow, so that a source that is too small leaves nothing behind.
    """

    def __init__(self, job: Job, settings: dict):
        self.job, self.settings, self.encoding = job, settings, get_encoding(job.encoding)
        self.prefix = f"p{job.part:04d}_" if job.num_parts > 1 else ""
        os.makedirs(job.out, exist_ok=True)
        self.meta_path = os.path.join(job.out, f"meta_{self.prefix}"[:-1] + ".json")
        metas = load_metas(job.out)
        for path, meta in metas.items():
            for name, value in settings.items():
                other = (meta | meta.get("settings", {})).get(name)
                if other != value and (name != "part" or path == self.meta_path):
                    raise ValueError(
                        f"{job.out} was made with {name}={other!r} ({path}), but now {name}={value!r}: give "
                        "the settings it was made with, or another --out, or delete the folder"
                    )
        ours = re.compile(r"(train|val)_(p\d{4}_)?\d{6}\.bin")
        shards = [name for name in os.listdir(job.out) if name.endswith((".bin", ".npy"))]
        if foreign := [name for name in shards if not ours.fullmatch(name)]:
            raise ValueError(f"{job.out} holds {foreign[0]}, which is not of this data: give another --out")
        self.old = metas.get(self.meta_path, {})
        for name in (f"*_{self.prefix}[0-9]*.bin", os.path.basename(self.meta_path)):  # left by a kill
            for temporary in glob.glob(os.path.join(glob.escape(job.out), f".{name}.*.tmp")):
                os.unlink(temporary)
        self.n, self.filled = 0, 0  # shards done, tokens of the next one

    def path(self, n: int) -> str:
        """Where the n-th shard goes."""
        split, number = ("val", n) if n < self.val_shards else ("train", n - self.val_shards)
        return os.path.join(self.job.out, f"{split}_{self.prefix}{number:06d}.bin")

    def size(self, n: int) -> int:
        """Tokens of the n-th shard, unless it is the last."""
        return self.job.val_tokens if n < self.val_shards else self.job.shard_size

    def resume(self) -> tuple[dict, int]:
        """(place to read on from, tokens to drop there) of the first shard that is missing or damaged."""
        self.val_shards = int(self.job.part == 0 and self.job.val_tokens > 0)
        self.buffer = np.empty(max(self.size(0), self.job.shard_size), dtype=np.uint16)
        places = self.old.get("places", {})
        while count_tokens(self.path(self.n)) == self.size(self.n):
            self.n += 1
        if str(self.n) not in places:
            self.n = 0
        self.start = places.get(str(self.n), [dict(sources.START), 0])
        return dict(self.start[0]), self.start[1]

    def add(self, tokens: np.ndarray, place: dict, used: int) -> None:
        """Append tokens[used:]; `place` is where tokens[0] was read."""
        while used < len(tokens):
            if self.filled == self.size(self.n):
                self._flush([place, used])
            count = min(len(tokens) - used, self.size(self.n) - self.filled)
            self.buffer[self.filled : self.filled + count] = tokens[used : used + count]
            self.filled, used = self.filled + count, used + count

    def finish(self, place: dict) -> dict:
        """Write the last shard and the final meta.json, and return it. Raises ValueError for too little."""
        if self.n == 0 and (self.val_shards or not self.filled):
            need = "no text"
            if self.val_shards:
                need = f"validation takes val_tokens={self.job.val_tokens}, pass less"
            raise ValueError(
                f"source={self.job.source!r} is too small (part {self.job.part} of {self.job.num_parts}): "
                f"{place['documents']} documents, {self.filled} tokens; {need}"
            )
        last = self.filled
        self._flush(None)
        counts = {"documents": place["documents"], "empty": place["empty"], "replaced": place["replaced"]}
        meta = self._write_meta(counts, last)
        tokens = ", ".join(f"{n:,} {split} tokens" for split, n in meta["tokens"].items())
        print(f"{self.job.out}: {tokens}; " + ", ".join(f"{name}: {n:,}" for name, n in counts.items()))
        return meta

    def _flush(self, following: list | None) -> None:
        path, tokens = self.path(self.n), self.buffer[: self.filled]
        if not self.old and count_tokens(path) and not np.array_equal(read_shard(path), tokens):
            raise ValueError(f"{path} holds other tokens, and no meta.json says why: give another --out")
        if following:
            self._write_meta({"places": {self.n: self.start, self.n + 1: following}})
        write_shard(path, tokens)
        tqdm.write(f"{path}: {self.filled:,} tokens")
        self.n, self.filled, self.start = self.n + 1, 0, following

    def _write_meta(self, more: dict, last: int | None = None) -> dict:
        shards = {os.path.basename(self.path(n)): self.size(n) for n in range(self.n)}
        if last:
            shards[os.path.basename(self.path(self.n - 1))] = last
        meta = describe(self.encoding, shards, complete=last is not None)
        meta |= {"source": self.settings["source"], **more, "settings": self.settings}
        text = json.dumps(meta, indent=1).encode()
        write_atomically(self.meta_path, lambda file: file.write(text))
        return meta


def build(job: Job) -> dict:
    """Turn a source into shards; returns their meta.json.

    Raises ValueError or FileNotFoundError for bad settings or data, other OSErrors for a full disk or a lost
    network.
    """
    job = check(job)
    settings = {f.name: getattr(job, f.name) for f in fields(Job) if f.name not in ("out", "workers", "demo")}
    local = os.path.exists(job.source)
    if local:
        files = sources.find_files(job.source)
        total = sum(map(os.path.getsize, files))
        settings["source"] = os.path.basename(os.path.abspath(job.source))
        settings |= {"source_files": len(files), "source_bytes": total}
    writer = ShardWriter(job, settings)
    if all_there(job.out, writer.old):
        print(f"{job.out} is complete already")
        return writer.old
    place, skip = writer.resume()
    if local:
        stream = sources.read_local(job, files, place)
    else:
        stream, total = sources.read_hub(job, place)
    bar = functools.partial(tqdm, unit_scale=True, disable=None)
    with (
        bar(total=total, initial=place["read"], desc="source", unit="B" if local else "doc") as source_bar,
        bar(desc="shard", unit="tok") as shard_bar,
        contextlib.closing(encode_tasks(cut_tasks(stream, place), job.encoding, job.workers)) as tasks,
    ):
        for start, tokens in tasks:
            used, shard = min(skip, len(tokens)), writer.n
            skip -= used
            writer.add(tokens, start, used)
            source_bar.update(place["read"] - source_bar.n)
            if writer.n != shard or not shard_bar.total:
                shard_bar.reset(writer.size(writer.n))
                shard_bar.set_description(os.path.basename(writer.path(writer.n)))
            shard_bar.update(writer.filled - shard_bar.n)
        meta = writer.finish(place)
    return meta


def check(job: Job) -> Job:
    """The job with its defaults filled in. Raises ValueError, FileNotFoundError."""
    if job.source == FINEWEB:
        job = replace(job, subset=job.subset or FINEWEB_SUBSET, out=job.out or "edu_fineweb10B")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    job = replace(job, encoding=job.encoding or "gpt2", workers=job.workers or cores)
    if job.val_tokens is None:
        job.val_tokens = job.shard_size
    for name, least in dict(shard_size=1, val_tokens=0, limit_docs=1, workers=1, num_parts=1).items():
        value = getattr(job, name)
        if value is not None and not least <= value < 1 << 31:
            raise ValueError(f"{name}={value} must be at least {least} and below 2147483648")
    if not 0 <= job.part < job.num_parts:
        raise ValueError(f"part={job.part} must be from 0 to num_parts - 1 = {job.num_parts - 1}")
    if job.out is None:
        raise ValueError(f"out is missing: pass --out FOLDER for the shards of source={job.source!r}")
    if not os.path.exists(job.source) and not re.fullmatch(r"[\w-]+(/[\w.-]+)?", job.source):
        raise FileNotFoundError(f"source={job.source!r} is no file or folder here, nor a Hub dataset's name")
    return job


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 bad settings or data, 130 and 143 for signals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag in fields(Job):
        kind = (
            {"type": int if "int" in flag.type else str} if flag.type != "bool" else {"action": "store_true"}
        )
        parser.add_argument(f"--{flag.name}", default=flag.default, help=flag.metadata["help"], **kind)
    job = Job(**vars(parser.parse_args(argv)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    go_on = "the same command goes on after the last complete shard"
    try:
        if job.demo:
            prepare_demo(job.out or "demo_data", job.encoding or "bytes")
        else:
            build(job)
        return 0
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"stopped by {error!r}; {go_on}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RuntimeError) as error:
        # An interrupt while tqdm takes its lock becomes a RuntimeError about the lock.
        cause = error if isinstance(error, KeyboardInterrupt) else error.__context__
        if isinstance(cause, SystemExit):  # SIGTERM's, above
            return cause.code
        if not isinstance(cause, KeyboardInterrupt):
            raise
        print(f"stopped; {go_on}", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
