"""Mixtures: shares at every sample, order, other weights. Rows that begin at a document: packing, epochs. All
loaders: resuming, later epochs, refusals."""

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuses
from corpus import make_shards
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_shards import META, next_tokens

from tokens import mixtures, packing
from tokens.mixtures import MixtureLoader, Schedule, parse_mixture, parse_named, read_metas, shares_of
from tokens.packing import DocumentLoader, pack
from tokens.shards import DistributedDataLoader, read_shard, write_shard

T, WEIGHTS = 8, {"a": 6, "b": 3, "c": 1}


@pytest.fixture
def folders(tmp_path, monkeypatch) -> None:
    """The working folder has folders a, b and c with shards of random tokens."""
    monkeypatch.chdir(tmp_path)
    for name, lengths in {"a": [301, 99], "b": [120], "c": [57, 30]}.items():
        make_shards(Path(name), lengths)


def ranks_of(size: int, B=2, weights: dict = WEIGHTS, state: dict | None = None) -> list[MixtureLoader]:
    """A mixture's loaders on all ranks, which continue `state`."""
    ranks = [MixtureLoader(weights, B, T, rank, size, prefetch=3) for rank in range(size)]
    for rank in ranks:
        if state:
            rank.load_state_dict(json.loads(json.dumps(state)))
    return ranks


def rows_alone(order: np.ndarray, before=(0, 0, 0), **more) -> torch.Tensor:
    """The rows that plain loaders of a, b and c give in this order of sources, each from its sample on."""
    alone = [DistributedDataLoader(name, B=1, T=T, **more) for name in WEIGHTS]
    for loader, position in zip(alone, before, strict=True):
        loader.reset(position)
    return torch.cat([next_tokens(alone[source], n=1) for source in order])


WHOLE = st.lists(st.integers(1, 40), min_size=1, max_size=9)
REAL = st.lists(st.floats(0.1, 100), min_size=2, max_size=4)


@settings(max_examples=25)
@given(weights=WHOLE | REAL, seed=st.integers(0, 2**63 - 1))
def test_every_source_is_within_one_sample_of_its_share_at_every_sample(weights, seed):
    """In whole numbers, for some periods from the first sample on, or from one that is far behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "FINEST", 20_000)
        shares = shares_of(dict(zip("abcdefghi", weights, strict=False)))
    schedule, size = Schedule(shares, seed), sum(shares)
    assert np.abs(np.array(shares) / size - np.array(weights) / sum(weights)).max() <= 1 / 20_000
    periods = 10**12 // len(schedule.source) * (seed % 2)
    n = np.arange(min(3 * len(schedule.source), 30_000))
    source, number = schedule.locate(periods * len(schedule.source) + n)
    for i, share in enumerate(shares):
        drawn = np.cumsum(source == i)
        assert (np.abs(drawn * size - (n + 1) * share) < size).all()
        assert np.array_equal(number[source == i], periods * schedule.per_period[i] + np.arange(drawn[-1]))
        assert schedule.counts(len(n))[i] == drawn[-1]


def test_the_seed_decides_between_equal_shares():
    orders = [Schedule([1, 1, 1], seed).source for seed in (0, 0, 1)]
    assert np.array_equal(*orders[:2]) and not np.array_equal(*orders[1:])
    assert len({tuple(orders[0][i : i + 3]) for i in range(0, 300, 3)}) == 6


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_source_is_read_as_if_it_were_alone(folders, shuffle):
    """For several epochs. test_shards.py shows that a plain loader has every window once in each."""
    loader = MixtureLoader(WEIGHTS, B=5, T=T, shuffle=shuffle)
    order = loader._schedule.source[:400]
    assert torch.equal(next_tokens(loader, n=80), rows_alone(order, shuffle=shuffle))
    for sample in (0, 7, 39):
        file, offset = loader.locate(sample)
        assert Path(file).parent.name == "abc"[order[sample]] and offset % T == 0
    assert loader.progress() == {"a": (240, 240 / 49), "b": (120, 120 / 14), "c": (40, 4.0)}


def test_a_mixture_resumes_with_other_weights(folders):
    """Every source goes on where it stopped. Then follows a resume without a change."""
    (loader,) = ranks_of(1, B=5)
    next_tokens(loader, n=31)
    before, weights = [n for n, _ in loader.progress().values()], dict(c=0.5, a=0.25, b=0.25)
    (other,) = ranks_of(1, 4, weights, loader.state_dict())
    expected = rows_alone(other._schedule.source[:100], before)
    assert torch.equal(next_tokens(other, n=10), expected[:40])
    assert [n for n, _ in other.progress().values()] == [before[0] + 10, before[1] + 10, before[2] + 20]
    ranks = ranks_of(3, 2, weights, other.state_dict())
    assert ranks[2].progress() == other.progress()
    assert torch.equal(next_tokens(*ranks, n=10), expected[40:])
    other.reset()  # as overfit_single_batch does: the weights then hold from the first sample on
    assert torch.equal(next_tokens(other, n=10), next_tokens(*ranks_of(1, 4, weights), n=10))


def test_what_is_refused_names_the_cause(folders):
    for name in ("x:1", "p,q"):
        Path(name).mkdir()
    assert parse_mixture("x:1") == {"x:1": 1} and parse_mixture("C:\\data") == {"C:\\data": 1}
    assert parse_mixture("x:1:25e-2,p,q:3") == {"x:1": 0.25, "p,q": 3}
    assert parse_named("v=x,y=1,w-2=/a:b") == {"v": "x", "y": "1", "w-2": "/a:b"}
    assert mixtures.source_names(["p/a", "b/"]) == ["a", "b"]
    assert mixtures.source_names(["p/a", "q/a"]) == ["p/a", "q/a"]
    for name, encoding in (("a", "gpt2"), ("b", "bytes")):
        Path(name, "meta.json").write_text(json.dumps(META | dict(encoding=encoding, tokens={})))
    (mixed,), (two,) = ranks_of(1), ranks_of(1, weights=dict(a=1, b=1))
    mixed, plain = mixed.state_dict(), DistributedDataLoader("a", B=1, T=T).state_dict()
    bad = ("", ":0", ":-1", ":1e999999999", ":--", ":0.1.2", ":1,a/:2", ":1,", ":nan")
    for refuse, text, words in (
        *((parse_mixture, f"a:1,b{end}", f"data_dir='a:1,b{end}': write FOLDER:WEIGHT") for end in bad),
        (shares_of, {"a": 1, "b": 1e-6}, "data_dir: 'b' .*100,000"),
        *((parse_named, text, f"val='{text}': write") for text in ("a", "a=", "a b=c", "a=b,a=c", "é=a")),
        (read_metas, ["a", "b"], "b: encoding is 'bytes', but 'gpt2' in a; .*=TEXT --encoding=gpt2 --out"),
        (two.load_state_dict, mixed, "sources='a, b, c', but here sources='a, b'"),
        (two.load_state_dict, plain, "sources=None, but here sources='a, b'"),
        (ranks_of(1)[0].load_state_dict, mixed | {"read": "1 2"}, "samples of each source"),
    ):  # fmt: skip
        refuses(words, refuse, text)


# ---------------------------------------------------------------------------- rows of documents
EOT = 256
LENGTHS = st.lists(st.integers(1, 40) | st.integers(1, 4), min_size=1, max_size=40)


def write_documents(folder, shards: list[list[int]], before: int = 0) -> None:
    """Shards of documents of so many tokens each, after `before` tokens that belong to none."""
    folder.mkdir(exist_ok=True)
    for i in range(3):
        tokens = np.arange(before + sum(lengths := shards[i % len(shards)])).astype(np.uint16) % EOT
        tokens[before + np.cumsum([0, *lengths[:-1]])] = EOT
        write_shard(folder / f"train_{i:06d}.bin", tokens)


def test_best_fit_of_a_few_documents():
    assert [*pack([0, 0, 3, 1, 0, 2, 1, 0, 9], 8)] == [(9, [8]), (1, [6, 2]), (1, [5, 3]), (1, [5, 2, 2])]
    assert [*pack([0, 0, 0, 3, 0, 2], 7)] == [(2, [5, 3])]  # 3 is cut to 2, and the last 3 fills no row


@given(shards=st.lists(LENGTHS, min_size=1, max_size=3), before=st.integers(0, 3), T=st.integers(1, 30))
@settings(max_examples=25)
def test_every_token_is_in_one_row_of_an_epoch_or_counted_as_dropped(tmp_path, shards, before, T):
    assume(any(sum(lengths) > T for lengths in shards))
    write_documents(tmp_path / "data", shards, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SCANNED", 16)
        loader = DocumentLoader(tmp_path / "data", B=1, T=T, eot_token=EOT)
    shards = [read_shard(path) for path in loader.files]
    ends = [[*np.flatnonzero(tokens == EOT), len(tokens)] for tokens in shards]
    for epoch in range(2):
        used, sizes = set(), Counter()
        for sample in range(loader.samples_per_epoch):
            x, y = loader.next_batch()
            (file,), (place,) = loader._locate(np.array([epoch * loader.samples_per_epoch + sample]))
            pieces, row = loader._pieces(file, place), [*x[0].tolist(), y[0, -1].item()]
            assert row == [token for start, size in pieces for token in shards[file][start : start + size]]
            for start, size in pieces:  # all begin at a document, and only the last one may be cut
                rest = ends[file][ends[file].index(start) + 1] - start - size
                assert rest == 0 or (rest > 0 and (start, size) == pieces[-1])
                assert (file, start) not in used
                used.add((file, start))
                sizes["in cut ones" if rest else "in whole documents"] += size
        sizes["dropped"] = loader.num_tokens - sizes.total()
        assert loader.kept == {name: sizes[name] for name in loader.kept}


def test_any_ranks_read_the_same_stream_and_resume_exactly(tmp_path):
    """Plain rows and rows of documents, alone and in a mixture. The rows differ from epoch to epoch."""
    lengths = np.random.default_rng(0).integers(1, 30, (2, 60)).tolist()
    for name, chosen in dict(a=lengths, b=lengths[1:], c=[[5]]).items():
        write_documents(tmp_path / name, chosen)
    weights, make = {tmp_path / "a": 2, tmp_path / "b": 1}, partial(DocumentLoader, eot_token=EOT)
    plain = partial(DistributedDataLoader, tmp_path / "a"), partial(MixtureLoader, weights)
    packed = partial(make, tmp_path / "a"), partial(MixtureLoader, weights, make=make)
    for build in (*plain, *packed):
        loader = build(B=1, T=40)
        stream, size = next_tokens(loader, n=300), loader.samples_per_epoch
        rows = [{tuple(row) for row in stream[i : i + size].tolist()} for i in (0, size)]
        assert size < 150 and len(rows[0] & rows[1]) < len(rows[0]) / 2
        one, ranks = build(B=5, T=40), [build(B=2, T=40, rank=rank, world_size=3) for rank in range(3)]
        assert next_tokens(one, n=33).equal(stream[:165]) and next_tokens(*ranks, n=2).equal(stream[:12])
        for rank in ranks:  # which have prefetched other batches, as `one` has
            rank.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert next_tokens(*ranks, n=20).equal(stream[165:285])
    for loaders in zip(plain, packed, strict=True):
        unpacked, one = (build(B=1, T=40) for build in loaders)
        assert one.kept["dropped"]
        for saved, now, words in ((one, unpacked, "'documents'.*''"), (unpacked, one, "''.*'documents'")):
            refuses(f"align={words}", now.load_state_dict, saved.state_dict())
    refuses("no token 7.*omit --align", make, tmp_path / "c", B=1, T=8, eot_token=7)
    refuses("^shuffle=False", make, tmp_path / "c", B=1, T=8, shuffle=False)


@pytest.mark.parametrize("older", [False, True])
def test_the_first_epoch_and_older_checkpoints_keep_their_order(tmp_path, older):
    """The digests are those of the version before later epochs were shifted."""
    make_shards(tmp_path / "a", [301, 99, 250])
    for loader in DistributedDataLoader(tmp_path / "a", 1, 7), MixtureLoader({tmp_path / "a": 1}, 1, 7):
        for _ in range(2 * older):  # from an older checkpoint, and from one that was saved after that
            state = {k: v for k, v in loader.state_dict().items() if k not in ("shift", "align")}
            loader.load_state_dict(state)
        rows = [next_tokens(loader, n=loader.samples_per_epoch).numpy().tobytes() for _ in "01"]
        digests = [hashlib.sha256(epoch).hexdigest()[:16] for epoch in rows]
        assert digests[0] == "aaa14c4990a26809" and (digests[1] == "fdfe4bd45df81048") == older
