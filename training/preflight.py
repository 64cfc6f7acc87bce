"""What a run will need, printed before its first step: parameters, tokens, epochs, memory.

The memory of the activations is an estimate, to a quarter: what autograd keeps of each token in every block,
and the logits. `size`: bytes of a number in the dtype of matrix products. `config`: a TrainConfig."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn

from layers.grouped_product import has_kernel
from layers.linear_cross_entropy import rows_per_chunk
from layers.mlp import get_activation
from layers.roles import role_of
from layers.sharding import dimension_to_shard
from model import GPTLMHeadModel
from training.muon import method_of

REPEATS_THAT_HURT = 4  # epochs; more epochs help little (Muennighoff et al., arXiv 2305.16264)


def parameters_by_part(model: GPTLMHeadModel) -> dict[str, int]:
    """Number of parameters of each part; a head that is tied to the embeddings counts as embeddings."""
    parts = dict.fromkeys(("embeddings", "head", "attention", "dense MLP", "experts", "routers", "norms"), 0)
    for name, parameter in model.named_parameters():
        parts[role_of(name).part] += parameter.numel()
    return {part: count for part, count in parts.items() if count}


def shapes_by_part(model: nn.Module, methods: Callable | None = None) -> dict[str, list[torch.Size]]:
    """Shapes of the parameters: "experts", "router", the "rest" of the blocks, and those "outside" of them.
    methods: only those for which this method_of() does not say "adamw"."""
    shapes = {"experts": [], "router": [], "rest": [], "outside": []}
    for name, parameter in model.named_parameters():
        if not methods or methods(name) != "adamw":
            shapes[role_of(name).lr_group if ".h." in name else "outside"].append(parameter.shape)
    return shapes


def split(shapes: list[torch.Size], ranks: int) -> list[torch.Size]:
    """Shapes of each rank's part, where `ranks` divides all dimensions 0."""
    return [torch.Size((shape[0] // ranks, *shape[1:])) for shape in shapes]


def elements(shapes: list[torch.Size], ranks: int = 1) -> int:
    """Elements of tensors whose dimension 0 is cut into equal parts, one per rank, the last ones padded."""
    return sum(math.ceil(shape[0] / ranks) * ranks * math.prod(shape[1:]) for shape in shapes)


def expert_elements(shapes: list[torch.Size], ranks: int) -> int:
    """Elements of stacked experts that FSDP cuts into parts, with FSDP's padding (parallel.shard)."""
    return sum(math.prod(s) if dimension_to_shard(s, ranks) else elements([s], ranks) for s in shapes)


def parameters_held(model: nn.Module, config, world_size: int, methods: Callable | None = None) -> int:
    """Elements of parameters that each rank holds. methods: as for shapes_by_part."""
    part, ranks = shapes_by_part(model, methods), world_size // config.ep_size
    rest, mine = part["outside"] + part["router"] + part["rest"], split(part["experts"], config.ep_size)
    if config.parallel == "fsdp":
        return elements(rest, world_size) // world_size + expert_elements(mine, ranks) // ranks
    return elements(rest) + elements(mine)


def attention_bytes(shape, size: int, device_type: str, backend: str) -> tuple[int, int]:
    """Bytes per head and pair of query and key: what a layer keeps for its backward, and uses meanwhile.
    backend: the one that the run takes on CUDA."""
    if device_type == "cuda" and backend == "math":  # torch computes the weights in fp32
        return (4 + 5 if shape.dropout else 4), 8
    if shape._attn_implementation == "eager":  # weights in fp32 and in the dtype of the next product
        dropout = (1 if device_type == "cuda" else size) + size if shape.dropout else 0  # mask and result
        return 4 + (size if size < 4 and not shape.dropout else 0) + dropout, 4 + size
    return (12, 4) if shape.dropout and device_type == "cpu" else (0, 0)  # CPU dropout is not fused


def block_bytes(shape, layer: int, size: int, device_type: str) -> int:
    """Bytes per token that a block keeps for its backward pass, without attention's weights."""
    C, wide, on_cuda = shape.n_embd, get_activation(shape.activation).parts, device_type == "cuda"
    kv = 2 * C * (shape.n_kv_head or shape.n_head) // shape.n_head
    needs = (4 + size) * 2 * C  # inputs and outputs of both norms
    needs += size * (C + kv) + size * 2 * C  # queries, keys, values; output of attention
    needs += 2 * C * (1 if on_cuda else size) if shape.dropout else 0  # two dropout masks
    if not shape.is_moe_layer(layer):
        return needs + size * (wide + 1) * (shape.mlp_hidden_size or 4 * C)  # hidden values
    H, K = shape.expert_hidden_size or 4 * C, shape.num_experts_per_tok
    needs += K * size * H * wide + 4 * 4 * shape.num_experts  # hidden values of K experts, and the router
    # activations; on CUDA, with grouped_mm, also weighted ones, and rows of C
    needs += K * size * (2 * H + 2 * C if on_cuda else H)
    return needs + size * 2 * (wide + 1) * H * shape.num_shared_experts


def head_bytes(shape, N: int, size: int, loss_chunk: int, device_type: str, trains: bool) -> int:
    """Bytes of the loss head at its peak, for N tokens."""
    V, C = shape.vocab_size, shape.n_embd
    copy = size if size < 4 else 0  # logits in the product's dtype, besides the fp32 copy
    if not loss_chunk:  # logits and in fp32: log-softmax and two gradients; or a copy and log-softmax
        return N * V * (size + 3 * 4 if trains else size + 4 + (4 if copy else 0))
    if has_kernel(device_type):
        logits, rows = size, rows_per_chunk(N, V, loss_chunk, "triton")
    else:
        logits = 4 + copy + (4 if device_type == "cuda" else 0)  # on CUDA logsumexp makes another copy
        rows = rows_per_chunk(N, V, loss_chunk, device_type)
    return logits * rows * V + (4 * (N * C + V * C) if trains else 0)


def activation_bytes(model: GPTLMHeadModel, config, dtype: str) -> int:
    """Bytes of the activations of a micro-step of (B, T) at their peak."""
    shape, device_type, trains = model.config, model.device.type, not config.inference_only
    size, N, C = 2 if dtype != "float32" else 4, config.B * config.T, shape.n_embd
    pairs = N * config.T * shape.n_head
    kept, passing = attention_bytes(shape, size, device_type, config.attention_backend)
    blocks = [N * block_bytes(shape, layer, size, device_type) for layer in range(shape.n_layer)]
    head = head_bytes(shape, N, size, config.loss_chunk, device_type, trains)
    stream = 4 * N * C + (4 * N * config.T if shape._attn_implementation == "eager" else 0)  # and the mask
    if not trains:  # no backward pass: memory holds one block or the head
        return stream + max(max(blocks) + 2 * 4 * pairs * (kept > 0), head)
    layers = [block + kept * pairs for block in blocks]
    if config.activation_checkpointing == "block":
        layers = [4 * N * C] * shape.n_layer + [max(layers)]
    return stream + sum(layers) + max(head, passing * pairs)


def memory_estimate(model: GPTLMHeadModel, config, dtype: str, world_size: int = 1) -> dict[str, int]:
    """Bytes on one device, by use, of training with micro-steps of (B, T), in fp32. FSDP divides all but
    activations among the ranks, zero_stage=1 the moments, ep_size the experts."""
    held, trains = parameters_held(model, config, world_size), not config.inference_only
    methods = partial(method_of, experts=config.muon_experts, adagrad_ngrams=config.adagrad_ngrams)
    not_adamw = parameters_held(model, config, world_size, methods) if config.optimizer == "muon" else 0
    moments = (8 * held - 4 * not_adamw) * trains  # AdamW keeps two numbers of each parameter, others one
    moments //= world_size if config.zero_stage else 1
    gradients = held
    if model.config.ngram_order and model.transformer.ngrams.sparse:  # the rows that a step uses, at most
        table = model.transformer.ngrams.weight
        rows = config.total_batch_size * (model.config.ngram_order - 1)
        gradients -= max(0, len(table) - rows) * table.size(1)
    activations = activation_bytes(model, config, dtype)
    weights = dict(parameters=4 * held, gradients=4 * gradients * trains)
    return weights | dict(optimizer=moments, activations=activations)


def larger_batch(config, model, accumulation: int, dtype: str, world_size: int, most: float) -> dict:
    """A row of the table that proposes the largest B for the same step in `most` bytes; may be empty."""
    for steps in range(1, accumulation):
        B, rest = divmod(config.B * accumulation, steps)
        need = sum(memory_estimate(model, replace(config, B=B), dtype, world_size).values())
        if rest == 0 and need < most:
            brings = f"{steps} micro-steps, not {accumulation}: larger products, fewer casts of the weights"
            return {"larger B": f"--B {B} needs about {need / 2**30:.1f} GiB; then a step has {brings}"}
    return {}


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of the device; None if torch and the system do not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def preflight(config, model: GPTLMHeadModel, accumulation: int, world, num_tokens: int, dtype: str,
              val_tokens: int | None = None, sources: Mapping = {},
              kept: Mapping = {}) -> tuple[str, list[str]]:  # fmt: skip
    """(table, warnings) for the resolved settings of a run over `num_tokens` tokens of training data.
    val_tokens: of the smallest validation set. sources: {name: (samples, epochs)} that a mixture reads.
    kept: the loader's, how many tokens become what if rows begin at documents."""
    per_step, warnings, dropped = config.total_batch_size, [], kept.get("dropped", 0)
    epochs = config.max_steps * per_step / (num_tokens - dropped)
    seen = f"seen {epochs:.2f} times"
    repeated = {"the data": epochs}
    if sources:
        seen = ", ".join(f"{name} {n:,} samples = {times:.2f} epochs" for name, (n, times) in sources.items())
        repeated = {f"source {name}": times for name, (_, times) in sources.items()}
    if config.overfit_single_batch:
        repeated, seen = {}, f"the same {per_step:,} of them at every step"
    memory = memory_estimate(model, config, dtype, world.size)
    need, have = sum(memory.values()), device_memory(model.device)
    uses = ", ".join(f"{use} {amount / 2**30:.2f}" for use, amount in memory.items())
    batch = f"{accumulation} micro-steps x B {config.B} x T {config.T} x {world.size} processes"
    rows = {
        "parameters": f"{model.get_num_params(False):,}, {model.get_num_active_params():,} active per token",
        "": ", ".join(f"{part} {count:,}" for part, count in parameters_by_part(model).items()),
        "data": f"{num_tokens:,} tokens, {seen}", "step": f"{per_step:,} tokens = {batch}",
        "steps": f"{config.max_steps:,}, {config.max_steps * per_step:,} tokens in all",
        "memory": f"about {need / 2**30:.2f}" + (f" of {have / 2**30:.1f}" if have else "") + f" GiB: {uses}",
        "device": f"{model.device}, {dtype}" + (", compiled" if config.use_compile else "")}  # fmt: skip
    if kept:
        rows["documents"] = ", ".join(f"{n / num_tokens:.1%} of tokens {what}" for what, n in kept.items())
    if dropped > num_tokens / 2:
        text = f"drops {dropped / num_tokens:.0%} of the tokens: documents are longer than T={config.T}"
        warnings.append(f"align='documents' {text}; raise --T, or omit --align")
    if model.device.type == "cuda" and need < have / 2:
        rows |= larger_batch(config, model, accumulation, dtype, world.size, 0.9 * have)
    if have and need > have:
        text = f"the run needs about {need / 2**30:.1f} GiB, {model.device} has {have / 2**30:.1f}"
        warnings.append(f"{text}: lower B, then T, then the model (n_layer, n_embd, num_experts)")
    ranks = world.size // config.ep_size
    shapes = split(shapes_by_part(model)["experts"], config.ep_size) if config.parallel == "fsdp" else []
    if uncut := [s[0] for s in shapes if dimension_to_shard(s, ranks) == 0 and s[0] < ranks]:
        text = f"{ranks} processes share {uncut[0]} experts: some get none, but send and hold as much"
        mend = "take a number of processes that divides num_experts, n_embd or expert_hidden_size"
        warnings.append(f"{text}: {mend}")
    if val_tokens is not None and config.val_steps * config.B * config.T * world.size > val_tokens:
        text = f"reads the {val_tokens:,} tokens of validation more than once; lower it"
        warnings.append(f"val_steps={config.val_steps} {text}")
    for name, times in repeated.items():
        if times > REPEATS_THAT_HURT:
            text = f"{name} will be seen {times:.1f} times; beyond {REPEATS_THAT_HURT} repetition helps"
            mend = f"lower {'its weight or ' if sources else ''}max_steps, or make more data with fineweb.py"
            warnings.append(f"{text} little: {mend}")
    return "\n".join(f"{name:12s}{text}" for name, text in rows.items()), warnings
