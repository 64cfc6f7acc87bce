"""Any tokenizer as an encoding: Hugging Face's tokenizer.json with the methods of tiktoken's Encoding.

Such an encoding is called "tokenizer:DIGEST:END", by a SHA-256 of its content and the id of the token that
precedes each document ("tokenizer:DIGEST" without one). tokenizer.json lies beside shards and in exported
folders; checkpoints have its text. After add_tokenizer, load_encoding finds it by its name."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from tokens.files import check_regular

EOT = "<|endoftext|>"
# Bytes that GPT-2's vocabulary shows as they are.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
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
    """A tokenizer with those methods of tiktoken.Encoding that this project calls.
    text: a tokenizer.json; end: the id that precedes documents, or None. ValueError for another text."""

    def __init__(self, text: str, end: int | None):
        with rust_errors("this is no tokenizer.json"):
            self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True  # as plain text
        not_in_shards = ("padding", "truncation", "post_processor")
        content = json.loads(text) | dict.fromkeys(not_in_shards)
        self.text = json.dumps(content, ensure_ascii=False, sort_keys=True)
        self.name = f"tokenizer:{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"
        self.name += "" if end is None else f":{end}"
        self.eot_token, self.end_token = end, None if end is None else self._tokenizer.id_to_token(end)
        self.n_vocab = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens_set = {token.content for token in self._added.values() if token.special}
        self._decoders = set(re.findall(r'"type": "(\w+)"', json.dumps(content["decoder"])))

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids; special tokens in `text` are plain text. ValueError for text without tokens."""
        with rust_errors(f"encoding={self.name!r} has no tokens for {text[:40]!r}..."):
            # Unlike encode(), encode_batch() lets other threads run.
            return self._tokenizer.encode_batch([text], add_special_tokens=False)[0].ids

    def encode_to_numpy(self, text: str, disallowed_special: tuple = ()) -> np.ndarray:
        """encode_ordinary as uint32."""
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def encode_single_token(self, token: str) -> int:
        """The id of a token of the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids. Invalid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(ids)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of text that an id stands for. KeyError for an unused id, ValueError for WordPiece."""
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
    """Make a tokenizer known. text: tokenizer.json. name: the name it must have; without one, end: an id or
    None. ValueError if it is no tokenizer, or another one."""
    if found := re.fullmatch(r"tokenizer:[0-9a-f]{8}:(\d{1,9})", name):
        end = int(found[1])
    encoding = KNOWN.get(name) or TokenizerEncoding(text, end)
    if name not in ("", encoding.name) or (end is not None and end >= encoding.n_vocab):
        raise ValueError(f"encoding={name!r}: this is the tokenizer.json of another one, {encoding.name!r}")
    return KNOWN.setdefault(encoding.name, encoding)


def read_added(path: str | Path, name: str, mend: str = "") -> TokenizerEncoding:
    """add_tokenizer for a file. ValueError that names it, and ends with `mend`, if it is missing, too."""
    try:
        check_regular(path)
        return add_tokenizer(Path(path).read_text(encoding="utf-8"), name)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}{mend}") from error


def read_tokenizer(path: str, end_token: str | None) -> TokenizerEncoding:
    """The tokenizer in a tokenizer.json, a SentencePiece .model, or a folder with one. end_token: what
    precedes documents, added if it is missing; None: <|endoftext|>, or else its eos_token. ValueError."""
    inside = [file for name in ("json", "model") if os.path.isfile(file := f"{path}/tokenizer.{name}")]
    file = Path([*inside, path][0])
    try:
        if file.suffix == ".model":
            import sentencepiece  # noqa: F401 (by which transformers converts the model)
            from transformers import PreTrainedTokenizerFast

            with tempfile.TemporaryDirectory() as folder:
                shutil.copy(file, Path(folder, "tokenizer.model"))  # transformers looks for this name
                theirs = PreTrainedTokenizerFast.from_pretrained(folder)
            tokenizer, end = theirs.backend_tokenizer, theirs.eos_token
        else:
            tokenizer, settings = Tokenizer.from_file(str(file)), file.with_name("tokenizer_config.json")
            end = json.loads(settings.read_text("utf-8")).get("eos_token") if settings.is_file() else None
            end = end.get("content") if isinstance(end, dict) else end
    except Exception as error:  # tokenizers raises bare ones
        mend = "; pip install sentencepiece protobuf" if isinstance(error, ImportError) else ""
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer={path!r} cannot be read: {reason}{mend}") from error
    end = end_token or (EOT if tokenizer.token_to_id(EOT) is not None else end)
    if end is None:
        mend = f'name the token to use, or to add, such as --end_token "{EOT}"'
        raise ValueError(f"tokenizer={path!r} has no {EOT} and no eos_token to precede documents; {mend}")
    if not any(t.special and t.content == end for t in tokenizer.get_added_tokens_decoder().values()):
        tokenizer.add_special_tokens([end])
    return add_tokenizer(tokenizer.to_str(), end=tokenizer.token_to_id(end))


def train_bpe(texts: Iterable[str], size: int) -> TokenizerEncoding:
    """A byte-level BPE, GPT-2's kind, of `size` tokens (fewer from a small text), <|endoftext|> among them.
    It depends on the texts and the size only."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, size, min_frequency=0, show_progress=False, special_tokens=[EOT])
    return add_tokenizer(tokenizer.to_str(), end=tokenizer.token_to_id(EOT))
