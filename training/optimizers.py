"""Optimizers and learning-rate schedules: a new one needs a row in OPTIMIZERS or SCHEDULES.

`config` is train_gpt_moe.py's TrainConfig throughout.
"""

import math

import torch

from model import GPTLMHeadModel
from training.muon import configure_muon

# name: how to build it from model, settings that all optimizers share, and config
OPTIMIZERS = {
    "adamw": lambda model, shared, config: model.configure_optimizers(**shared),
    "muon": lambda model, shared, config: configure_muon(
        model, **shared, replicated=config.zero_stage == 0, steps=config.muon_steps,
        experts=config.muon_experts, adagrad_ngrams=config.adagrad_ngrams),
}  # fmt: skip


def cosine(step: int, config) -> float:
    """The share of max_lr - min_lr falls from 1 to 0 as half a cosine (GPT-3, arXiv 2005.14165, app. B)."""
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def wsd(step: int, config) -> float:
    """The share of max_lr - min_lr is 1, then falls to 0 in the last wsd_decay_frac of steps (2404.06395)."""
    decay = min(config.wsd_decay_frac * config.max_steps, config.max_steps - config.warmup_steps)
    return (config.max_steps - step) / max(1.0, decay)


SCHEDULES = {schedule.__name__: schedule for schedule in (cosine, wsd)}


def learning_rate(step: int, config) -> float:
    """The learning rate of a step: linear warmup to max_lr, then min_lr + share * (max_lr - min_lr)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    share = SCHEDULES[config.schedule](step, config)
    return config.min_lr + (config.max_lr - config.min_lr) * min(max(share, 0.0), 1.0)


def build_optimizer(config, model: GPTLMHeadModel) -> torch.optim.Optimizer:
    """The optimizer that config.optimizer names, for a model that already lies on its device."""
    shared = {name: getattr(config, name) for name in ("weight_decay", "router_lr_mult", "expert_lr_mult")}
    betas = (config.beta1, config.beta2)
    shared |= dict(learning_rate=config.max_lr, betas=betas, device_type=model.device.type)
    return OPTIMIZERS[config.optimizer](model, shared, config)
