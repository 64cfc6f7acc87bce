"""--depth and the rules that move rates between sizes.

Run: python -m pytest tests/training/test_transfer.py"""

import pytest

from train_gpt_moe import PRESETS, parse_config
from training.setup import build_model
from training.transfer import depth_parameters, transferred


def settings(*flags: str):
    return parse_config(list(flags))[0]


def test_twelve_layers_keep_the_rates_of_the_preset():
    config, plain = settings("--preset", "modern", "--depth", "12"), settings("--preset", "modern")
    sizes = config.n_layer, config.n_head, config.n_embd, config.total_batch_size
    assert (
        sizes == (12, 12, 768, 2**19) == (plain.n_layer, plain.n_head, plain.n_embd, plain.total_batch_size)
    )
    assert (config.max_lr, config.weight_decay) == pytest.approx((plain.max_lr, plain.weight_decay), rel=1e-3)
    assert config.max_steps == round(12 * (12 * 12 * 768**2 + 768 * 50304) / 2**19)
    assert config.position == "rope" and PRESETS["modern"].get("n_layer") is None


@pytest.mark.parametrize("depth, width, batch, steps", [(4, 256, 2**18, 734), (24, 1536, 2**20, 8660)])
def test_other_depths_follow_the_rules(depth, width, batch, steps):
    config = settings("--preset", "modern", "--depth", str(depth), "--B", "4")
    assert (config.n_layer, config.n_embd, config.total_batch_size, config.max_steps) == (
        depth,
        width,
        batch,
        steps,
    )
    assert config.n_embd // config.n_head == 64 and config.B == 4 and config.warmup_steps == steps // 20
    rate = 2e-3 * (768 / width) ** 0.5 * (batch / 2**19) ** 0.5
    decay = 0.1 * 2e-3 * 12 * depth_parameters(12) / 2**19 / (rate * steps)
    assert (config.max_lr, config.weight_decay) == pytest.approx((rate, decay))


@pytest.mark.parametrize("encoding, size, order", [("bytes", 257, 6), ("gpt2", 50257, 0)])
def test_modern_has_ngrams_where_tokens_are_bytes(encoding, size, order):
    config = settings("--preset", "modern", "--n_layer", "1", "--n_embd", "24")
    model = build_model(config, set(), dict(encoding=encoding, vocab_size=size, eot_token=None), None)
    assert config.ngram_order == model.config.ngram_order == order


def test_adamw_falls_with_the_width_and_flags_win():
    half = transferred(6e-4, 0.1, "adamw", 384, 2**19, 1000)["max_lr"]
    assert half == pytest.approx(1.2e-3)
    config = settings("--depth", "4", "--max_lr", "1e-4", "--n_head", "2")
    assert (config.max_lr, config.n_head, config.n_layer) == (1e-4, 2, 4)
    with pytest.raises(ValueError, match=r"depth=-1.* 0"):
        settings("--depth", "-1")
