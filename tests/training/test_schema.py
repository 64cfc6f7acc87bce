"""Forged checkpoints: every value that no run writes is refused in one line, before anything uses it.

Run: python -m pytest tests/training/test_schema.py
"""

import math

import torch

DEEP = []
for _ in range(40):  # 2^40 entries, and yet a small file
    DEEP = [DEEP, DEEP]
# Values that are wrong in most places: other types, not finite, negative, nested, very large.
WRONG = ("x", -5, True, None, math.nan, [], {}, {1: 2}, DEEP, 10**5000, torch.ones(2), b"x")
# Where they are put: further wrong values, and which of WRONG are right there.
PLACES = {
    "model": ((), ()), "config": ((), ()), "step": ((1.0, 10**30), ()), "val_loss": ((), (None, math.nan, -5)),
    "optimizer": ((), ()), "loader": ((), ()), "rng": ((torch.zeros(5, dtype=torch.uint8),), ()),
    "train_config": ((), ({},)), "elapsed_s": ((math.inf,), ()), "health": (({"is_spike": 1},), ()),
    "scaler": (({"scale": 1.0},), ({},)), "world_size": ((0,), ()), "format": ((0,), ()),
    "model.lm_head.weight": ((torch.ones(3, 3), torch.ones(1).expand(10**6, 10**6)), ()),
    "model.transformer.h.0.attn.c_attn.weight": ((torch.ones(4).to_sparse(),), ()),
    "config.n_layer": ((10**8, 1, 0), ()), "config.n_embd": ((10**9, 64), ()),
    "config.vocab_size": ((10**9,), ()), "config.num_labels": ((10**8,), ()),
    "config.activation": (("swiglu",), ()), "config.encoding": ((), ("x",)),
    "config.use_moe": ((False,), (True,)), "config.moe_every": ((2,), ()),
    "loader.position": ((10**30,), ()), "loader.T": ((), ()), "loader.sha256": ((), ()),
    "optimizer.state": ((), ()), "optimizer.state.0": (({"step": torch.ones(())},), ()),
    "optimizer.state.0.exp_avg": ((), ()), "optimizer.param_groups": (([{}], [{"params": [0]}]), ()),
    "health.mean": ((), (-5,)), "train_config.B": ((0, 10**30), ()), "train_config.min_lr": ((), (None,)),
    "train_config.max_lr": (("1e-3", math.inf), ()), "train_config.optimizer": ((), ()),
}  # fmt: skip


def forge(content: dict, place: str, value) -> dict:
    """A copy of the dictionary with another value at `place`, keys joined by dots."""
    key, _, inner = place.partition(".")
    key = int(key) if key.isdigit() else key
    if place.startswith("model."):
        key, inner = "model", place[6:]
        return {**content, "model": {**content["model"], inner: value}}
    return {**content, key: forge(content[key], inner, value) if inner else value}
