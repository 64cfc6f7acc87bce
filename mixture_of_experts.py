"""Mixture-of-Experts feed-forward layer: router, balance losses, dispatch, expert usage.

    layer = MoE(config)                      # config: any object with the MoE fields of GPTConfig
    y = layer(x)                             # (B, T, C) -> (B, T, C)
    loss = task_loss + 0.01 * layer.get_auxiliary_loss()
    update_routers([layer])                  # once per optimizer step, before its first forward

A forward pass has five stages, in the order of `MoE.forward`:

    1. route     score all experts for each token, choose the K best, weight them            Router, MoE.route
    2. dispatch  make one row per token and chosen expert; sort rows by expert               dispatch
    3. experts   run each expert, an MLP, on its rows                                        Experts
    4. combine   add up each token's rows, times their weights                               Experts
    5. account   compute balance loss, z-loss and usage from the tokens that count           MoE.measure

Stages 2 to 4 are in layers/experts.py. Experts have no capacity limit: no token is dropped, and this layer's
output for a token depends only on its input for the same token. If ranks share the experts
(training/expert_parallel.py), they exchange rows before stage 3 and results after it.

References: Shazeer et al. 2017 (arXiv 1701.06538), Switch Transformer (2101.03961), ST-MoE (2202.08906),
loss-free balancing (2408.15664), DeepSeek-V3 (2412.19437).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from layers.experts import Experts, Routing, dispatch
from layers.mlp import MLP
from layers.usage import STARVED_BELOW

# Sums that are kept after a forward are int64, in units of 2^-24. Integer addition is exact, so the order of
# micro-steps and ranks does not matter, and model.bfloat16() does not round them. They hold 2^39 tokens.
FIXED_POINT = 2.0**24

# -----------------------------------------------------------------------------
# Balance losses
#
# p_t (E,) are token t's probabilities. Means over tokens: P = mean p_t (E,), M = mean p_t p_t^T (E, E).
# f (E,): each expert's fraction of the rows. A new loss is a function and its row in BALANCE_LOSSES.


def load_balancing(P: Tensor, f: Tensor) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformer, eq. 4). f sums to 1 for every K, and has no gradient.
    It is 1 at perfect balance, E when one expert gets everything, below 1 only if f and P disagree.
    """
    return P.shape[0] * (f * P).sum()


def variance_penalty(P: Tensor) -> Tensor:
    """Squared coefficient of variation, Var(P) / mean(P)^2 = E * sum_e P_e^2 - 1 (Shazeer 2017, eq. 6-7).
    0 at perfect balance, E - 1 when one expert gets everything.
    """
    return P.shape[0] * P.square().sum() - 1


def entropy_regularization(P: Tensor) -> Tensor:
    """log E + sum_e P_e log P_e: the KL divergence of P from uniform, in nats.
    0 at perfect balance, log E when one expert gets everything.
    """
    return math.log(P.shape[0]) + (P * P.clamp_min(torch.finfo(P.dtype).tiny).log()).sum()  # 0 log 0 is 0


def diversity_regularization(M: Tensor) -> Tensor:
    """Mean over i != j of M_ij^2 / (M_ii M_jj), the squared cosine between the probabilities of experts i and
    j, each a vector over tokens. It asks for different experts, not equal loads, so loads are less even. 0 if
    no two experts share a token, or for one expert; 1 if the probabilities of all experts are proportional.
    """
    E = M.shape[0]
    squares = M.diagonal()  # (E,)
    lengths = torch.where(squares > 0, squares, 1).sqrt()  # an expert that no token may visit shares no token
    cosines = (M / lengths[:, None] / lengths).square()  # (E, E)
    return (cosines.sum() - cosines.diagonal().sum()) / max(E * (E - 1), 1)


class BalanceLoss(NamedTuple):
    """A balance loss: function(P), or function(M) if of_products; with a second argument f if takes_f."""

    function: Callable
    of_products: bool = False
    takes_f: bool = False


BALANCE_LOSSES = {
    "load_balancing": BalanceLoss(load_balancing, takes_f=True),
    "variance_penalty": BalanceLoss(variance_penalty),
    "entropy_regularization": BalanceLoss(entropy_regularization),
    "diversity_regularization": BalanceLoss(diversity_regularization, of_products=True),
}

# -----------------------------------------------------------------------------
# Router and layer


# Each row: logits (N, E) -> scores, which choose and weigh experts; logits -> their logarithms. Scores are
# normalised as softmax(log scores). Divided by their sum plus an epsilon, sigmoid scores could cheat every
# balance loss: far below the epsilon their probabilities would all be 0. OLMo-core met this in a run.
ROUTER_SCORES = {
    "softmax": (lambda logits: logits.softmax(-1), lambda logits: logits.log_softmax(-1)),
    "sigmoid": (torch.sigmoid, F.logsigmoid),  # DeepSeek-V3
}


class Router(nn.Linear):
    """One logit per expert, (N, C) -> (N, E), in fp32 or a wider input's dtype, also under autocast: bf16
    logits change the experts of 2-3% of the tokens. (If torch uses TF32 for fp32 products, so does this.)"""

    def __init__(self, n_embd: int, num_experts: int):
        super().__init__(n_embd, num_experts, bias=False)

    def reset_parameters(self) -> None:
        """Draw N(0, 0.02): scores are nearly equal at the start, so that every expert gets tokens."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class RouterAuxiliary(NamedTuple):
    """What one training forward passes to the loss and to `MoE.accumulate`."""

    balance_loss: Tensor  # () fp32, differentiable; 0 without moe_loss
    z_loss: Tensor  # () fp32, differentiable
    totals: Tensor  # int64, what this forward adds to `MoE.step_totals`


class ExpertUsage(NamedTuple):
    """How the experts of a layer were used since the last reset; tensors on the layer's device."""

    counts: Tensor  # (E,) int64, routed rows
    share: Tensor  # (E,) fractions of the rows
    max_load: Tensor  # () largest over mean count: 1 is perfect, E/K the worst
    starved: Tensor  # () fraction of the experts that are starved
    entropy: Tensor  # () entropy of the routing probabilities in nats, mean over tokens


class MoE(nn.Module):
    """Dropless token-choice top-K Mixture-of-Experts, (B, T, C) -> (B, T, C); overview at the top.

    Buffers, all in the state dict:
      router_bias (E,)    loss-free balancing: added to the scores for the choice, not for the weights
      usage_counts (E,), usage_entropy (1,)    of all ranks, from the last reset to the last update_router
      step_totals         of this rank since the last update_router: entropy and counts (E,), for the usage;
                          counts and the sum of p or p p^T, for update_router. DDP must not broadcast it
      reference_totals    counts (E,) and the sum of p or p p^T of the last finished step, all ranks
    """

    def __init__(self, config):
        super().__init__()
        E, K, C = config.num_experts, config.num_experts_per_tok, config.n_embd
        if not 1 <= K <= E:
            raise ValueError(f"num_experts_per_tok={K} must lie between 1 and num_experts={E}")
        for name, table in (("moe_loss_type", BALANCE_LOSSES), ("router_score", ROUTER_SCORES)):
            if (value := getattr(config, name)) not in table:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(table)}")
        self.num_experts, self.num_experts_per_tok = E, K
        self.router_score, self.norm_topk_prob = config.router_score, config.norm_topk_prob
        self.router_bias_update_rate = config.router_bias_update_rate
        self.loss_type = config.moe_loss_type if config.moe_loss else None
        self.sums_products = config.moe_loss and BALANCE_LOSSES[config.moe_loss_type].of_products
        self.force_balanced = False  # benchmarks only: token n goes to experts n*K, n*K + 1, ... modulo E
        self.gate = Router(C, E)
        self.experts = Experts(config)
        shared = config.num_shared_experts * (config.expert_hidden_size or 4 * C)
        self.shared = MLP(config, shared) if shared else None
        self.dropout = nn.Dropout(config.dropout)
        self.exchange = None  # expert_parallel.Exchange, where ranks share the experts
        for name, value in self.initial_statistics().items():
            self.register_buffer(name, value)
        self.expansion = None  # (1 + E or E*E,) fp32, set by update_router; see balance_loss
        self._auxiliary_loss = None

    def initial_statistics(self) -> dict[str, Tensor]:
        """The buffers of a layer before its first token; the reference is E tokens in perfect balance."""
        E, K, integer = self.num_experts, self.num_experts_per_tok, torch.int64
        balanced = (torch.eye(E).flatten() if self.sums_products else torch.ones(E)) * FIXED_POINT
        return {
            "router_bias": torch.zeros(E),
            "usage_counts": torch.zeros(E, dtype=integer),
            "usage_entropy": torch.zeros(1, dtype=integer),
            "step_totals": torch.zeros(1 + 2 * E + balanced.numel(), dtype=integer),
            "reference_totals": torch.cat((torch.full((E,), K), balanced.long())),
        }

    def __getstate__(self):
        return {**self.__dict__, "_auxiliary_loss": None}  # a tensor with a graph cannot be copied or pickled

    def forward(
        self, x: Tensor, token_mask: Tensor | None = None, num_tokens=None, return_auxiliary: bool = False
    ) -> Tensor | tuple[Tensor, RouterAuxiliary | None]:
        """x (B, T, C) -> y (B, T, C), or with return_auxiliary (y, auxiliary).

        token_mask (B, T), bool or 0/1: the tokens that count in losses and usage; None: all.
        num_tokens: divisor of the auxiliary losses; None: the tokens that count here. For a part of a step
        pass the step's tokens, so that the parts' losses add up (if gradients are averaged over W ranks: all
        ranks' tokens / W); as a tensor if it varies, because torch.compile specialises on numbers.
        return_auxiliary: the caller must pass auxiliary to `accumulate` once, outside checkpointed regions,
        because they run twice. Otherwise the layer does it. In evaluation auxiliary is None.
        ValueError if token_mask has the wrong shape.
        """
        B, T, C = x.shape
        if token_mask is not None and token_mask.shape != (B, T):
            raise ValueError(f"token_mask has shape {tuple(token_mask.shape)}, but x has (B, T) = {(B, T)}")
        tokens = x.reshape(B * T, C)  # (N, C)
        logits = self.gate(tokens)  # (N, E)
        routing, probs = self.route(logits)
        run_shared = lambda: None if self.shared is None else self.shared(x)  # noqa: E731
        if self.exchange is None:
            y, shared = self.experts(tokens, routing), run_shared()
        else:
            y, shared = self.exchange(self.experts, tokens, routing, run_shared)
        y = self.dropout(y.view(B, T, C))
        if shared is not None:
            y = y + shared
        auxiliary = self.measure(logits, probs, routing, token_mask, num_tokens) if self.training else None
        if auxiliary is not None and not return_auxiliary:
            self.accumulate(auxiliary)
        return (y, auxiliary) if return_auxiliary else y

    def route(self, logits: Tensor) -> tuple[Routing, Tensor]:
        """logits (N, E) -> routing, probabilities (N, E).

        With K = 1 the weight is the score: a normalised weight would be 1, and the router would get no
        gradient. Of equal scores the lower index wins (topk promises no order). NaN logits give NaN weights.
        """
        K = self.num_experts_per_tok
        score, log_score = ROUTER_SCORES[self.router_score]
        scores = score(logits)  # (N, E)
        probs = scores if self.router_score == "softmax" else log_score(logits).softmax(-1)  # (N, E)
        if self.force_balanced:
            index = (torch.arange(logits.shape[0] * K, device=logits.device) % self.num_experts).view(-1, K)
        else:
            choice = scores.detach() + self.router_bias
            if self.router_score == "sigmoid":  # very small scores are equal (0) where logits are not
                choice = torch.where(self.router_bias.any(), choice, log_score(logits.detach()))
            if K == 1:
                index = choice.argmax(-1, keepdim=True)  # of equal scores it takes the first
            elif torch.compiler.is_exporting():  # ONNX has no stable sort
                index = choice.topk(K).indices
            else:
                index = choice.sort(dim=-1, descending=True, stable=True).indices[:, :K]
        normed = K > 1 and self.norm_topk_prob
        weights = log_score(logits) if normed else scores  # (N, E)
        if torch.compiler.is_compiling():  # in some graphs Inductor (torch 2.13) loses gather's gradient
            chosen = index[..., None] == torch.arange(self.num_experts, device=index.device)  # (N, K, E)
            weights = torch.where(chosen, weights[:, None], 0.0).sum(-1)  # (N, K)
        else:
            weights = weights.gather(1, index)
        weights = weights.softmax(-1) if normed else weights
        return dispatch(index, weights, self.num_experts), probs

    def measure(self, logits, probs, routing: Routing, token_mask, num_tokens) -> RouterAuxiliary:
        """Losses and sums over the tokens that count. Arguments as in `forward` and `route`.

        z-loss: mean over tokens of (log sum_e exp(logit_e))^2. It keeps logits small (ST-MoE, eq. 5).
        """
        if token_mask is None:
            n, counts = logits.new_full((), logits.shape[0]), routing.counts()  # (), (E,)
            add_up, counted_probs = lambda values: values.sum(0), probs
        else:
            counted = token_mask.reshape(-1).to(logits.dtype)  # (N,)
            running = token_mask.reshape(-1).long()[routing.token].cumsum(0)  # (R,)
            n, counts = counted.sum(), F.pad(running, (1, 0))[routing.ends].diff(prepend=running.new_zeros(1))
            add_up, counted_probs = lambda values: counted @ values, probs * counted[:, None]
        divisor = n.clamp_min(1) if num_tokens is None else num_tokens
        with torch.autocast(logits.device.type, enabled=False):
            z_loss = logits.logsumexp(-1, keepdim=True).square() / divisor  # (N, 1)
            entropy = -torch.special.xlogy(probs, probs).sum(-1, keepdim=True).detach()  # (N, 1)
            totals = add_up(torch.cat((z_loss, entropy, probs), dim=1))  # (2 + E,)
            sums = counted_probs.t() @ probs if self.sums_products else totals[2:]  # (E, E) or (E,)
            balance_loss = self.balance_loss(sums, counts, n, divisor)
        kept = torch.cat((totals[1:2], sums.flatten())) if self.sums_products else totals[1:]
        kept = (kept.detach().nan_to_num(0.0) * FIXED_POINT).round().long()
        # Rounding can make an entropy negative. With this clamp Inductor writes all in one kernel.
        added = torch.cat((kept[:1], counts, counts, kept[1:])).clamp_min(0)
        return RouterAuxiliary(balance_loss, totals[0], added)

    def balance_loss(self, sums: Tensor, counts: Tensor, n: Tensor, divisor) -> Tensor:
        """This call's part of the balance loss, from the sums of p (E,) or p p^T (E, E) over its n tokens.

        The loss L(s) of a step's mean s is not the mean of its parts' losses; the gradients differ, too. If
        `update_router` is in use, the layer therefore computes the first-order expansion at s_ref. s_ref is
        the mean over the previous step on all ranks; f is of that step, too:

            L(s_ref) + <grad L(s_ref), s - s_ref>

        It is linear in the tokens, so micro-steps and ranks add up exactly. It may be slightly negative. The
        first s_ref is perfect balance. If `update_router` is never called, the value is L(s) of this call,
        the textbook loss of one batch.
        """
        if self.loss_type is None:
            return sums.new_zeros(())
        if self.expansion is None:
            return self.loss_of_mean(sums / n.clamp_min(1), counts) * (n / divisor)
        expansion = self.expansion.to(sums)  # the layer may have moved since
        constant, slope = expansion[0], expansion[1:].view_as(sums)
        return (constant * n + (slope * sums).sum()) / divisor

    def loss_of_mean(self, mean: Tensor, counts: Tensor) -> Tensor:
        """The balance loss () of the mean p (E,) or p p^T (E, E), and of each expert's rows (E,)."""
        loss = BALANCE_LOSSES[self.loss_type]
        f = [counts.to(mean.dtype) / counts.sum().clamp_min(1)] if loss.takes_f else []
        return loss.function(mean, *f)

    def expand(self) -> Tensor:
        """(1 + E or E*E,): L(s_ref) - <grad L(s_ref), s_ref>, and grad L(s_ref), of `balance_loss`."""
        E = self.num_experts
        counts, sums = self.reference_totals[:E], self.reference_totals[E:]
        tokens = counts.sum().clamp_min(1) / self.num_experts_per_tok
        sums = sums.to(torch.promote_types(self.router_bias.dtype, torch.float32)) / (FIXED_POINT * tokens)
        mean = (sums.view(E, E) if self.sums_products else sums).requires_grad_()
        with torch.enable_grad():
            value = self.loss_of_mean(mean, counts)
            (slope,) = torch.autograd.grad(value, mean)
        return torch.cat(((value - (slope * mean).sum()).view(1), slope.flatten())).detach()

    @torch.no_grad()
    def accumulate(self, auxiliary: RouterAuxiliary) -> None:
        """Add one training forward to the totals, and keep its balance loss for `get_auxiliary_loss`."""
        self.step_totals += auxiliary.totals
        self._auxiliary_loss = auxiliary.balance_loss

    def get_auxiliary_loss(self) -> Tensor:
        """Balance loss () of the last training forward, differentiable, without coefficient; at first 0."""
        return self.router_bias.new_zeros(()) if self._auxiliary_loss is None else self._auxiliary_loss

    def get_usage_counts(self) -> Tensor:
        """Rows of each expert in training since the last reset, (E,) int64; in an open step, this rank's."""
        return self.usage_counts + self.step_totals[1 : 1 + self.num_experts]

    def reset_usage_counts(self) -> None:
        """Set the usage to zero. Training does not change, because update_router uses other totals."""
        for totals in (self.usage_counts, self.usage_entropy, self.step_totals[: 1 + self.num_experts]):
            totals.zero_()

    def last_step_counts(self) -> Tensor:
        """Rows of each expert in the last finished optimizer step on all ranks, (E,) int64."""
        return self.reference_totals[: self.num_experts].clone()

    def step_usage(self, totals: Tensor) -> Tensor:
        """(1 + E,) fp32 of a step's totals: the entropy of the probabilities, nats, mean over tokens (NaN
        without tokens), and the rows of each expert."""
        counts = totals[1 : 1 + self.num_experts]
        entropy = totals[:1] / (FIXED_POINT * counts.sum() / self.num_experts_per_tok)
        return torch.cat((entropy, counts.to(entropy.dtype)))

    def usage_statistics(self, step: Tensor) -> ExpertUsage:
        """Usage since the last reset. step: `step_totals` of this rank, or summed over ranks."""
        counts = self.usage_counts + step[1 : 1 + self.num_experts]
        rows = counts.sum().clamp_min(1)
        share = counts / rows
        load = share * self.num_experts
        entropy = (self.usage_entropy + step[:1])[0] / (FIXED_POINT * rows / self.num_experts_per_tok)
        return ExpertUsage(counts, share, load.max(), (load < STARVED_BELOW).float().mean(), entropy)

    @torch.no_grad()
    def update_router(self, reduced: Tensor) -> None:
        """Close an optimizer step, given `step_totals` summed over ranks: add to the usage, set the balance
        loss's reference, move the router bias by rate * sign(mean count - count) (2408.15664). A second call
        without a token in between changes nothing."""
        E = self.num_experts
        self.usage_entropy += reduced[:1]
        self.usage_counts += reduced[1 : 1 + E]
        step = reduced[1 + E :]
        counts = step[:E]
        self.reference_totals.copy_(torch.where(counts.sum() > 0, step, self.reference_totals))
        if self.router_bias_update_rate > 0:
            self.router_bias += self.router_bias_update_rate * torch.sign(counts.sum() - E * counts)
        self.step_totals.zero_()
        self.expansion = None if self.loss_type is None else self.expand()


# -----------------------------------------------------------------------------
# All layers of a model


def sum_totals(layers: list[MoE]) -> tuple[Tensor, ...]:
    """Every layer's `step_totals`, summed over the ranks by a single collective."""
    if not layers:
        return ()
    totals = torch.cat([layer.step_totals for layer in layers])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    return totals.split([layer.step_totals.numel() for layer in layers])


def update_routers(layers: list[MoE], totals: tuple[Tensor, ...] | None = None) -> None:
    """Close the optimizer step in every layer, with all ranks' totals.

    Every rank must call it before every step's first forward, and must not call it between micro-steps.
    totals: what `sum_totals` has returned since the last backward; None: this function calls it.
    """
    totals = sum_totals(layers) if totals is None else totals
    for layer, step in zip(layers, totals, strict=True):
        layer.update_router(step)


def expert_usage(layers: list[MoE], reduce: bool = True) -> list[ExpertUsage]:
    """Usage of every layer since its last reset. reduce: on all ranks, by a collective. Changes nothing."""
    totals = sum_totals(layers) if reduce else [layer.step_totals for layer in layers]
    return [layer.usage_statistics(step) for layer, step in zip(layers, totals, strict=True)]
