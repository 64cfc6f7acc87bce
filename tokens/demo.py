"""The demo corpus: documentation that comes with Python, about 1.8 MB, to train without network."""

import ast
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator

import numpy as np

from tokens.encodings import encode_pieces
from tokens.identity import load_metas
from tokens.shard_writer import ShardWriter, is_complete

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SKIPPED_FOLDERS = set("test tests idlelib lib2to3 turtledemo site-packages dist-packages __pycache__".split())


def prepare_demo(folder: str | os.PathLike = "demo_data", encoding: str = "bytes") -> dict:
    """Write the demo corpus as two shards, if they are missing; return meta.json. ValueError: other data."""
    folder, corpus = os.fspath(folder), "demo corpus of Python"
    for meta in load_metas(folder).values():
        made = meta.get("source", "").startswith(corpus) and meta.get("encoding") == encoding
        if made and is_complete(folder, meta):
            return meta
    writer = ShardWriter(folder, {"source": f"{corpus} {sys.version.split()[0]}", "encoding": encoding})
    documents = list(demo_documents())
    held_out, room = set(), sum(map(len, documents)) // 20  # for validation, chosen by hash
    for text in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if room > 0:
            held_out.add(text)
            room -= len(text)
    val = encode_pieces([(True, text) for text in documents if text in held_out], encoding)
    train = encode_pieces([(True, text) for text in documents if text not in held_out], encoding)
    position, skip = writer.resume(val_tokens=len(val), shard_size=len(train))
    writer.add(np.concatenate((val, train)), position, skip)
    return writer.finish({**position, "documents": len(documents)}, corpus)


def demo_documents() -> Iterator[str]:
    """The language's help topics and the docstrings of each module of the standard library. Repeated
    paragraphs are left out, so that training has no copy of validation. Raises FileNotFoundError."""
    library = sysconfig.get_paths()["stdlib"]
    seen: set[tuple[str, ...]] = set()
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for path in sorted(os.path.join(folder, name) for name in names if name.endswith(".py")):
            try:
                with open(path, "rb") as file:
                    tree = ast.parse(file.read())
            except (SyntaxError, ValueError):
                continue
            if path.endswith(os.path.join("pydoc_data", "topics.py")):
                tables = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
                texts = [ast.literal_eval(text) for table in tables for text in table.values]
            else:
                nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
                texts = ["\n\n".join(filter(None, map(ast.get_docstring, nodes)))]
            yield from filter(None, (_without_repeats(text, seen) for text in texts))
    if not seen:
        raise FileNotFoundError(f"the demo corpus needs the standard library's .py files; {library} has none")


def _without_repeats(text: str, seen: set[tuple[str, ...]]) -> str:
    """The paragraphs with at least half of their runs of eight words not in `seen`. Adds the runs to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"\w+", paragraph.lower())
        runs = {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}
        if words and 2 * len(runs - seen) >= len(runs):
            kept.append(paragraph.strip("\n"))
        seen |= runs
    return "\n\n".join(kept)
