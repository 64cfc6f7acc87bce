"""Expert parallelism: ranks share the experts of a layer, and send each other the rows routed to them.

    moe.exchange = Exchange(group)      # parallel.py does it: --ep_size n

Of a group of W ranks, each holds E/W experts of every layer, and has tokens of its own. Between the stages
"dispatch" and "experts" of mixture_of_experts.py:

    1. the rows, sorted by expert and so by the rank that holds it, go there: an all-to-all in which every
       pair of ranks exchanges as many rows as were routed (the numbers are exchanged first)
    2. each rank sorts what has arrived by its experts, and runs these
    3. the results go back the same way, and are weighted and added where the tokens came from

Dropless as in one process, and the same numbers. While rows are under way the shared experts are computed, in
the backward pass as well. Per layer, forward and backward each move 2 R C elements away from a rank, of which
the share (W-1)/W leaves it.

References: GShard, arXiv 2006.16668; DeepSpeed-MoE, arXiv 2201.05596; dropless, MegaBlocks, arXiv 2211.15841.
Letters as in mixture_of_experts.py: M rows, R = M*K routed rows, C channels, E experts, W ranks.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from layers.experts import Experts, Gather, dispatch


class Trip:
    """An all-to-all of rows that has been begun: leave[w] rows to rank w, arrive[w] from it."""

    def __init__(self, group: dist.ProcessGroup, leave: list[int], arrive: list[int]):
        self.group, self.leave, self.arrive = group, leave, arrive
        self.work, self.rows, self.received = None, None, None

    def begin(self, rows: Tensor, back: bool = False) -> Tensor:
        """Send rows, or with back=True the gradients of what had arrived; returns where rows will come in."""
        leave, arrive = (self.arrive, self.leave) if back else (self.leave, self.arrive)
        self.rows = rows.contiguous()  # kept until they have left
        self.received = rows.new_empty(sum(arrive), rows.shape[1])
        self.work = dist.all_to_all_single(
            self.received, self.rows, arrive, leave, group=self.group, async_op=True
        )
        return self.received

    def end(self) -> Tensor:
        """Wait until all rows are here."""
        self.work.wait()
        received, self.work, self.rows, self.received = self.received, None, None, None
        return received


class Depart(torch.autograd.Function):
    """Begin a trip forwards; in the backward pass, end the gradients'. Returns memory yet to be filled."""

    @staticmethod
    def forward(ctx, rows, trip):
        ctx.trip = trip
        return trip.begin(rows)

    @staticmethod
    def backward(ctx, _):
        return ctx.trip.end(), None


class Arrive(torch.autograd.Function):
    """End a trip forwards; in the backward pass, begin the gradients'. What autograd runs between the two are
    the gradients of what was computed between departure and arrival."""

    @staticmethod
    def forward(ctx, rows, trip):
        ctx.trip = trip
        trip.end()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        ctx.trip.begin(grad, back=True)
        return grad, None  # `Depart` takes the gradients from the trip; this one only has the right shape


class Exchange:
    """Stages 3 and 4 of an MoE layer whose experts are shared by the ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size = group, dist.get_world_size(group)

    def __deepcopy__(self, memo):
        return self  # a process group cannot be copied

    @torch.compiler.disable  # the numbers of rows are known on the host only after an exchange
    def __call__(
        self, experts: Experts, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, meanwhile: Callable
    ) -> tuple[Tensor, Tensor | None]:
        """(y (M, C), what meanwhile() returns), given x (M, C), weights (M, K), order (R,) and ends (E,).

        A collective: all ranks of the group run the same layers in the same order, whatever their M. Reads
        the numbers of rows on the host.
        """
        (M, K), device = weights.shape, x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        slots = torch.arange(M * K, device=x.device)
        position = torch.empty_like(order).scatter_(0, order, slots)  # (R,) from slot to sorted row
        counts = ends.long().diff(prepend=ends.new_zeros(1))  # (E,)
        arriving = torch.empty_like(counts)  # (W * E/W,) from each rank for each expert here
        dist.all_to_all_single(arriving, counts, group=self.group)
        leave, arrive = torch.stack([counts, arriving]).view(2, self.size, -1).sum(2).tolist()

        there = Trip(self.group, leave, arrive)
        rows = Depart.apply(Gather.apply(x, order // K, position), there)
        other = meanwhile()
        rows = Arrive.apply(rows, there)  # (rows here, C)

        here = len(counts) // self.size
        expert = torch.arange(here, device=x.device).repeat(self.size)
        expert = expert.repeat_interleave(arriving, output_size=sum(arrive))
        y = experts(rows, weights.new_ones(len(rows), 1), *dispatch(expert[:, None], here))

        back = Trip(self.group, arrive, leave)
        y = Arrive.apply(Depart.apply(y, back), back)  # (R, C)
        y = Gather.apply(y, position, order).view(M, K, y.shape[1])  # in the order of the slots
        return torch.bmm(weights[:, None].to(y.dtype), y)[:, 0], other
