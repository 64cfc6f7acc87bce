"""A grouped matrix product in Triton: each expert's rows times its matrix, without waiting for the GPU.

    y = grouped_product(x, w, ends)      # as F.grouped_mm(x, w, offs=ends), for all GPUs that Triton supports

x (R, D) has its rows sorted by expert, w is (E, D, F). The rows of expert e end before ends[e], (E,) int32.
The host never reads `ends`. It launches as many tiles of rows as there can be, R / TILE_ROWS + E, and each
tile finds its expert on the GPU. torch's grouped_mm has such a kernel for capability 9 and 10 in bf16 only.

Letters: R rows, D and F the sizes of a row before and after, E experts.
References: MegaBlocks (arXiv 2211.15841); Triton's tutorial on grouped products,
https://triton-lang.org/main/getting-started/tutorials/08-grouped-gemm.html
"""

import zlib

import torch
from torch import Tensor

try:  # transformers refuses to load an exported file that imports triton outside of `try`
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Namespace of our operators. An exported folder has a copy of this file, and a process may import both. The
# copy registers its operators under another name. Under the same name torch would free the first operators,
# and calling them would read freed memory.
COPY = "" if __name__ == "layers.grouped_product" else f"_{zlib.crc32(__name__.encode()):x}"
NAMESPACE = f"gpt_moe{COPY}"
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 64, 128, 32  # one program computes a tile of y, a slice of D at a time

if triton is not None:

    @triton.jit
    def find_rows(ends, tile, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
        """(expert, its first row, the end of its rows) of a tile; a tile beyond all rows gets 0 and 0.

        EXPERTS: the number of experts, rounded up to a power of two."""
        e = tl.arange(0, EXPERTS)
        start = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
        stop = tl.load(ends + e, mask=e < experts, other=0)
        tiles = tl.where(e < experts, (stop - start + ROWS - 1) // ROWS, 0)
        tiles_so_far = tl.cumsum(tiles)
        expert = tl.sum((tiles_so_far <= tile).to(tl.int32))
        first = start + (tile - (tiles_so_far - tiles)) * ROWS
        return expert, tl.sum(tl.where(e == expert, first, 0)), tl.sum(tl.where(e == expert, stop, 0))

    @triton.jit
    def product_kernel(
        x, w, y, ends, experts, D, F, w_expert, w_row, w_column, EXPERTS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A (ROWS, COLUMNS) tile of y = x @ w[expert]. w_expert, w_row, w_column: strides of w."""
        expert, first, stop = find_rows(ends, tl.program_id(1), experts, EXPERTS, ROWS)
        if first < stop:
            rows, columns = first + tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
            w += expert.to(tl.int64) * w_expert
            total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for begin in range(0, D, DEPTH):
                d = begin + tl.arange(0, DEPTH)
                inside = (rows < stop)[:, None] & (d < D)[None, :]
                a = tl.load(x + rows.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
                inside = (d < D)[:, None] & (columns < F)[None, :]
                b = tl.load(w + d[:, None] * w_row + columns[None, :] * w_column, mask=inside, other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
            inside = (rows < stop)[:, None] & (columns < F)[None, :]
            place = y + rows.to(tl.int64)[:, None] * F + columns[None, :]
            tl.store(place, total.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def weight_gradient_kernel(
        x, grad, grad_w, ends, D, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A (ROWS, COLUMNS) tile of grad_w[expert] = x.T @ grad over its rows; zeros without rows."""
        expert = tl.program_id(2)
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        stop = tl.load(ends + expert)
        d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for begin in range(start, stop, DEPTH):
            rows = (begin + tl.arange(0, DEPTH)).to(tl.int64)
            inside = (d < D)[:, None] & (rows < stop)[None, :]
            a = tl.load(x + rows[None, :] * D + d[:, None], mask=inside, other=0.0)
            inside = (rows < stop)[:, None] & (f < F)[None, :]
            b = tl.load(grad + rows[:, None] * F + f[None, :], mask=inside, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        place = grad_w + expert.to(tl.int64) * D * F + d[:, None] * F + f[None, :]
        tl.store(place, total.to(grad_w.dtype.element_ty), mask=(d < D)[:, None] & (f < F)[None, :])


@torch.compiler.assume_constant_result
def has_kernel(device_type: str) -> bool:
    """Whether Triton can make our kernels for this device. On a CPU torch's operators are as fast."""
    return triton is not None and device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def precision() -> str:
    """How Triton multiplies fp32: in TF32 where torch does (torch.set_float32_matmul_precision)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@torch.library.custom_op(f"{NAMESPACE}::grouped_product", mutates_args=())
def grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x (R, D), w (E, D, F) of x's dtype and any strides, ends (E,) int32 with ends[-1] = R -> (R, F)."""
    (R, D), (E, _, F) = x.shape, w.shape
    y = x.new_empty(R, F)
    grid = (triton.cdiv(F, TILE_COLUMNS), triton.cdiv(R, TILE_ROWS) + E)
    product_kernel[grid](
        x.contiguous(), w, y, ends, E, D, F, *w.stride(), triton.next_power_of_2(E), TILE_ROWS, TILE_COLUMNS,
        TILE_DEPTH, precision(),
    )  # fmt: skip
    return y


@grouped_product.register_fake
def _(x, w, ends):
    return x.new_empty(x.shape[0], w.shape[2])


@torch.library.custom_op(f"{NAMESPACE}::grouped_weight_gradient", mutates_args=())
def weight_gradient(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """The gradient of w in grouped_product: x (R, D), grad (R, F) -> (E, D, F); zeros without rows."""
    (_, D), F, E = x.shape, grad.shape[1], ends.shape[0]
    grad_w = x.new_empty(E, D, F)
    grid = (triton.cdiv(F, TILE_COLUMNS), triton.cdiv(D, TILE_ROWS), E)
    tiles = TILE_ROWS, TILE_COLUMNS, TILE_DEPTH
    weight_gradient_kernel[grid](x.contiguous(), grad.contiguous(), grad_w, ends, D, F, *tiles, precision())
    return grad_w


@weight_gradient.register_fake
def _(x, grad, ends):
    return x.new_empty(ends.shape[0], x.shape[1], grad.shape[1])


def _backward(ctx, grad):
    x, w, ends = ctx.saved_tensors
    if w.stride(1) == 1:  # a transposed parameter: its gradient has the same layout, or torch would copy it
        grad_w = weight_gradient(grad, x, ends).mT
    else:
        grad_w = weight_gradient(x, grad, ends)
    return grouped_product(grad, w.mT, ends), grad_w, None


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


grouped_product.register_autograd(_backward, setup_context=_save_for_backward)
