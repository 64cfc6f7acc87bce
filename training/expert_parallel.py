"""Expert parallelism: ranks share the experts of a layer, and send each other the rows of these experts.

Each of the W ranks of a group holds E/W experts of every layer, and has different tokens. Between the stages
"dispatch" and "experts" of mixture_of_experts.py:
    1. a small all-to-all exchanges the counts, then a large one sends each row to the rank of its expert;
       meanwhile, in the backward pass too, the layer computes the shared experts
    2. each rank sorts the rows that it received by expert, and runs its experts on them
    3. a second all-to-all sends the results back, where they are weighted and added up
References: GShard, arXiv 2006.16668; DeepSpeed-MoE, arXiv 2201.05596; dropless, MegaBlocks, arXiv 2211.15841.
Letters as in mixture_of_experts.py: N tokens, R routed rows, C channels, E experts; W ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from layers.experts import Experts, Routing, TakeRows, combine, dispatch


class AllToAll:
    """An all-to-all of rows: send_counts[w] rows go to rank w, receive_counts[w] come from it."""

    def __init__(self, group: dist.ProcessGroup, send_counts: list[int], receive_counts: list[int]):
        self.group, self.counts = group, (send_counts, receive_counts)

    def start(self, rows: Tensor, backward: bool = False) -> Tensor:
        """Start sending rows, or the gradients of received rows back. Returns a tensor that `wait` fills."""
        send, receive = reversed(self.counts) if backward else self.counts
        self.sent = rows.contiguous()  # must stay in memory until it is sent
        self.received = rows.new_empty(sum(receive), rows.shape[1])
        self.work = dist.all_to_all_single(self.received, self.sent, receive, send, self.group, async_op=True)
        return self.received

    def wait(self) -> Tensor:
        """Wait for the all-to-all, and return the received rows."""
        self.work.wait()
        received, self.work, self.sent, self.received = self.received, None, None, None
        return received


class AllToAllStart(torch.autograd.Function):
    """Start an all-to-all; AllToAllWait waits for the result. The backward pass waits for the gradients."""

    @staticmethod
    def forward(ctx, rows, all_to_all):
        ctx.all_to_all = all_to_all
        return all_to_all.start(rows)

    @staticmethod
    def backward(ctx, _):
        return ctx.all_to_all.wait(), None


class AllToAllWait(torch.autograd.Function):
    """Wait for an all-to-all. The backward pass starts the gradients' all-to-all and does not wait."""

    @staticmethod
    def forward(ctx, rows, all_to_all):
        ctx.all_to_all = all_to_all
        all_to_all.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        ctx.all_to_all.start(grad, backward=True)
        return grad, None  # a placeholder of the right shape: AllToAllStart ignores it


class Exchange:
    """Stages 3 and 4 of an MoE layer whose experts are shared by the ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size = group, dist.get_world_size(group)

    def __deepcopy__(self, memo):
        return self  # a process group cannot be copied

    @torch.compiler.disable  # the numbers of rows are known on the host only after an exchange
    def __call__(self, experts: Experts, x: Tensor, routing: Routing, meanwhile: Callable) -> tuple:
        """x (N, C) -> (y (N, C), meanwhile()). A collective; N may differ between ranks."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        counts = routing.counts()  # (E,)
        arriving = torch.empty_like(counts)  # (W * E/W,) from each rank for each expert here
        dist.all_to_all_single(arriving, counts, group=self.group)
        send, receive = torch.stack([counts, arriving]).view(2, self.size, -1).sum(2).tolist()

        there = AllToAll(self.group, send, receive)
        rows = AllToAllStart.apply(TakeRows.apply(x, routing), there)
        other = meanwhile()
        rows = AllToAllWait.apply(rows, there)  # (rows here, C)

        here = len(counts) // self.size  # E/W
        expert = torch.arange(here, device=x.device).repeat(self.size)
        expert = expert.repeat_interleave(arriving, output_size=sum(receive))[:, None]  # (rows here, 1)
        y = experts(rows, dispatch(expert, torch.ones_like(expert, dtype=routing.weight.dtype), here))

        back = AllToAll(self.group, receive, send)
        y = AllToAllWait.apply(AllToAllStart.apply(y, back), back)  # (R, C)
        return combine(y, routing, x.shape[0], weighted=True), other
