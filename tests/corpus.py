"""Small texts and shards, for the tests of tokens/, fineweb.py and hellaswag.py."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import zstandard
from pyarrow import parquet

import fineweb
from tokens.shards import read_shard, write_shard

DOCUMENTS = ["The first document.", "", "Zweites Dökument 😀", "line one\nline two\n\n", "  \n\t"]
DOCUMENTS += ["x" * 300, "end"]
TOKENS = [token for text in DOCUMENTS if text.strip() for token in [256, *text.encode()]]  # encoding "bytes"


def make_tokens(n: int, seed: int = 0, below: int = 50257) -> np.ndarray:
    """Random token ids (n,)."""
    return np.random.default_rng(seed).integers(0, below, n, dtype=np.uint16)


def make_shards(folder: Path, lengths: list[int], below: int = 50257) -> list[np.ndarray]:
    """Write training shards of random tokens; return the tokens of each."""
    folder.mkdir(exist_ok=True)
    shards = [make_tokens(n, seed, below) for seed, n in enumerate(lengths)]
    for i, tokens in enumerate(shards):
        write_shard(folder / f"train_{i:06d}.bin", tokens)
    return shards


def write_jsonl(path: Path, lines: list) -> Path:
    """Write lines, each of which is bytes or becomes JSON."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def write_source(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    """Write documents in the format that the name asks for; a folder of .txt files if it has no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()
    half = len(lines) // 2
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": documents, "id": list(range(len(documents)))})
        parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".gz":  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    elif path.suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif path.suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\n\n"))  # byte order mark, empty lines
    else:
        path.mkdir()
        for i, text in enumerate(documents):
            (path / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    return path


def build(source: Path | str, out: Path | None, **flags) -> dict:
    """fineweb.build with settings for small texts."""
    flags = {"encoding": "bytes", "val_tokens": 100, "workers": 1, **flags}
    return fineweb.build(fineweb.DataConfig(source=str(source), out=out and str(out), **flags))


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    """When each file in a folder was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def stream_of(folder: Path) -> list[int]:
    """All tokens of a folder, validation first."""
    paths = sorted(folder.glob("val_*.bin")) + sorted(folder.glob("train_*.bin"))
    return [int(token) for path in paths for token in read_shard(path)]
