"""Rows that begin at a document: packing, epochs, what is refused; all loaders: resuming, later epochs."""

import hashlib
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from conftest import refuses
from corpus import make_shards
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_shards import next_tokens

from tokens import packing
from tokens.mixtures import MixtureLoader
from tokens.packing import DocumentLoader, pack
from tokens.shards import DistributedDataLoader, read_shard, write_shard

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
