"""Encodings, shards, the loader, the demo corpus and the script that makes shards.

Run: python -m pytest tests/test_fineweb.py
"""

import contextlib
import functools
import gc
import gzip
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import torch
from conftest import ROOT, shared_file, slow
from hypothesis import given, settings
from hypothesis import strategies as st

import fineweb
from fineweb import DataConfig, build
from tokens import demo, encodings, shards, sources
from tokens.shards import DistributedDataLoader, find_shards, read_meta, read_shard, write_shard

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def make_tokens(n: int, seed: int = 0, below: int = 50257) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, n, dtype=np.uint16)


def make_shards(folder: Path, lengths: list[int], below: int = 50257) -> list[np.ndarray]:
    shards = [make_tokens(n, seed, below) for seed, n in enumerate(lengths)]
    for i, tokens in enumerate(shards):
        write_shard(folder / f"train_{i:06d}.bin", tokens)
    return shards


def run(source: Path, out: Path, **flags) -> dict:
    """fineweb.build with settings for small texts."""
    defaults = {"encoding": "bytes", "val_tokens": 100, "workers": 1}
    return build(DataConfig(source=str(source), out=str(out), **{**defaults, **flags}))


def command(source: Path, out: Path, **flags) -> list[str]:
    """The same as a command line."""
    flags = {"source": source, "out": out, "encoding": "bytes", "val_tokens": 100, "workers": 1, **flags}
    return [sys.executable, str(ROOT / "fineweb.py"), *(f"--{name}={value}" for name, value in flags.items())]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stream_of(folder: Path) -> list[int]:
    """All tokens of a folder, validation first."""
    paths = sorted(folder.glob("val_*.bin")) + sorted(folder.glob("train_*.bin"))
    return [int(t) for path in paths for t in read_shard(path)]


# ----------------------------------------------------------------------------------------------------------
# ENCODINGS


def test_bytes_encoding_is_utf8_and_needs_no_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = encodings.get_encoding("bytes")
    text = "naïve 😀\n\n\ttab<|endoftext|>" + "long line " * 200
    assert encodings.encode(encoding, text).tolist() == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


def test_endless_whitespace_does_not_crash_tiktoken(gpt2_encoding):
    text = "a" + " " * 1_300_000 + "b"
    assert gpt2_encoding.decode(encodings.encode(gpt2_encoding, text).tolist()) == text


def test_unknown_encoding_is_named_with_what_was_meant():
    with pytest.raises(ValueError, match=r"encoding='gtp2' is unknown \(did you mean 'gpt2'"):
        encodings.get_encoding("gtp2")


def test_encoding_without_network_names_the_two_ways_out(monkeypatch):
    def offline(name):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match=r"'p50k_base'.*TIKTOKEN_CACHE_DIR.*--encoding bytes"):
        encodings.get_encoding("p50k_base")


def test_encoding_whose_ids_do_not_fit_is_refused(monkeypatch):
    special = {encodings.EOT: 1 << 16}
    big = tiktoken.Encoding("big", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: big)
    with pytest.raises(ValueError, match=r"'cl100k_base' has 65537 ids.*uint16.*use gpt2"):
        encodings.get_encoding("cl100k_base")


def test_text_of_a_model(gpt2_encoding, monkeypatch):
    text = "naïve 😀 <|endoftext|>"
    ids = encodings.encode_text(text, "gpt2")
    assert ids == gpt2_encoding.encode_ordinary(text)
    assert encodings.decode_tokens([*ids, 50256, 50300], "gpt2") == text  # special and unknown: left out
    with pytest.raises(ValueError, match=r"encoding='unknown' is unknown; .*config\.json"):
        encodings.decode_tokens(ids, "unknown")
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # not installed, as where an exported folder may lie
    ids = encodings.encode_text(text, "bytes")
    assert ids == list(text.encode()) and encodings.decode_tokens([*ids, 256], "bytes") == text


# ----------------------------------------------------------------------------------------------------------
# SHARDS


def test_header_is_that_of_llmc(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([7, 8, 65535], dtype=np.uint16))
    raw = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert raw[1024:] == b"\x07\x00\x08\x00\xff\xff"


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shard_bytes(magic=20240520, version=1, count=100, tokens=100) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + make_tokens(tokens).tobytes()


BAD_SHARDS = {
    "truncated": (shard_bytes(tokens=99), "is truncated: .* 1224 bytes, it has 1222"),
    "truncated in header": (shard_bytes()[:500], "truncated within its header"),
    "padded": (shard_bytes(tokens=101), "is padded"),
    "wrong magic": (shard_bytes(magic=20240801), "magic number 20240801 instead of 20240520"),
    "no magic": (shard_bytes(magic=7), "magic number 7 instead of 20240520"),
    "wrong version": (shard_bytes(version=2), "shard version 2, not 1"),
    "zero tokens": (shard_bytes(count=0, tokens=0), "holds 0 tokens"),
    "negative count": (shard_bytes(count=-5), "holds -5 tokens"),
    "empty": (b"", "holds 0 tokens"),
    "odd size": (make_tokens(50).tobytes() + b"\x00", "is padded"),
    "text": (b"It was the best of times, it was the worst of times.", "it is text .* --source"),
    "cut text": (("naïve café " * 200).encode()[:1025], "is text"),
    "latin-1 text": (("naïve café " * 200).encode("latin-1"), "is text"),
    "zip": (b"PK\x03\x04" + bytes(100), "it is zip or a checkpoint"),
    "gzip": (gzip.compress(b"abc" * 100), "it is gzip"),
    "npy int64": (npy(np.arange(9)), "holds int64 of shape"),
    "npy 2-D": (npy(make_tokens(8).reshape(2, 4)), r"shape \(2, 4\)"),
    "npy big-endian": (npy(make_tokens(8).astype(">u2")), "holds >u2"),
    "npy no tokens": (npy(make_tokens(0)), "holds 0 tokens"),
    "npy truncated": (npy(make_tokens(8))[:-1], "is truncated"),
    "npy padded": (npy(make_tokens(8)) + b"\x00\x00", "is padded"),
    "npy damaged header": (npy(make_tokens(8)).replace(b"descr", b"de\x00cr"), r"damaged \.npy header"),
    "npy objects": (npy(np.array([{}], dtype=object)), "holds object"),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_bad_shard_is_refused_by_name_cause_and_cure(tmp_path, kind):
    raw, message = BAD_SHARDS[kind]
    (tmp_path / "train_000000.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        read_shard(tmp_path / "train_000000.bin")
    assert str(tmp_path / "train_000000.bin") in str(error.value) and "python fineweb.py" in str(error.value)
    with pytest.raises(ValueError, match=message):
        DistributedDataLoader(tmp_path, B=1, T=4)


def test_missing_shard_and_folder_as_shard(tmp_path):
    for path in (tmp_path, tmp_path / "none.bin"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            read_shard(path)


def expected_tokens(raw: bytes) -> bytes | None:
    """The tokens' bytes if `raw` is a shard by the letter of the formats, independently of fineweb.py."""
    if raw[:6] == b"\x93NUMPY":
        with contextlib.suppress(Exception):
            array = np.load(io.BytesIO(raw), allow_pickle=False)
            right_kind = array.dtype == np.dtype("<u2") and array.ndim == 1 and array.size
            if right_kind and raw.endswith(array.tobytes()):
                return array.tobytes()
        return None
    header = np.frombuffer(raw[: len(raw) // 4 * 4][:12], dtype="<i4").tolist()
    if header[:1] == [20240520]:
        ok = len(raw) > 1024 and header[1] == 1 and len(raw) == 1024 + 2 * header[2]
        return raw[1024:] if ok else None
    return raw if raw and len(raw) % 2 == 0 else None


HEADS = [b"", shard_bytes()[:1024], shard_bytes()[:8], npy(make_tokens(100))[:128]]
HEADS += [b"\x93NUMPY", b"\x93NUMPY\x01\x00"]
VALID = [shard_bytes(), npy(make_tokens(100)), make_tokens(100).tobytes()]


@settings(max_examples=400)
@given(data=st.data())
def test_random_bytes_give_an_error_or_the_right_tokens(tmp_path_factory, data):
    """Random files, and whole shards with bytes changed, cut off or put on."""
    if data.draw(st.booleans()):
        raw = data.draw(st.sampled_from(HEADS)) + data.draw(st.binary(max_size=300))
    else:
        raw = bytearray(data.draw(st.sampled_from(VALID)))
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, min(len(raw) - 1, 140)))] = data.draw(st.integers(0, 255))
        raw = bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw)
        raw += data.draw(st.binary(max_size=4))
    path = tmp_path_factory.getbasetemp() / "random.bin"
    path.write_bytes(raw)
    try:
        tokens = read_shard(path)
    except ValueError as error:
        assert str(path) in str(error)
        whole = expected_tokens(raw)
        # What has no header may also be refused for looking like something else.
        assert whole is None or whole is raw
    else:
        assert tokens.tobytes() == expected_tokens(raw)


def test_write_shard_refuses_other_arrays(tmp_path):
    for tokens in (np.arange(5), make_tokens(4).reshape(2, 2), make_tokens(0)):
        with pytest.raises(ValueError, match=r"a\.bin"):
            write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_shard(tmp_path / "a.bin", make_tokens(10))
    before = content(tmp_path)
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "a.bin", make_tokens(20))
    assert content(tmp_path) == before


def test_find_shards_knows_the_names_of_other_projects(tmp_path):
    names = ["fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    names += ["edufineweb_train_000001.npy", "train.bin", "val.bin", "train_000000.bin.12.tmp", "meta.json"]
    for name in names:
        (tmp_path / name).write_bytes(b"\x01\x00")
    found = [Path(path).name for path in find_shards(tmp_path, "train")]
    assert found == sorted(n for n in names if "train" in n and not n.endswith("tmp"))
    assert len(find_shards(tmp_path, "val")) == 2
    assert len(find_shards(tmp_path / "fineweb_train_*.bin")) == 2


def test_missing_data_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data: .*nowhere.*--demo"):
        find_shards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no train shard .* 0 shards .*python fineweb\.py --out"):
        find_shards(tmp_path)
    write_shard(tmp_path / "train_000000.bin", make_tokens(9))
    with pytest.raises(FileNotFoundError, match=r"no val shard .* among the 1 shards.*--val_tokens"):
        find_shards(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="no data"):
        DistributedDataLoader(tmp_path / "*.none", B=1, T=4)
    with pytest.raises(FileNotFoundError, match="no data"):
        DistributedDataLoader([], B=1, T=4)


META = {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256, "shards": {}, "complete": True}


def test_read_meta(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder"):
        read_meta(tmp_path / "none")
    with pytest.warns(UserWarning, match=r"no meta\.json .* GPT-2's"):
        assert read_meta(tmp_path)["vocab_size"] == 50257
    for part in range(2):
        meta = META | {"tokens": {"train": 10 + part, "val": 5 * (1 - part)}}
        (tmp_path / f"meta_p{part:04d}.json").write_text(json.dumps(meta))
    assert read_meta(tmp_path)["tokens"] == {"train": 21, "val": 5}
    (tmp_path / "meta_p0001.json").write_text(json.dumps(META | {"tokens": {}, "complete": False}))
    with pytest.warns(UserWarning, match="unfinished"):
        read_meta(tmp_path)
    (tmp_path / "meta_p0001.json").write_text(json.dumps(META | {"tokens": {}, "encoding": "bytes"}))
    with pytest.raises(ValueError, match=r"encoding is 'gpt2' in .*p0000.* but 'bytes' in .*p0001"):
        read_meta(tmp_path)
    bad = "{", "[]", "{}", '{"encoding": 3}', json.dumps(META | {"tokens": 3}), "[" * 100_000, "\x00"
    for damaged in bad:
        (tmp_path / "meta_p0001.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"meta_p0001\.json is damaged"):
            read_meta(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# LOADER


def next_tokens(loader: DistributedDataLoader, n: int) -> torch.Tensor:
    return torch.cat([torch.cat(loader.next_batch(), dim=1) for _ in range(n)])


def ranks_of(folder: Path, B: int, T: int, size: int, **more) -> list[DistributedDataLoader]:
    return [DistributedDataLoader(folder, B=B, T=T, rank=r, world_size=size, **more) for r in range(size)]


def test_batches_are_windows_shifted_by_one(tmp_path):
    (tokens,) = make_shards(tmp_path, [4 * 8 * 5 + 1])
    loader = DistributedDataLoader(tmp_path, B=4, T=8)
    for batch in range(5):
        x, y = loader.next_batch()
        assert x.shape == y.shape == (4, 8) and x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        for row in range(4):
            file, offset = loader.locate(4 * batch + row)
            assert file == str(tmp_path / "train_000000.bin") and offset % 8 == 0
            assert x[row].tolist() == tokens[offset : offset + 8].tolist()
            assert y[row].tolist() == tokens[offset + 1 : offset + 9].tolist()
    assert loader.num_tokens == 161 and loader.samples_per_epoch == 20


def test_three_formats_give_the_same_first_ten_batches(tmp_path):
    shards = [make_tokens(n, n) for n in (500, 333, 400)]
    for i, tokens in enumerate(shards):
        for kind in ("llmc", "numpy", "bare"):
            (tmp_path / kind).mkdir(exist_ok=True)
        write_shard(tmp_path / "llmc" / f"train_{i:06d}.bin", tokens)
        np.save(tmp_path / "numpy" / f"edufineweb_train_{i:06d}.npy", tokens)
        tokens.tofile(tmp_path / "bare" / f"train_{i}.bin")
    for shuffle in (True, False):
        first, *others = [
            next_tokens(DistributedDataLoader(tmp_path / kind, B=3, T=16, shuffle=shuffle), 10)
            for kind in ("llmc", "numpy", "bare")
        ]
        assert all(torch.equal(first, other) for other in others)


def test_every_epoch_has_every_sample_once_in_its_own_order(tmp_path):
    shards = make_shards(tmp_path, [101, 57, 12, 200], below=65536)
    windows = sorted(t[i : i + 11].tolist() for t in shards for i in range(0, len(t) - 10, 10))
    loader = DistributedDataLoader(tmp_path, B=5, T=10)
    assert loader.samples_per_epoch == len(windows) == 10 + 5 + 1 + 19
    epochs = []
    for _ in range(3):
        rows = next_tokens(loader, 7)
        epochs.append([[*row[:10], row[-1]] for row in rows.tolist()])
        assert sorted(epochs[-1]) == windows
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = DistributedDataLoader(tmp_path, B=5, T=10, seed=7)
    assert [[*row[:10], row[-1]] for row in next_tokens(other, 7).tolist()] != epochs[0]


def test_any_ranks_batch_and_accumulation_read_the_same_stream(tmp_path):
    make_shards(tmp_path, [301, 99, 250])
    expected = next_tokens(DistributedDataLoader(tmp_path, B=12, T=7), 20)  # across epochs
    for world_size, B in ((1, 1), (1, 4), (2, 6), (3, 2), (4, 1)):
        ranks = ranks_of(tmp_path, B, 7, world_size)
        calls = 240 // (B * world_size)
        stream = torch.cat([next_tokens(loader, 1) for _ in range(calls) for loader in ranks])
        assert torch.equal(stream, expected), (world_size, B)


class LlmcOrder:
    """llm.c's sequential order for one process, written from the description of its train_gpt2.py."""

    def __init__(self, shards: list[np.ndarray], B: int, T: int):
        self.shards, self.B, self.T, self.shard, self.at = shards, B, T, 0, 0

    def next_batch(self):
        size = self.B * self.T
        chunk = torch.tensor(self.shards[self.shard][self.at : self.at + size + 1].astype(np.int64))
        self.at += size
        if self.at + size + 1 > len(self.shards[self.shard]):
            self.shard, self.at = (self.shard + 1) % len(self.shards), 0
        return chunk[:-1].view(self.B, self.T), chunk[1:].view(self.B, self.T)


@pytest.mark.parametrize("lengths", [[129], [128 + 64, 65, 400], [321, 320, 319]])
def test_sequential_order_is_llmcs(tmp_path, lengths):
    shards = make_shards(tmp_path, lengths)
    reference = next_tokens(LlmcOrder(shards, 4, 16), 40)
    assert torch.equal(next_tokens(DistributedDataLoader(tmp_path, B=4, T=16, shuffle=False), 40), reference)
    ranks = ranks_of(tmp_path, 2, 16, 2, shuffle=False)
    assert torch.equal(torch.cat([next_tokens(loader, 1) for _ in range(40) for loader in ranks]), reference)


@settings(max_examples=60)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    keys = np.random.SeedSequence(key).generate_state(shards.FEISTEL_ROUNDS, np.uint64)
    assert sorted(shards.permute(np.arange(n), n, keys).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [7, 1000, 10**7])
def test_permute_is_even(n):
    """Over many keys each place is reached equally often, and neighbours do not stay neighbours."""
    seeds = (np.random.SeedSequence([1337, e]) for e in range(2000))
    keys = [seed.generate_state(shards.FEISTEL_ROUNDS, np.uint64) for seed in seeds]
    places = np.array([shards.permute(np.array([0, 1, n - 1]), n, k) for k in keys])  # (2000, 3)
    counts = np.array([np.bincount(places[:, i] * 7 // n, minlength=7) for i in range(3)])
    chi2 = ((counts - 2000 / 7) ** 2 / (2000 / 7)).sum(axis=1)
    assert (chi2 < 27.9).all(), chi2  # 6 degrees of freedom: exceeded once in 10,000
    steps = (places[:, 1] - places[:, 0]) % n
    assert np.abs(np.bincount(steps * 7 // n, minlength=7)[1:] - 2000 / 7).max() < 2000 / 7 * 0.35


def test_resume_goes_on_exactly_on_any_ranks(tmp_path):
    make_shards(tmp_path, [301, 99, 250])
    stream = next_tokens(DistributedDataLoader(tmp_path, B=1, T=7), 300)
    loader = DistributedDataLoader(tmp_path, B=5, T=7, prefetch=3)
    next_tokens(loader, 4)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["position"] == 20  # handed out; more has been prefetched
    for world_size, B in ((1, 5), (2, 3), (4, 7)):
        ranks = ranks_of(tmp_path, B, 7, world_size)
        for rank in ranks:
            next_tokens(rank, 2)
            rank.load_state_dict(state)
        rest = torch.cat([next_tokens(loader, 1) for _ in range(5) for loader in ranks])
        assert torch.equal(rest, stream[20 : 20 + len(rest)])
        assert ranks[0].state_dict()["position"] == 20 + len(rest)


def test_resume_on_another_stream_is_refused_by_field_and_values(tmp_path):
    for name, lengths in (("a", [300, 200]), ("b", [300, 201]), ("d", [500])):
        (tmp_path / name).mkdir()
        make_shards(tmp_path / name, lengths)
    (tmp_path / "c").mkdir()
    for i, n in enumerate([300, 200]):  # as many shards and tokens, but others
        write_shard(tmp_path / "c" / f"train_{i:06d}.bin", make_tokens(n, seed=99))

    def load(name="a", B=2, T=8, **options):
        return DistributedDataLoader(tmp_path / name, B=B, T=T, **options)

    state = load().state_dict()
    for other, message in (
        (load(T=9), "T=8, but here T=9"),
        (load(seed=2), "seed=1337, but here seed=2"),
        (load(shuffle=False), "shuffle=True, but here shuffle=False"),
        (load("b"), "tokens=500, but here tokens=501"),
        (load("c"), "sha256='"),
        (load("d"), "files=2, but here files=1"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    sequential = load(shuffle=False).state_dict()
    with pytest.raises(ValueError, match=r"B \* world_size=2, but here B \* world_size=3"):
        load(B=3, shuffle=False).load_state_dict(sequential)


def test_too_little_data_says_how_much_is_needed_and_there(tmp_path):
    make_shards(tmp_path, [60, 60])
    message = r"too little data: .*B={} .*world_size=2 .*{} samples of T=8, .*{}, .* 120 tokens, {} such"
    for B, shuffle, *numbers in ((8, True, 16, "129 tokens", 14), (4, False, 8, "65 tokens in one shard", 0)):
        with pytest.raises(ValueError, match=message.format(B, *numbers)):
            DistributedDataLoader(tmp_path, B=B, T=8, world_size=2, shuffle=shuffle)


@pytest.mark.parametrize("wrong", [dict(B=0), dict(T=0), dict(seed=-1), dict(prefetch=-1), dict(rank=1)])
def test_wrong_arguments_are_named(tmp_path, wrong):
    make_shards(tmp_path, [300])
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        DistributedDataLoader(tmp_path, **{"B": 1, "T": 8, **wrong})


def test_token_outside_the_vocabulary_is_located(tmp_path):
    tokens = make_tokens(200, below=257)
    tokens[77] = 257
    write_shard(tmp_path / "train_000000.bin", tokens)
    loader = DistributedDataLoader(tmp_path, B=2, T=10, vocab_size=257, shuffle=False)
    next_tokens(loader, 3)
    for _ in range(2):  # and again, rather than going on behind it
        with pytest.raises(ValueError, match=r"train_000000\.bin: token 257 at offset 77 .*vocab_size=257"):
            loader.next_batch()
        assert loader.state_dict()["position"] == 6
    assert DistributedDataLoader(tmp_path, B=2, T=10, vocab_size=258, shuffle=False).next_batch()


def test_a_shard_that_goes_away_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    make_shards(tmp_path, [50, 50, 50])
    loader = DistributedDataLoader(tmp_path, B=2, T=8, shuffle=False, prefetch=0)
    loader.next_batch()
    os.unlink(tmp_path / "train_000001.bin")
    with pytest.raises(FileNotFoundError, match=r"train_000001\.bin"):
        next_tokens(loader, 9)


@linux
def test_many_shards_take_few_file_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 4)
    make_shards(tmp_path, [40] * 50)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    loader = DistributedDataLoader(tmp_path, B=25, T=8)
    next_tokens(loader, 8)
    assert len(os.listdir("/proc/self/fd")) < before + 15  # and not 50: 4 maps, and what is being read ahead


def test_prefetching_ends_with_the_loader_and_with_the_process(tmp_path):
    make_shards(tmp_path, [300])
    before = set(threading.enumerate())
    loader = DistributedDataLoader(tmp_path, B=2, T=8)
    loader.next_batch()
    (thread,) = set(threading.enumerate()) - before
    assert thread.name.startswith("prefetch")
    del loader
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import fineweb
from tokens import sources
loader = fineweb.DistributedDataLoader({str(tmp_path)!r}, B=2, T=8)
loader.next_batch()
raise SystemExit(5)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 5


def test_batches_for_a_gpu_are_uploaded_ahead_and_waited_for_there(tmp_path, monkeypatch):
    """The order of what is asked of CUDA, told by stand-ins for its streams; the same batches as ever."""
    make_shards(tmp_path, [300])
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            told.append(f"{self.name} records")
            return "arrival"

        def wait_event(self, event):
            told.append(f"{self.name} waits for {event}")

    def pinned(batch):
        told.append("pinned")
        return batch

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda batch, stream: told.append("in use"))
    plain = DistributedDataLoader(tmp_path, B=2, T=8)
    loader = DistributedDataLoader(tmp_path, B=2, T=8, prefetch=0)
    loader._upload = Stream("upload")
    for _ in range(2):
        for ours, expected in zip(loader.next_batch(), plain.next_batch(), strict=True):
            assert torch.equal(ours, expected)
    assert told == ["pinned", "upload records", "training waits for arrival", "in use"] * 2
    assert loader.state_dict()["position"] == 4


# ----------------------------------------------------------------------------------------------------------
# DEMO CORPUS


def test_demo_corpus(tmp_path, capsys, monkeypatch):
    imported = set(sys.modules)
    documents = list(demo.demo_documents())
    monkeypatch.setattr(demo, "demo_documents", lambda: iter(documents))
    meta = demo.prepare_demo(tmp_path)
    assert not {"antigravity", "this", "turtle", "pydoc_data.topics"} & (set(sys.modules) - imported)
    assert "documents" in capsys.readouterr().out
    train, val = (bytes(read_shard(tmp_path / f"{s}_000000.bin").astype(np.uint8)) for s in ("train", "val"))
    assert meta["tokens"] == {"train": len(train), "val": len(val)}
    assert len(train) > 800_000 and 0.04 < len(val) / len(train) < 0.2

    def runs(text: bytes) -> list[tuple[bytes, ...]]:
        words = re.findall(rb"\w+", text.lower())
        return [tuple(words[i : i + 8]) for i in range(len(words) - 7)]

    known, held_out = set(runs(train)), runs(val)
    assert sum(run in known for run in held_out) < 0.01 * len(held_out)  # no twins across the split
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert demo.prepare_demo(tmp_path) == meta == read_meta(tmp_path)
    assert times == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    meta_path = tmp_path / "meta.json"
    content = meta_path.read_text()
    meta_path.write_text(content.replace(f"Python {sys.version.split()[0]}", "Python 3.10.1"))
    assert demo.prepare_demo(tmp_path)["source"] == "demo corpus of Python 3.10.1"  # copied from elsewhere
    now = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert times == now | {"meta.json": times["meta.json"]}
    meta_path.write_text(content)
    os.truncate(tmp_path / "train_000000.bin", 5000)  # is made again
    before = read_shard(tmp_path / "val_000000.bin").tobytes()
    assert demo.prepare_demo(tmp_path) == meta and read_shard(tmp_path / "val_000000.bin").tobytes() == before
    assert bytes(read_shard(tmp_path / "train_000000.bin").astype(np.uint8)) == train
    with pytest.raises(ValueError, match=r"made with encoding='bytes'.* now encoding='gpt2'"):
        shared_file("tiktoken_cache")
        demo.prepare_demo(tmp_path, "gpt2")


# ----------------------------------------------------------------------------------------------------------
# SOURCES

DOCUMENTS = ["The first document.", "", "Zweites Dökument 😀", "line one\nline two\n\n", "  \n\t"]
DOCUMENTS += ["x" * 300, "end"]
EXPECTED = [t for text in DOCUMENTS if text.strip() for t in [256, *text.encode()]]


def write_source(path: Path, documents: list[str]) -> Path:
    """Documents in the format that the name asks for."""
    import pyarrow as pa
    import zstandard
    from pyarrow import parquet

    lines = "".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)).encode()
    half = len(lines) // 2
    if path.suffix == ".parquet":
        table = pa.table({"text": documents, "id": list(range(len(documents)))})
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
        for i, document in enumerate(documents):
            (path / f"{i}.txt").write_text(document, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "folder"])
def test_formats(tmp_path, name):
    meta = run(write_source(tmp_path / name, DOCUMENTS), tmp_path / "out", val_tokens=30, shard_size=50)
    assert stream_of(tmp_path / "out") == EXPECTED
    assert (meta["documents"], meta["empty"], meta["replaced"]) == (7, 2, 0)
    assert meta["tokens"] == {"val": 30, "train": len(EXPECTED) - 30} and meta["source"] == name
    assert len(read_shard(tmp_path / "out" / "train_000001.bin")) == 50  # the long document runs over
    assert read_meta(tmp_path / "out") == meta


def test_folder_of_everything(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl.gz", "deep/c.parquet", "deep/d.jsonl.zst"):
        write_source(tmp_path / "in" / name, DOCUMENTS)
    (tmp_path / "in" / "ignored.md").write_text("not a source")
    (tmp_path / "in" / "z.txt").write_text("last")
    run(tmp_path / "in", tmp_path / "out")
    assert stream_of(tmp_path / "out") == EXPECTED * 4 + [256, *b"last"]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_cutting_a_text_does_not_change_its_tokens(tmp_path, monkeypatch, name):
    if name == "gpt2":
        shared_file("tiktoken_cache")
    pieces = ["word", " ", "\n", "  \n", "don't", "1234", "!?", "é", "。", "\u3000", "\u00a0", "a b", "\r\n"]
    text = "".join(random.Random(0).choices(pieces, k=6000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(sources, "TASK_CHARS", 37)
    run(tmp_path / "a.txt", tmp_path / "out", encoding=name)
    encoding = encodings.get_encoding(name)
    assert stream_of(tmp_path / "out") == [encoding.eot_token, *encoding.encode_ordinary(text)]
    cuts = list(sources.read_txt(str(tmp_path / "a.txt"), 0))
    assert len(cuts) > 300 and cuts[-1][2]["at"] == len(text.encode())
    rest = sources.read_txt(str(tmp_path / "a.txt"), cuts[99][2]["at"])
    assert "".join(piece[1] for piece in cuts[100:]) == "".join(piece[1] for piece in rest)


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "in").mkdir()
    text = b"\xef\xbb\xbfcaf\xe9 \xff\xfe, a true \xef\xbf\xbd, cut \xe2\x82"
    lines = b'{"text": "caf\xe9"}\n{"text": "lone \\ud800, pair \\ud83d\\ude00"}\n'
    (tmp_path / "in" / "a.txt").write_bytes(text)
    (tmp_path / "in" / "b.jsonl").write_bytes(lines)
    meta = run(tmp_path / "in", tmp_path / "out", val_tokens=5)
    texts = ["caf\ufffd \ufffd\ufffd, a true \ufffd, cut \ufffd", "caf\ufffd", "lone \ufffd, pair 😀"]
    assert stream_of(tmp_path / "out") == [t for text in texts for t in [256, *text.encode()]]
    assert meta["replaced"] == 4 + 1 + 1


BAD_SOURCES = {
    "malformed.jsonl": (b'{"text": "a"}\n{"text": \n', r"malformed\.jsonl, line 2: not a JSON object"),
    "nested.jsonl": (b"[" * 100_000 + b"\n", "line 1: not a JSON object"),
    "list.jsonl": (b'{"text": "a"}\n\n["a"]\n', r"line 3: list instead of an object with the field 'text'"),
    "field.jsonl": (b'{"body": "a", "id": 1}\n', "line 1: no field 'text', only 'body', 'id'; see --text_"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: the field 'text' holds int, not text"),
    "truncated.jsonl.gz": (gzip.compress(random.Random(0).randbytes(9999))[:5000], "be read: Truncated"),
    "foreign.jsonl.zst": (b"hello", "cannot be read"),
    "foreign.parquet": (b"hello", r"foreign\.parquet cannot be read"),
    "empty.jsonl": (b"", r"is too small .*: 0 documents, 0 tokens"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source_is_refused_by_file_and_line(tmp_path, name):
    raw, message = BAD_SOURCES[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / name, tmp_path / "out")
    assert str(tmp_path / name) in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_parquet_without_the_field(tmp_path):
    write_source(tmp_path / "a.parquet", DOCUMENTS)
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'body', only 'text', 'id'; see --text_field"):
        run(tmp_path / "a.parquet", tmp_path / "out", text_field="body")
    with pytest.raises(ValueError, match=r"a\.parquet: the field 'id' is not text"):
        run(tmp_path / "a.parquet", tmp_path / "out", text_field="id")


def test_limit_docs(tmp_path):
    write_source(tmp_path / "a.jsonl", DOCUMENTS)
    meta = run(tmp_path / "a.jsonl", tmp_path / "out", limit_docs=3, val_tokens=5)
    assert meta["documents"] == 3 and meta["empty"] == 1
    assert stream_of(tmp_path / "out") == [256, *DOCUMENTS[0].encode(), 256, *DOCUMENTS[2].encode()]


def test_parts_share_the_documents_and_a_folder(tmp_path):
    documents = [f"document {i} " * (i % 5 + 1) for i in range(40)]
    write_source(tmp_path / "a.jsonl.gz", documents)
    for part in (2, 0, 1):
        run(tmp_path / "a.jsonl.gz", tmp_path / "out", num_parts=3, part=part, shard_size=150, val_tokens=50)
    train = [Path(p).name for p in find_shards(tmp_path / "out", "train")]
    kinds = {re.sub(r"\d{6}", "N", name) for name in train}
    assert len(train) > 6 and kinds == {f"train_p{part:04d}_N.bin" for part in range(3)}
    assert [Path(p).name for p in find_shards(tmp_path / "out", "val")] == ["val_p0000_000000.bin"]
    found = []
    for part in range(3):
        files = [p for s in ("val", "train") for p in sorted((tmp_path / "out").glob(f"{s}_p{part:04d}*"))]
        raw = np.concatenate([read_shard(path) for path in files])
        found += ["".join(map(chr, d)) for d in np.split(raw, np.flatnonzero(raw == 256))[1:]]
    assert sorted(d[1:] for d in found) == sorted(documents)
    meta = read_meta(tmp_path / "out")
    assert meta["complete"] and sum(meta["tokens"].values()) == sum(len(d) + 1 for d in documents)
    with pytest.raises(ValueError, match=r"too small \(part 40 of 41\): 0 documents, 0 tokens; no text"):
        run(tmp_path / "a.jsonl.gz", tmp_path / "empty", num_parts=41, part=40)
    with pytest.raises(ValueError, match=r"num_parts=3 .* now num_parts=1"):
        run(tmp_path / "a.jsonl.gz", tmp_path / "out", shard_size=150, val_tokens=50)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset on the Hub of three files of 50 documents, without network."""
    import datasets

    rows = [[f"file {f} row {i} " * 3 if i % 10 else "" for i in range(50)] for f in range(3)]
    files = [str(write_source(tmp_path / f"{f}.parquet", rows[f])) for f in range(3)]
    load = datasets.load_dataset

    def load_dataset(name, subset, split, revision, streaming):
        assert (name, subset, split, revision, streaming) == ("owner/name", None, "train", None, True)
        return load("parquet", data_files=files, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return "owner/name"


def test_a_folder_with_shards_of_another_kind_is_refused(tmp_path):
    (tmp_path / "in.txt").write_text("some text " * 100)
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "train.bin", make_tokens(50))  # by nanoGPT's name
    with pytest.raises(ValueError, match=r"out holds train\.bin, which belongs to other data: give another"):
        run(tmp_path / "in.txt", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["train.bin"]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "a.txt").write_text("a")
    (tmp_path / "in" / ".hidden").mkdir()
    (tmp_path / "in" / ".hidden" / "b.txt").write_text("b")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    for name, target in (("up", "."), ("twice", "sub"), ("far", "../elsewhere")):
        (tmp_path / "in" / name).symlink_to(target)
    found = [os.path.relpath(path, tmp_path / "in") for path in sources.find_files(str(tmp_path / "in"))]
    assert found == ["far/c.txt", "sub/a.txt"]


def test_text_columns_that_are_dictionaries_and_archives_without_a_byte(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = ["first", None, "sécond", "first"]
    table = pa.table({"text": pa.array(texts).dictionary_encode()})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    found = [text for _, text, _ in sources.read_parquet(str(tmp_path / "a.parquet"), 0, "text")]
    assert found == ["first", "", "sécond", "first"]
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz is empty, so it is no compressed file"):
        list(sources.read_jsonl(str(tmp_path / "b.jsonl.gz"), 0, "text"))


def test_hub_dataset(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(sources, "TASK_CHARS", 200)
    meta = run(hub, tmp_path / "whole", val_tokens=100, shard_size=400)
    assert (meta["documents"], meta["empty"]) == (150, 15)
    for part in range(2):  # by files
        run(hub, tmp_path / "parts", num_parts=2, part=part, shard_size=1000)
    for part in range(4):  # more parts than files: by documents
        run(hub, tmp_path / "more", num_parts=4, part=part, shard_size=1000)
    for folder in ("parts", "more"):
        assert sorted(stream_of(tmp_path / folder)) == sorted(stream_of(tmp_path / "whole"))
    before = content(tmp_path / "whole")
    make = lambda out: run(hub, out, val_tokens=100, shard_size=400)  # noqa: E731
    crash_and_resume(tmp_path / "crashed", make, before, [3, 4, 9])
    with pytest.raises(ValueError, match=r"owner/name: no field 'body', only 'text', 'id'"):
        run(hub, tmp_path / "other", text_field="body")


# ----------------------------------------------------------------------------------------------------------
# THE SCRIPT


class Crash(BaseException):
    """Stands for the end of the process."""


def crash_and_resume(out: Path, make, expected: dict[str, bytes], moments) -> None:
    """Crash at the n-th renaming of a file, n from `moments`, and go on: before it, after it, and with the
    newest shard damaged besides."""
    rename = os.replace
    for moment, how in itertools.product(moments, ("before", "after", "damaged")):
        count, shards = itertools.count(1), []

        def replace(source, target, count=count, shards=shards, moment=moment, how=how):
            now = next(count) == moment
            if not now or how != "before":
                rename(source, target)
                shards += [target] if str(target).endswith(".bin") else []
            if now:
                raise Crash

        for path in out.iterdir() if out.exists() else []:
            path.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)  # a crash of the process, not of the machine
            with patch.context() as inner, pytest.raises(Crash):
                inner.setattr(os, "replace", replace)
                make(out)
            if how == "damaged":
                for path in shards[-1:]:
                    os.truncate(path, os.path.getsize(path) - 2)
            make(out)
        assert content(out) == expected, (moment, how)


def test_crash_at_every_step_loses_nothing(tmp_path, monkeypatch):
    """Reading goes on within a .jsonl.gz, .txt and .parquet file, and within a piece."""
    (tmp_path / "in").mkdir()
    write_source(tmp_path / "in" / "a.jsonl.gz", DOCUMENTS)
    (tmp_path / "in" / "b.txt").write_bytes(b"some text \xff goes on " * 20)
    write_source(tmp_path / "in" / "c.parquet", DOCUMENTS * 2)
    monkeypatch.setattr(sources, "TASK_CHARS", 20)
    tasks = []
    encode = fineweb.encode_pieces
    monkeypatch.setattr(fineweb, "encode_pieces", lambda *task: tasks.append(task) or encode(*task))

    def make(out):
        run(tmp_path / "in", out, shard_size=130, val_tokens=40)

    make(tmp_path / "out")
    expected, whole = content(tmp_path / "out"), len(tasks)
    renamings = 2 * (len(expected) - 1)
    assert renamings > 20 and whole > 25 and json.loads(expected["meta.json"])["replaced"] == 20
    crash_and_resume(tmp_path / "crashed", make, expected, range(1, renamings + 1))
    tasks.clear()
    crash_and_resume(tmp_path / "crashed", make, expected, [renamings - 2])
    assert len(tasks) < 3.6 * whole  # three times all but the end, and three times only the end


def test_lost_or_damaged_pieces_are_made_again(tmp_path):
    write_source(tmp_path / "a.jsonl", DOCUMENTS * 3)
    make = lambda: run(tmp_path / "a.jsonl", tmp_path / "out", shard_size=200, val_tokens=40)  # noqa: E731
    make()
    expected = content(tmp_path / "out")
    for name in ("meta.json", "train_000001.bin", "val_000000.bin"):
        (tmp_path / "out" / name).unlink()
        make()
        assert content(tmp_path / "out") == expected, name
    os.truncate(tmp_path / "out" / "train_000002.bin", 1100)
    (tmp_path / "out" / ".train_000002.bin.0123456789abcdef.tmp").write_bytes(b"left by a kill")
    (tmp_path / "out" / ".meta.json.0123456789abcdef.tmp").write_bytes(b"left by a kill")
    make()
    assert content(tmp_path / "out") == expected


def test_complete_data_is_left_alone(tmp_path, capsys):
    write_source(tmp_path / "a.jsonl", DOCUMENTS)
    meta = run(tmp_path / "a.jsonl", tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(tmp_path / "a.jsonl", tmp_path / "out") == meta
    assert "complete already" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    write_source(tmp_path / "a.jsonl", DOCUMENTS)
    run(tmp_path / "a.jsonl", tmp_path / "out")
    before = content(tmp_path / "out")
    for flags, message in (
        ({"shard_size": 60}, "shard_size=100000000 .* now shard_size=60"),
        ({"val_tokens": 60}, "val_tokens=100 .* now val_tokens=60"),
        ({"limit_docs": 2}, "limit_docs=None .* now limit_docs=2"),
    ):
        with pytest.raises(ValueError, match=message + ".*another --out"):
            run(tmp_path / "a.jsonl", tmp_path / "out", **flags)
    write_source(tmp_path / "b.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match=r"source='a\.jsonl' .* now source='b\.jsonl'"):
        run(tmp_path / "b.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match=r"source='a\.jsonl' .* now source='demo corpus"):
        demo.prepare_demo(tmp_path / "out")
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "grown"}\n')
    with pytest.raises(ValueError, match=r"source_bytes=.* now source_bytes="):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_shards_of_unknown_origin_are_not_overwritten(tmp_path):
    write_source(tmp_path / "a.jsonl", DOCUMENTS)
    (tmp_path / "out").mkdir()
    make_shards(tmp_path / "out", [50])
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=r"train_000000\.bin holds other tokens, and there is no meta\.json"):
        run(tmp_path / "a.jsonl", tmp_path / "out", val_tokens=0)
    assert content(tmp_path / "out") == before


def test_too_small_a_source_leaves_nothing_behind(tmp_path):
    write_source(tmp_path / "a.jsonl", ["hello"])
    for val_tokens in (6, 7, None):  # validation alone would take everything, or more
        with pytest.raises(ValueError, match=r"too small .*: 1 documents, 6 tokens; .* val_tokens=\d+"):
            run(tmp_path / "a.jsonl", tmp_path / "out", val_tokens=val_tokens)
    assert not list((tmp_path / "out").iterdir())
    assert run(tmp_path / "a.jsonl", tmp_path / "out", val_tokens=5)["tokens"] == {"train": 1, "val": 5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shard_size": 0}, "shard_size=0 must be at least 1"),
        ({"shard_size": 1 << 31}, "shard_size=2147483648 must be .* below"),
        ({"val_tokens": -1}, "val_tokens=-1"),
        ({"limit_docs": 0}, "limit_docs=0"),
        ({"workers": -1}, "workers=-1"),
        ({"num_parts": 0}, "num_parts=0"),
        ({"num_parts": 2, "part": 2}, "part=2 must be from 0 to num_parts - 1 = 1"),
        ({"encoding": "nonsense"}, "encoding='nonsense' is unknown"),
        ({"out": None}, "out is missing"),
        ({"source": "no/such/file.txt"}, "source='no/such/file.txt' is no file or folder here"),
        ({"source": "other"}, "is not, and does not hold, a file named .txt, .jsonl"),
    ],
)
def test_wrong_settings_are_named(tmp_path, flags, message):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "other").mkdir()
    flags = {name: str(tmp_path / "other") if value == "other" else value for name, value in flags.items()}
    defaults = {"source": str(tmp_path / "a.txt"), "out": str(tmp_path / "out"), "encoding": "bytes"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(DataConfig(**{**defaults, **flags}))


def wait_for_shards(out: Path, process: subprocess.Popen, more_than: int = 0) -> None:
    while process.poll() is None and len(list(out.glob("*.bin"))) <= more_than:
        time.sleep(0.002)


def test_workers_do_not_change_the_output(tmp_path):
    (tmp_path / "in").mkdir()
    write_source(tmp_path / "in" / "a.jsonl", DOCUMENTS * 5)
    (tmp_path / "in" / "b.txt").write_text("".join(f"{i} words and a line\n" for i in range(250_000)))
    for workers in (1, 2):
        out = tmp_path / str(workers)
        subprocess.run(command(tmp_path / "in", out, workers=workers, shard_size=1_000_000), check=True)
    assert content(tmp_path / "1") == content(tmp_path / "2") and len(content(tmp_path / "1")) == 8


@pytest.mark.parametrize("kills", [2, *slow(10)])
def test_kills_leave_the_same_bytes(tmp_path, kills):
    """SIGKILL at random moments of the time that shards are written, starting again each time."""
    rng = random.Random(1)
    write_source(tmp_path / "a.jsonl", [" ".join(rng.choices(DOCUMENTS, k=5)) for _ in range(250)])
    make = [command(tmp_path / "a.jsonl", tmp_path / name, shard_size=500) for name in ("whole", "killed")]
    subprocess.run(make[0], stdout=subprocess.DEVNULL, check=True)
    expected, out, shards, done = content(tmp_path / "whole"), tmp_path / "killed", 0, 0
    assert len(expected) > 100
    while done < kills:
        process = subprocess.Popen(make[1], stdout=subprocess.DEVNULL)
        wait_for_shards(out, process, more_than=shards)
        time.sleep(rng.random() * 0.02)
        process.kill()
        if process.wait() == 0:  # it was faster: once more from the beginning
            assert content(out) == expected
            shutil.rmtree(out)
            shards = 0
            continue
        before, shards, done = shards, len(list(out.glob("*.bin"))), done + 1
        assert shards > before  # complete shards are never lost
    subprocess.run(make[1], stdout=subprocess.DEVNULL, check=True)
    assert content(out) == expected


def endless(folder: Path) -> Path:
    """A source of a gigabyte that takes no room: whoever is to be killed later is still at it."""
    (folder / "text").write_text("many words and a line\n" * 500_000)
    (folder / "in").mkdir()
    for i in range(100):
        (folder / "in" / f"{i:02d}.txt").symlink_to(folder / "text")
    return folder / "in"


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@linux
@pytest.mark.parametrize("victim", ["script", "worker"])
def test_no_process_outlives_another_that_is_killed(tmp_path, victim, request):
    make = command(endless(tmp_path), tmp_path / "out", shard_size=200_000, workers=2)
    process = subprocess.Popen(make, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    request.addfinalizer(process.kill)
    wait_for_shards(tmp_path / "out", process)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(process.pid if victim == "script" else workers[0], signal.SIGKILL)
    errors = process.communicate(timeout=600)[1]
    assert "Traceback" not in errors, errors
    if victim == "worker":
        assert process.returncode == 1 and "a tokenising process died" in errors
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline, "orphans live on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "name, code, workers", [("SIGTERM", 143, 1), ("SIGTERM", 143, 2), ("SIGINT", 130, 2)]
)
def test_signals_stop_with_their_codes(tmp_path, name, code, workers, request):
    """Sent to the whole group of processes, as a terminal and most schedulers do."""
    make = command(endless(tmp_path), tmp_path / "out", shard_size=2000, workers=workers)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(make, **pipes, start_new_session=True)
    request.addfinalizer(process.kill)
    wait_for_shards(tmp_path / "out", process)
    os.killpg(process.pid, getattr(signal, name))
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == code and "Traceback" not in errors, errors
    assert not list((tmp_path / "out").glob(".*.tmp"))


ENDS = [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (OSError(), None)]


@pytest.mark.parametrize(("interrupt", "code"), ENDS)
def test_signals_that_come_while_tqdm_takes_its_lock(tmp_path, monkeypatch, interrupt, code):
    def build(job):
        try:
            raise interrupt
        finally:
            raise RuntimeError("cannot release un-acquired lock")

    monkeypatch.setattr(fineweb, "build", build)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if code is None:
        with pytest.raises(RuntimeError):
            fineweb.main(["--source", str(tmp_path)])
    else:
        assert fineweb.main(["--source", str(tmp_path)]) == code


def test_full_disk_is_reported_and_gone_on_from(tmp_path):
    """A limit on the size of files stands for the disk."""
    resource = pytest.importorskip("resource")
    write_source(tmp_path / "a.jsonl", DOCUMENTS * 40)
    make = command(tmp_path / "a.jsonl", tmp_path / "out", shard_size=3000)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4000, 4000))
    done = subprocess.run(make, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(content(tmp_path / "out")) == ["meta.json", "val_000000.bin"]
    subprocess.run(make, stdout=subprocess.DEVNULL, check=True)
    assert stream_of(tmp_path / "out") == EXPECTED * 40


def test_command_line(tmp_path, capsys):
    def main(*flags):
        handler = signal.getsignal(signal.SIGTERM)
        try:
            return fineweb.main([*map(str, flags)]), capsys.readouterr()
        finally:
            signal.signal(signal.SIGTERM, handler)

    code, printed = main("--source", "nothing.txt", "--out", tmp_path)
    assert code == 2 and printed.err.startswith("error: source='nothing.txt'")
    wrong = (("--shard_sise", 5), "--shard_sise"), (("--workers", "two"), "--workers: invalid int")
    for flags, message in wrong:
        with pytest.raises(SystemExit, match="2"):
            main(*flags)
        assert message in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("hello")
    code, printed = main("--source", tmp_path / "a.txt", "--out", tmp_path / "a.txt", "--encoding", "bytes")
    assert code == 2 and str(tmp_path / "a.txt") in printed.err
    flags = ["--source", tmp_path / "a.txt", "--out", tmp_path / "out", "--encoding", "bytes", "--workers", 1]
    assert main(*flags, "--val_tokens", 2)[0] == 0 and stream_of(tmp_path / "out") == [256, *b"hello"]


def test_import_does_nothing_and_leaves_torch_out(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("False\n", "") and not list(tmp_path.iterdir())
