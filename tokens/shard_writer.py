"""Write tokens into shards. After a kill, the complete shards stay, and writing continues after them."""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from tqdm import tqdm

from tokens.encodings import dtype_of, get_encoding
from tokens.files import remove_temporaries, write_atomically
from tokens.identity import fineweb_command, fingerprint, first_difference, load_metas
from tokens.printable import printable
from tokens.shards import Shard, shard_header
from tokens.sources import START_POSITION


def count_tokens(path: str) -> int:
    """Tokens in a shard; 0 if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return len(Shard(path))
    return 0


def is_complete(folder: str, meta: dict) -> bool:
    """Whether a meta.json is final and all the shards it lists are whole."""
    whole = (count_tokens(os.path.join(folder, name)) == n for name, n in meta.get("shards", {}).items())
    return meta.get("complete", False) and all(whole)


def describe(encoding: Any, shards: dict[str, int], complete: bool) -> dict:
    """The entries of every meta.json; `shards` maps a file name to its number of tokens."""
    counts = {s: sum(n for name, n in shards.items() if name.startswith(s)) for s in ("train", "val")}
    vocabulary = {"encoding": encoding.name, "vocab_size": encoding.n_vocab, "eot_token": encoding.eot_token}
    return {**vocabulary, "tokens": counts, "shards": shards, "complete": complete}


def verify(folder: str) -> list[str]:
    """Compare all tokens with meta.json; a line per problem. FileNotFoundError; ValueError: bad meta.json."""
    if not (metas := load_metas(folder)):
        raise FileNotFoundError(f"{folder} has no meta.json to compare shards with; fineweb.py writes it")
    unfinished = [path for path, meta in metas.items() if not meta["complete"]]
    problems = [f"{path}: unfinished; run `{fineweb_command(folder, file=path)}`" for path in unfinished]
    shards = {name: count for meta in metas.values() for name, count in meta["shards"].items()}
    known = {name: digest for meta in metas.values() for name, digest in meta.get("checksums", {}).items()}
    for name in tqdm(shards, unit="shard", disable=None):
        path = os.path.join(folder, name)
        try:
            shard = Shard(path)
            digest = shard.checksum()
            if (len(shard), digest) != (shards[name], known.get(name, digest)):
                again = f"delete it and run `{fineweb_command(folder, file=name)}`"
                problems.append(f"{path}: its tokens are not those noted in meta.json; {again}")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    found = {name for name in os.listdir(folder) if name.endswith((".bin", ".npy"))}
    others = sorted(found - shards.keys() - known.keys())
    problems += [f"{folder}: {name!r} is not noted in meta.json; move it away" for name in others]
    print(f"{printable(folder)}: compared {len(shards)} shards, {sum(shards.values()):,} tokens")
    if older := len(shards.keys() - known.keys()):
        print(f"{older} of them have no checksum (an older fineweb.py made them): only sizes were compared")
    return problems


class ShardWriter:
    """Cuts a stream of tokens into shards, and notes in meta.json where in the source each of them begins.
    Before shard n gets its name, meta.json has the positions of n and n + 1, so that the position of the next
    shard is known after any kill. Without meta.json the source is read again, and must give the same shards.
    A shard is written only when more tokens follow, so that a source that is too small writes no file.
    settings: all that decides the tokens, at least "source" and "encoding". ValueError for other data."""

    def __init__(self, folder: str, settings: dict):
        self.folder, self.settings, self.encoding = folder, settings, get_encoding(settings["encoding"])
        self.dtype = np.dtype(dtype_of(self.encoding)).newbyteorder("<")
        self.part, self.num_parts = settings.get("part", 0), settings.get("num_parts", 1)
        self.prefix = f"p{self.part:04d}_" if self.num_parts > 1 else ""
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise ValueError(f"{folder} is no folder: give another --out")
        os.makedirs(folder, exist_ok=True)
        self.meta_path = os.path.join(folder, f"meta_{self.prefix}"[:-1] + ".json")
        metas = self._load_metas()
        for name in os.listdir(folder):
            ours = re.fullmatch(r"(train|val)_(p\d{4}_)?\d{6}\.bin", name)
            if name.endswith((".bin", ".npy")) and not ours:
                raise ValueError(f"{folder} holds {name}, which belongs to other data: give another --out")
        self.old = metas.get(self.meta_path, {})
        files, before = settings.get("files", {}), self.old.get("settings", {}).get("files", {})
        if any(before.get(name, text) != text for name, text in files.items()):
            tqdm.write("source files have other times of change, but equal fingerprints: taken for copies")
        meta_name = re.escape(os.path.basename(self.meta_path))
        ours = rf"(train|val)_{self.prefix}\d{{6}}\.bin|{meta_name}"
        remove_temporaries(folder, ours if self.prefix else rf"{ours}|tokenizer\.json")
        path, text = os.path.join(folder, "tokenizer.json"), getattr(self.encoding, "text", "").encode()
        if text and not (os.path.isfile(path) and Path(path).read_bytes() == text):
            write_atomically(path, lambda file: file.write(text))
        self.n, self.waiting = 0, TemporaryFile(dir=folder)  # of the current shard: number, its tokens so far

    def _load_metas(self) -> dict[str, dict]:
        """meta.json of all parts in the folder. ValueError if one was made from other data."""
        metas = load_metas(self.folder)
        for path, meta in metas.items():
            before = meta | meta.get("settings", {}) | ({} if path == self.meta_path else {"part": self.part})
            if found := first_difference(self.settings, before):
                name, now, was = found
                wrong = f"{self.folder} was made with {name}={was!r:.99} ({path}), but now {name}={now!r:.99}"
                cure = "give the settings it was made with, or another --out, or delete the folder"
                raise ValueError(f"{wrong}: {cure}")
        return metas

    def path(self, n: int) -> str:
        """File of the n-th shard."""
        split, number = ("val", n) if n < self.val_shards else ("train", n - self.val_shards)
        return os.path.join(self.folder, f"{split}_{self.prefix}{number:06d}.bin")

    def size(self, n: int) -> int:
        """Tokens of the n-th shard, unless it is the last."""
        return self.val_tokens if n < self.val_shards else self.shard_size

    @property
    def filled(self) -> int:
        """Tokens that the current shard has so far."""
        return self.waiting.tell() // self.dtype.itemsize

    def resume(self, val_tokens: int, shard_size: int) -> tuple[dict, int]:
        """(position, tokens to skip there) of the first shard that is missing or damaged: read from there."""
        self.val_tokens, self.shard_size = val_tokens, shard_size
        self.val_shards = int(self.part == 0 and val_tokens > 0)
        starts = self.old.get("places", {})
        while count_tokens(self.path(self.n)) == self.size(self.n):
            self.n += 1
        if str(self.n) not in starts:
            self.n = 0
        self.done = {os.path.basename(self.path(n)): self.size(n) for n in range(self.n)}  # tokens by name
        kept = [self.old.get(key, {}) for key in ("checksums", "samples")]  # an older version has neither
        self.checksums, self.samples = ({name: d[name] for name in self.done if name in d} for d in kept)
        self.start = starts.get(str(self.n), [dict(START_POSITION), 0])
        return dict(self.start[0]), self.start[1]

    def add(self, tokens: np.ndarray, position: dict, used: int) -> None:
        """Append tokens[used:]; `position` is where tokens[0] was read."""
        while used < len(tokens):
            if self.filled == self.size(self.n):
                self._flush([position, used])
            count = min(len(tokens) - used, self.size(self.n) - self.filled)
            self.waiting.write(tokens[used : used + count].astype(self.dtype, copy=False))
            used += count

    def finish(self, position: dict, source: str) -> dict:
        """Write the last shard and the final meta.json; return it. Raises ValueError for too little text."""
        if self.n == 0 and (self.val_shards or not self.filled):
            small = f"source={source!r} is too small (part {self.part} of {self.num_parts})"
            need = f"validation takes val_tokens={self.val_tokens}, pass less"
            found = f"{position['documents']} documents, {self.filled} tokens"
            raise ValueError(f"{small}: {found}; {need if self.filled else 'no text'}")
        self._flush(None)
        counts = {name: position[name] for name in ("documents", "empty", "replaced")}
        meta = self._write_meta(counts, complete=True)
        tokens = ", ".join(f"{n:,} {split} tokens" for split, n in meta["tokens"].items())
        texts = ", ".join(f"{name}: {n:,}" for name, n in counts.items())
        print(f"{printable(self.folder)}: {tokens}; {texts}")
        return meta

    def _flush(self, following: list | None) -> None:
        path, size = self.path(self.n), self.filled
        self.waiting.seek(0)
        digest = hashlib.file_digest(self.waiting, "sha256").hexdigest()
        if not self.old and count_tokens(path) and digest != Shard(path).checksum():
            raise ValueError(f"{path} holds other tokens, and there is no meta.json: give another --out")
        name = os.path.basename(path)
        self.checksums[name] = digest
        self.samples[name] = fingerprint(self.waiting, 0, self.dtype.itemsize * size)
        if following:
            self._write_meta({"places": {self.n: self.start, self.n + 1: following}}, complete=False)
        self.waiting.seek(0)
        head = shard_header(size, self.dtype)
        write_atomically(path, lambda file: (file.write(head), copyfileobj(self.waiting, file)))
        tqdm.write(f"{printable(path)}: {size:,} tokens")
        self.done[name] = size
        self.n, self.waiting, self.start = self.n + 1, TemporaryFile(dir=self.folder), following

    def _write_meta(self, more: dict, complete: bool) -> dict:
        meta = describe(self.encoding, self.done, complete)
        source = str(self.settings["source"])  # it may be a list
        meta |= {"source": source, "checksums": self.checksums, "samples": self.samples}
        meta |= more | {"settings": self.settings}
        self._load_metas()  # another part may have begun with other sources
        write_atomically(self.meta_path, lambda file: file.write(json.dumps(meta, indent=1).encode()))
        return meta
