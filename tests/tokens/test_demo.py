"""The demo corpus: what it takes from Python's library, its split, and what happens when it is there."""

import json
import os
import sysconfig

import pytest
from conftest import refuses
from corpus import content

from tokens.demo import prepare_demo
from tokens.shards import read_meta, read_shard


def prose(number: int) -> str:
    """A paragraph that no other number has."""
    return " ".join(f"word{number}of{i}" for i in range(20))


def documents(folder, split: str) -> list[str]:
    tokens = read_shard(folder / f"{split}_000000.bin").tolist()
    return "".join(map(chr, tokens)).split(chr(256))[1:]


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
    meta = prepare_demo(tmp_path / "out")
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(map(prose, range(60)))
    assert 3 <= len(val) <= 4  # a twentieth
    assert meta["documents"] == 60


def test_the_corpus_is_made_once_and_again_if_damaged(library, tmp_path, capsys):
    out = tmp_path / "out"
    meta, before = prepare_demo(out), content(out)
    assert capsys.readouterr().out and prepare_demo(out) == meta == read_meta(out)
    other = meta | {"source": "demo corpus of Python 3.10.1"}  # copied from another machine
    (out / "meta.json").write_text(json.dumps(other))
    assert prepare_demo(out) == other and not capsys.readouterr().out  # which would name new shards
    (out / "meta.json").write_bytes(before["meta.json"])
    os.truncate(out / "train_000000.bin", 1100)
    assert prepare_demo(out) == meta and content(out) == before
    (out / "meta.json").write_text(json.dumps(meta).replace('"bytes"', '"gpt2"'))
    refuses(r"encoding='gpt2'.* encoding='bytes'", prepare_demo, out)
