"""Readers of documents, for fineweb.py. Reading can stop anywhere and continue from there.

    position = dict(START_POSITION)  # how much has been read; meta.json keeps it
    pieces = read_files(find_files("corpus/"), "text", position)
    for begins, text in select(pieces, config, position): ...

A document comes in pieces; `begins` says whether a piece is its first. `position` is the end of the last
piece that select has yielded: a reader that starts from a copy of it repeats and skips nothing."""

import codecs
import csv
import fnmatch
import io
import itertools
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from glob import glob
from typing import Any, BinaryIO

from tqdm import tqdm

from tokens.encodings import EOT, split_text

TASK_CHARS = 1 << 19  # characters that a tokenising thread gets at a time: about 30 ms of work
MAX_RECORD = 1 << 24  # characters of a line or item that is parsed whole: about 150 MB of memory
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
MORE_SUFFIXES = (".md", ".json", ".csv")  # often notes about the data: read from a folder without the others
MADE = re.compile(r"(meta(_p\d{4})?|tokenizer|run)\.json|metrics\.jsonl|log\.txt")  # beside shards, by a run
# With a byte order mark. UTF-32 is looked for first, because its mark begins with that of UTF-16.
MARKED = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be", "utf-8")
# Number of the file; bytes, lines or rows done in it; bytes read in all files; documents seen, documents of
# this part, empty documents of this part; invalid characters replaced.
START_POSITION = {"file": 0, "at": 0, "read": 0, "seen": 0, "documents": 0, "empty": 0, "replaced": 0}
Pieces = Iterator[tuple[bool, str, dict]]  # begins, text, what changes in the position


def skip_mark(file: BinaryIO) -> tuple[str, str]:
    """(encoding, error handler) of a file at its beginning. Moves behind its byte order mark. The handler
    turns what is invalid into surrogates, for replace_invalid."""
    head = file.peek(4)
    encoding = next((name for name in MARKED if head.startswith("\ufeff".encode(name))), "")
    file.read(len("\ufeff".encode(encoding)) if encoding else 0)
    return encoding or "utf-8", "surrogateescape" if encoding in ("", "utf-8") else "surrogatepass"


def split_documents(blocks: Iterable[str], split_on: str | None) -> Iterator[tuple[str, str]]:
    """(separator before it or "", text) of each part of the documents that `split_on` separates."""
    separator, held, tail = "", "", len(split_on or "")
    most = TASK_CHARS * 9 // 8  # a little more, so that each part but the last is a task by itself
    for block in blocks:
        *documents, held = (held + block).split(split_on) if split_on else [held + block]
        for document in documents:
            for part in split_text(document, most):
                yield separator, part
                separator = ""
            separator = split_on
        end = max(0, len(held) - tail)  # a separator may begin after `end`
        *parts, rest = split_text(held[:end], most)
        for part in parts:
            yield separator, part
            separator = ""
        held = rest + held[end:]
    yield separator, held


def read_txt(path: str, at: int, split_on: str | None) -> Pieces:
    """Pieces of a text file from byte `at` on: one document, or those between the separators `split_on`.
    A document need not fit into memory. Its pieces give the tokens of the whole, as split_text does."""
    with open(path, "rb") as file:
        codec = skip_mark(file)
        decoder = codecs.getincrementaldecoder(codec[0])(codec[1])
        begins, at = at == 0, max(at, file.tell())
        file.seek(at)
        raw_blocks = iter(lambda: file.read(TASK_CHARS), b"")
        blocks = (decoder.decode(raw, final=not raw) for raw in itertools.chain(raw_blocks, [b""]))
        for separator, text in split_documents(blocks, split_on):
            at += len((separator + text).encode(*codec))
            begins = begins or separator != ""
            if begins or text:
                yield begins, text, {"at": at, "read": at}
            begins = False


def read_lines(file: BinaryIO, path: str) -> Iterator[str]:
    """The lines of an open file. Raises ValueError for one of more than MAX_RECORD characters."""
    encoding, errors = skip_mark(file)
    lines = io.TextIOWrapper(file, encoding, errors, newline="\n")
    for number in itertools.count(1):
        line = lines.readline(MAX_RECORD + 1)
        if len(line) > MAX_RECORD:
            cure = "split it, or put its text into a .txt file"
            raise ValueError(f"{path}, line {number}: it has more than {MAX_RECORD:,} characters; {cure}")
        if not line:
            return
        yield line


def read_jsonl(path: str, at: int, field: str) -> Pieces:
    """The lines after the first `at` of a .jsonl, .jsonl.gz or .jsonl.zst file: one document each."""
    with open(path, "rb") as file:
        lines, mend = file, ""
        if not path.lower().endswith(".jsonl"):
            import pyarrow  # unlike the zstandard module, it notices that a file is truncated

            if os.path.getsize(path) == 0:
                raise ValueError(f"{path} is empty, so it is no compressed file")
            kind = "gzip" if path.lower().endswith(".gz") else "zstd"
            mend = "; a compressed file needs lines of JSON: unpack plain text first"
            lines = io.BufferedReader(pyarrow.CompressedInputStream(file, kind), 1 << 20)
        for number, line in enumerate(read_lines(lines, path), 1):
            if number > at and line.strip():
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line.removeprefix("\ufeff"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not a JSON object ({error}){mend}") from error
                yield True, text_of(record, field, where), {"at": number, "read": file.tell()}


def read_json(path: str, at: int, field: str) -> Pieces:
    """The items after the first `at` of a .json file, a list of objects or texts: one document each."""
    parse, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    with open(path, "rb") as file:
        text = io.TextIOWrapper(file, *skip_mark(file))
        number, held, place = 0, text.read(TASK_CHARS).lstrip(), 1
        if held[:1] != "[":
            raise ValueError(f"{path} is no list of objects or texts, which a .json source must be")
        while True:
            place = gap.match(held, place).end()
            if held[place : place + 1] == "]":
                return
            where = f"{path}, item {number + 1}"
            try:
                record, place = parse(held, place)
            except (ValueError, RecursionError) as error:
                more = text.read(max(TASK_CHARS, len(held) - place))  # the item may go on behind `held`
                if not more or len(held) - place > MAX_RECORD:
                    raise ValueError(f"{where}: not JSON, or over {MAX_RECORD:,} characters") from error
                held, place = held[place:] + more, 0
                continue
            number += 1
            if number > at:
                document = record if isinstance(record, str) else text_of(record, field, where)
                yield True, document, {"at": number, "read": file.tell()}


def read_csv(path: str, at: int, field: str) -> Pieces:
    """The rows after the first `at` of a .csv file, whose first line has the names: one document each."""
    csv.field_size_limit(MAX_RECORD)
    with open(path, "rb") as file:
        rows = csv.DictReader(lines := read_lines(file, path))
        for number, row in enumerate(rows, 1):
            if lines.gi_frame is None:  # a field has no end: csv looked for it behind the last line
                raise ValueError(f"{path}: a field begins with a quotation mark, but no other mark ends it")
            if number > at:
                where = f"{path}, line {rows.line_num}"
                yield True, text_of(row, field, where), {"at": number, "read": file.tell()}


def read_parquet(path: str, at: int, field: str) -> Pieces:
    """The rows after the first `at` of a .parquet file: one document each."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:  # no whole columns
        text_of(dict.fromkeys(table.schema_arrow.names), field, path)
        kind = table.schema_arrow.field(field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise ValueError(f"{path}: the field {field!r} is not text")
        size, rows = os.path.getsize(path), max(1, table.metadata.num_rows)
        groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
        total = max(1, sum(group.total_byte_size for group in groups))
        most = 8 * TASK_CHARS * rows // total  # rows in 4 MiB
        batches = table.iter_batches(min(1000, max(1, most)), columns=[field], use_threads=False)
        # pyarrow casts a dictionary's values only to text. Bytes, because the text may be invalid UTF-8.
        columns = (b.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary()) for b in batches)
        for row, raw in enumerate((raw for column in columns for raw in column.to_pylist()), 1):
            if row > at:
                text = (raw or b"").removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
                yield True, text, {"at": row, "read": size * row // rows}


def text_of(record: object, field: str, where: str) -> str:
    """The text in a record. Raises ValueError that names the fields the record has."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {type(record).__name__} instead of an object with the field {field!r}")
    if field not in record:
        names = reprlib.repr(list(record))[1:-1]
        raise ValueError(f"{where}: no field {field!r}, only {names}; see --text_field")
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


def check_text(pieces: Pieces, path: str, plain: bool) -> Pieces:
    """Pass the pieces of a file on. Raises ValueError if over 1% of its characters, or of any TASK_CHARS of
    them, are invalid, or if plain text holds a NUL."""
    chars = bad = 0
    cure = "convert it (iconv -f ITS_ENCODING -t utf-8); fineweb.py also takes --errors replace"
    for piece in itertools.chain(pieces, [None]):
        if piece is None or chars > TASK_CHARS:
            if 100 * bad > chars:
                raise ValueError(f"{path} is no UTF-8: {bad:,} of {chars:,} characters are invalid; {cure}")
            chars = bad = 0
        if piece is not None:
            if plain and "\0" in piece[1]:
                raise ValueError(f"{path} holds NULs: it is binary, or UTF-16 without its mark; {cure}")
            chars += len(piece[1])
            bad += 0 if piece[1].isascii() else len(re.findall("[\ud800-\udfff]", piece[1]))
            yield piece


def read_plain(path: str) -> Iterator[tuple[bool, str]]:
    """(begins, text) of the pieces of a text file, read as training data are. ValueError if it is no text."""
    for begins, text, _ in check_text(read_txt(path, 0, None), path, plain=True):
        yield begins, replace_invalid(text, {"replaced": 0})


def find_files(path: str) -> list[str]:
    """The file itself, the files that a pattern such as "src/**/*.py" matches, or the text files in and below
    a folder, without what is hidden, and without subfolders of shards or runs. ValueError if there are none;
    OSError if a folder cannot be read."""
    files = [path] if os.path.exists(path) else glob(path, recursive=True)
    if files := sorted(file for file in files if os.path.isfile(file)):
        return files

    def stop(error: OSError) -> None:  # os.walk alone would leave out a folder that cannot be read
        if os.path.isdir(error.filename):
            raise error

    found, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=stop, followlinks=True):
        real, shards = os.path.realpath(folder), fnmatch.filter(names, "train_*.bin")
        ours = shards or {"run.json", "log.txt"} <= {*names}  # made of these texts, perhaps beside them
        if real in seen or (ours and folder != path):  # links can form a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")  # every machine needs the same order
        names = [name for name in names if name[0] != "." and not (ours and MADE.fullmatch(name))]
        found += [os.path.join(folder, name) for name in names]
    for suffixes in (SUFFIXES, MORE_SUFFIXES):
        files = sorted(file for file in found if file.lower().endswith(suffixes) and os.path.isfile(file))
        if files:
            return files
    names = ", ".join(SUFFIXES + MORE_SUFFIXES) + " (shards are for --data_dir; for others pass a pattern)"
    raise ValueError(f"source={path!r} is not, and does not hold, a file named {names}")


def read_files(
    files: list[str], field: str, position: dict, split_on: str | None = None, errors: str = "replace"
) -> Pieces:
    """The documents of the files, from `position` on. Raises ValueError that names the file and its line."""
    readers = {".parquet": read_parquet, ".json": read_json, ".csv": read_csv}
    readers |= dict.fromkeys((".jsonl", ".gz", ".zst"), read_jsonl)
    first, start = position["file"], position["at"]
    before = sum(map(os.path.getsize, files[:first]))
    for number, path in enumerate(files[first:], first):
        reader = readers.get(os.path.splitext(path.lower())[1])
        if reader and split_on:
            raise ValueError(f"split_on={split_on!r} divides plain text; {path} has its documents in records")
        pieces = reader(path, start, field) if reader else read_txt(path, start, split_on)
        if errors == "strict":
            pieces = check_text(pieces, path, reader in (None, read_csv))
        try:
            for begins, text, done in pieces:
                yield begins, text, {"file": number, "at": done["at"], "read": before + done["read"]}
        except (OSError, ValueError, NotImplementedError, csv.Error) as error:  # some do not name the file
            if path in str(error):
                raise
            raise ValueError(f"{path} cannot be read: {error}") from error
        before, start = before + os.path.getsize(path), 0


def read_hub(config: Any, position: dict) -> tuple[Pieces, int | None, Any]:
    """(documents of a Hub dataset, their number if known, config for select). Raises OSError, ValueError."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # no lines about its retries
    which = dict(split=config.split, revision=config.revision)
    try:
        data = datasets.load_dataset(config.source, config.subset, **which, streaming=True)
    except ConnectionError as error:
        cure = "without network use `python fineweb.py --demo`, or a file of yours as --source"
        raise FileNotFoundError(f"source={config.source!r} cannot be reached: {error}; {cure}") from error
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
    ours, warned = True, False  # a saved position lies only inside documents of this part
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
            if not warned and EOT in text:
                warned, seen = True, f"{text.count(EOT):,} times in {len(text):,} characters"
                cure = f'--split_on "{EOT}" makes documents of plain text'
                tqdm.write(f"warning: {EOT} is read as ordinary text ({seen}); {cure}", file=sys.stderr)
            if begins and not text.strip():
                position["empty"] += 1
            else:
                yield begins, text
