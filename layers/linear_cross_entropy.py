"""Cross-entropy of a linear layer's outputs, a few rows at a time: a language model's loss head.

    loss = linear_cross_entropy(x, lm_head.weight, targets)      # = F.cross_entropy(x @ weight.t(), targets)

Plain autograd keeps several tensors of the logits' size, (N, V). Here a buffer holds the logits of a few rows
at a time. The forward computes the gradients of x and of the weight from these logits. No product is computed
twice: the backward only multiplies by the gradient of the loss.

Letters: N tokens, C n_embd, V vocabulary, n rows in the buffer.
References: Liger Kernel, arXiv 2410.10989, section 3.2. torch 2.13's linear_cross_entropy is a little slower
on a CPU (bench head), rounds its loss to bf16, and torch.compile leaves it out of the graph.
"""

import torch
from torch import Tensor

from layers.grouped_product import NAMESPACE

# Bytes of the fp32 buffer for chunk=-1. The CPU's number is measured (bench head), the GPU's estimated.
BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**29}


def rows_per_chunk(N: int, V: int, chunk: int, device_type: str) -> int:
    """Rows of logits at a time: chunk, or for -1 as many as fit in BUFFER_BYTES, in equal chunks."""
    step = 1
    if chunk < 1:
        chunk = max(1, BUFFER_BYTES.get(device_type, BUFFER_BYTES["cpu"]) // (4 * V))
        if device_type == "cuda" and chunk >= 128:  # a multiple of tensor cores' tiles
            step, chunk = 128, chunk - chunk % 128
    rows = -(-N // max(1, -(-N // chunk)))
    return min(N, -(-rows // step) * step)


def log_softmax_(z: Tensor) -> Tensor:
    """z (n, V) becomes its log-softmax over V, in place."""
    if z.device.type == "cpu":  # this kernel reads a row's maximum and sum before it writes the row
        return torch.log_softmax(z, dim=1, out=z)
    return z.sub_(z.logsumexp(dim=1, keepdim=True))


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=())
def chunked(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, ignore_index: int, softcap: float, chunk: int,
    dtype: torch.dtype, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Summed cross-entropy times scale (), and its gradients by x (N, C) and weight (V, C), if wanted.

    dtype: of the matrix products and the logits, as under autocast. Softmax, loss and both gradients are in
    fp32 at least, because scale would push them below what float16 can hold. torch.compile sees one operator.
    """
    (N, _), V = x.shape, weight.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    inputs, head = x.to(dtype), weight.to(dtype)
    grad_x = torch.empty_like(x if with_grad else x[:0], dtype=wide)
    grad_weight = torch.zeros_like(weight if with_grad else weight[:0], dtype=wide)
    counted = targets != ignore_index  # (N,)
    targets = targets.masked_fill(~counted, 0)[:, None]  # (N, 1)
    factor = torch.where(counted, scale, 0)[:, None]  # (N, 1), of each row's gradient
    loss = torch.zeros((), dtype=wide, device=x.device)
    n = rows_per_chunk(N, V, chunk, x.device.type)
    buffer = x.new_empty(n, V, dtype=wide)
    narrow = buffer if dtype == wide else x.new_empty(n, V, dtype=dtype)
    for start in range(0, N, max(n, 1)):
        rows = slice(start, min(start + n, N))
        z, low, target = buffer[: rows.stop - start], narrow[: rows.stop - start], targets[rows]
        torch.mm(inputs[rows], head.t(), out=low)
        if dtype != wide:
            z.copy_(low)
        if softcap > 0:
            slope = 1 - z.div_(softcap).tanh_().square()  # of softcap * tanh(z / softcap)
            z.mul_(softcap)
        log_softmax_(z)
        loss -= z.gather(1, target).masked_fill(~counted[rows, None], 0).sum()
        if not with_grad:
            continue
        z.exp_().scatter_add_(1, target, z.new_full((), -1.0).expand_as(target))  # softmax minus one-hot
        if softcap > 0:
            z.mul_(slope)
        if dtype != wide:
            low.copy_(z)
        grad_x[rows] = torch.mm(low, head) * factor[rows]
        if dtype == wide:
            grad_weight.addmm_(low.t(), x[rows] * factor[rows])
        else:
            grad_weight += torch.mm(low.t(), inputs[rows] * counted[rows, None])
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


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
    num_items: Tensor | int | None = None, softcap: float = 0.0, chunk: int = -1,
) -> Tensor:  # fmt: skip
    """Cross-entropy, in nats, of the logits x @ weight.t(), soft-capped if softcap > 0: a 0-d tensor.

    x (..., C), weight (V, C), targets (...). The mean over the targets that are not ignore_index, NaN if
    there are none, as F.cross_entropy; with num_items their sum, divided by that number. Products are in
    autocast's dtype, or x's. chunk: rows at a time, -1 for BUFFER_BYTES. Can be differentiated once only.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, targets = x.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    wide = torch.promote_types(dtype, torch.float32)
    scale = 1 / torch.as_tensor(num_items, device=x.device).to(wide)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return chunked(x, weight, targets, scale, ignore_index, softcap, chunk, dtype, with_grad)[0]
