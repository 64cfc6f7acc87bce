"""What a folder of shards holds, and what happens when there is something in it already. The demo corpus: its
documents, its split."""

import json
import os
import re
import sysconfig

import pytest
from conftest import refuses
from corpus import TOKENS, build, content, make_shards, make_tokens, stream_of, write_source

from tokens import demo
from tokens.shards import find_shards, read_meta, read_shard, write_shard


def test_shards_are_of_equal_size_and_complete_ones_are_left_alone(tmp_path, capsys):
    source, out = write_source(tmp_path / "a.jsonl"), tmp_path / "out"
    meta = build(source, out, val_tokens=30, shard_size=50)
    assert stream_of(out) == TOKENS
    assert len(read_shard(out / "val_000000.bin")) == 30
    assert len(read_shard(out / "train_000001.bin")) == 50  # the long document runs over
    assert (meta["documents"], meta["empty"], meta["replaced"]) == (7, 2, 0)
    assert meta["tokens"] == {"val": 30, "train": len(TOKENS) - 30} and meta["source"] == "a.jsonl"
    assert read_meta(out) == meta
    capsys.readouterr()
    assert build(source, out, val_tokens=30, shard_size=50) == meta
    assert capsys.readouterr().out == f"{out} is complete already\n"


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    source, out = write_source(tmp_path / "a.jsonl"), tmp_path / "out"
    build(source, out)
    before = content(out)
    other = write_source(tmp_path / "b.jsonl")
    for text, flags, words in ((source, dict(shard_size=60), "shard_size=100000000 .* shard_size=60"),
                               (source, dict(val_tokens=60), "val_tokens=100 .* val_tokens=60"),
                               (source, dict(limit_docs=2), "limit_docs=None .* limit_docs=2"),
                               (source, dict(num_parts=2), "num_parts=1 .* num_parts=2"),
                               (other, {}, r"source='a\.jsonl' .* source='b\.jsonl'")):  # fmt: skip
        refuses(words + ".*another --out", build, text, out, **flags)
    refuses(r"source='a\.jsonl' .* source='demo corpus", demo.prepare_demo, out)
    assert content(out) == before


def test_shards_of_unknown_origin_are_not_overwritten(tmp_path):
    source = write_source(tmp_path / "a.jsonl")
    make_shards(tmp_path / "ours", [50])
    (tmp_path / "nanogpt").mkdir()
    write_shard(tmp_path / "nanogpt" / "train.bin", make_tokens(50))
    for name, words in (("ours", r"train_000000\.bin .*no meta\.json"), ("nanogpt", r"train\.bin")):
        before = content(tmp_path / name)
        refuses(rf"{name}\W.*{words}.*another --out", build, source, tmp_path / name, val_tokens=0)
        assert content(tmp_path / name) == before


def test_too_small_a_source_leaves_nothing_behind(tmp_path):
    source, out = write_source(tmp_path / "a.jsonl", ["hello"]), tmp_path / "out"
    for val_tokens in (6, 7):  # validation alone would take everything, or more
        words = r"too small .*: 1 documents, 6 tokens; .* val_tokens=\d+"
        refuses(words, build, source, out, val_tokens=val_tokens)
    (tmp_path / "empty.txt").touch()
    refuses("0 tokens; no text", build, tmp_path / "empty.txt", out)
    assert not list(out.iterdir())
    assert build(source, out, val_tokens=5)["tokens"] == {"train": 1, "val": 5}
    longer = write_source(tmp_path / "b.jsonl", ["hello " * 99])
    tenth = build(longer, tmp_path / "tenth", val_tokens=None)["tokens"]
    assert tenth["val"] in range(59, 64) and tenth["train"] == 595 - tenth["val"]


def texts_of(folder) -> list[str]:
    """The documents of a folder of bytes, validation first."""
    return "".join(map(chr, stream_of(folder))).split(chr(256))[1:]


def test_parts_share_the_documents_and_a_folder(tmp_path):
    documents, out = [f"document {i} " * (i % 5 + 1) for i in range(40)], tmp_path / "out"
    source = write_source(tmp_path / "a.jsonl.gz", documents)
    for part in (2, 0, 1):
        build(source, out, num_parts=3, part=part, shard_size=150, val_tokens=50)
    names = {re.sub(r"\d{6}", "N", os.path.basename(path)) for path in find_shards(out / "*.bin")}
    assert names == {"val_p0000_N.bin", *(f"train_p000{part}_N.bin" for part in range(3))}
    assert sorted(texts_of(out)) == sorted(documents)
    assert texts_of(out)[1] == documents[3]  # part 0 has every third
    meta = read_meta(out)
    assert meta["complete"] and sum(meta["tokens"].values()) == len("".join(documents)) + 40
    words = r"too small \(part 40 of 41\): 0 documents, 0 tokens; no text"
    refuses(words, build, source, tmp_path / "empty", num_parts=41, part=40)


# ---------------------------------------------------------------------------- the demo corpus
def prose(number: int) -> str:
    """A paragraph that no other number has."""
    return " ".join(f"word{number}of{i}" for i in range(20))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library with prose 0 to 59; its modules must be read, not imported."""
    files = {f"m{i:02d}.py": f'"""{prose(i)}"""\nraise SystemExit' for i in range(57)}
    files |= {
        "wrong.py": "def (", "test/a.py": f'"""{prose(60)}"""', "site-packages/b.py": f'"""{prose(61)}"""',
        "pydoc_data/topics.py": f"topics = {{'if': {prose(57)!r}}}",
        "z1.py": f'"""{prose(58)}\n\n{prose(3)}"""\nclass Twin:\n    """{prose(4)}"""',  # 3 and 4 are known
        "z2.py": f'class A:\n    def f(self):\n        """{prose(59)}"""',
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})


def test_help_topics_and_docstrings_without_repeats(library, tmp_path):
    assert demo.prepare_demo(out := tmp_path / "out")["documents"] == 60
    assert sorted(texts_of(out)) == sorted(map(prose, range(60)))
    assert 3 <= read_shard(out / "val_000000.bin").tolist().count(256) <= 4  # a twentieth


def test_the_corpus_is_made_once_and_again_if_damaged(library, tmp_path, capsys):
    out = tmp_path / "out"
    meta, before = demo.prepare_demo(out), content(out)
    assert capsys.readouterr().out and demo.prepare_demo(out) == meta == read_meta(out)
    other = meta | {"source": "demo corpus of Python 3.10.1"}  # copied from another machine
    (out / "meta.json").write_text(json.dumps(other))
    assert demo.prepare_demo(out) == other and not capsys.readouterr().out  # which would name new shards
    (out / "meta.json").write_bytes(before["meta.json"])
    os.truncate(out / "train_000000.bin", 1100)
    assert demo.prepare_demo(out) == meta and content(out) == before
    (out / "meta.json").write_text(json.dumps(meta).replace('"bytes"', '"gpt2"'))
    refuses(r"encoding='gpt2'.* encoding='bytes'", demo.prepare_demo, out)
