"""Muon and AdamW in one optimizer, against written-out references.

Run: python -m pytest tests/training/test_muon.py
"""

import io
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from processes import finish, start, start_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from model import GPTConfig, GPTLMHeadModel
from training import parallel
from training.muon import MuonAdamW, configure_muon, newton_schulz, row_blocks

OPTIONS = dict(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), device_type="cpu")


def build_model(**changes) -> GPTLMHeadModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_embd=32, n_kv_head=2, vocab_size=64, block_size=16, moe_every=2)
    experts = dict(num_experts=3, num_experts_per_tok=1, expert_hidden_size=24, activation="swiglu")
    model = GPTLMHeadModel(GPTConfig(**(sizes | experts | changes)))
    model.update_routers()
    return model.train()


def backward(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, 64, (2, 17), generator=generator)
    model(idx[:, :-1], targets=idx[:, 1:])[1].backward()


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What Newton-Schulz should give, by singular values: the quintic, `steps` times, on each of them."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vh


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 20)])
def test_newton_schulz_is_the_quintic_on_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([orthogonal(matrix) for matrix in matrices])
    torch.testing.assert_close(newton_schulz(matrices), expected, rtol=0, atol=1e-6)
    singular = torch.linalg.svdvals(newton_schulz(torch.randn(1, 16, 256)))
    assert 0.6 < singular.min() and singular.max() < 1.3
    assert newton_schulz(torch.zeros(shape)).abs().max() == 0


def test_steps_equal_a_loop_over_single_matrices():
    """Three steps, with momentum and decay, over packed projections, GQA and experts."""
    model = build_model().double()
    optimizer = configure_muon(model, **OPTIONS)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = [p for g in optimizer.param_groups if g["method"] == "muon" for p in g["params"]]
    weights = {p: p.detach().clone() for p in matrices}
    momentum = {p: torch.zeros_like(p) for p in matrices}
    for step in range(3):
        backward(model, step)
        for p in matrices:
            momentum[p] = 0.95 * momentum[p] + 0.05 * p.grad
            update = 0.05 * p.grad + 0.95 * momentum[p]
            rows = {"c_attn.weight": [32, 16, 16], "c_fc.weight": [128, 128], "experts.c_fc": [24, 24]}
            blocks = next((r for end, r in rows.items() if names[p].endswith(end)), [p.size(-2)])
            for e in range(len(p)) if p.dim() == 3 else [slice(None)]:
                start = 0
                for block in blocks:
                    where = slice(start, start + block)
                    weight, grad, part = (t[e][where] for t in (weights[p], p.grad, update))
                    start += block
                    if grad.abs().max() > 0:
                        change = 0.2 * math.sqrt(max(part.shape)) * orthogonal(part)
                        weight.sub_(1e-2 * (change + 0.1 * weight))
                assert start == p.size(-2)
        optimizer.step()
        for p in matrices:
            torch.testing.assert_close(p.detach(), weights[p], rtol=0, atol=1e-7, msg=names[p])
        model.zero_grad()


def test_update_has_the_size_of_adamws():
    """Root mean square 0.2 in units of the learning rate, whatever the shape (arXiv 2502.16982)."""
    for shape in [(64, 64), (256, 64), (64, 256), (3, 32, 128)]:
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        MuonAdamW([dict(params=[parameter], method="muon")], lr=1e-3).step()
        assert 0.75 * 0.2e-3 < parameter.detach().square().mean().sqrt() < 1.2 * 0.2e-3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_agrees_with_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    first = MuonAdamW([dict(params=[ours], method="muon")], lr=1e-2, weight_decay=0.1)
    second = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(24, 40)
        first.step()
        second.step()
    change = ours.detach() - 1
    assert (ours - theirs).norm() < 0.02 * change.norm()  # theirs multiplies in bf16


def test_adamw_half_is_torchs_adamw():
    model, twin = build_model(), build_model()
    optimizer = configure_muon(model, **OPTIONS, router_lr_mult=0.5)
    reference = twin.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", router_lr_mult=0.5)
    for step in range(3):
        backward(model, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        reference.step()
        model.zero_grad()
    twins = dict(twin.named_parameters())
    adamw = {p for g in optimizer.param_groups if g["method"] == "adamw" for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twins[name]) == (parameter in adamw), name


def test_groups():
    model = build_model(qk_norm=True, tie_word_embeddings=False)
    optimizer = configure_muon(model, **OPTIONS, router_lr_mult=0.5, expert_lr_mult=2.0)
    where = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(where)
    assert len(where) == len(list(model.parameters()))
    matrix = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "experts.c_fc", "experts.c_proj")
    for name, parameter in model.named_parameters():
        group = where[parameter]
        assert (group["method"] == "muon") == name.endswith(matrix), name
        plain = name.endswith("bias") or "ln_" in name or "_norm" in name
        assert group["weight_decay"] == (0.0 if plain else 0.1), name
        expected = 0.5 if ".gate." in name else 2.0 if ".experts." in name else 1.0
        assert group["lr_mult"] == expected and group["lr"] == 1e-2 * expected, name
        assert group["name"].startswith("router" if ".gate." in name else ("experts", "rest")), name
        if group["method"] == "muon":
            assert group["row_blocks"] == row_blocks(name, parameter, model.config)
    frozen = build_model()
    frozen.transformer.wte.requires_grad_(False)
    rest = [p for g in configure_muon(frozen, **OPTIONS).param_groups for p in g["params"]]
    assert not any(p is frozen.transformer.wte.weight for p in rest)


def test_experts_without_tokens_stand_still():
    model = build_model()
    optimizer = configure_muon(model, **OPTIONS)
    experts = model.moe_layers()[0].experts
    backward(model, 0)
    optimizer.step()
    before = experts.c_fc.detach().clone()
    experts.c_fc.grad[1] = 0
    optimizer.step()
    moved = (experts.c_fc.detach() - before).flatten(1).norm(dim=1)
    assert moved[1] == 0 and moved[0] > 0 and moved[2] > 0


def test_resume_is_exact(tmp_path):
    model = build_model()
    optimizer = configure_muon(model, **OPTIONS)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        model.zero_grad()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = build_model()
    twin.load_state_dict(saved["model"])
    resumed = configure_muon(twin, **OPTIONS)
    resumed.load_state_dict(saved["optimizer"])
    for m, o in ((model, optimizer), (twin, resumed)):
        for step in (2, 3):
            backward(m, step)
            o.step()
            m.zero_grad()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_loss_falls_and_closure_is_called():
    model = build_model(n_kv_head=None, activation="relu2")
    optimizer = configure_muon(model, **OPTIONS)
    idx = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))

    def closure():
        optimizer.zero_grad()
        loss = model(idx[:, :-1], targets=idx[:, 1:])[1]
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(15)]
    assert losses[-1] < 0.6 * losses[0]


def test_refusals():
    model = build_model()
    adamw = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    with pytest.raises(ValueError, match=r"groups .* --init_from"):
        configure_muon(model, **OPTIONS).load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="not for shape"):
        MuonAdamW([dict(params=[torch.nn.Parameter(torch.zeros(3))], method="muon")], lr=1e-2)
    with pytest.raises(ValueError, match="method='sgd'"):
        MuonAdamW([dict(params=[torch.nn.Parameter(torch.zeros(3, 3))], method="sgd")], lr=1e-2)


class Net(nn.Module):
    """Three matrices of one shape and one of another: over two processes the shares are uneven."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(3, 8, 12) / 4)
        self.last, self.bias = nn.Parameter(torch.randn(12, 16) / 4), nn.Parameter(torch.zeros(16))

    def forward(self, x):
        for w in self.stack:
            x = x + F.silu(x @ w.t()) @ w
        return x @ self.last + self.bias


def main(arguments: list[str]) -> int:
    """One of two processes, or the single one that they are compared with."""
    torch.set_default_dtype(torch.float64)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = net = Net()
    if size > 1:
        dist.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(net)
        mesh = init_device_mesh("cpu", (size,))
        sharded = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="sharded"):
            MuonAdamW([dict(params=[sharded], method="muon")], lr=1e-2)
    groups = [dict(params=[net.stack, net.last], method="muon"), dict(params=[net.bias], method="adamw")]
    optimizer = MuonAdamW(groups, lr=1e-2)
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    share = x[rank * 8 // size : (rank + 1) * 8 // size]
    for _ in range(4):
        model(share).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([p.detach() for p in net.parameters()], f"{arguments[0]}/{size}_{rank}.pt")
    del model  # DDP before its process group
    parallel.stop()
    return 0


def test_two_processes_equal_one(tmp_path):
    output = tmp_path / "output"
    running = [start([tmp_path], output, script="test_muon")]
    running += start_ranks(2, [tmp_path], output, script="test_muon")
    assert [finish(process) for process in running] == [0, 0, 0], output.read_text()
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for one, a, b in zip(alone, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=0, atol=1e-10)
