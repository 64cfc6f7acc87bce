"""Idle experts: experts without a gradient in an optimizer step. The optimizer must not change them."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from layers.sharding import local, local_ranges
from mixture_of_experts import MoE


@torch.no_grad()
def idle_experts(layers: list[MoE]) -> list[list[int]]:
    """For each layer, the experts without rows and gradients in the step that `update_routers` closed; a
    collective. An expert may have a gradient but no counted row: ignored labels do not count in the usage."""
    counts = torch.stack([layer.last_step_counts() for layer in layers]).tolist() if layers else []
    idle = [[e for e, count in enumerate(row) if count == 0] for row in counts]
    if not any(idle):
        return idle
    learns = layers[0].usage_counts.new_zeros(len(layers), len(counts[0]))  # (layers, E)
    for number, layer in enumerate(layers):
        for parameter in layer.experts.parameters():
            rows = local_ranges(parameter)[0]
            mine = [e for e in idle[number] if e in rows]
            if mine and parameter.grad is not None:
                grad = local(parameter.grad)[[rows.index(e) for e in mine]]
                learns[number, mine] += (grad != 0).flatten(1).any(1)
    mesh = getattr(next(layers[0].experts.parameters()), "device_mesh", None)
    for group in mesh.get_all_groups() if mesh is not None else ():
        dist.all_reduce(learns, group=group)
    return [[e for e in row if not learnt[e]] for row, learnt in zip(idle, learns.tolist(), strict=True)]


@contextlib.contextmanager
def freeze_idle_experts(layers: list[MoE], optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Around optimizer.step(), after `update_routers`: restore idle experts and their moments. Yields their
    number. AdamW would shrink them (by a tenth in 1,000 steps, usually), and old moments would move them."""
    states = getattr(optimizer, "optim", optimizer).state  # ZeroRedundancyOptimizer wraps the real one
    kept, idle = [], idle_experts(layers)
    for layer, experts in zip(layers, idle, strict=True):
        for parameter in layer.experts.parameters() if experts else ():
            rows = local_ranges(parameter)[0]
            moments = [m for m in states.get(parameter, {}).values() if torch.is_tensor(m)]
            for tensor in (parameter.detach(), *(m for m in moments if m.shape == parameter.shape)):
                mine = [local(tensor)[rows.index(e)] for e in experts if e in rows]
                kept += [(row, row.clone()) for row in mine]
    yield sum(map(len, idle))
    for place, value in kept:
        place.copy_(value)
