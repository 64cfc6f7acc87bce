"""What a run will need, told before its first step: parameters, tokens, epochs, memory.

Used by train_gpt_moe.py. The memory of the activations is an estimate, good to about a quarter for the models
of model.py: what autograd keeps of each token in every block, and the logits, which are the peak of small
models.
"""

import math
import os

import torch
import torch.nn as nn

from layers.experts import KEEP_ACTIVATION_BELOW
from layers.linear_cross_entropy import rows_per_chunk
from layers.mlp import get_activation
from layers.sharding import dimension_to_shard
from model import GPTLMHeadModel

REPEATS_THAT_HURT = (
    4  # epochs; beyond it repeated data is worth little (Muennighoff et al., arXiv 2305.16264)
)


def parameters_by_part(model: GPTLMHeadModel) -> dict[str, int]:
    """Number of parameters of each part; a head that is tied to the embeddings counts as embeddings."""
    parts = dict.fromkeys(("embeddings", "head", "attention", "dense MLP", "experts", "routers", "norms"), 0)
    for name, parameter in model.named_parameters():
        if ".ln_" in name or "_norm." in name:
            part = "norms"
        elif ".attn." in name:
            part = "attention"
        elif ".gate." in name:
            part = "routers"
        elif ".experts." in name or ".shared." in name:
            part = "experts"
        elif ".mlp." in name:
            part = "dense MLP"
        else:
            part = "head" if name.startswith("lm_head") else "embeddings"
        parts[part] += parameter.numel()
    return {part: count for part, count in parts.items() if count}


def shapes_by_part(model: nn.Module) -> dict[str, list[torch.Size]]:
    """Shapes of the parameters: "experts", "gates", the rest of the "blocks", and those "outside" of them."""
    shapes = {"experts": [], "gates": [], "blocks": [], "outside": []}
    for name, parameter in model.named_parameters():
        block = (".gate." in name and "gates") or (".experts." in name and "experts") or "blocks"
        shapes[block if ".h." in name else "outside"].append(parameter.shape)
    return shapes


def split(shapes: list[torch.Size], ranks: int) -> list[torch.Size]:
    """Shapes of each rank's part, where `ranks` divides all dimensions 0."""
    return [torch.Size((shape[0] // ranks, *shape[1:])) for shape in shapes]


def elements(shapes: list[torch.Size], ranks: int = 1) -> int:
    """Elements of tensors whose dimension 0 is cut into equal parts, one per rank, the last ones padded."""
    return sum(math.ceil(shape[0] / ranks) * ranks * math.prod(shape[1:]) for shape in shapes)


def expert_elements(shapes: list[torch.Size], ranks: int) -> int:
    """Elements of stacked experts that fsdp cuts into parts, padding where it has to (parallel.shard)."""
    return sum(
        math.prod(shape) if dimension_to_shard(shape, ranks) else elements([shape], ranks) for shape in shapes
    )


def parameters_held(model: nn.Module, config, world_size: int) -> int:
    """Elements of parameters that each rank holds. config: TrainConfig, or what has its parallel, ep_size."""
    part, ranks = shapes_by_part(model), world_size // config.ep_size
    rest, mine = part["outside"] + part["gates"] + part["blocks"], split(part["experts"], config.ep_size)
    if config.parallel == "fsdp":
        return elements(rest, world_size) // world_size + expert_elements(mine, ranks) // ranks
    return elements(rest) + elements(mine)


def attention_bytes(shape, size: int, device_type: str) -> tuple[int, int]:
    """Bytes per pair of query and key, and head, that a layer keeps for its backward, and those in passing.

    (0, 0) for fused kernels. Attention written out keeps its weights in fp32, and in the dtype of the product
    with the values; dropout, its mask and what it leaves. CPUs have no fused kernel with dropout, and what
    stands in works in fp32.
    """
    if shape._attn_implementation == "eager":
        mask = 1 if device_type == "cuda" else size
        dropout = mask + size if shape.dropout else 0
        return 4 + (size if size < 4 and not shape.dropout else 0) + dropout, 4 + size
    return (12, 4) if shape.dropout and device_type == "cpu" else (0, 0)


def block_bytes(shape, layer: int, size: int, device_type: str) -> int:
    """Bytes per token that a block keeps for its backward, attention's weights apart; size: of its products'
    numbers."""
    C, wide = shape.n_embd, get_activation(shape.activation).parts
    kv = 2 * C * (shape.n_kv_head or shape.n_head) // shape.n_head
    kept = 2 * 4 * C + size * (2 * C + C + kv + 2 * C)
    if shape.dropout:  # two masks, which CUDA has as booleans
        kept += 2 * C * (1 if device_type == "cuda" else size)
    if not shape.is_moe_layer(layer):
        return kept + size * (wide + 1) * (shape.mlp_hidden_size or 4 * C)
    H, K = shape.expert_hidden_size or 4 * C, shape.num_experts_per_tok
    kept += K * size * H * wide + 4 * 4 * shape.num_experts
    if device_type == "cuda":  # grouped_mm keeps the activation, weighted too, and rows of C
        kept += K * size * (2 * H + 2 * C)
    elif C < KEEP_ACTIVATION_BELOW:
        kept += K * size * H
    return kept + size * 2 * (wide + 1) * H * shape.num_shared_experts


def head_bytes(shape, N: int, size: int, loss_chunk: int, device_type: str, trains: bool) -> int:
    """Bytes of the loss head at its peak, for N tokens: logits, and in fp32 what comes of them."""
    V, C = shape.vocab_size, shape.n_embd
    if not loss_chunk:  # logits, log-softmax, two gradients at once; or logits, in fp32, too, and log-softmax
        return N * V * (size + 3 * 4 if trains else size + 4 + (4 if size < 4 else 0))
    rows = rows_per_chunk(N, V, loss_chunk, device_type)
    logits = 4 + (size if size < 4 else 0)  # in fp32, and as the product gave them
    if device_type == "cuda":
        logits += 4  # within logsumexp
    return logits * rows * V + (4 * (N * C + V * C) if trains else 0)


def activation_bytes(model: GPTLMHeadModel, config, dtype: str) -> int:
    """Bytes of what a micro-step of (B, T) makes, at its peak; config as in memory_estimate."""
    shape, device_type, trains = model.config, model.device.type, not getattr(config, "inference_only", False)
    size, N, C = 2 if dtype != "float32" else 4, config.B * config.T, shape.n_embd
    pairs = N * config.T * shape.n_head
    kept, passing = attention_bytes(shape, size, device_type)
    mask = 4 * N * config.T if shape._attn_implementation == "eager" else 0
    blocks = [N * block_bytes(shape, layer, size, device_type) for layer in range(shape.n_layer)]
    head = head_bytes(shape, N, size, config.loss_chunk, device_type, trains)
    stream = 4 * N * C + mask
    if not trains:  # nothing is kept: a block and the head are not there together
        return stream + max(max(blocks) + 2 * 4 * pairs * (kept > 0), head)
    layers = [block + kept * pairs for block in blocks]
    if config.activation_checkpointing == "block":
        layers = [4 * N * C] * shape.n_layer + [max(layers)]
    return stream + sum(layers) + max(head, passing * pairs)


def memory_estimate(model: GPTLMHeadModel, config, dtype: str, world_size: int = 1) -> dict[str, int]:
    """Bytes on one device, by use, of training with AdamW and micro-steps of (B, T). config: TrainConfig.

    Parameters, gradients and the two moments are fp32; fsdp shares them all between the ranks, zero_stage=1
    the moments, ep_size the experts. A block keeps, per token, its norms' inputs (fp32) and, in the dtype of
    the matrix products, the norms' outputs, q, k, v, attention's output and the hidden values of the
    feed-forward (for each of the K experts), and attention that is not fused its T x T weights; with
    activation_checkpointing its input, and one block all. The head has the logits and, in fp32, their
    log-softmax and two gradients at once; with loss_chunk only of so many rows, and gradients of its input
    and weight besides. With inference_only there are neither gradients nor moments, and nothing is kept.
    """
    held, trains = parameters_held(model, config, world_size), not getattr(config, "inference_only", False)
    return {
        "parameters": 4 * held,
        "gradients": 4 * held * trains,
        "optimizer": 8 * held * trains // (world_size if config.zero_stage else 1),
        "activations": activation_bytes(model, config, dtype),
    }


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory the device has in all; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def preflight(
    config, model: GPTLMHeadModel, accumulation: int, world, num_tokens: int, dtype: str,
    val_tokens: int | None = None,
) -> tuple[str, list[str]]:  # fmt: skip
    """(table, warnings) for the resolved settings of a run over `num_tokens` tokens of training data."""
    epochs = config.max_steps * config.total_batch_size / num_tokens
    seen = f"seen {epochs:.2f} times"
    if config.overfit_single_batch:
        epochs, seen = 0.0, f"the same {config.total_batch_size:,} of them at every step"
    parts = ", ".join(f"{part} {count:,}" for part, count in parameters_by_part(model).items())
    memory = memory_estimate(model, config, dtype, world.size)
    need, have = sum(memory.values()), device_memory(model.device)
    uses = ", ".join(f"{use} {amount / 2**30:.2f}" for use, amount in memory.items())
    share = f" of {have / 2**30:.1f}" if have else ""
    batch = f"{accumulation} micro-steps x B {config.B} x T {config.T} x {world.size} processes"
    rows = {
        "parameters": f"{model.get_num_params(False):,}, {model.get_num_active_params():,} active per token",
        "": parts,
        "data": f"{num_tokens:,} tokens, {seen}",
        "step": f"{config.total_batch_size:,} tokens = {batch}",
        "steps": f"{config.max_steps:,}, {config.max_steps * config.total_batch_size:,} tokens in all",
        "memory": f"about {need / 2**30:.2f}{share} GiB: {uses}",
        "device": f"{model.device}, {dtype}" + (", compiled" if config.use_compile else ""),
    }
    warnings = []
    if have is not None and need > have:
        warnings.append(
            f"the run needs about {need / 2**30:.1f} GiB, {model.device} has {have / 2**30:.1f}: lower B, "
            "then T, then the model (n_layer, n_embd, num_experts)"
        )
    if config.parallel == "fsdp":
        ranks = world.size // config.ep_size
        shapes = split(shapes_by_part(model)["experts"], config.ep_size)
        uncut = [shape[0] for shape in shapes if dimension_to_shard(shape, ranks) == 0 and shape[0] < ranks]
        if uncut:
            warnings.append(
                f"of {ranks} processes that share out {uncut[0]} experts the rest get none, but gather as if "
                "they had: take a number of processes that divides num_experts, n_embd or expert_hidden_size"
            )
    if val_tokens is not None and config.val_steps * config.B * config.T * world.size > val_tokens:
        warnings.append(
            f"val_steps={config.val_steps} take the {val_tokens:,} tokens of validation more than once: "
            "fewer say as much"
        )
    if epochs > REPEATS_THAT_HURT:
        warnings.append(
            f"the data will be seen {epochs:.1f} times; beyond {REPEATS_THAT_HURT} repetition helps little: "
            "lower max_steps or make more data with fineweb.py"
        )
    return "\n".join(f"{name:12s}{text}" for name, text in rows.items()), warnings
