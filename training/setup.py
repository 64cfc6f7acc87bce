"""From settings to everything a run needs: checks, data, model, optimizer, schedule, what is resumed.

`config` is train_gpt_moe.py's TrainConfig throughout.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from fineweb import DistributedDataLoader, find_shards
from layers.attention import BACKENDS
from model import GPTConfig, GPTLMHeadModel
from training import checkpoints as ckpt
from training import parallel
from training.fsdp_init import initial_weights
from training.optimizers import OPTIMIZERS, SCHEDULES, check_optimizer


def check_config(
    config, world: parallel.World, given: set[str] | None = None, say: Callable = print
) -> int:  # fmt: skip
    """Number of micro-steps per optimizer step. ValueError, naming field and value, for what cannot work.

    given: of a new run, the settings that flags have set; None for a resumed one, which keeps its settings.
    """
    least = dict(
        B=1, T=1, total_batch_size=1, max_steps=0, max_lr=0, min_lr=0, warmup_steps=0, grad_clip=0,
        weight_decay=0, infer_step=0, val_steps=1, sample_every=-1, sample_tokens=1, checkpoint_every=0,
        keep_last=0, keep_every=0, max_bad_steps=1, log_every=1, loss_chunk=-1, hellaswag_limit=0,
        plot_every=0, router_lr_mult=0, expert_lr_mult=0, block_size=0, vocab_size=-1, zero_stage=0,
        ep_size=1,
    )  # fmt: skip
    for name, smallest in least.items():
        if not getattr(config, name) >= smallest:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least {smallest}")
    choices = dict(
        optimizer=list(OPTIMIZERS), schedule=list(SCHEDULES), parallel=["ddp", "fsdp", "none"],
        dtype=["auto", "float32", "bfloat16", "float16"], zero_stage=[0, 1],
        activation_checkpointing=["none", "block"], attention_backend=["auto", *BACKENDS],
    )  # fmt: skip
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: choose one of {', '.join(map(str, allowed))}"
            )
    check_layout(config, world)
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed={config.seed}: must be at least 0 and below 2**63")
    if not 0 < config.wsd_decay_frac <= 1:
        raise ValueError(f"wsd_decay_frac={config.wsd_decay_frac}: must be above 0 and at most 1")
    frac = config.learning_rate_decay_frac
    if frac is not None:
        if not 0 <= frac <= 1:
            raise ValueError(
                f"learning_rate_decay_frac={frac}: min_lr is a fraction of max_lr, from 0 to 1; change "
                "--learning_rate_decay_frac"
            )
        config.min_lr, config.learning_rate_decay_frac = frac * config.max_lr, None
    if config.min_lr > config.max_lr:
        raise ValueError(f"min_lr={config.min_lr} is more than max_lr={config.max_lr}; lower --min_lr")
    fit_warmup(config, given, say)
    if config.write_tensors and config.use_moe and not (config.init_from or config.inference_only):
        raise ValueError(
            "write_tensors=True writes llm.c's files, whose models have no experts, but use_moe=True; give "
            "--use_moe False, or leave --write_tensors away"
        )
    if config.block_size and config.T > config.block_size:
        raise ValueError(f"T={config.T} is more than block_size={config.block_size}; lower --T or raise that")
    per_micro_step = config.B * config.T * world.size
    if config.total_batch_size % per_micro_step != 0:
        raise ValueError(
            f"total_batch_size={config.total_batch_size} is not a multiple of B * T * processes = "
            f"{config.B} * {config.T} * {world.size} = {per_micro_step}; the nearest that is: "
            f"{max(1, round(config.total_batch_size / per_micro_step)) * per_micro_step}"
        )
    return config.total_batch_size // per_micro_step


def fit_warmup(config, given: set[str] | None, say: Callable) -> None:
    """Make a default's or a preset's warmup shorter where max_steps is no longer than it, and say so.

    ValueError if it is a flag's or a resumed run's; given as in check_config.
    """
    warmup, steps = config.warmup_steps, config.max_steps
    if not 0 < steps <= warmup:
        return
    if given is None or "warmup_steps" in given:
        raise ValueError(f"warmup_steps={warmup} leaves nothing of max_steps={steps}; lower --warmup_steps")
    config.warmup_steps = steps // 10
    say(
        f"warmup_steps={warmup} leaves nothing of max_steps={steps}: shortened to {config.warmup_steps} "
        "(--warmup_steps sets it)"
    )


def check_layout(config, world: parallel.World) -> None:
    """ValueError for ways to spread a model over processes that exclude each other, or find no processes."""
    fsdp, zero, ep_size = config.parallel == "fsdp", config.zero_stage > 0, config.ep_size
    if (fsdp or zero) and not dist.is_initialized():
        what = "parallel=fsdp" if fsdp else "zero_stage=1"
        raise ValueError(
            f"{what} needs processes: start with torchrun --nproc_per_node=N train_gpt_moe.py (N may be 1)"
        )
    if zero and config.parallel != "ddp":
        raise ValueError(
            f"zero_stage=1 is a form of --parallel ddp, but parallel={config.parallel}"
            + (", which divides the optimizer up already; leave --zero_stage away" if fsdp else "")
        )
    if zero and ep_size > 1:
        raise ValueError(
            f"zero_stage=1 wants the same parameters on all ranks, but ep_size={ep_size} gives them other "
            "experts; to divide the rest of the optimizer up too, use --parallel fsdp with --ep_size"
        )
    check_optimizer(config)
    if config.dtype == "float16" and (fsdp or ep_size > 1):
        raise ValueError(
            "dtype=float16 scales gradients by what it finds in all of them, but no rank has them all with "
            "--parallel fsdp or --ep_size; use --dtype bfloat16"
        )
    if config.write_tensors and fsdp:
        raise ValueError(
            "write_tensors=True writes a whole model, but parallel=fsdp leaves none on any rank; use ddp"
        )
    if ep_size == 1:
        return
    if config.parallel == "none":
        raise ValueError(f"ep_size={ep_size} is for many processes, but parallel=none; use --parallel ddp")
    if world.size % ep_size != 0:
        raise ValueError(f"ep_size={ep_size} does not divide the number of processes, {world.size}")
    if not config.init_from:  # else the experts are those of another model
        check_experts(config, ep_size)


def check_experts(config, ep_size: int) -> None:
    """ValueError if the experts cannot be dealt out to ep_size ranks. config: a run's or a model's."""
    if ep_size > 1 and not config.use_moe:
        raise ValueError(f"ep_size={ep_size} deals experts out, but use_moe=False: there are none")
    if ep_size > 1 and config.num_experts % ep_size != 0:
        raise ValueError(f"ep_size={ep_size} does not divide num_experts={config.num_experts}")


def build_loaders(config, world: parallel.World, meta: dict):
    """(training loader, validation loader); the latter reads the same batches whenever it is reset.

    As in llm.c there is none, None, where input_bin is given without input_val_bin.
    """
    train_files = config.input_bin or find_shards(config.data_dir, "train")
    val_files = config.input_val_bin or (None if config.input_bin else find_shards(config.data_dir, "val"))
    arguments = dict(
        B=config.B, T=config.T, rank=world.rank, world_size=world.size, device=world.device,
        vocab_size=meta["vocab_size"],
    )  # fmt: skip
    # Shuffled as well, by a seed that never changes: batches then come from all over the validation shard, in
    # an order that is the same for every run. Unshuffled they are its first ones, as llm.c's. (How far they
    # go is val_steps * B * ranks.)
    return (
        DistributedDataLoader(train_files, seed=config.seed, shuffle=config.shuffle, **arguments),
        DistributedDataLoader(val_files, seed=0, shuffle=config.shuffle, **arguments) if val_files else None,
    )


def build_model(config, given: set[str], meta: dict, resumed: dict | None) -> GPTLMHeadModel:
    """The model to train, on the CPU: the resumed checkpoint's, or new, or with the weights of init_from.

    With parallel="fsdp" only the one with the weights of init_from is: the others are on the meta device,
    without weights, because they may be larger than any memory.
    ValueError for settings that contradict each other, the data, or where the weights come from.
    """
    names = {field.name for field in dataclasses.fields(config)} & set(GPTConfig.__annotations__)
    fields = {name: getattr(config, name) for name in names}
    if resumed:
        speaks = resumed["config"].get("encoding")
        if speaks != meta["encoding"]:
            raise ValueError(
                f"resume: encoding={speaks!r} in the checkpoint, but {meta['encoding']!r} in the data; give "
                "the data it was trained with, or start a new run"
            )
        changed = {name: fields[name] for name in names & ckpt.MAY_CHANGE}
        return new_model(GPTConfig(**(resumed["config"] | changed)), config.parallel)
    fields |= dict(
        encoding=meta["encoding"], encoding_size=meta["vocab_size"], eos_token_id=meta["eot_token"],
        bos_token_id=meta["eot_token"],  # documents begin with it, and so does a text without a prompt
    )  # fmt: skip
    fields["block_size"] = config.block_size or config.T
    # Logits of rows that only pad take part in the loss (by 0.001 at first); llm.c, whose files and losses
    # shall agree, has none.
    multiple = 1 if config.vocab_size < 0 or config.write_tensors else 128
    rounded = multiple * math.ceil(meta["vocab_size"] / multiple)
    fields["vocab_size"] = max(config.vocab_size, 0) or rounded
    if fields["vocab_size"] < meta["vocab_size"]:
        raise ValueError(
            f"vocab_size={config.vocab_size}, but the data's encoding {meta['encoding']!r} has "
            f"{meta['vocab_size']} tokens; leave the flag away"
        )
    torch.manual_seed(config.seed)
    if not config.init_from:
        return new_model(GPTConfig(**fields), config.parallel)
    given = {name for name in given if name not in ("vocab_size", "block_size") or getattr(config, name)}
    model = ckpt.begin_from(config.init_from, fields, given, config.T)
    if model.config.bos_token_id is None:  # in checkpoints of old
        model.config.bos_token_id = meta["eot_token"]
    for name in names:  # from here on the settings are those of the model
        setattr(config, name, getattr(model.config, name))
    check_experts(model.config, config.ep_size)
    return model


def new_model(config: GPTConfig, parallel: str) -> GPTLMHeadModel:
    """A model of that configuration with random weights, or with parallel="fsdp" on the meta device."""
    with torch.device("meta" if parallel == "fsdp" else "cpu"):
        return GPTLMHeadModel(config)


def place_model(
    config, model: GPTLMHeadModel, layout: parallel.Layout, dtype: str, resumed: dict | None
) -> GPTLMHeadModel:
    """build_model's model on this rank's device, all of it or what the layout gives this rank."""
    weights: Iterator = iter(())
    if layout.parallel == "fsdp" and model.device.type != "meta":
        weights, model = iter(model.state_dict().items()), new_model(model.config, "fsdp")
    elif layout.parallel == "fsdp" and resumed is None:  # else the checkpoint's weights come later
        weights = initial_weights(model.config, config.seed)
    parallel.place(model, layout, dtype, weights)
    if config.activation_checkpointing == "block":
        newer = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        newer({"use_reentrant": False})
    return model
