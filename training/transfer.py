"""One dial for the size of a run, --depth N, and the rules by which rates follow the size.

Presets' rates are for 12 layers of 768 channels and 2^19 tokens per step. transferred() moves them to another
width, batch and length; depth_settings() chooses all of these from the number of layers alone.
References: 12 tokens per parameter, nanochat's base_train.py; batch ~ tokens^0.383, Power Lines, 2505.13738;
decay with one horizon in tokens, 2405.13698; rate ~ sqrt(batch), 2405.14578; rate ~ 1/width, muP, 2203.03466.
With preset modern this rule gives the best rate at 256 channels from the best one at 64, within 1.2 times
(docs/measurements.md). Depth and experts (their number, width, and how many a token visits) need no rule: the
best rate stayed within 1.3 times there, as Complete-muE, 2605.23893, finds. Nothing was measured at 124M."""

import math

WIDTH, BATCH = 768, 2**19  # channels and tokens per step for which presets' rates are meant
TOKENS_PER_PARAMETER, BATCH_EXPONENT, VOCABULARY = 12, 0.383, 50304


def depth_parameters(depth: int) -> int:
    """Parameters in matrix products of a dense model of --depth: 12 C^2 per block, and the head's C V."""
    C = 64 * depth
    return 12 * C * C * depth + C * VOCABULARY


def transferred(rate: float, decay: float, n_embd: int, batch: int, steps: int) -> dict:
    """max_lr and weight_decay for another width, tokens per step and number of steps, given those for 768
    channels, 2^19 tokens per step and the compute-optimal number of steps of 12 layers. The product of rate,
    decay and steps stays: weights then forget their past after the same share of a run."""
    factor = WIDTH / n_embd * math.sqrt(batch / BATCH)
    steps_of_12 = TOKENS_PER_PARAMETER * depth_parameters(12) / BATCH
    return dict(max_lr=rate * factor, weight_decay=decay * steps_of_12 / (factor * steps))


def depth_settings(depth: int, config) -> dict:
    """Settings of a compute-optimal run of `depth` layers with 64 channels for each layer and heads of 64.
    config: a TrainConfig with the optimizer, and with its rate and decay for 12 layers."""
    tokens = TOKENS_PER_PARAMETER * depth_parameters(depth)
    ideal = BATCH * (depth_parameters(depth) / depth_parameters(12)) ** BATCH_EXPONENT
    batch = 2 ** round(math.log2(ideal))
    steps, width = round(tokens / batch), 64 * depth
    rates = transferred(config.max_lr, config.weight_decay, width, batch, steps)
    return dict(n_layer=depth, n_head=depth, n_embd=width, total_batch_size=batch, max_steps=steps,
                warmup_steps=max(1, steps // 20), **rates)  # fmt: skip
