"""The function that normalises and rotates queries and keys, against the plain operators.

Run: python -m pytest tests/layers/test_rotary.py"""

import pytest
import torch
from models import strong, tiny

import model as model_file
from layers.rotary import can_norm_and_rotate, rotary_angles
from model import CausalSelfAttention


def results(layer, packed, rotary) -> tuple[tuple, tuple]:
    """q, k, v, and the gradients of packed and of the norms' weights."""
    found = layer.queries_keys_values(packed, rotary)
    torch.manual_seed(1)
    directions = [torch.randn(part.shape, dtype=part.dtype) for part in found]
    return found, torch.autograd.grad(found, (packed, layer.q_norm.weight, layer.k_norm.weight), directions)


@pytest.mark.parametrize("nkv", [4, 2, 1])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_it_equals_the_plain_operators(nkv, dtype, close, monkeypatch):
    config = tiny(use_moe=False, position="rope", qk_norm=True, n_head=4, n_kv_head=nkv)
    layer, hs = strong(CausalSelfAttention(config), std=1.0).to(dtype), config.head_dim
    packed = torch.randn(2, 9, (4 + 2 * nkv) * hs, dtype=dtype, requires_grad=True)
    for position_ids in (torch.arange(9)[None], torch.randint(99, (2, 9))):
        rotary = rotary_angles(position_ids, hs, 1e4)
        ours, our_gradients = results(layer, packed, rotary)
        assert ours[0].grad_fn.name() == "NormAndRotateBackward"
        with monkeypatch.context() as patch:
            patch.setattr(model_file, "can_norm_and_rotate", lambda packed: False)
            plain, plain_gradients = results(layer, packed, rotary)
        for one, other in zip((*ours, *our_gradients), (*plain, *plain_gradients), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert (one - other).abs().max() <= close * other.abs().max()


def test_it_takes_wide_numbers_on_a_cpu_outside_of_graphs(monkeypatch):
    assert can_norm_and_rotate(torch.zeros(1)) and not can_norm_and_rotate(torch.zeros(1, device="meta"))
    assert not can_norm_and_rotate(torch.zeros(1, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not can_norm_and_rotate(torch.zeros(1))
