"""Encodings: how text becomes token ids, and ids become text again.

An encoding's name is "bytes" (ids 0 to 255 are the bytes, 256 is <|endoftext|>; it needs no files), a name
that tiktoken knows, such as "gpt2", or "tokenizer:..." (own_tokenizers.py). "none": ids without text."""

import contextlib
import difflib
import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokens.own_tokenizers import EOT, KNOWN, rust_errors

# The most characters that tiktoken gets at a time. Its regex engine overflows its stack on 999,999 spaces in
# a row, and it takes up to 130 bytes of memory for each character of a long word.
MAX_CHARS = 600_000
# The text up to the last place where GPT-2's regular expression always begins a new token: after a letter or
# digit and before anything else, after a letter and before a digit, or before white space.
UP_TO_PLACE = re.compile(r".*(?:[^\W_](?=[\W_])|[A-Za-z](?=\d)|\S(?=[ \t\r\n]))", re.DOTALL)


def load_encoding(name: str) -> Any:
    """The tiktoken.Encoding or TokenizerEncoding of that name. ValueError if it is unknown, or "none";
    OSError without tiktoken's files."""
    if name.startswith("tokenizer:"):
        if name not in KNOWN:
            raise ValueError(f"encoding={name!r}: its tokenizer.json is not beside the shards or the model")
        return KNOWN[name]
    if name == "none":
        raise ValueError("encoding='none': ids without text: no samples, no HellaSwag, no bits per byte")
    if name == "nanogpt":
        mend = "continue its run with `python train_gpt_moe.py --resume ckpt.pt --data_dir FOLDER`"
        raise ValueError(f"encoding='nanogpt': only its data say what text the ids stand for; {mend}")
    # Exported models have a copy of this file. transformers refuses an `import` of what is not installed.
    tiktoken = importlib.import_module("tiktoken")
    if name == "bytes":
        lines, ranks = r"[^\n]*\n|[^\n]+", {bytes([i]): i for i in range(256)}  # every split gives these ids
        return tiktoken.Encoding("bytes", pat_str=lines, mergeable_ranks=ranks, special_tokens={EOT: 256})
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        choices = f"{', '.join(known)} (a model's config.json sets its encoding)"
        raise ValueError(f"encoding={name!r} is unknown{hint}; use one of {choices}")
    return tiktoken.get_encoding(name)


@functools.cache
def get_encoding(name: str) -> Any:
    """load_encoding for shards: ValueError, too, if its files cannot be fetched, or without <|endoftext|>."""
    try:
        encoding = load_encoding(name)
    except OSError as error:
        problem = f"tiktoken cannot fetch the files of encoding={name!r} ({type(error).__name__})"
        cure = "set TIKTOKEN_CACHE_DIR to a folder where it has stored them, or use --encoding bytes"
        raise ValueError(f"{problem}; without network {cure}") from error
    if not hasattr(encoding, "text") and EOT not in encoding.special_tokens_set:
        raise ValueError(f"encoding={name!r} has no {EOT}; use gpt2, r50k_base, p50k_base or bytes")
    return encoding


def dtype_of(encoding: Any) -> type[np.unsignedinteger]:
    """The type of the encoding's ids in shards."""
    return np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32


def split_text(text: str, most: int = MAX_CHARS) -> Iterator[str]:
    """Cut a text into parts of at most `most` characters, which together have the tokens of the whole text,
    except around a cut in a run of more than `most` letters (such as DNA), digits, marks or spaces."""
    start = 0
    while len(text) - start > most:
        place = UP_TO_PLACE.match(text, start, start + most)
        end = place.end() if place else start + most
        yield text[start:end]
        start = end
    yield text[start:]


def encode(encoding: Any, text: str) -> np.ndarray:
    """Token ids of dtype_of; special tokens in `text` are plain text. ValueError where tiktoken panics."""
    with rust_errors(f"tiktoken cannot encode {text[:40]!r}..."):
        parts = (encoding.encode_to_numpy(part, disallowed_special=()) for part in split_text(text))
        return np.concatenate([part.astype(dtype_of(encoding)) for part in parts])


def encode_pieces(pieces: list[tuple[bool, str]], name: str) -> np.ndarray:
    """Token ids of (begins a document, text) pieces; the encoding's end token precedes each document."""
    encoding, arrays = get_encoding(name), []
    for begins, text in pieces:
        if begins and encoding.eot_token is not None:
            arrays.append(np.array([encoding.eot_token], dtype=dtype_of(encoding)))
        arrays.append(encode(encoding, text))
    return np.concatenate(arrays)


def encode_text(text: str, name: str) -> list[int]:
    """Token ids of `text`; special tokens in `text` are ordinary text. Raises as load_encoding does."""
    if name == "bytes":
        return list(text.encode("utf-8"))
    return encode(load_encoding(name), text).tolist()


def token_bytes(name: str) -> np.ndarray:
    """The number of bytes that each token id stands for, (n_vocab,) int64; 0 for special tokens and unused
    ids. Raises as load_encoding does."""
    encoding = load_encoding(name)
    sizes = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in range(encoding.n_vocab):
        with contextlib.suppress(KeyError):
            sizes[token] = len(encoding.decode_single_token_bytes(token))
    sizes[[encoding.encode_single_token(token) for token in encoding.special_tokens_set]] = 0
    return sizes


def decode_tokens(ids: list[int], name: str) -> str:
    """Text of token ids. Invalid UTF-8 becomes U+FFFD; special and unknown tokens are left out."""
    if name == "bytes":
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
    encoding = load_encoding(name)
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    known = [i for i in ids if i < encoding.n_vocab and i not in special]
    try:
        return encoding.decode(known)
    except KeyError:  # some vocabularies of tiktoken have gaps
        sizes = token_bytes(name)
        return encoding.decode([i for i in known if sizes[i]])
