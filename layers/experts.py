"""Stacked experts: feed-forward networks in stacked weights, with an engine for every device.

    experts = Experts(config)                                # config: any object with GPTConfig's MoE fields
    routing = dispatch(index, weights, num_experts)          # index, weights (N, K)
    y = experts(x, routing)                                  # (N, C) -> (N, C)

mixture_of_experts.py decides which experts compute a token. This file computes the experts' outputs. The two
files share only a `Routing`, in which tokens may have different numbers of rows.

References: MegaBlocks (arXiv 2211.15841); torch.nn.functional.grouped_mm in torch's documentation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.grouped_product import NAMESPACE, grouped_product, has_kernel
from layers.mlp import get_activation
from layers.sharding import local

MOST_GROUPS = 1024  # torch's grouped product needs fewer groups than this

# ----------------------------- Dispatch and combine: from tokens to rows, sorted by expert, and back


class Routing(NamedTuple):
    """Which experts compute which tokens: one row for each token and each of its experts, sorted by expert.
    A slot is a row's place before sorting, when the rows are in the order of the tokens."""

    token: Tensor  # (R,) int64, the token of each row
    weight: Tensor  # (R,) fp32, the factor of each row in its token's output; differentiable
    ends: Tensor  # (E,) int32: expert e computes the rows from ends[e-1] to ends[e]
    expert: Tensor  # (R,) int16, the expert of each row
    order: Tensor  # (R,) int64, the slot of each row
    position: Tensor  # (R,) int32, the row of each slot: the inverse of `order`
    per_token: int | None  # K, or None where the number of rows per token varies

    def counts(self) -> Tensor:
        """The number of rows of each expert, (E,) int64."""
        return (self.ends - F.pad(self.ends, (1, -1))).long()


class Permute(torch.autograd.Function):
    """rows (R, D) -> rows[index] for a permutation `index`. The gradient is a gather too, without atomics."""

    @staticmethod
    def forward(ctx, rows, index, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class BiasOfRows(torch.autograd.Function):
    """bias (E, D), expert (R,) -> bias[expert] (R, D) in dtype, times weight (R, 1) if it is not None. The
    gradient of the bias is a product with a one-hot matrix, without atomics."""

    @staticmethod
    def forward(ctx, bias, expert, weight, dtype):
        ctx.save_for_backward(bias, expert, weight)
        rows = bias.index_select(0, expert.int()).to(dtype)
        return rows if weight is None else (rows * weight).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        bias, expert, weight = ctx.saved_tensors
        one_hot = expert[:, None] == torch.arange(bias.shape[0], device=grad.device)  # (R, E)
        factor = (one_hot if weight is None else one_hot * weight).to(grad.dtype)
        # On CUDA a product of bf16 or fp16 can write fp32 itself.
        wide = grad.is_cuda and grad.itemsize == 2 and bias.dtype == torch.float32
        grad_bias = torch.mm(factor.t(), grad, **(dict(out_dtype=bias.dtype) if wide else {})).to(bias.dtype)
        if weight is None:
            return grad_bias, None, None, None
        rows = bias.index_select(0, expert.int()).to(grad.dtype)
        return grad_bias, None, (grad * rows).sum(1, keepdim=True, dtype=weight.dtype), None


class TakeRows(torch.autograd.Function):
    """x (N, D) -> x[token] (R, D). The gradient of a token is the sum over its rows: `combine`."""

    @staticmethod
    def forward(ctx, x, routing):
        ctx.save_for_backward(*routing[:-1])
        ctx.num_tokens, ctx.per_token = x.shape[0], routing.per_token
        return x.index_select(0, routing.token)

    @staticmethod
    def backward(ctx, grad):
        return combine(grad, Routing(*ctx.saved_tensors, ctx.per_token), ctx.num_tokens), None


def dispatch(expert: Tensor, weight: Tensor, num_experts: int, token: Tensor | None = None) -> Routing:
    """Sort the routed rows by expert. expert and weight (N, K) give each token K rows. If the number varies,
    expert, weight and token are (R,), token by token."""
    K = expert.shape[1] if token is None else None
    expert = expert.to(torch.int16).reshape(-1)  # sorting takes a third of int64's time
    experts = torch.arange(num_experts, device=expert.device, dtype=torch.int16)
    if torch.compiler.is_exporting():  # ONNX has no stable sort, and the engine "all" needs no order
        order = torch.arange(expert.shape[0], device=expert.device)
        ends = (expert[:, None] <= experts).sum(0).int()  # (E,)
    else:
        by_expert, order = expert.sort(stable=True)
        ends = torch.searchsorted(by_expert, experts, right=True).int()  # (E,)
    token = order // K if token is None else token[order]  # (R,)
    rows = torch.arange(order.shape[0], device=order.device, dtype=torch.int32)
    position = torch.empty_like(rows)
    position[order] = rows
    weight = Permute.apply(weight.reshape(-1), order, position)
    return Routing(token, weight, ends, expert[order], order, position, K)


def combine(rows: Tensor, routing: Routing, num_tokens: int, weighted: bool = False) -> Tensor:
    """Sum of each token's rows, (R, D) -> (N, D), in their dtype; weighted: times the rows' weights."""
    if routing.per_token is None:
        rows = rows * routing.weight[:, None].to(rows.dtype) if weighted else rows
        return rows.new_zeros(num_tokens, rows.shape[1]).index_add(0, routing.token, rows)
    shape, to_slots = (num_tokens, routing.per_token, rows.shape[1]), (routing.position, routing.order)
    rows = Permute.apply(rows, *to_slots).view(shape)  # (N, K, D)
    if not weighted:
        return rows.sum(1, dtype=rows.dtype)  # without dtype, autocast on CUDA makes it fp32
    weight = Permute.apply(routing.weight, *to_slots).view(num_tokens, 1, -1)  # (N, 1, K)
    return torch.bmm(weight.to(rows.dtype), rows)[:, 0]


# ----------------------------- The engine for every device: a loop over experts inside one operator


def _sizes(ends: Tensor) -> list[int]:
    """The rows of each expert, on the host. Synchronises, except on a CPU."""
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _products(rows: Tensor, weights: Tensor, biases: Tensor | None, sizes: list[int], out: Tensor) -> Tensor:
    """Each expert's rows (R, D), `sizes` of them, times its matrix of weights (E, F, D), plus its bias of
    (E, F), into out (R, F). Returns out."""
    for e, (one, result) in enumerate(zip(rows.split(sizes), out.split(sizes), strict=True)):
        bias = None if biases is None else biases[e].to(rows.dtype)
        F.linear(one, weights[e].to(rows.dtype), bias, out=result)
    return out


def _on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU. There `expert_mlp` saves the activations for its backward, because a CPU is slow
    at them. On a GPU, which has less memory, the backward computes them again."""
    return x.device.type == "cpu"


def _add_up(rows: Tensor, token: Tensor, position: Tensor, N: int, weight: Tensor | None = None) -> Tensor:
    """Sum of each token's rows, (R, C) -> (N, C); times the rows' weights (R,), if they are given."""
    if not _on_cpu(rows):
        rows = rows if weight is None else rows * weight[:, None]
        return rows.new_zeros(N, rows.shape[1]).index_add_(0, token, rows)
    # Token n has the slots from borders[n] to borders[n + 1]. On a CPU one pass over the rows is fastest.
    borders = F.pad(torch.bincount(token, minlength=N).cumsum(0), (1, 0)).int()  # (N + 1,)
    options = dict(per_sample_weights=None if weight is None else weight[position], include_last_offset=True)
    return F.embedding_bag(position, rows, borders, mode="sum", **options)


@torch.library.custom_op(f"{NAMESPACE}::expert_mlp", mutates_args=())
def expert_mlp(
    x: Tensor, weight: Tensor, token: Tensor, position: Tensor, ends: Tensor, parameters: list[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Stages 3 and 4, one expert after the other. Returns the output (N, C) and two tensors for the backward:
    hidden values before the activation, (R, H) or gated (R, 2H), and after it, (R, H) or, not saved, (0, H).

    x (N, C); weight, token, position and ends as in `Routing`; parameters [c_fc, c_proj] or, with biases,
    [c_fc, c_proj, c_fc_bias, c_proj_bias]; activation a name in ACTIVATIONS, else ValueError.
    It is one operator, so that torch.compile sees no shape that depends on data. Only the products are
    computed expert by expert: one call for all rows costs less than one per expert."""
    act, sizes = get_activation(activation), _sizes(ends)
    c_fc, c_proj, fc_bias, proj_bias = (*parameters, None, None)[:4]
    rows = x.index_select(0, token)  # (R, C)
    hidden, acts = (x.new_empty(len(token), width) for width in (c_fc.shape[1], c_proj.shape[2]))
    act.forward_into(acts, _products(rows, c_fc, fc_bias, sizes, hidden))  # (R, H)
    y = _products(acts, c_proj, proj_bias, sizes, rows)  # (R, C), where the rows were
    out = _add_up(y.to(weight.dtype), token, position, x.shape[0], weight)
    return out.to(x.dtype), hidden, acts if _on_cpu(x) else acts.new_empty(0, acts.shape[1])


@expert_mlp.register_fake
def _(x, weight, token, position, ends, parameters, activation):
    rows, hidden, kept = token.shape[0], parameters[0].shape[1], parameters[1].shape[2]
    return x.new_empty(x.shape), x.new_empty(rows, hidden), x.new_empty(rows if _on_cpu(x) else 0, kept)


@torch.library.custom_op(f"{NAMESPACE}::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(grad: Tensor, x: Tensor, weight: Tensor, token: Tensor, position: Tensor,
                        ends: Tensor, hidden: Tensor, acts: Tensor, parameters: list[Tensor],
                        activation: str) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weight and every parameter, given the output's; hidden, acts: `expert_mlp`'s."""
    act, sizes, w = get_activation(activation), _sizes(ends), weight[:, None]  # (R, 1)
    c_fc, c_proj, *biases = parameters
    g = grad.index_select(0, token)  # (R, C)
    ga = _products(g, c_proj.mT, None, sizes, x.new_empty(len(token), c_proj.shape[2]))  # (R, H)
    acts = acts if len(acts) == len(ga) else act.forward_into(torch.empty_like(ga), hidden)
    # A weight's gradient is <g, c_proj a + bias>, computed as <c_proj^T g, a> + <g, bias>.
    grad_w = (ga * acts).sum(1, keepdim=True, dtype=w.dtype)
    if biases:
        of_experts = grad @ biases[1].to(grad.dtype).t()  # (N, E)
        counts = ends.diff(prepend=ends.new_zeros(1))  # (E,)
        expert = torch.repeat_interleave(counts, output_size=len(token))  # (R,), without a read by the host
        grad_w += of_experts[token, expert][:, None]
    g.mul_(w)
    gh, rows = act.backward(ga.mul_(w), hidden), x.index_select(0, token)  # (R, H) or (R, 2H), (R, C)
    grads = [x.new_empty(p.shape) for p in parameters]
    by_expert = zip(*(tensor.split(sizes) for tensor in (rows, gh, acts, g)), strict=True)
    for e, (rows_e, gh_e, acts_e, g_e) in enumerate(by_expert):
        torch.mm(gh_e.t(), rows_e, out=grads[0][e])  # zeros for an expert without rows
        torch.mm(g_e.t(), acts_e, out=grads[1][e])
        if biases:
            torch.sum(gh_e, 0, out=grads[2][e])
            torch.sum(g_e, 0, out=grads[3][e])
    grad_rows = _products(gh, c_fc.mT, None, sizes, g).to(w.dtype)  # (R, C)
    grad_x = _add_up(grad_rows, token, position, x.shape[0])
    grads = [grad_p.to(p.dtype) for grad_p, p in zip(grads, parameters, strict=True)]
    return [grad_x.to(x.dtype), grad_w.view(-1), *grads]


@expert_mlp_backward.register_fake
def _(grad, x, weight, token, position, ends, hidden, acts, parameters, activation):
    return [tensor.new_empty(tensor.shape) for tensor in (x, weight, *parameters)]


def _save_for_backward(ctx, inputs, output):
    *tensors, parameters, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:], *parameters)
    ctx.set_materialize_grads(False)  # `hidden` and `acts` have no gradients: torch need not make zeros


def _run_backward(ctx, grad, *_):
    saved = ctx.saved_tensors  # read once: under activation checkpointing this recomputes
    saved, parameters = saved[:7], list(saved[7:])
    if grad is None:
        return None, None, None, None, None, [None] * len(parameters), None
    grad_x, grad_weight, *grads = expert_mlp_backward(grad.contiguous(), *saved, parameters, ctx.activation)
    return grad_x, grad_weight, None, None, None, grads, None


expert_mlp.register_autograd(_run_backward, setup_context=_save_for_backward)

# ----------------------------- Experts, and the engines for a GPU


@torch.compiler.assume_constant_result
def _has_grouped_kernel() -> bool:
    """Whether grouped_mm has one kernel on this GPU; on other GPUs it loops and synchronises."""
    return torch.cuda.get_device_capability()[0] in (9, 10)


@torch.compiler.assume_constant_result
def _idle_gradients_are_garbage() -> bool:
    """Whether grouped_mm's backward leaves the gradient of an expert without rows uninitialised. It does
    so on Blackwell GPUs (https://github.com/pytorch/pytorch/issues/172439)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10


def plain(parameter: Tensor) -> Tensor:
    """This rank's part, as an ordinary tensor: what torchao has quantised is dequantised for this product."""
    parameter = local(parameter)
    return parameter.dequantize() if hasattr(parameter, "qdata") else parameter


class ZeroIdleGradients(torch.autograd.Function):
    """Returns stacked weights (E, ...) unchanged. Sets the gradient of each expert without rows to zero."""

    @staticmethod
    def forward(ctx, weights, counts):
        ctx.save_for_backward(counts)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad):
        (counts,) = ctx.saved_tensors  # (E,)
        return grad.masked_fill((counts == 0).view(-1, *[1] * (grad.dim() - 1)), 0), None


class Experts(nn.Module):
    """E feed-forward networks in stacked parameters: c_fc (E, H, C), c_proj (E, C, H), with bias also
    c_fc_bias (E, H), c_proj_bias (E, C). With a gated activation c_fc and its bias have 2H rows, as in `MLP`.

    `engine` is "auto", which chooses by device, dtype and size, or one of
      "loop"        `expert_mlp`: products, one expert after the other; any dtype; reads sizes on the host
      "grouped_mm"  torch's grouped product; auto for CUDA capability 9 or 10, bf16, C and H divisible by 8,
                    fewer than MOST_GROUPS experts
      "triton"      our grouped_product; auto for all other cases on CUDA capability 8 or higher, with Triton
      "all"         every expert computes every token, by plain operators; auto while torch.export traces
    Other GPUs use the loop, which waits for the device once per layer in each pass. Weights are cast as under
    autocast: expert by expert in the loop, else all of them."""

    def __init__(self, config):
        super().__init__()
        E, C, H = config.num_experts, config.n_embd, config.expert_hidden_size or 4 * config.n_embd
        packed = get_activation(config.activation).parts * H
        self.activation, self.engine = config.activation, "auto"
        self.c_fc = nn.Parameter(torch.empty(E, packed, C))
        self.c_proj = nn.Parameter(torch.empty(E, C, H))
        self.c_fc_bias = nn.Parameter(torch.empty(E, packed)) if config.bias else None
        self.c_proj_bias = nn.Parameter(torch.empty(E, C)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: weights normal with standard deviation 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.0 if name.endswith("bias") else 0.02)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (N, C) -> (N, C), in x's dtype or autocast's."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        x = x.contiguous()
        engine = self._choose_engine(x, routing.token.shape[0]) if self.engine == "auto" else self.engine
        if engine == "grouped_mm":
            return self._grouped(x, routing, lambda rows, w, ends: F.grouped_mm(rows, w, offs=ends))
        if engine == "triton":
            return self._grouped(x, routing, grouped_product)
        if engine == "all":
            return self._all(x, routing)
        biases = [] if self.c_fc_bias is None else [self.c_fc_bias, self.c_proj_bias]
        parameters = [plain(p) for p in (self.c_fc, self.c_proj, *biases)]
        token, weight, ends, _, _, position, _ = routing
        return expert_mlp(x, weight, token, position, ends, parameters, self.activation)[0]

    def _choose_engine(self, x: Tensor, rows: int) -> str:
        if torch.compiler.is_exporting():  # the program must run in a process that lacks our operators
            return "all"
        if x.device.type != "cuda" or rows == 0:  # with expert parallelism a rank may get no row
            return "loop"
        groups = local(self.c_fc).shape[0]
        fits = x.shape[1] % 8 == 0 and self.c_proj.shape[2] % 8 == 0 and groups < MOST_GROUPS
        if x.dtype == torch.bfloat16 and fits and _has_grouped_kernel():
            return "grouped_mm"
        return "triton" if x.dtype != torch.float64 and has_kernel("cuda") else "loop"

    def _grouped(self, x: Tensor, routing: Routing, product: Callable) -> Tensor:
        act, ends, w = get_activation(self.activation), routing.ends, routing.weight[:, None]  # (R, 1)
        c_fc, c_proj = (plain(p).to(x.dtype) for p in (self.c_fc, self.c_proj))
        if product is not grouped_product and _idle_gradients_are_garbage():
            c_fc, c_proj = (ZeroIdleGradients.apply(p, routing.counts()) for p in (c_fc, c_proj))
        h = product(TakeRows.apply(x, routing), c_fc.mT, ends)  # (R, H), gated (R, 2H)
        if self.c_fc_bias is not None:
            h = h + BiasOfRows.apply(plain(self.c_fc_bias), routing.expert, None, x.dtype)
        # If weights are applied before the projection, autograd keeps (R, H); after it, (R, C).
        h = (act.forward(h) * w).to(x.dtype)
        y = product(h, c_proj.mT, ends)  # (R, C)
        if self.c_proj_bias is not None:
            y = y + BiasOfRows.apply(plain(self.c_proj_bias), routing.expert, w, x.dtype)
        return combine(y, routing, x.shape[0])  # (N, C)

    def _all(self, x: Tensor, routing: Routing) -> Tensor:
        weights = routing.weight.new_zeros(x.shape[0], self.c_fc.shape[0])  # (N, E), 0 if not chosen
        weights = weights.index_put((routing.token, routing.expert.long()), routing.weight)
        c_fc, c_proj = (plain(p).to(x.dtype) for p in (self.c_fc, self.c_proj))
        h = x @ c_fc.mT  # (E, N, H), gated (E, N, 2H)
        h = h if self.c_fc_bias is None else h + plain(self.c_fc_bias).to(x.dtype)[:, None]
        y = get_activation(self.activation).forward(h) @ c_proj.mT  # (E, N, C)
        y = y if self.c_proj_bias is None else y + plain(self.c_proj_bias).to(x.dtype)[:, None]
        return (y * weights.t()[:, :, None]).sum(0).to(x.dtype)  # (N, C)
