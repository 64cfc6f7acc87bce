"""Attention: dropout, cache, windows through FlexAttention, backends, and the norms and rotations of queries
and keys against the plain operators."""

import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from devices import needs_gpu
from models import dense_model, strong, tiny, tokens
from torch.nn.attention.flex_attention import flex_attention

import model as model_file
from huggingface.outputs import CACHE
from layers import attention
from layers.rotary import can_norm_and_rotate, rotary_angles
from model import CausalSelfAttention

CPU = torch.device("cpu")


@torch.no_grad()
def test_the_cache_holds_only_what_later_tokens_can_see():
    model = strong(dense_model(position="rope", sliding_window=4, n_kv_head=2, n_layer=6, global_every=3))
    shapes = [layer.keys.shape for layer in model(tokens(2, 16), use_cache=True)[CACHE].layers]
    lengths = [3, 3, 16, 3, 3, 16]  # with the next token, 3 are the window
    assert shapes == [(2, 2, length, 16) for length in lengths]  # (B, nkv, T, hs)


def test_dropout_falls_on_attention_weights_in_training():
    layer, x = strong(dense_model(dropout=0.5)).transformer.h[0].attn.train(), torch.randn(1, 9, 64)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    q = torch.randn(1, 1, 4000, 2)
    k, v, mask = q[:, :, :1], torch.ones(1, 1, 1, 2), torch.ones(4000, 1).bool()
    y, weight = attention.attention_reference(q, k, v, mask, 0.5)
    assert weight.eq(1).all() and set(y.unique().tolist()) == {0.0, 2.0}
    assert y.mean().item() == pytest.approx(1.0, abs=0.1)


# ---------------------------------------------------------------------------- windows through FlexAttention
def written_out_window(T: int, window: int) -> torch.Tensor:
    i = torch.arange(T)
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < window)  # (T, T), query by key


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("T, window, block", [(300, 70, 128), (128, 64, 64), (48, 1, 16), (100, 33, 16)])
@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_block_mask_is_the_window_in_its_document(T, window, block, documents):
    """And the boolean mask is the same."""
    i = torch.arange(T)
    number = (torch.rand(2, T) < 0.1 * documents).cumsum(1)[:, None]  # (2, 1, T), of the document
    expected = written_out_window(T, window) & (number[..., None] == number[:, :, None])
    starts = i - attention.positions_in_documents(number[:, 0].diff(prepend=number[:, 0, :1]) > 0)
    assert torch.equal(attention.document_mask(starts, window), expected)
    mask = attention.flex_block_mask(T, window, CPU, starts if documents else None, block)
    grown = mask.to_dense().bool().repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :T, :T]
    assert (grown | ~expected).all()  # no visible key is in a block that is left out
    looked_at = mask.to_dense().sum(-1)
    assert looked_at.max() <= (window + block - 2) // block + 1  # O(window) keys per query, not O(T)
    b = torch.arange(2)[:, None, None, None]
    assert torch.equal(mask.mask_mod(b, 0, i[:, None], i).expand_as(expected), expected)
    q, k, v = (torch.randn(2, heads, T, 16) for heads in (4, 2, 2))
    slow = F.scaled_dot_product_attention(q, k, v, attn_mask=expected, enable_gqa=True)
    fast = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_layer_takes_a_block_mask():
    """A compiled block has one graph for all masks of a shape, although each training step makes a new mask
    with a new function in it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer, x = CausalSelfAttention(tiny(n_kv_head=2, sliding_window=4)), torch.randn(2, 200, 64)
    expected = layer(x, written_out_window(200, 4)[None, None])
    layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        fast = layer(x, attention.flex_block_mask(200, 4, x.device))
        torch.testing.assert_close(fast, expected, rtol=0, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_gpu
def test_windows_on_cuda_train_as_on_the_cpu():
    fields = dict(position="rope", n_kv_head=2, sliding_window=100, global_every=2, block_size=512)
    cpu, gpu = strong(dense_model(**fields)).train(), strong(dense_model(**fields)).train().cuda()
    ids = tokens(2, 300)
    assert attention.has_flex_attention(gpu.config, torch.device("cuda", 0))
    for model, rows in ((cpu, ids), (gpu, ids.cuda())):
        model(rows, targets=rows)[1].backward()
    for (name, p), q in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu(), rtol=1e-2, atol=1e-3, msg=name)


# ---------------------------------------------------------------------------- backends
def test_on_a_cpu_there_is_nothing_to_choose():
    shape = tiny(), 2, 8, CPU, torch.float32
    refuses("attention_backend='flush'.*auto, cudnn, flash", attention.choose_backend, "flush", *shape)
    assert not attention.has_flex_attention(tiny(sliding_window=4), CPU)  # only GPUs have block masks
    assert 0 < attention.time_backend(attention.BACKENDS["math"], tiny(n_kv_head=2), *shape[1:]) < 60
    assert attention.time_backend(attention.BACKENDS["cudnn"], *shape) == float("inf")
    model, ids = strong(dense_model()), tokens()
    expected = model(ids).logits
    for name in ("auto", *attention.BACKENDS):
        assert attention.choose_backend(name, *shape) == ""
        with attention.prefer_backend(name, CPU):
            assert torch.equal(model(ids).logits, expected)


def test_the_preferred_backend_comes_first_and_the_others_stand_in(monkeypatch):
    """Without a GPU: which calls are made. The first attention on CUDA must come before the order is set,
    because torch then overwrites any order."""
    calls = []
    monkeypatch.setattr(attention, "sdpa_kernel", lambda order, **named: calls.append((order, named)))
    monkeypatch.setattr(attention, "choose_for_the_first_time", lambda device: calls.append(device.type))
    for name in ("flash", "math"):
        attention.prefer_backend(name, torch.device("cuda"))
    orders = [["flash", "cudnn", "efficient", "math"], ["math", "cudnn", "flash", "efficient"]]
    first, second = ([attention.BACKENDS[name] for name in names] for names in orders)
    assert calls == ["cuda", (first, {"set_priority": True}), "cuda", (second, {"set_priority": True})]


@pytest.mark.parametrize(("name", "able", "chosen"), [
    ("auto", "efficient math", "efficient"), ("flash", "flash math", "flash"), ("cudnn", "", "cudnn"),
    ("flash", "efficient math", "efficient"),  # a V100, for example
])  # fmt: skip
def test_the_backend_that_is_named_is_the_one_that_runs(name, able, chosen, monkeypatch):
    seconds = {attention.BACKENDS[n]: i + 1.0 for i, n in enumerate(able.split())}
    monkeypatch.setattr(attention, "time_backend", lambda kernel, *_: seconds.get(kernel, float("inf")))
    shape = tiny(), 2, 8, torch.device("cuda"), torch.float16
    assert attention.choose_backend(name, *shape) == chosen


def test_generation_does_without_cudnn():
    seen, model, enabled = [], strong(dense_model()), torch.backends.cuda.cudnn_sdp_enabled
    model.register_forward_pre_hook(lambda *_: seen.append(enabled()))
    model(tokens())
    model.generate(tokens(1, 3), max_new_tokens=2)
    assert seen == [True, False, False] and enabled()


# ---------------------------------------------------------------------------- norms and rotations
@pytest.mark.parametrize("nkv", [4, 2, 1])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_norms_and_rotations_equal_the_plain_operators(nkv, dtype, close, monkeypatch):
    config = tiny(use_moe=False, position="rope", qk_norm=True, n_head=4, n_kv_head=nkv)
    layer, hs = strong(CausalSelfAttention(config), std=1.0).to(dtype), config.head_dim
    packed = torch.randn(2, 9, (4 + 2 * nkv) * hs, dtype=dtype, requires_grad=True)
    for position_ids in (torch.arange(9)[None], torch.randint(99, (2, 9))):
        rotary = rotary_angles(position_ids, hs, 1e4)
        ours = layer.queries_keys_values(packed, rotary)
        assert ours[0].grad_fn.name() == "NormAndRotateBackward"
        with monkeypatch.context() as patch:
            patch.setattr(model_file, "can_norm_and_rotate", lambda packed: False)
            plain = layer.queries_keys_values(packed, rotary)
        leaves = packed, layer.q_norm.weight, layer.k_norm.weight
        directions = [torch.randn_like(part) for part in ours]
        both = ((*found, *torch.autograd.grad(found, leaves, directions)) for found in (ours, plain))
        for one, other in zip(*both, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert (one - other).abs().max() <= close * other.abs().max()


def test_norms_and_rotations_take_wide_numbers_on_a_cpu_outside_of_graphs(monkeypatch):
    assert can_norm_and_rotate(torch.zeros(1)) and not can_norm_and_rotate(torch.zeros(1, device="meta"))
    assert not can_norm_and_rotate(torch.zeros(1, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not can_norm_and_rotate(torch.zeros(1))
