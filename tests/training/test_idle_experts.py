"""An optimizer step leaves experts alone that had nothing to learn; test_mixture_of_experts.py has two ranks.

Run: python -m pytest tests/training/test_idle_experts.py
"""

import pytest
import torch
from models import moe_layer

from mixture_of_experts import update_routers
from training.idle_experts import freeze_idle_experts


@pytest.mark.parametrize("spared", [True, False])
def test_idle_experts_stay_as_they_are(spared):
    """Expert 3 gets rows in the first step only: afterwards neither decay nor old moments may change it."""
    layer = moe_layer(num_experts_per_tok=1).train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    x = torch.randn(2, 16, 8)
    update_routers([layer])
    seen = []
    for step in range(3):
        layer.router_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 100.0 if step == 0 else -100.0]))
        layer(x).square().sum().backward()
        update_routers([layer])
        if spared:
            with freeze_idle_experts([layer], optimizer) as idle:
                optimizer.step()
            assert idle == (3 if step == 0 else (layer.last_step_counts() == 0).sum())
        else:
            optimizer.step()
        optimizer.zero_grad()
        tensors = [*layer.experts.parameters()]
        tensors += [optimizer.state[p][name] for p in tensors for name in ("exp_avg", "exp_avg_sq")]
        seen.append([tensor[3].clone() for tensor in tensors])
    assert layer.last_step_counts()[3] == 0 and layer.last_step_counts().sum() == 32
    unchanged = [torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True)]
    assert all(unchanged) if spared else not any(unchanged)
    assert not torch.equal(layer.experts.c_fc[0], moe_layer(num_experts_per_tok=1).experts.c_fc[0])


def test_what_tokens_that_do_not_count_have_taught_is_kept():
    """Tokens whose labels are ignored are in no count, and may yet have gradients. Their experts learn; those
    of padding, whose gradient is zero, and those without any row stay as they are."""
    layer = moe_layer(num_experts_per_tok=1, n_embd=4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    x = torch.eye(4)[None]
    counted = torch.tensor([[True, False, False, False]])
    seen = []
    for step in range(2):
        layer.gate.weight.data.copy_(100 * torch.eye(4))
        update_routers([layer])
        tokens = x if step == 0 else x[:, :3]
        y, auxiliary = layer(tokens, counted[:, : tokens.shape[1]] | (step == 0), return_auxiliary=True)
        layer.accumulate(auxiliary)
        scale = torch.ones(4) if step == 0 else torch.tensor([1.0, 1.0, 0.0])  # the third is padding
        (y.square() * scale[:, None]).sum().backward()
        update_routers([layer])
        with freeze_idle_experts([layer], optimizer) as idle:
            optimizer.step()
        optimizer.zero_grad()
        assert idle == (0, 2)[step]
        tensors = [*layer.experts.parameters()]
        tensors += [optimizer.state[p][name] for p in tensors for name in ("exp_avg", "exp_avg_sq")]
        seen.append([tensor.detach().clone() for tensor in tensors])
    assert layer.last_step_counts().tolist() == [1, 0, 0, 0]
    for before, after in zip(*seen, strict=True):
        assert [torch.equal(before[e], after[e]) for e in range(4)] == [False, False, True, True]
