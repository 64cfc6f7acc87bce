"""Mixture-of-Experts feed-forward layer: router, balance losses, stacked experts, expert usage.

    layer = MoE(config)                      # config: the MoE fields of GPTConfig
    y = layer(x)                             # (B, T, C) -> (B, T, C)
    loss = ... + 0.01 * layer.get_auxiliary_loss()
    update_routers([layer])                  # optional, once per optimizer step: see "Balance losses" below

A token passes through five stages, in the order of `MoE.forward`:

    1. route     fp32 logits -> scores -> K experts per token and their weights     Router, MoE.choose
    2. dispatch  sort the R = N*K routed rows by expert: (order, ends)              dispatch
    3. experts   one MLP per group of rows, stacked parameters                      Experts
    4. combine   weighted sum of a token's K rows (inside Experts.forward)          Experts
    5. account   balance losses, z-loss and usage of the counted tokens             MoE.measure, MoE.accumulate

No token is dropped and none depends on another: there is no capacity. Letters as everywhere: B batch, T sequence
length, C n_embd, N tokens = B*T, E experts, K experts per token, H expert hidden size, R routed rows = N*K.

References: Shazeer et al. 2017 (arXiv 1701.06538), Switch Transformer (2101.03961), ST-MoE (2202.08906),
MegaBlocks (2211.15841), loss-free balancing (2408.15664), DeepSeek-V3 (2412.19437).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# Feed-forward


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
    """Gradient with respect to h of `activate(h)`, given the gradient of its result."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, h, approximate="tanh")
    if activation == "relu2":
        return grad * F.relu(h).mul_(2)
    gate, up = h.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((grad_gate, grad * F.silu(gate)), dim=-1)


class MLP(nn.Module):
    """Dense feed-forward layer of a block, and the shared expert of `MoE`.

    With swiglu `c_fc` is packed: rows [0, H) are the gate (through silu), rows [H, 2H) the up projection.
    """

    def __init__(self, config, hidden_size: int | None = None):
        super().__init__()
        hidden = hidden_size or config.expert_hidden_size or 4 * config.n_embd
        self.activation = config.activation
        packed = 2 * hidden if config.activation == "swiglu" else hidden
        self.c_fc = nn.Linear(config.n_embd, packed, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(activate(self.c_fc(x), self.activation)))  # (B, T, C)


# -----------------------------------------------------------------------------
# Balance losses: functions of token means; every one is 0 or 1 at perfect balance


def variance_penalty(P: torch.Tensor) -> torch.Tensor:
    """E * sum_e P_e^2 - 1 with P (E,) the mean routing probabilities."""
    return P.shape[0] * P.square().sum() - 1


def entropy_regularization(P: torch.Tensor) -> torch.Tensor:
    """log E + sum_e P_e log P_e with P (E,) the mean routing probabilities."""
    return math.log(P.shape[0]) + (P * P.clamp_min(1e-12).log()).sum()


def diversity_regularization(M: torch.Tensor) -> torch.Tensor:
    """Mean over i != j of M_ij^2 / (M_ii M_jj), M (E, E) = mean over tokens of p p^T."""
    experts = M.shape[0]
    norms = M.diagonal().clamp_min(1e-12)  # (E,)
    cosines = M.square() / (norms[:, None] * norms[None, :])  # (E, E), squared
    return (cosines.sum() - cosines.diagonal().sum()) / max(experts * (experts - 1), 1)


def load_balancing(P: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e with f (E,) the fractions of the routed rows (sum 1, no gradient)."""
    return P.shape[0] * (f * P).sum()


LOSSES = {
    loss.__name__: loss
    for loss in (load_balancing, variance_penalty, entropy_regularization, diversity_regularization)
}

# -----------------------------------------------------------------------------
# Engine


def dispatch(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the routed rows by expert. index (N, K) -> order (R,), ends (E,) int32.

    Row r of the sorted order is slot order[r] = token * K + k; expert e owns the rows [ends[e-1], ends[e]).
    """
    expert, order = index.reshape(-1).sort(stable=True)  # (R,), (R,)
    experts = torch.arange(num_experts, device=index.device)
    return order, torch.searchsorted(expert, experts, right=True).int()


def _groups(order: torch.Tensor, ends: torch.Tensor, copies: int) -> tuple[torch.Tensor, list, list[int]]:
    """token (R,), [(expert, rows of that expert)] of the experts that have rows, [experts that have none].

    Reads `ends` on the host: free on a CPU, a synchronisation on any other device.
    """
    stops = ends.tolist()
    spans = [slice(a, b) for a, b in zip([0, *stops[:-1]], stops, strict=True)]
    used = [(e, span) for e, span in enumerate(spans) if span.stop > span.start]
    return order // copies, used, [e for e, span in enumerate(spans) if span.stop == span.start]


@torch.library.custom_op("gpt_moe::expert_mlp", mutates_args=())
def expert_mlp(
    x: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, ends: torch.Tensor,
    c_fc: torch.Tensor, c_fc_bias: torch.Tensor | None, c_proj: torch.Tensor, c_proj_bias: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out (M, C) and the hidden pre-activations (R, H) of the sorted rows; see Experts."""
    token, used, _ = _groups(order, ends, weights.shape[1])
    weights = weights.reshape(-1, 1).index_select(0, order)  # (R, 1)
    hidden = x.new_empty(order.shape[0], c_fc.shape[1])  # (R, H)
    out = torch.zeros_like(x, dtype=weights.dtype)
    most = max((span.stop - span.start for _, span in used), default=0)
    rows, y = x.new_empty(most, x.shape[1]), x.new_empty(most, x.shape[1])
    for e, span in used:
        t, h = token[span], hidden[span]
        rows_e, y_e = rows[: h.shape[0]], y[: h.shape[0]]
        torch.index_select(x, 0, t, out=rows_e)
        w1, w2 = c_fc[e].to(x.dtype).t(), c_proj[e].to(x.dtype).t()
        if c_fc_bias is None:
            torch.mm(rows_e, w1, out=h)
            torch.mm(activate(h, activation), w2, out=y_e)
        else:
            torch.addmm(c_fc_bias[e].to(x.dtype), rows_e, w1, out=h)
            torch.addmm(c_proj_bias[e].to(x.dtype), activate(h, activation), w2, out=y_e)
        out.index_add_(0, t, y_e.mul_(weights[span]).to(out.dtype))
    return out.to(x.dtype), hidden


@expert_mlp.register_fake
def _(x, weights, order, ends, c_fc, c_fc_bias, c_proj, c_proj_bias, activation):
    return torch.empty_like(x), x.new_empty(order.shape[0], c_fc.shape[1])


@torch.library.custom_op("gpt_moe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, ends: torch.Tensor,
    c_fc: torch.Tensor, c_proj: torch.Tensor, c_proj_bias: torch.Tensor | None,
    hidden: torch.Tensor, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, weights, c_fc, c_fc_bias, c_proj, c_proj_bias."""
    token, used, unused = _groups(order, ends, weights.shape[1])
    sorted_weights = weights.reshape(-1, 1).index_select(0, order)  # (R, 1)
    dots = torch.empty_like(sorted_weights)  # (R, 1)
    grad_x = torch.zeros_like(x, dtype=weights.dtype)
    grads = [torch.empty_like(c_fc), c_fc.new_empty(c_fc.shape[:2]), torch.empty_like(c_proj), c_proj.new_empty(c_proj.shape[:2])]
    for e in unused:
        for grad_p in grads:
            grad_p[e].zero_()
    grad_fc, grad_fc_bias, grad_proj, grad_proj_bias = grads
    most = max((span.stop - span.start for _, span in used), default=0)
    rows, gs = x.new_empty(most, x.shape[1]), x.new_empty(most, x.shape[1])
    gas = x.new_empty(most, c_proj.shape[2])
    for e, span in used:
        t, h, w = token[span], hidden[span], sorted_weights[span]
        n = h.shape[0]
        r, g, ga = rows[:n], gs[:n], gas[:n]
        torch.index_select(x, 0, t, out=r)
        torch.index_select(grad, 0, t, out=g)
        act = activate(h, activation)
        torch.mm(g, c_proj[e].to(x.dtype), out=ga)
        torch.sum(ga * act, 1, keepdim=True, dtype=w.dtype, out=dots[span])
        if c_proj_bias is not None:
            dots[span] += g.to(w.dtype) @ c_proj_bias[e].to(w.dtype)[:, None]
        g.mul_(w)
        ga.mul_(w)
        _mm_into(grad_proj[e], g.t(), act)
        gh = activate_backward(ga, h, activation)
        _mm_into(grad_fc[e], gh.t(), r)
        if c_proj_bias is not None:
            torch.sum(g, 0, out=grad_proj_bias[e])
            torch.sum(gh, 0, out=grad_fc_bias[e])
        torch.mm(gh, c_fc[e].to(x.dtype), out=g)
        grad_x.index_add_(0, t, g.to(grad_x.dtype))
    grad_weights = torch.empty_like(weights).view(-1, 1).index_copy_(0, order, dots)
    return grad_x.to(x.dtype), grad_weights.view_as(weights), *grads

def _mm_into(out, a, b):
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)

@expert_mlp_backward.register_fake
def _(grad, x, weights, order, ends, c_fc, c_proj, c_proj_bias, hidden, activation):
    return (
        torch.empty_like(x), torch.empty_like(weights), torch.empty_like(c_fc), c_fc.new_empty(c_fc.shape[:2]),
        torch.empty_like(c_proj), c_proj.new_empty(c_proj.shape[:2]),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weights, order, ends, c_fc, c_fc_bias, c_proj, c_proj_bias, ctx.activation = inputs
    ctx.bias = c_fc_bias is not None
    ctx.save_for_backward(x, weights, order, ends, c_fc, c_proj, c_proj_bias, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_hidden):
    if grad is None:
        return (None,) * 9
    *saved, hidden = ctx.saved_tensors
    gx, gw, gfc, gfcb, gproj, gprojb = expert_mlp_backward(grad.contiguous(), *saved, hidden, ctx.activation)
    return gx, gw, None, None, gfc, gfcb if ctx.bias else None, gproj, gprojb if ctx.bias else None, None


expert_mlp.register_autograd(_backward, setup_context=_setup_context)


class Experts(nn.Module):
    """E feed-forward networks in stacked parameters. The number of experts is read from the parameters."""

    def __init__(self, config):
        super().__init__()
        E, C = config.num_experts, config.n_embd
        H = config.expert_hidden_size or 4 * C
        packed = 2 * H if config.activation == "swiglu" else H
        self.activation = config.activation
        self.c_fc = nn.Parameter(torch.empty(E, packed, C))
        self.c_proj = nn.Parameter(torch.empty(E, C, H))
        self.c_fc_bias = nn.Parameter(torch.empty(E, packed)) if config.bias else None
        self.c_proj_bias = nn.Parameter(torch.empty(E, C)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.c_fc, std=0.02)
        nn.init.normal_(self.c_proj, std=0.02)
        if self.c_fc_bias is not None:
            nn.init.zeros_(self.c_fc_bias)
            nn.init.zeros_(self.c_proj_bias)

    def forward(self, x, weights, order, ends) -> torch.Tensor:
        """x (M, C), weights (M, K), order (M*K,), ends (E,) -> (M, C)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        params = (self.c_fc, self.c_fc_bias, self.c_proj, self.c_proj_bias)
        return expert_mlp(x, weights, order, ends, *params, self.activation)[0]


# -----------------------------------------------------------------------------
# Router and layer


class Router(nn.Linear):
    """Linear map to one logit per expert, in fp32 whatever autocast says."""

    def __init__(self, n_embd: int, num_experts: int):
        super().__init__(n_embd, num_experts, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))  # (N, E)


class RouterAuxiliary(NamedTuple):
    """What one training forward leaves for the loss and the accounts."""

    balance_loss: torch.Tensor  # () differentiable
    z_loss: torch.Tensor  # () differentiable
    counts: torch.Tensor  # (E,) int64: routed rows of counted tokens
    sums: torch.Tensor  # (1 + E,) or (1 + E*E,): token sums of router entropy and balance statistic


class ExpertUsage(NamedTuple):
    counts: torch.Tensor  # (E,) int64
    share: torch.Tensor  # (E,) sums to 1
    max_load: torch.Tensor  # () largest count / mean count
    starved: torch.Tensor  # () fraction of experts with less than 10% of a fair share
    entropy: torch.Tensor  # () mean entropy of the router's distribution over tokens, nats


FIXED_POINT = 2.0**24


class MoE(nn.Module):
    """Dropless token-choice top-K Mixture-of-Experts: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        E, K, C = config.num_experts, config.num_experts_per_tok, config.n_embd
        if not 1 <= K <= E:
            raise ValueError(f"num_experts_per_tok={K} must lie between 1 and num_experts={E}")
        if config.moe_loss_type not in LOSSES:
            raise ValueError(f"moe_loss_type={config.moe_loss_type!r} is unknown; use one of {list(LOSSES)}")
        if config.router_score not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score={config.router_score!r} is unknown; use 'softmax' or 'sigmoid'")
        self.num_experts, self.num_experts_per_tok = E, K
        self.router_score = config.router_score
        self.norm_topk_prob = config.norm_topk_prob
        self.router_bias_update_rate = config.router_bias_update_rate
        self.loss_type = config.moe_loss_type if config.moe_loss else None
        self.force_balanced = False  # benchmarks only
        self.gate = Router(C, E)
        self.experts = Experts(config)
        hidden = config.expert_hidden_size or 4 * C
        self.shared = MLP(config, config.num_shared_experts * hidden) if config.num_shared_experts else None
        self.dropout = nn.Dropout(config.dropout)
        size = E * E if self.loss_type == "diversity_regularization" else E
        self.register_buffer("router_bias", torch.zeros(E))
        self.register_buffer("usage_counts", torch.zeros(E, dtype=torch.int64))
        self.register_buffer("usage_entropy", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("step_totals", torch.zeros(1 + E + E + size, dtype=torch.int64))
        self.register_buffer("reference_totals", torch.zeros(E + size, dtype=torch.int64))
        self.register_buffer("step_managed", torch.zeros(1, dtype=torch.bool))
        self._auxiliary_loss = None

    def __getstate__(self):
        return {**self.__dict__, "_auxiliary_loss": None}  # a tensor with a graph can neither be copied nor pickled

    def forward(self, x, token_mask=None, num_tokens=None, return_auxiliary=False):
        """x (B, T, C) -> y (B, T, C), or (y, RouterAuxiliary | None) with return_auxiliary."""
        B, T, C = x.shape
        tokens = x.reshape(B * T, C)
        logits = self.gate(tokens)  # (N, E)
        index, weights, probs = self.choose(logits)
        order, ends = dispatch(index, self.num_experts)
        y = self.dropout(self.experts(tokens, weights, order, ends)).view(B, T, C)
        if self.shared is not None:
            y = y + self.shared(x)
        aux = None
        if self.training:
            aux = self.measure(logits, probs, order, ends, token_mask, num_tokens)
            if not return_auxiliary:
                self.accumulate(aux)
        return (y, aux) if return_auxiliary else y

    def choose(self, logits):
        """logits (N, E) -> expert index (N, K), weights (N, K), probabilities (N, E)."""
        K = self.num_experts_per_tok
        if self.router_score == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        if self.force_balanced:
            slots = torch.arange(logits.shape[0] * K, device=logits.device)
            index = (slots % self.num_experts).view(-1, K)
        else:
            choice = scores.detach() + self.router_bias
            index = choice.sort(dim=-1, descending=True, stable=True).indices[:, :K]  # (N, K)
        weights = scores.gather(1, index)
        if K > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return index, weights, probs

    def measure(self, logits, probs, order, ends, token_mask, num_tokens) -> RouterAuxiliary:
        """Balance loss, z-loss and token sums over the counted tokens."""
        K, E, device = self.num_experts_per_tok, self.num_experts, logits.device
        with torch.autocast(device.type, enabled=False):
            if token_mask is None:
                counts = ends.long().diff(prepend=ends.new_zeros(1))
                counted = logits.new_ones(logits.shape[0], 1)
            else:
                keep = token_mask.reshape(-1).bool()
                running = F.pad(keep[order // K].cumsum(0), (1, 0))
                counts = running[ends.long()].diff(prepend=running[:1])
                counted = keep[:, None].to(logits.dtype)
            n = counted.sum()
            divisor = n.clamp_min(1) if num_tokens is None else num_tokens
            z_loss = (logits.logsumexp(-1).square() * counted[:, 0]).sum() / divisor
            entropy = (torch.special.entr(probs.detach()).sum(-1) * counted[:, 0]).sum()
            if self.loss_type == "diversity_regularization":
                sums = probs.t() @ (probs * counted)  # (E, E)
            else:
                sums = (probs * counted).sum(0)  # (E,)
            balance = self._balance_loss(sums, counts, n, divisor)
            sums = torch.cat((entropy[None], sums.detach().flatten()))
        return RouterAuxiliary(balance, z_loss, counts, sums)

    def _balance_loss(self, sums, counts, n, divisor):
        if self.loss_type is None:
            return sums.new_zeros(())
        E = self.num_experts
        ref_counts, ref_sums = self.reference_totals.split([E, sums.numel()])
        empty = ref_counts.sum() == 0
        ref_n = ref_counts.sum().clamp_min(1) / self.num_experts_per_tok
        perfect = torch.eye(E, device=sums.device) / E if sums.dim() == 2 else sums.new_full((E,), 1 / E)
        reference = (ref_sums / (ref_n * FIXED_POINT)).view_as(sums).to(sums.dtype)
        reference = torch.where(empty, perfect.to(sums.dtype), reference)
        reference = torch.where(self.step_managed, reference, sums.detach() / n.clamp_min(1))
        loss = LOSSES[self.loss_type]
        if self.loss_type == "load_balancing":
            fractions = torch.where(empty, 1 / E, ref_counts / ref_counts.sum().clamp_min(1))
            fractions = torch.where(self.step_managed, fractions, counts / counts.sum().clamp_min(1))
            return load_balancing(sums, fractions.to(sums.dtype)) / divisor
        value, change = torch.func.jvp(loss, (reference,), ((sums - n * reference) / divisor,))
        return value * (n / divisor) + change

    @torch.no_grad()
    def accumulate(self, aux: RouterAuxiliary) -> None:
        """Add one training forward to the accounts and remember its balance loss."""
        sums = (aux.sums.nan_to_num(0.0) * FIXED_POINT).round().long()
        self.step_totals += torch.cat((sums[:1], aux.counts, aux.counts, sums[1:]))
        self._auxiliary_loss = aux.balance_loss

    def get_auxiliary_loss(self) -> torch.Tensor:
        return self.router_bias.new_zeros(()) if self._auxiliary_loss is None else self._auxiliary_loss

    def get_usage_counts(self) -> torch.Tensor:
        return self.usage_counts + self.step_totals[1 : 1 + self.num_experts]

    def reset_usage_counts(self) -> None:
        self.usage_counts.zero_()
        self.usage_entropy.zero_()
        self.step_totals[: 1 + self.num_experts].zero_()

    def last_step_counts(self) -> torch.Tensor:
        """Routed rows per expert (E,) int64 of the last finished optimizer step, all ranks together."""
        return self.reference_totals[: self.num_experts].clone()

    def usage_statistics(self, step_totals: torch.Tensor | None = None) -> ExpertUsage:
        """Usage since the last reset; step_totals: this step's totals, if they were reduced over ranks."""
        step = self.step_totals if step_totals is None else step_totals
        E = self.num_experts
        counts = self.usage_counts + step[1 : 1 + E]
        total = counts.sum().clamp_min(1)
        share = counts / total
        entropy = (self.usage_entropy + step[:1]).sum() / (FIXED_POINT * total / self.num_experts_per_tok)
        return ExpertUsage(counts, share, share.max() * E, (share * E < 0.1).float().mean(), entropy)

    def step_statistics(self) -> torch.Tensor:
        """This rank's totals since the last `update_router`: one flat int64 vector, to be summed over ranks."""
        return self.step_totals.clone()

    @torch.no_grad()
    def update_router(self, reduced: torch.Tensor) -> None:
        """Finish an optimizer step with its totals over all ranks."""
        E = self.num_experts
        entropy, usage, step = reduced.split([1, E, reduced.numel() - 1 - E])
        self.usage_entropy += entropy
        self.usage_counts += usage
        counts = step[:E]
        self.reference_totals.copy_(torch.where(counts.sum() > 0, step, self.reference_totals))
        if self.router_bias_update_rate > 0:
            self.router_bias += self.router_bias_update_rate * torch.sign(counts.sum() - E * counts)
        self.step_managed.fill_(True)
        self.step_totals.zero_()


def _reduced(layers: list[MoE], process_group, reduce: bool) -> list[torch.Tensor]:
    totals = torch.cat([layer.step_statistics() for layer in layers])
    if reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1:
        dist.all_reduce(totals, group=process_group)
    return list(totals.split([layer.step_totals.numel() for layer in layers]))


def update_routers(layers: Iterable[MoE], process_group=None, reduce: bool = True) -> None:
    """Call once per optimizer step, before its first forward."""
    layers = list(layers)
    if layers:
        for layer, totals in zip(layers, _reduced(layers, process_group, reduce), strict=True):
            layer.update_router(totals)


def expert_usage(layers: Iterable[MoE], process_group=None, reduce: bool = True) -> list[ExpertUsage]:
    """Usage of every layer since its last reset, over all ranks."""
    layers = list(layers)
    if not layers:
        return []
    totals = _reduced(layers, process_group, reduce)
    return [layer.usage_statistics(t) for layer, t in zip(layers, totals, strict=True)]
