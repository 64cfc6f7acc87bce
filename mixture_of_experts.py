"""Mixture-of-Experts feed-forward layer: router, balance losses, dispatch, expert usage.

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

Stages 2 to 4 are in experts.py. There is no capacity: no token is dropped, and no token's output depends on
another token. Where ranks share the experts (expert_parallel.py), an exchange of rows stands between 2 and 3,
and the way back after 3.

Letters: B batch, T sequence length, C n_embd, N tokens = B*T, E experts, K experts per token, H expert
hidden size, R routed rows = N*K.

References: Shazeer et al. 2017 (arXiv 1701.06538), Switch Transformer (2101.03961), ST-MoE (2202.08906),
loss-free balancing (2408.15664), DeepSeek-V3 (2412.19437).
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from layers.experts import MLP, Experts, dispatch, held, local
from layers.usage import STARVED_BELOW

# Sums that outlive a forward are int64 in units of 2^-24. Adding them is exact, so they depend neither on the
# order of micro-steps and ranks nor on a later model.bfloat16(). Room for 2^39 tokens.
FIXED_POINT = 2.0**24

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
        self._last_usage = None  # (1 + E,): entropy and counts of the last finished step, all ranks

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

    def last_step_entropy(self) -> Tensor:
        """Entropy () of the routing probabilities in that step in nats, mean over its tokens; NaN until this
        process has finished a step: it is in no state dict."""
        if self._last_usage is None:
            return self.usage_counts.new_tensor(math.nan, dtype=torch.float32)
        step = self._last_usage.to(self.usage_counts.device)
        return step[0] / (FIXED_POINT * step[1:].sum() / self.num_experts_per_tok)

    def usage_statistics(self, step_totals: Tensor | None = None) -> ExpertUsage:
        """Usage since the last reset. step_totals: the buffer of this name summed over ranks; None: as is."""
        step = self.step_totals if step_totals is None else step_totals
        counts = self.usage_counts + step[1 : 1 + self.num_experts]
        rows = counts.sum().clamp_min(1)
        share = counts / rows
        load = share * self.num_experts
        entropy = (self.usage_entropy + step[:1])[0] / (FIXED_POINT * rows / self.num_experts_per_tok)
        return ExpertUsage(counts, share, load.max(), (load < STARVED_BELOW).float().mean(), entropy)

    @torch.no_grad()
    def update_router(self, reduced: Tensor) -> None:
        """Close an optimizer step, given its `step_totals` summed over the ranks: add to the usage, renew the
        reference of the balance loss, move the router bias by rate * sign(mean count - count) (2408.15664).

        Without any token since the last call nothing changes: calling it twice does no harm.
        """
        E = self.num_experts
        self._last_usage = reduced[: 1 + E].clone()
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


@torch.no_grad()
def idle_experts(layers: Iterable[MoE]) -> list[list[int]]:
    """Of every layer the experts that the last optimizer step, closed by `update_routers`, gives nothing to
    learn: no row that counts, and as tokens that do not count in the router's losses may yet have a gradient
    (ignored labels do), no gradient either. The same on all ranks.

    Reads the counts on the host; only where some are zero, the gradients of these experts. A collective
    then, where ranks share the experts out (their counts are the same, so that all of them take part).
    """
    layers = list(layers)
    counts = torch.stack([layer.last_step_counts() for layer in layers]).tolist() if layers else []
    idle = [[e for e, count in enumerate(row) if count == 0] for row in counts]
    if not any(idle):
        return idle
    learns = layers[0].usage_counts.new_zeros(len(layers), len(counts[0]))  # (layers, E)
    for number, layer in enumerate(layers):
        for parameter in layer.experts.parameters():
            rows = held(parameter)[0]
            mine = [e for e in idle[number] if e in rows]
            if mine and parameter.grad is not None:
                grad = local(parameter.grad)[[rows.index(e) for e in mine]]
                learns[number, mine] += (grad != 0).flatten(1).any(1)
    mesh = getattr(next(layers[0].experts.parameters()), "device_mesh", None)
    for group in mesh.get_all_groups() if mesh is not None else ():
        dist.all_reduce(learns, group=group)
    learns = learns.tolist()
    return [[e for e in experts if not learns[number][e]] for number, experts in enumerate(idle)]


@contextlib.contextmanager
def idle_experts_spared(layers: Iterable[MoE], optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Around optimizer.step(), after `update_routers`: `idle_experts` stay as they are.

    AdamW would let weight decay shrink them (by a tenth in 1,000 steps at the usual settings) and old moments
    move them. Their weights and moments are copied and put back, which costs nothing while every expert is
    busy but reading the counts on the host. Yields the number of idle experts. Of parameters that are shared
    out, each rank looks after its part.
    """
    layers, kept = list(layers), []
    states = getattr(optimizer, "optim", optimizer).state  # ZeroRedundancyOptimizer has the real one inside
    idle = idle_experts(layers)
    for layer, experts in zip(layers, idle, strict=True):
        for parameter in layer.experts.parameters() if experts else ():
            rows = held(parameter)[0]
            moments = [m for m in states.get(parameter, {}).values() if torch.is_tensor(m)]
            for tensor in (parameter.detach(), *(m for m in moments if m.shape == parameter.shape)):
                mine = [local(tensor)[rows.index(e)] for e in experts if e in rows]
                kept += [(row, row.clone()) for row in mine]
    yield sum(map(len, idle))
    for place, value in kept:
        place.copy_(value)
