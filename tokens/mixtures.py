"""Mixtures: a loader that draws samples from several data sets by their weights, exactly and repeatably.

    python train_gpt_moe.py --data_dir web:0.7,code:0.3      # 70% of the samples come from the folder web

Every source is read in the order of its own DistributedDataLoader, epoch after epoch. A schedule says which
source gives the next sample."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, chain, pairwise, product

import numpy as np

from tokens.identity import fineweb_command
from tokens.shards import DistributedDataLoader, read_meta

FINEST = 100_000  # shares have a common denominator of at most this
PERIOD = 10_000  # samples after which a schedule repeats, about
NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?"


def parse_mixture(text: str) -> dict[str, Fraction]:
    """{folder: weight} of data_dir: FOLDER:WEIGHT,FOLDER:WEIGHT, or a path, which gets the weight 1.
    ValueError: a weight that is no positive number, or a folder given twice."""
    pairs = re.findall(rf"(.+?):({NUMBER})(?:,|$)", text)
    if os.path.isdir(text) or not pairs:
        return {text: Fraction(1)}
    weights = {folder: Fraction(weight) for folder, weight in pairs}
    once = len(set(map(os.path.abspath, weights))) == len(pairs)
    if ",".join(map(":".join, pairs)) != text or not once or not all(weights.values()):
        how = "write FOLDER:WEIGHT,FOLDER:WEIGHT, with each folder once and weights above 0"
        raise ValueError(f"data_dir={text!r}: {how}")
    return weights


def parse_named(text: str) -> dict[str, str]:
    """{name: folder} of val: NAME=FOLDER,NAME=FOLDER. ValueError for anything else, or a name given twice."""
    pairs = re.findall(r"([A-Za-z0-9_-]+)=(.+?)(?=,[A-Za-z0-9_-]+=|$)", text)
    if ",".join(map("=".join, pairs)) != text or len(dict(pairs)) < len(pairs):
        names = "with each name once, of letters, digits, - and _"
        raise ValueError(f"val={text!r}: write NAME=FOLDER,NAME=FOLDER, {names}")
    return dict(pairs)


def source_names(folders: Sequence[str]) -> list[str]:
    """A name for each folder: its last part, or the whole path if two folders have the same last part."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def read_metas(folders: Sequence[str], pattern: str = "", vocab_size: int = 0) -> dict:
    """read_meta of the first folder (or pattern). ValueError if another folder has another encoding."""
    meta = read_meta(folders[0], pattern, vocab_size)
    own = meta["encoding"].startswith("tokenizer:")
    how = {"encoding": None, "tokenizer": folders[0]} if own else {"encoding": meta["encoding"]}
    for folder, name in product(folders[1:], ("encoding", "vocab_size", "eot_token")):
        if (theirs := read_meta(folder, vocab_size=vocab_size)[name]) != meta[name]:
            unlike = f"{name} is {theirs!r}, but {meta[name]!r} in {pattern or folders[0]}"
            again = fineweb_command(folder, f"{folder}_2", **dict(train_tokenizer=None, end_token=None) | how)
            raise ValueError(f"{folder}: {unlike}; make it again with `{again}`")
    return meta


def shares_of(weights: Mapping[str, Fraction | float]) -> list[int]:
    """Whole numbers in the proportion of the weights. Their sum is at most FINEST; weights that need a larger
    one are rounded. ValueError if a weight would become 0."""
    exact = [Fraction(weight) for weight in weights.values()]
    shares = [weight / sum(exact) for weight in exact]
    size = min(FINEST, math.lcm(*(share.denominator for share in shares)))
    counts = [end - start for start, end in pairwise(round(x * size) for x in accumulate(shares, initial=0))]
    if 0 in counts:
        small = list(weights)[counts.index(0)]
        raise ValueError(f"data_dir: {small!r} would give less than 1 of {FINEST:,} samples; omit it")
    return [count // math.gcd(*counts) for count in counts]


class Schedule:
    """The source of every sample: of the first n, each source gives n * share, rounded up or down.

    Sample j of a source (j = 0, 1, ...) may be drawn from position floor(j / share) on, and must be drawn
    before position ceil((j + 1) / share), its deadline. Of the samples that may be drawn, the one with the
    earliest deadline is drawn; the seed decides ties. No sample is late, because the shares add up to 1
    (Baruah et al., "Proportionate progress", Algorithmica 15, 1996). The schedule repeats after
    len(self.source) samples, when every n * share is a whole number: a table has the source of any sample."""

    def __init__(self, shares: Sequence[int], seed: int):
        period, given = sum(shares), [0] * len(shares)
        self.per_period = np.array(shares) * max(1, PERIOD // period)  # (sources,) samples
        size = int(self.per_period.sum())
        self.source = np.empty(size, dtype=np.int64)  # of each sample of a period
        self.number = np.empty(size, dtype=np.int64)  # of each sample, among those of its source
        ties = np.random.SeedSequence(seed).generate_state(size * len(shares), np.uint64)
        for n, row in enumerate(ties.reshape(size, -1).tolist()):
            deadlines = [(-(-(j + 1) * period // share), tie, source)
                         for source, (j, share, tie) in enumerate(zip(given, shares, row, strict=True))
                         if j * period // share <= n]  # fmt: skip
            self.source[n] = source = min(deadlines)[-1]
            self.number[n], given[source] = given[source], given[source] + 1

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number among the samples of that source) of each of the samples `index`, (k,) int64."""
        periods, place = np.divmod(index, len(self.source))
        source = self.source[place]
        return source, periods * self.per_period[source] + self.number[place]

    def counts(self, n: int) -> np.ndarray:
        """How many of the first n samples each source gives, (sources,)."""
        periods, place = divmod(n, len(self.source))
        return periods * self.per_period + np.bincount(self.source[:place], minlength=len(self.per_period))


class MixtureLoader(DistributedDataLoader):
    """A DistributedDataLoader over the train shards of several folders, {folder: weight}.

    Its order depends on the files, T, seed, weights and the number of the sample only. If the weights change
    at a resume, the new ones hold from there on, and every source goes on where it stopped. A source is known
    by its name (source_names). make: the class that reads a source, or a function that makes it."""

    def __init__(self, weights: Mapping[str, Fraction | float], B: int, T: int, rank: int = 0,
                 world_size: int = 1, shuffle: bool = True, seed: int = 1337,
                 make: Callable = DistributedDataLoader, **more):  # fmt: skip
        named = dict(sorted(zip(source_names(list(weights)), weights.items(), strict=True)))
        shares = shares_of(dict(named.values()))
        how = dict(shuffle=shuffle, seed=seed)
        self.sources = {name: make(where, 1, T, **how) for name, (where, _) in named.items()}
        files = [source.files for source in self.sources.values()]
        super().__init__([*chain(*files)], B, T, rank, world_size, seed=seed, **more)
        first = next(iter(self.sources.values()))
        self.shift, align = first.shift, first._stream["align"]
        self.kept = {name: sum(source.kept[name] for source in self.sources.values()) for name in first.kept}
        self._stream = {"sources": ", ".join(named), **self._stream, "shuffle": shuffle, "align": align}
        self._first_file = np.cumsum([0, *map(len, files)])
        self._weights, self._schedule = " ".join(map(str, shares)), Schedule(shares, seed)
        # The weights hold from this position on. Before it, each source has given so many samples.
        self._start, self._before = 0, np.zeros(len(shares), dtype=np.int64)

    def _locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, number = self._schedule.locate(index - self._start)
        number += self._before[source]
        file, place = np.empty_like(index), np.empty_like(index)
        for i, loader in enumerate(self.sources.values()):
            mine = source == i
            file[mine], place[mine] = loader._locate(number[mine])
        return file + self._first_file[source], place

    def _pieces(self, file: int, place: int) -> list[tuple[int, int]]:
        source = np.searchsorted(self._first_file, file, side="right") - 1
        return [*self.sources.values()][source]._pieces(file - self._first_file[source], place)

    def progress(self, position: int | None = None) -> dict[str, tuple[int, float]]:
        """{source: (samples, epochs)} read up to a position; by default up to now."""
        n = (self.position if position is None else position) - self._start
        pairs = zip(self.sources.items(), (self._before + self._schedule.counts(n)).tolist(), strict=True)
        return {name: (count, count / source.samples_per_epoch) for (name, source), count in pairs}

    def reset(self, position: int = 0) -> None:
        """Go to a position. If it is before that from which the weights hold, they now hold from sample 0."""
        super().reset(position)
        if position < self._start:
            self._start, self._before = 0, np.zeros_like(self._before)

    def state_dict(self) -> dict:
        """DistributedDataLoader's, the weights, and the samples that each source has given."""
        counts = {"read_before": self._before, "read": [n for n, _ in self.progress().values()]}
        mine = {"weights": self._weights, "weights_from": self._start}
        return super().state_dict() | mine | {name: " ".join(map(str, ns)) for name, ns in counts.items()}

    def load_state_dict(self, state: dict) -> None:
        """DistributedDataLoader's; other weights than those of `state` hold from its position on."""
        super().load_state_dict(state)
        before, read = (np.array(str(state.get(k)).split(), dtype=np.int64) for k in ("read_before", "read"))
        start = state.get("weights_from")
        for source in self.sources.values():
            source.shift = self.shift
        if not len(before) == len(read) == len(self.sources) or not isinstance(start, int):
            raise ValueError("the data loader cannot continue: its state lacks the samples of each source")
        same = state.get("weights") == self._weights
        self._start, self._before = (start, before) if same else (self.position, read)
