"""Rows that begin at a document: train_gpt_moe.py --align documents.

A row of T + 1 tokens takes the longest document that fits, again and again. If none fits, the shortest one is
cut: its start fills the row, and its rest is dropped. So are the tokens after the first T + 1 of a longer
document, a shard's tokens before its first document, and the last documents, if too short for a row. No token
comes twice in an epoch, and no row is padded. This is the best fit of nanochat's dataloader.py, which chooses
among 1,000 documents; here it is all those of a shard, so that fewer are cut."""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator

import numpy as np

from tokens.shards import DistributedDataLoader, Shard, permute

SCANNED = 1 << 22  # tokens that are searched at a time


def pack(counts: list[int], room: int) -> Iterator[tuple[int, list[int]]]:
    """(number of equal rows, lengths of the documents in each), of full rows of `room` tokens, by best fit.
    counts[n]: documents of n tokens, n <= room; it is used up. Only the last document of a row may be cut. As
    equal rows are made at once, the work does not grow with the number of documents."""
    lengths = [n for n, count in enumerate(counts) if count]  # of the documents that are left

    def take(length: int, number: int) -> None:
        counts[length] -= number
        if not counts[length]:
            lengths.remove(length)

    while lengths:
        space, row = room, []
        while space > 0 and lengths:
            row.append(lengths[max(0, bisect(lengths, space) - 1)])
            space -= row[-1]
            take(row[-1], 1)
        if space > 0:
            return
        uses = Counter(row)
        if again := min(counts[length] // number for length, number in uses.items()):
            for length, number in uses.items():
                take(length, again * number)
        yield 1 + again, row


class PackedShard:
    """The rows of a shard. They follow from the lengths of its documents; those of equal length take each
    other's places from epoch to epoch. It keeps where documents begin and their order in one epoch, 8 bytes
    for each. Raises what Shard raises."""

    def __init__(self, path: str, eot_token: int, room: int):
        self.room, self.epoch, shard, found = room, (None, None), Shard(path), []
        for first in range(0, len(shard), SCANNED):
            tokens = shard.read(first, np.empty(min(SCANNED, len(shard) - first), shard.dtype))
            found.append((np.flatnonzero(tokens == eot_token) + first).astype(np.uint32))
        self.begins = np.append(np.concatenate(found), np.uint32(len(shard)))  # and the end of the last one
        lengths = np.diff(self.begins)
        counts = np.bincount(np.minimum(lengths, room), minlength=room + 1)
        free = np.cumsum(counts) - counts  # the next document of each length, in the order by length
        self.cut = int((lengths > room).sum()) * room  # tokens of cut documents in the rows
        self.patterns, numbers = [], []  # of equal rows: the first one's documents, their tokens, whole ones
        for number, row in pack(counts.tolist(), room):
            firsts, sizes = [], [*row[:-1], room - sum(row[:-1])]
            for length in row:  # the next `number` documents of this length
                firsts.append(free[length])
                free[length] += number
            is_cut = sizes[-1] < row[-1]
            self.cut += number * sizes[-1] * is_cut
            self.patterns.append((np.array(firsts), sizes, len(row) - is_cut))
            numbers.append(number)
        self.ends = np.cumsum([0, *numbers])  # of the patterns, in rows

    def pieces(self, row: int, turn: int, seed: list[int]) -> list[tuple[int, int]]:
        """(offset, number of tokens) of each document of a row. turn: which of them comes first; a cut one
        stays the last. seed: decides between documents of equal length."""
        made_for, order = self.epoch  # one attribute: locate() and the prefetching thread both come here
        if made_for != seed:
            lengths = np.minimum(np.diff(self.begins), self.room)
            ties = permute(np.arange(len(lengths)), len(lengths), seed)
            order = self.begins[np.lexsort((ties, lengths))]
            self.epoch = seed, order
        pattern = np.searchsorted(self.ends, row, side="right") - 1
        firsts, sizes, whole = self.patterns[pattern]
        begins = order[firsts + (row - self.ends[pattern])]
        found, turn = [*zip(begins.tolist(), sizes, strict=True)], turn % max(1, whole)
        return found[turn:whole] + found[:turn] + found[whole:]


class DocumentLoader(DistributedDataLoader):
    """A DistributedDataLoader whose rows begin at documents; eot_token begins each document.

    Every epoch has as many rows. In each, documents of equal length have other places, and the whole ones of
    a row another order; a row that one document fills comes again. ValueError: there are no documents."""

    def __init__(self, pattern, B: int, T: int, *, eot_token: int, shuffle: bool = True, **more):
        if not shuffle:
            raise ValueError("shuffle=False: rows of align='documents' are in random order; omit --shuffle")
        self._eot_token = eot_token
        super().__init__(pattern, B, T, **more, shift=False)
        self._stream["align"] = "documents"
        rows, cut = self.samples_per_epoch * (T + 1), sum(shard.cut for shard in self._packed)
        self.kept = {"in whole documents": rows - cut, "in cut ones": cut, "dropped": self.num_tokens - rows}

    def _count_samples(self, lengths: np.ndarray) -> np.ndarray:
        self._packed = [PackedShard(path, self._eot_token, self.T + 1) for path in self.files]
        if not any(len(shard.begins) > 1 for shard in self._packed):
            what = f"no token {self._eot_token}, <|endoftext|>, begins a document in {self.files[0]}, ..."
            raise ValueError(f"align='documents': {what}; omit --align")
        return np.array([shard.ends[-1] for shard in self._packed])

    def _locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the file, row in it) of each of the samples `index`; later epochs have later rows."""
        file, start = super()._locate(index)
        rows = np.diff(self._ends, prepend=0)[file]
        return file, start // self.T + index // self.samples_per_epoch * rows

    def _pieces(self, file: int, place: int) -> list[tuple[int, int]]:
        epoch, row = divmod(int(place), int(self._packed[file].ends[-1]))
        return self._packed[file].pieces(row, row + epoch, [self.seed, epoch, int(file)])
