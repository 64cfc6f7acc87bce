"""Encodings: how text becomes token ids, and ids become text again.

An encoding's name is "bytes" (ids 0 to 255 are the bytes, 256 is <|endoftext|>; it needs no files) or a name
that tiktoken knows, such as "gpt2". A function imports tiktoken by name, because exported model folders have
a copy of this file, and transformers refuses code with an import of a package that is not installed.
"""

import difflib
import functools
import importlib
import re
from typing import Any

import numpy as np

EOT = "<|endoftext|>"
MAX_WHITESPACE = 600_000  # tiktoken's regex engine overflows its stack on 999,999 spaces in a row


def load_encoding(name: str) -> Any:
    """The tiktoken.Encoding of that name. Raises ValueError if it is unknown, OSError without its files."""
    tiktoken = importlib.import_module("tiktoken")
    if name == "bytes":
        lines, ranks = r"[^\n]*\n|[^\n]+", {bytes([i]): i for i in range(256)}  # every split gives these ids
        return tiktoken.Encoding("bytes", pat_str=lines, mergeable_ranks=ranks, special_tokens={EOT: 256})
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        choices = f"use one of {', '.join(known)} (a model's config.json sets its encoding)"
        raise ValueError(f"encoding={name!r} is unknown{hint}; {choices}")
    return tiktoken.get_encoding(name)


@functools.cache
def get_encoding(name: str) -> Any:
    """load_encoding for shards: ValueError, too, if its files cannot be fetched or its ids exceed uint16."""
    try:
        encoding = load_encoding(name)
    except OSError as error:
        problem = f"tiktoken cannot fetch the files of encoding={name!r} ({type(error).__name__})"
        cure = "set TIKTOKEN_CACHE_DIR to a folder where it has stored them, or use --encoding bytes"
        raise ValueError(f"{problem}; without network {cure}") from error
    if encoding.n_vocab > 1 << 16 or EOT not in encoding.special_tokens_set:
        limit = f"a shard's uint16 takes 65536, {EOT} among them: use gpt2, r50k_base, p50k_base or bytes"
        raise ValueError(f"encoding={name!r} has {encoding.n_vocab} ids; {limit}")
    return encoding


def encode(encoding: Any, text: str) -> np.ndarray:
    """Token ids of `text`, uint16. encoding: from get_encoding. Special tokens in the text are plain text."""
    parts = [text] if len(text) < MAX_WHITESPACE else re.split(rf"(\s{{{MAX_WHITESPACE}}})", text)
    ids = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
    return np.concatenate(ids).astype(np.uint16)


def encode_pieces(pieces: list[tuple[bool, str]], name: str) -> np.ndarray:
    """Token ids, uint16, of (begins a document, text) pieces; <|endoftext|> precedes each document."""
    encoding, arrays = get_encoding(name), []
    for begins, text in pieces:
        if begins:
            arrays.append(np.array([encoding.eot_token], dtype=np.uint16))
        arrays.append(encode(encoding, text))
    return np.concatenate(arrays)


def encode_text(text: str, name: str) -> list[int]:
    """Token ids of `text`; special tokens in `text` are ordinary text. Raises as load_encoding does."""
    return list(text.encode("utf-8")) if name == "bytes" else load_encoding(name).encode_ordinary(text)


def decode_tokens(ids: list[int], name: str) -> str:
    """Text of token ids. Invalid UTF-8 becomes U+FFFD; special and unknown tokens are left out."""
    if name == "bytes":
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
    encoding = load_encoding(name)
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return encoding.decode([i for i in ids if i < encoding.n_vocab and i not in special])
