"""What is told before a run: counts by part, memory against measured memory, warnings.

Run: python -m pytest tests/test_preflight.py
"""

from types import SimpleNamespace

import pytest
import torch

from bench import memory_bytes
from model import GPTConfig, GPTLMHeadModel
from preflight import memory_estimate, parameters_by_part, preflight

SMALL = dict(n_layer=3, n_head=4, n_embd=64, vocab_size=512, block_size=64)


@pytest.mark.parametrize(
    "fields", [dict(use_moe=False), dict(num_experts=4, num_experts_per_tok=2, num_shared_experts=1)]
)
def test_parts_add_up(fields):
    model = GPTLMHeadModel(GPTConfig(**SMALL, **fields))
    assert sum(parameters_by_part(model).values()) == model.get_num_params(False)


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_moe=False),
        dict(use_moe=False, activation="swiglu", norm="rmsnorm", n_kv_head=2, position="rope"),
        dict(num_experts=8, num_experts_per_tok=2),
        dict(use_moe=False, n_layer=1, vocab_size=8192),
    ],
)
def test_activations_are_estimated_to_a_third(fields):
    model = GPTLMHeadModel(GPTConfig(**(SMALL | fields))).train()
    B, T = 8, 64
    x = torch.randint(0, 512, (B, T))

    def run():
        _, loss = model(x, targets=x)
        loss.backward()

    run()  # gradients exist from here on: what the next run makes is activations and gradients in passing
    peak, _ = memory_bytes(run, torch.device("cpu"))
    estimate = memory_estimate(model, B, T, "float32")["activations"]
    assert 0.67 < estimate / peak < 1.5, (estimate, peak)


def test_warnings_name_the_cure():
    model = GPTLMHeadModel(GPTConfig(**SMALL, num_experts=4))
    config = SimpleNamespace(B=2, T=64, max_steps=10, total_batch_size=256, use_compile=False, num_experts=4)
    world = SimpleNamespace(size=1)
    table, warnings = preflight(config, model, 2, world, num_tokens=10**6, dtype="float32")
    assert (
        "2 micro-steps x B 2 x T 64 x 1 processes" in table and "active per token" in table and not warnings
    )
    _, warnings = preflight(config, model, 2, world, num_tokens=500, dtype="float32")
    assert "seen 5.1 times" in warnings[0] and "max_steps" in warnings[0]
    config.B = 10**7
    assert "lower B" in preflight(config, model, 2, world, num_tokens=10**6, dtype="float32")[1][0]
