"""The MoE layer against loops in float64: routing, accounts, balance losses and z-loss, two ranks."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
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


# ---------------------------------------------------------------------------- balance losses and z-loss
def written_out(loss_type: str, p: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The losses in the words of their docstrings, from probabilities (N, E) and chosen experts (N, K)."""
    E, P = p.shape[1], p.mean(0)
    if loss_type == "load_balancing":
        return E * sum(P[e] * (chosen == e).sum() / chosen.numel() for e in range(E))
    if loss_type == "variance_penalty":
        return P.var(correction=0) / P.mean() ** 2
    if loss_type == "entropy_regularization":
        return (P * (P * E).log()).sum()
    pairs = [(i, j) for i in range(E) for j in range(E) if i != j]
    return torch.stack([F.cosine_similarity(p[:, i], p[:, j], dim=0) ** 2 for i, j in pairs]).mean()


@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("loss_type", BALANCE_LOSSES)
def test_both_losses_equal_their_formulas_and_finite_differences(loss_type, score):
    layer = moe_layer(moe_loss_type=loss_type, router_score=score, num_experts=5).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)

    def losses(weight):
        """Balance loss and z-loss, given the router's weight."""
        _, auxiliary = torch.func.functional_call(layer, {"gate.weight": weight}, (x, None, None, True))
        layer.accumulate(auxiliary)
        return auxiliary.balance_loss, auxiliary.z_loss

    logits = layer.gate(x.view(-1, 8))
    index, scores = chosen(layer, logits)[0], logits.softmax(1) if score == "softmax" else logits.sigmoid()
    expected = written_out(loss_type, scores / scores.sum(1, keepdim=True), index)
    z_loss = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.tolist()) / 12
    found = [loss.item() for loss in losses(layer.gate.weight)]
    assert found == pytest.approx([expected.item(), z_loss], rel=1e-12)
    for _ in range(3):  # then around the step before; f is piecewise constant and has no derivative
        torch.autograd.gradcheck(losses, (layer.gate.weight,), fast_mode=True)
        update_routers([layer])


UNIFORM, ONE_EXPERT = torch.full((6,), 1 / 6), torch.eye(6)[0]
EXTREMES = [  # loss, arguments at perfect balance and at collapse, values there
    ("load_balancing", (UNIFORM, UNIFORM), (ONE_EXPERT, ONE_EXPERT), 1, 6),
    ("variance_penalty", (UNIFORM,), (ONE_EXPERT,), 0, 5),
    ("entropy_regularization", (UNIFORM,), (ONE_EXPERT,), 0, math.log(6)),
    ("diversity_regularization", (torch.eye(6) / 6,), (torch.full((6, 6), 1 / 36),), 0, 1),
]


@pytest.mark.parametrize("name, balanced, collapsed, lowest, highest", EXTREMES, ids=BALANCE_LOSSES)
def test_values_at_perfect_balance_and_collapse(name, balanced, collapsed, lowest, highest):
    assert BALANCE_LOSSES[name].function(*balanced).item() == pytest.approx(lowest, abs=1e-6)
    assert BALANCE_LOSSES[name].function(*collapsed).item() == pytest.approx(highest)
    single = moe_layer(num_experts=1, num_experts_per_tok=1, moe_loss_type=name)
    single(torch.randn(1, 3, 8))
    assert single.get_auxiliary_loss().item() == pytest.approx(lowest, abs=1e-5)


def auxiliary_gradient(layer, x, mask, micro_steps: int) -> torch.Tensor:
    """Router gradient of balance and z-loss of one step, cut into micro-steps along the batch."""
    layer.zero_grad()
    for part, part_mask in zip(x.chunk(micro_steps), mask.chunk(micro_steps), strict=True):
        _, auxiliary = layer(part, part_mask, mask.sum(), return_auxiliary=True)
        layer.accumulate(auxiliary)
        (auxiliary.balance_loss + 0.1 * auxiliary.z_loss).backward()
    return layer.gate.weight.grad.clone()


@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("loss_type", BALANCE_LOSSES)
def test_gradient_does_not_depend_on_the_cut_into_micro_steps(loss_type, score):
    steps, masks, results = torch.randn(3, 8, 16, 8), torch.rand(3, 8, 16) < 0.7, []
    for micro_steps in (1, 2, 4):
        layer, found = moe_layer(moe_loss_type=loss_type, router_score=score), []
        for x, mask in zip(steps, masks, strict=True):
            update_routers([layer])
            found.append(auxiliary_gradient(layer, x, mask, micro_steps))
        results.append(found)
    for found in results[1:]:
        for whole, cut in zip(results[0], found, strict=True):
            assert (cut - whole).norm() / whole.norm() < 1e-5
    # Without step management the same cut shows, for a loss that is not linear in tokens.
    plain = moe_layer(moe_loss_type=loss_type, router_score=score)
    whole, cut = (auxiliary_gradient(plain, steps[2], masks[2], n) for n in (1, 4))
    assert (whole - cut).norm() / whole.norm() > 1e-3


@pytest.mark.parametrize("loss_type", BALANCE_LOSSES)
def test_step_managed_loss_is_the_expansion_around_the_step_before(loss_type):
    layer = moe_layer(moe_loss_type=loss_type).double()
    x, later = torch.randn(2, 2, 16, 8, dtype=torch.float64)
    update_routers([layer])
    layer(x)
    (slope,) = torch.autograd.grad(layer.get_auxiliary_loss(), layer.gate.weight)
    assert slope.abs().max() < 1e-6  # the first step is around perfect balance
    update_routers([layer])
    p_ref, p = (chosen(layer, layer.gate(v.view(-1, 8)))[2].detach() for v in (x, later))
    squared = BALANCE_LOSSES[loss_type].of_products
    s_ref, s = (p.t() @ p / len(p) if squared else p.mean(0) for p in (p_ref, p))
    f = [layer.last_step_counts() / 64] if loss_type == "load_balancing" else []
    loss = lambda mean: BALANCE_LOSSES[loss_type].function(mean, *f)  # noqa: E731
    value, change = torch.func.jvp(loss, (s_ref,), (s - s_ref,))
    layer(later)
    assert layer.get_auxiliary_loss().item() == pytest.approx((value + change).item(), rel=1e-6)


@pytest.mark.parametrize("loss_type", BALANCE_LOSSES)
def test_masked_tokens_do_not_count(loss_type):
    x, mask = torch.randn(3, 8, 8), torch.rand(3, 8) < 0.6
    masked, alone = moe_layer(moe_loss_type=loss_type), moe_layer(moe_loss_type=loss_type)
    y, auxiliary = masked(x, mask.long(), return_auxiliary=True)
    torch.testing.assert_close(y, alone.eval()(x))
    expected = alone.train()(x[mask][None], return_auxiliary=True)[1]
    torch.testing.assert_close(*([t.float() for t in report] for report in (auxiliary, expected)))
    auxiliary.balance_loss.backward()
    expected.balance_loss.backward()
    torch.testing.assert_close(masked.gate.weight.grad, alone.gate.weight.grad)
    masked.accumulate(auxiliary)
    assert masked.get_usage_counts().sum() == 2 * mask.sum()
    # A batch of padding only: zero, and no NaN in the gradient.
    masked.zero_grad()
    nothing = masked(x, torch.zeros(3, 8), return_auxiliary=True)[1]
    (nothing.balance_loss + nothing.z_loss).backward()
    assert nothing.balance_loss == 0 and nothing.z_loss == 0 and not nothing.totals.any()
    assert (masked.gate.weight.grad == 0).all()


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
