"""Formulas of how a step scales from one rank to 1,024: bytes sent, seconds and memory per rank.

Bytes that a rank sends in a collective over W ranks. S is the size of what all ranks have together after an
all-gather or before a reduce-scatter, and what each rank has in the other collectives. NCCL calls these bytes
divided by their time the bus bandwidth [1].

    all-reduce       2 (W-1)/W S    in a ring: reduce-scatter, then all-gather
    all-gather         (W-1)/W S    reduce-scatter too
    broadcast          (W-1)/W S    the average of ranks that take turns as root
    all-to-all         (W-1)/W S    with evenly loaded experts

What a step of `a` micro-steps sends (P parameters; other letters as in model.py):

    ddp     all-reduce of 4 P bytes of gradients in buckets of 25 MiB, in the last micro-step only [2]
    zero    as ddp; then each rank broadcasts the parameters that it has updated, 4 P bytes in all
    fsdp    per micro-step: all-gather of all parameters before the forward, and of the blocks' once more
            before the backward; in the last micro-step: reduce-scatter of 4 P bytes of gradients. With a = 1
            that is ZeRO's 3 P elements [3]. Blocks are gathered in the dtype of the matrix products, the rest
            in fp32. Dimension 0 is padded to a multiple of W (experts are cut along another dimension where W
            does not divide their number)
    ep      (W / ep) replicas x ep ranks. Per micro-step and layer: 4 all-to-alls of R C elements among ep
            ranks (rows, results, and the gradients of both). Gradients of experts: all-reduce of
            4 P_experts / ep bytes among the W / ep replicas. All other parameters as in ddp or fsdp
    all     all-reduces of some bytes: losses and signals, routing statistics, and the gradient norm where no
            rank has the whole gradient

Seconds = a * micro-step + update * (share of the parameters that the rank updates) + exposed communication.
The gradients of ddp and fsdp hide behind the last backward, except for the last bucket or block. The gathers
of fsdp hide behind the forward (a third of a micro-step) and the backward, except for the first block's. All
else is exposed. Not modelled: communication that slows down computation, uneven experts, stragglers, SHARP.

Links: a collective within a machine runs at NVLink's speed. A ring through machines runs at the speed of all
network cards of a machine together, at most NVLink's. Of an all-to-all, what leaves the machine passes the
rank's own card. Defaults: 80% of 450 GB/s per GPU and direction (H100 [4]) and of 50 GB/s per GPU (DGX H100
[5]); 10 us per call and hop, log2(W) hops.

Memory: fp32 parameters, gradients and two moments, as the layout divides them; with fsdp the gathered
parameters of two blocks and of embeddings and head, the gradient of one group, and whole gradients between
micro-steps; with ep the rows that arrive; activations as preflight.py estimates them.

References: [1] https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
[2] https://docs.pytorch.org/docs/stable/notes/ddp.html  [3] ZeRO, arXiv 1910.02054, section 7.2
[4] https://www.nvidia.com/en-us/data-center/h100/  [5] https://docs.nvidia.com/dgx/dgxh100-user-guide/
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from model import GPTConfig, GPTLMHeadModel
from training import preflight
from training.preflight import elements, expert_elements, shapes_by_part

BUCKET = 25 * 2**20  # bytes; DDP's bucket_cap_mb
SENT = {  # bytes that each of W ranks sends, as a multiple of (W-1)/W S
    "all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "all_to_all": 1,
}  # fmt: skip
LAYOUTS = {  # name: fields of Plan
    "ddp": {}, "zero": {"zero_stage": 1}, "fsdp": {"parallel": "fsdp"}, "ep": {"ep_size": 2},
    "fsdp+ep": {"parallel": "fsdp", "ep_size": 2},
}  # fmt: skip

# ---------------------------------------------------------------------------- FORMULAS


@dataclass(frozen=True)
class Plan:
    """Settings of a run, named as in train_gpt_moe.py, and its number of ranks and micro-steps."""

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
    behind: str = ""  # hidden by "forward" or "backward" of every micro-step, or by the "last" backward
    late: float = 1.0  # share that is never hidden

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return SENT[self.kind] * (self.ranks - 1) / self.ranks * self.size


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes/s per rank and direction, within and between machines; seconds per hop."""

    inside: float = 0.8 * 450e9
    outside: float = 0.8 * 50e9
    per_machine: int = 8
    latency: float = 10e-6

    def seconds(self, collective: Collective) -> float:
        """Time of all calls of a collective, one after the other."""
        ranks, sent = collective.ranks, collective.sent
        if ranks == 1:
            return 0.0
        hops = collective.calls * self.latency * math.ceil(math.log2(ranks))
        neighbours = min(ranks, max(1, self.per_machine // collective.stride))
        if ranks <= neighbours:
            return hops + sent / self.inside
        if collective.kind == "all_to_all":
            leaving = sent * (ranks - neighbours) / (ranks - 1)
            return hops + max(leaving / self.outside, (sent - leaving) / self.inside)
        return hops + sent / min(self.inside, neighbours * self.outside)


def meta_model(config: GPTConfig) -> GPTLMHeadModel:
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return GPTLMHeadModel(config)


def step_traffic(model: GPTLMHeadModel, plan: Plan) -> list[Collective]:
    """All collectives of one optimizer step."""
    part, W, ep, a = shapes_by_part(model), plan.ranks, plan.ep_size, plan.micro_steps
    layers, config, found = model.moe_layers(), model.config, []
    mine, replicas = preflight.split(part["experts"], ep), W // ep
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
    found.append(Collective("all_reduce", 4 * 6, W))  # losses and signals
    if layers:
        found.append(Collective("all_reduce", sum(8 * moe.step_totals.numel() for moe in layers), W))
    if plan.parallel == "fsdp" or ep > 1:
        found.append(Collective("all_reduce", 4, W if plan.parallel == "fsdp" else ep))
    return found


def fsdp_traffic(part: dict, experts: list, plan: Plan, blocks: int, moe_blocks: int) -> list[Collective]:
    """The gathers and scatters of fsdp. experts: their shapes on each rank of an ep group, before fsdp."""
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
    model: GPTLMHeadModel, plan: Plan, links: Links, micro: float, update: float
) -> tuple[float, float, float]:
    """Seconds of a step, of its communication, and of the exposed part of that.

    micro, update: seconds of a micro-step and of an update on one rank.
    """
    collectives, a = step_traffic(model, plan), plan.micro_steps
    took = defaultdict(float)  # per micro-step
    late = defaultdict(float)
    for collective in collectives:
        seconds = links.seconds(collective) / (a if collective.behind in ("forward", "backward") else 1)
        took[collective.behind] += seconds
        late[collective.behind] += seconds * collective.late

    def exposed(phase: float, *names: str) -> float:
        total = sum(took[name] for name in names)
        return max(sum(late[name] for name in names), total - phase)

    waits = took[""] + a * exposed(micro / 3, "forward")
    waits += (a - 1) * exposed(2 / 3 * micro, "backward") + exposed(2 / 3 * micro, "backward", "last")
    communication = sum(links.seconds(collective) for collective in collectives)
    whole = elements([shape for shapes in shapes_by_part(model).values() for shape in shapes])
    updated = (
        preflight.parameters_held(model, plan, plan.ranks) / whole / (plan.ranks if plan.zero_stage else 1)
    )
    return a * micro + update * updated + waits, communication, waits


def memory_by_use(model: GPTLMHeadModel, plan: Plan) -> dict[str, float]:
    """Bytes on each rank, by what they are used for."""
    config, count, part = (
        model.config,
        preflight.parameters_held(model, plan, plan.ranks),
        shapes_by_part(model),
    )
    uses = {
        "parameters": 4 * count, "gradients": 4 * count,
        "moments": 8 * count / (plan.ranks if plan.zero_stage else 1),
        "activations": preflight.memory_estimate(model, plan, plan.dtype, plan.ranks)["activations"],
    }  # fmt: skip
    if plan.parallel == "fsdp" and plan.ranks > 1:
        mine = expert_elements(preflight.split(part["experts"], plan.ep_size), plan.ranks // plan.ep_size)
        block = (elements(part["blocks"], plan.ranks) + mine) / config.n_layer
        outside = elements(part["outside"], plan.ranks)
        uses["gathered"] = 2 * block * plan.element + 4 * outside + 4 * max(block, outside)
        if plan.micro_steps > 1:
            uses["gathered"] += 4 * (block * config.n_layer + outside)
    if plan.ep_size > 1:
        rows = plan.B * plan.T * config.num_experts_per_tok * config.n_embd
        uses["rows"] = 2 * len(model.moe_layers()) * rows * plan.element
    return uses


def state_bytes(model: GPTLMHeadModel, plan: Plan) -> float:
    """Bytes of parameters, gradients and moments on a rank: the mean over all ranks."""
    uses = memory_by_use(model, plan)
    return uses["parameters"] + uses["gradients"] + uses["moments"]


# ---------------------------------------------------------------------------- FORECAST


def ep_for(ranks: int, config: GPTConfig, links: Links) -> int:
    """The largest ep_size that fits into a machine: a power of two that divides ranks and experts."""
    most = min(ranks, links.per_machine)
    return max(n for n in (1, 2, 4, 8, 16) if n <= most and config.num_experts % n == 0 and ranks % n == 0)


def forecast(
    model: GPTLMHeadModel, plan: Plan, names: list[str], ranks: list[int], links: Links,
    micro: float, update: float, total_batch_size: int,
) -> list[dict]:  # fmt: skip
    """A row per layout and number of ranks. A step has total_batch_size tokens while that is a micro-step or
    more per rank; with more ranks it grows."""
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
            alone = plan.B * plan.T * steps / (steps * micro + update)  # tokens/s of one rank by itself
            shape = f" {W // this.ep_size} x {this.ep_size}" if "ep" in name else ""
            rows.append({
                "layout": name + shape, "ranks": W,
                "tokens/step": tokens, "GB sent": sum(c.sent for c in step_traffic(model, this)) / 1e9,
                "communication ms": 1e3 * communication, "exposed ms": 1e3 * waits, "ms": 1e3 * step,
                "tokens/s": round(tokens / step), "efficiency %": 100 * tokens / step / (W * alone),
                "GiB per rank": sum(memory_by_use(model, this).values()) / 2**30,
            })  # fmt: skip
    return rows
