"""From settings to everything a run needs: checks, data, model, optimizer, schedule, what is resumed.

`config` is train_gpt_moe.py's TrainConfig throughout.
"""

import dataclasses
import math

import torch

import checkpoint as ckpt
import parallel
from fineweb import DistributedDataLoader, find_shards
from model import GPTConfig, GPTLMHeadModel
from muon import configure_muon


def check_config(config, world: parallel.World) -> int:
    """Number of micro-steps per optimizer step. ValueError, naming field and value, for what cannot work."""
    least = dict(
        B=1, T=1, total_batch_size=1, max_steps=0, max_lr=0, min_lr=0, warmup_steps=0, grad_clip=0,
        weight_decay=0, infer_step=0, val_steps=1, sample_every=-1, sample_tokens=1, checkpoint_every=0,
        keep_last=0, keep_every=0, max_bad_steps=1, log_every=1,
        router_lr_mult=0, expert_lr_mult=0, block_size=0, vocab_size=0,
    )  # fmt: skip
    for name, smallest in least.items():
        if not getattr(config, name) >= smallest:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least {smallest}")
    choices = dict(
        optimizer=["adamw", "muon"], schedule=["cosine", "wsd"], parallel=["ddp", "none"],
        dtype=["auto", "float32", "bfloat16"],
    )  # fmt: skip
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}: choose one of {', '.join(allowed)}")
    if not 0 < config.wsd_decay_frac <= 1:
        raise ValueError(f"wsd_decay_frac={config.wsd_decay_frac}: must be above 0 and at most 1")
    if config.learning_rate_decay_frac is not None:
        config.min_lr, config.learning_rate_decay_frac = config.learning_rate_decay_frac * config.max_lr, None
    if config.min_lr > config.max_lr:
        raise ValueError(f"min_lr={config.min_lr} is more than max_lr={config.max_lr}; lower --min_lr")
    if 0 < config.max_steps <= config.warmup_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} leaves nothing of max_steps={config.max_steps}; lower it"
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


def build_loaders(config, world: parallel.World, meta: dict):
    """(training loader, validation loader); the latter reads the same batches whenever it is reset."""
    train_files = config.input_bin or find_shards(config.data_dir, "train")
    val_files = config.input_val_bin or find_shards(config.data_dir, "val")
    arguments = dict(
        B=config.B, T=config.T, rank=world.rank, world_size=world.size, device=world.device,
        vocab_size=meta["vocab_size"],
    )  # fmt: skip
    # Shuffled as well, by a seed that never changes: batches then come from all over the validation shard,
    # and are the same for every run, B and number of ranks.
    return (
        DistributedDataLoader(train_files, seed=config.seed, **arguments),
        DistributedDataLoader(val_files, seed=0, **arguments),
    )


def build_model(config, given: set[str], meta: dict, resumed: dict | None) -> GPTLMHeadModel:
    """The model to train, on the CPU: the resumed checkpoint's, or new, or with the weights of init_from.

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
        return GPTLMHeadModel(GPTConfig(**(resumed["config"] | changed)))
    fields |= dict(
        encoding=meta["encoding"], encoding_size=meta["vocab_size"], eos_token_id=meta["eot_token"]
    )
    fields["block_size"] = config.block_size or config.T
    fields["vocab_size"] = config.vocab_size or 128 * math.ceil(meta["vocab_size"] / 128)
    if fields["vocab_size"] < meta["vocab_size"]:
        raise ValueError(
            f"vocab_size={config.vocab_size}, but the data's encoding {meta['encoding']!r} has "
            f"{meta['vocab_size']} tokens; leave the flag away"
        )
    torch.manual_seed(config.seed)
    if not config.init_from:
        return GPTLMHeadModel(GPTConfig(**fields))
    given = {name for name in given if name not in ("vocab_size", "block_size") or getattr(config, name)}
    model = ckpt.begin_from(config.init_from, fields, given, config.T)
    for name in names:  # from here on the settings are those of the model
        setattr(config, name, getattr(model.config, name))
    return model


def build_optimizer(config, model: GPTLMHeadModel) -> torch.optim.Optimizer:
    """AdamW for everything, or Muon for the matrices and AdamW for the rest."""
    settings = (config.weight_decay, config.max_lr, (config.beta1, config.beta2), model.device.type)
    multiples = dict(router_lr_mult=config.router_lr_mult, expert_lr_mult=config.expert_lr_mult)
    if config.optimizer == "muon":
        return configure_muon(model, *settings, **multiples)
    return model.configure_optimizers(*settings, **multiples)


def learning_rate(step: int, config) -> float:
    """Linear warmup to max_lr, then down to min_lr at max_steps: half a cosine (GPT-3, appendix B), or with
    schedule="wsd" constant until the last wsd_decay_frac of all steps, then linear (arXiv 2404.06395)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        share = (config.max_steps - step) / max(1.0, config.wsd_decay_frac * config.max_steps)
    else:
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_lr + (config.max_lr - config.min_lr) * min(max(share, 0.0), 1.0)
