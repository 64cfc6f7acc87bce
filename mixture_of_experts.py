"""Mixture-of-Experts feed-forward layer: router, balance losses, stacked experts, expert usage.

    layer = MoE(config)                      # config: any object with the MoE fields of GPTConfig
    y = layer(x)                             # (B, T, C) -> (B, T, C)
    loss = task_loss + 0.01 * layer.get_auxiliary_loss()
    update_routers([layer])                  # once per optimizer step, before its first forward

A token passes five stages, in the order of `MoE.forward`:

    1. route     fp32 logits -> scores -> the K experts of every token, their weights    Router, MoE.choose
    2. dispatch  sort the R = N*K routed rows by expert                                  dispatch
    3. experts   one MLP per group of rows; stacked parameters, three engines            Experts
    4. combine   a token's output is the weighted sum of its K rows                      Experts
    5. account   balance loss, z-loss and usage of the tokens that count                 MoE.measure

There is no capacity: no token is dropped, and no token's output depends on another token. `Experts` takes
any rows (M, C) with weights and an order, and reads its number of experts from its parameters; where ranks
share the experts (expert_parallel.py), an exchange of rows stands between 2 and 3, and the way back after 3.

Letters: B batch, T sequence length, C n_embd, N tokens = B*T, E experts, K experts per token, H expert
hidden size, R routed rows = N*K.

References: Shazeer et al. 2017 (arXiv 1701.06538), Switch Transformer (2101.03961), ST-MoE (2202.08906),
MegaBlocks (2211.15841), loss-free balancing (2408.15664), DeepSeek-V3 (2412.19437).
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Sums that outlive a forward are int64 in units of 2^-24. Adding them is exact, so they depend neither on the
# order of micro-steps and ranks nor on a later model.bfloat16(). Room for 2^39 tokens.
FIXED_POINT = 2.0**24

# Below so many channels `expert_mlp` keeps the activation for its backward; in wider layers, where it is a
# smaller part of the work than fresh memory is, it computes the activation again.
KEEP_ACTIVATION_BELOW = 512

grouped_mm = getattr(F, "grouped_mm", None)

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
        return F.relu(h).square()
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
# Balance losses
#
# Functions of means over tokens: P = mean p_t (E,), M = mean p_t p_t^T (E, E), and f (E,), the experts'
# fractions of the routed rows; p_t (E,) are token t's probabilities. How they are used: MoE.balance_loss.


def load_balancing(P: Tensor, f: Tensor) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformer, eq. 4). f sums to 1 whatever K is, and carries no gradient.

    1 at perfect balance, E when one expert gets everything; below 1 only where f and P disagree.
    """
    return P.shape[0] * (f * P).sum()


def variance_penalty(P: Tensor) -> Tensor:
    """Squared coefficient of variation Var(P) / mean(P)^2 (Shazeer 2017, eq. 6-7): E * sum_e P_e^2 - 1, as P
    sums to 1.

    0 at perfect balance, E - 1 when one expert gets everything.
    """
    return P.shape[0] * P.square().sum() - 1


def entropy_regularization(P: Tensor) -> Tensor:
    """log E minus the entropy of P, log E + sum_e P_e log P_e: the divergence of P from uniform, in nats.

    0 at perfect balance, log E when one expert gets everything.
    """
    return math.log(P.shape[0]) + (P * P.clamp_min(1e-12).log()).sum()


def diversity_regularization(M: Tensor) -> Tensor:
    """Mean over i != j of M_ij^2 / (M_ii M_jj): the squared cosine between the probabilities of experts i
    and j, each seen as a vector over the tokens.

    0 when no two experts share a token (so at perfect balance with a sure router), 1 when all experts have
    proportional probabilities, as in a router that has learnt nothing; 0 for a single expert. It asks for
    different experts rather than equal loads, and so evens the loads out less than the others do.
    """
    E = M.shape[0]
    squares = M.diagonal().clamp_min(1e-12)  # (E,)
    cosines = M.square() / (squares[:, None] * squares)  # (E, E), squared
    return (cosines.sum() - cosines.diagonal().sum()) / max(E * (E - 1), 1)


LOSSES = {
    loss.__name__: loss
    for loss in (load_balancing, variance_penalty, entropy_regularization, diversity_regularization)
}

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


@torch.library.custom_op("gpt_moe::expert_mlp", mutates_args=())
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


@torch.library.custom_op("gpt_moe::expert_mlp_backward", mutates_args=())
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


class Experts(nn.Module):
    """E feed-forward networks in stacked parameters: c_fc (E, H, C), c_proj (E, C, H), with bias also
    c_fc_bias (E, H), c_proj_bias (E, C); with swiglu c_fc (E, 2H, C), c_fc_bias (E, 2H), packed as in `MLP`.

    `engine` is "auto", which chooses by device, dtype and size, or one of
      "loop"        `expert_mlp`: products for the experts that have rows; any dtype; reads sizes on the host
      "grouped_mm"  torch's grouped product; auto for CUDA capability 9 or 10, bf16, C and H divisible by 8
      "gather"      copies of the chosen experts' weights; auto for a few rows on CUDA without gradients
    Weights are cast as autocast would: expert by expert, except by "grouped_mm", which needs them all.
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
        if rows <= local(self.c_fc).shape[0] and not torch.is_grad_enabled():
            return "gather"
        aligned = x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and self.c_proj.shape[2] % 8 == 0
        return "grouped_mm" if aligned and _has_grouped_kernel() else "loop"

    def _grouped(self, x, weights, order, ends):
        (M, K), rows = weights.shape, torch.arange(order.shape[0], device=x.device)
        position = torch.empty_like(order).scatter_(0, order, rows)  # (R,) from slot to sorted row
        w = Gather.apply(weights.view(-1, 1), order, position)  # (R, 1)
        h = Gather.apply(x, order // K, position)  # (R, C)
        h = grouped_mm(h, local(self.c_fc).to(x.dtype).mT, offs=ends)  # (R, H)
        if self.c_fc_bias is not None:
            # Biases by a product with a one-hot matrix, whose gradient is a product too.
            expert = torch.searchsorted(ends, rows, right=True)  # (R,)
            one_hot = (expert[:, None] == torch.arange(ends.shape[0], device=x.device)).to(x.dtype)  # (R, E)
            h = torch.addmm(h, one_hot, local(self.c_fc_bias).to(x.dtype))
        # Weighting before the projection keeps (R, H) for the backward pass; after it, it would be (R, C).
        h = (activate(h, self.activation) * w).to(x.dtype)
        y = grouped_mm(h, local(self.c_proj).to(x.dtype).mT, offs=ends)  # (R, C)
        y = Gather.apply(y, position, order).view(M, K, y.shape[1]).sum(1)  # (M, C)
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


# -----------------------------------------------------------------------------
# Router and layer


class Router(nn.Linear):
    """One logit per expert, (N, C) -> (N, E), in fp32 (or a wider input's dtype) whatever autocast says: bf16
    logits change the chosen experts of 2-3% of the tokens. (TF32 where other fp32 products are, too.)"""

    def __init__(self, n_embd: int, num_experts: int):
        super().__init__(n_embd, num_experts, bias=False)

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02: nearly equal scores, so that all experts begin with tokens."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class RouterAuxiliary(NamedTuple):
    """What one training forward hands to the loss and to `MoE.accumulate`."""

    balance_loss: Tensor  # () fp32, differentiable; 0 without moe_loss
    z_loss: Tensor  # () fp32, differentiable
    counts: Tensor  # (E,) int64, routed rows of the tokens that count
    sums: Tensor  # (1 + E,) or (1 + E*E,) fp32, sums over these tokens: router entropy, then p or p p^T


class ExpertUsage(NamedTuple):
    """How the experts of a layer were used since the last reset; tensors on the layer's device."""

    counts: Tensor  # (E,) int64, routed rows
    share: Tensor  # (E,) fractions of them
    max_load: Tensor  # () largest over mean count: 1 is perfect, E/K the worst
    starved: Tensor  # () fraction of the experts with less than 10% of a fair share
    entropy: Tensor  # () entropy of the routing probabilities in nats, mean over tokens


class MoE(nn.Module):
    """Dropless token-choice top-K Mixture-of-Experts, (B, T, C) -> (B, T, C); overview at the top.

    Buffers, all in the state dict:
      router_bias (E,)    loss-free balancing: added to the scores for the choice, never in the weights
      usage_counts (E,), usage_entropy (1,)    since the last reset, all ranks, up to the last update_router
      step_totals         of this rank since then: entropy, counts (E,) for the usage; counts, p or p p^T for
                          the update. Differs between ranks: keep it out of DDP's broadcast (per_rank_buffers)
      reference_totals    counts (E,) and p or p p^T of the last finished step, all ranks
    """

    per_rank_buffers = ("step_totals",)

    def __init__(self, config):
        super().__init__()
        E, K, C = config.num_experts, config.num_experts_per_tok, config.n_embd
        if not 1 <= K <= E:
            raise ValueError(f"num_experts_per_tok={K} must lie between 1 and num_experts={E}")
        if config.moe_loss_type not in LOSSES:
            raise ValueError(
                f"moe_loss_type={config.moe_loss_type!r} is unknown; use one of {', '.join(LOSSES)}"
            )
        if config.router_score not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score={config.router_score!r} is unknown; use 'softmax' or 'sigmoid'")
        self.num_experts, self.num_experts_per_tok = E, K
        self.router_score, self.norm_topk_prob = config.router_score, config.norm_topk_prob
        self.router_bias_update_rate = config.router_bias_update_rate
        self.loss_type = config.moe_loss_type if config.moe_loss else None
        self.force_balanced = False  # benchmarks only: token n goes to experts n*K, n*K + 1, ... modulo E
        self.gate = Router(C, E)
        self.experts = Experts(config)
        shared = config.num_shared_experts * (config.expert_hidden_size or 4 * C)
        self.shared = MLP(config, shared) if shared else None
        self.dropout = nn.Dropout(config.dropout)
        self.exchange = None  # expert_parallel.Exchange, where ranks share the experts
        for name, value in self.initial_statistics().items():
            self.register_buffer(name, value)
        self.step_managed = False  # whether update_router is in use; see balance_loss
        self._auxiliary_loss = None

    def initial_statistics(self) -> dict[str, Tensor]:
        """The buffers of a layer that has seen nothing; the reference is E tokens in perfect balance."""
        E, integer = self.num_experts, torch.int64
        perfect = torch.eye(E) if self.loss_type == "diversity_regularization" else torch.ones(E)
        perfect = (perfect.flatten() * FIXED_POINT).to(integer)
        return {
            "router_bias": torch.zeros(E),
            "usage_counts": torch.zeros(E, dtype=integer),
            "usage_entropy": torch.zeros(1, dtype=integer),
            "step_totals": torch.zeros(1 + 2 * E + perfect.numel(), dtype=integer),
            "reference_totals": torch.cat((torch.full((E,), self.num_experts_per_tok), perfect)),
        }

    def __getstate__(self):
        return {**self.__dict__, "_auxiliary_loss": None}  # a tensor with a graph cannot be copied or pickled

    def forward(
        self, x: Tensor, token_mask: Tensor | None = None, num_tokens=None, return_auxiliary: bool = False
    ) -> Tensor | tuple[Tensor, RouterAuxiliary | None]:
        """x (B, T, C) -> y (B, T, C), or with return_auxiliary (y, auxiliary).

        token_mask (B, T), bool or 0/1: the tokens that count in losses and usage; None: all.
        num_tokens, a number, or a tensor where it varies (a compiler specialises on numbers): divisor of the
        auxiliary losses where this call is a part of a step, so that the parts add up to the step's loss;
        None: the tokens that count here. Where gradients are averaged over W ranks, pass the step's tokens
        on all ranks divided by W.
        return_auxiliary: hand out what must be given to `accumulate` once, outside of any checkpointed
        region, whose recomputation would count it twice. Otherwise the layer does so itself. In evaluation
        nothing is measured or stored, and auxiliary is None. Raises ValueError where token_mask does not fit.
        """
        B, T, C = x.shape
        if token_mask is not None and token_mask.shape != (B, T):
            raise ValueError(f"token_mask has shape {tuple(token_mask.shape)}, but x has (B, T) = {(B, T)}")
        tokens = x.reshape(B * T, C)  # (N, C)
        logits = self.gate(tokens)  # (N, E)
        index, weights, probs = self.choose(logits)
        order, ends = dispatch(index, self.num_experts)
        if self.exchange is None:
            y, shared = self.experts(tokens, weights, order, ends), self.run_shared(x)
        else:
            y, shared = self.exchange(self.experts, tokens, weights, order, ends, lambda: self.run_shared(x))
        y = self.dropout(y.view(B, T, C))
        if shared is not None:
            y = y + shared
        auxiliary = None
        if self.training:
            auxiliary = self.measure(logits, probs, order, ends, token_mask, num_tokens)
        if return_auxiliary:
            return y, auxiliary
        if auxiliary is not None:
            self.accumulate(auxiliary)
        return y

    def run_shared(self, x: Tensor) -> Tensor | None:
        """The shared experts' output for x (B, T, C), which every token gets; None without any."""
        return None if self.shared is None else self.shared(x)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits (N, E) -> expert index (N, K), weights (N, K), routing probabilities (N, E).

        Sigmoid scores over their sum are the probabilities of the losses, as in DeepSeek-V3. With K = 1 the
        weight is the score: renormalised it would be 1, and the router without gradient. Equal scores go to
        the lower index (topk promises no order). NaN logits give NaN weights and so NaN outputs.
        """
        K = self.num_experts_per_tok
        if self.router_score == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        if self.force_balanced:
            index = (torch.arange(logits.shape[0] * K, device=logits.device) % self.num_experts).view(-1, K)
        else:
            choice = scores.detach() + self.router_bias
            index = choice.sort(dim=-1, descending=True, stable=True).indices[:, :K]
        weights = scores.gather(1, index)
        if K > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return index, weights, probs

    def measure(self, logits, probs, order, ends, token_mask, num_tokens) -> RouterAuxiliary:
        """Losses and sums over the tokens that count. Arguments as in `forward`, `choose` and `dispatch`.

        z-loss: mean over tokens of (log sum_e exp(logit_e))^2, keeps the logits small (ST-MoE, eq. 5).
        """
        if token_mask is None:
            counted = logits.new_ones(logits.shape[0])  # (N,)
            counts = ends.long().diff(prepend=ends.new_zeros(1))  # (E,)
        else:
            counted = token_mask.reshape(-1).to(logits.dtype)
            running = token_mask.reshape(-1).long()[order // self.num_experts_per_tok].cumsum(0)  # (R,)
            counts = F.pad(running, (1, 0))[ends].diff(prepend=running.new_zeros(1))
        n = counted.sum()
        divisor = n.clamp_min(1) if num_tokens is None else num_tokens
        with torch.autocast(logits.device.type, enabled=False):
            z_loss = counted @ logits.logsumexp(-1).square() / divisor
            entropy = -(counted @ torch.special.xlogy(probs, probs).detach().sum(-1))
            if self.loss_type == "diversity_regularization":
                sums = (probs * counted[:, None]).t() @ probs  # (E, E)
            else:
                sums = counted @ probs  # (E,)
            balance_loss = self.balance_loss(sums, counts, n, divisor)
        sums = torch.cat((entropy[None], sums.detach().flatten()))
        return RouterAuxiliary(balance_loss, z_loss, counts, sums)

    def balance_loss(self, sums: Tensor, counts: Tensor, n: Tensor, divisor) -> Tensor:
        """This call's part of the balance loss, from the sums of p (E,) or p p^T (E, E) over its n tokens.

        A loss L(s) of the mean s over the tokens of a step is not the mean of the losses of the step's parts,
        and its gradient is not the mean of theirs. Where `update_router` is in use the layer therefore takes
        the first-order expansion at s_ref, the mean over the whole previous step on all ranks, detached:

            L(s_ref) + <grad L(s_ref), s - s_ref>

        This is linear in tokens: micro-steps and ranks add up exactly. (It may come out slightly negative.)
        load_balancing is linear in P as it is, with the previous step's f. The first s_ref is perfect
        balance. Where `update_router` is never called, s_ref is this call's own mean, detached: then value
        and gradient are those of L itself, the textbook loss of one batch.
        """
        if self.loss_type is None:
            return sums.new_zeros(())
        if self.step_managed:
            counts, reference = self.reference_totals.split([self.num_experts, sums.numel()])
            tokens = counts.sum().clamp_min(1) / self.num_experts_per_tok
            reference = reference.to(sums.dtype).view_as(sums) / (FIXED_POINT * tokens)
        else:
            reference = sums.detach() / n.clamp_min(1)
        loss = LOSSES[self.loss_type]
        if loss is load_balancing:
            loss = functools.partial(loss, f=counts.to(sums.dtype) / counts.sum().clamp_min(1))
        value, change = torch.func.jvp(loss, (reference,), ((sums - n * reference) / divisor,))
        return (value * (n / divisor) + change).to(sums.dtype)

    @torch.no_grad()
    def accumulate(self, auxiliary: RouterAuxiliary) -> None:
        """Add one training forward to the accounts, and keep its balance loss for `get_auxiliary_loss`."""
        sums = (auxiliary.sums.nan_to_num(0.0) * FIXED_POINT).round().long()
        self.step_totals += torch.cat((sums[:1], auxiliary.counts, auxiliary.counts, sums[1:]))
        self._auxiliary_loss = auxiliary.balance_loss

    def get_auxiliary_loss(self) -> Tensor:
        """Balance loss () of the last training forward, differentiable, without coefficient; at first 0."""
        return self.router_bias.new_zeros(()) if self._auxiliary_loss is None else self._auxiliary_loss

    def get_usage_counts(self) -> Tensor:
        """Rows routed to each expert in training since the last reset, (E,) int64: of all ranks up to the
        last update_router, since then of this rank; `expert_usage` reduces these as well."""
        return self.usage_counts + self.step_totals[1 : 1 + self.num_experts]

    def reset_usage_counts(self) -> None:
        """Start counting afresh, without a trace in the training: the update has totals of its own."""
        for totals in (self.usage_counts, self.usage_entropy, self.step_totals[: 1 + self.num_experts]):
            totals.zero_()

    def last_step_counts(self) -> Tensor:
        """Rows routed to each expert in the last finished optimizer step on all ranks, (E,) int64."""
        return self.reference_totals[: self.num_experts].clone()

    def usage_statistics(self, step_totals: Tensor | None = None) -> ExpertUsage:
        """Usage since the last reset. step_totals: the buffer of this name summed over ranks; None: as is."""
        step = self.step_totals if step_totals is None else step_totals
        counts = self.usage_counts + step[1 : 1 + self.num_experts]
        rows = counts.sum().clamp_min(1)
        share = counts / rows
        load = share * self.num_experts
        entropy = (self.usage_entropy + step[:1])[0] / (FIXED_POINT * rows / self.num_experts_per_tok)
        return ExpertUsage(counts, share, load.max(), (load < 0.1).float().mean(), entropy)

    @torch.no_grad()
    def update_router(self, reduced: Tensor) -> None:
        """Close an optimizer step, given its `step_totals` summed over the ranks: add to the usage, renew the
        reference of the balance loss, move the router bias by rate * sign(mean count - count) (2408.15664).

        Without any token since the last call nothing changes: calling it twice does no harm.
        """
        E = self.num_experts
        self.usage_entropy += reduced[:1]
        self.usage_counts += reduced[1 : 1 + E]
        step = reduced[1 + E :]
        counts = step[:E]
        self.reference_totals.copy_(torch.where(counts.sum() > 0, step, self.reference_totals))
        if self.router_bias_update_rate > 0:
            self.router_bias += self.router_bias_update_rate * torch.sign(counts.sum() - E * counts)
        self.step_totals.zero_()
        self.step_managed = True


# -----------------------------------------------------------------------------
# All layers of a model


def _reduced_totals(layers: list[MoE], process_group, reduce: bool) -> tuple[Tensor, ...]:
    """Every layer's `step_totals`, summed over the ranks by a single collective."""
    if not layers:
        return ()
    totals = torch.cat([layer.step_totals for layer in layers])
    if reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1:
        dist.all_reduce(totals, group=process_group)
    return totals.split([layer.step_totals.numel() for layer in layers])


def update_routers(layers: Iterable[MoE], process_group=None, reduce: bool = True) -> None:
    """Mark the boundary between two optimizer steps: closes the step in every layer, with all ranks' totals.

    To be called on every rank before the first forward of each step, the very first included, and never
    between the micro-steps of one. reduce=False leaves out the collective that several ranks take part in.
    """
    layers = list(layers)
    for layer, totals in zip(layers, _reduced_totals(layers, process_group, reduce), strict=True):
        layer.update_router(totals)


def expert_usage(layers: Iterable[MoE], process_group=None, reduce: bool = True) -> list[ExpertUsage]:
    """Usage of every layer since its last reset on all ranks. A collective, as above; changes nothing."""
    layers = list(layers)
    totals = _reduced_totals(layers, process_group, reduce)
    return [layer.usage_statistics(step) for layer, step in zip(layers, totals, strict=True)]


@contextlib.contextmanager
def idle_experts_spared(layers: Iterable[MoE], optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Around optimizer.step(), after `update_routers`: experts without any row in the step stay as they are.

    AdamW would let weight decay shrink them (by a tenth in 1,000 steps at the usual settings) and old moments
    move them. Their weights and moments are copied and put back, which costs nothing while every expert is
    busy but reading the counts on the host. Yields the number of idle experts. Of parameters that are shared
    out, each rank looks after its part.
    """
    layers, kept, idle = list(layers), [], 0
    states = getattr(optimizer, "optim", optimizer).state  # ZeroRedundancyOptimizer has the real one inside
    counts = torch.stack([layer.last_step_counts() for layer in layers]).tolist() if layers else []
    for layer, layer_counts in zip(layers, counts, strict=True):
        experts = [e for e, count in enumerate(layer_counts) if count == 0]
        idle += len(experts)
        for parameter in layer.experts.parameters() if experts else ():
            rows = held(parameter)[0]
            moments = [m for m in states.get(parameter, {}).values() if torch.is_tensor(m)]
            for tensor in (parameter.detach(), *(m for m in moments if m.shape == parameter.shape)):
                mine = [local(tensor)[rows.index(e)] for e in experts if e in rows]
                kept += [(row, row.clone()) for row in mine]
    yield idle
    for place, value in kept:
        place.copy_(value)
