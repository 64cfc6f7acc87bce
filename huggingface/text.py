"""Prompts, and tokenizer files for transformers. Byte pair encoding: arXiv 1508.07909."""

import itertools

import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tokens.encodings import encode_text, load_encoding
from tokens.own_tokenizers import BYTES, EOT


def encode_prompt(text: str, config: PreTrainedConfig) -> list[int]:
    """Token ids of a prompt, config.bos_token_id for an empty one. ValueError for ids the model lacks."""
    ids = encode_text(text, config.encoding)
    if not ids and config.bos_token_id is None:
        raise ValueError("an empty prompt needs a bos_token_id in the config to start from")
    ids = ids or [config.bos_token_id]
    if wrong := [i for i in ids if not 0 <= i < config.vocab_size]:
        problem = f"encoding={config.encoding!r} gives token {wrong[0]}, but vocab_size={config.vocab_size}"
        raise ValueError(f"{problem}; set config.encoding to the one that the model was trained with")
    return ids


def build_tokenizer(encoding: str, block_size: int) -> PreTrainedTokenizerBase:
    """transformers' tokenizer with the ids of `encoding`: bytes, gpt2 (or r50k_base) or a tokenizer.json's.
    It reads <|endoftext|> in a text as the token; encode_text does not. ValueError for other encodings."""
    how = dict(padding_side="right", model_max_length=block_size)  # for training; pipelines pad left
    if encoding.startswith("tokenizer:"):
        own = load_encoding(encoding)
        how |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), own.end_token)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(own.text), **how)
    if encoding == "bytes":
        ranks, end = {bytes([i]): i for i in range(256)}, 256
    elif encoding in ("gpt2", "r50k_base"):
        encoder = load_encoding(encoding)
        end = encoder.eot_token
        ranks = {encoder.decode_single_token_bytes(i): i for i in range(encoder.n_vocab) if i != end}
    else:
        known = "tokenizer files can be written for bytes, gpt2 and r50k_base only"
        raise ValueError(f"encoding={encoding!r}: {known}; export with --no-tokenizer")
    shown = {byte: character for character, byte in BYTES.items()}
    vocab = {"".join(shown[byte] for byte in token): rank for token, rank in ranks.items()} | {EOT: end}
    merges = [tuple("".join(shown[byte] for byte in part) for part in pair) for pair in find_merges(ranks)]
    return transformers.GPT2TokenizerFast(vocab, merges, pad_token=EOT, **how)


def find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that byte pair encoding merges, in order: each token's two parts after all earlier merges."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            merged = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = merged.index(min(merged))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
