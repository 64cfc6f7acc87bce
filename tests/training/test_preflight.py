"""What is told before a run: counts by part, memory against measured memory, warnings.

Run: python -m pytest tests/training/test_preflight.py
"""

from types import SimpleNamespace

import pytest
import torch

from bench.measure import memory_bytes
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training.preflight import memory_estimate, parameters_by_part, preflight

SMALL = dict(n_layer=3, n_head=4, n_embd=64, vocab_size=512, block_size=64)


@pytest.mark.parametrize(
    "fields", [dict(use_moe=False), dict(num_experts=4, num_experts_per_tok=2, num_shared_experts=1)]
)
def test_parts_add_up(fields):
    model = GPTLMHeadModel(GPTConfig(**SMALL, **fields))
    assert sum(parameters_by_part(model).values()) == model.get_num_params(False)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (dict(use_moe=False), {}),
        (dict(use_moe=False, activation="swiglu", norm="rmsnorm", n_kv_head=2, position="rope"), {}),
        (dict(num_experts=8, num_experts_per_tok=2), {}),
        (dict(use_moe=False, n_layer=1, vocab_size=8192), {}),
        (dict(use_moe=False, n_layer=1, vocab_size=8192), dict(loss_chunk=64)),
        (dict(use_moe=False, n_layer=8), dict(activation_checkpointing="block", loss_chunk=64)),
        (dict(use_moe=False, dropout=0.1), {}),
        (dict(num_experts=8, num_experts_per_tok=2, dropout=0.1), {}),
        # attention that is not fused: weights of T x T, the most there is
        (dict(use_moe=False, block_size=512), dict(B=2, T=512, flash=False)),
        (dict(use_moe=False, block_size=512), dict(B=2, T=512, flash=False, dtype="bfloat16")),
        (dict(use_moe=False, block_size=512, dropout=0.1), dict(B=2, T=512, flash=False)),
        (dict(use_moe=False, block_size=512, dropout=0.1), dict(B=2, T=512)),
        (dict(use_moe=False, block_size=512, dropout=0.1), dict(B=2, T=512, dtype="bfloat16")),
        (
            dict(use_moe=False, block_size=512, n_layer=6),
            dict(B=2, T=512, flash=False, activation_checkpointing="block"),
        ),
        # forward alone
        (dict(use_moe=False), dict(inference_only=True)),
        (dict(num_experts=8, num_experts_per_tok=2), dict(inference_only=True, loss_chunk=64)),
        (dict(use_moe=False, block_size=512), dict(B=2, T=512, flash=False, inference_only=True)),
    ],
)
def test_activations_are_estimated_to_a_quarter(fields, settings):
    model = GPTLMHeadModel(GPTConfig(**(SMALL | fields))).train()
    config = TrainConfig(B=8, T=64, loss_chunk=0, dtype="float32")
    vars(config).update(settings)
    model.loss_chunk = config.loss_chunk
    if not config.flash:
        model.set_attn_implementation("eager")
    if config.activation_checkpointing == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    x, trains = torch.randint(0, 512, (config.B, config.T)), not config.inference_only

    def run():
        low = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16")
        with torch.set_grad_enabled(trains), low:
            output = model(x, targets=x, return_dict=True)  # which the loop holds till after the backward
        if trains:
            output.loss.backward()

    run()  # gradients exist from here on: what the next run makes is activations and gradients in passing
    peak, _ = memory_bytes(run, torch.device("cpu"))
    estimate = memory_estimate(model, config, config.dtype)["activations"]
    assert 0.75 < estimate / peak < 1.25, (estimate, peak)


def test_inference_needs_neither_gradients_nor_moments():
    model = GPTLMHeadModel(GPTConfig(**SMALL))
    memory = memory_estimate(model, TrainConfig(B=8, T=64, inference_only=True), "float32")
    assert memory["parameters"] == 4 * model.get_num_params(False)
    assert memory["gradients"] == memory["optimizer"] == 0


@pytest.mark.parametrize(
    ("settings", "rest", "experts", "moments"),
    [
        (dict(), 1, 1, 2),
        (dict(zero_stage=1), 1, 1, 2 / 8),
        (dict(parallel="fsdp"), 1 / 8, 1 / 8, 2),  # four experts on eight ranks are cut through
        (dict(ep_size=4), 1, 1 / 4, 2),
        (dict(parallel="fsdp", ep_size=4), 1 / 8, 1 / 8, 2),
    ],
)
def test_what_each_of_8_ranks_holds(settings, rest, experts, moments):
    """Shares of a parameter outside and inside the experts, and fp32 moments per parameter that is held.

    (Within the rows that pad the routers of four experts on eight ranks.)
    """
    model = GPTLMHeadModel(GPTConfig(**SMALL, num_experts=4))
    in_experts = sum(p.numel() for moe in model.moe_layers() for p in moe.experts.parameters())
    expected = 4 * (rest * (model.get_num_params(False) - in_experts) + experts * in_experts)
    memory = memory_estimate(model, TrainConfig(**settings), "float32", world_size=8)
    assert memory["parameters"] == memory["gradients"] == pytest.approx(expected, rel=2e-3)
    assert memory["optimizer"] == pytest.approx(moments * expected, rel=2e-3)


def test_warnings_name_the_cure():
    model = GPTLMHeadModel(GPTConfig(**SMALL, num_experts=4))
    config = TrainConfig(B=2, T=64, max_steps=10, total_batch_size=256, use_compile=False, num_experts=4)
    world = SimpleNamespace(size=1)
    table, warnings = preflight(config, model, 2, world, num_tokens=10**6, dtype="float32")
    assert "2 micro-steps x B 2 x T 64 x 1 processes" in table and "active per token" in table
    assert not warnings
    _, warnings = preflight(config, model, 2, world, num_tokens=500, dtype="float32")
    assert "seen 5.1 times" in warnings[0] and "max_steps" in warnings[0]
    config.overfit_single_batch = True
    table, warnings = preflight(config, model, 2, world, num_tokens=500, dtype="float32")
    assert "500 tokens, the same 256 of them at every step" in table and not warnings
    config.overfit_single_batch = False
    config.parallel, world.size = "fsdp", 16
    assert not preflight(config, model, 2, world, num_tokens=10**6, dtype="float32")[1]
    world.size = 11
    (warning,) = preflight(config, model, 2, world, num_tokens=10**6, dtype="float32")[1]
    assert "11 processes share 4 experts: some get no expert" in warning
    config.parallel, world.size, config.B = "ddp", 1, 10**7
    assert "lower B" in preflight(config, model, 2, world, num_tokens=10**6, dtype="float32")[1][0]
