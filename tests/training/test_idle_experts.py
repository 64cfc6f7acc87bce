"""An optimizer step leaves experts alone that had nothing to learn; test_mixture_of_experts.py has two ranks.

Run: python -m pytest tests/training/test_idle_experts.py"""

import contextlib

import pytest
import torch
from models import moe_layer, sure_layer

from mixture_of_experts import update_routers
from training.idle_experts import freeze_idle_experts
from training.muon import MuonAdamW

# The experts' weights decay a lot; the router is not trained.
ADAMW = dict(lr=0.1, weight_decay=0.5)


def values(layer, optimizer) -> list[torch.Tensor]:
    """Copies of the experts' parameters and of their moments, each (E, ...)."""
    parameters = list(layer.experts.parameters())
    moments = [value for p in parameters for value in optimizer.state[p].values() if value.dim() > 0]
    return [tensor.detach().clone() for tensor in parameters + moments]


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize("spared", [True, False])
def test_idle_experts_stay_as_they_are(spared, method):
    """Expert 3 has rows in the first step only. Later, neither decay nor old moments may change it."""
    layer, x, seen = moe_layer(num_experts_per_tok=1), torch.randn(2, 16, 8), []
    groups = [
        dict(params=[p], method=method if p.dim() == 3 else "adamw") for p in layer.experts.parameters()
    ]
    optimizer = MuonAdamW(groups, **ADAMW)
    update_routers([layer])
    for step in range(3):
        layer.router_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 100.0 if step == 0 else -100.0]))
        layer(x).square().sum().backward()
        update_routers([layer])
        with freeze_idle_experts([layer], optimizer) if spared else contextlib.nullcontext() as idle:
            optimizer.step()
        assert not spared or idle == (layer.last_step_counts() == 0).sum()
        optimizer.zero_grad()
        seen.append(values(layer, optimizer))
    assert layer.last_step_counts()[3] == 0 and layer.last_step_counts().sum() == 32
    unchanged = [torch.equal(before[3], after[3]) for before, after in zip(seen[0], seen[2], strict=True)]
    assert all(unchanged) if spared else not any(unchanged)
    busy = layer.last_step_counts().argmax()
    assert not torch.equal(seen[0][0][busy], seen[2][0][busy])


def test_what_tokens_that_do_not_count_have_taught_is_kept():
    """Tokens with ignored labels are in no count, but may have gradients: their experts learn. Experts with
    nothing but padding, whose gradient is zero, or without rows stay as they are."""
    layer, x, seen = sure_layer(num_experts_per_tok=1), torch.eye(4)[None], []
    optimizer = torch.optim.AdamW(layer.experts.parameters(), **ADAMW)
    # Second step: token 0 counts, token 1 has an ignored label, token 2 is padding, token 3 is not there.
    steps = ((x, [1, 1, 1, 1], [1, 1, 1, 1], 0), (x[:, :3], [1, 0, 0], [1, 1, 0], 2))
    for tokens, counted, scale, idle in steps:
        update_routers([layer])
        y, auxiliary = layer(tokens, torch.tensor([counted]), return_auxiliary=True)
        layer.accumulate(auxiliary)
        (y.square() * torch.tensor(scale)[:, None]).sum().backward()
        update_routers([layer])
        with freeze_idle_experts([layer], optimizer) as found:
            optimizer.step()
        optimizer.zero_grad()
        assert found == idle
        seen.append(values(layer, optimizer))
    assert layer.last_step_counts().tolist() == [1, 0, 0, 0]
    for before, after in zip(*seen, strict=True):
        assert [torch.equal(before[e], after[e]) for e in range(4)] == [False, False, True, True]
