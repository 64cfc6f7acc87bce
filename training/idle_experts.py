"""Idle experts: experts without a gradient in an optimizer step. The optimizer must not change them."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from layers.sharding import local, local_ranges
from mixture_of_experts import MoE


@contextlib.contextmanager
def freeze_idle_experts(
    layers: list[MoE], optimizer: torch.optim.Optimizer, counts: np.ndarray
) -> Iterator[None]:
    """Around optimizer.step(): restore experts that have neither rows nor a gradient, and their moments.
    AdamW would shrink them (by a tenth in 1,000 steps, usually), and old moments would move them. Ignored
    labels do not count in the usage, so an expert without rows may have a gradient nevertheless.
    counts (layers, E): rows of the step on all ranks. A collective; it does not wait for the device."""
    states = getattr(optimizer, "optim", optimizer).state  # ZeroRedundancyOptimizer wraps the real one
    kept, mesh, device = [], None, layers[0].usage_counts.device if layers else None
    learns = torch.zeros(counts.shape, dtype=torch.int64, device=device)
    for number, layer in enumerate(layers):
        idle = np.flatnonzero(counts[number] == 0).tolist()
        for parameter in layer.experts.parameters() if idle else ():
            mesh, rows = getattr(parameter, "device_mesh", None), local_ranges(parameter)[0]
            moments = [m for m in states.get(parameter, {}).values() if torch.is_tensor(m)]
            tensors = parameter.detach(), *(m for m in moments if m.shape == parameter.shape)
            for e in [e for e in idle if e in rows]:
                mine = [local(tensor)[rows.index(e)] for tensor in tensors]
                kept += [(row, row.clone(), learns[number, e]) for row in mine]
                if parameter.grad is not None:
                    learns[number, e] += local(parameter.grad)[rows.index(e)].any()
    for group in mesh.get_all_groups() if mesh is not None else ():
        dist.all_reduce(learns, group=group)
    yield
    for place, value, learnt in kept:
        place.copy_(torch.where(learnt > 0, place, value))
