"""Muon for the matrices of the blocks and AdamW for all other parameters, as one optimizer.

Muon replaces the momentum of a matrix by the nearest (semi-)orthogonal matrix, so that an update moves all
directions by the same amount. Newton-Schulz iterations approximate that matrix with matrix products alone.
Learning rate: an orthogonal (r, c) matrix has a root mean square of 1/sqrt(max(r, c)). Multiplied by
0.2 sqrt(max(r, c)) it has 0.2, as AdamW's updates have. Muon and AdamW thus share learning rate, schedule
and weight decay (Moonlight, section 2.2). Each process orthogonalises its share of the matrices (5 iterations
of 4 r r c + 2 r r r FLOPs per matrix, r <= c), and an all-gather distributes the results.
References: https://kellerjordan.github.io/posts/muon/; Moonlight, arXiv 2502.16982; AdamW, 1711.05101."""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from layers.mlp import get_activation
from layers.roles import parameter_groups
from layers.sharding import local

# Coefficients of a x + b x^3 + c x^5. Five rounds drive singular values of 0.003 .. 1 to 0.7 .. 1.2 (Jordan).
QUINTIC = (3.4445, -4.7750, 2.0315)
ADAMW_RMS = 0.2  # root mean square of AdamW's updates, in units of the learning rate (Moonlight)


@functools.cache
def has_fast_bf16(device_type: str) -> bool:
    """Whether bf16 makes matrix products several times faster: on CUDA, and on CPUs known to have AMX."""
    if device_type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities().get("amx_bf16", False)
    return device_type == "cuda"


def newton_schulz(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly orthogonal matrices with the singular vectors of `matrices` (n, r, c), r <= c; zeros stay."""
    a, b, c = QUINTIC
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-12)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT  # (n, r, r)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)  # (n, r, c)
    return x


def shared_newton_schulz(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """newton_schulz of (n, r, c), divided among the processes; all processes get the same bits."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return newton_schulz(matrices, steps)
    share = math.ceil(len(matrices) / size)
    mine = matrices[dist.get_rank() * share :][:share]
    padded = matrices.new_zeros(share, *matrices.shape[1:])  # the last ranks may have fewer, or none
    padded[: len(mine)] = newton_schulz(mine, steps)
    gathered = matrices.new_empty(size * share, *matrices.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered[: len(matrices)]


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups with method="muon" or "adamw", lr and weight_decay. A Muon group also has row_blocks,
    as row_blocks() returns them, and replicated: whether all processes hold the same parameters and share the
    work. A matrix whose gradient is zero (an expert without tokens) stays unchanged: its momentum would move
    it as far as a real gradient. ValueError unless there are 2 or 3 dimensions; for a replicated DTensor."""

    def __init__(self, param_groups: list[dict], lr: float, weight_decay: float = 0.1,
                 betas: tuple[float, float] = (0.9, 0.95), fused: bool = False):  # fmt: skip
        muon = dict(momentum=0.95, steps=5, row_blocks=None, replicated=True)
        defaults = {"muon": muon, "adamw": dict(betas=betas, eps=1e-8, fused=fused)}
        for group in param_groups:
            if group.get("method") not in defaults:
                raise ValueError(f"method={group.get('method')!r} of a group: choose muon or adamw")
        groups = [defaults[group["method"]] | group for group in param_groups]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))
        for group in self.param_groups:
            for parameter in group["params"] if group["method"] == "muon" else []:
                if group["replicated"] and isinstance(parameter.data, DTensor):
                    raise ValueError("Muon needs whole matrices, but these are sharded; use optimizer=adamw")
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon is for matrices, not for shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; returns the closure's loss, if there is a closure."""
        with torch.enable_grad():
            loss = closure() if closure else None
        self._muon_step([group for group in self.param_groups if group["method"] == "muon"])
        for group in [group for group in self.param_groups if group["method"] == "adamw"]:
            self._adamw_step(group)
        return loss

    def _muon_step(self, groups: list[dict]) -> None:
        """Matrices of one shape are stacked: one batched product instead of many small ones."""
        stacks: dict[tuple, list[tuple]] = {}
        for group in groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                blocks = group["row_blocks"] or [parameter.size(-2)]
                parts = (local(parameter), local(parameter.grad), self._momentum(parameter, group))
                for weight, grad, update in zip(*(t.split(blocks, dim=-2) for t in parts), strict=True):
                    weight, grad, update = (t if t.dim() == 3 else t[None] for t in (weight, grad, update))
                    alive = (grad != 0).any(-1, keepdim=True).any(-2, keepdim=True)  # (n, 1, 1)
                    update = update.mT if update.size(-2) > update.size(-1) else update  # (n, r, c), r <= c
                    key = (*update.shape[1:], update.dtype, group["steps"], group["replicated"])
                    stacks.setdefault(key, []).append((weight, alive, update, group))
        for (_, columns, _, steps, replicated), stack in stacks.items():
            weights, _, updates, _ = zip(*stack, strict=True)
            orthogonalise = shared_newton_schulz if replicated else newton_schulz
            updates = orthogonalise(torch.cat(updates), steps)  # (n, r, c)
            updates = updates.mul_(ADAMW_RMS * math.sqrt(columns)).split([len(weight) for weight in weights])
            for (weight, alive, _, group), update in zip(stack, updates, strict=True):
                update = update if update.shape == weight.shape else update.mT
                update = update.to(weight.dtype) + group["weight_decay"] * weight
                weight.sub_(alive * update, alpha=group["lr"])

    def _momentum(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        """Nesterov's momentum of the gradient; fp32 becomes bf16 for Newton-Schulz where that is fast."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        grad, buffer = local(parameter.grad), local(state["momentum_buffer"])
        update = grad.lerp(buffer.lerp_(grad, 1 - group["momentum"]), group["momentum"])
        in_bf16 = update.dtype == torch.float32 and has_fast_bf16(update.device.type)
        return update.bfloat16() if in_bf16 else update

    def _adamw_step(self, group: dict) -> None:
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in params:
            if not self.state[parameter]:
                step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=step, **moments)
        states = [self.state[parameter] for parameter in params]
        averages, squares, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        settings = {name: group[name] for name in ("fused", "lr", "eps", "weight_decay")}
        settings |= dict(amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1])
        adamw(params, [parameter.grad for parameter in params], averages, squares, [], steps, **settings)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; ValueError for the state of another optimizer or of other parameter groups."""
        theirs = [(group.get("method"), len(group["params"])) for group in state_dict["param_groups"]]
        ours = [(group["method"], len(group["params"])) for group in self.param_groups]
        if theirs != ours:
            mend = "resume with the same --optimizer, or start afresh with --init_from"
            raise ValueError(f"saved groups (method, parameters) are {theirs}, here {ours}; {mend}")
        super().load_state_dict(state_dict)


def configure_muon(model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                   device_type: str, router_lr_mult: float = 1.0, expert_lr_mult: float = 1.0,
                   expert_parallel: bool = False) -> MuonAdamW:  # fmt: skip
    """MuonAdamW for a GPT, as GPT.configure_optimizers. expert_parallel: processes hold different experts."""

    def details(name, parameter, role):
        if not role.is_matrix:
            return "", dict(method="adamw")
        blocks = row_blocks(name, parameter, model.config)
        alone = expert_parallel and role.lr_group == "experts"
        ending = " matrices" + (f" in blocks of {blocks} rows" if blocks else "")
        return ending, dict(method="muon", row_blocks=blocks, replicated=not alone)

    settings = (weight_decay, learning_rate, router_lr_mult, expert_lr_mult)
    groups = parameter_groups(model.named_parameters(), *settings, details)
    groups.sort(key=lambda group: group["name"])
    return MuonAdamW(groups, learning_rate, weight_decay, betas, fused=device_type in ("cuda", "cpu"))


def row_blocks(name: str, parameter: torch.Tensor, config) -> list[int] | None:
    """Rows of the matrices that a parameter stacks in dimension -2 (q, k, v; gate, up); None: it is one."""
    if name.endswith("c_attn.weight"):
        kv = (config.n_kv_head or config.n_head) * (config.n_embd // config.n_head)
        return [config.n_embd, kv, kv]
    parts = get_activation(config.activation).parts
    if parts > 1 and name.endswith(("c_fc.weight", "experts.c_fc")):
        return [parameter.size(-2) // parts] * parts
    return None
