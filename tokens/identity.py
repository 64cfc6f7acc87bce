"""Are these still the same files? A fingerprint tells a file from another of the same name and size.

Checkpoints keep the fingerprints of shards (tokens/shards.py), meta.json those of sources (shard_writer.py).
A fingerprint reads a few blocks only. `python fineweb.py --verify --out FOLDER` compares every token.
"""

import contextlib
import glob
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tokens.files import check_regular

BLOCK = 512  # bytes: 256 tokens
MOST_BLOCKS, FEWEST_BLOCKS, ALL_BLOCKS = 64, 8, 2048  # read of one file; of one of many; of all together
DIGITS = 8  # of a fingerprint
DEFAULTS = dict(split="train", text_field="text", shard_size=100_000_000, num_parts=1, part=0)  # fineweb.py's


def fingerprint(file: BinaryIO, start: int, size: int, files: int) -> str:
    """Digits of the SHA-256 of `size` and of blocks spread evenly over the `size` bytes from `start` on.

    files: how many files the data has; with more than 32, fewer than 64 blocks of each are read.
    """
    blocks = min(MOST_BLOCKS, max(FEWEST_BLOCKS, ALL_BLOCKS // files))
    digest = hashlib.sha256(str(size).encode())
    for at in range(0, size, max(BLOCK, size // blocks)):
        file.seek(start + at)
        digest.update(file.read(min(BLOCK, size - at)))
    return digest.hexdigest()[:DIGITS]


def check_fingerprints(files: Sequence[str], here: str, saved: object) -> None:
    """ValueError, naming the first shard that differs. here, saved: the fingerprints of all files, joined."""
    for i, file in enumerate([*files, "a shard that is missing here"]):
        now, was = (str(joined)[i * DIGITS : (i + 1) * DIGITS] for joined in (here, saved))
        if now != was:
            wrong = (
                f"{file} is another shard: sha256={now!r} of some of its blocks, {was!r} when it was saved"
            )
            raise ValueError(f"the data loader cannot continue: {wrong}; use the data of the saved run")


def sample_shard(tokens: BinaryIO, start: int, size: int) -> str:
    """The fingerprint of a shard's tokens from few blocks, cheap enough for each start of a run."""
    return fingerprint(tokens, start, size, files=ALL_BLOCKS)


def describe_sources(source: str, files: Sequence[str]) -> dict[str, str]:
    """Size, fingerprint and time of the last change of each file, by the name that it has beside `source`."""
    beside, found = os.path.dirname(os.path.abspath(source)), {}
    for path in files:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            digits = fingerprint(file, 0, status.st_size, len(files))
        content = f"{status.st_size} bytes, fingerprint {digits}"
        found[os.path.relpath(path, beside)] = f"{content}, changed at {status.st_mtime_ns} ns"
    return found


def first_difference(now: dict, before: dict) -> tuple[str, object, object] | None:
    """(name, value now, value before) of the first setting or source file that differs; None if all agree.

    A copy of a source, with another time of change, agrees. Older meta.json do not describe source files.
    """
    pairs = []
    for name, value in now.items():
        if name != "files":
            pairs.append((name, value, before.get(name)))
        elif name in before:
            ours, theirs = ({k: v.rpartition(", ")[0] for k, v in s[name].items()} for s in (now, before))
            for path in [*ours, *theirs]:
                pairs.append((f"source file {path!r}", *(s.get(path, "missing") for s in (ours, theirs))))
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def fineweb_command(folder: str, out: str = "", **changes: object) -> str:
    """The fineweb.py command that makes a folder again, by the settings in its meta.json. It names a source
    without its folder, as meta.json does. out, changes: another folder, other values of its flags."""
    flags: dict = {}
    with contextlib.suppress(ValueError, OSError):
        flags = next(iter(load_metas(folder).values()), {}).get("settings", {})
    is_demo = str(flags.get("source")).startswith("demo corpus")
    flags = ({} if is_demo else flags) | changes
    flags = {k: v for k, v in flags.items() if not k.startswith(("files", "source_"))}
    words = [f"--{k}={v}" for k, v in flags.items() if v not in (None, DEFAULTS.get(k))]
    words += ["--demo"] if is_demo and not changes else []
    return shlex.join(["python", "fineweb.py", *words, "--out", out or folder])


def load_metas(folder: str) -> dict[str, dict]:
    """Content by path of a folder's meta.json, or of every machine's (meta_p0000.json).

    Raises ValueError if one is damaged, or if two were made from different sources or settings.
    """
    metas, base = {}, os.path.join(glob.escape(folder), "meta")
    for path in sorted(glob.glob(f"{base}.json") + glob.glob(f"{base}_p[0-9]*.json")):
        try:
            check_regular(path)
            metas[path] = json.loads(Path(path).read_text(encoding="utf-8"))
            _check_meta(metas[path])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            again = f"`python fineweb.py --out {shlex.quote(folder)}` with the settings it was made with"
            cure = f"delete it, and run {again}"
            raise ValueError(f"{path} is damaged ({repr(error)[:200]}); {cure}") from error
    for path, meta in metas.items():
        first, *_ = metas
        if found := first_difference(_common(metas[first]), _common(meta)):
            name, ours, theirs = found
            cure = (
                "parts need the same sources and settings; delete the wrong one with its shards and remake it"
            )
            raise ValueError(f"{name} is {ours!r:.99} in {first} but {theirs!r:.99} in {path}: {cure}")
    return metas


def _common(meta: dict) -> dict:
    """What must be equal in the meta.json of all parts."""
    vocabulary = {name: meta[name] for name in ("encoding", "vocab_size", "eot_token")}
    return {**vocabulary, **meta.get("settings", {}), "part": None}


def _check_meta(meta: dict) -> None:
    """Raises one of the errors that load_metas catches if an entry of a meta.json is of the wrong kind."""
    kinds = dict(encoding=str, vocab_size=int, eot_token=int, tokens=dict, shards=dict, complete=bool)
    optional = dict(source=str, settings=dict, checksums=dict, samples=dict, places=dict)
    for name, kind in {**kinds, **{name: optional[name] for name in optional if name in meta}}.items():
        if type(meta[name]) is not kind:
            raise TypeError(f"{name} is {meta[name]!r}")
    counts = [*meta["tokens"].values(), *meta["shards"].values()]
    for position, skip in meta.get("places", {}).values():
        counts += [skip, *(value for name, value in position.items() if name != "hub")]
    texts = [*meta.get("checksums", {}).values(), *meta.get("samples", {}).values()]
    texts += meta.get("settings", {}).get("files", {}).values()
    if {*map(type, counts)} - {int} or {*map(type, texts)} - {str} or min(counts, default=0) < 0:
        raise TypeError("a number of tokens, place, checksum or source file of the wrong kind")
    if not 0 <= meta["eot_token"] < meta["vocab_size"] <= 1 << 16:
        raise ValueError(f"eot_token is {meta['eot_token']}, vocab_size is {meta['vocab_size']}")
    if any(name != os.path.basename(name) for name in meta["shards"]):
        raise ValueError("shards has a name with a folder")
