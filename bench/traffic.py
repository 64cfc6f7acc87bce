"""A forecast of a training step on up to 1,024 ranks, in every layout: bytes sent, seconds, memory per rank.

    python -m bench scale --size d12-moe8x2 --micro_ms 90 --update_ms 8 --dtype bfloat16

docs/many_gpus.md, "How the forecast is made", has the formulas, their explanation and the references. W is
the number of ranks, `a` the number of micro-steps; other letters as in model.py."""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import torch

from bench.models import size_of
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training import preflight
from training.preflight import elements, expert_elements, shapes_by_part
from training.setup import new_model

BUCKET = 25 * 2**20  # bytes; DDP's bucket_cap_mb
LAYOUTS = {"ddp": {}, "zero": {"zero_stage": 1}, "fsdp": {"parallel": "fsdp"}, "ep": {"ep_size": 2},
           "fsdp+ep": {"parallel": "fsdp", "ep_size": 2}}  # name: settings  # fmt: skip


@dataclass
class Plan(TrainConfig):
    """Settings of a run, and its number of ranks and micro-steps."""

    ranks: int = 1
    micro_steps: int = 1


@dataclass(frozen=True)
class Collective:
    """All calls of one kind and purpose in a step."""

    kind: str
    size: float  # bytes of all calls together
    ranks: int  # W of the group
    stride: int = 1  # from one rank of the group to the next
    calls: int = 1
    behind: str = ""  # what hides it: "forward" or "backward" of every micro-step, or the "last" backward
    late: float = 1.0  # the share that nothing can hide

    @property
    def sent(self) -> float:
        """Bytes that a rank sends. An all-reduce is a reduce-scatter and an all-gather."""
        return (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks * self.size


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes/s per rank and direction, within and between machines; seconds per hop."""

    inside: float
    outside: float
    per_machine: int
    latency: float

    def seconds(self, collective: Collective) -> float:
        """Time of all calls of a collective, one after the other."""
        ranks, sent = collective.ranks, collective.sent
        hops = collective.calls * self.latency * math.ceil(math.log2(ranks))
        neighbours = min(ranks, max(1, self.per_machine // collective.stride))
        if ranks <= neighbours:
            return hops + sent / self.inside
        if collective.kind == "all_to_all":
            leaving = sent * (ranks - neighbours) / (ranks - 1)
            return hops + max(leaving / self.outside, (sent - leaving) / self.inside)
        return hops + sent / min(self.inside, neighbours * self.outside)


def step_traffic(model: GPTLMHeadModel, plan: Plan) -> list[Collective]:
    """All collectives of one optimizer step."""
    part, W, ep, a = shapes_by_part(model), plan.ranks, plan.ep_size, plan.micro_steps
    layers, config, element, found = model.moe_layers(), model.config, getattr(torch, plan.dtype).itemsize, []
    mine, replicas = preflight.split(part["experts"], ep), W // ep
    if plan.parallel == "fsdp":
        found = fsdp_traffic(part, mine, plan, config.n_layer, len(layers))
    else:
        shared = 4 * elements(part["outside"] + part["router"] + part["rest"])
        experts, tensors = 4 * elements(mine), sum(len(shapes) for shapes in part.values())
        whole = shared + (experts if ep == 1 else 0)
        buckets = math.ceil(whole / BUCKET)
        found.append(Collective("all_reduce", whole, W, 1, buckets, "last", min(1.0, BUCKET / whole)))
        if ep > 1:
            found.append(Collective("all_reduce", experts, replicas, ep, len(mine)))
        if plan.zero_stage:
            found.append(Collective("broadcast", whole, W, 1, tensors))
    if ep > 1:
        rows = plan.B * plan.T * config.num_experts_per_tok * config.n_embd * element
        calls = len(layers) * a
        found.append(Collective("all_to_all", 4 * calls * rows, ep, 1, 4 * calls))
        found.append(Collective("all_to_all", calls * 8 * config.num_experts, ep, 1, calls))
    found.append(Collective("all_reduce", 4 * 9, W))  # losses and signals
    if layers:
        found.append(Collective("all_reduce", sum(8 * moe.step_totals.numel() for moe in layers), W))
    if plan.parallel == "fsdp" or ep > 1:
        found.append(Collective("all_reduce", 4, W if plan.parallel == "fsdp" else ep))
    return found


def fsdp_traffic(part: dict, experts: list, plan: Plan, blocks: int, moe_blocks: int) -> list[Collective]:
    """The gathers and scatters of fsdp. experts: their shapes on each rank of an ep group, before fsdp."""
    W, ep, a, found = plan.ranks, plan.ep_size, plan.micro_steps, []
    element = getattr(torch, plan.dtype).itemsize  # of matrix products
    # (elements, bytes of each when gathered, ranks, stride, groups, whether gathered for the backward, too)
    groups = [
        (elements(part["outside"], W), 4, W, 1, 1, False),
        (elements(part["router"], W), 4, W, 1, moe_blocks, True),
        (elements(part["rest"], W), element, W, 1, blocks, True),
        (expert_elements(experts, W // ep), element, W // ep, ep, moe_blocks if ep > 1 else 0, True),
    ]
    late = 1 / (blocks + 1)
    for count, size, ranks, stride, calls, again in groups:
        for behind in ("forward", "backward")[: 1 + again]:
            found.append(Collective("all_gather", a * count * size, ranks, stride, a * calls, behind, late))
        found.append(Collective("reduce_scatter", 4 * count, ranks, stride, calls, "last", late))
    return found


def step_seconds(model: GPTLMHeadModel, plan: Plan, links: Links, micro: float, update: float) -> tuple:
    """Seconds of a step, of its communication, of its exposed communication. micro, update: of one rank."""
    a, communication = plan.micro_steps, 0.0
    took, late = defaultdict(float), defaultdict(float)  # per micro-step
    for collective in step_traffic(model, plan):
        communication += links.seconds(collective)
        seconds = links.seconds(collective) / (a if collective.behind in ("forward", "backward") else 1)
        took[collective.behind] += seconds
        late[collective.behind] += seconds * collective.late

    def exposed(phase: float, *names: str) -> float:
        return max(sum(late[name] for name in names), sum(took[name] for name in names) - phase)

    waits = took[""] + a * exposed(micro / 3, "forward")
    waits += (a - 1) * exposed(2 / 3 * micro, "backward") + exposed(2 / 3 * micro, "backward", "last")
    kept = preflight.parameters_held(model, plan, plan.ranks) / (plan.ranks if plan.zero_stage else 1)
    updated = kept / model.get_num_params(non_embedding=False)
    return a * micro + update * updated + waits, communication, waits


def memory_by_use(model: GPTLMHeadModel, plan: Plan) -> dict[str, float]:
    """Bytes on each rank, by what they are used for."""
    part, config, element = shapes_by_part(model), model.config, getattr(torch, plan.dtype).itemsize
    uses = preflight.memory_estimate(model, plan, plan.dtype, plan.ranks)
    if plan.parallel == "fsdp" and plan.ranks > 1:
        mine = expert_elements(preflight.split(part["experts"], plan.ep_size), plan.ranks // plan.ep_size)
        block = (elements(part["rest"], plan.ranks) + mine) / config.n_layer
        outside = elements(part["outside"], plan.ranks)
        uses["gathered"] = 2 * block * element + 4 * outside + 4 * max(block, outside)
        if plan.micro_steps > 1:
            uses["gathered"] += 4 * (block * config.n_layer + outside)
    if plan.ep_size > 1:
        rows = plan.B * plan.T * config.num_experts_per_tok * config.n_embd
        uses["rows"] = 2 * len(model.moe_layers()) * rows * element
    return uses


def bench_scale(options) -> list[dict]:
    """A row per layout and number of ranks. A step has total_batch_size tokens, or a micro-step per rank.
    Efficiency: the time of the layout's own computation (fsdp, zero: a share of the update) / the step's."""
    names, ranks, B, T = options.layouts.split(","), options.ranks.split(","), options.B, options.T
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise ValueError(f"layouts={unknown[0]!r}: choose from {', '.join(LAYOUTS)}")
    if not all(number.isdigit() and int(number) > 0 for number in ranks):
        raise ValueError(f"ranks={options.ranks!r}: must be numbers from 1 up, separated by commas")
    if not options.micro_ms:
        mend = "give a micro-step's milliseconds, such as `python -m bench train` measures"
        raise ValueError(f"micro_ms=0: {mend}")
    config = GPTConfig(block_size=T, vocab_size=options.vocab_size, **size_of(options.size))
    links = Links(options.nvlink * 1e9, options.network * 1e9, options.gpus, options.latency * 1e-6)
    micro, update = options.micro_ms / 1e3, options.update_ms / 1e3
    print(f"{options.size}, B = {B}, T = {T}: micro-step {1e3 * micro:.1f} ms, update {1e3 * update:.1f} ms")
    model, rows = new_model(config, "fsdp"), []  # on the meta device
    if not model.moe_layers():
        names = [name for name in names if "ep" not in name]
    if not names:
        problem = f"size {options.size} has no experts to share; choose ddp, zero or fsdp"
        raise ValueError(f"layouts={options.layouts!r}: {problem}")
    groups = [n for n in (1, 2, 4, 8, 16) if n <= options.gpus and config.num_experts % n == 0]
    for name, W in product(names, map(int, ranks)):
        steps = max(1, options.total_batch_size // (B * T * W))
        largest = max(n for n in groups if W % n == 0)  # ep group within a machine
        fields = LAYOUTS[name] | ({"ep_size": largest} if "ep" in name else {})
        plan = Plan(ranks=W, B=B, T=T, dtype=options.dtype, micro_steps=steps, **fields)
        step, communication, waits = step_seconds(model, plan, links, micro, update)
        tokens = W * steps * B * T
        shape = f" {W // plan.ep_size} x {plan.ep_size}" if "ep" in name else ""
        rows.append({
            "layout": name + shape, "ranks": W,
            "tokens/step": tokens, "GB sent": sum(c.sent for c in step_traffic(model, plan)) / 1e9,
            "communication ms": 1e3 * communication, "exposed ms": 1e3 * waits, "ms": 1e3 * step,
            "tokens/s": round(tokens / step), "efficiency %": 100 * (step - waits) / step,
            "GiB per rank": sum(memory_by_use(model, plan).values()) / 2**30})  # fmt: skip
    return rows
