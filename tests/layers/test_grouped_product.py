"""The Triton kernels of the experts, run by Triton's interpreter on a CPU and compiled for several GPUs.

Run: python -m pytest tests/layers/test_grouped_product.py        # needs `pip install triton`
"""

import subprocess
import sys

import pytest
import torch
from devices import TRITON_DEVICE

from layers.grouped_product import grouped_product

tl = pytest.importorskip("triton.language", reason="needs `pip install triton`, which GPU builds have")
SIZES = {
    "uneven": ([70, 0, 1, 133, 5], 40, 136), "no rows": ([0, 0, 0], 16, 8), "odd": ([65], 33, 129),
    "256 experts": ([0, 1] * 5 + [0] * 246, 8, 24),
}  # fmt: skip


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch):
    """The interpreter of Triton 3.9 multiplies the bits of bf16 as whole numbers: give it fp32."""
    if TRITON_DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        multiply = InterpreterBuilder.create_dot

        def create_dot(self, a, b, *more):
            wide = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
            return multiply(self, *wide, *more)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize(
    "name, dtype, close",
    [
        ("uneven", torch.float32, 1e-6), ("uneven", torch.float16, 1e-3), ("uneven", torch.bfloat16, 8e-3),
        ("no rows", torch.float32, 0), ("odd", torch.bfloat16, 8e-3),
        pytest.param("256 experts", torch.float32, 1e-6, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_product_and_gradients_equal_a_loop(name, dtype, close):
    counts, D, F = SIZES[name]
    rows, weights = torch.randn(sum(counts), D).to(dtype), torch.randn(len(counts), F, D).to(dtype)
    grad, ends, results = torch.randn(sum(counts), F).to(dtype), torch.tensor(counts).cumsum(0).int(), []
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


@pytest.mark.slow
def test_kernels_compile_for_tensor_cores(tmp_path, monkeypatch):
    """Triton compiles for a GPU that this machine does not have."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=300)
