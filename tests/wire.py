"""What ranks that train together really send, counted in two ways, and what they hold.

    sizes = dict(n_layer=2, n_head=2, n_embd=32)
    for found in train_ranks(tmp_path, Plan(ranks=2, B=2, T=16, dtype="float32"), sizes, ["ddp"]):
        found["ddp"]["sent"], found["ddp"]["wire"], found["ddp"]["held"]

"sent" are the bytes of each kind of collective, by its formula, from the calls that pass torch's dispatcher.
"wire" are the bytes that left through the process's TCP connections: more by the messages' headers, and by
gloo, which makes a reduce-scatter out of an all-reduce. "held": bytes of parameters, gradients and moments.
"""

import json
import os
import socket
import struct
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from processes import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import RandomBatch, make_run
from bench.traffic import LAYOUTS, Collective, Plan
from layers.sharding import local
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import train_step
from training import parallel
from training.setup import Run

SIZED_BY = {  # operator: (kind, argument that has the size S)
    "allreduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 0), "broadcast_": ("broadcast", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1), "alltoall_base_": ("all_to_all", 1),
}  # fmt: skip


class Volume(TorchDispatchMode):
    """`with Volume() as volume`: volume.sent are the bytes that this rank sends, by kind of collective.
    torch's dispatcher sees every one, whether DDP, FSDP, ZeroRedundancyOptimizer or our code calls it."""

    def __init__(self):
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            kind, place = SIZED_BY[function._schema.name.split("::")[1]]
            tensors = arguments[place] if isinstance(arguments[place], list) else [arguments[place]]
            objects = [a for a in arguments if isinstance(a, torch.ScriptObject)]
            (group,) = [dist.ProcessGroup.unbox(o) for o in objects if o._type().name() == "ProcessGroup"]
            size = sum(tensor.nbytes for tensor in tensors)
            self.sent[kind] += Collective(kind, size, group.size()).sent
        return function(*arguments, **(keywords or {}))


def bytes_on_the_wire() -> int:
    """Bytes that this process has sent through its TCP connections so far, each counted once (Linux)."""
    total = 0
    for path in filter(Path.is_socket, Path("/proc/self/fd").iterdir()):
        try:
            with socket.socket(fileno=os.dup(int(path.name))) as connection:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or no TCP
            continue
        sent, again = struct.unpack_from("QQ", information, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
        total += sent - again
    return total


def bytes_held(run: Run) -> int:
    """Bytes of this rank's parameters, of as many gradients, and of its moments, after a step."""
    parameters = sum(local(parameter).nbytes for parameter in run.model.parameters())
    state = getattr(run.optimizer, "optim", run.optimizer).state  # ZeRO wraps the optimizer that has it
    moments = [value for values in state.values() for value in values.values() if value.dim() > 0]
    return 2 * parameters + sum(local(moment).nbytes for moment in moments)


def train_ranks(folder: Path, plan: Plan, fields: dict, names: list[str]) -> list[dict]:
    """What each of plan.ranks processes finds that train a GPTConfig(**fields) in the layouts of `names`."""
    words = [json.dumps([asdict(plan), fields, names])]
    return run_ranks(plan.ranks, words, folder / "out", script="wire")


def main(arguments: list[str]) -> dict:
    """One of train_ranks' processes."""
    world, found, (plan, fields, names) = parallel.start("cpu"), {}, json.loads(arguments[0])
    for name in names:
        this = replace(Plan(**plan), **LAYOUTS[name])
        layout = parallel.make_layout(world, this.parallel, this.zero_stage, this.ep_size)
        model = GPTLMHeadModel(GPTConfig(block_size=this.T, **fields))
        parallel.place(model, layout, this.dtype, [])
        for moe in model.moe_layers():
            moe.force_balanced = True
        adamw = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
        run = make_run(
            model, RandomBatch(model, this.B, this.T), layout=layout, dtype=this.dtype,
            optimizer=parallel.share_optimizer(adamw, layout), accumulation=this.micro_steps,
        )  # fmt: skip
        for step in range(2):  # these make connections and buckets
            train_step(run, step)
        before = bytes_on_the_wire()
        with Volume() as volume:
            train_step(run, 2)
        wire = bytes_on_the_wire() - before
        found[name] = {"sent": dict(volume.sent), "wire": wire, "held": bytes_held(run)}
    run = None  # DDP must be freed before its process group
    parallel.stop(world)
    return found
