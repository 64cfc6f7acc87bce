"""Optimizers and schedules by name."""

import math
from collections.abc import Iterator

import torch

from model import Block, GPTConfig, GPTLMHeadModel
from training.muon import check_muon, configure_muon

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")


def check_optimizer(config) -> None:
    """ValueError for an optimizer that cannot work in this layout."""
    if config.optimizer == "muon":
        check_muon(config.parallel, config.zero_stage)


def initial_weights(config: GPTConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of all parameters and buffers, as GPTLMHeadModel(config) has them after
    torch.manual_seed(seed), but never more than one module's at a time.

    The same numbers, because the same random numbers are drawn in the same order: those that the modules'
    constructors draw and _init_weights replaces (they are drawn here and dropped), then those that stay.
    """
    torch.manual_seed(seed)
    torch.nn.Embedding(config.vocab_size, config.n_embd)
    if config.position == "learned":
        torch.nn.Embedding(config.block_size, config.n_embd)
    for layer in range(config.n_layer):
        Block(config, layer)
    torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
    with torch.device("meta"):
        model = GPTLMHeadModel(config)
    names = {module: name for name, module in model.named_modules()}

    def inner_first(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        for child in module.children():
            yield from inner_first(child)
        yield module

    for module in inner_first(model):  # transformers' order
        module.to_empty(device="cpu", recurse=False)
        model._init_weights(module)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield from ((f"{names[module]}.{name}", tensor.detach()) for name, tensor in own)
        module._apply(lambda tensor: tensor.to("meta"), recurse=False)


def build_optimizer(config, model: GPTLMHeadModel) -> torch.optim.Optimizer:
    """AdamW for everything, or Muon for the matrices and AdamW for the rest."""
    settings = (config.weight_decay, config.max_lr, (config.beta1, config.beta2), model.device.type)
    multiples = dict(router_lr_mult=config.router_lr_mult, expert_lr_mult=config.expert_lr_mult)
    if config.optimizer == "muon":
        return configure_muon(model, *settings, **multiples, expert_parallel=config.ep_size > 1)
    return model.configure_optimizers(*settings, **multiples)


def learning_rate(step: int, config) -> float:
    """Linear warmup to max_lr, then down to min_lr at max_steps: half a cosine (GPT-3, appendix B), or with
    schedule="wsd" constant until the last wsd_decay_frac of all steps (all after the warmup at most), then
    linear (arXiv 2404.06395)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        decay = min(config.wsd_decay_frac * config.max_steps, config.max_steps - config.warmup_steps)
        share = (config.max_steps - step) / max(1.0, decay)
    else:
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_lr + (config.max_lr - config.min_lr) * min(max(share, 0.0), 1.0)
