"""Balance losses and z-loss of mixture_of_experts.py: formulas, gradients, micro-steps, padding.

Run: python -m pytest tests/test_balance_losses.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from models import chosen, moe_layer

from mixture_of_experts import BALANCE_LOSSES, ROUTER_SCORES, update_routers


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
