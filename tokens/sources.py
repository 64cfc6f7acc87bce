"""Readers of documents, for fineweb.py. Reading can stop anywhere and continue from there.

    position = dict(START_POSITION)  # how much has been read; meta.json keeps it
    pieces = read_files(find_files("corpus/"), "text", position)
    for begins, text in select(pieces, config, position): ...

A document comes in pieces; `begins` says whether a piece is its first. `position` is the end of the last
piece that select has yielded: a reader that starts from a copy of it repeats and skips nothing.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

TASK_CHARS = 1 << 19  # characters that a tokenising process gets at a time: about 30 ms of work
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LETTER_BEFORE_SPACE = re.compile(rb".*[A-Za-z](?=[ \n])", re.DOTALL)  # up to the last such place
# Number of the file; bytes, lines or rows done in it; bytes read in all files; documents seen, documents of
# this part, empty documents of this part; invalid characters replaced.
START_POSITION = {"file": 0, "at": 0, "read": 0, "seen": 0, "documents": 0, "empty": 0, "replaced": 0}
Pieces = Iterator[tuple[bool, str, dict]]  # begins, text, what changes in the position


def decode(raw: bytes | bytearray) -> str:
    """UTF-8 without its byte order mark. Invalid bytes become surrogate escapes, for replace_invalid."""
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def read_txt(path: str, at: int, field: str = "") -> Pieces:
    """Pieces of a .txt file, which is one document, from byte `at` on. It need not fit into memory.

    The pieces give the tokens of the whole text. A cut is always between an ASCII letter and a space or line
    feed, because all of tiktoken's encodings begin a new token there.
    """
    with open(path, "rb") as file:
        file.seek(at)
        begins, held = at == 0, bytearray()
        while chunk := file.read(TASK_CHARS):
            fresh = max(1, len(held))
            held += chunk
            if cut := LETTER_BEFORE_SPACE.match(held, fresh - 1):
                at += cut.end()
                yield begins, decode(held[: cut.end()]), {"at": at, "read": at}
                begins = False
                del held[: cut.end()]
        if held or begins:
            yield begins, decode(held), {"at": at + len(held), "read": at + len(held)}


def read_jsonl(path: str, at: int, field: str) -> Pieces:
    """The lines after the first `at` of a .jsonl, .jsonl.gz or .jsonl.zst file: one document each."""
    with open(path, "rb") as file:
        lines = file
        if not path.endswith(".jsonl"):
            import pyarrow  # unlike the zstandard module, it notices that a file is truncated

            if os.path.getsize(path) == 0:
                raise ValueError(f"{path} is empty, so it is no compressed file")
            kind = "gzip" if path.endswith(".gz") else "zstd"
            lines = io.BufferedReader(pyarrow.CompressedInputStream(file, kind), 1 << 20)
        for number, line in enumerate(lines, 1):
            if number > at and line.strip():
                where = f"{path}, line {number}"
                try:
                    record = json.loads(decode(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not a JSON object ({error})") from error
                yield True, text_of(record, field, where), {"at": number, "read": file.tell()}


def read_parquet(path: str, at: int, field: str) -> Pieces:
    """The rows after the first `at` of a .parquet file: one document each."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        text_of(dict.fromkeys(table.schema_arrow.names), field, path)
        kind = table.schema_arrow.field(field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise ValueError(f"{path}: the field {field!r} is not text")
        size, batches = os.path.getsize(path), table.iter_batches(1000, columns=[field])
        # pyarrow casts a dictionary's values only to text. Bytes, because the text may be invalid UTF-8.
        columns = (b.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary()) for b in batches)
        for row, raw in enumerate((raw for column in columns for raw in column.to_pylist()), 1):
            if row > at:
                yield True, decode(raw or b""), {"at": row, "read": size * row // table.metadata.num_rows}


def text_of(record: object, field: str, where: str) -> str:
    """The text in a record. Raises ValueError that names the fields the record has."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {type(record).__name__} instead of an object with the field {field!r}")
    if field not in record:
        raise ValueError(
            f"{where}: no field {field!r}, only {', '.join(map(repr, record))}; see --text_field"
        )
    if not isinstance(record[field], str | None):
        raise ValueError(f"{where}: the field {field!r} holds {type(record[field]).__name__}, not text")
    return record[field] or ""


def replace_invalid(text: str, position: dict) -> str:
    """Replace invalid UTF-8 (read as surrogate escapes) and lone surrogates by U+FFFD, and count them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        known = text.count("\ufffd")
        text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        position["replaced"] += text.count("\ufffd") - known
    return text


def find_files(path: str) -> list[str]:
    """The file itself, or all text files in and below a folder, except hidden files. ValueError if none."""
    found, seen = [path], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:  # links can form a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if name[0] != ".")  # every machine needs the same order
        found += [os.path.join(folder, name) for name in names if name[0] != "."]
    files = sorted(file for file in found if file.endswith(SUFFIXES) and os.path.isfile(file))
    if not files:
        raise ValueError(f"source={path!r} is not, and does not hold, a file named {', '.join(SUFFIXES)}")
    return files


def read_files(files: list[str], field: str, position: dict) -> Pieces:
    """The documents of the files, from `position` on. Raises ValueError that names the file and its line."""
    first, start = position["file"], position["at"]
    before = sum(map(os.path.getsize, files[:first]))
    for number, path in enumerate(files[first:], first):
        reader = {".txt": read_txt, ".parquet": read_parquet}.get(os.path.splitext(path)[1], read_jsonl)
        try:
            for begins, text, done in reader(path, start, field):
                yield begins, text, {"file": number, "at": done["at"], "read": before + done["read"]}
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors do not name the file
            if path in str(error):
                raise
            raise ValueError(f"{path} cannot be read: {error}") from error
        before, start = before + os.path.getsize(path), 0


def read_hub(config: Any, position: dict) -> tuple[Pieces, int | None, Any]:
    """(documents of a Hub dataset, their number if known, config for select). Raises OSError, ValueError."""
    import datasets

    which = dict(split=config.split, revision=config.revision)
    data = datasets.load_dataset(config.source, config.subset, **which, streaming=True)
    total = getattr((data.info.splits or {}).get(config.split), "num_examples", None)
    if config.num_parts > 1 and data.num_shards >= config.num_parts:  # each part downloads only its files
        data = data.shard(config.num_parts, config.part)
        config = replace(config, num_parts=1, part=0)
    if "hub" in position:
        data.load_state_dict(position["hub"])
    texts = ((text_of(record, config.text_field, config.source), data.state_dict()) for record in data)
    return ((True, text, {"hub": state}) for text, state in texts), total, config


def select(pieces: Pieces, config: Any, position: dict) -> Iterator[tuple[bool, str]]:
    """(begins, text) of every num_parts-th document, up to limit_docs. Updates `position` and its counts."""
    ours = True  # a saved position lies only inside documents of this part
    for begins, text, changes in pieces:
        if begins:
            if position["documents"] == config.limit_docs:
                return
            ours = position["seen"] % config.num_parts == config.part
            position["seen"] += 1
            position["documents"] += ours
        position.update(changes)
        if ours:
            text = replace_invalid(text, position)
            if begins and not text.strip():
                position["empty"] += 1
            else:
                yield begins, text
