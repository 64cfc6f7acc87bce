"""Muon for the matrices of the blocks, AdamW (Adagrad for n-grams) for the rest, as one optimizer.

Muon replaces the momentum of a matrix by the nearest (semi-)orthogonal matrix, so that an update moves all
directions by the same amount. Newton-Schulz iterations approximate that matrix with matrix products alone.
Learning rate: an orthogonal (r, c) matrix has a root mean square of 1/sqrt(max(r, c)). Multiplied by
0.2 sqrt(max(r, c)) it has 0.2, as AdamW's updates have. Muon and AdamW thus share learning rate, schedule
and weight decay (Moonlight, section 2.2).

One iteration costs 4 r r c + 2 r r r FLOPs per matrix, r <= c. Therefore one rank owns each matrix, and alone
orthogonalises it. Of P elements in matrices, each of W ranks sends per step (fp32; bf16, on CUDA, is half):
    ddp     4 P (W-1)/W bytes: every rank has all momenta, and an all-gather distributes the results
    fsdp    8 P (W-1)/W/W bytes: every rank has its part of each momentum. For each shape, one all-to-all
            brings the parts of the matrices to their owners, and another the parts of the results back
    zero    0 bytes: only the owner has the momentum; ZeRO sends all weights after the step, as for AdamW
    ep      0 bytes for experts: they are whole where they are, unless fsdp cuts them
References: https://kellerjordan.github.io/posts/muon/; Moonlight, arXiv 2502.16982, whose section 2.3 divides
the momenta; AdamW, 1711.05101; Adagrad, Duchi et al., JMLR 12, 2011."""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from layers.mlp import get_activation
from layers.roles import parameter_groups, role_of
from layers.sharding import local

# Coefficients of a x + b x^3 + c x^5. Five rounds drive singular values of 0.003 .. 1 to 0.7 .. 1.2 (Jordan).
QUINTIC = (3.4445, -4.7750, 2.0315)
# Adagrad's learning rate relative to the others'. Its steps become shorter with each gradient of a row.
ADAGRAD_LR_MULT = 4.0
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


class Owners:
    """Which ranks orthogonalise `count` matrices (count, r, c), where `parameter` has some of them.
    replicated: all ranks have all plain parameters. turn: the rank whose share is rounded up first."""

    def __init__(self, parameter: torch.Tensor, count: int, replicated: bool, turn: int):
        self.group, self.dim = None, None  # the ranks that share the matrices; the dimension that they cut
        if isinstance(parameter, DTensor):
            for mesh_dim, placement in enumerate(parameter.placements):
                if (dim := placement.dim - parameter.dim()) in (-2, -1):  # else every rank has whole matrices
                    self.group, self.dim = parameter.device_mesh.get_group(mesh_dim), dim
        elif replicated and dist.is_initialized():
            self.group = dist.group.WORLD
        ranks = dist.get_world_size(self.group) if self.group else 1
        self.rank = dist.get_rank(self.group) if self.group else 0
        self.counts = [count // ranks + ((rank - turn) % ranks < count % ranks) for rank in range(ranks)]
        self.shape = parameter.shape[-2:]  # (r, c)
        size = self.shape[self.dim or 0]
        part = math.ceil(size / ranks)  # as torch.chunk: the last ranks may have less, or nothing
        self.sizes = [len(range(size)[rank * part :][:part]) for rank in range(ranks)]

    def gather(self, parts: torch.Tensor) -> torch.Tensor:
        """This rank's own matrices (n, r, c), from its parts of all matrices, or from all matrices."""
        if self.dim is None:
            return parts.split(self.counts)[self.rank]
        whole = parts.new_empty(self.counts[self.rank], *self.shape).split(self.sizes, self.dim)
        return torch.cat(self._exchange(parts.split(self.counts), [part.shape for part in whole]), self.dim)

    def scatter(self, whole: torch.Tensor) -> torch.Tensor:
        """The inverse of gather: this rank's parts of all ranks' matrices, or all matrices."""
        if self.dim is not None:
            parts = whole.split(self.sizes, self.dim)
            shape = parts[self.rank].shape[1:]
            return torch.cat(self._exchange(parts, [torch.Size((n, *shape)) for n in self.counts]))
        if len(self.counts) == 1:
            return whole
        padded = whole.new_zeros(max(self.counts), *self.shape)  # an all-gather needs equal sizes
        padded[: len(whole)] = whole
        gathered = whole.new_empty(len(self.counts) * len(padded), *self.shape)
        dist.all_gather_into_tensor(gathered, padded, self.group)
        shares = zip(gathered.split(len(padded)), self.counts, strict=True)
        return torch.cat([share[:n] for share, n in shares])

    def _exchange(self, parts: Sequence[torch.Tensor], shapes: list[torch.Size]) -> list[torch.Tensor]:
        """Send one tensor to each rank, and receive one of a given shape from each."""
        received = parts[0].new_empty(sum(shape.numel() for shape in shapes))
        sizes = [shape.numel() for shape in shapes]
        sent = torch.cat([part.flatten() for part in parts])
        dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=self.group)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups with a method, as method_of() tells it, lr and weight_decay. A Muon group also has
    row_blocks, as row_blocks() returns them, and replicated: whether all ranks update the same plain
    parameters, and so can share the work. Its parameters have 2 or 3 dimensions."""

    def __init__(self, param_groups: list[dict], lr: float, weight_decay: float = 0.1,
                 betas: tuple[float, float] = (0.9, 0.95), fused: bool = False):  # fmt: skip
        muon = dict(momentum=0.95, steps=5, row_blocks=None, replicated=True)
        defaults = {"muon": muon, "adamw": dict(betas=betas, eps=1e-8, fused=fused),
                    "adagrad": dict(eps=1e-10)}  # fmt: skip
        groups = [defaults[group["method"]] | group for group in param_groups]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; returns the closure's loss, if there is a closure."""
        with torch.enable_grad():
            loss = closure() if closure else None
        self._muon_step([group for group in self.param_groups if group["method"] == "muon"])
        for group in self.param_groups:
            if group["method"] == "adamw":
                self._adamw_step(group)
            elif group["method"] == "adagrad":
                self._adagrad_step(group)
        return loss

    def _muon_step(self, groups: list[dict]) -> None:
        """Parameters of one shape are one stack: the number of kernels does not grow with the depth."""
        turn, stacks, jobs = 0, defaultdict(list), []
        for group in groups:
            alike = defaultdict(list)
            for parameter in (p for p in group["params"] if p.grad is not None):
                alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                updates = self._momentum(parameters, group)  # (M, r, c): of each matrix what this rank has
                owners = Owners(parameters[0], len(updates), group["replicated"], turn)
                turn += len(updates) if owners.group else 0
                mine = owners.gather(updates)
                jobs.append((group, parameters, owners, mine))
                for block in mine.split(group["row_blocks"] or [mine.size(-2)], dim=-2):
                    wide = block.mT if block.size(-2) > block.size(-1) else block  # (n, r, c), r <= c
                    stacks[wide.shape[1:], wide.dtype, group["steps"]].append(wide)
        for ((_, columns), _, steps), wide in stacks.items():
            updates = newton_schulz(torch.cat(wide), steps).mul_(ADAMW_RMS * math.sqrt(columns))
            torch._foreach_copy_(wide, updates.split([len(matrices) for matrices in wide]))  # into `mine`
        for group, parameters, owners, mine in jobs:
            weights = [local(parameter) for parameter in parameters]
            updates = owners.scatter(mine).to(weights[0].dtype).view(len(weights), *weights[0].shape)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"])

    def _momentum(self, parameters: list[torch.Tensor], group: dict) -> torch.Tensor:
        """Nesterov's momentum of the gradients, (M, r, c) for all matrices of the parameters together. fp32
        becomes bf16 for Newton-Schulz where that is fast."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        grads = [local(parameter.grad) for parameter in parameters]
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).flatten(0, -3)
        in_bf16 = updates.dtype == torch.float32 and has_fast_bf16(updates.device.type)
        return updates.bfloat16() if in_bf16 else updates

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

    def _adagrad_step(self, group: dict) -> None:
        """Adagrad leaves rows without a gradient as they are, so the rows of a sparse gradient suffice."""
        for parameter in (p for p in group["params"] if p.grad is not None):
            if not self.state[parameter]:
                self.state[parameter]["sum"] = torch.zeros_like(parameter)
            weight, total, grad = map(local, (parameter, self.state[parameter]["sum"], parameter.grad))
            if not parameter.grad.is_sparse:
                total.addcmul_(grad, grad)
                weight.addcdiv_(grad, total.sqrt().add_(group["eps"]), value=-group["lr"])
                continue
            rows = parameter.grad.indices()[0]
            squares = total.index_select(0, rows).addcmul_(grad, grad)
            total.index_copy_(0, rows, squares)
            weight.index_add_(0, rows, grad / squares.sqrt_().add_(group["eps"]), alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; ValueError for the state of another optimizer or of other parameter groups."""
        theirs = [(group.get("method"), len(group["params"])) for group in state_dict["param_groups"]]
        ours = [(group["method"], len(group["params"])) for group in self.param_groups]
        if theirs != ours:
            mend = "resume with the same --optimizer, or start afresh with --init_from"
            raise ValueError(f"saved groups (method, parameters) are {theirs}, here {ours}; {mend}")
        super().load_state_dict(state_dict)


def method_of(name: str, experts: bool = True, adagrad_ngrams: bool = False) -> str:
    """What updates the parameter of this name: "muon", "adagrad" or "adamw". experts: Muon updates the routed
    experts, too. adagrad_ngrams: Adagrad updates the n-gram table."""
    role = role_of(name)
    if role.is_matrix and (experts or role.lr_group != "experts"):
        return "muon"
    return "adagrad" if adagrad_ngrams and ".ngrams." in name else "adamw"


def configure_muon(model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                   device_type: str, router_lr_mult: float = 1.0, expert_lr_mult: float = 1.0,
                   replicated: bool = True, steps: int = 5, experts: bool = True,
                   adagrad_ngrams: bool = False) -> MuonAdamW:  # fmt: skip
    """MuonAdamW for a GPT, as GPT.configure_optimizers. replicated=False: for ZeRO, where each rank updates
    other parameters. steps: of Newton-Schulz. experts, adagrad_ngrams: as for method_of(). With Adagrad, in a
    single process on a CPU, the gradients of the n-gram table become sparse."""
    if adagrad_ngrams and model.config.ngram_order and device_type == "cpu" and not dist.is_initialized():
        model.transformer.ngrams.use_sparse_gradients()

    def details(name, parameter, role):
        method = method_of(name, experts, adagrad_ngrams)
        if method == "adagrad":
            rate = dict(lr=ADAGRAD_LR_MULT * learning_rate, lr_mult=ADAGRAD_LR_MULT)
            return " n-grams", dict(method=method, **rate)
        if method == "adamw":
            return "", dict(method=method)
        blocks = row_blocks(name, parameter, model.config)
        ending = " matrices" + (f" in blocks of {blocks} rows" if blocks else "")
        return ending, dict(method=method, row_blocks=blocks, replicated=replicated, steps=steps)

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
