"""From text to tokens to batches: the shards on disk, the loader that reads them, the script that writes them.

    python fineweb.py                                   # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --demo                            # prose that every Python carries -> demo_data/
    python fineweb.py --source book.txt --out book --val_tokens 20000
    python fineweb.py --source corpus/ --out corpus_gpt2 --workers 8   # .txt .jsonl .jsonl.gz .jsonl.zst .parquet
    python fineweb.py --num_parts 8 --part 3            # the fourth of eight machines, which may share --out

Killed at any moment and started again with the same command, it goes on after the last complete shard and ends
with the same bytes. In order: encodings, shards, loader, demo corpus, sources, tokenising, command line.

A shard is llm.c's (https://github.com/karpathy/llm.c, dev/data/data_common.py): 256 little-endian int32 (magic
20240520, version 1, number of tokens, zeros), then the tokens as uint16. Documents follow one another, each
beginning with <|endoftext|>, and run over from shard to shard. meta.json beside the shards names the encoding.
"""

from __future__ import annotations

import argparse
import ast
import codecs
import contextlib
import difflib
import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import queue
import re
import signal
import sys
import sysconfig
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken
from tqdm import tqdm

if TYPE_CHECKING:
    import torch  # imported where it is used: the tokenising processes start ten times faster without it

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
EOT = "<|endoftext|>"
FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"
TASK_CHARS = 1 << 19  # text handed to a worker at a time: some 30 ms of work
MAX_WHITESPACE = 600_000  # tiktoken's regex engine overflows its stack on 999,999 spaces in a row
SHARDS_OPEN = 256  # memory maps a loader keeps: each holds a file descriptor, of which a process has 1,024
ROUNDS = 6  # of the Feistel network that shuffles


# ----------------------------------------------------------------------------------------------------------
# ENCODINGS


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """The encoding `name`: "bytes" (256 bytes and <|endoftext|> = 256, needs no files) or any of tiktoken's.

    Raises ValueError (unknown, or its ids do not fit a shard's uint16) or ConnectionError (files not to be had).
    """
    if name == "bytes":
        # Lines as pieces: with no merges to do, any pattern that covers everything gives the same ids.
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[^\n]*\n|[^\n]+",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={EOT: 256},
        )
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"encoding={name!r} is unknown{hint}; there are {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise ConnectionError(
            f"tiktoken could not fetch the files of encoding={name!r} ({type(error).__name__}). Without network, "
            "point TIKTOKEN_CACHE_DIR at a folder where tiktoken has stored them before, or use --encoding bytes"
        ) from error
    if encoding.n_vocab > 1 << 16 or EOT not in encoding.special_tokens_set:
        raise ValueError(
            f"encoding={name!r} has {encoding.n_vocab} ids; a shard holds uint16, so at most 65536, with {EOT} "
            "among them: use gpt2, r50k_base, p50k_base or bytes"
        )
    return encoding


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of `text` as uint16; what looks like a special token in it is ordinary text."""
    parts = [text]
    if len(text) > MAX_WHITESPACE:
        parts = re.split(rf"(\s{{{MAX_WHITESPACE}}})", text)
    return np.concatenate([encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]).astype(
        np.uint16
    )


# ----------------------------------------------------------------------------------------------------------
# SHARDS


def write_atomically(path: str, *parts: bytes | memoryview) -> None:
    """Write a file that is either whole or absent under its name, whatever happens meanwhile.

    Raises OSError (disk full, folder not writable), leaving neither a half file nor a temporary one.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the new name itself is on disk only once the folder is
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write a 1-D uint16 array as an llm.c shard, atomically. Raises ValueError, OSError."""
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(f"{path}: tokens must be a 1-D uint16 array, not {tokens.ndim}-D {tokens.dtype}")
    if not 0 < len(tokens) < 1 << 31:
        raise ValueError(f"{path}: a shard holds 1 to 2147483647 tokens, not {len(tokens)}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_atomically(os.fspath(path), header.tobytes(), np.ascontiguousarray(tokens, dtype="<u2").data)


def read_shard(path: str | os.PathLike) -> np.memmap:
    """The tokens of a shard, memory-mapped, (n,) uint16; convert before handing any to torch.

    The first bytes tell which of three formats it is: llm.c's, numpy's .npy (build-nanogpt), or else headerless
    uint16 (nanoGPT). Raises FileNotFoundError, or ValueError for anything that is not a whole shard.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(f"{path} {what}; {_rebuild(path)}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4 * HEADER_INTS)
        first = int.from_bytes(head[:4], "little")
        if head.startswith(b"\x93NUMPY"):
            start, count = _npy_layout(path, file)
        elif first == MAGIC:
            start = 4 * HEADER_INTS
            if size < start:
                raise ValueError(f"{path} is truncated within its header ({size} bytes); {_rebuild(path)}")
            version, count = (int(i) for i in np.frombuffer(head, "<i4", 2, offset=4))
            if version != VERSION:
                raise ValueError(f"{path} has shard version {version}, not {VERSION}; {_rebuild(path)}")
        else:
            _refuse_foreign(path, head, first)
            start, count = 0, size // 2
            if size % 2:
                raise ValueError(f"{path} has no header and an odd size ({size} bytes); {_rebuild(path)}")
    if count <= 0:
        raise ValueError(f"{path} holds {count} tokens; {_rebuild(path)}")
    if size != start + 2 * count:
        what = "truncated" if size < start + 2 * count else "padded"
        raise ValueError(
            f"{path} is {what}: its header announces {count} tokens, {start + 2 * count} bytes in all, "
            f"but it has {size}; {_rebuild(path)}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=start, shape=(count,))


def _rebuild(path: str) -> str:
    return f"rebuild it with `python fineweb.py --out {os.path.dirname(path) or '.'}` and the settings of meta.json there"


def _npy_layout(path: str, file: io.BufferedReader) -> tuple[int, int]:
    """(offset of the data, number of tokens) of an .npy file whose first bytes have been read."""
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, _, dtype = read(file)
    except Exception as error:  # numpy parses the header as Python source: a damaged one fails in many ways
        raise ValueError(f"{path} has a damaged .npy header ({error}); {_rebuild(path)}") from error
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise ValueError(
            f"{path} must hold one row of uint16, not {dtype} of shape {shape}; {_rebuild(path)}"
        )
    return file.tell(), shape[0]


def _refuse_foreign(path: str, head: bytes, first: int) -> None:
    """Raise ValueError if a file without our magic number is something else than bare uint16 tokens."""
    signatures = {b"PK\x03\x04": "a zip archive or checkpoint", b"\x1f\x8b\x08": "gzip", b"PAR1": "parquet"}
    signatures[b"\x28\xb5\x2f\xfd"] = "zstd"
    what = next((name for start, name in signatures.items() if head.startswith(start)), None)
    # llm.c's magic numbers are dates (as uint16, no GPT-2 token), and its headers are padded with zeros.
    if 20240101 <= first <= 20241231 or (len(head) >= 1024 and not any(head[12:])):
        what = f"a file with magic number {first}, not {MAGIC}"
    # Tokens have control characters among their bytes nearly at once; text has none.
    if head and not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head):
        with contextlib.suppress(UnicodeDecodeError):
            if len(head) >= 256 or codecs.getincrementaldecoder("utf-8")().decode(head):
                what = f"text; make shards of it with `python fineweb.py --source {path} --out FOLDER`"
    if what:
        raise ValueError(f"{path} is no shard of tokens but {what}; {_rebuild(path)}")


def find_shards(where: str | os.PathLike, split: str = "train") -> list[str]:
    """Shards in reading order: of a folder, those with `split` in their names; else all that match a pattern.

    Names of llm.c, build-nanogpt and nanoGPT are known (fineweb_train_000001.bin, train.bin, ...).
    Raises FileNotFoundError that says what is missing and how to make it.
    """
    where = os.fspath(where)
    if not os.path.isdir(where):
        paths = sorted(path for path in glob.glob(where) if os.path.isfile(path))
        if not paths:
            folder = where if not glob.has_magic(where) and "." not in os.path.basename(where) else "FOLDER"
            raise FileNotFoundError(
                f"no data at {where}: there is no such folder or file. Make it with "
                f"`python fineweb.py --out {folder}`, or without network with `python fineweb.py --demo --out {folder}`"
            )
        return paths
    names = sorted(name for name in os.listdir(where) if name.endswith((".bin", ".npy")))
    paths = [os.path.join(where, name) for name in names if split in re.split(r"[_.-]", name)]
    if not paths:
        beside = f" ({len(names)} other shards are there)" if names else ", nor any other"
        raise FileNotFoundError(
            f"no {split} shard ({split}_*.bin) in {where}{beside}. Make it with `python fineweb.py --out {where}` "
            "(--val_tokens says how many tokens validation gets)"
        )
    return paths


def read_meta(folder: str | os.PathLike) -> dict:
    """meta.json of a data folder ("encoding", "vocab_size", "eot_token", "tokens" per split, "source", ...).

    Where several machines wrote parts of it, their counts are added up. A folder without it is taken to be
    GPT-2's, with a warning. Raises FileNotFoundError, or ValueError for a damaged or contradictory file.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"there is no data folder {folder}; make it with `python fineweb.py --out {folder}`"
        )
    metas = load_metas(folder)
    if not metas:
        warnings.warn(f"no meta.json in {folder}: taking its tokens for GPT-2's", stacklevel=2)
        return {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256, "tokens": {}}
    (first, meta), *others = metas.items()
    meta = {**meta, "tokens": dict(meta["tokens"])}
    for path, other in others:
        for field in ("encoding", "vocab_size", "eot_token"):
            if other[field] != meta[field]:
                raise ValueError(f"{field} is {meta[field]!r} in {first} but {other[field]!r} in {path}")
        meta["complete"] &= other["complete"]
        for split, count in other["tokens"].items():
            meta["tokens"][split] = meta["tokens"].get(split, 0) + count
    if not meta["complete"]:
        warnings.warn(f"{folder} is unfinished: start the fineweb.py that was making it again", stacklevel=2)
    return meta


def load_metas(folder: str) -> dict[str, dict]:
    """Path -> content of meta.json, or of meta_p0000.json, meta_p0001.json, ..., in a folder."""
    metas = {}
    kinds = {"encoding": str, "vocab_size": int, "eot_token": int, "tokens": dict, "complete": bool}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "meta*.json"))):
        try:
            with open(path, encoding="utf-8") as file:
                metas[path] = json.load(file)
            wrong = [name for name, kind in kinds.items() if not isinstance(metas[path][name], kind)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it; {_rebuild(path)}") from error
        if wrong:
            raise ValueError(f"{path} is damaged (bad {wrong[0]}): delete it; {_rebuild(path)}")
    return metas


# ----------------------------------------------------------------------------------------------------------
# LOADER


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where the permutation of range(n) that `keys` (ROUNDS uint64) chooses sends each of `index`, (k,) int64.

    A Feistel network on just enough bits for n, walked until it lands below n (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002), mixed by MurmurHash3's finaliser. A table of 10 billion tokens' samples
    would cost each rank 80 MB and a second an epoch; this costs nothing and knows every sample of every epoch.
    """
    bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    x = index.astype(np.uint64)
    walking = np.ones(len(x), dtype=bool)
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


class Samples:
    """The pure half of the loader: global sample index -> file and offset -> T + 1 tokens.

    A sample is a window of T tokens and the one after it; windows do not overlap and stay inside their shard,
    so up to T tokens at a shard's end are not used. Sample i belongs to epoch i // per_epoch; within an epoch
    every sample comes once, in an order chosen by (seed, epoch).
    """

    def __init__(
        self, files: Sequence[str], T: int, seed: int, shuffle: bool, group: int, vocab_size: int | None
    ):
        self.files, self.T, self.seed, self.shuffle, self.vocab_size = (
            list(files),
            T,
            seed,
            shuffle,
            vocab_size,
        )
        digest, lengths = hashlib.sha256(), []
        for path in self.files:
            tokens = read_shard(path)
            lengths.append(len(tokens))
            digest.update(
                lengths[-1].to_bytes(8, "little") + tokens[:256].tobytes() + tokens[-256:].tobytes()
            )
        windows = (np.array(lengths) - 1) // T
        if not shuffle:  # llm.c leaves a shard where the next batch of all ranks would run over its end
            windows = windows // group * group
        self.ends = np.cumsum(windows)
        self.per_epoch, self.num_tokens = int(self.ends[-1]), sum(lengths)
        self.fingerprint = {"T": T, "shuffle": shuffle, "seed": seed, "files": len(lengths)}
        self.fingerprint |= {"num_tokens": self.num_tokens, "sha256": digest.hexdigest()[:16]}
        if not shuffle:
            self.fingerprint["B * world_size"] = group
        self.open = functools.lru_cache(maxsize=SHARDS_OPEN)(read_shard)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the file, offset of its first token) of each sample of `index`, (k,) int64."""
        epochs, index = np.divmod(index, self.per_epoch)
        if self.shuffle:
            for epoch in np.unique(epochs):
                keys = np.random.SeedSequence([self.seed, int(epoch)]).generate_state(ROUNDS, np.uint64)
                index[epochs == epoch] = permute(index[epochs == epoch], self.per_epoch, keys)
        file = np.searchsorted(self.ends, index, side="right")
        first = np.where(file > 0, self.ends[file - 1], 0)
        return file, (index - first) * self.T

    def read(self, index: np.ndarray) -> np.ndarray:
        """Tokens of the samples, (k, T + 1) int64. Raises ValueError if one is not below vocab_size."""
        out = np.empty((len(index), self.T + 1), dtype=np.int64)
        for row, file, start in zip(out, *self.locate(index), strict=True):
            path = self.files[file]
            row[:] = self.open(path)[start : start + self.T + 1]
            if self.vocab_size is not None and row.max() >= self.vocab_size:
                bad = int(np.argmax(row >= self.vocab_size))
                raise ValueError(
                    f"{path}: token {row[bad]} at offset {start + bad} is not below vocab_size={self.vocab_size}; the "
                    f"shard is damaged or was made with another encoding than the model's; {_rebuild(path)}"
                )
        return out


def _host_batch(samples: Samples, offset: int, B: int, device: torch.device, position: int) -> torch.Tensor:
    """Inputs and targets of the B samples from position + offset on, (2, B, T) int64, pinned if for CUDA."""
    import torch

    tokens = samples.read(np.arange(B) + (position + offset))
    batch = torch.from_numpy(np.stack((tokens[:, :-1], tokens[:, 1:])))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: pinning would otherwise open a context on GPU 0
        batch = batch.pin_memory()
    return batch


def _prefetch(
    make: Callable,
    position: int,
    step: int,
    batches: queue.Queue,
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Body of the background thread: puts batch after batch, as slots come free, or the exception that ends it."""
    while slots.acquire() and not stop.is_set():
        try:
            batches.put(make(position))
        except BaseException as error:
            batches.put(error)
            return
        position += step


def _stop_thread(stop: threading.Event, slots: threading.Semaphore) -> None:
    stop.set()
    slots.release()


class DistributedDataLoader:
    """Endless batches of a data set, the same stream for any number of ranks, B and accumulation.

    pattern     glob pattern, folder (its train shards) or list of files
    shuffle     True: the order is a pure function of (tokens, T, seed, global sample index). Each call on all
                ranks together takes the next B * world_size samples, rank r the r-th B of them.
                False: llm.c's order. Batches follow one another through each shard, and what is left at its
                end is skipped when too short for a batch of all ranks and one token; after the last shard comes
                the first. (llm.c's ranks each look at their own position there; here all leave a shard together.)
    vocab_size  every token read must be below it
    prefetch    batches kept ready by a background thread; 0: none, read when asked

    Raises ValueError for wrong arguments, damaged shards or too little data; FileNotFoundError for none.
    """

    def __init__(
        self,
        pattern: str | os.PathLike | Sequence[str],
        B: int,
        T: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 1337,
        device: str | torch.device = "cpu",
        vocab_size: int | None = None,
        prefetch: int = 2,
    ):
        import torch

        if B < 1 or T < 1 or prefetch < 0 or seed < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"B={B}, T={T} must be positive, prefetch={prefetch}, seed={seed} not negative, and rank={rank} one "
                f"of world_size={world_size}"
            )
        files = find_shards(pattern) if isinstance(pattern, str | os.PathLike) else list(pattern)
        if not files:
            raise FileNotFoundError(
                "the list of shards is empty; make some with `python fineweb.py --out FOLDER`"
            )
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.samples = Samples(files, T, seed, shuffle, B * world_size, vocab_size)
        if self.samples_per_epoch < B * world_size:
            raise ValueError(
                f"too little data: one batch of B={B} x world_size={world_size} samples needs "
                f"{B * world_size * T + 1} tokens in a row (B * world_size * T + 1, T={T}), and the {len(files)} "
                f"shard(s) from {files[0]} on have {self.num_tokens} in all, {self.samples_per_epoch} such samples; "
                "lower B or T, or make more data with fineweb.py"
            )
        self.prefetch, self.position = prefetch, 0  # in global samples, handed out by all ranks together
        self._make = functools.partial(_host_batch, self.samples, rank * B, B, self.device)
        self._stop: Callable | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return self.samples.num_tokens

    @property
    def samples_per_epoch(self) -> int:
        """Samples of T tokens that one pass over the data gives to all ranks together."""
        return self.samples.per_epoch

    def locate(self, global_sample: int) -> tuple[str, int]:
        """(file, offset of the first token) of a sample, to look at the text behind a strange batch."""
        file, offset = self.samples.locate(np.array([global_sample]))
        return self.samples.files[file[0]], int(offset[0])

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y), each (B, T) int64 on the device; y is x one token later.

        Raises ValueError for a token outside the vocabulary and OSError for an unreadable shard; the position
        stays where it was.
        """
        if self.prefetch == 0:
            batch = self._make(self.position)
        else:
            if self._stop is None:
                self._start()
            batch = self._batches.get()
            if isinstance(batch, BaseException):
                self._halt()
                raise batch
            self._slots.release()
        self.position += self.B * self.world_size
        x, y = batch.to(self.device, non_blocking=True)
        return x, y

    def _start(self) -> None:
        self._batches, self._slots = queue.SimpleQueue(), threading.Semaphore(self.prefetch)
        stop = threading.Event()
        step = self.B * self.world_size
        args = (self._make, self.position, step, self._batches, self._slots, stop)
        threading.Thread(target=_prefetch, args=args, daemon=True, name="prefetch").start()
        # The thread knows nothing of self, so that a loader that is forgotten, or the process's end, ends it.
        self._stop = weakref.finalize(self, _stop_thread, stop, self._slots)

    def _halt(self) -> None:
        if self._stop is not None:
            self._stop()
        self._stop = None

    def reset(self) -> None:
        """Start over, as before each validation."""
        self._halt()
        self.position = 0

    def state_dict(self) -> dict:
        """Position (global samples handed out, whatever has been prefetched) and what identifies the stream."""
        return {"position": self.position, "data": dict(self.samples.fingerprint)}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken, by any number of ranks. Raises ValueError if the stream is another."""
        for field, value in self.samples.fingerprint.items():
            if state["data"].get(field) != value:
                raise ValueError(
                    f"cannot go on: the data loader was saved with {field}={state['data'].get(field)!r}, but here "
                    f"{field}={value!r} ({self.samples.files[0]}, ...); give it the data and settings it had"
                )
        self._halt()
        self.position = int(state["position"])


# ----------------------------------------------------------------------------------------------------------
# DEMO CORPUS


def demo_documents() -> Iterator[str]:
    """Prose that every Python carries: the language's help topics and each standard module's docstrings.

    About 1.8 MB, in the same order every time for one version of Python; nothing is imported or run. Paragraphs
    that say again what came before are left out (docstrings are copied from module to module, and help topics
    contain one another), so that a document held out for validation has no twin in training.
    Raises FileNotFoundError if this Python came without its library's sources.
    """
    library = sysconfig.get_paths()["stdlib"]
    skip = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
    seen: set[tuple[str, ...]] = set()
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - skip)
        for name in sorted(names):
            if not name.endswith(".py"):
                continue
            with open(os.path.join(folder, name), "rb") as file:
                try:
                    tree = ast.parse(file.read())
                except (SyntaxError, ValueError):
                    continue
            if name == "topics.py" and os.path.basename(folder) == "pydoc_data":
                texts = [
                    t
                    for n in tree.body
                    if isinstance(n, ast.Assign)
                    for t in ast.literal_eval(n.value).values()
                ]
            else:
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
                texts = ["\n\n".join(s for s in strings if s)]
            documents = (_only_new(text, seen) for text in texts)
            yield from (document for document in documents if document)
    if not seen:
        raise FileNotFoundError(
            f"the demo corpus needs the standard library's .py files, and {library} has none"
        )


def _only_new(text: str, seen: set[tuple[str, ...]]) -> str:
    """The paragraphs of `text` of which at least half the runs of eight words are not yet in `seen`."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"\w+", paragraph.lower())
        runs = {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}
        if words and 2 * len(runs - seen) >= len(runs):
            kept.append(paragraph.strip("\n"))
        seen |= runs
    return "\n\n".join(kept)


def prepare_demo(out: str | os.PathLike = "demo_data", encoding: str = "bytes") -> dict:
    """Write the demo corpus as one train and one validation shard; returns its meta.json.

    Which documents are validation (the first twentieth of the bytes in the order of the documents' hashes) does
    not depend on anything else. What is there already is kept. Raises ValueError if `out` holds other data.
    """
    out, path = os.fspath(out), os.path.join(os.fspath(out), "meta.json")
    source = f"demo corpus of Python {sys.version.split()[0]}"
    old = load_metas(out).get(path) if os.path.isdir(out) else None
    if old and (not str(old.get("source")).startswith("demo corpus") or old["encoding"] != encoding):
        raise ValueError(
            f"{out} holds {old['encoding']} tokens of {old.get('source')!r}; give the demo another --out"
        )
    if old and old["source"] == source and all_there(out, old):
        return old
    documents = list(demo_documents())
    held_out, room = set(), sum(map(len, documents)) // 20
    for document in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if room > 0:
            held_out.add(document)
            room -= len(document)
    codec = get_encoding(encoding)
    os.makedirs(out, exist_ok=True)
    shards = {}
    for split in ("train", "val"):
        pieces = [(True, text) for text in documents if (text in held_out) == (split == "val")]
        tokens = encode_pieces(encoding, pieces)
        write_shard(os.path.join(out, f"{split}_000000.bin"), tokens)
        shards[f"{split}_000000.bin"] = len(tokens)
    meta = describe(codec, shards, True) | {"source": source, "documents": len(documents)}
    write_atomically(path, json.dumps(meta, indent=1).encode())
    print(f"{out}: {source}, {len(documents)} documents, {meta['tokens']['train']:,} {encoding} tokens for training, "
          f"{meta['tokens']['val']:,} of {len(held_out)} other documents for validation")  # fmt: skip
    return meta


def describe(encoding: tiktoken.Encoding, shards: dict[str, int], complete: bool) -> dict:
    """What every meta.json says."""
    counts = {
        split: sum(n for name, n in shards.items() if name.startswith(split)) for split in ("train", "val")
    }
    return {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "tokens": counts,
        "shards": shards,
        "complete": complete,
    }


def all_there(out: str, meta: dict) -> bool:
    """Whether every shard that a finished meta.json lists exists and is whole."""
    return meta["complete"] and all(
        count_tokens(os.path.join(out, name)) == n for name, n in meta["shards"].items()
    )


def count_tokens(path: str) -> int:
    """Tokens in a shard; 0 if it is missing or damaged."""
    try:
        return len(read_shard(path))
    except (FileNotFoundError, ValueError):
        return 0


# ----------------------------------------------------------------------------------------------------------
# SOURCES


def _flag(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Job:
    """What a run of the script does: its flags. All but the last three decide which bytes come out."""

    source: str = _flag(
        FINEWEB, "file or folder of .txt .jsonl .jsonl.gz .jsonl.zst .parquet, or Hub dataset"
    )
    subset: str | None = _flag(None, "of a Hub dataset; FineWeb-Edu's is sample-10BT")
    split: str = _flag("train", "of a Hub dataset")
    revision: str | None = _flag(None, "of a Hub dataset: branch, tag or commit")
    text_field: str = _flag("text", "where .jsonl, .parquet and Hub datasets keep the text")
    encoding: str | None = _flag(
        None, "bytes, or one of tiktoken's up to 65,536 ids; gpt2, for the demo bytes"
    )
    shard_size: int = _flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = _flag(None, "tokens at the start kept for validation; shard_size if not given")
    limit_docs: int | None = _flag(None, "stop after so many documents")
    num_parts: int = _flag(1, "machines that share the work")
    part: int = _flag(0, "which of them this is, from 0; part 0 writes the validation shard")
    out: str | None = _flag(
        None, "folder of the shards; FineWeb-Edu's is edu_fineweb10B, the demo's demo_data"
    )
    workers: int | None = _flag(None, "tokenising processes; one a core if not given")
    demo: bool = _flag(False, "prose that every Python carries, in place of a source")


# How far reading has come. A reader that starts from a copy repeats nothing and leaves nothing out.
START = {"file": 0, "at": 0, "read": 0, "seen": 0, "documents": 0, "empty": 0, "replaced": 0}


def read_txt(path: str, at: int) -> Iterator[tuple[bool, int, str, int]]:
    """(begins the document, bytes read, text, bytes read) of pieces of a .txt file, which is one document.

    It is cut so that it need not fit into memory and yet has the tokens of the whole: between an ASCII letter and
    a space or line feed, across which no encoding of tiktoken's has a token or looks back. What has no such place
    is one piece.
    """
    with open(path, "rb") as file:
        file.seek(at)
        begins, held = at == 0, bytearray()
        while chunk := file.read(TASK_CHARS):
            fresh = max(1, len(held))
            held += chunk
            ends = (
                i
                for i in range(len(held) - 1, fresh - 1, -1)
                if held[i] in b" \n" and held[i - 1 : i].isalpha()
            )
            if end := next(ends, 0):
                at += end
                yield begins, at, held[:end].decode("utf-8", "surrogateescape"), at
                begins = False
                del held[:end]
        if held or begins:
            at += len(held)
            yield begins, at, held.decode("utf-8", "surrogateescape"), at


def read_jsonl(path: str, at: int, field: str) -> Iterator[tuple[bool, int, str, int]]:
    """(True, lines read, text, bytes read) of the lines of a .jsonl, .jsonl.gz or .jsonl.zst file."""
    with open(path, "rb") as file:
        lines = file
        if not path.endswith(".jsonl"):
            import pyarrow  # unlike the zstandard module, it notices a truncated file

            kind = "gzip" if path.endswith(".gz") else "zstd"
            lines = io.BufferedReader(pyarrow.CompressedInputStream(file, kind), 1 << 20)
        for number, line in enumerate(lines, 1):
            if number > at and line.strip():
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not a JSON object ({error})") from error
                yield True, number, text_of(record, field, where), file.tell()


def read_parquet(path: str, at: int, field: str) -> Iterator[tuple[bool, int, str, int]]:
    """(True, rows read, text, bytes read) of the rows of a .parquet file."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        text_of(dict.fromkeys(table.schema_arrow.names), field, path)
        if table.schema_arrow.field(field).type not in (pyarrow.string(), pyarrow.large_string()):
            raise ValueError(f"{path}: the field {field!r} is not text")
        row, size = 0, os.path.getsize(path)
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row + count <= at:
                row += count
                continue
            for batch in table.iter_batches(1000, [group], [field]):
                for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if row > at:
                        text = (raw or b"").decode("utf-8", "surrogateescape")
                        yield True, row, text, size * row // table.metadata.num_rows


def text_of(record: object, field: str, where: str) -> str:
    """The text in a record. Raises ValueError that names the fields there are."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: expected an object with the field {field!r}, found {type(record).__name__}"
        )
    if field not in record:
        raise ValueError(
            f"{where}: no field {field!r} among {', '.join(map(repr, record))}; choose with --text_field"
        )
    if not isinstance(record[field], str | None):
        raise ValueError(f"{where}: the field {field!r} holds {type(record[field]).__name__}, not text")
    return record[field] or ""


def take(job: Job, place: dict) -> bool:
    """Count a document; whether it is this part's."""
    mine = place["seen"] % job.num_parts == job.part
    place["seen"] += 1
    place["documents"] += mine
    return mine


def clean(text: str, place: dict) -> str:
    """`text` with U+FFFD, counted, for invalid UTF-8 (here as surrogate escapes) and JSON's lone surrogates."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        known = text.count("\ufffd")
        text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        place["replaced"] += text.count("\ufffd") - known
        return text


def find_files(path: str) -> list[str]:
    """Files of text in a folder and below it, or the file itself. Raises ValueError if there are none."""
    suffixes = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
    below = (
        glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
        if os.path.isdir(path)
        else [path]
    )
    files = sorted(file for file in below if file.endswith(suffixes) and os.path.isfile(file))
    if not files:
        raise ValueError(f"source={path!r} is not, and does not hold, a file named {', '.join(suffixes)}")
    return files


def read_local(job: Job, files: list[str], place: dict) -> Iterator[tuple[bool, str]]:
    """(begins a document, text) from `place` on, which is kept at what has been yielded.

    Raises ValueError naming file and line for what cannot be read.
    """
    mine, before = True, sum(map(os.path.getsize, files[: place["file"]]))
    for path in files[place["file"] :]:
        try:
            if path.endswith(".txt"):
                pieces = read_txt(path, place["at"])
            else:
                read = read_parquet if path.endswith(".parquet") else read_jsonl
                pieces = read(path, place["at"], job.text_field)
            for begins, at, text, read_bytes in pieces:
                if begins:
                    if place["seen"] == job.limit_docs:
                        return
                    mine = take(job, place)
                place["at"], place["read"] = at, before + read_bytes
                if mine:
                    text = clean(text, place)
                    if not begins or text.strip():
                        yield begins, text
                    else:
                        place["empty"] += 1
        except OSError as error:  # ArrowInvalid, for .parquet, is a ValueError that does not name the file
            raise ValueError(f"{path} cannot be read: {error}") from error
        before += os.path.getsize(path)
        place["file"], place["at"] = place["file"] + 1, 0


def read_hub(job: Job, place: dict) -> tuple[Iterator[tuple[bool, str]], int | None]:
    """As read_local, of a dataset on the Hub, streamed; and how many documents it has, where that is known.

    With several parts each takes its own of the dataset's files where there are enough of them, so that nothing
    is downloaded twice, and else every num_parts-th document. Raises OSError (no such dataset, no network) or
    ValueError (no such subset, split or field).
    """
    import datasets

    data = datasets.load_dataset(
        job.source, job.subset, split=job.split, revision=job.revision, streaming=True
    )
    total = None
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # info.splits: not every dataset has it
        total = data.info.splits[job.split].num_examples // job.num_parts
    if job.num_parts > 1 and data.num_shards >= job.num_parts:
        data = data.shard(job.num_parts, job.part)
        job = replace(job, num_parts=1, part=0)
    if "hub" in place:
        data.load_state_dict(place["hub"])

    def stream() -> Iterator[tuple[bool, str]]:
        for record in data:
            if place["seen"] == job.limit_docs:
                return
            mine = take(job, place)
            place["hub"], place["read"] = data.state_dict(), place["documents"]
            text = clean(text_of(record, job.text_field, job.source), place) if mine else ""
            if text.strip():
                yield True, text
            else:
                place["empty"] += mine

    return stream(), total


# ----------------------------------------------------------------------------------------------------------
# TOKENISING


def encode_pieces(name: str, pieces: list[tuple[bool, str]]) -> np.ndarray:
    """Tokens of (begins a document, text) pieces, uint16."""
    encoding = get_encoding(name)
    begin = np.array([encoding.eot_token], dtype=np.uint16)
    arrays = [a for begins, text in pieces for a in ([begin] if begins else []) + [encode(encoding, text)]]
    return np.concatenate(arrays)


def cut_tasks(
    stream: Iterator[tuple[bool, str]], place: dict
) -> Iterator[tuple[dict, list[tuple[bool, str]]]]:
    """(copy of `place` before them, pieces), TASK_CHARS characters at a time."""
    start, pieces, size = dict(place), [], 0
    for piece in stream:
        pieces.append(piece)
        size += len(piece[1])
        if size >= TASK_CHARS:
            yield start, pieces
            start, pieces, size = dict(place), [], 0
    if pieces:
        yield start, pieces


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_tasks(tasks: Iterator, name: str, workers: int) -> Iterator[tuple[dict, np.ndarray]]:
    """(place before them, tokens) of the tasks, in their order, by `workers` processes.

    Processes, because documents are short and threads would spend their time waiting for the interpreter's lock;
    an executor, because a Pool reads the whole source into memory and waits forever for a worker that died.
    """
    if workers == 1:
        yield from ((place, encode_pieces(name, pieces)) for place, pieces in tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
        running: deque = deque()
        try:
            for place, pieces in tasks:
                running.append((place, pool.submit(encode_pieces, name, pieces)))
                if len(running) > 3 * workers:
                    place, future = running.popleft()
                    yield place, future.result()
            for place, future in running:
                yield place, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class ShardWriter:
    """Cuts a stream of tokens into shards and notes in meta.json where in the source each of them begins.

    Before shard n gets its name, the places of n and n + 1 are in meta.json: however many whole shards a kill
    leaves, the place of the next is known. Without meta.json everything is read again, and what comes out must
    equal what is there. A shard is written only when more tokens follow, so that a source that is too small
    leaves nothing behind.
    """

    def __init__(self, job: Job, settings: dict):
        self.job, self.settings, self.encoding = job, settings, get_encoding(job.encoding)
        self.prefix = f"p{job.part:04d}_" if job.num_parts > 1 else ""
        self.val_tokens = 0 if job.part else job.val_tokens
        os.makedirs(job.out, exist_ok=True)
        self.meta_path = os.path.join(job.out, f"meta_{self.prefix}"[:-1] + ".json")
        metas = loadload_metas(job.out)
        for path, meta in metas.items():
            for field, value in settings.items():
                other = (meta | meta.get("settings", {})).get(field)
                if other != value and (field != "part" or path == self.meta_path):
                    raise ValueError(
                        f"{job.out} was made with {field}={other!r} ({path}), but now {field}={value!r}: start with "
                        "the settings it was made with, or give another --out, or delete the folder"
                    )
        self.old = metas.get(self.meta_path, {})
        for name in (f"*_{self.prefix}[0-9]*.bin", os.path.basename(self.meta_path)):  # left by a kill
            for temporary in glob.glob(os.path.join(glob.escape(job.out), f"{name}.*.tmp")):
                os.unlink(temporary)
        self.n, self.filled = 0, 0  # shards done, tokens of the next one
        self.buffer = np.empty(max(job.shard_size, self.val_tokens), dtype=np.uint16)

    def path(self, n: int) -> str:
        """Where the n-th shard goes."""
        val = int(self.val_tokens > 0)
        split, number = ("val", n) if n < val else ("train", n - val)
        return os.path.join(self.job.out, f"{split}_{self.prefix}{number:06d}.bin")

    def size(self, n: int) -> int:
        """Tokens of the n-th shard, unless it is the last."""
        return self.val_tokens if n == 0 and self.val_tokens else self.job.shard_size

    def resume(self) -> tuple[dict, int]:
        """(place to read on from, tokens to leave out from there) of the first shard that is missing or damaged."""
        while count_tokens(self.path(self.n)) == self.size(self.n):
            self.n += 1
        if str(self.n) not in self.old.get("places", {}):
            self.n = 0
        self.start = self.old.get("places", {}).get(str(self.n), [dict(START), 0])
        return dict(self.start[0]), self.start[1]

    def add(self, tokens: np.ndarray, place: dict, used: int) -> None:
        """Append tokens[used:]; `place` is where tokens[0] was read."""
        while used < len(tokens):
            if self.filled == self.size(self.n):
                self._flush([place, used])
            count = min(len(tokens) - used, self.size(self.n) - self.filled)
            self.buffer[self.filled : self.filled + count] = tokens[used : used + count]
            self.filled, used = self.filled + count, used + count

    def finish(self, place: dict) -> dict:
        """Write the last shard and the final meta.json, which is returned. Raises ValueError for too little text."""
        if self.n == 0 and (self.val_tokens or not self.filled):
            raise ValueError(
                f"{self.job.source} gives {self.filled} tokens in {place['documents']} documents, too few: validation "
                f"takes val_tokens={self.val_tokens} and training needs some too; pass --val_tokens {self.filled // 10}"
            )
        last = self.filled
        self._flush(None)
        counts = {
            "documents": place["documents"],
            "empty_documents": place["empty"],
            "replaced": place["replaced"],
        }
        return self._write_meta(counts, last)

    def _flush(self, following: list | None) -> None:
        path, tokens = self.path(self.n), self.buffer[: self.filled]
        if not self.old and count_tokens(path) and not np.array_equal(read_shard(path), tokens):
            raise ValueError(f"{path} holds other tokens, and no meta.json says why: give another --out")
        if following:
            self._write_meta({"places": {self.n: self.start, self.n + 1: following}})
        write_shard(path, tokens)
        tqdm.write(f"{path}: {self.filled:,} tokens")
        self.n, self.filled, self.start = self.n + 1, 0, following

    def _write_meta(self, more: dict, last: int | None = None) -> dict:
        shards = {os.path.basename(self.path(n)): self.size(n) for n in range(self.n)}
        if last:
            shards[os.path.basename(self.path(self.n - 1))] = last
        meta = describe(self.encoding, shards, complete=last is not None)
        meta |= {"source": self.settings["source"], **more, "settings": self.settings}
        write_atomically(self.meta_path, json.dumps(meta, indent=1).encode())
        return meta


def build(job: Job) -> dict:
    """Turn a source into shards; returns their meta.json.

    Raises ValueError or FileNotFoundError for bad settings or data, OSError for a full disk or a lost network.
    """
    job = check(job)
    settings = {f.name: getattr(job, f.name) for f in fields(Job) if f.name not in ("out", "workers", "demo")}
    local = os.path.exists(job.source)
    if local:
        files = find_files(job.source)
        total = sum(map(os.path.getsize, files))
        settings |= {"source": os.path.basename(os.path.abspath(job.source))}
        settings |= {"source_files": len(files), "source_bytes": total}
    writer = ShardWriter(job, settings)
    if all_there(job.out, writer.old):
        print(f"{job.out} is complete already")
        return writer.old
    place, skip = writer.resume()
    if writer.n:
        print(f"{job.out}: going on after {writer.n} complete shards")
    if local:
        stream = read_local(job, files, place)
    else:
        stream, total = read_hub(job, place)
    begun, before = time.perf_counter(), writer.n
    unit = "B" if local else "doc"
    with (
        tqdm(
            total=total, unit=unit, unit_scale=True, desc="source", initial=place["read"], disable=None
        ) as source_bar,
        tqdm(total=0, unit="tok", unit_scale=True, disable=None) as shard_bar,
        contextlib.closing(encode_tasks(cut_tasks(stream, place), job.encoding, job.workers)) as tasks,
    ):
        for start, tokens in tasks:
            used = min(skip, len(tokens))
            skip -= used
            writer.add(tokens, start, used)
            source_bar.update(place["read"] - source_bar.n)
            if writer.n != before or not shard_bar.total:
                before = writer.n
                shard_bar.reset(total=writer.size(before))
                shard_bar.set_description(os.path.basename(writer.path(before)))
            shard_bar.update(writer.filled - shard_bar.n)
        meta = writer.finish(place)
    seconds = time.perf_counter() - begun
    print(
        f"{job.out}: {meta['documents']:,} documents ({meta['empty_documents']:,} empty, {meta['replaced']:,} invalid "
        f"characters replaced), {meta['tokens']['train']:,} tokens for training, {meta['tokens']['val']:,} for "
        f"validation; this run took {seconds:.1f} s"
    )
    return meta


def check(job: Job) -> Job:
    """The job with its defaults filled in. Raises ValueError, FileNotFoundError."""
    fineweb = job.source == FINEWEB
    job = replace(
        job,
        subset=job.subset or (FINEWEB_SUBSET if fineweb else None),
        out=job.out or ("edu_fineweb10B" if fineweb else None),
        encoding=job.encoding or "gpt2",
        val_tokens=job.shard_size if job.val_tokens is None else job.val_tokens,
        workers=len(os.sched_getaffinity(0)) if job.workers is None else job.workers,
    )
    for name, least in {
        "shard_size": 1,
        "val_tokens": 0,
        "limit_docs": 1,
        "workers": 1,
        "num_parts": 1,
    }.items():
        value = getattr(job, name)
        if value is not None and not least <= value < 1 << 31:
            raise ValueError(f"{name}={value} must be at least {least} and below 2147483648")
    if not 0 <= job.part < job.num_parts:
        raise ValueError(f"part={job.part} must be from 0 to num_parts - 1 = {job.num_parts - 1}")
    if job.out is None:
        raise ValueError(
            f"out is not given: where shall the shards of source={job.source!r} go? Pass --out FOLDER"
        )
    if not os.path.exists(job.source) and not re.fullmatch(r"[\w-]+(/[\w.-]+)?", job.source):
        raise FileNotFoundError(f"source={job.source!r} does not exist, and is not the name of a Hub dataset")
    return job


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 bad settings or data, 130 and 143 stopped by a signal, 1 else."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag in fields(Job):
        kind = (
            {"action": "store_true"} if flag.name == "demo" else {"type": int if "int" in flag.type else str}
        )
        parser.add_argument(f"--{flag.name}", default=flag.default, help=flag.metadata["help"], **kind)
    job = Job(**vars(parser.parse_args(argv)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if job.demo:
            prepare_demo(job.out or "demo_data", job.encoding or "bytes")
        else:
            build(job)
        return 0
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, BrokenProcessPool) as error:
        print(f"stopped: {error!r}. The same command goes on after the last complete shard", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped. The same command goes on after the last complete shard", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
