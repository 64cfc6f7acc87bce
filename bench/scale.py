"""A forecast of a training step on up to 1,024 ranks, in every layout, from the formulas of traffic.py.

    python -m bench scale --size d12-moe8x2 --micro_ms 90 --update_ms 8 --dtype bfloat16
    python -m bench scale --size d12 --dtype bfloat16          # from a micro-step measured on this machine

tests/test_scaling.py compares the formulas with the bytes that processes really send.
"""

from functools import partial

from bench.measure import RandomBatch, alternate, make_run
from bench.models import size_of
from bench.traffic import LAYOUTS, Links, Plan, forecast, meta_model
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import train_step


def bench_scale(options) -> list[dict]:
    """A row per layout and number of ranks. ValueError for unknown layouts and bad numbers of ranks."""
    names, ranks = options.layouts.split(","), options.ranks.split(",")
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise ValueError(f"layouts={unknown[0]!r}: choose of {', '.join(LAYOUTS)}")
    if not all(number.isdigit() and int(number) > 0 for number in ranks):
        raise ValueError(f"ranks={options.ranks!r}: must be numbers from 1 up, separated by commas")
    plan = Plan(1, B=options.B, T=options.T, dtype=options.dtype)
    config = GPTConfig(block_size=plan.T, vocab_size=options.vocab_size, **size_of(options.size))
    links = Links(options.nvlink * 1e9, options.network * 1e9, options.gpus, options.latency * 1e-6)
    micro, update = options.micro_ms / 1e3, options.update_ms / 1e3
    if not micro:
        micro, update = measure_step(config, plan, options)
    print(
        f"{options.size}, B = {plan.B}, T = {plan.T}: micro-step {1e3 * micro:.1f} ms, "
        f"update {1e3 * update:.1f} ms\n"
    )
    numbers = [int(number) for number in ranks]
    return forecast(meta_model(config), plan, names, numbers, links, micro, update, options.total_batch_size)


def measure_step(config: GPTConfig, plan: Plan, options) -> tuple[float, float]:
    """Seconds of a micro-step and of the rest of a step (clip, update), with evenly loaded experts.

    A step of two micro-steps takes one micro-step longer than a step of one.
    """
    model = GPTLMHeadModel(config).to(options.device)
    model.loss_chunk = plan.loss_chunk
    for moe in model.moe_layers():
        moe.force_balanced = True
    one = make_run(model, RandomBatch(model, plan.B, plan.T), dtype=plan.dtype)
    two = make_run(model, one.train_loader, optimizer=one.optimizer, dtype=plan.dtype, accumulation=2)
    steps = {"one": partial(train_step, one, 0), "two": partial(train_step, two, 0)}
    seconds = alternate(steps, options.device, options.rounds)
    micro = seconds["two"] - seconds["one"]
    return micro, max(0.0, seconds["one"] - micro)
