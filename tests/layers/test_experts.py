"""Every engine of the experts against a loop over tokens, the choice among them, dispatch, and activations.
Triton's interpreter runs the kernels on a CPU, and Triton compiles them for several GPUs."""

import itertools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refuses
from devices import TRITON_DEVICE, needs_gpu
from models import ENGINES, experts_by_hand, gradients, moe_layer, strong, sure_layer, tiny, tokens
from torch.nn.functional import grouped_mm
from torch.nn.utils.parametrize import register_parametrization

from layers import experts
from layers.experts import Experts, TakeRows, combine, dispatch, expert_mlp
from layers.grouped_product import grouped_product, triton
from layers.mlp import ACTIVATIONS, MLP, Activation, gated
from model import GPTLMHeadModel
from training.muon import row_blocks
from training.preflight import block_bytes

needs_triton = pytest.mark.skipif(triton is None, reason="needs `pip install triton`, which GPU builds have")
TRITON = pytest.param("triton", marks=needs_triton)
KINDS = [*itertools.product((False, True), (False, True), ACTIVATIONS)]  # ragged, bias, activation
VARIANTS = "loop", "loop, GPU", "grouped_mm", "Blackwell"
OF_ENGINES = [(engine, *kind) for engine in VARIANTS for kind in KINDS]
# Triton's interpreter is slow. The everyday tests have each activation, and each pair of the others, once.
for number, kind in enumerate(KINDS):
    marks = [needs_triton, *[pytest.mark.slow] * (number % 5 > 0)]
    OF_ENGINES.append(pytest.param("triton", *kind, marks=marks))


def test_dispatch_of_a_hand_worked_example():
    index = torch.tensor([[2, 0], [0, 3], [2, 3]])  # slots 0 to 5 want experts 2 0 0 3 2 3
    routing = dispatch(index, torch.arange(6.0).view(3, 2), 5)
    assert routing.order.tolist() == routing.weight.tolist() == [1, 2, 0, 4, 3, 5]
    assert routing.token.tolist() == [0, 1, 0, 2, 1, 2] and routing.per_token == 2
    assert routing.position.tolist() == [2, 0, 1, 4, 3, 5]
    assert routing.expert.tolist() == [0, 0, 2, 2, 3, 3]
    assert routing.ends.tolist() == [2, 2, 4, 6, 6]  # expert 1 and expert 4 get nothing
    assert routing.ends.dtype == torch.int32 and routing.counts().tolist() == [2, 0, 2, 2, 0]


def blackwells(x, weights, offs):
    """grouped_mm, whose backward leaves garbage in the gradient of expert 1, which has no rows."""
    weights = weights.clone()
    weights.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), torch.nan))
    return grouped_mm(x, weights, offs=offs)


@pytest.mark.parametrize("engine, ragged, bias, activation", OF_ENGINES)
def test_output_and_every_gradient_equal_a_loop_over_tokens(engine, ragged, bias, activation, monkeypatch):
    """Expert 1 has no rows. ragged: a token has none to three rows instead of three."""
    monkeypatch.setattr(experts, "_on_cpu", lambda x: engine != "loop, GPU")
    engine = engine.removesuffix(", GPU")
    if engine == "Blackwell":
        monkeypatch.setattr(experts.F, "grouped_mm", blackwells)
        monkeypatch.setattr(experts, "_idle_gradients_are_garbage", lambda: True)
        engine = "grouped_mm"
    dtype = torch.float32 if engine in ("grouped_mm", "triton") else torch.float64
    device = TRITON_DEVICE if engine == "triton" else "cpu"
    fields = dict(activation=activation, bias=bias, num_experts=5, n_embd=16, expert_hidden_size=8, std=0.3)
    layer = moe_layer(**fields).experts.to(device, dtype)
    layer.engine = engine
    wish = torch.rand(7, 5)
    wish[:, 1] = 2
    index, keep = wish.argsort(1)[:, :3], torch.rand(7, 3) < 0.6
    keep = keep & (torch.arange(7) != 4)[:, None] if ragged else torch.ones_like(keep)  # token 4 has no row
    inputs, factors = torch.randn(7, 16, dtype=dtype), torch.rand(7, 3, dtype=dtype)
    token = torch.arange(7)[:, None].expand(7, 3)[keep].to(device)
    index, keep, inputs, factors = (t.to(device) for t in (index, keep, inputs, factors))
    found = []
    for by_hand in (False, True):
        layer.zero_grad()
        x, weight = inputs.clone().requires_grad_(), factors.clone().requires_grad_()
        if by_hand:
            y, mixed = experts_by_hand(layer, x, index, weight * keep), (weight * keep).sum(1, True) * x
        else:
            rows = (index[keep], weight[keep], 5, token) if ragged else (index, weight, 5)
            routing = dispatch(*rows)
            assert (routing.per_token is None) == ragged and routing.counts().sum() == keep.sum()
            y, mixed = layer(x, routing), combine(TakeRows.apply(x, routing), routing, 7, weighted=True)
        y.square().sum().backward()
        found.append({"y": y, "mixed": mixed, "x": x.grad, "weight": weight.grad, **gradients(layer)})
    close = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*found, **close)
    assert (found[0]["c_fc"][1] == 0).all() and (found[0]["c_proj"][1] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_no_rows_at_all(engine):
    layer = moe_layer()
    layer.experts.engine = engine
    y = layer(torch.randn(1, 0, 8, requires_grad=True))
    assert y.shape == (1, 0, 8) and layer.get_auxiliary_loss() == 0
    (y.sum() + layer.get_auxiliary_loss()).backward()
    assert all((gradient == 0).all() for gradient in gradients(layer).values())


def test_odd_layouts_of_input_and_gradient():
    layer = moe_layer()
    x = torch.randn(8, 3, 2).transpose(0, 2)  # (2, 3, 8), not contiguous
    for scale in (torch.ones(()).expand(2, 3, 8), torch.randn(8, 3, 2).transpose(0, 2)):
        results = []
        for value, factor in ((x, scale), (x.contiguous(), scale.contiguous())):
            layer.zero_grad()
            leaf = value.detach().requires_grad_()
            layer(leaf).backward(factor)
            results.append((leaf.grad, gradients(layer)))
        torch.testing.assert_close(results[0], results[1])


def test_decoding_never_touches_unused_experts():
    layer, x = sure_layer(num_experts_per_tok=1).eval(), torch.eye(4)[None, :1]  # a token for expert 0
    expected = layer(x)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[1:] = torch.nan
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapted_weight_is_used(engine):
    """PEFT adapts stacked experts by a parametrization: the name stays an attribute, but is no parameter."""
    layer, positive, x = moe_layer().eval(), moe_layer().eval(), torch.randn(2, 3, 8)
    layer.experts.engine = engine
    register_parametrization(layer.experts, "c_fc", torch.nn.ReLU())
    positive.experts.c_fc.data.relu_()
    torch.testing.assert_close(layer(x), positive(x))


def test_the_rehearsal_replaces_a_function_that_exists():
    """It needs torch's CUDA build, so no other test runs it."""
    source = (ROOT / "tests/rehearsal/run.py").read_text()
    (name,) = re.findall(r'\(experts, "(\w+)"', source)
    assert callable(getattr(experts, name))


def test_operators_are_well_formed():
    routing = dispatch(torch.tensor([[2, 0], [0, 3], [2, 3]]), torch.rand(3, 2), 5)
    x, *parameters = (torch.randn(shape) for shape in ((3, 4), (5, 6, 4), (5, 4, 6), (5, 6), (5, 4)))
    for tensor in (x, routing.weight, *parameters):
        tensor.requires_grad_()
    token, weight, ends, _, _, position, _ = routing
    torch.library.opcheck(expert_mlp, (x, weight, token, position, ends, parameters, "gelu"))


@pytest.mark.parametrize("engine, changes", [
    ("grouped_mm", {}), ("grouped_mm", dict(capability=(10, 0))), ("grouped_mm", dict(num_experts=1023)),
    ("grouped_mm", dict(rows=4)), ("triton", dict(num_experts=1024)),
    ("triton", dict(capability=(8, 0))), ("triton", dict(capability=(12, 0))), ("triton", dict(n_embd=12)),
    ("triton", dict(dtype=torch.float32)), ("triton", dict(dtype=torch.float16)),
    ("triton", dict(expert_hidden_size=12)),
    ("loop", dict(n_embd=12, triton=None)), ("loop", dict(capability=(8, 9), triton=None)),
    ("loop", dict(capability=(7, 5))), ("loop", dict(dtype=torch.float64)), ("loop", dict(rows=0)),
    ("loop", dict(device="cpu")),
])  # fmt: skip
def test_the_engine_for_a_gpu(engine, changes, monkeypatch):
    """What "auto" takes on CUDA. No GPU is needed: the choice reads only x's device, dtype and shape."""
    case = dict(device="cuda", dtype=torch.bfloat16, capability=(9, 0), rows=5000, triton="any",
                 num_experts=4, n_embd=16, expert_hidden_size=8) | changes  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: case["capability"])
    monkeypatch.setattr("layers.grouped_product.triton", case["triton"])
    with torch.device("meta"):
        sizes = {name: case[name] for name in ("num_experts", "n_embd", "expert_hidden_size")}
        layer = Experts(tiny(**sizes))
    device, shape = torch.device(case["device"]), (case["rows"], case["n_embd"])
    x = SimpleNamespace(device=device, dtype=case["dtype"], shape=shape)
    assert layer._choose_engine(x, case["rows"]) == engine


# ---------------------------------------------------------------------------- activations
# A row of ACTIVATIONS is all there is to an activation: for every row, and for rows added here.
TANH = lambda out, h: torch.tanh(h, out=out), lambda grad, h: grad * (1 - torch.tanh(h) ** 2)
ADDED = {"geglu": gated(F.gelu, torch.ops.aten.gelu_backward), "tanh": Activation(1, torch.tanh, *TANH)}


@pytest.fixture(params=[*ACTIVATIONS, *ADDED])
def activation(request, monkeypatch) -> str:
    for name, row in ADDED.items():
        monkeypatch.setitem(ACTIVATIONS, name, row)
    return request.param


def test_into_a_buffer_and_backward_agree_with_forward(activation):
    row = ACTIVATIONS[activation]
    h = torch.randn(5, row.parts * 6, dtype=torch.float64, requires_grad=True)
    y = row.forward(h)
    out = torch.empty(5, 6, dtype=torch.float64)
    assert torch.equal(row.forward_into(out, h.detach()), y) and torch.equal(out, y)
    torch.autograd.gradcheck(row.forward, (h,))
    direction = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, h, direction)
    torch.testing.assert_close(row.backward(direction, h.detach()), expected)


def test_everything_else_reads_the_row(activation):
    parts = ACTIVATIONS[activation].parts
    fields = dict(moe_every=2, mlp_hidden_size=24, expert_hidden_size=24)
    config, plain = tiny(**fields, activation=activation), tiny(**fields)
    model, ids, found = strong(GPTLMHeadModel(config), std=0.1), tokens(), []
    for engine in ENGINES:
        model.moe_layers()[0].experts.engine = engine
        model.zero_grad()
        model(ids, targets=ids)[1].backward()
        found.append(gradients(model))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_fc.weight", "experts.c_fc")):
            assert parameter.shape[-2] == parts * 24
            assert row_blocks(name, parameter, config) == (None if parts == 1 else [24] * parts)
    for layer, rows in ((0, 1), (1, 2)):  # dense; two experts per token
        more = block_bytes(config, layer, 4, "cpu") - block_bytes(plain, layer, 4, "cpu")
        assert more == rows * (parts - 1) * 4 * 24


def test_an_unknown_activation_is_an_error_in_every_engine():
    config, stacked = tiny(), Experts(tiny())
    config.activation = stacked.activation = "gleu"
    message = "activation='gleu'.*gelu, gelu_erf, relu2, swiglu"
    for module in (MLP, Experts):
        refuses(message, module, config)
    routing = dispatch(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 4)
    for engine in ENGINES:
        stacked.engine = engine
        refuses(message, stacked, torch.randn(3, 64), routing)


# ---------------------------------------------------------------------------- the Triton kernels
SIZES = {
    "uneven": ([70, 0, 1, 133, 5], 40, 136), "no rows": ([0, 0, 0], 16, 8), "odd": ([65], 33, 129),
    "256 experts": ([0, 1] * 5 + [0] * 246, 8, 24),
}  # fmt: skip


@pytest.fixture
def products_of_bf16(monkeypatch):
    """The interpreter of Triton 3.9 multiplies the bits of bf16 as whole numbers: give it fp32."""
    if TRITON_DEVICE == "cpu":
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder

        multiply = InterpreterBuilder.create_dot

        def create_dot(self, a, b, *more):
            wide = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
            return multiply(self, *wide, *more)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@needs_triton
@pytest.mark.usefixtures("products_of_bf16")
@pytest.mark.parametrize("name, dtype, close", [
    ("uneven", torch.float32, 1e-6), ("uneven", torch.float16, 1e-3), ("uneven", torch.bfloat16, 8e-3),
    ("no rows", torch.float32, 0), ("odd", torch.bfloat16, 8e-3),
    pytest.param("256 experts", torch.float32, 1e-6, marks=pytest.mark.slow),
])  # fmt: skip
def test_grouped_product_and_its_gradients_equal_a_loop(name, dtype, close):
    counts, D, H = SIZES[name]
    rows, weights = torch.randn(sum(counts), D).to(dtype), torch.randn(len(counts), H, D).to(dtype)
    grad, ends, results = torch.randn(sum(counts), H).to(dtype), torch.tensor(counts).cumsum(0).int(), []
    for by_loop in (False, True):
        where = dict(device="cpu", dtype=torch.double) if by_loop else dict(device=TRITON_DEVICE)
        x, w = (t.detach().to(**where).requires_grad_() for t in (rows, weights))
        if by_loop:
            y = torch.cat([part @ weight.t() for part, weight in zip(x.split(counts), w, strict=True)])
        else:
            y = grouped_product(x, w.mT, ends.to(TRITON_DEVICE))
        y.backward(grad.to(y))
        results.append([t.double().cpu() for t in (y.detach(), x.grad, w.grad)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= close * expected.norm()
    assert (results[0][2][torch.tensor(counts) == 0] == 0).all()


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from layers import grouped_product
sizes = dict(EXPERTS=64, ROWS=64, COLUMNS=128, DEPTH=32, PRECISION="tf32")
for kernel in (grouped_product.product_kernel, grouped_product.weight_gradient_kernel):
    for capability in (80, 90):
        for dtype in ("bf16", "fp16", "fp32"):
            kinds = {name: "i32" for name in kernel.arg_names} | {name: "constexpr" for name in sizes}
            kinds |= {"ends": "*i32"} | {name: "*" + dtype for name in ("x", "w", "y", "grad", "grad_w")}
            both = ({name: d[name] for name in kernel.arg_names if name in d} for d in (kinds, sizes))
            source = ASTSource(kernel, *both)
            assert "mma" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_tensor_cores(tmp_path, monkeypatch):
    """Triton compiles for a GPU that this machine does not have."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=300)


# ---------------------------------------------------------------------------- the same bits, and a GPU
def run_engine(engine, device="cpu", dtype=torch.float32, **fields) -> dict[str, torch.Tensor]:
    """Outputs and all gradients of a layer of 5 experts, one of them without rows, with that engine."""
    layer = moe_layer(num_experts=5, n_embd=64, expert_hidden_size=32, std=0.1, **fields)
    x = torch.randn(2, 33, 64, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 1
    with torch.no_grad():
        layer.gate.weight[3, 0] = -50
    layer, x = layer.to(device), x.to(device).requires_grad_()
    layer.experts.engine = engine
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        y = layer(x)
    (y.float().square().mean() + layer.get_auxiliary_loss()).backward()
    assert layer.get_usage_counts()[3] == 0
    return {"y": y.detach(), "x": x.grad, **gradients(layer)}


CASES = ("cpu", False), ("cpu", True), pytest.param("cuda", True, marks=needs_gpu)


@pytest.mark.parametrize("engine", ["loop", "grouped_mm"])
@pytest.mark.parametrize("device, deterministic", CASES)
def test_same_input_same_bits(device, deterministic, engine, monkeypatch):
    """torch.use_deterministic_algorithms raises an error for operations that are not deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # a GPU needs it for this
    dtype = torch.bfloat16 if engine == "grouped_mm" else torch.float32
    torch.use_deterministic_algorithms(deterministic)
    try:
        first, *others = (run_engine(engine, device, dtype) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@needs_gpu
@pytest.mark.parametrize("engine", ["loop", "grouped_mm", TRITON])
@pytest.mark.parametrize("activation,bias,K", [("gelu", True, 2), ("swiglu", False, 2), ("relu2", False, 1)])
def test_an_engine_on_a_gpu_equals_one_on_a_cpu(activation, bias, K, engine):
    """In bf16 they are close to the loop in fp32. An expert with another's rows would not be."""
    fields = dict(activation=activation, bias=bias, num_experts_per_tok=K)
    exact = run_engine("loop", **fields)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        for name, found in run_engine(engine, "cuda", dtype, **fields).items():
            assert (found.cpu() - exact[name]).norm() < close * exact[name].norm(), (dtype, name)
            if name.startswith("experts."):
                assert (found[3] == 0).all(), (dtype, name)
