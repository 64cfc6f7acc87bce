"""Turn text into shards of tokens for train_gpt_moe.py.

    python fineweb.py                                  # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --demo                           # documentation that comes with Python -> demo_data/
    python fineweb.py --source book.txt --out book --val_tokens 20000
    python fineweb.py --source corpus/ --out corpus    # .txt .jsonl .jsonl.gz .jsonl.zst .parquet
    python fineweb.py --source "src/**/*.py" --out code --encoding bytes   # one document for each file
    python fineweb.py --source a.txt --source b.jsonl --out both --train_tokenizer 32768  # own vocabulary
    python fineweb.py --num_parts 8 --part 3           # the fourth of eight machines: train_p0003_*.bin
    python fineweb.py --verify --out book              # compare every token with the checksums in meta.json

After a kill, the same command continues after the last complete shard. It makes the same bytes as a run that
was never killed. tokens/sources.py reads texts, tokens/shard_writer.py writes shards and meta.json."""

from __future__ import annotations

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import contextlib
import glob
import os
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
import tiktoken
from tqdm import tqdm

from tokens import sources
from tokens.demo import prepare_demo
from tokens.encodings import encode_pieces
from tokens.identity import describe_sources, load_metas
from tokens.own_tokenizers import read_added, read_tokenizer, train_bpe
from tokens.printable import print_error, printable
from tokens.shard_writer import ShardWriter, is_complete, verify
from tokens.shards import DistributedDataLoader  # noqa: F401 (a public import)

FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"
SAMPLE_CHARS = 1 << 26  # on which a tokenizer is trained; it keeps their different words in memory


def flag(default: object, text: str) -> Any:
    """A field of DataConfig and its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class DataConfig:
    """The flags. Those before `out` decide the bytes of the shards."""

    source: str | Sequence[str] = flag(FINEWEB, "file, folder, pattern or Hub dataset; may be repeated")
    subset: str | None = flag(None, "subset of a Hub dataset; for FineWeb-Edu sample-10BT")
    split: str = flag("train", "split of a Hub dataset")
    revision: str | None = flag(None, "branch, tag or commit of a Hub dataset")
    text_field: str | Sequence[str] = flag("text", "where records keep the text; once, or for each --source")
    split_on: str | None = flag(None, 'what separates the documents in a text file, as "<|endoftext|>"')
    encoding: str | None = flag(None, "gpt2 (default), bytes (the demo's), or another of tiktoken's")
    tokenizer: str | None = flag(None, "tokenizer.json, SentencePiece .model, folder of one, or a name")
    train_tokenizer: int | None = flag(None, "train one of so many tokens on the first 67 million characters")
    end_token: str | None = flag(None, "precedes documents (--tokenizer FILE); default <|endoftext|>, or eos")
    shard_size: int = flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = flag(None, "tokens for validation; default a shard, or a tenth of small sources")
    limit_docs: int | None = flag(None, "stop after so many documents (of this part)")
    num_parts: int = flag(1, "machines that share the work")
    part: int = flag(0, "number of this machine, from 0; part 0 writes the validation shard")
    out: str | None = flag(None, "folder of the shards; edu_fineweb10B for FineWeb-Edu, or demo_data")
    errors: str = flag("strict", "strict refuses a file that is no UTF-8 text, replace reads U+FFFD")
    workers: int | None = flag(None, "tokenising threads; one per core if not given")
    demo: bool = flag(False, "use the documentation that comes with Python as the source")
    verify: bool = flag(False, "make nothing; compare the shards in --out with meta.json's checksums")


Parts = list[tuple[DataConfig, list[str]]]  # of each source: its settings, its files (a Hub dataset has none)
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


def encode_tasks(tasks: Iterator[Task], encoding: str, workers: int) -> Iterator[tuple[dict, np.ndarray]]:
    """(position before the task, tokens) of each task, in order, computed by `workers` threads. They run at
    the same time, because tiktoken and tokenizers release Python's lock."""
    threads, running = ThreadPoolExecutor(workers), deque()
    try:
        for position, pieces in tasks:
            running.append((position, threads.submit(encode_pieces, pieces, encoding)))
            if len(running) >= 3 * workers:
                position, tokens = running.popleft()
                yield position, tokens.result()
        for position, tokens in running:
            yield position, tokens.result()
    finally:
        threads.shutdown(cancel_futures=True)


def build(config: DataConfig, told: Sequence[int] = ()) -> dict:
    """Turn a source into shards; return their meta.json. Raises ValueError, OSError; main prints them.
    SystemExit if `told` has an exit code: Python may have dropped the one that a signal's handler raised."""
    config = choose_encoding(with_defaults(config))
    run_only = ("out", "errors", "workers", "demo", "verify", "tokenizer")
    settings = {name: value for name, value in vars(config).items() if name not in run_only}
    parts = each_source(config)
    settings |= describe(parts)
    writer = ShardWriter(config.out, settings)
    if is_complete(config.out, writer.old):
        print(f"{printable(config.out)} is complete already")
        return writer.old
    position, skip = writer.resume(config.val_tokens, config.shard_size)
    look = dict(unit_scale=True, disable=None)
    source_bar, shard_bar = tqdm(desc="source", **look), tqdm(desc="shard", unit="tok", **look)
    stream = read_sources(parts, position, source_bar)
    tasks = encode_tasks(cut_tasks(stream, position), config.encoding, config.workers)
    with source_bar, shard_bar, contextlib.closing(tasks):
        for start, tokens in tasks:
            if told:
                sys.exit(told[0])
            used, shard = min(skip, len(tokens)), writer.n
            skip -= used
            writer.add(tokens, start, used)
            if writer.n != shard or not shard_bar.total:
                shard_bar.reset(writer.size(writer.n))
                shard_bar.set_description(os.path.basename(writer.path(writer.n)))
            shard_bar.update(writer.filled - shard_bar.n)
        return writer.finish(position, config.source)


def each_source(config: DataConfig) -> Parts:
    """Each source by itself. ValueError unless there are one or as many text_fields."""
    names, fields = ([v] if isinstance(v, str) else [*v] for v in (config.source, config.text_field))
    if len(fields) not in (1, len(names)):
        raise ValueError(f"text_field is given {len(fields)} times: give it once, or {len(names)} times")
    parts = []
    for name, text_field in zip(names, fields * len(names), strict=False):
        subset = config.subset or (FINEWEB_SUBSET if name == FINEWEB else None)
        is_here = os.path.exists(name) or any(glob.iglob(name, recursive=True))
        one = replace(config, source=name, text_field=text_field, subset=subset)
        parts.append((one, sources.find_files(name) if is_here else []))
    return parts


def describe(parts: Parts) -> dict:
    """What the settings in meta.json say about the sources: their names without folders, and their files."""
    names, found, size = [], {}, 0
    for number, (one, files) in enumerate(parts):
        names.append(os.path.basename(os.path.abspath(one.source)) if files else one.source)
        prefix = f"{number}: " if len(parts) > 1 else ""  # two sources may have files of the same name
        found |= {prefix + name: text for name, text in describe_sources(one.source, files).items()}
        size += sum(map(os.path.getsize, files))
    content = {"files": found, "source_files": len(found), "source_bytes": size} if found else {}
    return {"source": names if len(parts) > 1 else names[0], **content}


def read_sources(parts: Parts, position: dict, bar: tqdm) -> Iterator[tuple[bool, str]]:
    """(begins, text) of the documents of one source after another, from `position` on, which has the number
    of the source if there are several. bar: shows how much of the source is read."""
    first = position.get("source", 0)
    for number, (one, files) in enumerate(parts[first:], first):
        if number > first:
            position.pop("hub", None)
            position.update(source=number, file=0, at=0, read=0)
        if files:
            reading = one.text_field, position, one.split_on, one.errors
            pieces, share, total = sources.read_files(files, *reading), one, sum(map(os.path.getsize, files))
        else:
            pieces, total, share = sources.read_hub(one, position)
            total = total and total // one.num_parts
        count, bar.unit = ("read", "B") if files else ("documents", "doc")
        bar.reset(total)
        bar.n = bar.initial = position[count]
        for piece in sources.select(pieces, share, position):
            bar.update(position[count] - bar.n)
            yield piece


def choose_encoding(config: DataConfig) -> DataConfig:
    """The settings with the encoding that --tokenizer or --train_tokenizer asks for. ValueError, OSError."""
    path, size = config.tokenizer, config.train_tokenizer
    if path and not os.path.exists(path):
        if path not in (names := ["bytes", *tiktoken.list_encoding_names()]):
            raise ValueError(f"tokenizer={path!r}: no such file or folder, nor one of {', '.join(names)}")
        return replace(config, encoding=path)  # a name that tiktoken knows
    if path:
        encoding = read_tokenizer(path, config.end_token)
        return replace(config, encoding=encoding.name, end_token=encoding.end_token)
    if not size:
        return config
    for meta in load_metas(config.out).values():
        if meta.get("settings", {}).get("train_tokenizer") == size:  # ShardWriter compares the sources
            with contextlib.suppress(ValueError):  # if it is lost it is trained again
                read_added(os.path.join(config.out, "tokenizer.json"), meta["encoding"])
                return replace(config, encoding=meta["encoding"])
    tqdm.write(f"training a tokenizer of {size:,} tokens")
    return replace(config, encoding=train_bpe(sample_texts(config), size).name)


def sample_texts(config: DataConfig) -> Iterator[str]:
    """The first SAMPLE_CHARS characters of the sources, of each alike; all parts of a job get the same."""
    parts = each_source(replace(config, num_parts=1, part=0))
    for part in parts:
        left = SAMPLE_CHARS // len(parts)
        for _, text in read_sources([part], dict(sources.START_POSITION), tqdm(disable=True)):
            if left <= 0:
                break
            yield text[:left]
            left -= len(text)


def with_defaults(config: DataConfig) -> DataConfig:
    """The settings, checked and with their defaults filled in. Raises ValueError, FileNotFoundError."""
    if config.source == FINEWEB:
        config = replace(config, subset=config.subset or FINEWEB_SUBSET, out=config.out or "edu_fineweb10B")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = [name for name in ("encoding", "tokenizer", "train_tokenizer") if getattr(config, name)]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]}={getattr(config, asked[0])!r} and {asked[1]}: give one of them")
    config = replace(config, encoding=config.encoding or "gpt2", workers=config.workers or cores)
    parts = each_source(config)
    local = all(files for _, files in parts)
    if config.val_tokens is None:  # one shard, or about 10% of a small local source
        total = sum(os.path.getsize(file) for _, files in parts for file in files) if local else 0
        tokens = total if config.encoding == "bytes" else total // 4
        config.val_tokens = min(config.shard_size, max(tokens // 10, 1)) if total else config.shard_size
    limits = dict(shard_size=1, val_tokens=0, limit_docs=1, workers=1, num_parts=1, train_tokenizer=257)
    for name, least in limits.items():
        value = getattr(config, name)
        if value is not None and not least <= value < 1 << 31:
            raise ValueError(f"{name}={value} must be at least {least} and below 2147483648")
    if not 0 <= config.part < config.num_parts:
        raise ValueError(f"part={config.part} must be from 0 to num_parts - 1 = {config.num_parts - 1}")
    if config.end_token and not (config.tokenizer and os.path.exists(config.tokenizer)):
        raise ValueError(f"end_token={config.end_token!r} needs --tokenizer with a file or folder of one")
    if not config.out:
        raise ValueError(f"out is missing: pass --out FOLDER for the shards of source={config.source!r}")
    if config.errors not in ("strict", "replace"):
        raise ValueError(f"errors={config.errors!r} must be strict or replace")
    if config.split_on is not None and not (config.split_on and local):
        raise ValueError(f"split_on={config.split_on!r} must be what separates the documents of text files")
    for one, files in parts:
        is_name = re.fullmatch(r"[\w-]+(/[\w.-]+)?", one.source)
        if not files and (not is_name or one.source.endswith(sources.SUFFIXES + sources.MORE_SUFFIXES)):
            raise FileNotFoundError(f"source={one.source!r} is no file or folder here, nor a Hub dataset")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 bad settings or data, 130 and 143 for signals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    kinds = {"bool": {"action": "store_true"}, "int": {"type": int}, "int | None": {"type": int}}
    kinds["str | Sequence[str]"] = {"action": "append"}
    for each in fields(DataConfig):
        kind = kinds.get(each.type, {})
        if each.name in ("source", "tokenizer", "out"):  # bash leaves the ~ in --out=~/data as it is
            kind = kind | {"type": os.path.expanduser}
        parser.add_argument(f"--{each.name}", help=each.metadata["help"], **kind)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given |= {name: value[0] for name, value in given.items() if type(value) is list and len(value) == 1}
    config = DataConfig(**given)
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
        if config.demo and (others := sorted(given.keys() - {"demo", "verify", "out", "encoding"})):
            raise ValueError(f"demo: it takes --out and --encoding (one of tiktoken's), not --{others[0]}")
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
