"""Shards: their format, finding them, meta.json; the loader's batches, order and errors."""

import gzip
import io
import itertools
import json
import os
import re
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import refuses
from corpus import content, make_shards, make_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from tokens import shards
from tokens.shards import DistributedDataLoader, find_shards, read_meta, read_shard, write_shard


def test_header_is_llmcs_and_three_formats_are_read(tmp_path):
    tokens = np.array([7, 8, 65535], dtype=np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    np.save(tmp_path / "b.npy", tokens)
    tokens.tofile(tmp_path / "c.bin")
    raw = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert raw[1024:] == b"\x07\x00\x08\x00\xff\xff"
    assert [read_shard(path).tolist() for path in tmp_path.iterdir()] == [[7, 8, 65535]] * 3


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shard_bytes(magic=20240520, version=1, count=100, tokens=100) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + make_tokens(tokens).tobytes()


BAD_SHARDS = {
    "truncated": (shard_bytes(tokens=99), "truncated.* 1224 bytes.* 1222"),
    "truncated in header": (shard_bytes()[:500], "truncated within its header"),
    "padded": (shard_bytes(tokens=101), "is padded"),
    "wrong magic": (shard_bytes(magic=20240802), "20240802 instead of 20240520"),
    "wrong version": (shard_bytes(version=2), "version 2, not 1"),
    "negative count": (shard_bytes(count=-5), "holds -5 tokens"), "empty": (b"", "holds 0 tokens"),
    "odd size": (make_tokens(50).tobytes() + b"\x00", "is padded"),
    "text": (b"It was the best of times, it was the worst of times.", "text .* --source"),
    "cut text": (("naïve café " * 200).encode()[:1025], "is text"),
    "latin-1 text": (("naïve café " * 200).encode("latin-1"), "is text"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip or a checkpoint"), "gzip": (gzip.compress(b"abc" * 100), "gzip"),
    "npy int64": (npy(np.arange(9)), "holds int64"),
    "npy 2-D": (npy(make_tokens(8).reshape(2, 4)), r"shape \(2, 4\)"),
    "npy big-endian": (npy(make_tokens(8).astype(">u2")), "holds >u2"),
    "npy damaged header": (npy(make_tokens(8)).replace(b"descr", b"de\x00cr"), r"damaged \.npy header"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_bad_shard_is_refused_by_name_cause_and_cure(tmp_path, kind):
    raw, words = BAD_SHARDS[kind]
    path = tmp_path / "train_000000.bin"
    path.write_bytes(raw)
    refuses(f"{re.escape(str(path))}.*{words}.*python fineweb.py", DistributedDataLoader, tmp_path, B=1, T=4)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.bin", make_tokens(10))
    before, full = content(tmp_path), mock.Mock(side_effect=OSError(28, "No space left on device"))
    for tokens in (np.arange(5), make_tokens(4).reshape(2, 2), make_tokens(0)):
        refuses(r"a\.bin", write_shard, tmp_path / "a.bin", tokens)
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, step, full)
            write_shard(tmp_path / "a.bin", make_tokens(20))
    assert content(tmp_path) == before


def test_find_shards_knows_the_names_of_other_projects(tmp_path):
    train = ["edufineweb_train_000001.npy", *(f"fineweb_train_00000{i}.bin" for i in (1, 2)), "train.bin"]
    for name in [*train, "fineweb_val_000000.bin", "val.bin", "train_000000.bin.12.tmp", "meta.json"]:
        (tmp_path / name).touch()
    assert [Path(path).name for path in find_shards(tmp_path, "train")] == train
    assert len(find_shards(tmp_path, "val")) == 2
    assert len(find_shards(tmp_path / "fineweb_train_*.bin")) == 2


def test_missing_data_says_how_to_make_it(tmp_path):
    full = tmp_path / "full"
    make_shards(full, [9])
    for look, words in (
        (lambda: read_shard(full), str(full)), (lambda: read_shard(tmp_path / "none.bin"), r"none\.bin"),
        (lambda: find_shards(tmp_path / "nowhere"), r"no data: .*nowhere.*--demo"),
        (lambda: find_shards(tmp_path), rf"no train shard .* 0 .*fineweb\.py --source=TEXT --out {tmp_path}"),
        (lambda: find_shards(full, "val"), "no val shard .* 1 .*--val_tokens"),
        (lambda: DistributedDataLoader(tmp_path / "*.none", B=1, T=4), r"no data: .*\.none"),
        (lambda: DistributedDataLoader([], B=1, T=4), "no data"),
        (lambda: read_meta(tmp_path / "none"), "no data folder .*none.*fineweb.py.*--data_dir"),
        (lambda: read_meta(__file__), "no data folder .*it is a file: --text"),
        (lambda: read_meta("x", str(tmp_path / "no_*.bin")), r"no data: .*no_\*\.bin is neither"),
    ):  # fmt: skip
        refuses(words, look, error=FileNotFoundError)


META = {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256, "shards": {}, "complete": True}


def test_meta_of_one_machine_and_of_several(tmp_path):
    with pytest.warns(UserWarning, match=r"no meta\.json .* GPT-2"):
        assert read_meta(tmp_path)["vocab_size"] == 50257
    first, second = tmp_path / "meta_p0000.json", tmp_path / "meta_p0001.json"
    first.write_text(json.dumps(META | {"tokens": {"train": 10, "val": 5}}))
    second.write_text(json.dumps(META | {"tokens": {"train": 11, "val": 0}}))
    assert read_meta(tmp_path)["tokens"] == {"train": 21, "val": 5}
    second.write_text(json.dumps(META | {"tokens": {}, "complete": False}))
    with pytest.warns(UserWarning, match="unfinished"):
        read_meta(tmp_path)
    second.write_text(json.dumps(META | {"tokens": {}, "encoding": "bytes"}))
    refuses(r"encoding is 'gpt2' in .*p0000.* 'bytes' in .*p0001", read_meta, tmp_path)
    bad = "{", "[]", "{}", '{"encoding": 3}', json.dumps(META | {"tokens": 3}), "[" * 100_000, "\x00"
    for damaged in bad:
        second.write_text(damaged)
        refuses(r"meta_p0001\.json is damaged", read_meta, tmp_path)


def test_meta_of_the_shards_that_a_pattern_matches(tmp_path):
    make_shards(tmp_path / "a1", [9])
    (tmp_path / "a1" / "meta.json").write_text(json.dumps(META | {"encoding": "bytes", "tokens": {}}))
    for pattern in ("*/train_*.bin", "a[1]/*", "a1", "a1/train_000000.bin"):
        assert read_meta("nowhere", str(tmp_path / pattern))["encoding"] == "bytes"


def next_tokens(*loaders: DistributedDataLoader, n: int) -> torch.Tensor:
    """Inputs and targets of n batches of each rank in turn: (rows, 2 T)."""
    return torch.cat([torch.cat(loader.next_batch(), dim=1) for _ in range(n) for loader in loaders])


def test_every_epoch_has_every_window_once_in_its_own_order(tmp_path):
    shards = make_shards(tmp_path, [101, 57, 12, 200], below=65536)
    # The windows of later epochs begin elsewhere, but none goes beyond its shard.
    places = [[(t, min(i + shift, len(t) - 11)) for t in shards for i in range(0, len(t) - 10, 10)]
              for shift in (0, 6, 2)]  # fmt: skip
    windows = [sorted(t[i : i + 11].tolist() for t, i in each) for each in places]

    def epoch(loader):
        batches = [loader.next_batch() for _ in range(7)]
        for x, y in batches:
            assert x.shape == y.shape == (5, 10) and x.dtype == y.dtype == torch.int64
            assert x.is_contiguous() and y.is_contiguous() and torch.equal(x[:, 1:], y[:, :-1])
        return torch.cat([torch.cat((x, y[:, -1:]), 1) for x, y in batches]).tolist()

    loader = DistributedDataLoader(tmp_path, B=5, T=10)
    assert loader.samples_per_epoch == len(windows[0]) == 10 + 5 + 1 + 19 and loader.num_tokens == 370
    epochs = [epoch(loader) for _ in range(3)]
    assert [sorted(each) for each in epochs] == windows
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epoch(DistributedDataLoader(tmp_path, B=5, T=10, seed=7)) != epochs[0]
    for sample, row in enumerate(itertools.chain(*epochs)):
        file, offset = loader.locate(sample)
        assert read_shard(file)[offset : offset + 11].tolist() == row


def llmc_order(shards: list[np.ndarray], B: int, T: int):
    """llm.c's sequential batches for one process, written from the description of its train_gpt2.py."""
    for tokens in itertools.cycle(shards):
        for start in range(0, len(tokens) - B * T, B * T):
            chunk = torch.tensor(tokens[start : start + B * T + 1].astype(np.int64))
            yield torch.cat((chunk[:-1].view(B, T), chunk[1:].view(B, T)), dim=1)


@pytest.mark.parametrize("lengths", [[129], [128 + 64, 65, 400], [321, 320, 319]])
def test_sequential_order_is_llmcs(tmp_path, lengths):
    expected = torch.cat([*itertools.islice(llmc_order(make_shards(tmp_path, lengths), 4, 16), 40)])
    for size, B in ((1, 4), (2, 2)):
        ranks = [DistributedDataLoader(tmp_path, B, 16, rank, size, shuffle=False) for rank in range(size)]
        assert torch.equal(next_tokens(*ranks, n=40), expected)


@settings(max_examples=60)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, seed):
    assert sorted(shards.permute(np.arange(n), n, seed).tolist()) == list(range(n))


def test_permute_is_even():
    """Over many seeds each place is reached equally often, and neighbours do not stay neighbours."""
    for n in (7, 10**7):
        some = np.array([0, 1, n - 1])
        places = np.array([shards.permute(some, n, [1337, e]) for e in range(2000)])  # (2000, 3)
        counts = np.array([np.bincount(places[:, i] * 7 // n, minlength=7) for i in range(3)])
        chi2 = ((counts - 2000 / 7) ** 2 / (2000 / 7)).sum(axis=1)
        assert (chi2 < 27.9).all(), (n, chi2)  # 6 degrees of freedom: exceeded once in 10,000
        steps = (places[:, 1] - places[:, 0]) % n
        assert np.abs(np.bincount(steps * 7 // n, minlength=7)[1:] - 2000 / 7).max() < 2000 / 7 * 0.35, n


def test_resume_on_another_stream_is_refused_by_field_and_values(tmp_path):
    for name, lengths in dict(a=[300, 200], longer=[300, 201], one=[500]).items():
        make_shards(tmp_path / name, lengths)
    load = lambda name="a", B=2, T=8, **more: DistributedDataLoader(tmp_path / name, B=B, T=T, **more)  # noqa: E731
    for saved, now, words in (
        (load(), load(T=9), "T=8, .* T=9"), (load(), load(seed=2), "seed=1337, .* seed=2"),
        (load(), load(shuffle=False), "shuffle=True, .* shuffle=False"),
        (load(), load("longer"), "tokens=500, .* tokens=501"), (load(), load("one"), "files=2, .* files=1"),
        (load(shuffle=False), load(B=3, shuffle=False), r"B \* world_size=2, .* B \* world_size=3"),
    ):  # fmt: skip
        refuses(words, now.load_state_dict, saved.state_dict())


def test_wrong_arguments_and_too_little_data_are_named(tmp_path):
    make_shards(tmp_path, [60, 60])
    for wrong, words in (
        (dict(B=0), "^B=0"), (dict(T=0), "^T=0"), (dict(seed=-1), "^seed=-1"),
        (dict(prefetch=-1), "^prefetch=-1"), (dict(rank=1), "^rank=1.* 0$"),
        (dict(B=8, world_size=2), "B=8 .*world_size=2 .* 16 samples of T=8.* 129 tokens.* 120 tokens, 14 "),
        (dict(B=4, world_size=2, shuffle=False), "B=4 .* 8 samples .* 65 .*in one shard.* 120 tokens, 0 "),
    ):  # fmt: skip
        refuses(words, DistributedDataLoader, tmp_path, **dict(B=1, T=8) | wrong)
    write_shard(tmp_path / "val_000000.bin", make_tokens(60))
    meta = META | {"tokens": {}, "settings": {"source": "demo corpus of Python 3.12", "encoding": "gpt2"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))  # no command makes more text of it
    refuses("give more text to fineweb.py$", DistributedDataLoader, tmp_path / "val*", B=8, T=8)
    (tmp_path / "val_000000.bin").write_bytes(b"")
    refuses("fineweb.py --encoding=gpt2 --demo --out", read_shard, tmp_path / "val_000000.bin")


def test_an_error_names_the_file_and_keeps_the_position(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    tokens, *_ = make_shards(tmp_path, [201, 50, 50], below=257)
    tokens[77] = 257
    write_shard(tmp_path / "train_000000.bin", tokens)
    loader = DistributedDataLoader(tmp_path, B=2, T=10, vocab_size=257, shuffle=False)
    next_tokens(loader, n=3)
    for _ in range(2):  # and again, rather than going on behind it
        refuses(r"train_000000\.bin: token 257 .* 77 .*vocab_size=257", loader.next_batch)
        assert loader.state_dict()["position"] == 6
    loader = DistributedDataLoader(tmp_path, B=2, T=10, vocab_size=258, shuffle=False)
    next_tokens(loader, n=8)
    os.unlink(tmp_path / "train_000001.bin")
    refuses(r"train_000001\.bin", next_tokens, loader, n=9, error=FileNotFoundError)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_few_files_are_open_and_prefetching_ends_with_the_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 4)
    make_shards(tmp_path, [40] * 30)
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    loader = DistributedDataLoader(tmp_path, B=25, T=8)
    next_tokens(loader, n=5)
    assert len(os.listdir("/proc/self/fd")) < descriptors + 15  # and not 30: 4 maps, and what is being read
    (thread,) = set(threading.enumerate()) - threads
    del loader
    thread.join(60)
    assert not thread.is_alive()


def test_batches_for_a_gpu_are_uploaded_ahead_and_waited_for_there(tmp_path, monkeypatch):
    """The order of what is asked of CUDA, told by a stand-in; the batches are those for a CPU."""
    make_shards(tmp_path, [300])
    expected = next_tokens(DistributedDataLoader(tmp_path, B=2, T=8), n=2)
    cuda = mock.MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    for name in ("pin_memory", "record_stream", "to"):
        stand_in = lambda batch, *args, name=name, **_: (getattr(cuda, name)(*args), batch)[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, stand_in)
    loader = DistributedDataLoader(tmp_path, B=2, T=8, prefetch=0, device="cuda:0")
    assert torch.equal(next_tokens(loader, n=2), expected)
    each = """set_device stream stream().__enter__ pin_memory to Stream().record_event stream().__exit__
        current_stream current_stream().wait_event record_stream to""".split()
    assert [name for name, *_ in cuda.mock_calls] == ["Stream", *each, *each]
    uploaded = cuda.Stream.return_value.record_event.return_value
    cuda.current_stream.return_value.wait_event.assert_called_with(uploaded)
