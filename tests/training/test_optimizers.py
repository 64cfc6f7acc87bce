"""Schedules and FSDP's initial weights.

Run: python -m pytest tests/training/test_optimizers.py"""

import math

import pytest
import torch
from models import tiny

from model import GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training import fsdp_init
from training.fsdp_init import initial_weights
from training.optimizers import learning_rate

CONFIGS = {"dense": dict(use_moe=False), "moe": dict(moe_every=2, moe_loss_type="diversity_regularization"),
           "untied": dict(tie_word_embeddings=False),
           "qk_norm": dict(qk_norm=True, norm="rmsnorm", position="rope", activation="swiglu", bias=False),
           "shared expert": dict(num_shared_experts=1), "zero_proj": dict(init="zero_proj")}  # fmt: skip


@pytest.mark.parametrize(("fields", "rates"), [
    ({}, {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.55 + 0.45 * math.sqrt(0.5), 60: 0.55, 110: 0.1, 120: 0.1}),
    (dict(schedule="wsd", wsd_decay_frac=0.2), {9: 1.0, 60: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 120: 0.1}),
    (dict(schedule="wsd", wsd_decay_frac=1.0), {60: 0.55}),  # at most the steps after the warmup
])  # fmt: skip
def test_schedules(fields, rates):
    """By hand: a warmup of 10 steps, 100 steps after it, and steps past the last one."""
    config = TrainConfig(max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110, **fields)
    assert {step: learning_rate(step, config) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize("order", ["usual", "reversed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_initial_weights_are_the_constructors(name, order, monkeypatch):
    """Also where torch or transformers visits modules in another order."""
    config, children = tiny(**CONFIGS[name]), torch.nn.Module.children
    torch.manual_seed(3)
    usual = GPTLMHeadModel(config).transformer.wte.weight
    if order == "reversed":
        monkeypatch.setattr(torch.nn.Module, "children", lambda self: reversed(list(children(self))))
    torch.manual_seed(3)
    model = GPTLMHeadModel(config)
    state, end = model.state_dict(), torch.get_rng_state()
    assert torch.equal(state["transformer.wte.weight"], usual) == (order == "usual")
    made = dict(initial_weights(config, 3))
    assert torch.equal(torch.get_rng_state(), end)
    assert state.keys() - made.keys() == (set() if name == "untied" else {"lm_head.weight"})
    for key, value in made.items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key]), key


@pytest.mark.parametrize(("make", "message"), [
    (lambda: torch.empty(8, 8).normal_().mul_(0.02).add_(1), ""),  # add_ needs what mul_ has left
    (lambda: torch.ones(2, 2), "extra: no initialisation of it has been recorded"),
    (lambda: torch.randn(2, 2), "draws random numbers for a new tensor"),
    (lambda: torch.empty(2, 2)[:1].normal_(), "writes to a part of a tensor"),
], ids=["several writes", "ones", "randn", "part"])  # fmt: skip
def test_a_parameter_is_repeated_or_refused(make, message, monkeypatch):
    class Extended(GPTLMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Parameter(make())

    monkeypatch.setattr(fsdp_init, "GPTLMHeadModel", Extended)  # the class that initial_weights imitates
    if message:
        with pytest.raises(RuntimeError, match=message):
            dict(initial_weights(tiny(), 1))
    else:
        torch.manual_seed(1)
        assert torch.equal(Extended(tiny()).extra, dict(initial_weights(tiny(), 1))["extra"])
