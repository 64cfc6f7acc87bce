"""Rows that begin at a document: packing, epochs, resuming, what is refused; later epochs of plain loaders.

Run: python -m pytest tests/tokens/test_packing.py"""

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_shards import next_tokens

from tokens import packing
from tokens.mixtures import MixtureLoader
from tokens.packing import DocumentLoader, pack
from tokens.shards import DistributedDataLoader, read_shard, write_shard

EOT = 256


def write_documents(folder: Path, shards: list[list[int]], before: int = 0) -> None:
    """Shards of documents of so many tokens each, after `before` tokens that belong to none."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for i, lengths in enumerate(shards):
        tokens = np.arange(before + sum(lengths)).astype(np.uint16) % EOT
        tokens[before + np.cumsum([0, *lengths[:-1]], dtype=int)[: len(lengths)]] = EOT
        write_shard(folder / f"train_{i:06d}.bin", tokens)


LENGTHS = st.lists(st.integers(1, 40) | st.integers(1, 4), min_size=1, max_size=40)


def test_best_fit_of_a_few_documents():
    """Of 9 of 8 tokens and more, and of 1, 2, 1, 3 documents of 6, 5, 3, 2 tokens."""
    assert [*pack([0, 0, 3, 1, 0, 2, 1, 0, 9], 8)] == [(9, [8]), (1, [6, 2]), (1, [5, 3]), (1, [5, 2, 2])]
    assert [*pack([0, 0, 0, 3, 0, 2], 7)] == [(2, [5, 3])]  # 3 is cut to 2, and the last 3 fills no row


@given(shards=st.lists(LENGTHS, min_size=1, max_size=3), before=st.integers(0, 3), T=st.integers(1, 30))
def test_every_token_is_in_one_row_of_an_epoch_or_counted_as_dropped(tmp_path, shards, before, T):
    assume(any(sum(lengths) > T for lengths in shards) and max(map(max, shards)) > T)
    write_documents(tmp_path / "data", shards, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SCANNED", 16)
        loader = DocumentLoader(tmp_path / "data", B=1, T=T, eot_token=EOT)
    files = {path: read_shard(path) for path in loader.files}
    ends = {path: [*np.flatnonzero(tokens == EOT), len(tokens)] for path, tokens in files.items()}
    for epoch in range(2):
        used, sizes = set(), Counter()
        for sample in range(loader.samples_per_epoch):
            x, y = loader.next_batch()
            (file,), (place,) = loader._locate(np.array([epoch * loader.samples_per_epoch + sample]))
            path, pieces = loader.files[file], loader._pieces(file, place)
            row = [files[path][start : start + size] for start, size in pieces]
            assert [*x[0].tolist(), y[0, -1].item()] == np.concatenate(row).tolist() and x[0, 0] == EOT
            for i, (start, size) in enumerate(pieces):
                rest = ends[path][ends[path].index(start) + 1] - start - size  # only at a document's start
                assert rest >= 0 and (rest == 0 or i == len(pieces) - 1) and (path, start) not in used
                used.add((path, start))
                sizes["in cut ones" if rest else "in whole documents"] += size
        sizes["dropped"] = loader.num_tokens - sizes.total()
        assert loader.kept == {name: sizes[name] for name in loader.kept}


def test_epochs_differ_and_a_run_resumes_on_other_ranks_alone_and_in_a_mixture(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 30, (2, 60)).tolist()
    for name, chosen in dict(a=lengths, b=lengths[1:], c=[[5]]).items():
        write_documents(tmp_path / name, chosen)
    weights, make = {tmp_path / "a": 2, tmp_path / "b": 1}, partial(DocumentLoader, eot_token=EOT)
    loader = make(tmp_path / "a", B=1, T=40)
    rows = [{tuple(row) for row in next_tokens(loader, n=loader.samples_per_epoch).tolist()} for _ in "01"]
    assert len(rows[0] & rows[1]) < len(rows[0]) / 4
    for build in (partial(make, tmp_path / "a"), partial(MixtureLoader, weights, make=make)):
        stream = next_tokens(build(B=1, T=40), n=150)  # over several epochs
        one = build(B=5, T=40)
        assert one.samples_per_epoch < 75 and next_tokens(one, n=15).equal(stream[:75])
        ranks = [build(B=2, T=40, rank=rank, world_size=3) for rank in range(3)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert next_tokens(*ranks, n=12).equal(stream[75:147])
        assert not next_tokens(build(B=1, T=40, seed=7), n=150).equal(stream)
    mixed, alone = build(B=1, T=40), [make(folder, B=1, T=40) for folder in weights]
    assert mixed.kept == dict(sum((Counter(source.kept) for source in alone), Counter()))
    assert mixed.kept["dropped"] and Path(mixed.locate(0)[0]).parent.name in "ab"
    plain = [DistributedDataLoader(tmp_path / "a", B=1, T=40), MixtureLoader(weights, B=1, T=40)]
    for packed, other in zip((loader, mixed), plain, strict=True):
        for saved, now, words in ((packed, other, "'documents'.*''"), (other, packed, "''.*'documents'")):
            with pytest.raises(ValueError, match=f"align={words}"):
                now.load_state_dict(saved.state_dict())
    older = other.state_dict()
    del older["shift"]
    other.load_state_dict(older)
    assert not any(source.shift for source in other.sources.values())
    for more, words in (
        (dict(eot_token=7), "no token 7.*omit --align"),
        (dict(shuffle=False), "^shuffle=False"),
    ):
        with pytest.raises(ValueError, match=words):
            DocumentLoader(tmp_path / "c", B=1, T=8, **dict(eot_token=EOT) | more)


# ---------------------------------------------------------------------------- later epochs without --align
OLD = (
    "70a705d6cd592fcd",
    "6b3e5fee9e3b137a",
)  # SHA-256 of the first two epochs' rows before later epochs were shifted


@pytest.mark.parametrize("older", [False, True])
def test_the_first_epoch_and_older_checkpoints_keep_their_order(tmp_path, older):
    for i, n in enumerate([301, 99, 250]):
        tokens = (np.arange(n) * 7919 + i * 1009).astype(np.uint16) % 50257
        write_shard(tmp_path / f"train_{i:06d}.bin", tokens)
    loader = DistributedDataLoader(tmp_path, B=1, T=7)
    state = loader.state_dict()
    assert state.pop("shift") and state.pop("align") == ""
    for _ in range(2 * older):  # an older checkpoint, and one that was saved after that
        loader.load_state_dict(state)
        state = loader.state_dict()
    rows = [next_tokens(loader, n=loader.samples_per_epoch) for _ in "01"]
    digests = tuple(hashlib.sha256(epoch.numpy().tobytes()).hexdigest()[:16] for epoch in rows)
    assert digests[0] == OLD[0] and (digests[1] == OLD[1]) == older
    repeated = {tuple(row) for row in rows[0].tolist()} & {tuple(row) for row in rows[1].tolist()}
    assert len(repeated) == (len(rows[0]) if older else 1)  # the last window of a shard of 14 T + 1 tokens
