"""Where tokenizers come from: Hugging Face's and SentencePiece's files, training on a text, nanoGPT's meta.pkl.

Each function returns a TokenizerEncoding (tokens/tokenizer_json.py)."""

import json
import os
import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokens.files import check_regular
from tokens.tokenizer_json import EOT, MOST_BYTES, TokenizerEncoding, add_tokenizer, rust_errors


def read_tokenizer(path: str, end_token: str | None) -> TokenizerEncoding:
    """The tokenizer in a tokenizer.json, a SentencePiece .model, or a folder with one of them. end_token: what
    precedes each document, added if it lacks it; None: <|endoftext|>, or else its eos_token. ValueError."""
    names = ("tokenizer.json", "tokenizer.model") if os.path.isdir(path) else ("",)
    file = next(
        (full for name in names if os.path.isfile(full := os.path.join(path, name).rstrip("/"))), path
    )
    if file.endswith(".model"):
        tokenizer, eos = read_sentencepiece(file)
    else:
        try:
            with rust_errors("it is no tokenizer.json"):
                tokenizer = Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
            settings, eos = Path(file).with_name("tokenizer_config.json"), None
            if settings.is_file():
                eos = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"tokenizer={path!r}: {error}") from error
        eos = eos.get("content") if isinstance(eos, dict) else eos
    end = end_token or next((t for t in (EOT, eos) if t and tokenizer.token_to_id(t) is not None), None)
    if end is None:
        mend = f'name the one to use or to add, as --end_token "{EOT}"'
        raise ValueError(f"tokenizer={path!r} has no {EOT} and no eos_token to precede documents; {mend}")
    if all(
        token.content != end or not token.special for token in tokenizer.get_added_tokens_decoder().values()
    ):
        tokenizer.add_special_tokens([end])
    return add_tokenizer(tokenizer.to_str(), end=tokenizer.token_to_id(end))


def read_sentencepiece(path: str) -> tuple[Tokenizer, str | None]:
    """(tokenizer, end token) of a SentencePiece model, which transformers converts. ValueError."""
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # noqa: F401
    except ImportError as error:
        mend = "install it with: pip install sentencepiece protobuf"
        raise ValueError(
            f"tokenizer={path!r} is SentencePiece's, and {error.name} is missing; {mend}"
        ) from error
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(path), os.path.join(folder, "tokenizer.model"))  # the name it looks for
        try:
            theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:
            raise ValueError(
                f"tokenizer={path!r} cannot be read: {' '.join(str(error).split())[:200]}"
            ) from error
    return theirs.backend_tokenizer, theirs.eos_token


def train_bpe(texts: Iterable[str], size: int) -> TokenizerEncoding:
    """A byte-level BPE of `size` tokens (fewer from a small text), <|endoftext|> among them: GPT-2's kind. It
    depends on the texts and the size only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = dict(special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **how))
    return add_tokenizer(tokenizer.to_str(), end=tokenizer.token_to_id(EOT))


class NoGlobals(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries. Code in a pickle is reached by names, all refused here."""

    def find_class(self, module: str, name: str) -> None:
        """Refuse every name."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_char_table(path: str, mend: str) -> TokenizerEncoding:
    """The characters in nanoGPT's meta.pkl (vocab_size, itos, stoi) as a tokenizer; none of its code runs.
    ValueError for other content; mend: the end of its message."""
    try:
        check_regular(path)
        if os.path.getsize(path) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
        with open(path, "rb") as file:
            table = NoGlobals(file).load()
        characters = table["stoi"]
        if {i: c for c, i in characters.items()} != table["itos"] or len(characters) != table["vocab_size"]:
            raise ValueError("itos, stoi and vocab_size do not fit")
        if sorted(characters.values()) != [*range(len(characters))] or set(map(len, characters)) != {1}:
            raise ValueError("stoi does not number characters from 0 on")
    except Exception as error:  # a damaged pickle fails in many ways
        raise ValueError(f"{path} is no character table of nanoGPT's: {str(error)[:99]}; {mend}") from error
    tokenizer = Tokenizer(models.WordLevel(characters))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return add_tokenizer(tokenizer.to_str())
