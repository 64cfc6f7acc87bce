"""Where the training runs: device, process group, wrapping of the model. The loop does not know which is in
use.

One process (python), many (torchrun, or RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set by hand).
NCCL on CUDA, gloo elsewhere.

References: DistributedDataParallel,
https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
"""

import atexit
import gc
import inspect
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from layers.sharding import dimension_to_shard, local, local_ranges
from mixture_of_experts import MoE
from training.expert_parallel import Exchange
from training.watch import Watch

TIMEOUT = timedelta(minutes=10)  # of collectives, and of the wait for the last rank to come


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 .. size - 1, its rank on its own machine, its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    watch: Watch | None = None  # over the other processes

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

    def lost_rank(self) -> str:
        """After an error: who is lost, if it came of that; "" if all ranks are alive. Takes some seconds."""
        return self.watch.suspect() if self.watch else ""


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`, or with "" the best one there is: CUDA, then MPS, then CPU.

    ValueError, with the reason, for a device that this machine or this torch does not have.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("nothing can be trained there")
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
    """Join the process group, if there is one, and choose the device; ranks watch each other from then on.

    ValueError for an environment that is only partly set or makes no sense, for ranks that do not find each
    other, or parallel="none" with more than one process.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if not ("RANK" in given or "WORLD_SIZE" in given):
        chosen = choose_device(device, 0)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # what asks for no device in particular gets this one
        return World(0, 0, 1, chosen)
    if len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ValueError(
            f"{', '.join(given)} set in the environment, but not {missing}; set all of them, or none"
        )
    rank, local_rank, size, port = (
        whole_number(name, least) for name, least in zip((*names[:3], names[4]), (0, 0, 1, 1), strict=True)
    )
    if rank >= size:
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
    store, watch = meet(rank, size, os.environ["MASTER_ADDR"], port)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id
    )
    watch.start()
    atexit.register(watch.stop)
    return World(rank, local_rank, size, chosen, watch)


def whole_number(name: str, least: int) -> int:
    """The value of an environment variable; ValueError, naming it, if it is no number from `least` up."""
    text = os.environ[name]
    try:
        number = int(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} in the environment: must be a whole number") from error
    if number < least:
        raise ValueError(f"{name}={number} in the environment: must be at least {least}")
    return number


def meet(rank: int, size: int, address: str, port: int) -> tuple[dist.Store, Watch]:
    """The store at address:port, under a prefix that only the processes of this start know, and a watch.

    torchrun keeps its store when it starts all processes again (--max-restarts), and in it the addresses of
    the processes that have died; whoever found one of those would wait for it in vain
    (https://github.com/pytorch/pytorch/issues/135712). Rank 0 therefore answers each rank's new random
    greeting with a new prefix, until every rank has thanked it: old greetings may be answered, but no one
    thanks for that. ValueError where the store cannot be reached, or a rank does not come within TIMEOUT.
    """
    launcher_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    mine = uuid.uuid4().hex
    try:
        store = dist.TCPStore(
            address, port, size, rank == 0 and not launcher_has_it, TIMEOUT, wait_for_workers=False
        )
        prefix = mine
        if rank > 0:
            store.set(f"greeting of {rank}", mine)
            prefix = store.get(f"answer to {mine}").decode()  # waits
        # A connection of its own: one that waits in the main thread would keep the watch waiting too.
        other = dist.TCPStore(address, port, size, False, TIMEOUT, wait_for_workers=False)
        watch = Watch(rank, size, dist.PrefixStore(f"watch {prefix}", other))
        if rank > 0:
            store.set(f"thanks of {rank} for {prefix}", "")
    except dist.DistError as error:
        raise ValueError(
            f"rank {rank} has not met rank 0 at MASTER_ADDR={address}, MASTER_PORT={port}; is it the same "
            f"everywhere, free on rank 0's machine, and open? {str(error).splitlines()[0]}"
        ) from error
    missing, end = set(range(1, size)) if rank == 0 else set(), time.monotonic() + TIMEOUT.total_seconds()
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
    return dist.PrefixStore(prefix, store), watch


def stop(world: World | None = None) -> None:
    """Leave the process group, if there is one, as a rank that has done its work.

    gloo's threads give back the tensors of a collective a little after it has returned, for which they need
    the interpreter: one that is about to end ends the process by SIGABRT instead. They end with their group,
    which lives as long as something refers to it: DDP (let go of it before), or a mesh in DTensor's caches.
    """
    if world is not None and world.watch is not None:
        world.watch.stop(leaves=True)
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        time.sleep(0.5)
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- LAYOUT


@dataclass(frozen=True)
class Layout:
    """How model, gradients and optimizer lie on the ranks.

    With W ranks, P parameters of which X are experts', fp32 and AdamW, bytes per rank besides activations:

        ddp                         16 P             everything on each rank; gradients averaged
        ddp, zero_stage 1           8 P + 8 P/W      each rank updates a share, and sends it to the others
        fsdp                        16 P/W + whole parameters of two blocks at a time (a block's are gathered
                                    when it runs) and of the embeddings; + 4 P between micro-steps, if many
        ddp, ep_size n              16 (P - X) + 16 X/n       ranks 0 .. n-1 share the experts, n .. 2n-1, ...
        fsdp, ep_size n             as fsdp, but experts are gathered from the W/n ranks that hold the same

    The numbers that a step computes are the same in all of them, but for rounding. What is shared out is a
    DTensor: `local` gives a rank its part, `local_ranges` says which that is.
    """

    world: World
    parallel: str = "ddp"
    zero_stage: int = 0
    ep_size: int = 1
    all_ranks: DeviceMesh | None = None  # (size,), for fsdp
    mesh: DeviceMesh | None = None  # (size / ep_size, ep_size), for expert parallelism
    savers: dist.ProcessGroup | None = None  # all ranks, on the CPU, if they save together: only for that

    @property
    def shares_parameters(self) -> bool:
        """Whether no rank holds the whole model: every forward, and saving, then takes all ranks."""
        return self.parallel == "fsdp" or self.ep_size > 1

    @property
    def saves_together(self) -> bool:
        """Whether no rank alone has what a checkpoint consists of."""
        return self.shares_parameters or self.zero_stage > 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: the same answer on all, which have to ask together."""
        if self.world.size == 1:
            return flag  # without waiting for the device
        return self.world.sum(torch.tensor(float(flag), device=self.world.device)).item() > 0


def make_layout(world: World, parallel: str = "ddp", zero_stage: int = 0, ep_size: int = 1) -> Layout:
    """The layout of these settings, which prepare.check_layout has found to make sense, with its groups."""
    all_ranks = mesh = savers = None
    if parallel == "fsdp":
        all_ranks = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("all",))
    if ep_size > 1:
        shape = (world.size // ep_size, ep_size)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "expert"))
    if parallel == "fsdp" or ep_size > 1:
        savers = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return Layout(world, parallel, zero_stage, ep_size, all_ranks, mesh, savers)


# ---------------------------------------------------------------------------- MODEL


def place(model: nn.Module, layout: Layout, dtype: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put the model on this rank's device, in place: all of it, or the part that the layout gives this rank.

    Comes before the optimizer is made. dtype: of matrix products, "float32" or "bfloat16". weights: for a
    model on the meta device its parameters and buffers, (name, whole tensor on the CPU), one after the
    other, so that no more than one has to exist; nothing if they are loaded afterwards.
    """
    if layout.ep_size > 1:
        share_experts(model, layout)
    if layout.parallel == "fsdp":
        shard(model, layout, dtype)
    if model.device.type == "meta":
        model.to_empty(device=layout.world.device)
        model.tie_weights()
    else:
        model.to(layout.world.device)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, whole in weights:
            if name in targets:  # not the head's second name where it is tied
                copy_part(targets[name], whole)


def copy_part(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy into a tensor, or what this rank holds of it, from a tensor that holds everything."""
    local(target).copy_(whole[tuple(slice(part.start, part.stop) for part in local_ranges(target))])


def like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`whole`, or where `target` is shared out over ranks, what corresponds to it: this part of `whole`."""
    if isinstance(whole, DTensor) or not isinstance(target, DTensor) or whole.shape != target.shape:
        return whole
    mine = torch.empty_like(target, dtype=whole.dtype, requires_grad=False)
    copy_part(mine, whole)
    return mine


def share_experts(model: nn.Module, layout: Layout) -> None:
    """Leave on each rank E / ep_size experts of every layer, as DTensors; the layers then exchange rows."""
    mesh = layout.mesh["expert"]
    for moe in model.moe_layers():
        moe.exchange = Exchange(mesh.get_group())
        for name, whole in list(moe.experts.named_parameters()):
            mine = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            shared = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
            setattr(moe.experts, name, nn.Parameter(shared))


def shard(model: nn.Module, layout: Layout, dtype: str) -> None:
    """Cut all parameters into one part per rank (FSDP2); each block's are gathered when it runs.

    With bfloat16 the blocks are gathered in bf16 and gradients reduced in fp32; embeddings, head and the
    last norm are gathered in fp32, as what passes between the blocks is, and so are the routers, whose
    choices bf16 would change. These are groups by themselves for that reason.

    Along dimension 0, but experts as dimension_to_shard() says: on 16 ranks, 8 experts would leave 8 without.
    """
    experts = {id(parameter) for moe in model.moe_layers() for parameter in moe.experts.parameters()}
    ranks = layout.world.size // layout.ep_size

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(dimension_to_shard(local(parameter).shape, ranks) if id(parameter) in experts else 0)

    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if dtype == "bfloat16" else MixedPrecisionPolicy()
    for block in model.transformer.h:
        if isinstance(block.mlp, MoE):
            fully_shard(block.mlp.gate, mesh=layout.all_ranks)
            if layout.ep_size > 1:  # cut by rank of the expert group already; each part once more by replica
                replica = layout.mesh["replica"]
                fully_shard(block.mlp.experts, mesh=replica, mp_policy=policy, shard_placement_fn=placement)
        fully_shard(block, mesh=layout.all_ranks, mp_policy=policy, shard_placement_fn=placement)
    fully_shard(model, mesh=layout.all_ranks)


def check_compiler(device: torch.device) -> None:
    """ValueError if torch.compile would not find the compiler that it needs for this device."""
    if device.type == "cuda":  # Triton's
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"use_compile=True, but torch.compile needs {' or '.join(names)}, and that is not here; install "
            "it, or --use_compile False"
        )


def compile_blocks(model: nn.Module, layout: Layout) -> None:
    """torch.compile every block: one graph for all. Of the whole model it would take four times as long.

    FSDP gathers parameters in hooks, which stay outside; what it gathers within a block (the router), and
    the exchange of rows between experts, divide its graph. DDP reduces gradients while the backward goes on
    from block to block; what dynamo would do for that, cut graphs at DDP's buckets, is for graphs of models.
    """
    torch._dynamo.config.optimize_ddp = False
    # Inductor's advice for fp32 products. With bfloat16 the routers' are the only ones, and shall be exact.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    for block in model.transformer.h:
        whole = not (layout.shares_parameters and isinstance(block.mlp, MoE))
        if layout.parallel == "fsdp":
            block.forward = torch.compile(block.forward, fullgraph=whole)
        else:
            block.compile(fullgraph=whole)


def wrap(model: nn.Module, layout: Layout, micro_steps: int) -> nn.Module:
    """The module whose forward the loop calls: the model itself, or DDP around it.

    Every parameter takes part in every backward, because the experts are stacked: DDP need not look for those
    that do not. With static_graph it also expects every backward to be like the first, which holds where a
    step is a single micro-step; of several only the last one reduces.
    """
    world = layout.world
    if world.size == 1 or layout.parallel == "fsdp":
        return model
    # The routers reduce their own statistics; a broadcast of rank 0's buffers would overwrite them. Experts
    # that are shared out are not every rank's: finish_gradients() reduces theirs.
    shared = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    model._ddp_params_and_buffers_to_ignore = [*model._ddp_params_and_buffers_to_ignore, *shared]
    newer_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=micro_steps == 1,
        **{"forward_sync_buffers" if newer_name else "broadcast_buffers": False},
    )


# ---------------------------------------------------------------------------- GRADIENTS


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients over the ranks: only the last micro-step has to.

    DDP looks at the flag in forward, so it is set before it (no_sync() would want the forward inside it too).
    FSDP keeps whole gradients meanwhile: where these do not fit, choose B so large that there is one
    micro-step.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def finish_gradients(model: nn.Module, layout: Layout) -> None:
    """After the last backward of a step: reduce the gradients that DDP and FSDP do not, those of the experts.

    An expert has got the gradients of the tokens of all ranks of its group, of losses that are means over
    each rank's tokens; wanted is the gradient of the mean over all ranks.
    """
    if layout.ep_size == 1:
        return
    works = []
    for moe in model.moe_layers():
        for parameter in moe.experts.parameters():
            grad = local(parameter.grad)
            if layout.parallel == "fsdp":  # the mean over the replicas already
                grad.div_(layout.ep_size)
            else:
                grad.div_(layout.world.size)
                works.append(dist.all_reduce(grad, group=layout.mesh.get_group("replica"), async_op=True))
    for work in works:
        work.wait()


def gradient_norm(model: nn.Module, layout: Layout) -> torch.Tensor:
    """Norm () of the whole gradient, the same on all ranks; every parameter counts once, whoever holds it."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)])
    if layout.shares_parameters:
        square = nn.utils.get_total_norm([local(g) for g in grads if isinstance(g, DTensor)]).square()
        # fsdp: every rank has another part of everything; else the ranks of an expert group have.
        group = layout.all_ranks if layout.parallel == "fsdp" else layout.mesh["expert"]
        dist.all_reduce(square, group=group.get_group())
        norm = (norm.to(square.device).square() + square).sqrt()
    return norm


def clip_gradients(model: nn.Module, largest: float, norm: torch.Tensor) -> None:
    """Scale the gradient, whose norm gradient_norm() has found, down to the norm `largest`."""
    coefficient = (largest / (norm + 1e-6)).clamp(max=1.0)
    grads = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_mul_(grads, coefficient)  # on CUDA a few kernels for all, as clip_grads_with_norm_ does it


# ---------------------------------------------------------------------------- OPTIMIZER


def share_optimizer(optimizer: torch.optim.Optimizer, layout: Layout) -> torch.optim.Optimizer:
    """The optimizer itself, or with zero_stage 1 one that holds a share of its moments on each rank (ZeRO-1).

    Each rank updates the parameters whose moments it holds, and sends them to the others.
    """
    if layout.zero_stage == 0:
        return optimizer
    names = ("lr", "betas", "eps", "fused")
    settings = {name: optimizer.defaults[name] for name in names}
    return ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer), **settings)


def optimizer_state(optimizer: torch.optim.Optimizer, layout: Layout) -> dict:
    """optimizer.state_dict(), whole on rank 0 and of no use on the others where ZeRO-1 has divided it up.

    A collective then. (What fsdp and ep_size divide up stays divided, in DTensors.)
    """
    if layout.zero_stage == 0:
        return optimizer.state_dict()
    optimizer.consolidate_state_dict(to=0)
    if layout.world.device.type == "cuda":
        torch.cuda.synchronize(layout.world.device)  # it copies to the host without waiting
    return optimizer.state_dict() if layout.world.is_master else {}
