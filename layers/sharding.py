"""This rank's part of a tensor that several ranks share (DTensor). A plain tensor is one whole part."""

import math
from collections.abc import Sequence

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a shared tensor, differentiable; a plain tensor unchanged. Of a sparse gradient,
    whose other rows are 0, the rows that it has."""
    if tensor.is_sparse:
        return tensor.values()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_ranges(tensor: Tensor) -> tuple[range, ...]:
    """For each dimension, the indices of the whole tensor that `local` returns."""
    ranges, mesh = [range(size) for size in tensor.shape], getattr(tensor, "device_mesh", None)
    for mesh_dim in reversed(range(mesh.ndim)) if mesh is not None else ():  # the last was cut first
        dim = tensor.placements[mesh_dim].dim
        size = math.ceil(len(ranges[dim]) / mesh.size(mesh_dim))  # as torch.chunk: the last may be less
        ranges[dim] = ranges[dim][mesh.get_local_rank(mesh_dim) * size :][:size]
    return tuple(ranges)


def dimension_to_shard(shape: Sequence[int], ranks: int) -> int:
    """The dimension in which FSDP cuts stacked experts (E, ...): the first that ranks divides, or else 0."""
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)  # FSDP pads only dimension 0
