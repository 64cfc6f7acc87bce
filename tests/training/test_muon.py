"""Muon, AdamW and Adagrad in one optimizer, against references; the groups of both optimizers.

Run: python -m pytest tests/training/test_muon.py"""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from models import tiny, tokens

from model import GPTLMHeadModel
from training import parallel
from training.muon import configure_muon

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
    with pytest.raises(ValueError, match=r"groups .* --init_from"):
        configure_muon(model, **OPTIONS).load_state_dict(adamw.state_dict())
