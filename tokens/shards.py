"""Tokens on disk and in batches: the shard format (see docs/formats.md), and the loader that reads it.

    loader = DistributedDataLoader("edu_fineweb10B", B=8, T=1024, rank=rank, world_size=world_size)
    x, y = loader.next_batch()                                   # (B, T) inputs, (B, T) targets

A shard is llm.c's: 256 int32 (magic number, version, number of tokens, zeros), then the tokens as uint16
or, for more than 65,536 ids, as uint32."""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import hashlib
import os
import re
import reprlib
import shlex
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from tokens.files import DataError, write_atomically
from tokens.identity import check_fingerprints, fineweb_command, fingerprint, load_metas
from tokens.nanogpt_data import describe_foreign
from tokens.own_tokenizers import read_added
from tokens.printable import printable

if TYPE_CHECKING:
    import torch  # methods import torch when they need it, so that fineweb.py starts fast

# As in llm.c, dev/data/data_common.py: magic number: (version, type of the tokens).
FORMATS, HEADER_INTS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}, 256
OPEN_SHARDS = 256  # files that a loader keeps open; a process may often have 1,024
FEISTEL_ROUNDS = 6  # of the permutation that shuffles
GOLDEN = 0.618034  # its multiples, modulo 1, are spread evenly: they shift the windows of later epochs


# -------------------------------------------------------------------------------------------------- SHARDS
def shard_header(count: int, dtype: np.dtype) -> bytes:
    """The bytes before the tokens of an llm.c shard of so many tokens, uint16 or uint32."""
    numbers = next((magic, version, count) for magic, (version, kind) in FORMATS.items() if dtype == kind)
    return np.array(numbers, dtype="<i4").tobytes().ljust(4 * HEADER_INTS, b"\0")


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write a 1-D uint16 or uint32 array as an llm.c shard, atomically. Raises ValueError, OSError."""
    if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1 or not 0 < len(tokens) < 1 << 31:
        kind = f"{tokens.dtype} of shape {tokens.shape}"
        raise ValueError(f"{path}: a shard is one row of 1 to 2147483647 uint16 or uint32 tokens, not {kind}")
    data = np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<"))
    write_atomically(path, lambda file: file.writelines((shard_header(len(data), data.dtype), data.data)))


class Shard:
    """An open shard; len() is its number of tokens. Raises FileNotFoundError, ValueError if damaged."""

    def __init__(self, path: str | os.PathLike):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is not a file; {_rebuild(path)}")
        self.path, self.file = path, open(path, "rb", buffering=0)
        self.start, self.count, self.dtype = _read_header(path, self.file)
        self.nbytes = self.count * self.dtype.itemsize

    def checksum(self) -> str:
        """SHA-256 of its tokens, in hexadecimal digits. Raises OSError."""
        self.file.seek(self.start)
        return hashlib.file_digest(self.file, "sha256").hexdigest()

    def read(self, first: int, tokens: np.ndarray) -> np.ndarray:
        """Fill `tokens` from token `first` on. DataError, with file and offset, if that fails. (A memory map
        is no faster, and when the file has been cut the system kills the process.)"""
        if tokens.dtype != self.dtype:
            tokens[:] = self.read(first, np.empty(len(tokens), self.dtype))
            return tokens
        left, why = tokens.nbytes, "the file became shorter while it was in use"
        try:
            self.file.seek(self.start + tokens.itemsize * first)
            while left and (count := self.file.readinto(tokens.view(np.uint8)[-left:])):
                left -= count
        except OSError as error:
            why = error.strerror
        if left:
            at = first + (tokens.nbytes - left) // tokens.itemsize
            raise DataError(f"{self.path}: no token at offset {at}: {why}; {_rebuild(self.path)}")
        return tokens

    def __len__(self) -> int:
        return self.count

    def __del__(self):
        if hasattr(self, "file"):
            self.file.close()


def read_shard(path: str | os.PathLike) -> np.ndarray:
    """All tokens of a shard, uint16 or uint32. Raises FileNotFoundError, ValueError if damaged."""
    shard = Shard(path)
    return shard.read(0, np.empty(len(shard), shard.dtype))


def _read_header(path: str | os.PathLike, file: BinaryIO) -> tuple[int, int, np.dtype]:
    """(byte at which the tokens begin, their number and type) of a shard in any of the formats."""
    size, head = os.fstat(file.fileno()).st_size, file.read(4 * HEADER_INTS)
    magic, dtype = int.from_bytes(head[:4], "little"), np.dtype("<u2")
    if head.startswith(b"\x93NUMPY"):
        start, count = _read_npy_header(path, file)
    elif magic in FORMATS and size >= 4 * HEADER_INTS:
        start, (version, count) = 4 * HEADER_INTS, np.frombuffer(head, "<i4", 2, offset=4).tolist()
        right, dtype = FORMATS[magic][0], np.dtype(FORMATS[magic][1])
        if version != right:
            raise ValueError(f"{path} has shard version {version}, not {right}; {_rebuild(path)}")
    else:
        _refuse_foreign(path, head, magic)
        start, count = 0, size // 2
    if count <= 0:
        raise ValueError(f"{path} holds {count} tokens; {_rebuild(path)}")
    if size != (need := start + dtype.itemsize * count):
        wrong = f"{'truncated' if size < need else 'padded'}: {count} tokens take {need} bytes, it has {size}"
        raise ValueError(f"{path} is {wrong}; {_rebuild(path)}")
    return start, count, dtype


def _rebuild(path: str | os.PathLike) -> str:
    return f"rebuild it: `{fineweb_command(os.path.dirname(path) or '.', file=path)}`"


def _read_npy_header(path: str | os.PathLike, file: BinaryIO) -> tuple[int, int]:
    """(offset of the data, number of tokens) of an .npy file."""
    file.seek(0)
    try:
        major, minor = np.lib.format.read_magic(file)
        shape, _, dtype = getattr(np.lib.format, f"read_array_header_{major}_{minor}")(file)
    except Exception as error:  # the header is Python source: a damaged one fails in many ways
        raise ValueError(f"{path} has a damaged .npy header ({error!r}); {_rebuild(path)}") from error
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise ValueError(f"{path} holds {dtype} of shape {shape}, not one row of uint16; {_rebuild(path)}")
    return file.tell(), shape[0]


def _refuse_foreign(path: str | os.PathLike, head: bytes, magic: int) -> None:
    """ValueError if a file without a header holds anything except tokens."""
    signatures = {b"PK\x03\x04": "zip or a checkpoint", b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
    why = next((f"it is {kind}" for start, kind in signatures.items() if head.startswith(start)), None)
    if magic in FORMATS:
        why = f"it is truncated within its header, at {len(head)} bytes"
    # llm.c's magic numbers are dates. Read as uint16 they are not GPT-2 tokens. Its headers end in zeros.
    elif 20240101 <= magic <= 20241231 or (len(head) == 4 * HEADER_INTS and not any(head[12:])):
        why = f"it has magic number {magic} instead of {min(FORMATS)}"
    # Text has no control characters. The bytes of tokens usually have some.
    elif head and not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head):
        with contextlib.suppress(UnicodeDecodeError):
            if len(head) >= 256 or codecs.getincrementaldecoder("utf-8")().decode(head):
                why = f"it is text (shards of it: `{fineweb_command(f'{path}_shards', source=path)}`)"
    if why:
        raise ValueError(f"{path} is not a shard of tokens: {why}; {_rebuild(path)}")


def find_shards(where: str | os.PathLike, split: str = "train") -> list[str]:
    """Shards, sorted: a folder's with `split` in their names, or a pattern's. Raises FileNotFoundError."""
    where = os.fspath(where)
    if not os.path.isdir(where):
        paths = sorted(path for path in glob.glob(where) if os.path.isfile(path))
        if not paths:
            make = "`python fineweb.py`, or without network `python fineweb.py --demo`"
            raise FileNotFoundError(f"no data: {where} is neither a folder nor a file; make some: {make}")
        return paths
    names = sorted(name for name in os.listdir(where) if name.endswith((".bin", ".npy")))
    paths = [os.path.join(where, name) for name in names if split in re.split(r"[_.-]", name)]
    if not paths:
        make = f"`{fineweb_command(where)}`; --val_tokens says how many tokens validation gets"
        missing = f"no {split} shard ({split}_*.bin) among the {len(names)} shards in {where}"
        raise FileNotFoundError(f"{missing}; make them: {make}")
    return paths


def read_meta(folder: str | os.PathLike, pattern: str = "", vocab_size: int = 0) -> dict:
    """meta.json of a data folder, or of the first shard that matches `pattern`; several machines' counts are
    added. Without meta.json it is what describe_foreign says. Raises FileNotFoundError, ValueError."""
    folder = (os.path.dirname(find_shards(pattern)[0]) or ".") if pattern else os.fspath(folder)
    if not os.path.isdir(folder):
        make = f"make it: `{fineweb_command(folder)}`, or give another --data_dir"
        how = "it is a file: --text takes texts, --input_bin shards" if os.path.exists(folder) else make
        raise FileNotFoundError(f"no data folder {folder}; {how}")
    metas = load_metas(folder)
    if not metas:
        return describe_foreign(folder, vocab_size)
    if (name := next(iter(metas.values()))["encoding"]).startswith("tokenizer:"):
        again = f"; make it again: `{fineweb_command(folder)}`"
        read_added(os.path.join(folder, "tokenizer.json"), name, again)
    for name, noted in [pair for meta in metas.values() for pair in meta.get("samples", {}).items()]:
        if os.path.exists(path := os.path.join(folder, name)):
            shard = Shard(path)
            if fingerprint(shard.file, shard.start, shard.nbytes) != noted:
                compare = f"`python fineweb.py --verify --out {shlex.quote(folder)}` compares all tokens"
                raise ValueError(f"{path}: its tokens are not those that meta.json notes; {compare}")
    counts = Counter()
    for meta in metas.values():
        counts.update(meta["tokens"])
    unfinished = [path for path, meta in metas.items() if not meta["complete"]]
    if unfinished:
        text = f"{folder} is unfinished; finish it: `{fineweb_command(folder, file=unfinished[0])}`"
        warnings.warn(printable(text), stacklevel=2)
    return {**next(iter(metas.values())), "tokens": dict(counts), "complete": not unfinished}


# -------------------------------------------------------------------------------------------------- LOADER
def permute(index: np.ndarray, n: int, seed: int | Sequence[int]) -> np.ndarray:
    """Map `index`, (k,), by the permutation of range(n) that the seed (of a SeedSequence) selects: a Feistel
    network with just enough bits for n, repeated until the result is below n (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002). The round function is MurmurHash3's finaliser."""
    keys = np.random.SeedSequence(seed).generate_state(FEISTEL_ROUNDS, np.uint64)
    bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    x, walking = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while walking.any():
        left, right = x[walking] >> bits, x[walking] & mask
        for key in keys:
            h = right + key
            h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
            h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
            left, right = right, left ^ ((h ^ (h >> np.uint64(33))) & mask)
        x[walking] = left << bits | right
        walking = x >= np.uint64(n)
    return x.astype(np.int64)


class DistributedDataLoader:
    """Endless batches of a data set. Any number of ranks, any B and any accumulation read the same stream.

    A sample is a window of T tokens and the token after it. Windows do not overlap and stay in their shard.
    All ranks call next_batch() equally often. Each call consumes the next B * world_size samples, of which
    rank r takes the r-th B.

    pattern     glob pattern, folder (its train shards) or list of files
    shuffle     True: each epoch has every sample once, in an order that T, seed, epoch and shards decide.
                With `shift`, the windows of later epochs begin some tokens later, so that no row comes again:
                these tokens are then left out, and a shard's last window may overlap the one before.
                False: llm.c's order, batch after batch through each shard. All ranks together skip a rest
                that is too short for a batch of all ranks (in llm.c each rank skips alone).
    vocab_size  every token read must be below it
    prefetch    number of batches that a background thread keeps ready, in the GPU's memory if device is CUDA

    Raises ValueError: wrong arguments, a damaged shard, too little data. FileNotFoundError: no data."""

    def __init__(self, pattern: str | os.PathLike | Sequence[str], B: int, T: int, rank: int = 0,
                 world_size: int = 1, shuffle: bool = True, seed: int = 1337,
                 device: str | torch.device = "cpu", vocab_size: int | None = None,
                 prefetch: int = 2, shift: bool = True):  # fmt: skip
        import torch

        for name, value, least in (("B", B, 1), ("T", T, 1), ("seed", seed, 0), ("prefetch", prefetch, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}")
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.shuffle, self.seed, self.shift = shuffle, seed, shift
        self.vocab_size, self.prefetch, self.device = vocab_size, prefetch, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.files = find_shards(pattern) if isinstance(pattern, str | os.PathLike) else list(pattern)
        if not self.files:
            raise FileNotFoundError("no data: the list of shards is empty; make some: `python fineweb.py`")
        lengths, prints, self._dtype = [], [], np.dtype("<u2")
        for shard in map(Shard, self.files):
            lengths.append(len(shard))
            self._dtype = max(self._dtype, shard.dtype)
            prints.append(fingerprint(shard.file, shard.start, shard.nbytes, len(self.files)))
        group = B * world_size
        samples = self._count_samples(np.array(lengths))  # (files,)
        self._ends = np.cumsum(samples if shuffle else samples // group * group)
        self._last = np.array(lengths) - 1 - T  # where the last possible window of each file begins
        self.num_tokens, self.samples_per_epoch = sum(lengths), int(self._ends[-1])
        if self.samples_per_epoch < group:
            need = f"a batch of B={B} on world_size={world_size} ranks takes {group} samples of T={T}"
            need += f", at least {group * T + 1} tokens{'' if shuffle else ' in one shard'}"
            have = f"{self.num_tokens} tokens, {self.samples_per_epoch} such samples"
            have = f"the {len(lengths)} shard(s) from {self.files[0]} on have {have}"
            mend, (folder, name) = "give more text to fineweb.py", os.path.split(self.files[0])
            if name.startswith("val") and "--demo" not in fineweb_command(folder):
                larger = fineweb_command(folder, out=f"{folder}_2", val_tokens=group * T + 1)
                mend = f"make a larger one, for --data_dir without --text: `{larger}`"
            raise ValueError(f"too little data: {need}, but {have}; lower --B or --T, or {mend}")
        self._stream = dict(T=T, shuffle=shuffle, seed=seed, files=len(lengths), tokens=self.num_tokens)
        self._stream |= {"align": ""} if shuffle else {"align": "", "B * world_size": group}
        self.kept: dict[str, int] = {}  # what becomes of the tokens, if rows begin at documents
        self._prints = {"fingerprints": (self.files, "".join(prints))}
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(Shard)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._upload = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._batches: deque[Future] = deque()
        self.position = 0  # samples handed out so far, to all ranks together

    def _count_samples(self, lengths: np.ndarray) -> np.ndarray:
        """Samples of each file, (files,), by its number of tokens."""
        return (lengths - 1) // self.T

    def locate(self, global_sample: int) -> tuple[str, int]:
        """(file, offset of its first token) of a sample, to look up the text of a bad batch."""
        (file,), (place,) = self._locate(np.array([global_sample]))
        return self.files[file], int(self._pieces(file, place)[0][0])

    def _pieces(self, file: int, place: int) -> list[tuple[int, int]]:
        """(offset, number of tokens) of the parts of a file that make up the sample at `place`."""
        return [(place, self.T + 1)]

    def _locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the file, place in it) of each of the samples `index`, (k,) int64. A place is the offset
        of the first token; subclasses may number their samples differently."""
        epochs, index = np.divmod(index, self.samples_per_epoch)
        if self.shuffle:
            for epoch in np.unique(epochs):
                now = epochs == epoch
                index[now] = permute(index[now], self.samples_per_epoch, [self.seed, int(epoch)])
        file = np.searchsorted(self._ends, index, side="right")
        start = (index - np.where(file > 0, self._ends[file - 1], 0)) * self.T
        if self.shuffle and self.shift:
            start = np.minimum(start + (epochs * GOLDEN % 1 * self.T).astype(np.int64), self._last[file])
        return file, start

    def _read(self, position: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """This rank's inputs and targets at a position, (2, B, T) int64; the event after the CUDA copy."""
        import torch

        tokens = np.empty((self.B, self.T + 1), self._dtype)
        index = np.arange(self.B) + (position + self.rank * self.B)
        for row, file, place in zip(tokens, *self._locate(index), strict=True):
            path = self.files[file]
            for start, count in self._pieces(file, place):
                piece, row = self._open(path).read(start, row[:count]), row[count:]
                if self.vocab_size is not None and piece.max() >= self.vocab_size:
                    at = int(np.argmax(piece >= self.vocab_size))
                    wrong = f"token {piece[at]} at offset {start + at} is not below"
                    why = "the shard is damaged, or its encoding is not the model's"
                    raise ValueError(f"{path}: {wrong} vocab_size={self.vocab_size}: {why}; {_rebuild(path)}")
        batch = torch.from_numpy(np.stack((tokens[:, :-1], tokens[:, 1:]), dtype=np.int64))
        if self._upload is None:
            return batch, None
        torch.cuda.set_device(self.device)  # for this thread; otherwise pinning would initialise GPU 0
        with torch.cuda.stream(self._upload):  # training continues in another stream
            batch = batch.pin_memory().to(self.device, non_blocking=True)
            return batch, self._upload.record_event()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y), each (B, T) int64; y is one token later. After ValueError or OSError the position stays."""
        import torch

        step = self.B * self.world_size
        while len(self._batches) <= self.prefetch:
            self._batches.append(self._thread.submit(self._read, self.position + len(self._batches) * step))
        try:
            batch, arrived = self._batches.popleft().result()
        except BaseException:
            self.reset(self.position)
            raise
        self.position += step
        if arrived is not None:
            training = torch.cuda.current_stream(self.device)
            training.wait_event(arrived)  # only the GPU waits
            batch.record_stream(training)  # torch must not reuse the memory before `training` has read it
        x, y = batch.to(self.device)
        return x, y

    def reset(self, position: int = 0) -> None:
        """Go to a position; by default to the first sample, as before each validation."""
        for batch in self._batches:
            batch.cancel()
        self._batches.clear()
        self.position = position

    def progress(self, position: int | None = None) -> dict[str, tuple[int, float]]:
        """{source: (samples, epochs)} of a mixture (tokens/mixtures.py); a plain loader has no sources."""
        return {}

    def watch(self, validation: DistributedDataLoader, name: str = "validation") -> None:
        """Save what identifies the validation shards too, and compare it in load_state_dict."""
        self._prints[name] = validation._prints["fingerprints"]

    def state_dict(self) -> dict:
        """The position (prefetched batches do not count), and what identifies the stream."""
        prints = {name: joined for name, (_, joined) in self._prints.items()}
        return {"position": self.position, "shift": self.shift, **self._stream, **prints}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was saved, on any number of ranks. Raises ValueError for another stream."""
        state = {"align": "", "shift": False} | state  # of older checkpoints, which go on as they began
        for name, value in self._stream.items():
            if state.get(name) != value:
                saved = f"it was saved with {name}={reprlib.repr(state.get(name))}, but here {name}={value!r}"
                give = f"({self.files[0]}, ...); use the data and settings of the saved run"
                raise ValueError(f"the data loader cannot continue: {saved} {give}")
        for name, (files, here) in self._prints.items():
            check_fingerprints(files, here, state.get(name, here))  # older ones, and a new --val, have none
        self.shift = state["shift"]
        self.reset(state["position"])
