"""A row of ACTIVATIONS is all there is to an activation: for every row, and for rows added here.

Run: python -m pytest tests/layers/test_mlp.py
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from layers.experts import Experts, dispatch, expert_mlp, grouped_mm
from layers.mlp import ACTIVATIONS, MLP, Activation, gated
from model import GPTConfig, GPTLMHeadModel
from training.muon import row_blocks
from training.preflight import block_bytes

ADDED = {
    "geglu": gated(F.gelu, torch.ops.aten.gelu_backward),
    "tanh": Activation(
        1, torch.tanh, lambda out, h: torch.tanh(h, out=out), lambda grad, h: grad * (1 - torch.tanh(h) ** 2)
    ),
}


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("engine", ["loop", "grouped_mm", "gather"])
def test_one_expert_is_the_dense_mlp(activation, engine, bias):
    if engine == "grouped_mm" and grouped_mm is None:
        pytest.skip("this torch has no grouped_mm")
    config = SimpleNamespace(num_experts=1, n_embd=16, expert_hidden_size=8, dropout=0.0)
    config.activation, config.bias = activation, bias
    dtype = torch.float32 if engine == "grouped_mm" else torch.float64
    experts, dense = Experts(config).to(dtype), MLP(config, 8).to(dtype)
    experts.engine = engine
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.5)
        for name, parameter in experts.named_parameters():  # c_fc, c_fc_bias, c_proj, c_proj_bias
            layer = dense.get_submodule(name.removesuffix("_bias"))
            parameter[0] = layer.bias if name.endswith("_bias") else layer.weight
    x = torch.randn(9, 16, dtype=dtype)
    routing = dispatch(torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1, dtype=dtype), 1)
    results = []
    for module, arguments in ((experts, (routing,)), (dense, ())):
        leaf = x.clone().requires_grad_()
        y = module(leaf, *arguments)
        y.square().sum().backward()
        named = module.named_parameters()
        grads = {name.replace(".", "_").removesuffix("_weight"): p.grad for name, p in named}
        results.append({"y": y.detach(), "x": leaf.grad} | {k: g.view(-1) for k, g in grads.items()})
    torch.testing.assert_close(*results, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)


def test_everything_else_reads_the_row(activation):
    """The configuration accepts it, sizes and Muon's matrices follow it, the memory estimate counts it."""
    parts = ACTIVATIONS[activation].parts
    sizes = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=64, block_size=8, moe_every=2)
    config = GPTConfig(**sizes, mlp_hidden_size=24, expert_hidden_size=24, activation=activation)
    model = GPTLMHeadModel(config)
    ids = torch.arange(8)[None]
    assert model(ids, targets=ids)[1].isfinite()
    for name, parameter in model.named_parameters():
        if name.endswith(("c_fc.weight", "experts.c_fc")):
            assert parameter.shape[-2] == parts * 24
            assert row_blocks(name, parameter, config) == (None if parts == 1 else [24] * parts)
    plain = GPTConfig(**sizes, mlp_hidden_size=24, expert_hidden_size=24)
    for layer in (0, 1):  # dense; one expert per token
        more = block_bytes(config, layer, 4, "cpu") - block_bytes(plain, layer, 4, "cpu")
        assert more == (parts - 1) * 4 * 24


def test_an_unknown_activation_is_an_error_in_every_engine():
    config = SimpleNamespace(num_experts=2, n_embd=8, expert_hidden_size=8, bias=False, dropout=0.0)
    config.activation = "gleu"
    message = "activation='gleu' is unknown; use one of gelu, relu2, swiglu"
    for module in (MLP, Experts):
        with pytest.raises(ValueError, match=message):
            module(config)
    config.activation = "gelu"
    x, index, experts = torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), Experts(config)
    routing = dispatch(index, torch.ones(3, 1), 2)
    experts.activation = "gleu"
    for engine in ("loop", "gather", *(["grouped_mm"] if grouped_mm else [])):
        experts.engine = engine
        with pytest.raises(ValueError, match=message):
            experts(x, routing)
    with pytest.raises(ValueError, match=message):
        parameters = [experts.c_fc, experts.c_proj]
        expert_mlp(x, routing.weight, routing.token, routing.ends, parameters, "gleu")
