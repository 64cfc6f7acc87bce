"""Where the training runs: device, process group, wrapping of the model. The loop does not know which is in
use.

One process (python), many (torchrun, or RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set by hand).
NCCL on CUDA, gloo elsewhere.

References: DistributedDataParallel,
https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
"""

import inspect
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=10)  # a collective that waits longer means that a rank is lost


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 .. size - 1, its rank on its own machine, its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_master(self) -> bool:
        """Whether this process prints, logs and saves."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place; the tensor itself in a single process."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`, or with "" the best one there is: CUDA, then MPS, then CPU.

    ValueError, with the reason, for a device that this machine or this torch does not have.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is no device: use cuda, cuda:N, mps or cpu") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device={name!r}, but torch {torch.__version__} finds no CUDA here; use --device cpu"
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} wants GPU {index}, but there are {torch.cuda.device_count()}; "
                "start at most as many processes per machine as it has GPUs (--nproc_per_node)"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps', but this machine or this torch has no MPS; use --device cpu")
    return device


def start(device: str = "", parallel: str = "ddp") -> World:
    """Join the process group, if there is one, and choose the device.

    ValueError for an environment that is only partly set, or parallel="none" with more than one process.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if not ("RANK" in given or "WORLD_SIZE" in given):
        return World(0, 0, 1, choose_device(device, 0))
    if len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ValueError(
            f"{', '.join(given)} set in the environment, but not {missing}; set all of them, or none"
        )
    rank, local_rank, size = (int(os.environ[name]) for name in names[:3])
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} must lie in 0..WORLD_SIZE-1={size - 1}")
    if parallel == "none" and size > 1:
        raise ValueError(f"parallel=none is for one process, but WORLD_SIZE={size}; use --parallel ddp")
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    # With device_id NCCL connects at once, so that a rank that cannot be reached fails here and not at step
    # 1.
    device_id = chosen if chosen.type == "cuda" else None
    store = meet(rank, size)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id
    )
    return World(rank, local_rank, size, chosen)


def meet(rank: int, size: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, under a prefix that only the processes of this start know.

    torchrun keeps its store when it starts all processes again (--max-restarts), and in it the addresses of
    the processes that have died; whoever found one of those would wait for it in vain
    (https://github.com/pytorch/pytorch/issues/135712). Rank 0 therefore answers each rank's new random
    greeting with a new prefix, until every rank has thanked it: old greetings may be answered, but no one
    thanks for that.
    """
    launcher_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and not launcher_has_it
    store = dist.TCPStore(address, port, size, hosts, TIMEOUT, wait_for_workers=False)
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"greeting of {rank}", mine)
        prefix = store.get(f"answer to {mine}").decode()  # waits
        store.set(f"thanks of {rank} for {prefix}", "")
        return dist.PrefixStore(prefix, store)
    missing, end = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise ValueError(
                f"rank {min(missing)} of WORLD_SIZE={size} has not come; start as many processes"
            )
        for other in sorted(missing):
            if store.check([f"greeting of {other}"]):
                store.set(f"answer to {store.get(f'greeting of {other}').decode()}", mine)
            if store.check([f"thanks of {other} for {mine}"]):
                missing.remove(other)
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The module whose forward the loop calls: the model itself, or DDP around it."""
    if world.size == 1:
        return model
    # The routers reduce their own statistics; a broadcast of rank 0's buffers would overwrite them.
    newer_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if newer_name else "broadcast_buffers": False},
    )


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients over the ranks: only the last micro-step has to.

    DDP looks at the flag in forward, so it is set before it (no_sync() would want the forward inside it too).
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
