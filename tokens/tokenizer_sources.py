"""Where tokenizers come from: files of Hugging Face or SentencePiece, training, nanoGPT's meta.pkl."""

import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokens.files import check_regular
from tokens.identity import fineweb_command
from tokens.printable import printable
from tokens.tokenizer_json import EOT, TokenizerEncoding, add_tokenizer


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
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    how = dict(special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **how))
    return add_tokenizer(tokenizer.to_str(), end=tokenizer.token_to_id(EOT))


class NoGlobals(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries. A pickle can run only code that it names."""

    def find_class(self, module: str, name: str) -> None:
        """Refuse every name."""
        raise ValueError(f"it names {module}.{name}")


def describe_foreign(folder: str, vocab_size: int) -> dict:
    """What stands for the meta.json that a folder lacks: nanoGPT's characters if there is its meta.pkl; ids
    without text if vocab_size is below GPT-2's; else GPT-2's tokens. ValueError for another meta.pkl."""
    found = {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256, "tokens": {}}
    if os.path.exists(path := os.path.join(folder, "meta.pkl")):
        try:
            check_regular(path)
            with open(path, "rb") as file:
                table = NoGlobals(file).load()
            stoi = {character: i for i, character in table["itos"].items()}
            if stoi != table["stoi"] or sorted(stoi.values()) != [*range(table["vocab_size"])]:
                raise ValueError("itos, stoi and vocab_size do not fit")
            tokenizer = Tokenizer(models.WordLevel(stoi))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # characters
            tokenizer.decoder = decoders.Fuse()
            characters = add_tokenizer(tokenizer.to_str())
        except Exception as error:  # a damaged pickle fails in many ways
            again = fineweb_command(folder, f"{folder}_2", source="input.txt", encoding="bytes")
            raise ValueError(
                f"{path} is no table of characters: {str(error)[:99]}; make it anew: `{again}`"
            ) from error
        return found | {"encoding": characters.name, "vocab_size": len(stoi), "eot_token": None}
    if 0 < vocab_size < 50257:
        found |= {"encoding": "none", "vocab_size": vocab_size, "eot_token": None}
    words = "GPT-2's tokens" if found["encoding"] == "gpt2" else f"ids without text, vocab_size={vocab_size}"
    warnings.warn(printable(f"no meta.json in {folder}: assuming {words}"), stacklevel=3)
    return found
