"""What is told before a run: counts by part, memory against measured memory, warnings."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import tiny

from bench.measure import memory_bytes
from layers.sharding import local
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training.optimizers import OPTIMIZERS, build_optimizer
from training.preflight import activation_bytes, memory_estimate, parameters_by_part, preflight

SMALL = dict(n_layer=3, n_head=4, n_embd=64, vocab_size=512, block_size=64)


@pytest.mark.parametrize("fields", [dict(use_moe=False), dict(num_shared_experts=1)])
def test_parts_add_up_and_inference_needs_neither_gradients_nor_moments(fields):
    model = GPTLMHeadModel(tiny(**fields))
    assert sum(parameters_by_part(model).values()) == model.get_num_params(False)
    memory = memory_estimate(model, TrainConfig(B=8, T=24, inference_only=True), "float32")
    assert memory["parameters"] == 4 * model.get_num_params(False)
    assert memory["gradients"] == memory["optimizer"] == 0


DENSE, MOE = dict(use_moe=False), dict(num_experts=8, num_experts_per_tok=2)
WIDE = DENSE | dict(n_layer=1, vocab_size=8192)
MODERN = dict(activation="swiglu", norm="rmsnorm", n_kv_head=2, position="rope")
# Attention that is not fused has weights of T x T, the most there is.
LONG, LONG_EAGER = dict(B=2, T=256), dict(B=2, T=256, flash=False)
BLOCKS, CHUNKS = dict(activation_checkpointing="block"), dict(loss_chunk=64)
DROPOUT, BF16, FORWARD = dict(dropout=0.1), dict(dtype="bfloat16"), dict(inference_only=True)


@pytest.mark.parametrize(("fields", "settings"), [
    (DENSE, {}), (DENSE | MODERN, {}), (MOE, {}), (DENSE | DROPOUT, {}), (MOE | DROPOUT, {}),
    (WIDE, {}), (WIDE, CHUNKS), (DENSE | dict(n_layer=8), BLOCKS | CHUNKS),
    (DENSE, LONG_EAGER), (DENSE, LONG_EAGER | BF16), (DENSE | dict(n_layer=6), LONG_EAGER | BLOCKS),
    (DENSE | DROPOUT, LONG), (DENSE | DROPOUT, LONG | BF16), (DENSE | DROPOUT, LONG_EAGER),
    (DENSE, FORWARD), (MOE, FORWARD | CHUNKS), (DENSE, LONG_EAGER | FORWARD),
])  # fmt: skip
def test_activations_are_estimated_to_a_quarter(fields, settings):
    config = TrainConfig(**dict(B=8, T=64, loss_chunk=0, dtype="float32") | settings)
    model = GPTLMHeadModel(GPTConfig(**SMALL | dict(block_size=config.T) | fields)).train()
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


@pytest.mark.parametrize(("settings", "rest", "experts", "moments"), [
    (dict(), 1, 1, 2), (dict(zero_stage=1), 1, 1, 2 / 8), (dict(ep_size=4), 1, 1 / 4, 2),
    (dict(parallel="fsdp"), 1 / 8, 1 / 8, 2),  # four experts on eight ranks are cut through
    (dict(parallel="fsdp", ep_size=4), 1 / 8, 1 / 8, 2),
])  # fmt: skip
def test_what_each_of_8_ranks_holds(settings, rest, experts, moments):
    """Shares of a parameter outside and inside the experts, and fp32 moments per parameter that is held. FSDP
    pads the routers of four experts to eight rows, which is less than the tolerance."""
    model = GPTLMHeadModel(GPTConfig(**SMALL, num_experts=4))
    in_experts = sum(p.numel() for moe in model.moe_layers() for p in moe.experts.parameters())
    expected = 4 * (rest * (model.get_num_params(False) - in_experts) + experts * in_experts)
    memory = memory_estimate(model, TrainConfig(**settings), "float32", world_size=8)
    assert memory["parameters"] == memory["gradients"] == pytest.approx(expected, rel=2e-3)
    assert memory["optimizer"] == pytest.approx(moments * expected, rel=2e-3)


@pytest.mark.parametrize("muon_experts, adagrad_ngrams", [(True, False), (False, True)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_are_counted_to_the_byte(optimizer, muon_experts, adagrad_ngrams):
    model = GPTLMHeadModel(GPTConfig(**SMALL, num_experts=4, ngram_order=2))
    more = dict(muon_experts=muon_experts, adagrad_ngrams=adagrad_ngrams)
    config = TrainConfig(optimizer=optimizer, B=2, T=8, total_batch_size=16, **more)
    trained = build_optimizer(config, model)
    model(x := torch.zeros(2, 8, dtype=torch.long), targets=x)[1].backward()
    trained.step()
    moments = [v for state in trained.state.values() for k, v in state.items() if k != "step"]
    memory = memory_estimate(model, config, "float32")
    assert memory["optimizer"] == sum(v.nbytes for v in moments)
    sparse = optimizer == "muon" and adagrad_ngrams  # 2 rows of n-grams are used, 2 * 8 could be
    unused = 4 * 14 * model.config.n_embd * sparse
    assert memory["gradients"] == sum(local(p.grad).nbytes for p in model.parameters()) + unused


def test_warnings_name_the_cure():
    model = GPTLMHeadModel(GPTConfig(**SMALL, num_experts=4))

    def told(tokens=10**6, processes=1, B=2, **more) -> tuple[str, str]:
        """The table and the warnings of a run with these settings."""
        config = TrainConfig(B=B, T=64, max_steps=10, total_batch_size=256, num_experts=4, **more)
        table, warnings = preflight(config, model, 2, SimpleNamespace(size=processes), tokens, "float32")
        assert len(warnings) <= 1
        return table, "".join(warnings)

    table, warnings = told()
    assert "2 micro-steps x B 2 x T 64 x 1 processes" in table and "active per token" in table
    assert warnings == told(processes=16, parallel="fsdp")[1] == ""
    table, warnings = told(tokens=500, overfit_single_batch=True)
    assert "500 tokens, the same 256 of them at every step" in table and warnings == ""
    for settings, words in (
        (dict(tokens=500), ["5.1 times", "max_steps"]), (dict(B=10**7), ["lower B"]),
        (dict(processes=11, parallel="fsdp"), ["11 processes", "4 experts"]),
    ):  # fmt: skip
        assert all(word in told(**settings)[1] for word in words), settings


def test_on_a_gpu_a_larger_batch_is_proposed_and_attention_is_the_backends(monkeypatch):
    model, world = GPTLMHeadModel(GPTConfig(**SMALL, use_moe=False)), SimpleNamespace(size=2)
    monkeypatch.setattr(GPTLMHeadModel, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    config = TrainConfig(B=2, T=64, max_steps=10, total_batch_size=64 * 96, use_moe=False)
    need = [sum(memory_estimate(model, replace(config, B=B), "bfloat16", 2).values()) for B in (2, 8, 12)]
    for have, proposed in ((need[1], "B 8 .* 6 micro-"), (need[2], "B 12 .* 4 micro-"), (need[0] * 1.5, "")):
        monkeypatch.setattr("training.preflight.device_memory", lambda device, have=have: have / 0.89)
        table, _ = preflight(config, model, 24, world, 10**6, "bfloat16")
        assert re.search(f"larger B .*{proposed}steps, not 24", table) if proposed else "larger" not in table
    named = (replace(config, attention_backend=name) for name in ("flash", "math"))
    fused, plain = (activation_bytes(model, settings, "bfloat16") for settings in named)
    assert plain - fused >= 4 * 3 * 4 * 2 * 64 * 64  # bytes, layers, heads, B, T, T
