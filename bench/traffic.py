"""How a step scales from one rank to 1,024: bytes sent, seconds and memory per rank, for every layout.

Formulas; `bench.py scale` (scaling.py) prints what they say, and compares it with what is measured.

Bytes that a rank sends in a collective over W ranks, S being the size of what all ranks have together
afterwards (all-gather), before (reduce-scatter), or each (the others). NCCL calls these bytes over the time
they take the bus bandwidth [1].

    all-reduce       2 (W-1)/W S    a ring: reduce-scatter, then all-gather
    all-gather         (W-1)/W S    and so for reduce-scatter
    broadcast          (W-1)/W S    on average, where the roots take turns
    all-to-all         (W-1)/W S    with evenly loaded experts

What is sent in a step of `a` micro-steps (P parameters; other letters as in mixture_of_experts.py):

    ddp     all-reduce of 4 P bytes of gradients in buckets of 25 MiB, in the last micro-step only [2]
    zero    the same, and each rank broadcasts the parameters that it has updated, 4 P bytes together. (The
            paper gets along with ddp's volume [3, section 7.2]; ZeroRedundancyOptimizer does not.)
    fsdp    per micro-step, all-gather of all parameters before the forward, and of those in blocks once more
            before the backward; in the last micro-step reduce-scatter of 4 P bytes of gradients. Where a = 1
            these are the 3 P elements of [3, section 7.2]. Blocks are gathered in the dtype of the matrix
            products, the rest in fp32. Dimension 0 is padded to a multiple of W (experts are cut along
            another dimension where W does not divide their number, but that)
    ep      ranks are (W / ep) replicas x ep. Experts are split by ep, the rest is as in ddp (or fsdp). Per
            micro-step and layer R C elements go there, R C results back, and as many gradients: 4 all-to-alls
            among ep ranks. Experts' gradients: all-reduce of 4 P_experts / ep bytes among W / ep replicas (or
            gathers and a scatter among these)
    all     routing statistics, and the gradient's norm where no rank has all of it: all-reduces of some bytes

Time = a * micro-step + update * (share of the parameters that the rank updates) + exposed communication.
Hidden are, at best: gradients of ddp and fsdp behind the last backward, but for the last bucket or block;
gathers behind the forward (a third of a micro-step) and the backward (two thirds), but for the first
block's. Exposed are the all-to-alls (also where shared experts could hide them), broadcasts, statistics,
and the experts' gradients of ep. Not modelled: that communication slows down what is computed beside it,
uneven experts, stragglers, reductions inside of switches (SHARP).

Links: a collective within a machine goes at NVLink's speed; a ring through machines at that of all network
cards of a machine together, but at most NVLink's; of an all-to-all, what leaves the machine passes the
rank's own card. Defaults: 80% of 450 GB/s per GPU and direction (H100: 18 links of 25 GB/s [4]) and of 50
GB/s per GPU (400 Gb/s InfiniBand, a card per GPU, 8 GPUs per machine: DGX H100 [5]); 10 us per call and
hop, log2(W) hops.

Memory per rank: fp32 parameters, gradients and two moments, as divided up; fsdp's gathered groups (two
blocks, and what is outside of them), the gradient of one group, and whole gradients where there are several
micro-steps; ep's rows that have arrived; activations as in preflight.py.

References: [1] https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
[2] https://docs.pytorch.org/docs/stable/notes/ddp.html  [3] ZeRO, arXiv 1910.02054
[4] https://www.nvidia.com/en-us/data-center/h100/  [5] https://docs.nvidia.com/dgx/dgxh100-user-guide/
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from model import GPTConfig, GPTLMHeadModel
from training.preflight import (
    elements,
    expert_elements,
    memory_estimate,
    parameters_held,
    shapes_by_part,
    split,
)

BUCKET = 25 * 2**20  # bytes; DDP's bucket_cap_mb
SENT = {  # bytes sent by each of W ranks, as a multiple of (W-1)/W and the size
    "all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "all_to_all": 1,
}  # fmt: skip
LAYOUTS = {  # name: fields of Plan
    "ddp": {}, "zero": {"zero_stage": 1}, "fsdp": {"parallel": "fsdp"}, "ep": {"ep_size": 2},
    "fsdp+ep": {"parallel": "fsdp", "ep_size": 2},
}  # fmt: skip

# ---------------------------------------------------------------------------- FORMULAS


@dataclass(frozen=True)
class Plan:
    """Settings of a run, by the names of train_gpt_moe.py's, and its number of ranks and micro-steps."""

    ranks: int
    parallel: str = "ddp"
    zero_stage: int = 0
    ep_size: int = 1
    B: int = 16
    T: int = 1024
    dtype: str = "bfloat16"
    micro_steps: int = 1
    activation_checkpointing: str = "none"
    loss_chunk: int = -1

    @property
    def element(self) -> int:
        """Bytes per element of matrix products."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Collective:
    """All calls of one kind and purpose in a step."""

    kind: str
    size: float  # bytes, of all calls together: S
    ranks: int  # W of the group
    stride: int = 1  # from one rank of the group to the next
    calls: int = 1
    behind: str = ""  # what it may hide behind: "forward" or "backward" of every micro-step, "last" backward
    late: float = 1.0  # share that cannot

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return SENT[self.kind] * (self.ranks - 1) / self.ranks * self.size


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes/s per rank and direction, within a machine and out of it; seconds per hop."""

    inside: float = 0.8 * 450e9
    outside: float = 0.8 * 50e9
    per_machine: int = 8
    latency: float = 10e-6
    measured: dict[str, float] = field(default_factory=dict)  # kind: bytes/s, in place of all these

    def seconds(self, collective: Collective) -> float:
        """Time of all calls of a collective, one after the other."""
        ranks, sent = collective.ranks, collective.sent
        if ranks == 1:
            return 0.0
        hops = collective.calls * self.latency * math.ceil(math.log2(ranks))
        neighbours = min(ranks, max(1, self.per_machine // collective.stride))
        if self.measured:
            return hops + sent / self.measured[collective.kind]
        if ranks <= neighbours:
            return hops + sent / self.inside
        if collective.kind == "all_to_all":
            leaving = sent * (ranks - neighbours) / (ranks - 1)
            return hops + max(leaving / self.outside, (sent - leaving) / self.inside)
        return hops + sent / min(self.inside, neighbours * self.outside)


def meta_model(config: GPTConfig) -> GPTLMHeadModel:
    """The model without memory: names and shapes."""
    with torch.device("meta"):
        return GPTLMHeadModel(config)


def traffic(model: GPTLMHeadModel, plan: Plan) -> list[Collective]:
    """What is sent in one optimizer step; the docstring at the top says why."""
    part, W, ep, a = shapes_by_part(model), plan.ranks, plan.ep_size, plan.micro_steps
    layers, config, found = model.moe_layers(), model.config, []
    mine, replicas = split(part["experts"], ep), W // ep
    if plan.parallel == "fsdp":
        found = fsdp_traffic(part, mine, plan, config.n_layer, len(layers))
    else:
        shared = 4 * elements(part["outside"] + part["gates"] + part["blocks"])
        experts, tensors = 4 * elements(mine), sum(len(shapes) for shapes in part.values())
        whole = shared + (experts if ep == 1 else 0)
        buckets = math.ceil(whole / BUCKET)
        found.append(Collective("all_reduce", whole, W, 1, buckets, "last", min(1.0, BUCKET / whole)))
        if ep > 1:
            found.append(Collective("all_reduce", experts, replicas, ep, len(mine)))
        if plan.zero_stage:
            found.append(Collective("broadcast", whole, W, 1, tensors))
    if ep > 1:
        rows = plan.B * plan.T * config.num_experts_per_tok * config.n_embd * plan.element
        calls = len(layers) * a
        found.append(Collective("all_to_all", 4 * calls * rows, ep, 1, 4 * calls))
        found.append(Collective("all_to_all", calls * 8 * config.num_experts, ep, 1, calls))
    if layers:
        found.append(Collective("all_reduce", sum(8 * moe.step_totals.numel() for moe in layers), W))
    if plan.parallel == "fsdp" or ep > 1:
        found.append(Collective("all_reduce", 4, W if plan.parallel == "fsdp" else ep))
    return found


def fsdp_traffic(part: dict, experts: list, plan: Plan, blocks: int, moe_blocks: int) -> list[Collective]:
    """fsdp's gathers and scatters. experts: shapes of those that ranks of the same replica group share."""
    W, ep, a, found = plan.ranks, plan.ep_size, plan.micro_steps, []
    # (elements, bytes of each when gathered, ranks, stride, groups, whether gathered for the backward, too)
    groups = [
        (elements(part["outside"], W), 4, W, 1, 1, False),
        (elements(part["gates"], W), 4, W, 1, moe_blocks, True),
        (elements(part["blocks"], W), plan.element, W, 1, blocks, True),
        (expert_elements(experts, W // ep), plan.element, W // ep, ep, moe_blocks if ep > 1 else 0, True),
    ]
    for count, element, ranks, stride, calls, again in groups:
        late = 1 / (blocks + 1)
        if count == 0:
            continue
        for behind in ("forward", "backward")[: 1 + again]:
            size = a * count * element
            found.append(Collective("all_gather", size, ranks, stride, a * calls, behind, late))
        found.append(Collective("reduce_scatter", 4 * count, ranks, stride, calls, "last", late))
    return found


def step_seconds(
    model: GPTLMHeadModel, plan: Plan, links: Links, micro: float, update: float, overlap: float = 1.0
) -> tuple[float, float, float]:
    """(step, communication, exposed part of it), given the seconds of a micro-step and of an update on one
    rank. overlap: share of a compute phase that communication can hide behind."""
    collectives, a = traffic(model, plan), plan.micro_steps
    took = defaultdict(float)  # per micro-step
    late = defaultdict(float)
    for collective in collectives:
        seconds = links.seconds(collective) / (a if collective.behind in ("forward", "backward") else 1)
        took[collective.behind] += seconds
        late[collective.behind] += seconds * collective.late

    def exposed(phase: float, *names: str) -> float:
        total = sum(took[name] for name in names)
        return max(sum(late[name] for name in names), total - overlap * phase)

    waits = took[""] + a * exposed(micro / 3, "forward")
    waits += (a - 1) * exposed(2 / 3 * micro, "backward") + exposed(2 / 3 * micro, "backward", "last")
    communication = sum(links.seconds(collective) for collective in collectives)
    whole = elements([shape for shapes in shapes_by_part(model).values() for shape in shapes])
    updated = parameters_held(model, plan, plan.ranks) / whole / (plan.ranks if plan.zero_stage else 1)
    return a * micro + update * updated + waits, communication, waits


def memory(model: GPTLMHeadModel, plan: Plan) -> dict[str, float]:
    """Bytes on each rank by use."""
    config, count, part = model.config, parameters_held(model, plan, plan.ranks), shapes_by_part(model)
    uses = {
        "parameters": 4 * count, "gradients": 4 * count,
        "moments": 8 * count / (plan.ranks if plan.zero_stage else 1),
        "activations": memory_estimate(model, plan, plan.dtype, plan.ranks)["activations"],
    }  # fmt: skip
    if plan.parallel == "fsdp" and plan.ranks > 1:
        mine = expert_elements(split(part["experts"], plan.ep_size), plan.ranks // plan.ep_size)
        block = (elements(part["blocks"], plan.ranks) + mine) / config.n_layer
        outside = elements(part["outside"], plan.ranks)
        uses["gathered"] = 2 * block * plan.element + 4 * outside + 4 * max(block, outside)
        if plan.micro_steps > 1:
            uses["gathered"] += 4 * (block * config.n_layer + outside)
    if plan.ep_size > 1:
        rows = plan.B * plan.T * config.num_experts_per_tok * config.n_embd
        uses["rows"] = 2 * len(model.moe_layers()) * rows * plan.element
    return uses


def held(model: GPTLMHeadModel, plan: Plan) -> float:
    """Bytes of parameters, gradients and moments on each rank, the mean of all."""
    uses = memory(model, plan)
    return uses["parameters"] + uses["gradients"] + uses["moments"]


# ---------------------------------------------------------------------------- FORECAST


def ep_for(ranks: int, config: GPTConfig, links: Links) -> int:
    """The most ranks of a machine that can share the experts: a power of two that divides their number."""
    most = min(ranks, links.per_machine)
    return max(n for n in (1, 2, 4, 8, 16) if n <= most and config.num_experts % n == 0 and ranks % n == 0)


def forecast(
    model: GPTLMHeadModel, plan: Plan, names: list[str], ranks: list[int], links: Links,
    micro: float, update: float, total_batch_size: int,
) -> list[dict]:  # fmt: skip
    """The table: a row per layout and number of ranks. The batch stays total_batch_size tokens as long as
    every rank has a micro-step of it, and grows with the ranks after that."""
    rows = []
    for name in names:
        if "ep" in name and not model.moe_layers():
            continue
        for W in ranks:
            steps = max(1, total_batch_size // (plan.B * plan.T * W))
            fields = LAYOUTS[name] | ({"ep_size": ep_for(W, model.config, links)} if "ep" in name else {})
            this = replace(plan, ranks=W, micro_steps=steps, **fields)
            step, communication, waits = step_seconds(model, this, links, micro, update)
            tokens = W * steps * plan.B * plan.T
            alone = plan.B * plan.T * steps / (steps * micro + update)  # tokens/s of a rank without others
            shape = f" {W // this.ep_size} x {this.ep_size}" if "ep" in name else ""
            rows.append({
                "layout": name + shape, "ranks": W,
                "tokens/step": tokens, "GB sent": sum(c.sent for c in traffic(model, this)) / 1e9,
                "communication ms": 1e3 * communication, "exposed ms": 1e3 * waits, "ms": 1e3 * step,
                "tokens/s": round(tokens / step), "efficiency %": 100 * tokens / step / (W * alone),
                "GiB per rank": sum(memory(model, this).values()) / 2**30,
            })  # fmt: skip
    return rows
