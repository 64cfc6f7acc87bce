"""Turn text into shards of tokens for train_gpt_moe.py.

    python fineweb.py                                  # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --demo                           # documentation that comes with Python -> demo_data/
    python fineweb.py --source book.txt --out book --val_tokens 20000
    python fineweb.py --source corpus/ --out corpus    # .txt .jsonl .jsonl.gz .jsonl.zst .parquet
    python fineweb.py --source "src/**/*.py" --out code --encoding bytes   # one document for each file
    python fineweb.py --num_parts 8 --part 3           # the fourth of eight machines: train_p0003_*.bin
    python fineweb.py --verify --out book              # compare every token with the checksums in meta.json

After a kill, the same command continues after the last complete shard. It makes the same bytes as a run that
was never killed. tokens/sources.py reads texts, tokens/shard_writer.py writes shards and meta.json."""

from __future__ import annotations

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import contextlib
import glob
import multiprocessing.connection
import os
import queue
import re
import shlex
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from tokens import sources
from tokens.demo import prepare_demo
from tokens.encodings import encode_pieces
from tokens.identity import describe_sources
from tokens.printable import print_error, printable
from tokens.shard_writer import ShardWriter, is_complete, verify
from tokens.shards import DistributedDataLoader  # noqa: F401 (a public import)

FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"


def flag(default: object, text: str) -> Any:
    """A field of DataConfig and its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class DataConfig:
    """The flags. All except the last four decide the bytes of the shards."""

    source: str = flag(FINEWEB, "file, folder or pattern (*.py) of text or records; or a Hub dataset")
    subset: str | None = flag(None, "subset of a Hub dataset; for FineWeb-Edu sample-10BT")
    split: str = flag("train", "split of a Hub dataset")
    revision: str | None = flag(None, "branch, tag or commit of a Hub dataset")
    text_field: str = flag("text", "where records (.jsonl, .parquet, .json, .csv, Hub) keep the text")
    split_on: str | None = flag(None, 'what separates the documents in a text file, as "<|endoftext|>"')
    encoding: str | None = flag(None, "gpt2 (default), bytes (the demo's), or another of tiktoken's")
    shard_size: int = flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = flag(
        None, "tokens kept for validation; if not given one shard, or a tenth of a small source"
    )
    limit_docs: int | None = flag(None, "stop after so many documents (of this part)")
    num_parts: int = flag(1, "machines that share the work")
    part: int = flag(0, "number of this machine, from 0; part 0 writes the validation shard")
    out: str | None = flag(None, "folder of the shards; edu_fineweb10B for FineWeb-Edu, or demo_data")
    errors: str = flag("strict", "strict refuses a file that is no UTF-8 text, replace reads U+FFFD")
    workers: int | None = flag(None, "tokenising processes; one per core if not given")
    demo: bool = flag(False, "use the documentation that comes with Python as the source")
    verify: bool = flag(False, "make nothing; compare the shards in --out with meta.json's checksums")


Task = tuple[dict, list[tuple[bool, str]]]  # position before the pieces, pieces (begins a document, text)


def cut_tasks(stream: Iterator[tuple[bool, str]], position: dict) -> Iterator[Task]:
    """Cut the stream into tasks of at least sources.TASK_CHARS characters; the last may be shorter."""
    start, pieces, size = dict(position), [], 0
    for piece in stream:
        pieces.append(piece)
        size += len(piece[1])
        if size >= sources.TASK_CHARS:
            yield start, pieces
            start, pieces, size = dict(position), [], 0
    if pieces:
        yield start, pieces


def _work(connection: multiprocessing.connection.Connection, encoding: str) -> None:
    """A worker process: encode what the parent sends, until the parent closes the connection or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with contextlib.suppress(EOFError, OSError):
        while True:
            try:
                connection.send(encode_pieces(connection.recv(), encoding))
            except (ValueError, MemoryError) as error:
                connection.send(error)


@contextlib.contextmanager
def _start_workers(encoding: str, number: int) -> Iterator[queue.SimpleQueue]:
    """Start worker processes; yields a queue of connections to them. At the end it stops them."""
    spawn, idle, processes = multiprocessing.get_context("spawn"), queue.SimpleQueue(), []
    # Children inherit that SIGINT is ignored. Otherwise Ctrl-C during their imports would print a traceback.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(number):
            ours, theirs = spawn.Pipe()
            processes.append(spawn.Process(target=_work, args=(theirs, encoding), daemon=True))
            processes[-1].start()
            theirs.close()
            idle.put(ours)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield idle
    finally:
        for _ in processes:
            idle.get().close()
        for process in processes:
            process.join()


def encode_tasks(tasks: Iterator[Task], encoding: str, workers: int) -> Iterator[tuple[dict, np.ndarray]]:
    """(position before the task, tokens) of each task, in order, computed by `workers` processes.
    Python's process pools can hang when a process is killed, and their processes outlive a killed parent. So
    each process here has a pipe, and a thread waits for it. Raises ChildProcessError if a process dies."""
    if workers == 1:
        yield from ((position, encode_pieces(pieces, encoding)) for position, pieces in tasks)
        return
    with _start_workers(encoding, workers) as idle:

        def encode_elsewhere(pieces: list[tuple[bool, str]]) -> np.ndarray:
            connection = idle.get()
            try:
                connection.send(pieces)
                if isinstance(result := connection.recv(), Exception):
                    raise result
                return result
            except (EOFError, OSError) as e:
                raise ChildProcessError("a tokenising process died; out of memory? lower --workers") from e
            finally:
                idle.put(connection)

        threads, running = ThreadPoolExecutor(workers), deque()
        try:
            for position, pieces in tasks:
                running.append((position, threads.submit(encode_elsewhere, pieces)))
                if len(running) > 3 * workers:
                    position, tokens = running.popleft()
                    yield position, tokens.result()
            for position, tokens in running:
                yield position, tokens.result()
        finally:
            threads.shutdown(cancel_futures=True)


def build(config: DataConfig, told: Sequence[int] = ()) -> dict:
    """Turn a source into shards; return their meta.json. Raises ValueError, OSError; main prints them.
    SystemExit if `told` has an exit code: Python may have dropped the one that a signal's handler raised."""
    config = with_defaults(config)
    run_only = ("out", "errors", "workers", "demo", "verify")
    settings = {name: value for name, value in vars(config).items() if name not in run_only}
    local = is_local(config.source)
    if local:
        files = sources.find_files(config.source)
        total = sum(map(os.path.getsize, files))
        name = os.path.basename(os.path.abspath(config.source))
        content = describe_sources(config.source, files)
        settings |= {"source": name, "files": content, "source_files": len(files), "source_bytes": total}
    writer = ShardWriter(config.out, settings)
    if is_complete(config.out, writer.old):
        print(f"{printable(config.out)} is complete already")
        return writer.old
    position, skip = writer.resume(config.val_tokens, config.shard_size)
    if local:
        reading = config.text_field, position, config.split_on, config.errors
        pieces, share = sources.read_files(files, *reading), config
    else:
        pieces, total, share = sources.read_hub(config, position)
        total = total and total // config.num_parts
    stream = sources.select(pieces, share, position)
    count, unit = ("read", "B") if local else ("documents", "doc")
    look = dict(unit_scale=True, disable=None)
    source_bar = tqdm(total=total, initial=position[count], desc="source", unit=unit, **look)
    shard_bar = tqdm(desc="shard", unit="tok", **look)
    tasks = encode_tasks(cut_tasks(stream, position), config.encoding, config.workers)
    with source_bar, shard_bar, contextlib.closing(tasks):
        for start, tokens in tasks:
            if told:
                sys.exit(told[0])
            used, shard = min(skip, len(tokens)), writer.n
            skip -= used
            writer.add(tokens, start, used)
            source_bar.update(position[count] - source_bar.n)
            if writer.n != shard or not shard_bar.total:
                shard_bar.reset(writer.size(writer.n))
                shard_bar.set_description(os.path.basename(writer.path(writer.n)))
            shard_bar.update(writer.filled - shard_bar.n)
        return writer.finish(position, config.source)


def is_local(source: str) -> bool:
    """Whether the source is a file, a folder or a pattern of files here, and not a dataset of the Hub."""
    return os.path.exists(source) or any(glob.iglob(source, recursive=True))


def with_defaults(config: DataConfig) -> DataConfig:
    """The settings, checked and with their defaults filled in. Raises ValueError, FileNotFoundError."""
    if config.source == FINEWEB:
        config = replace(config, subset=config.subset or FINEWEB_SUBSET, out=config.out or "edu_fineweb10B")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    config = replace(config, encoding=config.encoding or "gpt2", workers=config.workers or cores)
    if config.val_tokens is None:  # one shard, or about 10% of a small local source
        total = sum(map(os.path.getsize, sources.find_files(config.source))) if is_local(config.source) else 0
        tokens = total if config.encoding == "bytes" else total // 4
        config.val_tokens = min(config.shard_size, max(tokens // 10, 1)) if total else config.shard_size
    for name, least in dict(shard_size=1, val_tokens=0, limit_docs=1, workers=1, num_parts=1).items():
        value = getattr(config, name)
        if value is not None and not least <= value < 1 << 31:
            raise ValueError(f"{name}={value} must be at least {least} and below 2147483648")
    if not 0 <= config.part < config.num_parts:
        raise ValueError(f"part={config.part} must be from 0 to num_parts - 1 = {config.num_parts - 1}")
    if config.out is None:
        raise ValueError(f"out is missing: pass --out FOLDER for the shards of source={config.source!r}")
    if config.errors not in ("strict", "replace"):
        raise ValueError(f"errors={config.errors!r} must be strict or replace")
    if config.split_on is not None and not (config.split_on and is_local(config.source)):
        raise ValueError(f"split_on={config.split_on!r} must be what separates the documents of text files")
    if not is_local(config.source) and not re.fullmatch(r"[\w-]+(/[\w.-]+)?", config.source):
        raise FileNotFoundError(f"source={config.source!r} is no file or folder here, nor a Hub dataset")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 bad settings or data, 130 and 143 for signals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for each in fields(DataConfig):
        kind = {"type": int if "int" in each.type else str}
        kind = {"action": "store_true"} if each.type == "bool" else kind
        parser.add_argument(f"--{each.name}", default=each.default, help=each.metadata["help"], **kind)
    config = DataConfig(**vars(parser.parse_args(argv)))
    out = config.out or ("demo_data" if config.demo else "edu_fineweb10B")
    is_new = not os.path.lexists(out)
    told = []

    def stop(*_) -> None:
        told.append(128 + signal.SIGTERM)
        sys.exit(told[0])

    before = signal.signal(signal.SIGTERM, stop)
    again = shlex.join(["python", "fineweb.py", *(sys.argv[1:] if argv is None else argv)])
    go_on = f"continue after the last complete shard with: {again}"
    try:
        if config.verify:
            problems = verify(out)
            for problem in problems:
                print_error("fineweb.py", problem)
            return 2 if problems else 0
        if config.demo:
            prepare_demo(out, config.encoding or "bytes")
        else:
            build(config, told)
        return 0
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        print_error("fineweb.py", error)
        return 2
    except (MemoryError, OSError) as error:
        cure = "lower --workers or --shard_size, then " if isinstance(error, MemoryError) else ""
        print_error("fineweb.py", f"stopped by {error!r}; {cure}{go_on}")
        return 1
    except (KeyboardInterrupt, RuntimeError) as error:
        # A signal that comes while tqdm takes its lock becomes a RuntimeError about the lock.
        cause = error if isinstance(error, KeyboardInterrupt) else error.__context__
        if isinstance(cause, SystemExit):  # the handler of SIGTERM raised it
            return cause.code
        if not isinstance(cause, KeyboardInterrupt):
            raise
        print(printable(f"stopped; {go_on}"), file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(out)  # if it is empty: nothing was made


if __name__ == "__main__":
    sys.exit(main())
