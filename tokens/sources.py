"""Documents out of files and datasets, for fineweb.py: readers that can stop anywhere and go on from there.

    files = find_files("corpus/")                            # .txt .jsonl .jsonl.gz .jsonl.zst .parquet
    place = dict(START)                                      # how far reading has come; goes into meta.json
    for begins, text in read_local(job, files, place): ...   # job: what fineweb.py was told, a Job

A reader yields pieces of text, (whether one begins a document, text), and keeps `place` at what it has
yielded: a reader that starts from a copy of it repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

TASK_CHARS = 1 << 19  # text handed to a worker at a time: some 30 ms of work

# How far reading has come.
START = {"file": 0, "at": 0, "read": 0, "seen": 0, "documents": 0, "empty": 0, "replaced": 0}


def decode(raw: bytes | bytearray) -> str:
    """UTF-8, without its byte order mark; invalid bytes become surrogate escapes, for clean() to count."""
    return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def read_txt(path: str, at: int) -> Iterator[tuple[bool, int, str, int]]:
    """(begins the document, bytes read, text, bytes read) of pieces of a .txt file, which is one document.

    It is cut so that it need not fit into memory and yet has the tokens of the whole: between an ASCII letter
    and a space or line feed, across which none of tiktoken's encodings has a token or looks back. Where there
    is no such place it is not cut.
    """
    with open(path, "rb") as file:
        file.seek(at)
        begins, held = at == 0, bytearray()
        while chunk := file.read(TASK_CHARS):
            fresh = max(1, len(held))
            held += chunk
            for end in range(len(held) - 1, fresh - 1, -1):
                if held[end] in b" \n" and held[end - 1 : end].isalpha():
                    at += end
                    yield begins, at, decode(held[:end]), at
                    begins = False
                    del held[:end]
                    break
        if held or begins:
            at += len(held)
            yield begins, at, decode(held), at


def read_jsonl(path: str, at: int, name: str) -> Iterator[tuple[bool, int, str, int]]:
    """(True, lines read, text, bytes read) of the lines of a .jsonl, .jsonl.gz or .jsonl.zst file."""
    with open(path, "rb") as file:
        lines = file
        if not path.endswith(".jsonl") and os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty, which no compressed file is")
        if not path.endswith(".jsonl"):
            import pyarrow  # unlike the zstandard module, it notices that a file is truncated

            kind = "gzip" if path.endswith(".gz") else "zstd"
            lines = io.BufferedReader(pyarrow.CompressedInputStream(file, kind), 1 << 20)
        for number, line in enumerate(lines, 1):
            if number > at and line.strip():
                where = f"{path}, line {number}"
                try:
                    record = json.loads(decode(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not a JSON object ({error})") from error
                yield True, number, text_of(record, name, where), file.tell()


def read_parquet(path: str, at: int, name: str) -> Iterator[tuple[bool, int, str, int]]:
    """(True, rows read, text, bytes read) of the rows of a .parquet file."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        text_of(dict.fromkeys(table.schema_arrow.names), name, path)
        kind = table.schema_arrow.field(name).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise ValueError(f"{path}: the field {name!r} is not text")
        row, size = 0, os.path.getsize(path)
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row + count <= at:
                row += count
                continue
            for batch in table.iter_batches(1000, [group], [name]):
                # By way of text: a dictionary becomes nothing else. To bytes, for text that is no UTF-8.
                for raw in batch.column(0).cast(kind).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if row > at:
                        yield True, row, decode(raw or b""), size * row // table.metadata.num_rows


def text_of(record: object, name: str, where: str) -> str:
    """The text in a record. Raises ValueError that names the fields there are."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {type(record).__name__} instead of an object with the field {name!r}")
    if name not in record:
        raise ValueError(f"{where}: no field {name!r}, only {', '.join(map(repr, record))}; see --text_field")
    if not isinstance(record[name], str | None):
        raise ValueError(f"{where}: the field {name!r} holds {type(record[name]).__name__}, not text")
    return record[name] or ""


def take(job: Any, place: dict) -> bool:
    """Count a document; whether it is this part's."""
    mine = place["seen"] % job.num_parts == job.part
    place["seen"] += 1
    place["documents"] += mine
    return mine


def clean(text: str, place: dict) -> str:
    """`text` with U+FFFD, counted, for invalid UTF-8 (read as surrogate escapes) and lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        known = text.count("\ufffd")
        text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        place["replaced"] += text.count("\ufffd") - known
    return text


def find_files(path: str) -> list[str]:
    """The file itself, or the files of text in a folder and below it, each folder once, hidden ones left out.

    Raises ValueError if there are none.
    """
    suffixes = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
    found, seen = [path], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:  # a link may lead to a folder above it, and round and round
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if name[0] != ".")  # which of two names is taken
        found += [os.path.join(folder, name) for name in names if name[0] != "."]
    files = sorted(file for file in found if file.endswith(suffixes) and os.path.isfile(file))
    if not files:
        raise ValueError(f"source={path!r} is not, and does not hold, a file named {', '.join(suffixes)}")
    return files


def read_local(job: Any, files: list[str], place: dict) -> Iterator[tuple[bool, str]]:
    """(begins a document, text) from `place` on, which is kept at what has been yielded.

    Raises ValueError naming file and line for what cannot be read.
    """
    mine, before = True, sum(map(os.path.getsize, files[: place["file"]]))
    for path in files[place["file"] :]:
        if path.endswith(".txt"):
            pieces = read_txt(path, place["at"])
        else:
            read = read_parquet if path.endswith(".parquet") else read_jsonl
            pieces = read(path, place["at"], job.text_field)
        try:
            for begins, at, text, read_bytes in pieces:
                if begins:
                    if place["documents"] == job.limit_docs:
                        return
                    mine = take(job, place)
                place["at"], place["read"] = at, before + read_bytes
                if not mine:
                    continue
                text = clean(text, place)
                if begins and not text.strip():
                    place["empty"] += 1
                else:
                    yield begins, text
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's do not name the file
            if path in str(error):
                raise
            raise ValueError(f"{path} cannot be read: {error}") from error
        before += os.path.getsize(path)
        place["file"], place["at"] = place["file"] + 1, 0


def read_hub(job: Any, place: dict) -> tuple[Iterator[tuple[bool, str]], int | None]:
    """As read_local, streaming a dataset of the Hub; and how many documents it has, where that is known.

    With several parts each takes its own of the dataset's files if there are enough, so that nothing is
    downloaded twice, and else every num_parts-th document. Raises OSError (no such dataset, no network) or
    ValueError (no such subset, split or field).
    """
    import datasets

    where = {"split": job.split, "revision": job.revision}
    data = datasets.load_dataset(job.source, job.subset, **where, streaming=True)
    splits = data.info.splits or {}
    total = splits[job.split].num_examples // job.num_parts if job.split in splits else None
    if job.num_parts > 1 and data.num_shards >= job.num_parts:
        data = data.shard(job.num_parts, job.part)
        job = replace(job, num_parts=1, part=0)
    if "hub" in place:
        data.load_state_dict(place["hub"])

    def stream() -> Iterator[tuple[bool, str]]:
        for record in data:
            if place["documents"] == job.limit_docs:
                return
            mine = take(job, place)
            place["hub"], place["read"] = data.state_dict(), place["documents"]
            text = clean(text_of(record, job.text_field, job.source), place) if mine else ""
            if text.strip():
                yield True, text
            else:
                place["empty"] += mine

    return stream(), total
