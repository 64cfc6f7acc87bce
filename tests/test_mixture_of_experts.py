"""The MoE layer against loops in float64: routing, accounts, two ranks.

Run: python -m pytest tests/test_mixture_of_experts.py"""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import refuses
from models import chosen, gradients, moe_by_hand, moe_layer, sure_layer, tiny
from processes import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mixture_of_experts import BALANCE_LOSSES, ROUTER_SCORES, MoE, expert_usage, update_routers
from model import GPTLMHeadModel
from training import parallel
from training.idle_experts import freeze_idle_experts
from training.log import expert_load


@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("K, norm", [(1, True), (2, True), (2, False)])
def test_output_and_every_gradient_equal_a_loop_over_tokens(score, K, norm):
    fields = dict(router_score=score, num_experts_per_tok=K, norm_topk_prob=norm)
    layer = moe_layer(num_experts=5, expert_hidden_size=6, **fields).double()
    inputs, weight = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    inputs[..., 0] = 1
    with torch.no_grad():
        layer.gate.weight[3, 0] = -50  # no token chooses expert 3
    results = []
    for forward in (layer, lambda x: moe_by_hand(layer, x.flatten(0, 1)).view(x.shape)):
        layer.zero_grad()
        x = inputs.clone().requires_grad_()
        y = forward(x)
        (y * weight).sum().backward()
        results.append({"y": y, "x": x.grad, **gradients(layer)})
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert layer.get_usage_counts()[3] == 0 and layer.get_usage_counts().sum() == 10 * K


def test_dropout_is_active_in_training_only():
    layer, x = moe_layer(dropout=0.5), torch.randn(4, 16, 8)
    assert 0.3 < (layer(x) == 0).float().mean() < 0.7
    assert (layer.eval()(x) != 0).all()


# ---------------------------------------------------------------------------- routing
def test_router_stays_in_fp32_under_autocast():
    layer, x, found = moe_layer(n_embd=32), torch.randn(4, 64, 32), []
    for bf16 in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            routed = chosen(layer, layer.gate(x.view(-1, 32)))
            y, auxiliary = layer(x, return_auxiliary=True)
        assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
        y.float().square().sum().backward()
        assert {auxiliary.balance_loss.dtype, *(p.grad.dtype for p in layer.parameters())} == {torch.float32}
        found.append((routed, {"y": y.float(), **gradients(layer)}))
    (exact_route, exact), (route, low) = found
    torch.testing.assert_close(route, exact_route, rtol=0, atol=0)
    for name in exact:
        assert (low[name] - exact[name]).norm() < 0.03 * exact[name].norm(), name


def test_ties_go_to_the_lower_index():
    layer = moe_layer(num_experts=64, num_experts_per_tok=8)
    index, weights, _ = chosen(layer, torch.zeros(5, 64))
    assert index.tolist() == [list(range(8))] * 5
    torch.testing.assert_close(weights, torch.full((5, 8), 1 / 8))
    logits = torch.zeros(1, 64)
    logits[0, [9, 50]] = 1
    assert chosen(layer, logits)[0][0].tolist() == [9, 50, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("norm", [True, False])
def test_nan_surfaces_where_it_came_from(score, norm):
    layer, x = moe_layer(router_score=score, norm_topk_prob=norm), torch.randn(2, 4, 8)
    expected = layer(x)
    x[1, 2, 3] = math.nan
    y = layer(x)
    assert y[1, 2].isnan().all()
    assert 0 <= expert_usage([layer])[0].entropy <= math.log(4)
    y[1, 2] = expected[1, 2]
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        layer.gate.weight[1] = math.nan  # only one expert's logit is bad, for all tokens
    assert layer(x).isnan().all()
    assert layer.get_usage_counts().sum() == 3 * 2 * 8


@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("shift", [1e4, -1e4, -300.0, -69.0])  # sigmoid(-69) is 1e-30
def test_extreme_logits_give_finite_losses_and_gradients(score, shift):
    for loss_type in BALANCE_LOSSES:
        layer = moe_layer(moe_loss_type=loss_type, router_score=score)
        logits = (shift + 30 * torch.randn(6, 4)).requires_grad_()
        routing, probs = layer.route(logits)
        auxiliary = layer.measure(logits, probs, routing, None, None)
        torch.testing.assert_close(probs.sum(-1), torch.ones(6))
        (auxiliary.balance_loss + (routing.weight * torch.arange(12)).sum()).backward()
        assert auxiliary.balance_loss.isfinite() and logits.grad.isfinite().all(), loss_type


def test_loss_free_balancing():
    layer, x = moe_layer(router_bias_update_rate=0.1, moe_loss=False), torch.randn(4, 16, 8)
    update_routers([layer])
    assert layer.router_bias.tolist() == [0, 0, 0, 0]
    counts = torch.zeros(4, dtype=torch.int64)
    for part in x.split(1):  # four micro-steps
        layer(part)
        counts += torch.bincount(chosen(layer, layer.gate(part[0]))[0].flatten(), minlength=4)
    assert layer.get_auxiliary_loss() == 0  # moe_loss=False
    update_routers([layer])
    assert torch.equal(counts, layer.last_step_counts())
    torch.testing.assert_close(layer.router_bias, 0.1 * torch.sign(counts.sum() / 4 - counts))
    assert layer.router_bias.abs().sum() > 0
    before = layer.router_bias.clone()
    layer.eval()(x)
    update_routers([layer])
    assert torch.equal(layer.router_bias, before)  # neither evaluation nor an empty step moves it
    # The bias decides the choice and stays out of the weights.
    layer.router_bias.copy_(torch.tensor([0.0, 0.0, 10.0, 20.0]))
    logits = torch.randn(6, 4)
    index, weights, _ = chosen(layer, logits)
    assert index.tolist() == [[3, 2]] * 6
    p = logits.softmax(-1)
    torch.testing.assert_close(weights, torch.stack((p[:, 3], p[:, 2]), 1) / (p[:, 3] + p[:, 2])[:, None])


@pytest.mark.parametrize("engine", ["all", "grouped_mm", "triton"])
def test_the_grouped_engines_never_read_a_number_on_the_host(engine):
    """A FakeTensor has no numbers: every read, such as item() or nonzero(), raises an error."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        layer, x = MoE(tiny(n_embd=16, expert_hidden_size=8)).train(), torch.randn(2, 12, 16)
        layer.experts.engine = engine
        update_routers([layer])
        y = layer(x.requires_grad_(), torch.ones(2, 12, dtype=torch.bool))
        (y.sum() + layer.get_auxiliary_loss()).backward()
        assert x.grad.shape == x.shape and all(p.grad.shape == p.shape for p in layer.parameters())


# ---------------------------------------------------------------------------- accounts
def test_usage_statistics_and_what_a_run_logs_of_them():
    """The numbers of two layers by hand."""
    layers = [sure_layer(num_experts_per_tok=1) for _ in range(2)]
    layers[0](torch.eye(4)[[0] * 15 + [1] * 4 + [2]][None])  # 15, 4, 1 and 0 tokens
    layers[1](torch.eye(4)[[0, 1, 2, 3] * 5][None])
    layers[1](torch.zeros(1, 20, 4))  # equal scores: expert 0, and half of the tokens are not sure
    usage, other = expert_usage(layers)
    assert usage.counts.tolist() == layers[0].get_usage_counts().tolist() == [15, 4, 1, 0]
    assert usage.share.tolist() == pytest.approx([0.75, 0.2, 0.05, 0.0]) and usage.max_load.item() == 3.0
    assert usage.starved.item() == 0.25 and usage.entropy.item() == pytest.approx(0, abs=1e-6)
    assert other.entropy.item() == pytest.approx(math.log(4) / 2, rel=1e-5)
    (empty,) = expert_usage([moe_layer()])
    assert empty.counts.sum() == 0 and empty.max_load == 0 and empty.entropy == 0
    found = expert_load(torch.stack([layer.step_usage(layer.step_totals) for layer in layers]).numpy())
    assert found["expert_load"] == [[0.75, 0.2, 0.05, 0.0], [0.625, 0.125, 0.125, 0.125]]
    assert found["max_load"] == 3.0 and found["starved"] == 1 / 8
    assert found["router_entropy"] == pytest.approx(math.log(4) / 4, rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_accounts_are_exact_in_any_dtype_of_the_model_and_outlive_a_reset():
    layer, x = moe_layer().bfloat16(), torch.randn(1, 64, 8, dtype=torch.bfloat16)
    for _ in range(40):
        layer(x)
    assert layer.get_usage_counts().sum() == 40 * 64 * 2
    layer.reset_usage_counts()  # the step's own accounts stay
    assert layer.get_usage_counts().sum() == 0
    update_routers([layer])
    assert layer.last_step_counts().sum() == 40 * 64 * 2 and layer.get_usage_counts().sum() == 0
    probs = chosen(layer, layer.gate(x[0]))[2].detach().mean(0)
    mean = layer.reference_totals[4:] / (2.0**24 * 40 * 64)
    torch.testing.assert_close(mean.float(), probs, rtol=1e-6, atol=1e-7)


def test_copies_pickles_and_meta_construction():
    layer, x = moe_layer(), torch.randn(1, 4, 8)
    assert layer.get_auxiliary_loss() == 0
    layer(x)
    assert layer.get_auxiliary_loss().requires_grad
    loaded = moe_layer(seed=1)
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert twin.get_auxiliary_loss() == 0
        assert torch.equal(twin.get_usage_counts(), layer.get_usage_counts())
        assert torch.equal(twin.eval()(x), layer.eval()(x))
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in MoE(tiny(num_shared_experts=1)).state_dict().values())


def test_bad_arguments():
    """MoE checks what GPTConfig has checked, for configurations of other classes."""
    for field, value in dict(num_experts_per_tok=0, moe_loss_type="balance", router_score="tanh").items():
        refuses(f"{field}={value!r}", MoE, SimpleNamespace(**tiny().to_dict() | {field: value}))
    message = r"token_mask has shape \(3, 2\), but x has \(B, T\) = \(2, 3\)"
    refuses(message, moe_layer(), torch.zeros(2, 3, 8), torch.ones(3, 2))


# ---------------------------------------------------------------------------- two ranks
def usage_of_a_model(rank: int) -> list[int]:
    """How many rows a model says that its layer has had: within a step, here and everywhere; after it."""
    model = GPTLMHeadModel(tiny(n_layer=1))
    model.update_routers()
    ids = torch.arange(10 * (rank + 1))[None]  # 10 tokens on one rank, 20 on the other
    for _ in range(2):
        model(ids, targets=ids)
        found = [model.expert_usage(), model.expert_usage(reduce=True)]
        model.update_routers()
        found.append(model.expert_usage(reset=True))
    assert model.expert_usage(reduce=True)[0].counts.sum() == 0
    return [usage[0].counts.sum().item() for usage in found]


def changed_where_experts_are_shared_out(dim: int) -> list[bool]:
    """Only expert 0 has rows that count, and of expert 1 one rank's part alone has a gradient."""
    layer, mesh = moe_layer(), init_device_mesh("cpu", (2,))
    for name, whole in list(layer.experts.named_parameters()):
        grad = torch.zeros_like(whole)
        grad[1, 0] = 1.0
        shared = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(dim)]))
        shared.grad = distribute_tensor(grad, mesh, [Shard(dim)])
        setattr(layer.experts, name, shared)
    optimizer, weight = torch.optim.SGD(layer.experts.parameters()), layer.experts.c_fc.detach()
    before = weight.full_tensor()
    with freeze_idle_experts([layer], optimizer, np.array([[8, 0, 0, 0]])):
        weight.add_(1.0)
    return (weight.full_tensor() != before).flatten(1).all(1).tolist()


def main(arguments: list[str]) -> tuple:
    """One of two processes."""
    dist.init_process_group("gloo")
    found = usage_of_a_model(dist.get_rank()), [changed_where_experts_are_shared_out(dim) for dim in (0, 1)]
    parallel.stop()
    return found


def test_usage_and_idle_experts_of_two_ranks(tmp_path):
    """test_parallel.py compares the training of two ranks with that of one."""
    found = run_ranks(2, [], tmp_path / "output", script="test_mixture_of_experts")
    for rank, (usage, changed) in enumerate(found):
        assert usage == [20 * (rank + 1), 60, 60] and changed == [[True, True, False, False]] * 2
