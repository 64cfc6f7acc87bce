"""Readers of documents: formats, going on anywhere, other scripts and encodings, endless lines, bad files."""

import gzip
import itertools
import os
import random
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow
import pytest
from conftest import refuses
from corpus import DOCUMENTS, small_flags, write_source
from pyarrow import parquet

import fineweb
from fineweb import DataConfig
from tokens import encodings, sources
from tokens.encodings import EOT
from tokens.shards import read_meta, read_shard


def read(path: Path, field="text", position=sources.START_POSITION, **share) -> list[tuple[bool, str, dict]]:
    """(begins a document, text, position after it) of the pieces of a file or folder, from a position on."""
    position = dict(position)
    pieces = sources.read_files(sources.find_files(str(path)), field, position)
    return [(*piece, dict(position)) for piece in sources.select(pieces, DataConfig(**share), position)]


def documents_of(pieces: list[tuple[bool, str, dict]]) -> list[str]:
    return "".join("\0" * begins + text for begins, text, _ in pieces).split("\0")[1:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "folder"])
def test_every_format_is_read_and_can_be_gone_on_from_anywhere(tmp_path, name):
    path = write_source(tmp_path / name)
    pieces = read(path)
    assert documents_of(pieces) == [text for text in DOCUMENTS if text.strip()]
    for number, (*_, position) in enumerate(pieces, 1):
        assert read(path, position=position) == pieces[number:]
    end, files = pieces[-1][2], sources.find_files(str(path))
    assert (end["documents"], end["empty"], end["replaced"]) == (7, 2, 0)
    assert 0 <= sum(map(os.path.getsize, files)) - end["read"] <= 1  # an empty line may follow


def test_a_folder_is_read_in_order_links_once_and_nothing_hidden_or_made_by_us(tmp_path, monkeypatch):
    texts = {"in/sub/a.txt": "a", "in/.hidden/b.txt": "b", "elsewhere/c.txt": "c", "in/ignored.md": "d"}
    texts |= dict.fromkeys(("in/log/run.json", "in/log/log.txt", "in/out/train_0.bin", "in/out/e.txt"), "e")
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_source(tmp_path / "in" / "z.jsonl.gz", ["y", "z"])
    for name, target in (("up", "."), ("twice", "sub"), ("far", "../elsewhere")):
        (tmp_path / "in" / name).symlink_to(target)
    found = [os.path.relpath(path, tmp_path / "in") for path in sources.find_files(str(tmp_path / "in"))]
    assert found == ["far/c.txt", "sub/a.txt", "z.jsonl.gz"]
    assert documents_of(read(tmp_path / "in")) == ["c", "a", "y", "z"]
    notes = write_source(tmp_path / "notes", ["e"])
    text = (notes / "0.txt").rename(notes / "0.md")
    assert [make(notes, notes), make(notes, notes), text.unlink()] == [0, 0, None]  # beside meta.json
    refuses("shards are for --data_dir", sources.find_files, str(notes))
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "no access", str(tmp_path))))
    refuses(f"no access: '{tmp_path}'", sources.find_files, str(tmp_path / "in"), error=OSError)


def test_columns_of_parquet(tmp_path):
    path = write_source(tmp_path / "a.parquet")
    for field, words in (("body", "'body'.*'text', 'id'.*--text_field"), ("id", "'id' is not text")):
        refuses(rf"a\.parquet: .*{words}", read, path, field)
    texts = pyarrow.array(["first", None, "sécond", "first"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)
    assert documents_of(read(path)) == ["first", "sécond", "first"]


def test_limit_and_parts_choose_documents(tmp_path):
    path = write_source(tmp_path / "a.jsonl")
    limited = read(path, limit_docs=3)
    assert documents_of(limited) == [DOCUMENTS[0], DOCUMENTS[2]]
    assert (limited[-1][2]["documents"], limited[-1][2]["empty"]) == (3, 1)
    assert documents_of(read(path, num_parts=3, part=2, limit_docs=1)) == [DOCUMENTS[2]]


# ---------------------------------------------------------------------------- TEXTS OF ALL KINDS
SCRIPTS = {
    "Russian": ["слово", "Ещё", " ", "  ", "\n", "\n\n", ", ", ".", "«", "»", "№5"],
    "Chinese": ["中文", "字", "。", "。\n", "\u3000", "\n\n", "2026年", "abc", "「", "」"],
    "Arabic, Hindi": ["كلمة", "،", " ", "हिन्दी", "।", "\u200d", "٣", "\n"],
    "code": ["don't", "''s", "_a1", "0xff", "\t", "  ", "\r\n", "==", "/*", "²5", "\x1c", "\u2028", "😀"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_cut_changes_no_token_in_any_script(gpt2_encoding, script):
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choices(SCRIPTS[script], k=100))
        parts = list(encodings.split_text(text, 40))
        assert "".join(parts) == text and len(parts) > 1 and max(map(len, parts)) <= 40
        tokens = [token for part in parts for token in gpt2_encoding.encode_ordinary(part)]
        assert tokens == gpt2_encoding.encode_ordinary(text)


def test_a_long_run_is_cut_and_a_panic_of_tiktoken_is_one_line(gpt2_encoding, monkeypatch):
    for text in ("a" + " " * 1_300_000 + "b", "中" * 600_001):
        assert gpt2_encoding.decode(encodings.encode_text(text, "gpt2")) == text
    panic = type("PanicException", (BaseException,), {})("StackOverflow " * 99)
    stand_in = type("Encoding", (), {"encode_to_numpy": lambda *_, **__: (_ for _ in ()).throw(panic)})
    refuses(r"^tiktoken cannot encode 'some text.{,200}$", encodings.encode, stand_in(), "some text " * 99)


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("split_on", [None, EOT])
def test_reading_goes_on_anywhere_and_cuts_long_runs_alike(tmp_path, monkeypatch, codec, split_on):
    def read(at: int = 0) -> list[tuple[bool, str, int]]:
        start = sources.START_POSITION | {"at": at}
        pieces = sources.read_files([str(tmp_path / "a.txt")], "", start, split_on)
        return [(begins, text, done["at"]) for begins, text, done in pieces]

    def cut_runs(pieces: list) -> list[int]:  # positions of cuts between equal letters
        return [a[2] for a, b in itertools.pairwise(pieces) if a[1][-1:] + b[1][:1] in ("AA", "\n\n")]

    text = "".join(random.Random(1).choices(["слово ", "A" * 99, "😀", "\n" * 99, EOT, "word"], k=200))
    mark = "\ufeff" if codec[3:] not in ("-8", "-8-sig") else ""
    (tmp_path / "a.txt").write_bytes((mark + text).encode(codec))
    monkeypatch.setattr(sources, "TASK_CHARS", 32)
    pieces = read()
    joined = ["".join("\0" * begins + piece for begins, piece, _ in pieces[n:]) for n in range(len(pieces))]
    assert joined[0].split("\0")[1:] == (text.split(split_on) if split_on else [text])
    for number in range(1, len(pieces), 9):
        rest = read(pieces[number - 1][2])
        assert "".join("\0" * begins + piece for begins, piece, _ in rest) == joined[number]
        assert cut_runs(rest) == [at for at in cut_runs(pieces) if at > pieces[number - 1][2]]
    assert len(cut_runs(pieces)) > 50


def make(source, out, **flags) -> int:
    return fineweb.main(small_flags(source, out, val_tokens=0, **flags))


REPLACE = {"errors": "replace"}
TEXTS = {
    "a.TXT": ("a", {}, ["a"]), "a.md": ("# a", {}, ["# a"]), "*.py": ("x = 1", {}, ["x = 1"]),
    "a.json": ('\n[{"text": "a"}, "b", {"text": null},\n"' + "é" * 99 + '"]\n', {}, ["a", "b", "é" * 99]),
    "a.csv": ('id,body\r\n1,"a ""b"",\nc"\r\n2,\n3,d\n', {"text_field": "body"}, ['a "b",\nc', "d"]),
    "a.jsonl": ('\ufeff{"text": "a"}\n\n\ufeff{"text": "\\u0000"}\n', {}, ["a", "\0"]),
    "b.jsonl": ('{"text": "é"}\n'.encode("utf-16"), {}, ["é"]),
    "b.csv": ("text\né\n".encode("utf-16"), {}, ["é"]), "b.json": ('["é"]'.encode("utf-32"), {}, ["é"]),
    "lone.txt": (b"\xff\xfea\0\x00\xd8b\0", REPLACE, ["a\ufffdb"]), "nul.txt": ("a\0b", REPLACE, ["a\0b"]),
    "latin.txt": (b"\xef\xbb\xbfcaf\xe9 \xff\xfe, a true \xef\xbf\xbd, cut \xe2\x82", REPLACE,
                  ["caf\ufffd \ufffd\ufffd, a true \ufffd, cut \ufffd"]),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n{"text": "lone \\ud800, pair \\ud83d\\ude00"}\n', REPLACE,
                    ["caf\ufffd", "lone \ufffd, pair 😀"]),
    "few.txt": (b"caf\xe9" + b" " * 300, {}, ["caf\ufffd" + " " * 300]),
    "split.txt": (f"a{EOT}\nb\n{EOT}", {"split_on": EOT}, ["a", "\nb\n"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_text_is_read(tmp_path, monkeypatch, name, whole_folder):
    content, flags, documents = TEXTS[name]
    (tmp_path / "in").mkdir()
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "in" / name.replace("*", "a")).write_bytes(content)
    monkeypatch.setattr(sources, "TASK_CHARS", 400 if name == "few.txt" else 20)
    source = tmp_path / "in" if whole_folder and name != "*.py" else tmp_path / "**" / name
    assert make(source, tmp_path / "out", **flags) == 0
    tokens = read_shard(tmp_path / "out" / "train_000000.bin")
    parts = np.split(tokens, np.flatnonzero(tokens == 256))[1:]
    assert [bytes(part[1:].astype(np.uint8)).decode() for part in parts] == documents
    replaced = "".join(documents).count("\ufffd") - content.count("\ufffd".encode())
    assert read_meta(tmp_path / "out")["replaced"] == replaced


BAD_TEXTS = {"nul.txt": (b"ab\0c", {}, "NULs.*iconv.*--errors replace"),
             "latin.py": ("größer".encode("latin-1"), {}, "UTF-8: 2 of 6 .*--errors replace"),
             "late.txt": (b"a" * 9900 + b"\xff" * 40, {}, "UTF-8"),
             "latin.jsonl": (b'{"text": "caf\xe9"}\n', {}, "UTF-8: 1 of 4"),
             "cut.txt": (b"\xff\xfea\0b", {}, "truncated"),
             "line.jsonl": (b'{"text": "' + b"a" * 2000, {}, r"line 1: .*1,000 characters.*\.txt"),
             "line.csv": (b"text\n" + b"a" * 2000, {}, "line 2: .*1,000"),
             "quote.csv": (b'text\n"a\n' + b"a\n" * 2000, {}, r"quote\.csv.*field.*limit"),
             "open.csv": (b'text\n"a\nb\n', {}, "quotation mark"),
             "item.json": (b'["a", "' + b"a" * 9000, {}, "item 2: .*1,000"),
             "open.json": (b'["a"', {}, "item 2"), "object.json": (b'{"text": "a"}', {}, "list"),
             "number.json": (b"[1]", {}, "item 1: int"),
             "field.csv": (b"id;body\n1;a\n", {}, "line 2: no field 'text', only 'id;body'.*--text_field"),
             "fields.jsonl": (b'{"' + b"a" * 900 + b'": 1}', {}, "--text_field"),
             "errors.txt": (b"a", {"errors": "ignore"}, "errors='ignore'.*strict or replace"),
             "nothing.txt": (b"a", {"split_on": ""}, "split_on=''"),
             "records.jsonl": (b'{"text": "a"}', {"split_on": EOT}, "split_on=.*records"),
             "malformed.jsonl": (b'{"text": "a"}\n{"text": \n', {}, "line 2: not a JSON object"),
             "nested.jsonl": (b"[" * 900 + b"\n", {}, "line 1: not a JSON object"),
             "list.jsonl": (b'{"text": "a"}\n\n["a"]\n', {}, "line 3: list .* 'text'"),
             "field.jsonl": (b'{"body": "a", "id": 1}\n', {}, "line 1: .*'text'.*'body', 'id'.*--text_field"),
             "type.jsonl": (b'{"text": 5}\n', {}, "line 1: .*'text' holds int"),
             "cut.jsonl.gz": (gzip.compress(random.Random(0).randbytes(9999))[:5000], {}, "Truncated"),
             "plain.txt.gz": (gzip.compress(b"a"), {}, "unpack"), "empty.jsonl.gz": (b"", {}, "is empty"),
             "foreign.jsonl.zst": (b"a", {}, "cannot"), "foreign.parquet": (b"a", {}, "cannot")}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_text_that_cannot_be_read_is_refused(tmp_path, monkeypatch, capsys, name):
    content, flags, words = BAD_TEXTS[name]
    monkeypatch.setattr(sources, "MAX_RECORD", 1000)
    monkeypatch.setattr(sources, "TASK_CHARS", 1000)
    (tmp_path / name).write_bytes(content)
    assert make(tmp_path / name, tmp_path / "out", **flags) == 2
    (line,) = re.findall("error: .*\n", capsys.readouterr().err)
    assert re.search(words, line) and len(line) < 400
    assert name in line or "=" in words  # which names a setting


def test_end_marks_are_counted_and_splitting_is_a_setting(tmp_path, capsys):
    write_source(tmp_path / "in", [f"a{EOT}b{EOT}", EOT])
    assert make(tmp_path / "in", tmp_path / "out") == 0
    warning = capsys.readouterr().err
    assert warning.count("warning") == 1 and "(2 times" in warning and f'--split_on "{EOT}"' in warning
    assert make(tmp_path / "in", tmp_path / "out", split_on=EOT) == 2
    assert "split_on=None" in capsys.readouterr().err
    meta = tmp_path / "out" / "meta.json"  # as of a folder made before there was --split_on
    meta.write_text(meta.read_text().replace('"split_on": null,', ""))
    assert make(tmp_path / "in", tmp_path / "out") == 0


def test_out_of_memory_and_an_error_in_a_worker_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("a" * 99)
    monkeypatch.setattr(fineweb, "encode_pieces", lambda *_: bytearray(1 << 62))
    assert make(tmp_path / "a.txt", tmp_path / "out") == 1
    assert re.findall("stopped by MemoryError.*--workers.*\n", capsys.readouterr().err, re.MULTILINE)
    monkeypatch.undo()
    tasks = fineweb.encode_tasks(iter([({}, [(True, "a")])] * 3), "nonsense", 2)
    refuses("'nonsense' is unknown", list, tasks)  # an error in the workers
