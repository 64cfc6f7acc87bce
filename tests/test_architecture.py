"""Every option of the architecture, alone against a reference written out here, and all of them in pairs;
norms, attention and its cache.

Run: python -m pytest tests/test_architecture.py
"""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from huggingface.outputs import CACHE
from layers.attention import attention_reference, flex_window, window_block_mask
from model import (
    CausalSelfAttention,
    GPTConfig,
    GPTLMHeadModel,
    LayerNorm,
    RMSNorm,
    build_norm,
    rotary_angles,
    rotate,
)  # fmt: skip

OPTIONS = {
    "rope": dict(position="rope"),
    "theta": dict(position="rope", rope_theta=500.0),
    "rmsnorm": dict(norm="rmsnorm"),
    "relu2": dict(activation="relu2"),
    "swiglu": dict(activation="swiglu"),
    "qk_norm": dict(qk_norm=True),
    "softcap": dict(logit_softcap=2.0),
    "untied": dict(tie_word_embeddings=False),
    "gqa": dict(n_kv_head=2),
    "mqa": dict(n_kv_head=1),
    "window": dict(sliding_window=4),
    "window and global": dict(sliding_window=4, global_every=2),
    "no bias": dict(bias=False),
    "moe": dict(use_moe=True, num_experts=3, num_experts_per_tok=2, expert_hidden_size=24, moe_every=2),
    "shared expert": dict(use_moe=True, num_experts=3, num_shared_experts=1, expert_hidden_size=24),
    "zero_proj": dict(init="zero_proj"),
}
# Pairs of two values of one field are no pairs; these stand for their kind.
PAIRED = [name for name in OPTIONS if name not in ("theta", "mqa", "shared expert")]
PAIRS = [pair for pair in itertools.combinations(PAIRED, 2) if pair != ("window", "window and global")]


# Values of the fields that a block's graph depends on; "" is the default.
FACTORS = [
    ("", "rope"), ("", "rmsnorm"), ("", "relu2", "swiglu"), ("", "qk_norm"), ("", "gqa"), ("", "no bias"),
    ("", "window", "window and global"), ("", "moe", "shared expert"),
]  # fmt: skip


def covering_models() -> list[tuple[str, ...]]:
    """A dozen models in which every two values of different fields meet somewhere: of some hundred random
    ones, again and again the one with most pairs that have not met."""

    def pairs(values):
        return set(itertools.combinations(enumerate(values), 2))

    random_values, models = random.Random(0), []
    missing = set().union(*map(pairs, itertools.product(*FACTORS)))
    while missing:
        candidates = [[random_values.choice(values) for values in FACTORS] for _ in range(300)]
        best = max(candidates, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        models.append(tuple(filter(None, best)))
    return models


def build(*names: str, seed: int = 0, **changes) -> GPTLMHeadModel:
    """A small model with the named options, all of its weights random: norms, biases and zeros as well, but
    not those that zero_proj makes zero."""
    sizes = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=64, block_size=24, use_moe=False)
    for name in names:
        sizes |= OPTIONS[name]
    torch.manual_seed(seed)
    model = GPTLMHeadModel(GPTConfig(**(sizes | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not ("c_proj" in name and model.config.init == "zero_proj"):
                parameter.normal_(mean=1.0 if ".ln_" in name or "_norm." in name else 0.0, std=0.2)
    return model.eval()


def wake(model: GPTLMHeadModel, ids: torch.Tensor) -> None:
    """Of zero_proj: every block is the identity at first, and a step of training moves all projections."""
    first, second, last = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(first, second) and torch.equal(model.transformer.ln_f(first), last)
    projections = {name: p for name, p in model.named_parameters() if "c_proj" in name}
    assert len(projections) >= 4 and not any(p.any() for p in projections.values())
    model(ids, targets=ids)[1].backward()
    torch.optim.Adam(projections.values(), lr=0.1).step()
    model.zero_grad()
    for name, p in projections.items():
        assert p.abs().max().item() == pytest.approx(0.1, rel=1e-3), name
    first, second, _ = model(ids, output_hidden_states=True).hidden_states
    assert (first - second).abs().max() > 0.1


def tokens(B: int = 2, T: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- the reference, in float64


def norm_reference(x, weights, name, config):
    if config.norm == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name + ".weight"]
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name + ".weight"]
    return x + weights.get(name + ".bias", 0.0)


def turn(vector, position, theta):
    """RoPE of one head's vector (hs,): channel i and i + hs/2 are a complex number that is turned."""
    half = len(vector) // 2
    number = torch.complex(vector[:half], vector[half:])
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    number = number * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag])


def attention_head(q, k, v, window):
    """q, k, v (T, hs) of one head; query i looks at the keys i - window + 1 .. i."""
    rows = []
    for i in range(len(q)):
        start = 0 if window is None else max(0, i - window + 1)
        score = k[start : i + 1] @ q[i] / math.sqrt(q.size(1))
        rows.append(score.softmax(0) @ v[start : i + 1])
    return torch.stack(rows)


def attention_layer(x, weights, name, config, window):
    T, C = x.shape
    size, kv_heads = C // config.n_head, config.n_kv_head or config.n_head
    mixed = x @ weights[name + ".c_attn.weight"].t() + weights.get(name + ".c_attn.bias", 0.0)
    q, k, v = mixed[:, :C], mixed[:, C : C + kv_heads * size], mixed[:, C + kv_heads * size :]
    heads = []
    for head in range(config.n_head):
        shared = head * kv_heads // config.n_head
        parts = [q[:, head * size :][:, :size], k[:, shared * size :][:, :size]]
        if config.qk_norm:
            for i, which in enumerate(("q_norm", "k_norm")):
                parts[i] = parts[i] / (parts[i].square().mean(-1, keepdim=True) + 1e-5).sqrt()
                parts[i] = parts[i] * weights[f"{name}.{which}.weight"]
        if config.position == "rope":
            theta = config.rope_theta
            parts = [torch.stack([turn(p[t], t, theta) for t in range(T)]) for p in parts]
        heads.append(attention_head(*parts, v[:, shared * size :][:, :size], window))
    bias = weights.get(name + ".c_proj.bias", 0.0)
    return torch.cat(heads, 1) @ weights[name + ".c_proj.weight"].t() + bias


def feed_forward(x, w1, b1, w2, b2, activation):
    h = x @ w1.t() + b1
    if activation == "swiglu":
        gate, up = h[..., : w2.size(1)], h[..., w2.size(1) :]
        h = gate / (1 + (-gate).exp()) * up
    elif activation == "relu2":
        h = torch.where(h > 0, h * h, 0.0)
    else:
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ w2.t() + b2


def feed_forward_layer(x, weights, name, config):
    def dense(prefix, x):
        part = [weights[f"{prefix}.c_fc.weight"], weights.get(f"{prefix}.c_fc.bias", 0.0)]
        part += [weights[f"{prefix}.c_proj.weight"], weights.get(f"{prefix}.c_proj.bias", 0.0)]
        return feed_forward(x, *part, config.activation)

    if f"{name}.gate.weight" not in weights:
        return dense(name, x)
    stacked = [weights.get(f"{name}.experts.{n}") for n in ("c_fc", "c_fc_bias", "c_proj", "c_proj_bias")]
    rows = []
    for row in x:
        score, chosen = (weights[f"{name}.gate.weight"] @ row).softmax(0).topk(config.num_experts_per_tok)
        score = score / score.sum() if config.num_experts_per_tok > 1 else score
        experts = [[0.0 if t is None else t[e] for t in stacked] for e in chosen]
        parts = (feed_forward(row, *e, config.activation) for e in experts)
        rows.append(sum(s * part for s, part in zip(score, parts, strict=True)))
    y = torch.stack(rows)
    return y + dense(f"{name}.shared", x) if config.num_shared_experts else y


def reference_logits(model: GPTLMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one text, ids (T,), by loops over heads, positions and tokens."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    x = weights["transformer.wte.weight"][ids]
    if config.position == "learned":
        x = x + weights["transformer.wpe.weight"][: len(ids)]
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        local = config.sliding_window and not (config.global_every and (layer + 1) % config.global_every == 0)
        window = config.sliding_window if local else None
        y = norm_reference(x, weights, name + ".ln_1", config)
        x = x + attention_layer(y, weights, name + ".attn", config, window)
        y = norm_reference(x, weights, name + ".ln_2", config)
        x = x + feed_forward_layer(y, weights, name + ".mlp", config)
    head = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = norm_reference(x, weights, "transformer.ln_f", config) @ weights[head].t()
    cap = config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


# ---------------------------------------------------------------------------- every option alone


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_option_equals_the_written_out_model(option):
    """fp32 to 1e-5, by the fast path and by the eager one; in float64 to 1e-6 (RoPE's angles are fp32)."""
    model, ids = build(option), tokens()
    expected = torch.stack([reference_logits(model, row) for row in ids])
    plain = build()
    same_shapes = {n: p for n, p in plain.state_dict().items() if n in model.state_dict()}
    alike = all(model.state_dict()[n].shape == p.shape for n, p in same_shapes.items())
    if alike and option != "zero_proj":  # which is but weights
        plain.load_state_dict(model.state_dict(), strict=False)
    # otherwise every comparison below could pass without the option
    assert (plain(ids).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.double()(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_all_modern_options_together_equal_the_written_out_model():
    names = "rope", "rmsnorm", "swiglu", "qk_norm", "softcap", "untied", "gqa", "window and global", "moe"
    model = build(*names)
    ids = tokens()
    expected = torch.stack([reference_logits(model, row) for row in ids])
    torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_equals_llamas(theta):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16)
    positions = torch.stack([torch.arange(50), 18 * torch.arange(50) + 7])
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    expected = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions))
    rotary = rotary_angles(positions, 16, theta)
    for mine, theirs in zip((rotate(q, *rotary), rotate(k, *rotary)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert (rotate(q, *rotary) - q).abs().max() > 1


@torch.no_grad()
def test_grouped_queries():
    """As many key/value heads as heads: plain attention. Fewer: plain attention with repeated heads."""
    ids = tokens()
    plain, same = build("rope"), build("rope", n_kv_head=4)
    torch.testing.assert_close(same(ids).logits, plain(ids).logits, rtol=0, atol=0)
    grouped = build("rope", "gqa")
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if ".c_attn." in name:
            q, k, v = tensor.split([32, 16, 16])
            k, v = (t.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for t in (k, v))
            weights[name] = torch.cat([q, k, v])
    plain.load_state_dict(weights)
    torch.testing.assert_close(grouped(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    cache = grouped(ids, use_cache=True)[CACHE]
    assert cache.layers[0].keys.shape == (2, 2, 16, 8)  # (B, nkv, T, hs): half of plain attention's


@torch.no_grad()
def test_windows():
    """A window as long as the text is none; layers' kinds; the cache of a windowed layer stays short."""
    ids = tokens()
    full = build("rope")(ids).logits
    torch.testing.assert_close(build("rope", sliding_window=16)(ids).logits, full, rtol=0, atol=1e-6)
    assert (build("rope", sliding_window=15)(ids).logits - full).abs().max() > 1e-4
    model = build("rope", "window", n_layer=6, global_every=3)
    assert model.config.layer_types == (["sliding_attention"] * 2 + ["full_attention"]) * 2
    lengths = [layer.keys.size(2) for layer in model(ids, use_cache=True)[CACHE].layers]
    assert lengths == [3, 3, 16, 3, 3, 16]  # with the next token they are the window


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias):
    ours, stock, x = LayerNorm(32, bias), torch.nn.LayerNorm(32, bias=bias), 3 * torch.randn(2, 3, 32) + 1
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), stock(x)) and (ours.bias is None) != bias


def test_rms_norm_by_the_formula():
    norm, x = RMSNorm(32, eps=1e-3), torch.randn(2, 3, 32) * 0.1
    torch.nn.init.normal_(norm.weight)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert torch.allclose(norm(x).double(), expected, atol=1e-6)
    assert torch.allclose(norm(x.bfloat16()).double(), expected, atol=0.02)  # statistics are those of fp32
    assert norm.double()(wide).dtype == torch.float64
    assert build_norm(GPTConfig(bias=False, norm_eps=1e-6)).eps == 1e-6


def test_zero_proj_begins_as_the_identity():
    """Projections into the residual stream are 0; test_model.py has gpt2's initialisation."""
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_embd=32, n_head=4, vocab_size=64, init="zero_proj")
    model, ids = GPTLMHeadModel(config), tokens(T=8)
    with torch.no_grad():
        x = model.transformer.wte(ids) + model.transformer.wpe.weight[:8]
        expected = F.layer_norm(x, (32,)) @ model.transformer.wte.weight.t()
        torch.testing.assert_close(model.eval()(ids).logits, expected)
    with pytest.raises(ValueError, match=r"init='zero'.*zero_proj"):
        GPTConfig(init="zero")


# ---------------------------------------------------------------------------- attention and its cache

ATTENTION = [(), ("gqa",), ("mqa", "rope"), ("theta", "qk_norm"), ("window",)]
ATTENTION.append(("window", "rope", "gqa", "qk_norm", "no bias"))


@pytest.mark.parametrize("names", ATTENTION)
def test_fast_path_equals_the_written_out_one(names):
    """Loss, logits and gradients, with padding and without."""
    ids, padding = tokens(T=13), torch.ones(2, 13, dtype=torch.long)
    padding[0, :4] = 0
    for mask in (None, padding):
        results = []
        for implementation in ("sdpa", "eager"):
            model = build(*names, attn_implementation=implementation).train()
            _, loss = model(ids, targets=ids.masked_fill(padding == 0, -1), attention_mask=mask)
            loss.backward()
            logits = model.eval()(ids, attention_mask=mask).logits
            logits = logits[padding.bool()] if mask is not None else logits
            results.append([logits, loss, *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-5) and a.isfinite().all()


@pytest.mark.parametrize("names", ATTENTION)
def test_a_text_in_pieces_through_the_cache_gives_the_same_logits(names):
    model, ids = build(*names), tokens(T=15)
    cache, pieces = DynamicCache(config=model.config), []
    for piece in ids.split([4, 1, 1, 6, 2, 1], dim=1):
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(pieces, 1), model(ids).logits, atol=2e-5)


def test_attention_weights_sum_to_one_and_see_only_the_window():
    model = build("window and global", "gqa", n_layer=4)
    distance = torch.arange(13)[:, None] - torch.arange(13)
    for layer, weight in enumerate(model(tokens(T=13), output_attentions=True).attentions):
        assert torch.allclose(weight.sum(-1), torch.ones(2, 4, 13), atol=1e-5)
        visible = (distance >= 0) & (distance < (13 if layer % 2 else 4))
        assert torch.equal(weight > 0, visible.expand_as(weight))


def test_dropout_falls_on_attention_weights_in_training():
    layer, x = build(dropout=0.5).transformer.h[0].attn.train(), torch.randn(1, 9, 32)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    q = torch.randn(1, 1, 4000, 2)
    y, weight = attention_reference(q, q[:, :, :1], torch.ones(1, 1, 1, 2), torch.ones(4000, 1).bool(), 0.5)
    assert weight.eq(1).all() and set(y.unique().tolist()) == {0.0, 2.0}
    assert y.mean().item() == pytest.approx(1.0, abs=0.1)


# ---------------------------------------------------------------------------- all pairs


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_pair(pair):
    """Shapes, gradients of all parameters, a cache that changes nothing, and padding that changes nothing."""
    model, ids = build(*pair), tokens()
    model.train()
    if "zero_proj" in pair:
        wake(model, ids)
    logits, loss = model(ids, targets=ids)
    loss.backward()
    assert logits.shape == (2, 16, 64)
    for name, parameter in model.named_parameters():
        unused = "wpe" in name or ".experts." in name  # rows of positions and experts that nobody asked for
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert unused or parameter.grad.abs().max() > 0, name
    model.eval()
    with torch.no_grad():
        full = model(ids).logits
        output = model(ids[:, :6], use_cache=True)
        parts = [output.logits]
        for t in range(6, 16):  # past the window, one token at a time
            output = model(ids[:, t : t + 1], past_key_values=output[CACHE], use_cache=True)
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=2e-5)
        padding = torch.ones(2, 16, dtype=torch.long)
        padding[0, :5] = 0
        alone = model(ids[:1, 5:]).logits
        padded = model(ids, attention_mask=padding).logits[:1, 5:]
        torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "backend, names",
    [
        *(("eager", names) for names in covering_models()),
        ("aot_eager", ("rope", "gqa")), ("aot_eager", ("window", "qk_norm")),
        ("aot_eager", ("swiglu", "moe")), ("aot_eager", ("rmsnorm", "relu2")),
        (
            "aot_eager",
            ("rope", "rmsnorm", "relu2", "qk_norm", "gqa", "window and global", "moe", "softcap", "untied"),
        ),
    ],
)  # fmt: skip
def test_compiles_in_one_graph(backend, names):
    """The blocks, as training compiles them: same loss and gradients. "eager" runs the captured graph, which
    is quick, so that all pairs can have their turn; "aot_eager" goes up to code generation."""
    torch._dynamo.reset()
    model, twin, ids = build(*names).train(), build(*names).train(), tokens()
    for block in model.transformer.h:
        block.compile(fullgraph=True, backend=backend)
    losses = []
    for each in (model, twin):
        loss = each(ids, targets=ids)[1]
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------------- windows through FlexAttention


def written_out_window(T: int, window: int) -> torch.Tensor:
    i = torch.arange(T)
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < window)  # (T, T), query by key


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("T, window, block", [(300, 70, 128), (256, 128, 128), (96, 1, 16), (100, 33, 16)])
@torch.no_grad()
def test_block_mask_is_the_window(T, window, block):
    mask, expected = window_block_mask(T, window, torch.device("cpu"), block), written_out_window(T, window)
    grown = mask.to_dense()[0, 0].bool().repeat_interleave(block, 0).repeat_interleave(block, 1)[:T, :T]
    assert (grown | ~expected).all()  # no visible key is in a block that is left out
    looked_at = mask.to_dense()[0, 0].sum(-1)
    assert looked_at.max() <= (window + block - 2) // block + 1  # O(window) keys per query, not O(T)
    i = torch.arange(T)
    assert torch.equal(mask.mask_mod(0, 0, i[:, None], i[None]), expected)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16) for heads in (4, 2, 2))
    slow = F.scaled_dot_product_attention(q, k, v, attn_mask=expected, enable_gqa=True)
    fast = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_layer_takes_a_block_mask():
    """Inside a compiled block, where its mask is an argument of the graph: one for all of a shape, though
    each training step makes a mask, and in it a function, of its own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = build("gqa", "window", n_embd=64, block_size=256).config
    torch.manual_seed(0)
    layer, x = CausalSelfAttention(config), torch.randn(2, 200, 64)
    expected = layer(x, written_out_window(200, 4)[None, None])
    layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        fast = layer(x, window_block_mask(200, 4, x.device))
        torch.testing.assert_close(fast, expected, rtol=0, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_block_masks_are_for_gpus_only():
    assert flex_window(build("window").config, 16, torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_windows_on_cuda_train_as_on_the_cpu():
    settings = dict(n_embd=64, block_size=512, n_layer=2)
    cpu = build("rope", "gqa", "window and global", **settings, sliding_window=100).train()
    gpu = build("rope", "gqa", "window and global", **settings, sliding_window=100).train().cuda()
    ids = tokens(T=300)
    assert flex_window(gpu.config, 300, torch.device("cuda", 0)) is not None
    for model, rows in ((cpu, ids), (gpu, ids.cuda())):
        model(rows, targets=rows)[1].backward()
    for (name, p), q in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu(), rtol=1e-2, atol=1e-3, msg=name)
