"""Are these still the same files? A fingerprint, made from a few blocks, tells files of the same size apart.

Checkpoints keep the fingerprints of shards (shards.py), meta.json those of sources (shard_writer.py)."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tokens.files import check_regular

BLOCK = 512  # bytes: 256 tokens
MOST_BLOCKS, FEWEST_BLOCKS, ALL_BLOCKS = 64, 8, 2048  # read of one file; of one of many; of all together
DIGITS = 8  # of a fingerprint
DEFAULTS = dict(split="train", text_field="text", shard_size=100_000_000, num_parts=1, part=0)  # fineweb.py's


def fingerprint(file: BinaryIO, start: int, size: int, files: int = ALL_BLOCKS) -> str:
    """Digits of the SHA-256 of `size` and of blocks spread evenly over the `size` bytes from `start` on.
    files: how many files the data has; with more than 32, fewer than 64 blocks of each are read."""
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
            wrong = f"{file} is another shard: sha256={now!r} of some blocks, not {was!r}"
            raise ValueError(f"the data loader cannot continue: {wrong}; use the data of the saved run")


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
    """(name, now, before) of the first setting or source file that differs; None. Times may differ."""
    found = []
    for name, value in now.items():
        if name != "files":
            found.append((name, value, before.get(name)))
        elif name in before:  # older meta.json do not describe source files
            ours, theirs = ({k: v.rpartition(", ")[0] for k, v in s[name].items()} for s in (now, before))
            for path in ours | theirs:
                found.append((f"source file {path!r}", *(s.get(path, "missing") for s in (ours, theirs))))
    return next((triple for triple in found if triple[1] != triple[2]), None)


def fineweb_command(folder: str, out: str = "", file: str | os.PathLike = "", **changes: object) -> str:
    """The fineweb.py command that makes a folder again, by the settings in its meta.json. It names a source
    without its folder, as meta.json does; an unknown source is TEXT. out, changes: another folder, other
    values of its flags. file: one of the folder, if several machines have made it: that machine's command."""
    is_fineweb = os.path.basename(os.path.abspath(folder)) == "edu_fineweb10B"  # fineweb.py needs no --source
    flags: dict = {} if is_fineweb else {"source": "TEXT"}
    with contextlib.suppress(ValueError, OSError):
        part, metas = re.search(r"_p\d{4}", os.path.basename(file)), load_metas(folder)
        own = [meta for path, meta in metas.items() if part and part[0] in os.path.basename(path)]
        flags = [*own, *metas.values(), {}][0].get("settings", flags)
    is_demo = str(flags.get("source")).startswith("demo corpus")
    flags |= changes | ({"source": None} if is_demo else {})
    flags = {k: v for k, v in flags.items() if not k.startswith(("files", "source_"))}
    if str(flags.get("encoding")).startswith("tokenizer:"):
        own = None if flags.get("train_tokenizer") else os.path.join(folder, "tokenizer.json")
        flags |= {"encoding": None, "tokenizer": own}
    flags = {k: v for k, v in flags.items() if v not in (None, DEFAULTS.get(k))}
    each = [(k, v) for k, values in flags.items() for v in (values if isinstance(values, list) else [values])]
    words = [f"--{k}={v}" for k, v in each] + ["--demo"] * is_demo
    return shlex.join(["python", "fineweb.py", *words, "--out", out or folder])


def load_metas(folder: str) -> dict[str, dict]:
    """meta.json of a folder, or all machines' (meta_p0000.json), by path. ValueError: damaged, or unlike."""
    metas, base = {}, os.path.join(glob.escape(folder), "meta")
    for path in sorted(glob.glob(f"{base}.json") + glob.glob(f"{base}_p[0-9]*.json")):
        try:
            check_regular(path)
            metas[path] = json.loads(Path(path).read_text(encoding="utf-8"))
            _check_meta(metas[path])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            cure = f"delete it, and run `python fineweb.py --out {shlex.quote(folder)}` with its settings"
            raise ValueError(f"{path} is damaged ({repr(error)[:200]}); {cure}") from error
    for path, meta in metas.items():
        first = next(iter(metas))
        if found := first_difference(_common(metas[first]), _common(meta)):
            wrong = f"{found[0]} is {found[1]!r:.99} in {first} but {found[2]!r:.99} in {path}"
            cure = "delete the wrong one with its shards and remake it"
            raise ValueError(f"{wrong}: parts need the same sources and settings; {cure}")
    return metas


def _common(meta: dict) -> dict:
    """What must be equal in the meta.json of all parts."""
    vocabulary = {name: meta[name] for name in ("encoding", "vocab_size", "eot_token")}
    return {**vocabulary, **meta.get("settings", {}), "part": None}


def _check_meta(meta: dict) -> None:
    """Raises one of the errors that load_metas catches if an entry of a meta.json is of the wrong kind."""
    kinds = dict(encoding=str, vocab_size=int, tokens=dict, shards=dict, complete=bool)
    optional = dict(source=str, settings=dict, checksums=dict, samples=dict, places=dict)
    for name, kind in [*kinds.items(), *((name, optional[name]) for name in optional if name in meta)]:
        if type(meta[name]) is not kind:
            raise TypeError(f"{name} is {meta[name]!r}")
    counts = [*meta["tokens"].values(), *meta["shards"].values()]
    for position, skip in meta.get("places", {}).values():
        counts += [skip, *(value for name, value in position.items() if name != "hub")]
    texts = [*meta.get("checksums", {}).values(), *meta.get("samples", {}).values()]
    texts += meta.get("settings", {}).get("files", {}).values()
    if {*map(type, counts)} - {int} or {*map(type, texts)} - {str} or min(counts, default=0) < 0:
        raise TypeError("a number of tokens, place, checksum or source file of the wrong kind")
    end = meta["eot_token"] if meta["eot_token"] is not None else 0  # None: no token precedes documents
    if not 0 <= end < meta["vocab_size"] < 1 << 31:
        raise ValueError(f"eot_token is {meta['eot_token']}, vocab_size is {meta['vocab_size']}")
    if any(name != os.path.basename(name) for name in meta["shards"]):
        raise ValueError("shards has a name with a folder")
