"""Folders of shards without meta.json, such as nanoGPT's: what their tokens stand for."""

import os
import pickle
import warnings

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tokens.files import check_regular
from tokens.identity import fineweb_command
from tokens.own_tokenizers import add_tokenizer
from tokens.printable import printable


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
            raise ValueError(f"{path}: no table of characters ({str(error)[:99]}); run `{again}`") from error
        return found | {"encoding": characters.name, "vocab_size": len(stoi), "eot_token": None}
    if 0 < vocab_size < 50257:
        found |= {"encoding": "none", "vocab_size": vocab_size, "eot_token": None}
    words = "GPT-2's tokens" if found["encoding"] == "gpt2" else f"ids without text, vocab_size={vocab_size}"
    warnings.warn(printable(f"no meta.json in {folder}: assuming {words}"), stacklevel=3)
    return found
