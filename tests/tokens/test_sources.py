"""Readers of documents: formats, folders, going on anywhere, invalid text.

Run: python -m pytest tests/tokens/test_sources.py"""

import os
from pathlib import Path

import pyarrow
import pytest
from corpus import DOCUMENTS, write_source
from pyarrow import parquet

from fineweb import DataConfig
from tokens import sources


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


def test_a_folder_is_read_in_order_links_once_and_nothing_hidden(tmp_path):
    texts = {"in/sub/a.txt": "a", "in/.hidden/b.txt": "b", "elsewhere/c.txt": "c", "in/ignored.md": "d"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_source(tmp_path / "in" / "z.jsonl.gz", ["y", "z"])
    for name, target in (("up", "."), ("twice", "sub"), ("far", "../elsewhere")):
        (tmp_path / "in" / name).symlink_to(target)
    found = [os.path.relpath(path, tmp_path / "in") for path in sources.find_files(str(tmp_path / "in"))]
    assert found == ["far/c.txt", "sub/a.txt", "z.jsonl.gz"]
    assert documents_of(read(tmp_path / "in")) == ["c", "a", "y", "z"]


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    text = b"\xef\xbb\xbfcaf\xe9 \xff\xfe, a true \xef\xbf\xbd, cut \xe2\x82"
    lines = b'{"text": "caf\xe9"}\n{"text": "lone \\ud800, pair \\ud83d\\ude00"}\n'
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.jsonl").write_bytes(lines)
    pieces = read(tmp_path)
    texts = ["caf\ufffd \ufffd\ufffd, a true \ufffd, cut \ufffd", "caf\ufffd", "lone \ufffd, pair 😀"]
    assert documents_of(pieces) == texts
    assert pieces[-1][2]["replaced"] == 4 + 1 + 1


def test_columns_of_parquet(tmp_path):
    path = write_source(tmp_path / "a.parquet")
    for field, words in (("body", "'body'.*'text', 'id'.*--text_field"), ("id", "'id' is not text")):
        with pytest.raises(ValueError, match=rf"a\.parquet: .*{words}"):
            read(path, field)
    texts = pyarrow.array(["first", None, "sécond", "first"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)
    assert documents_of(read(path)) == ["first", "sécond", "first"]


def test_limit_and_parts_choose_documents(tmp_path):
    path = write_source(tmp_path / "a.jsonl")
    limited = read(path, limit_docs=3)
    assert documents_of(limited) == [DOCUMENTS[0], DOCUMENTS[2]]
    assert (limited[-1][2]["documents"], limited[-1][2]["empty"]) == (3, 1)
    assert documents_of(read(path, num_parts=3, part=0)) == [DOCUMENTS[0], DOCUMENTS[3], DOCUMENTS[6]]
    assert documents_of(read(path, num_parts=3, part=2, limit_docs=1)) == [DOCUMENTS[2]]
