"""Options of the model's architecture: each alone against a model written out here, together, in pairs; and
hashed n-gram embeddings around caches. test_documents.py has texts in a row."""

import copy
import itertools
import math

import pytest
import torch
from conftest import refuses, slow
from models import gradients, moe_by_hand, strong, tiny, tokens

from huggingface.outputs import CACHE
from layers.roles import role_of
from mixture_of_experts import MoE
from model import GPTLMHeadModel, RMSNorm

OPTIONS = {
    "rope": dict(position="rope"), "theta": dict(position="rope", rope_theta=500.0),
    "rmsnorm": dict(norm="rmsnorm"), "relu2": dict(activation="relu2"), "swiglu": dict(activation="swiglu"),
    "qk_norm": dict(qk_norm=True), "softcap": dict(logit_softcap=2.0),
    "untied": dict(tie_word_embeddings=False), "gqa": dict(n_kv_head=2), "mqa": dict(n_kv_head=1),
    "window": dict(sliding_window=4), "window and global": dict(sliding_window=4, global_every=2),
    "no bias": dict(bias=False), "moe": dict(use_moe=True, expert_hidden_size=24, moe_every=2),
    "shared expert": dict(use_moe=True, num_experts_per_tok=1, num_shared_experts=2, expert_hidden_size=24,
                          moe_loss_type="diversity_regularization", router_bias_update_rate=0.1),
    "zero_proj": dict(init="zero_proj"), "ngrams": dict(ngram_order=3, ngram_rows=50),
}  # fmt: skip
# These options stand for their kind; two values of one field are no pair.
SAME = ("window", "window and global"), ("relu2", "swiglu")
PAIRED = [name for name in OPTIONS if name not in ("theta", "mqa", "shared expert")]
PAIRS = [pair for pair in itertools.combinations(PAIRED, 2) if pair not in SAME]
# Nearly all of today's models' options at once.
MODERN = ("rope", "rmsnorm", "swiglu", "qk_norm", "softcap", "untied", "gqa", "window and global", "moe")


def build(*names: str) -> GPTLMHeadModel:
    """The tiny model, dense by default, with these options and large weights; zero_proj keeps its zeros."""
    fields = dict(use_moe=False)
    for name in names:
        fields |= OPTIONS[name]
    model = GPTLMHeadModel(tiny(**fields))
    zeros = {n: p.clone() for n, p in model.named_parameters() if "c_proj" in n and "zero_proj" in names}
    strong(model).load_state_dict(zeros, strict=False)
    return model


def wake(model: GPTLMHeadModel, ids: torch.Tensor) -> None:
    """With zero_proj, every block is the identity at first, and a step of training moves all projections."""
    first, second, last = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(first, second) and torch.equal(model.transformer.ln_f(first), last)
    projections = {name: p for name, p in model.named_parameters() if "c_proj" in name}
    assert len(projections) >= 4 and not any(p.any() for p in projections.values())
    model(ids, targets=ids)[1].backward()
    torch.optim.Adam(projections.values(), lr=0.1).step()
    model.zero_grad()
    assert all(p.abs().max() > 0.09 for p in projections.values())


# ---------------------------------------------------------------------------- the reference, in float64
def norm_by_hand(norm, x):
    x = x if isinstance(norm, RMSNorm) else x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    return y if norm.bias is None else y + norm.bias


def turn(x, theta):
    """RoPE of heads x (nh, T, hs): channels i and i + hs/2 are a complex number that is turned."""
    half = x.size(2) // 2
    position, channel = (torch.arange(n, dtype=torch.float64) for n in (x.size(1), half))
    angle = position[:, None] * theta ** (-channel / half)  # (T, hs/2)
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag], dim=2)


def attention_by_hand(attn, x, config, window):
    (T, C), kv_heads = x.shape, config.n_kv_head or config.n_head
    size = C // config.n_head
    parts = attn.c_attn(x).split([C, kv_heads * size, kv_heads * size], dim=1)
    q, k, v = (part.view(T, -1, size).transpose(0, 1) for part in parts)  # (nh or nkv, T, hs)
    if config.qk_norm:
        q, k = norm_by_hand(attn.q_norm, q), norm_by_hand(attn.k_norm, k)
    if config.position == "rope":
        q, k = turn(q, config.rope_theta), turn(k, config.rope_theta)
    distance, shared = torch.arange(T)[:, None] - torch.arange(T), torch.arange(config.n_head) * kv_heads
    k, v = (part[shared // config.n_head] for part in (k, v))
    hidden = (distance < 0) | (distance >= (window or T))
    score = (q @ k.mT / math.sqrt(size)).masked_fill(hidden, -math.inf)
    return attn.c_proj((score.softmax(2) @ v).transpose(0, 1).flatten(1))


def mlp_by_hand(mlp, x):
    h = mlp.c_fc(x)
    if mlp.activation == "swiglu":
        gate, up = h.chunk(2, dim=1)
        h = gate / (1 + (-gate).exp()) * up
    elif mlp.activation == "relu2":
        h = torch.where(h > 0, h * h, 0.0)
    else:
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return mlp.c_proj(h)


def ngrams_by_hand(table, ids, order, rows):
    """For each token the vectors of its n-grams, each one's row from the polynomial of its ids, modulo."""
    x = torch.zeros(len(ids), table.size(1), dtype=torch.float64)
    for t, n in itertools.product(range(len(ids)), range(2, order + 1)):
        digits = [ids[t - d].item() + 1 if d <= t else 0 for d in range(n)]
        code = sum(digit * 48271 ** (n - 1 - d) for d, digit in enumerate(digits)) % (2**31 - 1)
        x[t] += table[(n - 2) * rows + code % rows]
    return x


def logits_by_hand(model: GPTLMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one text, ids (T,)."""
    config, parts = model.config, copy.deepcopy(model).double().transformer
    x = parts.wte.weight[ids]
    if config.position == "learned":
        x = x + parts.wpe.weight[: len(ids)]
    if config.ngram_order:
        x = x + ngrams_by_hand(parts.ngrams.weight, ids, config.ngram_order, config.ngram_rows)
    for layer, block in enumerate(parts.h):
        local = config.sliding_window and not (config.global_every and (layer + 1) % config.global_every == 0)
        y = norm_by_hand(block.ln_1, x)
        x = x + attention_by_hand(block.attn, y, config, config.sliding_window if local else None)
        y, mlp = norm_by_hand(block.ln_2, x), block.mlp
        if isinstance(mlp, MoE):
            x, mlp = x + moe_by_hand(mlp, y), mlp.shared  # None, or an MLP too
        x = x if mlp is None else x + mlp_by_hand(mlp, y)
    head = model.transformer.wte if config.tie_word_embeddings else model.lm_head
    logits, cap = norm_by_hand(parts.ln_f, x) @ head.weight.double().t(), config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


# ---------------------------------------------------------------------------- every option alone
@pytest.mark.parametrize("names", [*((name,) for name in OPTIONS), MODERN], ids=" + ".join)
@torch.no_grad()
def test_options_equal_the_written_out_model(names):
    """In fp32 with the fused attention and with the eager one; in float64 (RoPE's angles are fp32)."""
    model, ids = build(*names), tokens(2, 16)
    expected = torch.stack([logits_by_hand(model, row) for row in ids])
    plain, state = build(), model.state_dict()
    alike = all(state[name].shape == p.shape for name, p in plain.state_dict().items() if name in state)
    if alike and names != ("zero_proj",):  # zero_proj is nothing but weights
        plain.load_state_dict(model.state_dict(), strict=False)
    # Without this, the comparisons below could pass although the option does nothing.
    assert (plain(ids).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.double()(ids).logits, expected, rtol=1e-6, atol=5e-6)


# ---------------------------------------------------------------------------- all pairs
# These four models have every pair; slow: each pair alone.
ALL = [[name for name in PAIRED if name not in without] for without in itertools.product(*SAME)]


@pytest.mark.parametrize("names", [*ALL, *slow(*PAIRS)], ids=" + ".join)
def test_options_together(names):
    """All gradients, with both attentions; a cache changes nothing, and padding changes nothing."""
    model, ids, results = build(*names), tokens(2, 16), []
    model.train()
    if "zero_proj" in names:
        wake(model, ids)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits, loss = model(ids, targets=ids)
        loss.backward()
        results.append((logits, loss, gradients(model)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for name, grad in gradients(model).items():  # not all positions and experts are asked for
        assert grad.isfinite().all() and ("wpe" in name or ".experts." in name or grad.any()), name
    model.eval()
    with torch.no_grad():
        full = model(ids).logits
        output = model(ids[:, :6], use_cache=True)
        parts = [output.logits]
        for piece in ids[:, 6:].split([1, 1, 5, 2, 1], dim=1):  # past the window
            output = model(piece, past_key_values=output[CACHE], use_cache=True)
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=2e-5)
        padding = torch.ones(2, 16, dtype=torch.long)
        padding[0, :5] = 0
        alone = model(ids[:1, 5:]).logits
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            padded = model(ids, attention_mask=padding).logits[:1, 5:]
            torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)


# Each value of a field that a block's graph depends on is in one of three models; slow: each pair of values.
COMPILED = [
    ("aot_eager", ()), ("aot_eager", MODERN),
    ("aot_eager", ("rope", "relu2", "no bias", "window", "shared expert")),
    *slow(*(("eager", pair) for pair in PAIRS if not {"softcap", "untied", "zero_proj"} & {*pair})),
]  # fmt: skip


@pytest.mark.parametrize("backend_and_options", COMPILED, ids=lambda case: " + ".join([case[0], *case[1]]))
def test_compiles_in_one_graph(backend_and_options):
    """The blocks, as training compiles them, give the same loss and gradients. "eager" runs the captured
    graph, which is quick; "aot_eager" does all but generate code."""
    backend, names = backend_and_options
    torch._dynamo.reset()
    model, twin, ids = build(*names).train(), build(*names).train(), tokens(2, 16)
    for block in model.transformer.h:
        block.compile(fullgraph=True, backend=backend)
    losses = []
    for each in (model, twin):
        loss = each(ids, targets=ids)[1]
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- n-grams
@torch.no_grad()
def test_a_forward_without_the_ids_before_is_refused_by_name():
    """Embeddings have no ids. After a change of the cache they must be given."""
    model, ids = build("ngrams"), tokens(2, 12)
    refuses("ngram_order=3: inputs_embeds", model, inputs_embeds=torch.randn(1, 2, model.config.n_embd))
    whole, cache = model(ids).logits, model(ids, use_cache=True)[CACHE]
    for change in (lambda: cache.reorder_cache(torch.tensor([1, 0])), lambda: cache.crop(-4)):
        change()
        refuses("ngram_order=3.*previous_ids", model, ids[:, :1], past_key_values=cache)
    previous = torch.stack([ids[:, 7:8], ids[:, 6:7]], dim=-1).flip(0)  # the rows were exchanged
    logits = model(ids[:, 8:9].flip(0), past_key_values=cache, previous_ids=previous).logits
    torch.testing.assert_close(logits.flip(0)[:, 0], whole[:, 8], atol=1e-5, rtol=1e-5)


def test_a_new_model_starts_as_the_one_without_n_grams_and_learns_their_tables():
    with_tables, ids = GPTLMHeadModel(tiny(**OPTIONS["ngrams"])).train(), tokens(2, 12)
    plain = GPTLMHeadModel(tiny())
    missing = plain.load_state_dict(with_tables.state_dict(), strict=False)
    assert missing.unexpected_keys == ["transformer.ngrams.weight"] and not missing.missing_keys
    torch.testing.assert_close(with_tables(ids).logits, plain(ids).logits)
    with_tables(ids, targets=ids)[1].backward()
    touched = with_tables.transformer.ngrams.weight.grad.any(-1).view(2, 50)
    assert (touched.sum(-1) > 5).all()
    role = role_of("transformer.ngrams.weight")
    assert role.part == "embeddings" and not role.decays and not role.is_matrix
    assert with_tables.get_num_params() == plain.get_num_params()
    assert with_tables.flops_per_token() == plain.flops_per_token()


def test_assisted_generation_with_n_grams_equals_plain_generation():
    model, ids = build("ngrams"), tokens(1, 3).repeat(1, 2)
    how = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **how), model.generate(ids, **how))
