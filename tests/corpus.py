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
    shards = {f"train_{i:06d}.bin": make_tokens(n, i, below) for i, n in enumerate(lengths)}
    for name, tokens in shards.items():
        write_shard(folder / name, tokens)
    return list(shards.values())


def write_source(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    """Write documents in the format that the name asks for; a folder of .txt files if it has no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix)
    if compress:  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(compress(lines[:99]) + compress(lines[99:]))
    elif path.suffix == ".parquet":
        table = pyarrow.table({"text": documents, "id": list(range(len(documents)))})
        parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\n\n"))  # byte order mark, empty lines
    else:
        path.mkdir()
        for i, text in enumerate(documents):
            (path / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    return path


def small_flags(source: Path, out: Path, **flags) -> list[str]:
    """The flags of fineweb.py, for small texts."""
    flags = dict(source=source, out=out, encoding="bytes", val_tokens=100, workers=1) | flags
    return [f"--{name}={value}" for name, value in flags.items()]


def build(source: Path | str | list[str], out: Path | None, **flags) -> dict:
    """fineweb.build with settings for small texts."""
    flags = {"encoding": "bytes", "val_tokens": 100, "workers": 1, **flags}
    source = source if isinstance(source, list) else str(source)
    return fineweb.build(fineweb.DataConfig(source=source, out=out and str(out), **flags))


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stream_of(folder: Path) -> list[int]:
    """All tokens of a folder, validation first."""
    paths = sorted(folder.glob("val_*.bin")) + sorted(folder.glob("train_*.bin"))
    return [int(token) for path in paths for token in read_shard(path)]
