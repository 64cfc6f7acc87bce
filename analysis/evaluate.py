"""Loss, perplexity and bits per byte of any text with any model.

The tokens are cut into windows of T. Every token but the first is predicted once, from those before it in its
window (the last token of the window before is one). training/evaluation.py has the formula of bits per byte.
"""

import argparse
import contextlib
import math
import os

import numpy as np


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="a checkpoint, log/latest, an exported folder, or gpt2 ... gpt2-xl")
    parser.add_argument("data", help="a text file, a shard, or a folder of shards (its validation shards)")
    parser.add_argument("--T", type=int, default=0, help="tokens of a window; 0 = the model's block_size")
    parser.add_argument("--B", type=int, default=8, help="windows at a time")
    parser.add_argument("--max_tokens", type=int, default=0, help="read so many tokens at most; 0 = all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products")
    parser.add_argument("--device", default="", help="cuda, mps, cpu; empty = the best there is")


def read_for(model, path: str) -> np.ndarray:
    """Token ids (n,) of a text file, after <|endoftext|>, or of shards. ValueError: no text, another
    encoding, less than 2 tokens, or ids that the vocabulary lacks."""
    from tokens.encodings import encode_pieces
    from tokens.shards import find_shards, read_meta, read_shard
    from tokens.sources import read_plain

    encoding = model.config.encoding
    if os.path.isdir(path) or path.endswith((".bin", ".npy")):
        shards = find_shards(path, "val")
        where = os.path.dirname(shards[0]) or "."
        size = model.config.vocab_size if encoding == "none" else 0  # for shards without meta.json
        if (theirs := read_meta(where, vocab_size=size)["encoding"]) != encoding:
            problem = f"{path} has tokens of encoding={theirs!r}, the model needs {encoding!r}"
            raise ValueError(f"{problem}; give the text itself")
        ids = np.concatenate([read_shard(shard) for shard in shards])
    else:
        ids = encode_pieces([*read_plain(path)], encoding)
    if len(ids) < 2:
        raise ValueError(f"{path} holds {len(ids)} tokens; at least 2 are needed")
    if (largest := int(ids.max())) >= model.config.vocab_size:
        raise ValueError(f"{path} has token {largest}, but vocab_size={model.config.vocab_size}")
    return ids


def measure(model, ids: np.ndarray, T: int, B: int, dtype: str) -> float:
    """The loss of the ids (n,) after the first, nats per token."""
    import torch
    import torch.nn.functional as F

    from huggingface.generation import evaluating

    device, total = model.device, 0.0
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    with evaluating(model), autocast:
        for start in range(0, len(ids) - 1, B * T):
            part = torch.from_numpy(ids[start : start + B * T + 1].astype(np.int64))
            padding = (0, -(len(part) - 1) % T)  # of the last window
            x = F.pad(part[:-1], padding).view(-1, T).to(device)  # (B, T)
            y = F.pad(part[1:], padding, value=-1).view(-1, T).to(device)  # (B, T); -1 has no loss
            total += model(x, targets=y, return_dict=True).loss.item() * (len(part) - 1)
    return total / (len(ids) - 1)


def run(options: argparse.Namespace) -> int:
    """Print the loss and what follows from it. Raises ValueError, OSError, FloatingPointError."""
    from tokens.encodings import token_bytes
    from training.checkpoints import load_model
    from training.parallel import choose_device

    model = load_model(options.model).to(choose_device(options.device, 0))
    T = options.T or model.config.block_size
    for name, value, least in ("T", T, 1), ("B", options.B, 1), ("max_tokens", options.max_tokens or 2, 2):
        if value < least or (name == "T" and T > model.config.block_size):
            most = f" and at most block_size={model.config.block_size}" if name == "T" else ""
            raise ValueError(f"--{name} {value}: must be at least {least}{most}")
    ids = read_for(model, options.data)[: options.max_tokens or None]
    loss = measure(model, ids, T, options.B, options.dtype)
    if not math.isfinite(loss):
        raise FloatingPointError(f"{options.model} gives a loss of {loss}: it has diverged")
    tokens, size = len(ids) - 1, 0
    with contextlib.suppress(ValueError, OSError):  # tokens without text, WordPiece; no network
        size = int(token_bytes(model.config.encoding)[ids[1:]].sum())
    known = f"{size:,} bytes" if size else "bytes unknown"
    print(f"{tokens:,} tokens, {known}, in windows of {T}")
    print(f"loss           {loss:.4f} nats per token")
    print(f"perplexity     {math.exp(min(loss, 700)):.3f}")
    if size:
        print(f"bits per byte  {loss * tokens / math.log(2) / size:.4f}")
    return 0
