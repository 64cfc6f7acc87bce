"""A row of ACTIVATIONS is all there is to an activation: for every row, and for rows added here."""

import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from models import ENGINES, strong, tiny, tokens

from layers.experts import Experts, dispatch
from layers.mlp import ACTIVATIONS, MLP, Activation, gated
from model import GPTLMHeadModel
from training.muon import row_blocks
from training.preflight import block_bytes

TANH = lambda out, h: torch.tanh(h, out=out), lambda grad, h: grad * (1 - torch.tanh(h) ** 2)
ADDED = {"geglu": gated(F.gelu, torch.ops.aten.gelu_backward), "tanh": Activation(1, torch.tanh, *TANH)}


@pytest.fixture(params=[*ACTIVATIONS, *ADDED])
def activation(request, monkeypatch) -> str:
    for name, row in ADDED.items():
        monkeypatch.setitem(ACTIVATIONS, name, row)
    return request.param


def test_into_a_buffer_and_backward_agree_with_forward(activation):
    row = ACTIVATIONS[activation]
    h = torch.randn(5, row.parts * 6, dtype=torch.float64, requires_grad=True)
    y = row.forward(h)
    out = torch.empty(5, 6, dtype=torch.float64)
    assert torch.equal(row.forward_into(out, h.detach()), y) and torch.equal(out, y)
    torch.autograd.gradcheck(row.forward, (h,))
    direction = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, h, direction)
    torch.testing.assert_close(row.backward(direction, h.detach()), expected)


def test_everything_else_reads_the_row(activation):
    parts = ACTIVATIONS[activation].parts
    fields = dict(moe_every=2, mlp_hidden_size=24, expert_hidden_size=24)
    config, plain = tiny(**fields, activation=activation), tiny(**fields)
    model, ids, found = strong(GPTLMHeadModel(config), std=0.1), tokens(), []
    for engine in ENGINES:
        model.moe_layers()[0].experts.engine = engine
        model.zero_grad()
        model(ids, targets=ids)[1].backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_fc.weight", "experts.c_fc")):
            assert parameter.shape[-2] == parts * 24
            assert row_blocks(name, parameter, config) == (None if parts == 1 else [24] * parts)
    for layer, rows in ((0, 1), (1, 2)):  # dense; two experts per token
        more = block_bytes(config, layer, 4, "cpu") - block_bytes(plain, layer, 4, "cpu")
        assert more == rows * (parts - 1) * 4 * 24


def test_an_unknown_activation_is_an_error_in_every_engine():
    config, experts = tiny(), Experts(tiny())
    config.activation = experts.activation = "gleu"
    message = "activation='gleu'.*gelu, gelu_erf, relu2, swiglu"
    for module in (MLP, Experts):
        refuses(message, module, config)
    routing = dispatch(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 4)
    for engine in ENGINES:
        experts.engine = engine
        refuses(message, experts, torch.randn(3, 64), routing)
