"""Readers of llm.c's debug states and tokenizers, as its C programs read them; for test_llmc*.py."""

from pathlib import Path

import numpy as np

from llmc.files import HEADER_BYTES, check_length, read_header, read_sizes, take


def read_state(path: Path, model_path: Path | None = None) -> dict[str, np.ndarray]:
    """x, y (B, T), logits (B, T, V), loss (), and the gradients under llm.c's names and shapes.

    The sizes are read from the model file, by default gpt2_124M.bin for gpt2_124M_debug_state.bin.
    FileNotFoundError; ValueError, naming the file, if one of the two is damaged or they do not match.
    """
    B, T = read_header(path, "debug state")[2:4]
    model_path = model_path or path.with_name(path.name.replace("_debug_state", ""))
    if model_path == path or not model_path.is_file():
        raise FileNotFoundError(f"{path}: its model, {model_path}, is not there; give model_path")
    sizes, _ = read_sizes(model_path)
    check_length(path, HEADER_BYTES + 4 * (2 * B * T + B * T * sizes.V + 1 + sizes.num_stored()))
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        state = {"x": take(file, "<i4", (B, T)), "y": take(file, "<i4", (B, T))}
        state |= {"logits": take(file, "<f4", (B, T, sizes.V)), "loss": take(file, "<f4", ())}
        return state | {name: take(file, "<f4", shape) for name, shape in sizes.shapes().items()}


def read_tokenizer(path: Path) -> tuple[list[bytes], int]:
    """Bytes of all tokens, and the end of text's id. FileNotFoundError; ValueError for a damaged file."""
    count, eot_token = read_header(path, "tokenizer")[2:4]
    contents, position, tokens = path.read_bytes(), HEADER_BYTES, []
    while len(tokens) < count and position < len(contents):
        start, position = position + 1, position + 1 + contents[position]
        tokens.append(contents[start:position])
    if len(tokens) != count or position != len(contents) or not 0 <= eot_token < count:
        held = f"{count} tokens with {eot_token} as end of text"
        raise ValueError(f"{path}: damaged: {len(contents):,} bytes are not {held}; get it again")
    return tokens, eot_token
