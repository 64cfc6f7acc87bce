"""Cross-entropy of a linear layer's outputs, a few rows at a time: a language model's loss head.

    loss = linear_cross_entropy(x, lm_head.weight, targets)      # = F.cross_entropy(x @ weight.t(), targets)

Plain autograd keeps several tensors of the logits' size, (N, V). Here a buffer holds the logits of a few rows
at a time. The forward computes the gradients of x and of the weight from these logits. No product is computed
twice: the backward only multiplies by the gradient of the loss.
Letters: N tokens, C n_embd, V vocabulary, n rows in the buffer.
References: Liger Kernel, arXiv 2410.10989, section 3.2. torch 2.13's linear_cross_entropy is a little slower
on a CPU (bench head), rounds its loss to bf16, and torch.compile leaves it out of the graph."""

import torch
from torch import Tensor

from layers.grouped_product import NAMESPACE, has_kernel, tl, triton

# Bytes of the logits for chunk=-1: in fp32, or for loss_kernel in the product's dtype. The CPU's number is
# measured (bench head), the others are estimated.
BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**29, "triton": 2**31}
BLOCK = 4096  # logits that loss_kernel reads at a time


def rows_per_chunk(N: int, V: int, chunk: int, kind: str) -> int:
    """Rows of logits at a time: chunk, or for -1 as many as fit in BUFFER_BYTES[kind], in equal chunks."""
    step = 1
    if chunk < 1:
        size = 2 if kind == "triton" else 4
        chunk = max(1, BUFFER_BYTES.get(kind, BUFFER_BYTES["cpu"]) // (size * V))
        if kind in ("cuda", "triton") and chunk >= 128:  # a multiple of tensor cores' tiles
            step, chunk = 128, chunk - chunk % 128
    rows = -(-N // max(1, -(-N // chunk)))
    return min(N, -(-rows // step) * step)


def row_losses(logits: Tensor, z: Tensor, targets: Tensor, softcap: float, with_grad: bool) -> Tensor:
    """The cross-entropy of each row, (n,), of logits (n, V); with_grad: they become its gradient.

    z (n, V): memory in fp32 at least; the logits themselves if they have that dtype.
    """
    if z.dtype != logits.dtype:
        z.copy_(logits)
    if softcap > 0:
        slope = 1 - z.div_(softcap).tanh_().square()  # of softcap * tanh(z / softcap)
        z.mul_(softcap)
    if z.device.type == "cpu":  # this kernel reads a row's maximum and sum before it writes the row
        torch.log_softmax(z, dim=1, out=z)
    else:
        z.sub_(z.logsumexp(dim=1, keepdim=True))
    losses = -z.gather(1, targets[:, None])[:, 0]
    if with_grad:
        z.exp_().scatter_add_(1, targets[:, None], z.new_full((), -1.0).expand(len(z), 1))
        if softcap > 0:
            z.mul_(slope)
        if z.dtype != logits.dtype:
            logits.copy_(z)
    return losses


if triton is not None:

    @triton.jit
    def loss_kernel(
        logits, targets, losses, V, softcap, CAPPED: tl.constexpr, WITH_GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """`row_losses`, a program for each row. It reads the logits twice and writes the gradient once.

        A target outside the vocabulary gives NaN.
        """
        row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        logits += row * V
        target = tl.load(targets + row)
        top, total, at_target = float("-inf"), 0.0, 0.0  # total: sum of exp(z - top) so far
        for begin in range(0, V, BLOCK):
            z = tl.load(logits + begin + columns, mask=begin + columns < V, other=0.0).to(tl.float32)
            if CAPPED:
                z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # softcap * tanh(z / softcap)
            at_target += tl.sum(tl.where(begin + columns == target, z, 0.0))
            z = tl.where(begin + columns < V, z, float("-inf"))
            higher = tl.maximum(top, tl.max(z))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher))
            top = higher
        normaliser = top + tl.log(total)
        tl.store(losses + row, tl.where((target >= 0) & (target < V), normaliser - at_target, float("nan")))
        if WITH_GRAD:
            for begin in range(0, V, BLOCK):
                place, inside = logits + begin + columns, begin + columns < V
                z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                slope = 1.0
                if CAPPED:
                    z = 2 * tl.sigmoid(2 * z / softcap) - 1
                    slope = 1 - z * z
                    z *= softcap
                grad = (tl.exp(z - normaliser) - (begin + columns == target).to(tl.float32)) * slope
                tl.store(place, grad.to(logits.dtype.element_ty), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=())
def chunked(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, ignore_index: int, softcap: float,
            chunk: int, dtype: torch.dtype, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Summed cross-entropy times scale (), and its gradients by x (N, C) and weight (V, C), if wanted. dtype:
    of the matrix products and the logits, as under autocast. Softmax, loss and both gradients are in fp32 at
    least, because scale would push them below what float16 can hold. torch.compile sees one operator."""
    (N, _), V = x.shape, weight.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    inputs, head = x.to(dtype), weight.to(dtype)
    grad_x = torch.empty_like(x if with_grad else x[:0], dtype=wide)
    grad_weight = torch.zeros_like(weight if with_grad else weight[:0], dtype=wide)
    counted = targets != ignore_index  # (N,)
    targets = targets.masked_fill(~counted, 0)  # (N,)
    factor = torch.where(counted, scale, 0)[:, None]  # (N, 1), of each row's gradient
    loss = torch.zeros((), dtype=wide, device=x.device)
    kernel = dtype != torch.float64 and has_kernel(x.device.type)
    n = rows_per_chunk(N, V, chunk, "triton" if kernel else x.device.type)
    logits = x.new_empty(n, V, dtype=dtype)
    buffer = logits if kernel or dtype == wide else x.new_empty(n, V, dtype=wide)
    for start in range(0, N, max(n, 1)):
        rows = slice(start, min(start + n, N))
        z = logits[: rows.stop - start]
        torch.mm(inputs[rows], head.t(), out=z)
        if kernel:
            losses = z.new_empty(len(z), dtype=wide)
            loss_kernel[(len(z),)](
                z, targets[rows], losses, V, softcap, softcap > 0, with_grad, BLOCK, num_warps=8
            )
        else:
            losses = row_losses(z, buffer[: len(z)], targets[rows], softcap, with_grad)
        loss += losses.masked_fill(~counted[rows], 0).sum()
        if with_grad:
            grad_x[rows] = torch.mm(z, head) * factor[rows]
            if dtype == wide:
                grad_weight.addmm_(z.t(), x[rows] * factor[rows])
            elif z.is_cuda:  # the product itself adds up in fp32
                kept = inputs[rows] * counted[rows, None]
                torch.addmm(grad_weight, z.t(), kept, out_dtype=wide, out=grad_weight)
            else:
                grad_weight += torch.mm(z.t(), inputs[rows] * counted[rows, None])
    if dtype != wide:
        grad_weight.mul_(scale.nan_to_num(posinf=0.0))  # scale is infinite if there is no target
    return loss * scale, grad_x, grad_weight


@chunked.register_fake
def _(x, weight, targets, scale, ignore_index, softcap, chunk, dtype, with_grad):
    wide = torch.promote_types(dtype, torch.float32)
    grads = [torch.empty_like(t if with_grad else t[:0], dtype=wide) for t in (x, weight)]
    return x.new_empty((), dtype=wide), *grads


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [tensor.dtype for tensor in inputs[:2]]
    ctx.set_materialize_grads(False)  # the gradients, which are outputs too, have no gradients


def _run_backward(ctx, grad, *_):
    grads = ctx.saved_tensors
    if torch.compiler.is_compiling() or type(grad) is not Tensor:  # torch is making a graph
        grads = [grad_input * grad for grad_input in grads]
    elif grad.device.type != "cpu" or grad != 1:  # in place: autograd refuses a second backward
        grads = [grad_input.mul_(grad) for grad_input in grads]
    grads = [grad_input.to(dtype) for grad_input, dtype in zip(grads, ctx.dtypes, strict=True)]
    return *grads, *[None] * 7


chunked.register_autograd(_run_backward, setup_context=_save_for_backward)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
                         num_items: Tensor | int | None = None, softcap: float = 0.0,
                         chunk: int = -1) -> Tensor:  # fmt: skip
    """Cross-entropy, in nats, of the logits x @ weight.t(), soft-capped if softcap > 0: a 0-d tensor.
    x (..., C), weight (V, C), targets (...). The mean over the targets that are not ignore_index, NaN if
    there are none, as F.cross_entropy; with num_items their sum, divided by that number. Products are in
    autocast's dtype, or x's. chunk: rows at a time, -1 for BUFFER_BYTES. Can be differentiated once only."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, targets = x.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    wide = torch.promote_types(dtype, torch.float32)
    scale = 1 / torch.as_tensor(num_items, device=x.device).to(wide)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return chunked(x, weight, targets, scale, ignore_index, softcap, chunk, dtype, with_grad)[0]
