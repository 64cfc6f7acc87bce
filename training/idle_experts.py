"""Idle experts: experts without a gradient in an optimizer step. The optimizer must not change them."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from layers.sharding import local, local_ranges
from mixture_of_experts import MoE


@torch.no_grad()
def idle_experts(layers: list[MoE], counts: np.ndarray) -> tuple[list[list[int]], torch.Tensor | None]:
    """For each layer, the experts without rows in a step; and a table, True (layers, E) where one of them has
    a gradient nevertheless: ignored labels do not count in the usage. None if there are no such experts.
    counts (layers, E): rows of the step on all ranks. A collective; it does not wait for the device."""
    idle = [[e for e, count in enumerate(row) if count == 0] for row in counts]
    if not any(idle):
        return idle, None
    learns = layers[0].usage_counts.new_zeros(counts.shape)
    for number, layer in enumerate(layers):
        for parameter in layer.experts.parameters():
            rows = local_ranges(parameter)[0]
            for e in idle[number] if parameter.grad is not None else ():
                if e in rows:
                    learns[number, e] += local(parameter.grad)[rows.index(e)].any()
    mesh = getattr(next(layers[0].experts.parameters()), "device_mesh", None)
    for group in mesh.get_all_groups() if mesh is not None else ():
        dist.all_reduce(learns, group=group)
    return idle, learns > 0


@contextlib.contextmanager
def freeze_idle_experts(
    layers: list[MoE], optimizer: torch.optim.Optimizer, counts: np.ndarray
) -> Iterator[None]:
    """Around optimizer.step(): restore experts that have neither rows (counts, as above) nor a gradient, and
    their moments. AdamW would shrink them (by a tenth in 1,000 steps, usually), and old moments would move
    them."""
    states = getattr(optimizer, "optim", optimizer).state  # ZeroRedundancyOptimizer wraps the real one
    kept, (idle, learns) = [], idle_experts(layers, counts)
    for number, (layer, experts) in enumerate(zip(layers, idle, strict=True)):
        for parameter in layer.experts.parameters() if experts else ():
            rows = local_ranges(parameter)[0]
            moments = [m for m in states.get(parameter, {}).values() if torch.is_tensor(m)]
            for tensor in (parameter.detach(), *(m for m in moments if m.shape == parameter.shape)):
                mine = [(local(tensor)[rows.index(e)], learns[number, e]) for e in experts if e in rows]
                kept += [(row, row.clone(), learnt) for row, learnt in mine]
    yield
    for place, value, learnt in kept:
        place.copy_(torch.where(learnt, place, value))
