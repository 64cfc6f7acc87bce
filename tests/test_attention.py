"""Attention and its options against formulas written out in float64 and against Hugging Face.

Run: python -m pytest tests/test_attention.py
"""

import itertools
import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from huggingface.outputs import CACHE
from layers.attention import attention_reference
from model import (
    CausalSelfAttention,
    GPTConfig,
    GPTLMHeadModel,
    LayerNorm,
    RMSNorm,
    build_norm,
    rotary_angles,
    rotate,
)

OPTIONS = [
    dict(),
    dict(n_kv_head=2),
    dict(n_kv_head=1, position="rope"),
    dict(position="rope", rope_theta=500.0, qk_norm=True),
    dict(sliding_window=5),
    dict(sliding_window=3, position="rope", n_kv_head=2, qk_norm=True, bias=False),
]


def tiny(**fields) -> GPTConfig:
    defaults = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=16, use_moe=False)
    return GPTConfig(**defaults | fields)


def strong(module, std=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -----------------------------------------------------------------------------
# Norms and rotary positions


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias):
    ours, stock = strong(LayerNorm(32, bias)), torch.nn.LayerNorm(32, bias=bias)
    stock.load_state_dict(ours.state_dict())
    x = normal(2, 3, 32) * 3 + 1
    assert torch.equal(ours(x), stock(x))
    assert (ours.bias is None) != bias


def test_rms_norm_by_the_formula():
    norm = strong(RMSNorm(32, eps=1e-3))
    x = normal(2, 3, 32) * 0.1
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert torch.allclose(norm(x).double(), expected, atol=1e-6)
    low = norm(x.bfloat16())  # statistics are those of fp32
    assert torch.allclose(low.double(), expected, atol=0.02)
    assert norm.double()(wide).dtype == torch.float64
    assert isinstance(build_norm(tiny(norm="rmsnorm")), RMSNorm)
    assert build_norm(tiny(bias=False, norm_eps=1e-6)).eps == 1e-6


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotary_positions_are_llamas(theta):
    B, nh, T, hs = 2, 3, 9, 16
    q, k = normal(B, nh, T, hs), normal(B, nh, T, hs, seed=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 100, 101, 102, 900, 901, 902]])
    llama = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=nh * hs, num_attention_heads=nh,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )  # fmt: skip
    expected = apply_rotary_pos_emb(q, k, *llama(q, positions))
    cos, sin = rotary_angles(positions, hs, theta)
    for ours, stock in zip((rotate(q, cos, sin), rotate(k, cos, sin)), expected, strict=True):
        assert torch.allclose(ours, stock, atol=1e-6)
    # what a query and a key have in common depends on their distance alone
    shifted = rotary_angles(positions + 37, hs, theta)
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT
    assert torch.allclose(scores, rotate(q, *shifted) @ rotate(k, *shifted).mT, atol=1e-3)
    assert not torch.allclose(scores, q @ k.mT, atol=1e-1)


# -----------------------------------------------------------------------------
# Attention


def attention_by_loops(q, k, v, window):
    """softmax(q k / sqrt(hs)) v in float64, one query at a time over the keys it may see."""
    B, nh, T, hs = q.shape
    group = nh // k.size(1)
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(B, nh, T, hs, dtype=torch.float64)
    for b, h, t in itertools.product(range(B), range(nh), range(T)):
        seen = slice(max(0, t - window + 1), t + 1)
        score = k[b, h // group, seen] @ q[b, h, t] / math.sqrt(hs)
        out[b, h, t] = torch.softmax(score, 0) @ v[b, h // group, seen]
    return out


def layer_by_hand(layer, config, x, positions):
    """The whole layer in float64, from its weights."""
    B, T, C = x.shape
    nkv, hs = config.n_kv_head or config.n_head, C // config.n_head
    w = {name: value.double() for name, value in layer.state_dict().items()}
    qkv = x.double() @ w["c_attn.weight"].T + w.get("c_attn.bias", 0)
    q, k, v = qkv[..., :C], qkv[..., C : C + nkv * hs], qkv[..., C + nkv * hs :]
    q, k, v = (part.unflatten(-1, (-1, hs)).transpose(1, 2) for part in (q, k, v))
    if config.qk_norm:
        for name in "qk":
            part = q if name == "q" else k
            part = part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}_norm.weight"]
            q, k = (part, k) if name == "q" else (q, part)
    if config.position == "rope":
        frequency = config.rope_theta ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
        turn = torch.polar(torch.ones(T, hs // 2, dtype=torch.float64), positions[:, None] * frequency)
        halves = [torch.complex(part[..., : hs // 2], part[..., hs // 2 :]) * turn for part in (q, k)]
        q, k = (torch.cat([part.real, part.imag], dim=-1) for part in halves)
    y = attention_by_loops(q, k, v, config.sliding_window or T)
    return y.transpose(1, 2).reshape(B, T, C) @ w["c_proj.weight"].T + w.get("c_proj.bias", 0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", OPTIONS)
def test_layer_against_loops_in_float64(options, implementation):
    config = tiny(n_layer=1, **options)
    config._attn_implementation = implementation  # a model does this with the argument of that name
    layer = strong(CausalSelfAttention(config)).eval()
    x, positions, mask = normal(2, 11, 32), torch.arange(11), None
    if config.sliding_window:
        distance = positions[:, None] - positions
        mask = (distance >= 0) & (distance < config.sliding_window)
    rotary = rotary_angles(positions[None], 8, config.rope_theta) if config.position == "rope" else None
    y = layer(x, mask, rotary)
    expected = layer_by_hand(layer, config, x, positions)
    assert (y.double() - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("options", OPTIONS)
def test_fast_path_equals_the_written_out_one(options):
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 13, dtype=torch.long)
    padding[0, :4] = 0
    for mask in (None, padding):
        results = []
        for implementation in ("sdpa", "eager"):
            model = strong(GPTLMHeadModel(tiny(attn_implementation=implementation, **options)), std=0.3)
            _, loss = model(ids, targets=ids.masked_fill(padding == 0, -1), attention_mask=mask)
            loss.backward()
            logits = model.eval()(ids, attention_mask=mask).logits
            logits = logits[padding.bool()] if mask is not None else logits
            results.append([logits, loss, *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-5) and a.isfinite().all()


def test_attention_weights_sum_to_one_and_see_only_the_window():
    model = strong(GPTLMHeadModel(tiny(n_layer=4, sliding_window=5, global_every=2, n_kv_head=2))).eval()
    ids = torch.randint(0, 61, (2, 13))
    weights = model(ids, output_attentions=True).attentions
    distance = torch.arange(13)[:, None] - torch.arange(13)
    for layer, weight in enumerate(weights):
        assert torch.allclose(weight.sum(-1), torch.ones(2, 4, 13), atol=1e-5)
        visible = (distance >= 0) & (distance < (13 if layer % 2 else 5))
        assert torch.equal(weight > 0, visible.expand_as(weight))


def test_grouped_queries_are_attention_with_repeated_heads():
    grouped = strong(CausalSelfAttention(tiny(n_kv_head=2)))
    plain = CausalSelfAttention(tiny(n_kv_head=4))
    q, k, v = grouped.c_attn.weight.split([32, 16, 16])
    bq, bk, bv = grouped.c_attn.bias.split([32, 16, 16])

    def repeat(rows):
        return rows.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)

    weights = {
        "c_attn.weight": torch.cat([q, repeat(k), repeat(v)]),
        "c_attn.bias": torch.cat([bq, repeat(bk), repeat(bv)]),
        "c_proj.weight": grouped.c_proj.weight,
        "c_proj.bias": grouped.c_proj.bias,
    }
    plain.load_state_dict(weights)
    x = normal(2, 9, 32)
    assert torch.allclose(plain(x), grouped(x), atol=1e-5)
    default = CausalSelfAttention(tiny())
    default.load_state_dict(weights)
    assert torch.equal(default(x), plain(x))
    model = GPTLMHeadModel(tiny(n_kv_head=1)).eval()
    cache = model(torch.zeros(1, 5, dtype=torch.long))[CACHE]
    assert cache.layers[0].keys.shape == (1, 1, 5, 8)


def test_a_window_as_long_as_the_text_is_none():
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    full = strong(GPTLMHeadModel(tiny())).eval()(ids).logits
    for window in (13, 16, 40):
        assert torch.equal(strong(GPTLMHeadModel(tiny(sliding_window=window))).eval()(ids).logits, full)
    shorter = strong(GPTLMHeadModel(tiny(sliding_window=12))).eval()(ids).logits
    assert torch.allclose(shorter[:, :12], full[:, :12], atol=1e-5)
    assert not torch.allclose(shorter[:, 12], full[:, 12], atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_text_in_pieces_through_the_cache_gives_the_same_logits(options):
    model = strong(GPTLMHeadModel(tiny(**options)), std=0.3).eval()
    ids = torch.randint(0, 61, (2, 15), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    cache, pieces = DynamicCache(config=model.config), []
    for piece in ids.split([4, 1, 1, 6, 2, 1], dim=1):
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
    if model.config.sliding_window:
        assert cache.layers[0].keys.size(2) < 15  # what no query can see any more is forgotten


def test_dropout_falls_on_attention_weights_in_training():
    layer = strong(CausalSelfAttention(tiny(dropout=0.5)))
    x = normal(1, 9, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    q = normal(1, 1, 4000, 2)
    y, weight = attention_reference(q, q[:, :, :1], torch.ones(1, 1, 1, 2), torch.ones(4000, 1).bool(), 0.5)
    assert weight.eq(1).all() and set(y.unique().tolist()) == {0.0, 2.0}
    assert y.mean().item() == pytest.approx(1.0, abs=0.1)
