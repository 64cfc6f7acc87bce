"""Mixtures: a loader that draws samples from several data sets by their weights, exactly and repeatably.

    python train_gpt_moe.py --data_dir web:0.7,code:0.3      # 70% of the samples come from the folder web

Every source is read in the order of its own DistributedDataLoader, epoch after epoch. A schedule says which
source gives the next sample."""

import heapq
import math
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from tokens.shards import DistributedDataLoader, find_shards, read_meta

FINEST = 100_000  # shares are multiples of 1 / FINEST, or of a fraction with a smaller denominator
PERIOD = 10_000  # samples after which a schedule repeats, about; at most FINEST


# -------------------------------------------------------------------------------------------------- SETTINGS
def parse_mixture(text: str) -> dict[str, Fraction]:
    """{folder: weight} of data_dir: FOLDER:WEIGHT,FOLDER:WEIGHT, or a plain path, which gets the weight 1.
    ValueError: a weight that is no positive number, a folder given twice. FileNotFoundError: no folder."""
    pairs = re.findall(r"(.+?):([\d.eE+-]+)(?:,|$)", text)
    if os.path.isdir(text) or not pairs:
        return {text: Fraction(1)}
    if ",".join(map(":".join, pairs)) != text:
        raise ValueError(f"data_dir={text!r}: write a mixture as FOLDER:WEIGHT,FOLDER:WEIGHT")
    weights: dict[str, Fraction] = {}
    for folder, weight in pairs:
        if not os.path.isdir(folder):
            mixture = "a mixture is FOLDER:WEIGHT,FOLDER:WEIGHT"
            raise FileNotFoundError(f"data_dir={text!r}: there is no folder {folder!r}; {mixture}")
        if folder in weights:
            raise ValueError(f"data_dir={text!r}: {folder!r} is there twice; give it once")
        try:
            usable = 0 < float(weight) < math.inf  # Fraction("1e999999999") would fill the memory
            weights[folder] = Fraction(weight if usable else "")
        except ValueError:
            wrong = f"the weight {weight} of {folder!r} is not a positive number"
            raise ValueError(f"data_dir={text!r}: {wrong}") from None
    return weights


def parse_named(text: str) -> dict[str, str]:
    """{name: folder} of val: NAME=FOLDER,NAME=FOLDER. ValueError for anything else, or a name given twice."""
    pairs = re.findall(r"([A-Za-z0-9_-]+)=(.+?)(?=,[A-Za-z0-9_-]+=|$)", text)
    if ",".join(map("=".join, pairs)) != text or len(dict(pairs)) < len(pairs):
        names = "a name has letters, digits, - and _, and is there once"
        raise ValueError(f"val={text!r}: write NAME=FOLDER,NAME=FOLDER; {names}")
    return dict(pairs)


def source_names(folders: Sequence[str]) -> list[str]:
    """A name for each folder: its last part, or the whole path if two folders have the same last part."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def read_metas(folders: Sequence[str], pattern: str = "") -> dict:
    """read_meta of the first folder (or pattern). ValueError if another folder has another encoding."""
    first, *others = folders
    meta = read_meta(first, pattern)
    for folder in others:
        theirs = read_meta(folder)
        for name in ("encoding", "vocab_size", "eot_token"):
            if theirs[name] != meta[name]:
                unlike = f"{name} is {theirs[name]!r}, but {meta[name]!r} in {pattern or first}"
                mend = f"make both with the same `python fineweb.py --encoding {meta['encoding']}`"
                raise ValueError(f"{folder}: {unlike}; {mend}")
    return meta


# -------------------------------------------------------------------------------------------------- SCHEDULE
def shares_of(weights: Mapping[str, Fraction]) -> list[int]:
    """Whole numbers in the proportion of the weights, with a sum of at most FINEST. Weights that need a
    larger sum are rounded. ValueError if one would become 0."""
    total = sum(weights.values())
    shares = [weight / total for weight in weights.values()]
    size = min(FINEST, math.lcm(*(share.denominator for share in shares)))
    counts = [int(share * size) for share in shares]
    # What is missing in the sum goes to the largest remainders.
    order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * size)
    for i in order[: size - sum(counts)]:
        counts[i] += 1
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
        period = sum(shares)
        repeats = max(1, PERIOD // period)
        size = repeats * period
        self.per_period = np.array(shares) * repeats  # (sources,) samples
        ties = iter(np.random.SeedSequence(seed).generate_state(size, np.uint64).tolist())
        draws = []  # (first position, deadline, tie, source)
        for source, share in enumerate(shares):
            j = np.arange(share * repeats)
            first, deadline = j * period // share, -(-(j + 1) * period // share)
            windows = zip(first.tolist(), deadline.tolist(), strict=True)
            draws += [(*window, next(ties), source) for window in windows]
        draws.sort(reverse=True)
        waiting: list[tuple] = []
        self.source = np.empty(size, dtype=np.int64)  # of each sample of a period
        for n in range(size):
            while draws and draws[-1][0] <= n:
                heapq.heappush(waiting, draws.pop()[1:])
            self.source[n] = heapq.heappop(waiting)[-1]
        self.number = np.empty(size, dtype=np.int64)  # of each sample, among those of its source
        for source, count in enumerate(self.per_period):
            self.number[self.source == source] = np.arange(count)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number among the samples of that source) of each of the samples `index`, (k,) int64."""
        periods, place = np.divmod(index, len(self.source))
        source = self.source[place]
        return source, periods * self.per_period[source] + self.number[place]

    def counts(self, n: int) -> np.ndarray:
        """How many of the first n samples each source gives, (sources,)."""
        periods, place = divmod(n, len(self.source))
        return periods * self.per_period + np.bincount(self.source[:place], minlength=len(self.per_period))


# -------------------------------------------------------------------------------------------------- LOADER
class MixtureLoader(DistributedDataLoader):
    """A DistributedDataLoader over the train shards of several folders, {folder: weight}.

    Its order depends on the files, T, seed, weights and the number of the sample only. Arguments, batches and
    errors are those of DistributedDataLoader. If the weights change at a resume, the new ones hold from there
    on, and every source goes on where it stopped. A source is known by its name (source_names)."""

    def __init__(self, weights: Mapping[str, Fraction], B: int, T: int, rank: int = 0, world_size: int = 1,
                 shuffle: bool = True, seed: int = 1337, **more):  # fmt: skip
        named = sorted(zip(source_names(list(weights)), weights, strict=True))
        each = (find_shards(folder, "train") for _, folder in named)
        loaders = [DistributedDataLoader(files, 1, T, shuffle=shuffle, seed=seed) for files in each]
        self.sources = dict(zip([name for name, _ in named], loaders, strict=True))
        files = [file for source in loaders for file in source.files]
        super().__init__(files, B, T, rank, world_size, seed=seed, **more)
        self._stream = {"sources": ", ".join(self.sources), **self._stream, "shuffle": shuffle}
        self._first_file = np.cumsum([0, *(len(source.files) for source in loaders)])
        shares = shares_of({folder: weights[folder] for _, folder in named})
        self._weights, self._schedule = _joined(shares), Schedule(shares, seed)
        # The weights hold from this position on. Before it, each source has given so many samples.
        self._start, self._before = 0, np.zeros(len(shares), dtype=np.int64)

    def _locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, number = self._schedule.locate(index - self._start)
        number += self._before[source]
        file, offset = np.empty_like(index), np.empty_like(index)
        for i, loader in enumerate(self.sources.values()):
            mine = source == i
            file[mine], offset[mine] = loader._locate(number[mine])
            file[mine] += self._first_file[i]
        return file, offset

    def _counts(self, position: int) -> np.ndarray:
        return self._before + self._schedule.counts(position - self._start)

    def progress(self, position: int | None = None) -> dict[str, tuple[int, float]]:
        """{source: (samples, epochs)} read up to a position; by default up to now."""
        counts = self._counts(self.position if position is None else position).tolist()
        pairs = zip(self.sources.items(), counts, strict=True)
        return {name: (count, count / source.samples_per_epoch) for (name, source), count in pairs}

    def reset(self, position: int = 0) -> None:
        """Go to a position. Before that from which the weights hold, they hold from the first sample on."""
        super().reset(position)
        if position < self._start:
            self._start, self._before = 0, np.zeros_like(self._before)

    def state_dict(self) -> dict:
        """DistributedDataLoader's, the weights, and the samples that each source has given."""
        mine = {"weights": self._weights, "weights_from": self._start, "read_before": _joined(self._before)}
        return {**super().state_dict(), **mine, "read": _joined(self._counts(self.position))}

    def load_state_dict(self, state: dict) -> None:
        """DistributedDataLoader's; other weights than those of `state` hold from its position on."""
        super().load_state_dict(state)
        before, read = (np.array(str(state.get(k)).split(), dtype=np.int64) for k in ("read_before", "read"))
        start = state.get("weights_from")
        if not len(before) == len(read) == len(self.sources) or not isinstance(start, int):
            raise ValueError("the data loader cannot continue: its state lacks the samples of each source")
        same = state.get("weights") == self._weights
        self._start, self._before = (start, before) if same else (self.position, read)


def _joined(numbers: Sequence[int] | np.ndarray) -> str:
    return " ".join(map(str, numbers))
