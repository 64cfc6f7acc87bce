"""Tokenizers of one's own: Hugging Face's tokenizer.json with the methods of tiktoken's Encoding.

The name of such an encoding is "tokenizer:DIGEST:END": the start of a SHA-256 of its content, and the id of
the token that precedes each document (without such a token "tokenizer:DIGEST"). Two data sets of the same name
have the same ids. The content lies beside shards and in exported folders as tokenizer.json, and in checkpoints
as text. Whoever reads one of these calls add_tokenizer; encodings.load_encoding finds it by its name then."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tokens.files import check_regular

EOT = "<|endoftext|>"
MOST_BYTES = 50_000_000  # of a tokenizer.json
VISIBLE = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # bytes that GPT-2's vocabulary writes as they are
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(b): b for b in VISIBLE} | {chr(256 + n): b for n, b in enumerate(HIDDEN)}


@contextlib.contextmanager
def rust_errors(problem: str) -> Iterator[None]:
    """Replace what tokenizers and tiktoken raise, a bare Exception or a panic, by a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ not in ("Exception", "PanicException"):
            raise
        raise ValueError(f"{problem} ({str(error)[:80]!r})") from None


class TokenizerEncoding:
    """A tokenizer.json with those methods of tiktoken.Encoding that this project calls.
    text: its content; end: the id that precedes documents, or None. ValueError for what is no tokenizer."""

    def __init__(self, text: str, end: int | None):
        with rust_errors("this is no tokenizer.json"):
            self._tokenizer = Tokenizer.from_str(text)
            # Shards have the tokens of the text and no others.
            content = json.loads(text) | dict.fromkeys(("padding", "truncation", "post_processor"))
        self._tokenizer.encode_special_tokens = True  # as plain text
        self.text, self.eot_token = json.dumps(content, ensure_ascii=False, sort_keys=True), end
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:8]
        self.name = f"tokenizer:{digest}" + ("" if end is None else f":{end}")
        self.n_vocab = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens_set = {token.content for token in added.values() if token.special}
        self._added, self._decoders = (
            set(added),
            set(re.findall(r'"type": "(\w+)"', json.dumps(content["decoder"]))),
        )

    @property
    def end_token(self) -> str | None:
        """The text of eot_token."""
        return None if self.eot_token is None else self._tokenizer.id_to_token(self.eot_token)

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids; special tokens in `text` are plain text. ValueError for text it has no tokens for."""
        with rust_errors(f"encoding={self.name!r} has no tokens for {text[:40]!r}..."):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text: str, disallowed_special: tuple = ()) -> np.ndarray:
        """encode_ordinary as uint32."""
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def encode_single_token(self, token: str) -> int:
        """The id of a token of the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids. Invalid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for. KeyError for an unused id, ValueError if they cannot be known."""
        if "WordPiece" in self._decoders:
            raise ValueError(f"encoding={self.name!r}: the bytes of a WordPiece token are unknown")
        if (text := self._tokenizer.id_to_token(token)) is None:
            raise KeyError(token)
        if token not in self._added and "ByteLevel" in self._decoders:
            return bytes(BYTES[character] for character in text)
        if "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " " if self._decoders & {"Metaspace", "Replace"} else "▁").encode()


KNOWN: dict[str, TokenizerEncoding] = {}


def add_tokenizer(text: str, name: str = "", end: int | None = None) -> TokenizerEncoding:
    """Make a tokenizer known. text: tokenizer.json. name: what its name must be; else end: an id or None.
    ValueError if it is no tokenizer, or one of another name."""
    if name:
        found = re.fullmatch(r"tokenizer:[0-9a-f]{8}(?::(\d{1,9}))?", name)
        end = int(found[1]) if found and found[1] else None
    encoding = KNOWN.get(name) or TokenizerEncoding(text, end)
    if encoding.name != (name or encoding.name) or (end is not None and end >= encoding.n_vocab):
        raise ValueError(f"encoding={name!r}: this is the tokenizer.json of another one, {encoding.name!r}")
    return KNOWN.setdefault(encoding.name, encoding)


def read_added(path: str | os.PathLike, name: str, mend: str = "") -> TokenizerEncoding:
    """add_tokenizer for a file. ValueError that names it, too, if it is missing. mend: the message's end."""
    try:
        check_regular(path)
        if os.path.getsize(path) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
        return add_tokenizer(Path(path).read_text(encoding="utf-8"), name)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}{mend}") from error
