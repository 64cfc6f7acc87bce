"""The command `bench.py scale`: forecasts for up to 1,024 ranks, and what layouts really send and take here.

    python bench.py scale --size d12-moe8x2 --micro_ms 90 --update_ms 8 --dtype bfloat16     # a forecast
    python bench.py scale --size d12 --dtype bfloat16          # from a micro-step measured on this machine
    python bench.py scale --check 1           # forecasts against measurements with gloo: 1, 2 and 4 processes

traffic.py has the formulas, their assumptions and sources. What is measured is the training loop's step, with
random tokens and evenly loaded experts: its seconds; the bytes that each rank sends, by collective, from the
calls that pass torch's dispatcher; and the bytes that left through its TCP connections. These are more by the
messages' heads, and because gloo makes a reduce-scatter out of an all-reduce, for twice the bytes.
"""

import math
import multiprocessing
import os
import socket
import statistics
import struct
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import alternate
from bench.traffic import LAYOUTS, Collective, Links, Plan, forecast, held, meta_model, step_seconds, traffic
from layers.sharding import local
from model import GPTConfig, GPTLMHeadModel
from training import parallel

# ---------------------------------------------------------------------------- MEASUREMENT


class Trainer:
    """Steps as train_gpt_moe.py does them, in pieces, with random tokens and evenly loaded experts."""

    def __init__(self, model: GPTLMHeadModel, plan: Plan, device: str, layout: parallel.Layout | None = None):
        layout = layout or parallel.Layout(parallel.World(0, 0, 1, torch.device(device)))
        self.model, self.plan, self.layout = model.train(), plan, layout
        model.loss_chunk = plan.loss_chunk
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), torch.device(device).type)
        self.optimizer = parallel.share_optimizer(optimizer, layout)
        self.wrapped = parallel.wrap(model, layout, plan.micro_steps)
        tokens = torch.randint(0, model.config.vocab_size, (plan.B, plan.T + 1), device=device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        for moe in model.moe_layers():
            moe.force_balanced = True
        model.update_routers()

    def micro_step(self, reduce: bool = True) -> None:
        """Forward and backward; reduce: also the gradients, as in a step's last one."""
        parallel.sync_gradients(self.wrapped, reduce)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.plan.dtype == "bfloat16"):
            loss = self.wrapped(self.x, targets=self.y, return_dict=True).loss
        loss.backward()

    def update(self) -> None:
        """Clip and update; the gradients stay."""
        norm = parallel.gradient_norm(self.model, self.layout)
        parallel.clip_gradients(self.model, 1.0, norm)
        self.model.update_routers()
        self.optimizer.step()

    def step(self) -> None:
        """One optimizer step."""
        for number in range(self.plan.micro_steps):
            self.micro_step(number == self.plan.micro_steps - 1)
        parallel.finish_gradients(self.model, self.layout)
        self.update()
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> int:
        """Bytes of this rank's parameters, of as many gradients, and of its moments, after a step."""
        parameters = sum(local(parameter).nbytes for parameter in self.model.parameters())
        state = getattr(self.optimizer, "optim", self.optimizer).state  # ZeRO has the real one inside
        moments = [value for values in state.values() for value in values.values() if value.dim() > 0]
        return 2 * parameters + sum(local(moment).nbytes for moment in moments)


SIZED_BY = {  # operator: (kind, argument that has the size S)
    "allreduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 0), "broadcast_": ("broadcast", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1), "alltoall_base_": ("all_to_all", 1),
}  # fmt: skip


class Volume(TorchDispatchMode):
    """Within `with Volume() as volume`: bytes that this rank sends by the formula of each collective called.

    What is called, and with tensors of which size, is seen in torch's dispatcher, where DDP, FSDP,
    ZeroRedundancyOptimizer and our own calls all pass by.
    """

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
    """Bytes that this process has sent through its TCP connections so far (Linux: tcpi_bytes_sent)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # a file, a pipe, or closed meanwhile
            continue
        total += struct.unpack_from("Q", information, 200)[0] if len(information) >= 208 else 0
    return total


def in_turns(world: parallel.World, runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each function, called on all ranks at once, until the last one is done."""
    taken = defaultdict(list)
    for _ in range(rounds + 1):
        for name, run in runs.items():
            world.barrier()
            start = time.perf_counter()
            run()
            world.barrier()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def collectives(ranks: int, size: int) -> tuple[dict[str, Callable], int]:
    """({kind of collective: a call with S bytes}, S): `size`, rounded up to what divides by ranks."""
    x = torch.zeros(math.ceil(size / (4 * ranks)) * ranks)
    part, other = torch.zeros(len(x) // ranks), torch.zeros(len(x))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # names of 2.13 and 2.11
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    calls = {
        "all_reduce": lambda: dist.all_reduce(x), "all_gather": lambda: gather(x, part),
        "reduce_scatter": lambda: scatter(part, x), "broadcast": lambda: dist.broadcast(x, 0),
        "all_to_all": lambda: dist.all_to_all_single(other, x),
    }  # fmt: skip
    return calls, x.nbytes


SMALL_CALLS = 50  # of which latency is the mean


def measure_rank(
    rank: int, plan: Plan, fields: dict, names: list[str], rounds: int, port: int, answer
) -> None:
    """A process of `measure`: what each layout takes and sends, and what the formulas need for a forecast."""
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(plan.ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    world, config, found, runs = parallel.start("cpu"), GPTConfig(block_size=plan.T, **fields), {}, {}
    for name in names:
        this = replace(plan, **LAYOUTS[name])
        layout = parallel.make_layout(world, this.parallel, this.zero_stage, this.ep_size)
        torch.manual_seed(0)
        model = GPTLMHeadModel(config)
        parallel.place(model, layout, plan.dtype, [])
        trainer = Trainer(model, this, "cpu", layout)
        for _ in range(3):  # connections are made, and buckets, and these once more
            trainer.step()
        before = bytes_on_the_wire()
        with Volume() as volume:
            trainer.step()
        wire = bytes_on_the_wire() - before
        found[name] = {"sent": dict(volume.sent), "wire": wire, "held": trainer.held()}
        runs[name] = trainer.step
    if rounds:
        alone = Trainer(GPTLMHeadModel(config), plan, "cpu")  # but at the same time as the other processes
        runs |= {"micro-step": alone.micro_step, "update": alone.optimizer.step, "nothing": lambda: None}
        if plan.ranks > 1:
            calls, size = collectives(plan.ranks, 4 * sum(p.numel() for p in alone.model.parameters()))
            small = collectives(plan.ranks, 4)[0]["all_reduce"]
            runs |= calls | {"latency": lambda: [small() for _ in range(SMALL_CALLS)]}
        seconds = in_turns(world, runs, rounds)
        nothing = seconds.pop("nothing")
        found["seconds"] = {name: taken - nothing for name, taken in seconds.items()}
        if plan.ranks > 1:
            latency = found["seconds"]["latency"] / SMALL_CALLS
            found["latency"] = latency / math.ceil(math.log2(plan.ranks))
            found["speeds"] = {
                kind: Collective(kind, size, plan.ranks).sent / max(found["seconds"][kind] - latency, 1e-6)
                for kind in calls
            }
    answer.send(found)
    parallel.stop(world)


def measure(plan: Plan, fields: dict, names: list[str], rounds: int) -> list[dict]:
    """What each of plan.ranks processes finds (measure_rank) that train a GPTConfig(**fields) together."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["bench.scaling"])  # import once
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(plan.ranks)]
    processes = [
        context.Process(target=measure_rank, args=(rank, plan, fields, names, rounds, port, answer))
        for rank, (_, answer) in enumerate(pipes)
    ]
    for process, (_, answer) in zip(processes, pipes, strict=True):
        process.start()
        answer.close()
    try:
        return [receive.recv() for receive, _ in pipes]
    except EOFError:
        raise ValueError("a process has failed; what it printed says why") from None
    finally:
        for process in processes:
            process.join(60)
            process.kill()


def check(rounds: int, ranks: tuple[int, ...] = (1, 2, 4)) -> list[dict]:
    """Forecasts for gloo on this machine against measurements, at 1, 2 and 4 processes with a thread each.

    They compete for the cores, so compute, bandwidth and latency are measured with as many processes at a
    time; and as gloo computes on the same cores, nothing of it is hidden (overlap 0).
    """
    fields = dict(
        n_layer=4, n_head=4, n_embd=128, vocab_size=2048, num_experts=4, num_experts_per_tok=2,
        expert_hidden_size=256,
    )  # fmt: skip
    model, rows = meta_model(GPTConfig(block_size=128, **fields)), []
    for W in ranks:
        plan = Plan(W, B=2, T=128, dtype="float32", micro_steps=2)
        names = [name for name in LAYOUTS if W > 1 or name == "ddp"]
        all_found = measure(plan, fields, names, rounds)
        found = all_found[0]
        links = Links(measured=found.get("speeds", {}), latency=found.get("latency", 0.0))
        for name in names:
            this = replace(plan, **LAYOUTS[name])
            seconds = found["seconds"]
            step, communication, _ = step_seconds(
                model, this, links, seconds["micro-step"], seconds["update"], overlap=0.0
            )
            sent = sum(collective.sent for collective in traffic(model, this))
            seen = found[name]
            rows.append({
                "layout": name, "ranks": W, "MB sent, formula": sent / 1e6,
                "MB, called": sum(seen["sent"].values()) / 1e6, "MB, on the wire": seen["wire"] / 1e6,
                "MB held, formula": held(model, this) / 1e6,
                "MB held": sum(rank[name]["held"] for rank in all_found) / W / 1e6,
                "communication ms, forecast": 1e3 * communication, "ms, forecast": 1e3 * step,
                "ms": 1e3 * seconds[name], "forecast / measured": step / seconds[name],
            })  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- COMMAND


def add_flags(parser) -> None:
    """The flags of `bench.py scale` that other commands do not have."""
    parser.add_argument("--check", type=int, default=0, help="scale: 1: compare with gloo on this machine")
    parser.add_argument("--micro_ms", type=float, default=0, help="scale: a micro-step's; 0 = measured here")
    parser.add_argument("--update_ms", type=float, default=0, help="scale: with --micro_ms, an update's")
    parser.add_argument("--nvlink", type=float, default=360, help="scale: GB/s per GPU within a machine")
    parser.add_argument("--network", type=float, default=40, help="scale: GB/s per GPU out of it")
    parser.add_argument("--gpus", type=int, default=8, help="scale: GPUs per machine, a network card each")
    parser.add_argument("--latency", type=float, default=10, help="scale: microseconds per call and hop")
    ranks = ",".join(str(2**power) for power in range(11))
    parser.add_argument("--ranks", default=ranks, help="scale: numbers of ranks, separated by commas")
    parser.add_argument("--layouts", default="ddp,zero,fsdp,ep", help=f"scale: of {', '.join(LAYOUTS)}")
    parser.add_argument("--total_batch_size", type=int, default=2**19, help="scale: tokens per step")


def bench_scale(options, sizes: dict[str, dict]) -> list[dict]:
    """`bench.py scale`: the forecast, or with --check its comparison with measurements."""
    names = options.layouts.split(",")
    size = options.size or "d12-moe8x2"
    for name, known in [*((name, LAYOUTS) for name in names), (size, sizes)]:
        if name not in known:
            raise ValueError(f"{name!r} is unknown: choose of {', '.join(known)}")
    if options.check:
        return check(options.rounds)
    if not all(number.isdigit() and int(number) > 0 for number in options.ranks.split(",")):
        raise ValueError(f"ranks={options.ranks!r}: must be numbers from 1 up, separated by commas")
    plan = Plan(1, B=options.B or 16, T=options.T or 1024, dtype=options.dtype)
    config = GPTConfig(block_size=plan.T, vocab_size=options.vocab_size, **sizes[size])
    links = Links(options.nvlink * 1e9, options.network * 1e9, options.gpus, options.latency * 1e-6)
    micro, update = options.micro_ms / 1e3, options.update_ms / 1e3
    if not micro:
        model = GPTLMHeadModel(config).to(options.device)
        trainer = Trainer(model, plan, options.device)
        runs = {"micro": trainer.micro_step, "update": trainer.update}
        micro, update = alternate(runs, model.device, options.rounds).values()
    taken = f"micro-step {1e3 * micro:.1f} ms, update {1e3 * update:.1f} ms"
    print(f"{size}, B = {plan.B}, T = {plan.T}: {taken}\n")
    ranks = [int(number) for number in options.ranks.split(",")]
    return forecast(meta_model(config), plan, names, ranks, links, micro, update, options.total_batch_size)
