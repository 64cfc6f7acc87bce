"""Where a run computes: device, process group, layout of model and optimizer on the ranks; torch.compile.

docs/many_gpus.md has the commands. NCCL connects CUDA devices, gloo all others.
References: torch's DistributedDataParallel and distributed.fsdp.fully_shard; ZeRO, arXiv 1910.02054"""

import atexit
import contextlib
import ctypes
import gc
import inspect
import json
import os
import socket
import time
import warnings
from collections.abc import Iterable, Iterator
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

from layers.roles import role_of
from layers.sharding import dimension_to_shard, local, local_ranges
from mixture_of_experts import MoE
from training import faults, rendezvous
from training.expert_parallel import Exchange
from training.heartbeat import Heartbeat

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # parameters of mallopt, from glibc's malloc.h
PATIENCE = timedelta(days=1)  # of a rank that waits for another's files; heartbeats find lost ranks


@dataclass
class World:
    """This process: its rank (0 .. size - 1), its rank on its machine, its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat | None = None  # None if there is no process group
    store: dist.Store | None = None  # a dictionary that all ranks share
    patient: dist.ProcessGroup | None = None  # all ranks, on the CPU

    @property
    def is_master(self) -> bool:  # prints, logs and saves
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until all ranks are here, for as long as a rank reads or writes files."""
        if self.size > 1:
            dist.barrier(self.patient)

    def check_equal(self, what: str, mine: dict) -> None:
        """ValueError on all ranks if `mine` differs between ranks, naming the entries, ranks and values."""
        if self.size == 1:
            return
        if self.patient:
            self.barrier()
        keys, store = [f"{what} of {other}" for other in range(self.size)], self.store
        store.set(keys[self.rank], json.dumps({name: repr(value) for name, value in mine.items()}))
        if self.is_master:
            rendezvous.wait_for_ranks(self.size, f"the {what} of {{}}", lambda i: store.check([keys[i]]))
            values = list(map(json.loads, store.multi_get(keys)))
            store.set(f"verdict on {what}", "; ".join(rendezvous.differences(values)))
        if verdict := store.get(f"verdict on {what}").decode():  # waits for rank 0
            time.sleep(2 * self.is_master)  # the others must read it first: the store may end with rank 0
            raise ValueError(f"the ranks have different {what}: {verdict}; start all ranks with the same")


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`, or with "" the best of CUDA, MPS, CPU. ValueError if it is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(filter(available.get, available))
    try:
        device = torch.device(name)
        here = available[device.type]
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"device={name!r} is no device: use cuda, cuda:N, mps or cpu") from error
    if not here:
        missing = f"torch {torch.__version__} finds no {device.type.upper()} here"
        raise ValueError(f"device={name!r}, but {missing}; use --device cpu")
    if device.type != "cuda":
        return device
    index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if device.index is None and count == 1:  # each process may see a GPU of its own; check_own_gpu makes sure
        index = 0
    if index >= count:
        mend = "start at most one process per GPU of a machine (--nproc_per_node)"
        raise ValueError(f"local rank {local_rank} wants GPU {index}, but there are {count}; {mend}")
    return torch.device("cuda", index)


def check_compiler(device: torch.device) -> None:
    """Compile a small function. ValueError, with the reason, if torch.compile does not work here."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of torch, Triton, the system's compiler
        needs = "a working C++ compiler (g++, clang++ or cl; the variable CXX names another one)"
        if device.type == "cuda":
            needs = "Triton, gcc or clang, Python.h (as in python3-dev) and a GPU of compute capability 7.0"
            needs += ", but this one has {}.{}".format(*torch.cuda.get_device_capability(device))
        reason = faults.compile_reason(error)
        raise ValueError(f"use_compile=True: {reason}: it needs {needs}; or --use_compile False") from error


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, which takes as much: the first touch of a new page costs
    time. Variables MALLOC_... of the environment win. Other C libraries have no mallopt."""
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(OSError, AttributeError, TypeError):  # macOS, Windows
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_MAX, 0)  # large tensors come from the heap, too
            mallopt(TRIM_THRESHOLD, -1)  # the heap never becomes smaller


def start(device: str = "", parallel: str = "ddp", settings: dict | None = None) -> World:
    """Choose the device; as one of several processes join the group and start the heartbeats. ValueError:
    wrong environment, no connection, parallel="none", `settings` that differ (but for a device's number)."""
    rank, local_rank, size, address, port = rendezvous.read_environment() or (0, 0, 1, "", 0)
    if parallel == "none" and size > 1:
        raise ValueError(f"parallel=none is for one process, but WORLD_SIZE={size}; use --parallel ddp")
    chosen = choose_device(device, local_rank)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # torch's default where no device is named
    if not address:
        return World(0, 0, 1, chosen)
    store, heartbeat = rendezvous.rendezvous(rank, size, address, port)
    world = World(rank, local_rank, size, chosen, heartbeat, store)
    # Ranks with different settings would wait for each other.
    world.check_equal("settings", {"WORLD_SIZE": size, **(settings or {}), "device": chosen.type})
    how = dict(backend="gloo", timeout=rendezvous.TIMEOUT, store=store, rank=rank, world_size=size)
    if chosen.type == "cuda":
        gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(chosen).uuid}"
        rendezvous.check_own_gpu(store, rank, size, gpu)
        # With a device_id NCCL connects now, and an unreachable rank fails here.
        how |= dict(backend="nccl", device_id=chosen)
    with rendezvous.telling(lambda: f"rank {rank} waits for connections with the other ranks"):
        dist.init_process_group(**how)
    heartbeat.start()
    atexit.register(heartbeat.stop)
    world.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return world


def stop(world: World | None = None) -> None:
    """Leave the process group, if there is one. First delete the DDP module, which keeps the group in memory:
    if the interpreter ends while a gloo thread releases tensors, SIGABRT kills the process."""
    if world and world.heartbeat:
        world.heartbeat.stop(finished=True)
        world.patient = None  # the last reference to that group, whose threads must end
    if dist.is_initialized():
        gc.collect()
        time.sleep(0.5)
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- LAYOUT
@dataclass(frozen=True)
class Layout:
    """Which part of model, gradients and optimizer each rank holds; docs/many_gpus.md has the bytes.
    All layouts compute the same numbers, except for rounding. A tensor that ranks share is a DTensor: `local`
    returns a rank's part. Ranks 0 .. ep_size - 1 share the experts, and so do the next ep_size ranks."""

    world: World
    parallel: str = "ddp"
    zero_stage: int = 0
    ep_size: int = 1
    all_ranks: DeviceMesh | None = None  # (size,), for fsdp
    mesh: DeviceMesh | None = None  # (size / ep_size, ep_size), for expert parallelism
    savers: dist.ProcessGroup | None = None  # all ranks, on the CPU, for checkpoints that all ranks write

    @property
    def shares_parameters(self) -> bool:  # then every forward and every save needs all ranks
        return self.parallel == "fsdp" or self.ep_size > 1

    @property
    def saves_together(self) -> bool:  # because no single rank holds the whole checkpoint
        return self.shares_parameters or self.zero_stage > 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: the same answer on all ranks, which must call it together."""
        if self.world.size == 1:
            return flag  # without waiting for the device
        return self.world.sum(torch.tensor(float(flag), device=self.world.device)).item() > 0


def make_layout(world: World, parallel: str, zero_stage: int, ep_size: int) -> Layout:
    """The layout of these settings, with its process groups. setup.check_layout must run first."""
    device, fsdp, shape = world.device.type, parallel == "fsdp", (world.size // ep_size, ep_size)
    all_ranks = init_device_mesh(device, (world.size,), mesh_dim_names=("all",)) if fsdp else None
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replica", "expert")) if ep_size > 1 else None
    savers = dist.new_group(backend="gloo", timeout=PATIENCE) if fsdp or ep_size > 1 else None
    return Layout(world, parallel, zero_stage, ep_size, all_ranks, mesh, savers)


# ---------------------------------------------------------------------------- MODEL
def place(model: nn.Module, layout: Layout, dtype: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put the model on this rank's device, in place: all of it, or the layout's part. dtype: of matrix
    products. weights: (name, whole tensor on the CPU) for a model on the meta device; may be empty."""
    if layout.ep_size > 1:
        share_experts(model, layout)
    if layout.parallel == "fsdp":
        shard(model, layout, dtype)
    if model.device.type == "meta":
        model.to_empty(device=layout.world.device).tie_weights()
    else:
        model.to(layout.world.device)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, whole in weights:
            if name in targets:  # a tied head has a second name
                copy_part(targets[name], whole)


def copy_part(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor into `target`, or into the part of it that this rank holds."""
    local(target).copy_(whole[tuple(slice(part.start, part.stop) for part in local_ranges(target))])


def like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`whole`, divided among the ranks as `target` is; unchanged if `target` is not divided."""
    if isinstance(whole, DTensor) or not isinstance(target, DTensor) or whole.shape != target.shape:
        return whole
    mine = torch.empty_like(target, dtype=whole.dtype, requires_grad=False)
    copy_part(mine, whole)
    return mine


def share_experts(model: nn.Module, layout: Layout) -> None:
    """Leave E / ep_size experts of every layer on each rank, as DTensors; the layers then exchange rows."""
    mesh = layout.mesh["expert"]
    for moe in model.moe_layers():
        moe.exchange = Exchange(mesh.get_group())
        for name, whole in list(moe.experts.named_parameters()):
            mine = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            shared = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
            setattr(moe.experts, name, nn.Parameter(shared))


def shard(model: nn.Module, layout: Layout, dtype: str) -> None:
    """Cut all parameters into one part per rank (FSDP2). FSDP gathers a block's parameters when it runs.
    With bfloat16, FSDP gathers blocks in bf16 and reduces gradients in fp32. Routers stay fp32, because bf16
    would change their choices. Embeddings, head, last norm and activations between blocks stay fp32, too.
    Experts are cut along dimension_to_shard(): along dimension 0, 16 ranks could not share 8 experts."""
    experts = {id(parameter) for moe in model.moe_layers() for parameter in moe.experts.parameters()}
    ranks = layout.world.size // layout.ep_size

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(dimension_to_shard(local(parameter).shape, ranks) if id(parameter) in experts else 0)

    low = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(**(low if dtype == "bfloat16" else {}))
    how = dict(mp_policy=policy, shard_placement_fn=placement)
    for block in model.transformer.h:
        if isinstance(block.mlp, MoE):
            fully_shard(block.mlp.gate, mesh=layout.all_ranks)
            if layout.ep_size > 1:  # share_experts() has cut them; FSDP cuts each part among the replicas
                fully_shard(block.mlp.experts, mesh=layout.mesh["replica"], **how)
        fully_shard(block, mesh=layout.all_ranks, **how)
    fully_shard(model, mesh=layout.all_ranks)


def compile_blocks(model: nn.Module, layout: Layout) -> None:
    """Compile every block in place. All blocks share one graph. The whole model would take four times longer.
    A block is one graph, unless FSDP gathers the router, or ranks exchange rows, inside the block."""
    torch._dynamo.config.optimize_ddp = False  # do not split a block at DDP's buckets
    # Inductor recommends TF32. With bfloat16 only the routers' products are fp32, and they must stay exact.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    for block in model.transformer.h:
        whole = not (layout.shares_parameters and isinstance(block.mlp, MoE))
        if layout.parallel == "fsdp":
            block.forward = torch.compile(block.forward, fullgraph=whole)
        else:
            block.compile(fullgraph=whole)


def wrap(model: nn.Module, layout: Layout, micro_steps: int) -> nn.Module:
    """The module whose forward the loop calls: the model itself, or DDP around it."""
    if layout.world.size == 1 or layout.parallel == "fsdp":
        return model
    # DDP must ignore experts that differ between ranks: finish_gradients() reduces their gradients.
    shared = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    model._ddp_params_and_buffers_to_ignore = [*model._ddp_params_and_buffers_to_ignore, *shared]
    # A broadcast of buffers would overwrite the statistics that each rank's routers have counted.
    newer_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    options = {"forward_sync_buffers" if newer_name else "broadcast_buffers": False}
    # static_graph needs equal backward passes. With several micro-steps only the last one reduces gradients.
    options |= dict(gradient_as_bucket_view=True, static_graph=micro_steps == 1)
    device = layout.world.device
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None, **options)


@contextlib.contextmanager
def cast_once(model: nn.Module, layout: Layout, dtype: str, micro_steps: int) -> Iterator[None]:
    """Within it, copies in dtype take the place of the blocks' matrices. Without it, autocast would copy the
    matrices in each micro-step. Gradients still go to the parameters. FSDP makes such copies itself; experts
    that are on several ranks are not copied."""
    held, needed = [], dtype != "float32" and micro_steps > 1 and not layout.shares_parameters
    try:
        for path, module in model.named_modules() if needed else ():
            for name, parameter in module.named_parameters(recurse=False):
                if role_of(f"{path}.{name}").is_matrix:
                    # Such an attribute hides the parameter of its name, but not from state_dict().
                    module.__dict__[name] = parameter.to(getattr(torch, dtype))
                    held.append((module, name))
        yield
    finally:
        for module, name in held:
            del module.__dict__[name]


# ---------------------------------------------------------------------------- GRADIENTS AND OPTIMIZER
def sync_gradients(model: nn.Module, now: bool) -> None:
    """Before a forward: whether its backward reduces gradients over the ranks, as a step's last must."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def finish_gradients(model: nn.Module, layout: Layout) -> None:
    """After a step's last backward: gradients of shared experts, sums over a group, become means over all."""
    if layout.ep_size == 1:
        return
    grads = [local(p.grad) for moe in model.moe_layers() for p in moe.experts.parameters()]
    if layout.parallel == "fsdp":  # which has taken the mean over the replicas
        torch._foreach_div_(grads, layout.ep_size)
        return
    torch._foreach_div_(grads, layout.world.size)
    replicas = layout.mesh.get_group("replica")
    for work in [dist.all_reduce(grad, group=replicas, async_op=True) for grad in grads]:
        work.wait()


def gradient_norms(groups: Iterable[Iterable[nn.Parameter]], layout: Layout) -> torch.Tensor:
    """Norm of the gradient of each group of parameters, (groups,): the same on all ranks; every parameter
    counts once. At most one collective."""
    zero = torch.zeros((), device=layout.world.device)  # get_total_norm([]) would lie on the CPU
    total = lambda grads: nn.utils.get_total_norm(grads) if grads else zero  # noqa: E731
    grads = [[p.grad for p in group if p.grad is not None] for group in groups]
    norms = torch.stack([total([local(g) for g in group if not isinstance(g, DTensor)]) for group in grads])
    if layout.shares_parameters:
        shared = [total([local(g) for g in group if isinstance(g, DTensor)]) for group in grads]
        squares = torch.stack(shared).square()
        # With fsdp all ranks hold different parts; otherwise the ranks of an expert group do.
        group = layout.all_ranks if layout.parallel == "fsdp" else layout.mesh["expert"]
        dist.all_reduce(squares, group=group.get_group())
        norms = (norms.square() + squares).sqrt()
    return norms


def norms_of_parts(model: nn.Module, layout: Layout) -> dict[str, torch.Tensor]:
    """The gradient norms (1,) of the parts of the model that layers/roles.py names: "norm/experts", ..."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(f"norm/{role_of(name).part}", []).append(parameter)
    return dict(zip(parts, gradient_norms(parts.values(), layout).float().split(1), strict=True))


def clip_gradients(model: nn.Module, largest: float, norm: torch.Tensor) -> None:
    """Scale the gradient down to the norm `largest`; norm: of the whole gradient, ()."""
    coefficient = (largest / (norm + 1e-6)).clamp(max=1.0)
    grads = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_mul_(grads, coefficient)  # a few kernels for all, as in clip_grads_with_norm_


def share_optimizer(optimizer: torch.optim.Optimizer, layout: Layout) -> torch.optim.Optimizer:
    """The optimizer itself, or with zero_stage 1 one whose state is divided among the ranks (ZeRO-1)."""
    if layout.zero_stage == 0:
        return optimizer
    known = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    return ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer), **settings)


def optimizer_state(optimizer: torch.optim.Optimizer, layout: Layout) -> dict:
    """optimizer.state_dict(), in DTensors where ranks share it. ZeRO-1: a collective; {} except on rank 0."""
    if layout.zero_stage == 0:
        return optimizer.state_dict()
    optimizer.consolidate_state_dict(to=0)
    if layout.world.device.type == "cuda":
        torch.cuda.synchronize(layout.world.device)  # the copies to the host are asynchronous
    return optimizer.state_dict() if layout.world.is_master else {}
