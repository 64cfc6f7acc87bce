"""The MoE layer against loops in float64: routing, balance losses, accounts, compilation, two ranks.

Run: python -m pytest tests/test_mixture_of_experts.py"""

import copy
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ENGINES, chosen, experts_by_hand, gradients, moe_layer, sure_layer, tiny
from processes import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mixture_of_experts import BALANCE_LOSSES, ROUTER_SCORES, MoE, expert_usage, update_routers
from model import GPTLMHeadModel
from training import parallel
from training.idle_experts import idle_experts
from training.log import expert_load


def by_hand(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer as a loop over tokens and their experts, in plain differentiable operations."""
    tokens, K, experts, weights = x.flatten(0, 1), layer.num_experts_per_tok, [], []
    for token in tokens:
        logits = layer.gate.weight @ token
        scores = torch.exp(logits) if layer.router_score == "softmax" else 1 / (1 + torch.exp(-logits))
        scores = scores / scores.sum() if layer.router_score == "softmax" else scores
        best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[:K]
        total = sum(scores[e] for e in best) if K > 1 and layer.norm_topk_prob else 1.0
        experts.append(best)
        weights.append(torch.stack([scores[e] / total for e in best]))
    y = experts_by_hand(layer.experts, tokens, torch.tensor(experts), torch.stack(weights))
    return y.view(x.shape)


@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("K, norm", [(1, True), (2, True), (2, False)])
def test_output_and_every_gradient_equal_a_loop_over_tokens(score, K, norm):
    fields = dict(router_score=score, num_experts_per_tok=K, norm_topk_prob=norm)
    layer = moe_layer(num_experts=5, expert_hidden_size=6, **fields).double()
    inputs, weight = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    inputs[..., 0] = 1
    with torch.no_grad():
        layer.gate.weight[3, 0] = -50  # no token chooses expert 3
    results = []
    for forward in (layer, lambda x: by_hand(layer, x)):
        layer.zero_grad()
        x = inputs.clone().requires_grad_()
        y = forward(x)
        (y * weight).sum().backward()
        results.append({"y": y, "x": x.grad, **gradients(layer)})
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert layer.get_usage_counts()[3] == 0 and layer.get_usage_counts().sum() == 10 * K


def test_dropout_is_active_in_training_only():
    layer, x = moe_layer(dropout=0.5), torch.randn(4, 16, 8)
    assert 0.3 < (layer(x) == 0).float().mean() < 0.7
    assert (layer.eval()(x) != 0).all()


# ---------------------------------------------------------------------------- routing
def test_router_stays_in_fp32_under_autocast():
    layer, x, found = moe_layer(n_embd=32), torch.randn(4, 64, 32), []
    for bf16 in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            routed = chosen(layer, layer.gate(x.view(-1, 32)))
            y, auxiliary = layer(x, return_auxiliary=True)
        assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
        y.float().square().sum().backward()
        assert {auxiliary.balance_loss.dtype, *(p.grad.dtype for p in layer.parameters())} == {torch.float32}
        found.append((routed, {"y": y.float(), **gradients(layer)}))
    (exact_route, exact), (route, low) = found
    torch.testing.assert_close(route, exact_route, rtol=0, atol=0)
    for name in exact:
        assert (low[name] - exact[name]).norm() < 0.03 * exact[name].norm(), name


def test_ties_go_to_the_lower_index():
    layer = moe_layer(num_experts=64, num_experts_per_tok=8)
    index, weights, _ = chosen(layer, torch.zeros(5, 64))
    assert index.tolist() == [list(range(8))] * 5
    torch.testing.assert_close(weights, torch.full((5, 8), 1 / 8))
    logits = torch.zeros(1, 64)
    logits[0, [9, 50]] = 1
    assert chosen(layer, logits)[0][0].tolist() == [9, 50, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("norm", [True, False])
def test_nan_surfaces_where_it_came_from(score, norm):
    layer, x = moe_layer(router_score=score, norm_topk_prob=norm), torch.randn(2, 4, 8)
    expected = layer(x)
    x[1, 2, 3] = math.nan
    y = layer(x)
    assert y[1, 2].isnan().all()
    assert 0 <= expert_usage([layer])[0].entropy <= math.log(4)
    y[1, 2] = expected[1, 2]
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        layer.gate.weight[1] = math.nan  # only one expert's logit is bad, for all tokens
    assert layer(x).isnan().all()
    assert layer.get_usage_counts().sum() == 3 * 2 * 8


SIZES = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3])
SHIFTS = st.sampled_from([0.0, -1e4, 1e4, -69.0, -300.0, 17.0])  # sigmoid(-69) is 1e-30


@settings(max_examples=60)
@given(st.sampled_from(list(ROUTER_SCORES)), st.sampled_from([(1, 1), (5, 1), (5, 2), (5, 5)]), SIZES, SHIFTS,
       st.integers(0, 99))  # fmt: skip
def test_no_balance_loss_is_below_its_value_at_balance(score, sizes, size, shift, seed):
    """Whatever the logits; for load_balancing if all tokens have the same, because f and P can disagree."""
    (E, K), random = sizes, torch.Generator().manual_seed(seed)
    for loss_type in BALANCE_LOSSES:
        fields = dict(num_experts=E, num_experts_per_tok=K, router_score=score)
        layer = moe_layer(moe_loss_type=loss_type, **fields)
        rows, lowest = (1, 1) if loss_type == "load_balancing" else (6, 0)
        logits = (shift + size * torch.randn(rows, E, generator=random)).requires_grad_()
        routing, probs = layer.route(logits)
        auxiliary = layer.measure(logits, probs, routing, None, None)
        assert auxiliary.balance_loss >= lowest - 1e-5, loss_type
        torch.testing.assert_close(probs.sum(-1), torch.ones(rows))
        (auxiliary.balance_loss + (routing.weight * torch.arange(len(routing.weight))).sum()).backward()
        assert logits.grad.isfinite().all()


def test_loss_free_balancing():
    layer, x = moe_layer(router_bias_update_rate=0.1, moe_loss=False), torch.randn(4, 16, 8)
    update_routers([layer])
    assert layer.router_bias.tolist() == [0, 0, 0, 0]
    counts = torch.zeros(4, dtype=torch.int64)
    for part in x.split(1):  # four micro-steps
        layer(part)
        counts += torch.bincount(chosen(layer, layer.gate(part[0]))[0].flatten(), minlength=4)
    assert layer.get_auxiliary_loss() == 0  # moe_loss=False
    update_routers([layer])
    assert torch.equal(counts, layer.last_step_counts())
    torch.testing.assert_close(layer.router_bias, 0.1 * torch.sign(counts.sum() / 4 - counts))
    assert layer.router_bias.abs().sum() > 0
    before = layer.router_bias.clone()
    layer.eval()(x)
    update_routers([layer])
    assert torch.equal(layer.router_bias, before)  # neither evaluation nor an empty step moves it
    # The bias decides the choice and stays out of the weights.
    layer.router_bias.copy_(torch.tensor([0.0, 0.0, 10.0, 20.0]))
    logits = torch.randn(6, 4)
    index, weights, _ = chosen(layer, logits)
    assert index.tolist() == [[3, 2]] * 6
    p = logits.softmax(-1)
    torch.testing.assert_close(weights, torch.stack((p[:, 3], p[:, 2]), 1) / (p[:, 3] + p[:, 2])[:, None])


@pytest.mark.parametrize(
    "engine", [engine for engine in (*ENGINES, "triton") if engine not in ("loop", "gather")]
)
def test_the_grouped_engines_never_read_a_number_on_the_host(engine):
    """A FakeTensor has no numbers: every read, such as item() or nonzero(), raises an error."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        layer, x = MoE(tiny(n_embd=16, expert_hidden_size=8)).train(), torch.randn(2, 12, 16)
        layer.experts.engine = engine
        update_routers([layer])
        y = layer(x.requires_grad_(), torch.ones(2, 12, dtype=torch.bool))
        (y.sum() + layer.get_auxiliary_loss()).backward()
        assert x.grad.shape == x.shape and all(p.grad.shape == p.shape for p in layer.parameters())


def test_forced_balance_for_benchmarks():
    layer = moe_layer(num_experts=8, num_experts_per_tok=2)
    layer.force_balanced = True
    layer(torch.randn(2, 16, 8)).sum().backward()
    assert layer.get_usage_counts().tolist() == [8] * 8
    assert layer.gate.weight.grad.norm() > 0


# ---------------------------------------------------------------------------- accounts
def test_entropy_of_the_last_step():
    """Only that step's tokens count; evaluation and an earlier reset of the usage change nothing."""
    layer, sure, unsure = sure_layer(), torch.eye(4)[None], torch.zeros(1, 2, 4)
    assert layer.last_step_entropy().isnan()
    for parts in ([sure], [sure, unsure]):
        layer.reset_usage_counts()
        update_routers([layer])
        for part in parts:
            layer(part)
        layer.eval()(unsure)
        layer.train()
    update_routers([layer])
    expected = pytest.approx(math.log(4) * 2 / 6, rel=1e-5)
    assert layer.last_step_entropy().item() == copy.deepcopy(layer).last_step_entropy().item() == expected


def test_usage_statistics_and_what_a_run_logs_of_them(monkeypatch):
    """The numbers of two layers by hand, and that they need a single transfer to the host."""
    layers = [sure_layer(num_experts_per_tok=1) for _ in range(2)]
    layers[0](torch.eye(4)[[0] * 15 + [1] * 4 + [2]][None])  # 15, 4, 1 and 0 tokens
    layers[1](torch.eye(4)[[0, 1, 2, 3] * 5][None])
    layers[1](torch.zeros(1, 20, 4))  # equal scores: expert 0, and half of the tokens are not sure
    usage, other = expert_usage(layers)
    assert usage.counts.tolist() == layers[0].get_usage_counts().tolist() == [15, 4, 1, 0]
    assert usage.share.tolist() == pytest.approx([0.75, 0.2, 0.05, 0.0]) and usage.max_load.item() == 3.0
    assert usage.starved.item() == 0.25 and usage.entropy.item() == pytest.approx(0, abs=1e-6)
    assert other.entropy.item() == pytest.approx(math.log(4) / 2, rel=1e-5)
    empty = moe_layer().usage_statistics()
    assert empty.counts.sum() == 0 and empty.max_load == 0 and empty.entropy == 0
    update_routers(layers)
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: transfers.append(tensor) or cpu(tensor))
    found = expert_load(SimpleNamespace(moe_layers=lambda: layers))
    assert len(transfers) == 1
    assert found["expert_load"] == [[0.75, 0.2, 0.05, 0.0], [0.625, 0.125, 0.125, 0.125]]
    assert found["max_load"] == 3.0 and found["starved"] == 1 / 8
    assert found["router_entropy"] == pytest.approx(math.log(4) / 4, rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_accounts_are_exact_in_any_dtype_of_the_model_and_outlive_a_reset():
    layer, x = moe_layer().bfloat16(), torch.randn(1, 64, 8, dtype=torch.bfloat16)
    for _ in range(40):
        layer(x)
    assert layer.get_usage_counts().sum() == 40 * 64 * 2
    layer.reset_usage_counts()  # the step's own accounts stay
    assert layer.get_usage_counts().sum() == 0
    update_routers([layer])
    assert layer.last_step_counts().sum() == 40 * 64 * 2 and layer.get_usage_counts().sum() == 0
    probs = chosen(layer, layer.gate(x[0]))[2].detach().mean(0)
    mean = layer.reference_totals[4:] / (2.0**24 * 40 * 64)
    torch.testing.assert_close(mean.float(), probs, rtol=1e-6, atol=1e-7)


def test_copies_pickles_and_meta_construction():
    layer, x = moe_layer(), torch.randn(1, 4, 8)
    assert layer.get_auxiliary_loss() == 0
    layer(x)
    assert layer.get_auxiliary_loss().requires_grad
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.get_auxiliary_loss() == 0
        assert torch.equal(twin.get_usage_counts(), layer.get_usage_counts())
        assert torch.equal(twin.eval()(x), layer.eval()(x))
    other = moe_layer(seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.get_usage_counts(), layer.get_usage_counts())
    assert torch.equal(other.eval()(x), layer(x))
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in MoE(tiny(num_shared_experts=1)).state_dict().values())


def test_fresh_parameters_are_initialised():
    layer = MoE(tiny(num_shared_experts=2, expert_hidden_size=80))
    for name, parameter in layer.named_parameters():
        if "shared" not in name:  # a GPT initialises nn.Linear
            assert parameter.std().item() == pytest.approx(0 if "bias" in name else 0.02, rel=0.1), name
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == {
        "gate.weight": (4, 64), "experts.c_fc": (4, 80, 64), "experts.c_proj": (4, 64, 80),
        "experts.c_fc_bias": (4, 80), "experts.c_proj_bias": (4, 64), "shared.c_fc.weight": (160, 64),
        "shared.c_fc.bias": (160,), "shared.c_proj.weight": (64, 160), "shared.c_proj.bias": (64,),
    }  # fmt: skip


def test_bad_arguments():
    """MoE checks what GPTConfig has checked, for configurations of other classes."""
    for field, value in dict(num_experts_per_tok=0, moe_loss_type="balance", router_score="tanh").items():
        with pytest.raises(ValueError, match=f"{field}={value!r}"):
            MoE(SimpleNamespace(**tiny().to_dict() | {field: value}))
    with pytest.raises(ValueError, match=r"token_mask has shape \(3, 2\), but x has \(B, T\) = \(2, 3\)"):
        moe_layer()(torch.zeros(2, 3, 8), torch.ones(3, 2))


# ---------------------------------------------------------------------------- compilation
WITH_GROUPED_MM = ENGINES[-1]
COMPILED = [
    ("aot_eager", "loop", False, dict(moe_loss_type="diversity_regularization", router_bias_update_rate=0.1)),
    ("aot_eager", WITH_GROUPED_MM, True, dict()),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("aot_eager", "loop", True, dict()), ("aot_eager", "loop", False, dict(num_experts_per_tok=1)),
        ("aot_eager", "loop", False, dict(moe_loss_type="variance_penalty", router_score="sigmoid")),
        ("aot_eager", "loop", False, dict(moe_loss_type="entropy_regularization", activation="swiglu")))),
    pytest.param("inductor", "loop", False, dict(num_shared_experts=1, bias=False),
                 marks=[needs_compiler, pytest.mark.slow]),
]  # fmt: skip


@pytest.mark.parametrize("backend, engine, bf16, fields", COMPILED)
def test_compiles_without_break_or_recompilation(backend, engine, bf16, fields):
    layer, eager = (moe_layer(n_embd=16, expert_hidden_size=16, **fields) for _ in range(2))
    layer.experts.engine = eager.experts.engine = engine
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(4):
        x, mask, results = torch.randn(2, 16, 16), torch.rand(2, 16) < 0.8, []
        for forward, module in ((compiled, layer), (eager, eager)):
            module.zero_grad()
            update_routers([module])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                y, auxiliary = forward(x, mask, mask.sum(), return_auxiliary=True)
            module.accumulate(auxiliary)
            (y.float().square().mean() + auxiliary.balance_loss + auxiliary.z_loss).backward()
            results.append((y, tuple(auxiliary), gradients(module), module.get_usage_counts()))
        rtol, atol = (2e-2, 2e-2) if bf16 else (1e-4, 1e-5)
        torch.testing.assert_close(*results, rtol=rtol, atol=atol)
        with torch.no_grad():
            for module in (layer, eager):
                module.gate.weight.copy_(module.gate.weight.roll(1, 0))  # the routing changes at every step
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


# ---------------------------------------------------------------------------- two ranks
def usage_of_a_model(rank: int) -> list[int]:
    """How many rows a model says that its layer has had: within a step, here and everywhere; after it."""
    model = GPTLMHeadModel(tiny(n_layer=1))
    model.update_routers()
    ids = torch.arange(10 * (rank + 1))[None]  # 10 tokens on one rank, 20 on the other
    for _ in range(2):
        model(ids, targets=ids)
        found = [model.expert_usage(), model.expert_usage(reduce=True)]
        model.update_routers()
        found.append(model.expert_usage(reset=True))
    assert model.expert_usage(reduce=True)[0].counts.sum() == 0
    return [usage[0].counts.sum().item() for usage in found]


def idle_where_experts_are_shared_out(dim: int) -> list[list[int]]:
    """Only expert 0 has rows that count, and of expert 1 one rank's part alone has a gradient."""
    layer, mesh = moe_layer(), init_device_mesh("cpu", (2,))
    layer.reference_totals[:4] = torch.tensor([8, 0, 0, 0])
    for name, whole in list(layer.experts.named_parameters()):
        grad = torch.zeros_like(whole)
        grad[1, 0] = 1.0
        shared = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(dim)]))
        shared.grad = distribute_tensor(grad, mesh, [Shard(dim)])
        setattr(layer.experts, name, shared)
    return idle_experts([layer, layer])


def main(arguments: list[str]) -> int:
    """One of two processes."""
    (folder,) = arguments
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    idle = [idle_where_experts_are_shared_out(dim) for dim in (0, 1)]
    Path(folder, f"rank{rank}").write_text(json.dumps([usage_of_a_model(rank), idle]))
    parallel.stop()
    return 0


def test_usage_and_idle_experts_of_two_ranks(tmp_path):
    """test_parallel.py compares the training of two ranks with that of one."""
    run_ranks(2, [tmp_path], tmp_path / "output", script="test_mixture_of_experts")
    for rank in (0, 1):
        usage, idle = json.loads((tmp_path / f"rank{rank}").read_text())
        assert usage == [20 * (rank + 1), 60, 60] and idle == [[[2, 3]] * 2] * 2
