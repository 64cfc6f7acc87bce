"""What a run measures between its steps: validation losses in nats per token and in bits per byte.

Run: python -m pytest tests/training/test_evaluation.py"""

import contextlib
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from models import tiny

from model import GPTLMHeadModel
from tokens.encodings import encode_pieces, get_encoding, token_bytes
from tokens.shards import DistributedDataLoader, write_shard
from training.evaluation import ValidationSet, evaluate, table_of_bytes
from training.parallel import World

STEPS, T = 3, 16
TEXTS = [(True, f"Säure {i} → naïve 中 words, of one or of many bytes.\n") for i in range(40)]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_bits_per_byte_are_counted_by_hand(name, tmp_path, request):
    """By decoding every target. (test_train_gpt_moe.py has two ranks.)"""
    if name == "gpt2":
        request.getfixturevalue("gpt2_encoding")
    encoding, shard = get_encoding(name), tmp_path / "val_000000.bin"
    write_shard(shard, encode_pieces(TEXTS, name))
    model = GPTLMHeadModel(tiny(vocab_size=encoding.n_vocab, block_size=T)).eval()
    loader, world = DistributedDataLoader(str(shard), B=4, T=T, seed=0), World(0, 0, 1, torch.device("cpu"))
    layout = SimpleNamespace(world=world, any=bool)
    table = table_of_bytes({"encoding": name, "vocab_size": encoding.n_vocab}, layout)
    sets = [ValidationSet("", loader, 1.0)]
    run = SimpleNamespace(model=model, val_sets=sets, layout=layout, token_bytes=table)
    run.config, run.autocast = SimpleNamespace(val_steps=STEPS), contextlib.nullcontext
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    run.trains, run.hellaswag, seen = False, False, []
    found = evaluate(run, 0, True, False, lambda: False, MagicMock())
    assert seen == [False] * STEPS and found.pop("eval_step") == 0
    nats, text, targets, ends = 0.0, b"", 0, 0
    loader.reset()
    for _ in range(STEPS):
        x, y = loader.next_batch()
        nats += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        ordinary = [token for token in y.flatten().tolist() if token != encoding.eot_token]
        text, targets = text + encoding.decode_bytes(ordinary), targets + y.numel()
        ends += y.numel() - len(ordinary)
    assert ends > 0
    expected = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / len(text)}
    assert found == pytest.approx(expected, rel=1e-5)


def test_bytes_of_tokens_and_encodings_that_nobody_knows(gpt2_encoding):
    sizes = token_bytes("gpt2")
    assert sizes[gpt2_encoding.eot_token] == 0 and sizes[:256].tolist() == [1] * 256
    assert sizes.sum() == sum(map(len, gpt2_encoding.token_byte_values()))
    assert token_bytes("bytes").tolist() == [1] * 256 + [0]
    layout = SimpleNamespace(world=SimpleNamespace(device="cpu"), any=bool)
    for encoding, size in (("klingon", 300), ("bytes", 258)):  # no such name; ids that it does not have
        assert table_of_bytes({"encoding": encoding, "vocab_size": size}, layout) is None
