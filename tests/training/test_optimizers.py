"""Optimizers: schedules, Muon, AdamW and Adagrad against references, idle experts, FSDP's initial weights."""

import contextlib
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import refuses
from models import moe_layer, sure_layer, tiny, tokens

from mixture_of_experts import update_routers
from model import GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training import fsdp_init, parallel
from training.fsdp_init import initial_weights
from training.idle_experts import freeze_idle_experts
from training.muon import MuonAdamW, configure_muon
from training.optimizers import learning_rate

OPTIONS = dict(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), device_type="cpu")
# The row counts of the matrices that a parameter stacks: queries, keys and values; swiglu's gate and up.
ROWS = {"attn.c_attn.weight": [32, 16, 16], "mlp.c_fc.weight": [128, 128], "experts.c_fc": [24, 24]}


def build_model(**changes) -> GPTLMHeadModel:
    torch.manual_seed(0)
    experts = dict(moe_every=2, num_experts=3, num_experts_per_tok=1, expert_hidden_size=24)
    model = GPTLMHeadModel(tiny(n_embd=32, n_kv_head=2, activation="swiglu", **experts, **changes))
    model.update_routers()
    return model.train()


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What Newton-Schulz should give, by singular values: the quintic, five times, on each of them."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vh


@torch.no_grad()
def muon_step(weight: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, rows: list[int], steps: int):
    """Muon written out for one parameter: a loop over the matrices that it stacks."""
    momentum.mul_(0.95).add_(0.05 * grad)
    update = 0.05 * grad + 0.95 * momentum
    for block in zip(*(t.split(rows, dim=-2) for t in (weight, update)), strict=True):
        stacks = [t if t.dim() == 3 else t[None] for t in block]
        for w, u in zip(*stacks, strict=True):
            w.sub_(1e-2 * (0.2 * math.sqrt(max(u.shape)) * orthogonal(u, steps) + 0.1 * w))


@pytest.mark.parametrize("how", [dict(), dict(steps=3), dict(experts=False)])
def test_steps_equal_written_out_ones(how):
    """Muon's half equals muon_step, AdamW's half equals torch's AdamW to the bit. The optimizer is made anew
    from its saved state before every step."""
    model, twin = build_model().double(), build_model().double()
    optimizer = configure_muon(model, **OPTIONS, router_lr_mult=0.5, **how)
    adamw = twin.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", router_lr_mult=0.5)
    muons = {p for g in optimizer.param_groups if g["method"] == "muon" for p in g["params"]}
    momentum = {p: torch.zeros_like(p) for p in muons}
    for step in range(3):
        state = optimizer.state_dict()
        optimizer = configure_muon(model, **OPTIONS, router_lr_mult=0.5, **how)
        optimizer.load_state_dict(state)

        def closure(step=step):
            model.zero_grad()
            idx = tokens(2, 17, seed=step)
            loss = model(idx[:, :-1], targets=idx[:, 1:])[1]
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
        pairs = list(zip(model.named_parameters(), twin.parameters(), strict=True))
        for (name, p), q in pairs:
            if p in muons:
                rows = next((rows for end, rows in ROWS.items() if name.endswith(end)), [p.size(-2)])
                muon_step(q, p.grad, momentum[p], rows, how.get("steps", 5))
            else:
                q.grad = p.grad.clone()
        adamw.step()  # of what has a gradient
        for (name, p), q in pairs:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-7 if p in muons else 0, msg=name)


@pytest.mark.parametrize("sparse", [True, False])
def test_adagrad_updates_n_grams_as_torchs_does(sparse, monkeypatch):
    """From sparse gradients, which clipping measures and scales, or from dense ones, as in a process group.
    torch's Adagrad gets dense ones. Rows without n-grams stay as they are."""
    model, twin = (build_model(ngram_order=3, ngram_rows=64).double() for _ in range(2))
    with monkeypatch.context() as context:
        context.setattr(dist, "is_initialized", lambda: not sparse)
        optimizer = configure_muon(model, **OPTIONS, adagrad_ngrams=True)
    table, reference = model.transformer.ngrams.weight, twin.transformer.ngrams.weight
    before, used = table.detach().clone(), torch.zeros(len(table), dtype=torch.bool)
    adagrad = torch.optim.Adagrad([reference], lr=4e-2, eps=1e-10)
    layout = parallel.make_layout(parallel.World(0, 0, 1, torch.device("cpu")), "none", 0, 1)
    for step in range(3):
        twin.load_state_dict(model.state_dict())
        for part in (0, 1):  # a step of two micro-steps
            ids = tokens(2, 9, seed=2 * step + part)
            for each in (model, twin):
                each(ids[:, :-1], targets=ids[:, 1:])[1].backward()
        norms = [parallel.gradient_norms([each.parameters()], layout)[0] for each in (model, twin)]
        for each, norm in zip((model, twin), norms, strict=True):
            parallel.clip_gradients(each, 0.1, norm)
        assert table.grad.is_sparse == sparse and norms[0] > 0.1
        torch.testing.assert_close(norms[0], norms[1])
        torch.testing.assert_close(table.grad.to_dense(), reference.grad)
        used |= reference.grad.any(dim=1)
        optimizer.step()
        adagrad.step()
        torch.testing.assert_close(table, reference)
        model.zero_grad()
        twin.zero_grad()
    assert torch.equal((table != before).any(dim=1), used) and 0 < used.sum() < len(used)
    assert optimizer.state[table].keys() == {"sum"}


@pytest.mark.parametrize("kind", ["adamw", "muon", "muon without experts"])
def test_groups_follow_the_roles_of_parameters(kind):
    model = build_model(qk_norm=True, num_shared_experts=1, tie_word_embeddings=kind == "adamw")
    model.transformer.wte.weight.requires_grad_(False)  # and with it the head, if it is tied
    muon = partial(configure_muon, model, experts=kind == "muon")
    configure = model.configure_optimizers if kind == "adamw" else muon
    optimizer = configure(**OPTIONS, router_lr_mult=0.5, expert_lr_mult=2.0)
    where = {p: g for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert where.keys() == set(trained.values())
    matrix = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "experts.c_fc", "experts.c_proj")
    for name, parameter in trained.items():
        group, plain = where[parameter], name.endswith("bias") or "ln_" in name or "_norm" in name
        assert group["weight_decay"] == (0.0 if plain else 0.1), name
        role, mult = ("experts", 2.0) if ".experts." in name else ("rest", 1.0)
        role, mult = ("router", 0.5) if ".gate." in name else (role, mult)
        assert group["name"].startswith(role) and group["name"].endswith("without decay") == plain, name
        assert (group["lr_mult"], group["lr"]) == (mult, 1e-2 * mult), name
        by_muon = name.endswith(matrix) and kind != "adamw" and (kind == "muon" or role != "experts")
        if kind == "adamw":
            assert group["fused"] and group["betas"] == (0.9, 0.95)
        assert (group.get("method") == "muon") == by_muon, name


def test_the_state_of_another_optimizer_is_refused():
    model = build_model()
    adamw = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    refuses("groups .* --init_from", configure_muon(model, **OPTIONS).load_state_dict, adamw.state_dict())


# ---------------------------------------------------------------------------- idle experts
# The experts' weights decay a lot; the router is not trained.
ADAMW = dict(lr=0.1, weight_decay=0.5)


def take_step(layer, optimizer, loss, spared: bool = True) -> list[torch.Tensor]:
    """An optimizer step. Returns copies of the experts' parameters and of their moments, each (E, ...)."""
    loss.backward()
    update_routers([layer])
    counts = layer.last_step_counts()[None].numpy()
    with freeze_idle_experts([layer], optimizer, counts) if spared else contextlib.nullcontext():
        optimizer.step()
    optimizer.zero_grad()
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
    for bias in (100.0, -100.0, -100.0):
        layer.router_bias.copy_(torch.tensor([0.0, 0.0, 0.0, bias]))
        seen.append(take_step(layer, optimizer, layer(x).square().sum(), spared))
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
    steps = (x, [1, 1, 1, 1], [1, 1, 1, 1]), (x[:, :3], [1, 0, 0], [1, 1, 0])
    for rows, counted, scale in steps:
        update_routers([layer])
        y, auxiliary = layer(rows, torch.tensor([counted]), return_auxiliary=True)
        layer.accumulate(auxiliary)
        seen.append(take_step(layer, optimizer, (y.square() * torch.tensor(scale)[:, None]).sum()))
    assert layer.last_step_counts().tolist() == [1, 0, 0, 0]
    for before, after in zip(*seen, strict=True):
        assert [torch.equal(before[e], after[e]) for e in range(4)] == [False, False, True, True]


# ---------------------------------------------------------------------------- schedules
@pytest.mark.parametrize(("fields", "rates"), [
    ({}, {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.55 + 0.45 * math.sqrt(0.5), 60: 0.55, 110: 0.1, 120: 0.1}),
    (dict(schedule="wsd", wsd_decay_frac=0.2), {9: 1.0, 60: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 120: 0.1}),
    (dict(schedule="wsd", wsd_decay_frac=1.0), {60: 0.55}),  # at most the steps after the warmup
])  # fmt: skip
def test_schedules(fields, rates):
    """By hand: a warmup of 10 steps, 100 steps after it, and steps past the last one."""
    config = TrainConfig(max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110, **fields)
    assert {step: learning_rate(step, config) for step in rates} == pytest.approx(rates)


# ---------------------------------------------------------------------------- FSDP's initial weights
CONFIGS = {"dense": dict(use_moe=False), "moe": dict(moe_every=2, moe_loss_type="diversity_regularization"),
           "untied": dict(tie_word_embeddings=False),
           "qk_norm": dict(qk_norm=True, norm="rmsnorm", position="rope", activation="swiglu", bias=False),
           "shared expert": dict(num_shared_experts=1), "zero_proj": dict(init="zero_proj")}  # fmt: skip


@pytest.mark.parametrize("order", ["usual", "reversed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_initial_weights_are_the_constructors(name, order, monkeypatch):
    """Also where torch or transformers visits modules in another order."""
    config, children = tiny(**CONFIGS[name]), torch.nn.Module.children
    torch.manual_seed(3)
    usual = GPTLMHeadModel(config).transformer.wte.weight
    if order == "reversed":
        monkeypatch.setattr(torch.nn.Module, "children", lambda self: reversed(list(children(self))))
    torch.manual_seed(3)
    state, end = GPTLMHeadModel(config).state_dict(), torch.get_rng_state()
    assert torch.equal(state["transformer.wte.weight"], usual) == (order == "usual")
    made = dict(initial_weights(config, 3))
    assert torch.equal(torch.get_rng_state(), end)
    assert state.keys() - made.keys() == (set() if name == "untied" else {"lm_head.weight"})
    for key, value in made.items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key]), key


@pytest.mark.parametrize(("make", "message"), [
    (lambda: torch.empty(8, 8).normal_().mul_(0.02).add_(1), ""),  # add_ needs what mul_ has left
    (lambda: torch.ones(2, 2), "extra: no initialisation of it has been recorded"),
    (lambda: torch.randn(2, 2), "draws random numbers for a new tensor"),
    (lambda: torch.empty(2, 2)[:1].normal_(), "writes to a part of a tensor"),
], ids=["several writes", "ones", "randn", "part"])  # fmt: skip
def test_a_parameter_is_repeated_or_refused(make, message, monkeypatch):
    class Extended(GPTLMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Parameter(make())

    monkeypatch.setattr(fsdp_init, "GPTLMHeadModel", Extended)  # the class that initial_weights imitates
    if message:
        refuses(message, lambda: dict(initial_weights(tiny(), 1)), error=RuntimeError)
    else:
        torch.manual_seed(1)
        assert torch.equal(Extended(tiny()).extra, dict(initial_weights(tiny(), 1))["extra"])
