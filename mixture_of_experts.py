"""Mixture-of-Experts feed-forward layer: router, balance losses, stacked experts, expert usage.

    layer = MoE(config)                                        # config: any object with GPTConfig's MoE fields
    y = layer(x)                                               # (B, T, C) -> (B, T, C)
    loss = task_loss + 0.01 * layer.get_auxiliary_loss()
    update_routers([layer])                                    # once per optimizer step, before its first forward

A token passes five stages, in the order of `MoE.forward`:

    1. route      fp32 logits -> scores -> the K experts of every token and their weights     Router, MoE.choose
    2. dispatch   sort the R = N*K routed rows by expert                                       dispatch
    3. experts    one MLP per group of rows, stacked parameters, three engines                 Experts
    4. combine    a token's output is the weighted sum of its K rows                           Experts
    5. account    balance loss, z-loss and usage of the tokens that count                      MoE.measure, .accumulate

There is no capacity: no token is dropped, and no token's output depends on another token. `Experts` takes any rows
(M, C) with their weights and an order, and reads its number of experts from its parameters: an exchange of rows
between processes fits between 2 and 3, and its way back after 4.

Letters as everywhere: B batch, T sequence length, C n_embd, N tokens = B*T, E experts, K experts per token,
H expert hidden size, R routed rows = N*K.

References: Shazeer et al. 2017 (arXiv 1701.06538), Switch Transformer (2101.03961), ST-MoE (2202.08906), MegaBlocks
(2211.15841), loss-free balancing (2408.15664), DeepSeek-V3 (2412.19437).
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# Sums that outlive a forward are int64 in units of 2^-24: their addition is exact, so they depend neither on the
# order of micro-steps and ranks nor on a later model.bfloat16(). Room for 2^39 tokens.
FIXED_POINT = 2.0**24

GROUPED_MM = getattr(F, "grouped_mm", None)

# -----------------------------------------------------------------------------
# Dense feed-forward


def activate(h: torch.Tensor, activation: str) -> torch.Tensor:
    """The non-linearity between the two projections: (..., H) -> (..., H), for swiglu (..., 2H) -> (..., H)."""
    if activation == "gelu":
        return F.gelu(h, approximate="tanh")
    if activation == "relu2":
        return F.relu(h).square()
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    raise ValueError(f"activation={activation!r} is unknown; use 'gelu', 'relu2' or 'swiglu'")


def activate_backward(grad: torch.Tensor, h: torch.Tensor, activation: str) -> torch.Tensor:
    """Gradient of `activate` with respect to h, from the gradient with respect to its result."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, h, approximate="tanh")
    if activation == "relu2":
        return 2 * grad * F.relu(h)
    gate, up = h.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=-1)


class MLP(nn.Module):
    """Dense feed-forward of a block, and the shared expert of `MoE`. hidden_size None: the config's H, or 4C.

    With swiglu `c_fc` is packed: its first H rows make the gate (through silu), its last H rows the up projection.
    """

    def __init__(self, config, hidden_size: int | None = None):
        super().__init__()
        hidden = hidden_size or config.expert_hidden_size or 4 * config.n_embd
        self.activation = config.activation
        self.c_fc = nn.Linear(
            config.n_embd, hidden * (2 if config.activation == "swiglu" else 1), bias=config.bias
        )
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(activate(self.c_fc(x), self.activation)))  # (B, T, C)


# -----------------------------------------------------------------------------
# Balance losses
#
# Each is a function of means over tokens: P = mean p_t (E,), M = mean p_t p_t^T (E, E) and f (E,), the fractions of
# the routed rows, where p_t (E,) are token t's routing probabilities. How a layer applies them: MoE.balance_loss.


def load_balancing(P: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e (Switch Transformer, eq. 4). f sums to 1 whatever K is, and carries no gradient.

    1 at perfect balance, E when one expert gets everything; below 1 only where f and P disagree.
    """
    return P.shape[0] * (f * P).sum()


def variance_penalty(P: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation of P, Var(P) / mean(P)^2 (Shazeer 2017, eq. 6-7); as P sums to 1 this is
    E * sum_e P_e^2 - 1.

    0 at perfect balance, E - 1 when one expert gets everything.
    """
    return P.shape[0] * P.square().sum() - 1


def entropy_regularization(P: torch.Tensor) -> torch.Tensor:
    """log E minus the entropy of P: log E + sum_e P_e log P_e, the divergence KL(P || uniform) in nats.

    0 at perfect balance, log E when one expert gets everything.
    """
    return math.log(P.shape[0]) + (P * P.clamp_min(1e-12).log()).sum()


def diversity_regularization(M: torch.Tensor) -> torch.Tensor:
    """Mean over pairs i != j of M_ij^2 / (M_ii M_jj): the squared cosine between the probabilities of experts i and
    j, each seen as a vector over the tokens.

    0 when no token is shared between experts (perfect balance is the one such state with equal experts), 1 when all
    experts have proportional probabilities, as in a router that has learnt nothing. 0 for a single expert.
    """
    experts = M.shape[0]
    squares = M.diagonal().clamp_min(1e-12)  # (E,)
    cosines = M.square() / (squares[:, None] * squares)  # (E, E), squared
    return (cosines.sum() - cosines.diagonal().sum()) / max(experts * (experts - 1), 1)


LOSSES = {
    "load_balancing": load_balancing,
    "variance_penalty": variance_penalty,
    "entropy_regularization": entropy_regularization,
    "diversity_regularization": diversity_regularization,
}

# -----------------------------------------------------------------------------
# Dispatch and the engines


def dispatch(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the routed rows by expert. index (N, K) -> order (R,) int64, ends (E,) int32.

    Sorted row r is slot order[r] = token * K + k; expert e owns the sorted rows ends[e-1] to ends[e] - 1.
    """
    expert, order = index.reshape(-1).to(torch.int16).sort(stable=True)  # int16: a third of int64's time
    experts = torch.arange(num_experts, device=index.device, dtype=torch.int16)
    return order, torch.searchsorted(expert, experts, right=True).int()


class Spread(torch.autograd.Function):
    """x (M, C) -> the sorted rows (R, C). position (R,) is the inverse permutation of order.

    The transpose of `Collect`; both are gathers in both directions, so that no gradient is summed by atomics.
    """

    @staticmethod
    def forward(ctx, x, order, position):
        ctx.copies = order.shape[0] // x.shape[0]
        ctx.save_for_backward(order, position)
        return x.index_select(0, order // ctx.copies)

    @staticmethod
    def backward(ctx, grad):
        order, position = ctx.saved_tensors
        return Collect.apply(grad, order, position, ctx.copies), None, None


class Collect(torch.autograd.Function):
    """Sorted rows (R, C) -> (M, C), the sum of the `copies` rows of every token: the transpose of `Spread`."""

    @staticmethod
    def forward(ctx, rows, order, position, copies):
        ctx.save_for_backward(order, position)
        return rows.index_select(0, position).view(-1, copies, rows.shape[1]).sum(1)

    @staticmethod
    def backward(ctx, grad):
        return Spread.apply(grad, *ctx.saved_tensors), None, None, None


def _spans(ends: torch.Tensor) -> list[slice]:
    """The sorted rows of every expert. Reads `ends` on the host: free on a CPU, a synchronisation elsewhere."""
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, where out may have another dtype (fp32 weight gradients of a bf16 product)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


@torch.library.custom_op("gpt_moe::expert_mlp", mutates_args=())
def expert_mlp(
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    c_fc: torch.Tensor,
    c_fc_bias: torch.Tensor | None,
    c_proj: torch.Tensor,
    c_proj_bias: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stages 3 and 4 as a loop over the experts that have rows: (M, C) and the hidden pre-activations (R, H).

    One operator, so that compilation sees no data-dependent shape. Rows are gathered expert by expert into buffers
    that stay in the cache, and nothing of size (R, C) is ever stored: less memory than the dense layer, and fewer
    fresh pages, whose first touch costs a CPU more than the gather does.
    """
    token = order // weights.shape[1]  # (R,)
    weights = weights.reshape(-1, 1).index_select(0, order)  # (R, 1)
    spans = _spans(ends)
    most = max(span.stop - span.start for span in spans)
    rows, y = x.new_empty(most, x.shape[1]), x.new_empty(most, x.shape[1])
    hidden = x.new_empty(order.shape[0], c_fc.shape[1])  # (R, H)
    out = weights.new_zeros(x.shape)
    for e, span in enumerate(spans):
        n = span.stop - span.start
        if n == 0:
            continue
        torch.index_select(x, 0, token[span], out=rows[:n])
        w_fc, w_proj = c_fc[e].to(x.dtype).t(), c_proj[e].to(x.dtype).t()
        if c_fc_bias is None:
            torch.mm(rows[:n], w_fc, out=hidden[span])
            torch.mm(activate(hidden[span], activation), w_proj, out=y[:n])
        else:
            torch.addmm(c_fc_bias[e].to(x.dtype), rows[:n], w_fc, out=hidden[span])
            torch.addmm(c_proj_bias[e].to(x.dtype), activate(hidden[span], activation), w_proj, out=y[:n])
        out.index_add_(0, token[span], y[:n].mul_(weights[span]).to(out.dtype))
    return out.to(x.dtype), hidden


@expert_mlp.register_fake
def _(x, weights, order, ends, c_fc, c_fc_bias, c_proj, c_proj_bias, activation):
    return x.new_empty(x.shape), x.new_empty(order.shape[0], c_fc.shape[1])


@torch.library.custom_op("gpt_moe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    c_fc: torch.Tensor,
    c_proj: torch.Tensor,
    c_proj_bias: torch.Tensor | None,
    hidden: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weights, c_fc, c_fc_bias, c_proj and c_proj_bias (the biases' also where there are none)."""
    token = order // weights.shape[1]  # (R,)
    w = weights.reshape(-1, 1).index_select(0, order)  # (R, 1)
    grad_w = torch.empty_like(w)
    grad_x = w.new_zeros(x.shape)
    grads = (
        c_fc.new_empty(c_fc.shape),
        c_fc.new_empty(c_fc.shape[:2]),
        c_proj.new_empty(c_proj.shape),
        c_proj.new_empty(c_proj.shape[:2]),
    )
    grad_fc, grad_fc_bias, grad_proj, grad_proj_bias = grads
    spans = _spans(ends)
    most = max(span.stop - span.start for span in spans)
    rows, grad_y = x.new_empty(most, x.shape[1]), x.new_empty(most, x.shape[1])
    grad_act = x.new_empty(most, c_proj.shape[2])
    for e, span in enumerate(spans):
        n = span.stop - span.start
        if n == 0:
            for grad_p in grads:
                grad_p[e].zero_()
            continue
        r, g, ga, t, h = rows[:n], grad_y[:n], grad_act[:n], token[span], hidden[span]
        torch.index_select(x, 0, t, out=r)
        torch.index_select(grad, 0, t, out=g)
        act = activate(h, activation)
        torch.mm(g, c_proj[e].to(x.dtype), out=ga)
        # d(out)/d(weight) is the row's output: <g, act @ c_proj^T + bias> = <g @ c_proj, act> + <g, bias>
        torch.sum(ga * act, 1, keepdim=True, dtype=w.dtype, out=grad_w[span])
        if c_proj_bias is not None:
            grad_w[span] += g.to(w.dtype) @ c_proj_bias[e].to(w.dtype)[:, None]
        g.mul_(w[span])
        _product(g.t(), act, out=grad_proj[e])
        gh = activate_backward(ga.mul_(w[span]), h, activation)
        _product(gh.t(), r, out=grad_fc[e])
        torch.sum(g, 0, dtype=c_fc.dtype, out=grad_proj_bias[e])
        torch.sum(gh, 0, dtype=c_fc.dtype, out=grad_fc_bias[e])
        torch.mm(gh, c_fc[e].to(x.dtype), out=g)
        grad_x.index_add_(0, t, g.to(grad_x.dtype))
    grad_weights = torch.empty_like(w).index_copy_(0, order, grad_w).view(weights.shape)
    return grad_x.to(x.dtype), grad_weights, *grads


@expert_mlp_backward.register_fake
def _(grad, x, weights, order, ends, c_fc, c_proj, c_proj_bias, hidden, activation):
    fc = c_fc.new_empty(c_fc.shape), c_fc.new_empty(c_fc.shape[:2])
    proj = c_proj.new_empty(c_proj.shape), c_proj.new_empty(c_proj.shape[:2])
    return x.new_empty(x.shape), weights.new_empty(weights.shape), *fc, *proj


def _save_for_backward(ctx, inputs, output):
    x, weights, order, ends, c_fc, _, c_proj, c_proj_bias, ctx.activation = inputs
    ctx.save_for_backward(x, weights, order, ends, c_fc, c_proj, c_proj_bias, output[1])
    ctx.set_materialize_grads(False)  # `hidden` has no gradient: do not make (R, H) zeros for it


def _run_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    *_, c_proj_bias, _ = saved = ctx.saved_tensors
    x, w, fc, fc_bias, proj, proj_bias = expert_mlp_backward(grad.contiguous(), *saved, ctx.activation)
    if c_proj_bias is None:
        fc_bias = proj_bias = None
    return x, w, None, None, fc, fc_bias, proj, proj_bias, None


expert_mlp.register_autograd(_run_backward, setup_context=_save_for_backward)


@torch.compiler.assume_constant_result
def _has_grouped_kernel() -> bool:
    """Whether grouped_mm has its own kernel on this GPU; elsewhere it loops and synchronises with the host."""
    return GROUPED_MM is not None and torch.cuda.get_device_capability()[0] in (9, 10)


class Experts(nn.Module):
    """E feed-forward networks in stacked parameters: c_fc (E, H, C), c_proj (E, C, H), with bias c_fc_bias (E, H) and
    c_proj_bias (E, C); for swiglu c_fc (E, 2H, C) and c_fc_bias (E, 2H), packed as in `MLP`.

    Engines, chosen by `engine = "auto"` from device, dtype and size, or set by name:
      "loop"        `expert_mlp`: one matrix product per expert that has rows. Any dtype, CPU first; on another device
                    it reads the group sizes back once per forward and backward.
      "grouped_mm"  torch's grouped product: CUDA with compute capability 9 or 10, bf16, C and H divisible by 8.
      "gather"      copies the weights of each row's expert: decoding a handful of rows on CUDA, without gradients.
    None of them touches an expert without rows, except for the cast of all weights by "grouped_mm" under autocast.
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
        """GPT-2's initialisation: normal weights of standard deviation 0.02, zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """x (M, C), weights (M, K), order (M*K,) and ends (E,) of `dispatch` -> (M, C), in x's or autocast's dtype.

        The combination is summed in the dtype of `weights`, fp32 or wider.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        x, weights = x.contiguous(), weights.contiguous()
        engine = self._choose_engine(x, order.shape[0]) if self.engine == "auto" else self.engine
        if engine == "grouped_mm":
            return self._grouped(x, weights, order, ends)
        if engine == "gather":
            return self._gathered(x, weights, order, ends)
        parameters = self.c_fc, self.c_fc_bias, self.c_proj, self.c_proj_bias
        return expert_mlp(x, weights, order, ends, *parameters, self.activation)[0]

    def _choose_engine(self, x: torch.Tensor, rows: int) -> str:
        if x.device.type != "cuda":
            return "loop"
        if rows <= self.c_fc.shape[0] and not torch.is_grad_enabled():
            return "gather"
        aligned = x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and self.c_proj.shape[2] % 8 == 0
        return "grouped_mm" if aligned and _has_grouped_kernel() else "loop"

    def _sorted_experts(self, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(ends, torch.arange(order.shape[0], device=order.device), right=True)  # (R,)

    def _grouped(self, x, weights, order, ends) -> torch.Tensor:
        (M, K), dtype = weights.shape, x.dtype
        slots = torch.arange(order.shape[0], device=x.device)
        position = torch.empty_like(order).scatter_(0, order, slots)  # (R,) slot -> sorted row
        rows = Spread.apply(x, order, position)  # (R, C)
        w = Spread.apply(weights.reshape(-1, 1), order, position)  # (R, 1)
        h = GROUPED_MM(rows, self.c_fc.to(dtype).transpose(1, 2), offs=ends)  # (R, H)
        if self.c_fc_bias is not None:
            # Biases as products with a one-hot matrix: no kernel sums their gradients by atomics.
            experts = torch.arange(ends.shape[0], device=x.device)
            one_hot = (self._sorted_experts(order, ends)[:, None] == experts).to(dtype)  # (R, E)
            h = torch.addmm(h, one_hot, self.c_fc_bias.to(dtype))
        # Weighting before the projection keeps (R, H) instead of (R, C) for the backward pass.
        act = (activate(h, self.activation) * w).to(dtype)  # (R, H)
        y = Collect.apply(
            GROUPED_MM(act, self.c_proj.to(dtype).transpose(1, 2), offs=ends), order, position, K
        )
        if self.c_proj_bias is not None:
            y = torch.addmm(
                y, Collect.apply((one_hot * w).to(dtype), order, position, K), self.c_proj_bias.to(dtype)
            )
        return y  # (M, C)

    def _gathered(self, x, weights, order, ends) -> torch.Tensor:
        (M, K), dtype = weights.shape, x.dtype
        expert = torch.empty_like(order).scatter_(
            0, order, self._sorted_experts(order, ends)
        )  # (R,) of every slot
        h = torch.bmm(self.c_fc[expert].to(dtype), x.repeat_interleave(K, 0)[:, :, None])[:, :, 0]  # (R, H)
        if self.c_fc_bias is not None:
            h = h + self.c_fc_bias[expert].to(dtype)
        y = torch.bmm(self.c_proj[expert].to(dtype), activate(h, self.activation)[:, :, None])[
            :, :, 0
        ]  # (R, C)
        if self.c_proj_bias is not None:
            y = y + self.c_proj_bias[expert].to(dtype)
        return (y.view(M, K, -1) * weights[:, :, None]).sum(1).to(dtype)  # (M, C)


# -----------------------------------------------------------------------------
# Router and layer


class Router(nn.Linear):
    """One logit per expert: (N, C) -> (N, E), in fp32 (or wider input's dtype) whatever autocast says: bf16 logits
    change the chosen experts of 2-3% of the tokens."""

    def __init__(self, n_embd: int, num_experts: int):
        super().__init__(n_embd, num_experts, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class RouterAuxiliary(NamedTuple):
    """What one training forward hands to the loss and to `MoE.accumulate`."""

    balance_loss: torch.Tensor  # () fp32, differentiable; 0 without moe_loss
    z_loss: torch.Tensor  # () fp32, differentiable
    counts: torch.Tensor  # (E,) int64, routed rows of the tokens that count
    sums: torch.Tensor  # (1 + E,) or (1 + E*E,) fp32, sums over those tokens: router entropy, then p or p p^T


class ExpertUsage(NamedTuple):
    """How a layer's experts were used since the last reset; tensors on the layer's device."""

    counts: torch.Tensor  # (E,) int64, routed rows
    share: torch.Tensor  # (E,) fractions of them
    max_load: torch.Tensor  # () largest over mean count: 1 is perfect, E/K the worst
    starved: torch.Tensor  # () fraction of the experts with less than 10% of a fair share
    entropy: torch.Tensor  # () mean over tokens of the entropy of the routing probabilities, in nats


class MoE(nn.Module):
    """Dropless token-choice top-K Mixture-of-Experts: (B, T, C) -> (B, T, C). See the top of the file.

    State beside the parameters, all in the state dict:
      router_bias (E,)           loss-free balancing: added to the scores for the choice, never to the weights
      usage_counts (E,), usage_entropy (1,)   since the last reset, all ranks, up to the last `update_router`
      step_totals                this rank's [entropy, counts | counts, statistic] since then. It differs between
                                 ranks: keep it out of DDP's buffer broadcast (per_rank_buffers)
      reference_totals           [counts, statistic] of the last finished step, all ranks; at first perfect balance
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
        for name, value in self.initial_statistics().items():
            self.register_buffer(name, value)
        self.step_managed = False  # whether update_router is in use; see balance_loss
        self._auxiliary_loss = None

    def initial_statistics(self) -> dict[str, torch.Tensor]:
        """The buffers of a layer that has seen nothing. Perfect balance: E tokens, each sure of its experts."""
        E, K, integer = self.num_experts, self.num_experts_per_tok, torch.int64
        perfect = torch.eye(E) if self.loss_type == "diversity_regularization" else torch.ones(E)
        reference = torch.cat((torch.full((E,), K), (perfect.flatten() * FIXED_POINT).long()))
        return {
            "router_bias": torch.zeros(E),
            "usage_counts": torch.zeros(E, dtype=integer),
            "usage_entropy": torch.zeros(1, dtype=integer),
            "step_totals": torch.zeros(1 + E + reference.numel(), dtype=integer),
            "reference_totals": reference,
        }

    def __getstate__(self):
        return {
            **self.__dict__,
            "_auxiliary_loss": None,
        }  # a tensor with a graph can be neither copied nor pickled

    def forward(
        self,
        x: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        num_tokens: torch.Tensor | float | None = None,
        return_auxiliary: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, RouterAuxiliary | None]:
        """x (B, T, C) -> y (B, T, C), or (y, auxiliary) with return_auxiliary.

        token_mask (B, T), bool or 0/1: the tokens that count in losses and usage (all are computed); None: all.
        num_tokens: divisor of the auxiliary losses where this call is only a part of a step, so that the parts add
        up to the step's loss; None: the tokens counted here. Where gradients are averaged over W ranks, pass the
        step's tokens over all ranks divided by W.
        return_auxiliary: in training hand out what a caller must give to `accumulate` exactly once, outside of any
        checkpointed region (whose recomputation would count twice); without it the layer does so itself.
        Evaluation measures nothing and leaves no trace. Raises ValueError where token_mask does not fit x.
        """
        B, T, C = x.shape
        if token_mask is not None and token_mask.shape != (B, T):
            raise ValueError(f"token_mask has shape {tuple(token_mask.shape)}, but x has (B, T) = {(B, T)}")
        tokens = x.reshape(B * T, C)  # (N, C)
        logits = self.gate(tokens)  # (N, E)
        index, weights, probs = self.choose(logits)
        order, ends = dispatch(index, self.num_experts)
        y = self.dropout(self.experts(tokens, weights, order, ends).view(B, T, C))
        if self.shared is not None:
            y = y + self.shared(x)
        auxiliary = (
            self.measure(logits, probs, order, ends, token_mask, num_tokens) if self.training else None
        )
        if return_auxiliary:
            return y, auxiliary
        if auxiliary is not None:
            self.accumulate(auxiliary)
        return y

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logits (N, E) -> expert index (N, K), weights (N, K), routing probabilities (N, E).

        Sigmoid scores are divided by their sum to give probabilities for the losses, as DeepSeek-V3 does. A single
        expert's weight is its score itself: renormalised it would be 1 and the router would get no gradient. Equal
        scores go to the lower index (topk promises no order). NaN logits give NaN weights, hence NaN outputs.
        """
        K = self.num_experts_per_tok
        scores = logits.softmax(-1) if self.router_score == "softmax" else logits.sigmoid()
        probs = scores if self.router_score == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)
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
        """Losses and sums over the tokens that count; for the arguments see `forward` and `dispatch`.

        z-loss: mean over tokens of (log sum_e exp(logit_e))^2 (ST-MoE, eq. 5), which keeps the logits small.
        """
        with torch.autocast(logits.device.type, enabled=False):
            if token_mask is None:
                counted = logits.new_ones(logits.shape[0])  # (N,)
                counts = ends.long().diff(prepend=ends.new_zeros(1))  # (E,)
            else:
                counted = token_mask.reshape(-1).to(logits.dtype)
                running = token_mask.reshape(-1).long()[order // self.num_experts_per_tok].cumsum(0)
                counts = F.pad(running, (1, 0))[ends.long()].diff(prepend=running.new_zeros(1))
            n = counted.sum()
            divisor = n.clamp_min(1) if num_tokens is None else num_tokens
            z_loss = counted @ logits.logsumexp(-1).square() / divisor
            entropy = counted @ -torch.special.xlogy(probs, probs).detach().sum(-1)
            if self.loss_type == "diversity_regularization":
                sums = (probs * counted[:, None]).t() @ probs  # (E, E)
            else:
                sums = counted @ probs  # (E,)
            balance_loss = self.balance_loss(sums, counts, n, divisor)
            return RouterAuxiliary(
                balance_loss, z_loss, counts, torch.cat((entropy[None], sums.detach().flatten()))
            )

    def balance_loss(self, sums, counts, n, divisor) -> torch.Tensor:
        """This call's part of the step's balance loss, from the sums of p (E,) or p p^T (E, E) over n tokens.

        A loss L of the mean s over tokens is not the mean of the losses of the parts that a step is cut into, and
        neither are the gradients. Where `update_router` is called (the layer is step-managed) the loss is therefore
        the first-order expansion of L at s_ref, the mean over the whole step before, on all ranks, detached:

            L(s_ref) + <grad L(s_ref), s - s_ref>

        It is linear in tokens, so micro-steps and ranks add up exactly; it may be slightly negative. For load_balancing,
        already linear in P, the expansion is the loss itself with the fractions f of the step before. In the first
        step s_ref is perfect balance. Elsewhere s_ref is this call's own mean, detached: then value and gradient are
        those of L itself, the textbook loss of this batch.
        """
        if self.loss_type is None:
            return sums.new_zeros(())
        if self.step_managed:
            counts, reference = self.reference_totals.split([self.num_experts, sums.numel()])
            tokens = counts.sum().clamp_min(1) / self.num_experts_per_tok
            reference = (reference / (FIXED_POINT * tokens)).view_as(sums).to(sums.dtype)
        else:
            reference = sums.detach() / n.clamp_min(1)
        loss = LOSSES[self.loss_type]
        if loss is load_balancing:
            loss = functools.partial(loss, f=(counts / counts.sum().clamp_min(1)).to(sums.dtype))
        value, change = torch.func.jvp(loss, (reference,), ((sums - n * reference) / divisor,))
        return (value * (n / divisor) + change).to(sums.dtype)

    @torch.no_grad()
    def accumulate(self, auxiliary: RouterAuxiliary) -> None:
        """Add one training forward to the accounts and keep its balance loss for `get_auxiliary_loss`."""
        sums = (auxiliary.sums.nan_to_num(0.0) * FIXED_POINT).round().long()
        self.step_totals += torch.cat((sums[:1], auxiliary.counts, auxiliary.counts, sums[1:]))
        self._auxiliary_loss = auxiliary.balance_loss

    def get_auxiliary_loss(self) -> torch.Tensor:
        """Balance loss () of the last training forward (0 before the first), without coefficient, differentiable."""
        return self.router_bias.new_zeros(()) if self._auxiliary_loss is None else self._auxiliary_loss

    def get_usage_counts(self) -> torch.Tensor:
        """Rows routed to each expert in training since the last reset, (E,) int64: those of this rank since the last
        `update_router`, those of all ranks before. `expert_usage` reduces them all."""
        return self.usage_counts + self.step_totals[1 : 1 + self.num_experts]

    def reset_usage_counts(self) -> None:
        """Start counting afresh. Leaves alone what the balance loss and the router bias need of the current step."""
        self.usage_counts.zero_()
        self.usage_entropy.zero_()
        self.step_totals[: 1 + self.num_experts].zero_()

    def last_step_counts(self) -> torch.Tensor:
        """Rows routed to each expert in the last finished optimizer step, all ranks, (E,) int64."""
        return self.reference_totals[: self.num_experts].clone()

    def usage_statistics(self, step_totals: torch.Tensor | None = None) -> ExpertUsage:
        """Usage since the last reset. step_totals: the unfinished step's, where they were summed over the ranks."""
        entropy, counts = (self.step_totals if step_totals is None else step_totals).split(
            [1, self.num_experts, -1]
        )[:2]
        counts = self.usage_counts + counts
        rows = counts.sum().clamp_min(1)
        load = counts * (self.num_experts / rows)
        tokens = rows / self.num_experts_per_tok
        entropy = (self.usage_entropy + entropy)[0] / (FIXED_POINT * tokens)
        return ExpertUsage(counts, counts / rows, load.max(), (load < 0.1).float().mean(), entropy)

    def step_statistics(self) -> torch.Tensor:
        """This rank's totals since the last `update_router`, one flat int64 vector to be summed over the ranks."""
        return self.step_totals.clone()

    @torch.no_grad()
    def update_router(self, reduced: torch.Tensor) -> None:
        """Close an optimizer step, given its `step_statistics` summed over the ranks: renew the reference of the balance
        loss, move the router bias by rate * sign(mean count - count) (arXiv 2408.15664, algorithm 1), start anew.

        With no token since the last call it changes nothing, so that it may be called at both ends of a step.
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


def _reduced_totals(layers: list[MoE], process_group, reduce: bool) -> tuple[torch.Tensor, ...]:
    """`step_statistics` of every layer, summed over the ranks by one collective."""
    totals = torch.cat([layer.step_statistics() for layer in layers])
    if reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1:
        dist.all_reduce(totals, group=process_group)
    return totals.split([layer.step_totals.numel() for layer in layers])


def update_routers(layers: Iterable[MoE], process_group=None, reduce: bool = True) -> None:
    """Begin an optimizer step: close the one before in every layer, with its totals over all ranks of process_group.

    Call on every rank before the first forward of each step (also before the very first), never between the
    micro-steps of one step. One collective when torch.distributed runs on several ranks; reduce=False leaves it out.
    """
    layers = list(layers)
    if layers:
        for layer, totals in zip(layers, _reduced_totals(layers, process_group, reduce), strict=True):
            layer.update_router(totals)


def expert_usage(layers: Iterable[MoE], process_group=None, reduce: bool = True) -> list[ExpertUsage]:
    """Usage of every layer since its last reset, over all ranks. A collective like `update_routers`; changes nothing."""
    layers = list(layers)
    if not layers:
        return []
    totals = _reduced_totals(layers, process_group, reduce)
    return [layer.usage_statistics(step) for layer, step in zip(layers, totals, strict=True)]
