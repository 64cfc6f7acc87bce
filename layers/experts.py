"""The feed-forward networks: the dense MLP, and stacked experts with an engine for every device.

    experts = Experts(config)                                # config: any object with GPTConfig's MoE fields
    order, ends = dispatch(index, num_experts)               # index (N, K): the experts of every token
    y = experts(x, weights, order, ends)                     # (N, C), (N, K) -> (N, C)

mixture_of_experts.py is about which experts a token visits; this file, about computing what they answer.
`Experts` takes any rows (M, C) with weights and an order, and reads its number of experts from its
parameters, which other ranks may share.

Letters as in mixture_of_experts.py; M rows of x, R = M*K.

References: MegaBlocks (arXiv 2211.15841);
https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.grouped_mm.html
"""

import math
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below so many channels `expert_mlp` keeps the activation for its backward; in wider layers, where it is a
# smaller part of the work than fresh memory is, it computes the activation again.
KEEP_ACTIVATION_BELOW = 512

grouped_mm = getattr(F, "grouped_mm", None)
MOST_GROUPS = 1024  # torch's grouped product takes fewer

# Of the operators. The copy of this file in an exported folder, loaded beside it, has another: an operator of
# the same name would replace this file's, and whoever called that would meet freed memory.
NAMESPACE = "gpt_moe" if __name__ == "layers.experts" else f"gpt_moe_{zlib.crc32(__name__.encode()):x}"

# -----------------------------------------------------------------------------
# Parameters that are shared out over ranks (DTensors)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is shared out over ranks, differentiable; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(tensor: Tensor) -> tuple[range, ...]:
    """Which indices of the whole tensor, in each dimension, `local` gives: all, unless it is shared out."""
    ranges, mesh = [range(size) for size in tensor.shape], getattr(tensor, "device_mesh", None)
    for mesh_dim in reversed(range(mesh.ndim)) if mesh is not None else ():  # the last one has cut first
        dim = tensor.placements[mesh_dim].dim
        size = math.ceil(len(ranges[dim]) / mesh.size(mesh_dim))  # as torch.chunk: the last may be less, or 0
        ranges[dim] = ranges[dim][mesh.get_local_rank(mesh_dim) * size :][:size]
    return tuple(ranges)


def dimension_to_cut(shape: Sequence[int], ranks: int) -> int:
    """Along which dimension FSDP cuts stacked experts, (E, ...): the first that gives all ranks as much.

    Dimension 0 if there is none: FSDP pads only there.
    """
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


# -----------------------------------------------------------------------------
# Dense feed-forward


def activate(h: Tensor, activation: str) -> Tensor:
    """The non-linearity between the projections: (..., H) -> (..., H), for swiglu (..., 2H) -> (..., H)."""
    if activation == "gelu":
        return F.gelu(h, approximate="tanh")
    if activation == "relu2":
        h = F.relu(h)
        return h * h  # square() is a power, for which autocast on CUDA wants fp32
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    raise ValueError(f"activation={activation!r} is unknown; use 'gelu', 'relu2' or 'swiglu'")


def activate_into(out: Tensor, h: Tensor, activation: str) -> Tensor:
    """`activate` without gradient, its result (..., H) written to `out`, which is returned."""
    if activation == "gelu":
        return torch.ops.aten.gelu.out(h, approximate="tanh", out=out)
    if activation == "relu2":
        return torch.square(F.relu(h), out=out)
    gate, up = h.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


def activate_backward(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    """Gradient of `activate` with respect to h, from the gradient with respect to its result."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, h, approximate="tanh")
    if activation == "relu2":
        return 2 * grad * F.relu(h)
    gate, up = h.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=-1)


class MLP(nn.Module):
    """Dense feed-forward of a block, and the shared expert of `MoE`. hidden_size None: 4C.

    With swiglu `c_fc` is packed: its first H rows make the gate (through silu), its last H the up projection.
    """

    def __init__(self, config, hidden_size: int | None = None):
        super().__init__()
        hidden = hidden_size or 4 * config.n_embd
        packed = 2 * hidden if config.activation == "swiglu" else hidden
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, packed, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(activate(self.c_fc(x), self.activation)))  # (B, T, C)


# -----------------------------------------------------------------------------
# Dispatch, and the engine for every device: a loop over experts inside one operator


def dispatch(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the routed rows by expert. index (N, K) -> order (R,) int64, ends (E,) int32.

    Sorted row r is slot order[r] = token * K + k; expert e owns the sorted rows from ends[e-1] to ends[e].
    """
    expert, order = index.reshape(-1).to(torch.int16).sort(stable=True)  # int16 sorts in a third of the time
    experts = torch.arange(num_experts, device=index.device, dtype=torch.int16)
    return order, torch.searchsorted(expert, experts, right=True).int()


def _groups(order: Tensor, ends: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, list[slice], int]:
    """Tokens (R,) and weights (R, 1) of the sorted rows, every expert's rows, size of the largest group.

    Reads `ends` on the host: free on a CPU, a synchronisation on any other device.
    """
    stops = ends.tolist()
    spans = [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
    most = max(span.stop - span.start for span in spans)
    return order // weights.shape[1], weights.reshape(-1, 1)[order], spans, most


def _kept_rows(x: Tensor, order: Tensor) -> int:
    """How many rows of activations `expert_mlp` hands to its backward: all, or none."""
    return order.shape[0] if x.device.type == "cpu" and x.shape[1] < KEEP_ACTIVATION_BELOW else 0


@torch.library.custom_op(f"{NAMESPACE}::expert_mlp", mutates_args=())
def expert_mlp(
    x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, parameters: list[Tensor], activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 3 and 4, one expert after the other: output (M, C), hidden pre-activations (R, H), and their
    activations (R, H) where `_kept_rows` keeps them.

    x (M, C), weights (M, K), order and ends from `dispatch`, parameters [c_fc, c_proj] or, with biases,
    [c_fc, c_proj, c_fc_bias, c_proj_bias]. A single operator, so that a compiler sees no shape that depends
    on data. Rows are gathered into buffers that stay in the cache, and nothing of size (R, C) is stored:
    fresh pages cost a CPU more than the gathering does.
    """
    token, w, spans, most = _groups(order, ends, weights)
    rows, y = x.new_empty(most, x.shape[1]), x.new_empty(most, x.shape[1])
    hidden = x.new_empty(order.shape[0], parameters[0].shape[1])  # (R, H)
    acts = x.new_empty(_kept_rows(x, order), parameters[1].shape[2])  # (R, H), or nothing
    scratch = None if acts.shape[0] else x.new_empty(most, acts.shape[1])
    out = w.new_zeros(x.shape)
    for e, span in enumerate(spans):
        n, h = span.stop - span.start, hidden[span]
        if n == 0:
            continue
        c_fc, c_proj, *biases = (p[e].to(x.dtype) for p in parameters)
        torch.index_select(x, 0, token[span], out=rows[:n])
        if biases:
            torch.addmm(biases[0], rows[:n], c_fc.t(), out=h)
        else:
            torch.mm(rows[:n], c_fc.t(), out=h)
        act = activate_into(acts[span] if acts.shape[0] else scratch[:n], h, activation)
        if biases:
            torch.addmm(biases[1], act, c_proj.t(), out=y[:n])
        else:
            torch.mm(act, c_proj.t(), out=y[:n])
        out.index_add_(0, token[span], y[:n].mul_(w[span]).to(out.dtype))
    return out.to(x.dtype), hidden, acts


@expert_mlp.register_fake
def _(x, weights, order, ends, parameters, activation):
    hidden = x.new_empty(order.shape[0], parameters[0].shape[1])
    return x.new_empty(x.shape), hidden, x.new_empty(_kept_rows(x, order), parameters[1].shape[2])


@torch.library.custom_op(f"{NAMESPACE}::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad: Tensor, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, hidden: Tensor,
    acts: Tensor, parameters: list[Tensor], activation: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weights and every parameter, given that of the output, `hidden` and `acts`."""
    token, w, spans, most = _groups(order, ends, weights)
    rows, grad_rows = x.new_empty(most, x.shape[1]), x.new_empty(most, x.shape[1])
    grad_hidden = x.new_empty(most, parameters[1].shape[2])
    scratch = None if acts.shape[0] else torch.empty_like(grad_hidden)
    grad_x, grad_w = w.new_zeros(x.shape), torch.empty_like(w)
    grads = [x.new_empty(p.shape) for p in parameters]
    for e, span in enumerate(spans):
        n, t, h = span.stop - span.start, token[span], hidden[span]
        if n == 0:
            for grad_p in grads:
                grad_p[e].zero_()
            continue
        c_fc, c_proj, *biases = (p[e].to(x.dtype) for p in parameters)
        r, g, gh = rows[:n], grad_rows[:n], grad_hidden[:n]
        torch.index_select(x, 0, t, out=r)
        torch.index_select(grad, 0, t, out=g)
        torch.mm(g, c_proj, out=gh)
        act = acts[span] if acts.shape[0] else activate_into(scratch[:n], h, activation)
        # A weight's gradient is <g, c_proj act + bias>, taken as <c_proj^T g, act> + <g, bias>.
        torch.sum(gh * act, 1, keepdim=True, dtype=w.dtype, out=grad_w[span])
        if biases:
            grad_w[span] += g @ biases[1][:, None]
        torch.mm(g.mul_(w[span]).t(), act, out=grads[1][e])
        gh = activate_backward(gh.mul_(w[span]), h, activation)
        torch.mm(gh.t(), r, out=grads[0][e])
        if biases:
            torch.sum(gh, 0, out=grads[2][e])
            torch.sum(g, 0, out=grads[3][e])
        torch.mm(gh, c_fc, out=g)
        grad_x.index_add_(0, t, g.to(grad_x.dtype))
    grad_weights = torch.empty_like(w).index_copy_(0, order, grad_w).view(weights.shape)
    grads = [grad_p.to(p.dtype) for grad_p, p in zip(grads, parameters, strict=True)]
    return [grad_x.to(x.dtype), grad_weights, *grads]


@expert_mlp_backward.register_fake
def _(grad, x, weights, order, ends, hidden, acts, parameters, activation):
    return [tensor.new_empty(tensor.shape) for tensor in (x, weights, *parameters)]


def _save_for_backward(ctx, inputs, output):
    *tensors, parameters, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:], *parameters)
    ctx.set_materialize_grads(False)  # `hidden` never has a gradient: no zeros (R, H) for it


def _run_backward(ctx, grad, *_):
    saved = ctx.saved_tensors  # once: under activation checkpointing this recomputes
    saved, parameters = saved[:6], list(saved[6:])
    if grad is None:
        return None, None, None, None, [None] * len(parameters), None
    grad_x, grad_weights, *grads = expert_mlp_backward(grad.contiguous(), *saved, parameters, ctx.activation)
    return grad_x, grad_weights, None, None, grads, None


expert_mlp.register_autograd(_run_backward, setup_context=_save_for_backward)

# -----------------------------------------------------------------------------
# Experts, and the engines for a GPU


class Gather(torch.autograd.Function):
    """x (M, C) -> x[index] (R, C), where every row of x is taken equally often, in R/M copies.

    inverse (R,) sorts these rows by their origin: the gradient is a gather and a sum, without atomics.
    """

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        ctx.copies = index.shape[0] // max(x.shape[0], 1) or 1  # also without any row
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(-1, ctx.copies, grad.shape[1]).sum(1), None, None


@torch.compiler.assume_constant_result
def _has_grouped_kernel() -> bool:
    """Whether grouped_mm has a kernel of its own on this GPU; elsewhere it loops, with a synchronisation."""
    return grouped_mm is not None and torch.cuda.get_device_capability()[0] in (9, 10)


@torch.compiler.assume_constant_result
def _idle_gradients_are_garbage() -> bool:
    """Whether grouped_mm's backward leaves the gradient of an expert without rows uninitialised, as it does
    on Blackwell (https://github.com/pytorch/pytorch/issues/172439)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10


class BusyOnly(torch.autograd.Function):
    """Stacked weights (E, ...) as they are; where an expert has no row, their gradient is zero."""

    @staticmethod
    def forward(ctx, weights, ends):
        ctx.save_for_backward(ends)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad):
        (ends,) = ctx.saved_tensors
        idle = ends.diff(prepend=ends.new_zeros(1)) == 0  # (E,)
        return grad.masked_fill(idle.view(-1, *[1] * (grad.dim() - 1)), 0), None


class Experts(nn.Module):
    """E feed-forward networks in stacked parameters: c_fc (E, H, C), c_proj (E, C, H), with bias also
    c_fc_bias (E, H), c_proj_bias (E, C); with swiglu c_fc (E, 2H, C), c_fc_bias (E, 2H), packed as in `MLP`.

    `engine` is "auto", which chooses by device, dtype and size, or one of
      "loop"        `expert_mlp`: products for the experts that have rows; any dtype; reads sizes on the host
      "grouped_mm"  torch's grouped product; auto for CUDA capability 9 or 10, bf16, C and H divisible by 8,
                    fewer than MOST_GROUPS experts
      "gather"      copies of the chosen experts' weights; auto for a few rows on CUDA without gradients
    Any other case on CUDA (fp32, fp16, another capability, odd sizes, more experts) takes the loop, and so
    waits for the device once in every layer, and once more in the backward pass. Weights are cast as autocast
    would: expert by expert, except by "grouped_mm", which needs them all.
    """

    def __init__(self, config):
        super().__init__()
        E, C, H = config.num_experts, config.n_embd, config.expert_hidden_size or 4 * config.n_embd
        packed = 2 * H if config.activation == "swiglu" else H
        self.activation = config.activation
        self.engine = "auto"
        self.c_fc = nn.Parameter(torch.empty(E, packed, C))
        self.c_proj = nn.Parameter(torch.empty(E, C, H))
        self.c_fc_bias = nn.Parameter(torch.empty(E, packed)) if config.bias else None
        self.c_proj_bias = nn.Parameter(torch.empty(E, C)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: weights normal with standard deviation 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.0 if name.endswith("bias") else 0.02)

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """x (M, C), weights (M, K), order (M*K,), ends (E,) -> (M, C), x's or autocast's dtype."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        x, weights = x.contiguous(), weights.contiguous()
        engine = self._choose_engine(x, order.shape[0]) if self.engine == "auto" else self.engine
        if engine == "grouped_mm":
            return self._grouped(x, weights, order, ends)
        if engine == "gather":
            return self._gathered(x, weights, order, ends)
        biases = [] if self.c_fc_bias is None else [self.c_fc_bias, self.c_proj_bias]
        parameters = [local(p) for p in (self.c_fc, self.c_proj, *biases)]
        return expert_mlp(x, weights, order, ends, parameters, self.activation)[0]

    def _choose_engine(self, x: Tensor, rows: int) -> str:
        if x.device.type != "cuda" or rows == 0:  # none: an exchange brought this rank nothing
            return "loop"
        groups = local(self.c_fc).shape[0]
        if rows <= groups and not torch.is_grad_enabled():
            return "gather"
        fits = x.shape[1] % 8 == 0 and self.c_proj.shape[2] % 8 == 0 and groups < MOST_GROUPS
        return "grouped_mm" if x.dtype == torch.bfloat16 and fits and _has_grouped_kernel() else "loop"

    def _grouped(self, x, weights, order, ends):
        (M, K), rows = weights.shape, torch.arange(order.shape[0], device=x.device)
        position = torch.empty_like(order).scatter_(0, order, rows)  # (R,) from slot to sorted row
        w = Gather.apply(weights.view(-1, 1), order, position)  # (R, 1)
        h = Gather.apply(x, order // K, position)  # (R, C)
        c_fc, c_proj = (local(p).to(x.dtype) for p in (self.c_fc, self.c_proj))
        if _idle_gradients_are_garbage():
            c_fc, c_proj = (BusyOnly.apply(p, ends) for p in (c_fc, c_proj))
        h = grouped_mm(h, c_fc.mT, offs=ends)  # (R, H)
        if self.c_fc_bias is not None:
            # Biases by a product with a one-hot matrix, whose gradient is a product too.
            expert = torch.searchsorted(ends, rows, right=True)  # (R,)
            one_hot = (expert[:, None] == torch.arange(ends.shape[0], device=x.device)).to(x.dtype)  # (R, E)
            h = torch.addmm(h, one_hot, local(self.c_fc_bias).to(x.dtype))
        # Weighting before the projection keeps (R, H) for the backward pass; after it, it would be (R, C).
        h = (activate(h, self.activation) * w).to(x.dtype)
        y = grouped_mm(h, c_proj.mT, offs=ends)  # (R, C)
        y = Gather.apply(y, position, order).view(M, K, y.shape[1])
        y = y.sum(1, dtype=x.dtype)  # (M, C); without dtype autocast on CUDA makes it fp32
        if self.c_proj_bias is not None:
            mix = Gather.apply((one_hot * w).to(x.dtype), position, order)  # (R, E)
            y = torch.addmm(y, mix.view(M, K, mix.shape[1]).sum(1), local(self.c_proj_bias).to(x.dtype))
        return y

    def _gathered(self, x, weights, order, ends):
        rows = torch.arange(order.shape[0], device=x.device)
        expert = torch.empty_like(order).scatter_(0, order, torch.searchsorted(ends, rows, right=True))
        chosen = {name: local(p)[expert].to(x.dtype) for name, p in self.named_parameters()}  # of every slot
        y = x.repeat_interleave(weights.shape[1], 0)  # (R, C)
        h = (chosen["c_fc"] @ y[:, :, None])[:, :, 0] + chosen.get("c_fc_bias", 0)  # (R, H)
        h = activate(h, self.activation)
        y = (chosen["c_proj"] @ h[:, :, None])[:, :, 0] + chosen.get("c_proj_bias", 0)  # (R, C)
        return (y.view(*weights.shape, x.shape[1]) * weights[:, :, None]).sum(1).to(x.dtype)  # (M, C)
