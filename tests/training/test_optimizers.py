"""Parameter roles, schedules, and FSDP's initial weights.

Run: python -m pytest tests/training/test_optimizers.py
"""

import math

import pytest
import torch

from layers.roles import ROLES, role_of
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training import fsdp_init
from training.fsdp_init import initial_weights
from training.optimizers import learning_rate

SIZES = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=64, block_size=16, num_experts=4)
CONFIGS = {
    "dense": dict(use_moe=False),
    "moe": dict(moe_every=2, moe_loss_type="diversity_regularization"),
    "untied": dict(tie_word_embeddings=False),
    "qk_norm": dict(qk_norm=True, norm="rmsnorm", position="rope", activation="swiglu", bias=False),
    "shared expert": dict(num_shared_experts=1),
    "zero_proj": dict(init="zero_proj"),
}


def test_every_role_is_found():
    h = "transformer.h.0."
    names = (
        f"{h}attn.q_norm.weight", f"{h}mlp.gate.weight", f"{h}mlp.experts.c_fc", f"{h}mlp.shared.c_fc.weight",
        f"{h}attn.c_attn.weight", f"{h}mlp.c_proj.weight", "lm_head.weight", "transformer.wpe.weight",
    )  # fmt: skip
    assert tuple(map(role_of, names)) == ROLES
    bias = role_of(f"{h}mlp.experts.c_fc_bias")
    assert (bias.lr_group, bias.decays, bias.is_matrix) == ("experts", False, False)


def test_schedules():
    """By hand, over 100 steps after a warmup of 10 (and before it, at its end, and past the last step)."""
    config = TrainConfig(max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    for step, rate in {0: 0.1, 9: 1.0, 10: 1.0, 35: quarter, 60: 0.55, 110: 0.1, 120: 0.1}.items():
        assert learning_rate(step, config) == pytest.approx(rate)
    config.schedule, config.wsd_decay_frac = "wsd", 0.2
    for step, rate in {9: 1.0, 60: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 120: 0.1}.items():
        assert learning_rate(step, config) == pytest.approx(rate)
    config.wsd_decay_frac = 1.0  # of all steps, but no more than those after the warmup
    assert learning_rate(60, config) == pytest.approx(0.55)


@pytest.mark.parametrize("order", ["usual", "reversed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_initial_weights_are_the_constructors(name, order, monkeypatch):
    """Also where torch or transformers visits modules in another order."""
    config, children = GPTConfig(**SIZES | CONFIGS[name]), torch.nn.Module.children
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Parameter(torch.ones(2, 2)), "extra: no initialisation of it has been recorded"),
        (lambda: torch.nn.Parameter(torch.randn(2, 2)), "draws random numbers for a new tensor"),
        (lambda: torch.nn.Parameter(torch.empty(2, 2)[:1].normal_()), "writes to a part of a tensor"),
    ],
)
def test_what_cannot_be_repeated_is_an_error(make, message, monkeypatch):
    class Extended(GPTLMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.extra = make()

    monkeypatch.setattr(fsdp_init, "GPTLMHeadModel", Extended)
    with pytest.raises(RuntimeError, match=message):
        dict(initial_weights(GPTConfig(**SIZES), 0))


def test_a_parameter_may_be_written_several_times(monkeypatch):
    """An operator may need what the ones before it have left."""

    class Extended(GPTLMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Parameter(torch.empty(8, 8).fill_(2).normal_().mul_(0.02).add_(1))

    monkeypatch.setattr(fsdp_init, "GPTLMHeadModel", Extended)
    torch.manual_seed(1)
    extra = Extended(GPTConfig(**SIZES)).extra
    assert torch.equal(extra, dict(initial_weights(GPTConfig(**SIZES), 1))["extra"])
