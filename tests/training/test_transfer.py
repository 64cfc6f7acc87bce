"""--depth and the rules that move rates between sizes."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses

from bench.recipes import MODERN, build_ours, draw_windows, race, split_demo
from train_gpt_moe import parse_config
from training.setup import build_model
from training.transfer import depth_parameters, transferred


def settings(*flags: str):
    return parse_config(list(flags))[0]


@pytest.mark.parametrize("depth, width, batch, steps", [
    (4, 256, 2**18, 734), (12, 768, 2**19, 2828), (24, 1536, 2**20, 8660),
])  # fmt: skip
def test_sizes_and_rates_follow_the_rules(depth, width, batch, steps):
    """The preset's rates, 2e-3 and 0.1, are for its 12 layers."""
    config = settings("--preset", "modern", "--depth", str(depth), "--B", "4")
    sizes = config.n_layer, config.n_embd, config.total_batch_size, config.max_steps
    assert sizes == (depth, width, batch, steps)
    assert config.n_embd // config.n_head == 64 and config.B == 4 and config.warmup_steps == steps // 20
    assert config.position == "rope"
    rate = 2e-3 * 768 / width * (batch / 2**19) ** 0.5
    decay = 0.1 * 2e-3 * 12 * depth_parameters(12) / 2**19 / (rate * steps)
    assert (config.max_lr, config.weight_decay) == pytest.approx((rate, decay))


@pytest.mark.parametrize("encoding, size, order", [("bytes", 257, 6), ("gpt2", 50257, 0)])
def test_modern_has_ngrams_where_tokens_are_bytes(encoding, size, order):
    config = settings("--preset", "modern", "--n_layer", "1", "--n_embd", "24")
    model = build_model(config, set(), dict(encoding=encoding, vocab_size=size, eot_token=None), None)
    assert config.ngram_order == model.config.ngram_order == order


def test_flags_win_over_depth_and_the_preset_has_twelve_layers_without_it():
    config = settings("--preset", "modern")
    assert (config.n_layer, config.n_head, config.n_embd, config.total_batch_size) == (12, 12, 768, 2**19)
    config = settings("--depth", "4", "--max_lr", "1e-4", "--n_head", "2")
    assert (config.max_lr, config.n_head, config.n_layer) == (1e-4, 2, 4)
    assert settings("--depth", "4", "--max_lr", "0").weight_decay == settings("--depth", "4").weight_decay > 0
    refuses("depth=-1.* 0", settings, "--depth", "-1")


def best_rate(n_embd: int, data, windows) -> float:
    """The rate at which a parabola through the losses of three rates has its lowest point."""
    rates = [1.3e-2 * 64 / n_embd * factor for factor in (0.5, 1, 2)]
    losses = []
    for rate in rates:
        fields = MODERN | dict(n_layer=1, n_head=4, n_embd=n_embd, T=32, B=16, use_moe=False)
        fields |= dict(max_lr=rate, min_lr=rate / 10, warmup_steps=10)
        run = build_ours("", fields, data, V=257, steps=100)
        race([run], [windows], 1)
        losses += run.points[-1][2]
    a, b, _ = np.polyfit(np.log2(rates), losses, 2)
    assert a > 0, losses
    return 2 ** (-b / (2 * a))


@pytest.mark.slow
def test_the_best_rate_of_64_channels_gives_the_best_rate_of_256(request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # so many small products wait long for threads that are busy with another test
    train, val = split_demo()
    windows = draw_windows(val, 256, 32, torch.Generator().manual_seed(0))
    narrow, wide = (best_rate(n_embd, train, windows) for n_embd in (64, 256))
    factor = transferred(narrow, 0.1, 256, 1, 1)["max_lr"] / transferred(narrow, 0.1, 64, 1, 1)["max_lr"]
    assert 1 / 1.4 < narrow * factor / wide < 1.4, (narrow, wide)
