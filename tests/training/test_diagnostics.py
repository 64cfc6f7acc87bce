"""What evaluations tell of routers and of gradient noise, against the same numbers computed directly.

Run: python -m pytest tests/training/test_diagnostics.py"""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import slow
from models import chosen, tiny
from processes import flags, metrics
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt_moe
from bench.measure import make_run
from model import GPTLMHeadModel
from tokens.shards import DistributedDataLoader
from training import checkpoints as ckpt
from training import diagnostics, parallel
from training.diagnostics import Diagnostics

FROZEN = "--max_lr 0 --min_lr 0 --router_bias_update_rate 0".split()


def test_the_estimate_converges_to_the_noise_scale(monkeypatch):
    """Linear regression at w = 0: the gradient of an example is -x * y. Eight ranks draw 4 of them each."""
    monkeypatch.setattr(diagnostics, "MEMORY", 10**9)
    chance, found = np.random.default_rng(0), Diagnostics()
    x = chance.normal(size=(5000, 6))
    gradients = -x * (x @ np.ones(6) + chance.normal(size=5000))[:, None]  # (examples, numbers)
    mean, trace = gradients.mean(0), gradients.var(0).sum()
    for _ in range(3000):
        drawn = gradients[chance.integers(5000, size=(8, 4))].mean(1)  # (ranks, numbers)
        small, big = np.square(drawn).sum(1).mean(), np.square(drawn.mean(0)).sum()
        found.add_noise(np.array([small]), np.array([big]), np.array([1 / 8]), 8 * 4)
    assert found.newest["noise_scale"] == pytest.approx(trace / (mean @ mean), rel=0.03)
    assert Diagnostics(found.state_dict()).noise == found.noise


class HostReads(TorchDispatchMode):
    """Counts how often numbers are read from tensors."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))

    def tolist(self, tensor, tolist=torch.Tensor.tolist):
        self.count += 1
        return tolist(tensor)


def train(dtype: str) -> list[float]:
    """Four steps, of which 1 and 3 stand before an evaluation. Returns the state of the noise scale."""
    model, norms, reads = GPTLMHeadModel(tiny()), [], []
    batches = SimpleNamespace(next_batch=lambda: torch.randint(97, (2, 4, 24)))
    settings = dict(max_lr=1e-4, warmup_steps=0, min_lr=1e-4, grad_clip=1e-6)
    config = train_gpt_moe.TrainConfig(infer_step=2, **settings)
    run = make_run(model, batches, accumulation=4, config=config, dtype=dtype)

    def note(*_) -> None:
        norms[:] = [moe.gate.weight.grad.norm() for moe in model.moe_layers()]

    for step in range(4):
        with HostReads() as mode, mock.patch.object(parallel, "clip_gradients", note):
            with mock.patch.object(torch.Tensor, "tolist", lambda tensor, mode=mode: mode.tolist(tensor)):
                record = train_gpt_moe.train_step(run, step)
        reads.append(mode.count)
        assert not [name for name in record if "measured" in name]
        assert bool(run.diagnostics.newest) == (step in (1, 3))
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert reads == reads[:1] * 4 and reads[0] > 0
    assert run.diagnostics.newest["router_norm_by_layer"] == pytest.approx([*map(float, norms)], rel=1e-5)
    return run.diagnostics.noise


def test_a_measurement_reads_no_more_and_knows_float16s_loss_scale():
    exact = train("float32")
    torch.manual_seed(0)
    assert train("float16") == pytest.approx(exact, rel=0.02) and exact[2] > 0.1


@pytest.mark.parametrize("frozen", [False, *slow(True)])
def test_what_a_run_logs_is_what_its_checkpoints_have(frozen, data, tmp_path):
    more = ["--checkpoint_every", 4, "--log_norms", 1, *(FROZEN if frozen else [])]
    assert train_gpt_moe.main(flags(data, tmp_path, *more)) == 0
    rows, before = metrics(tmp_path), None
    loader = DistributedDataLoader(f"{data}/val_*.bin", B=4, T=32, seed=0)
    x, _ = loader.next_batch()
    for step in (4, 8, 12):
        (row,) = (row for row in rows if row.get("eval_step") == step)
        model, choices, last = ckpt.load_model(tmp_path / f"model_{step:05d}.pt"), [], rows[step - 1]
        layers = model.moe_layers()

        def note(gate, inputs, logits, choices=choices, layers=layers) -> None:
            choices.append(chosen(layers[len(choices)], logits)[0][:, 0])

        for moe in layers:
            moe.gate.register_forward_hook(note)
        model(x)
        load = 4 * np.array(last["expert_load"])
        assert row["max_load_by_layer"] == load.max(1).tolist() and row["max_load_ceiling"] == 4 / 2
        assert row["starved_by_layer"] == (load < 0.1).mean(1).tolist()
        assert np.mean(row["router_entropy_by_layer"]) == pytest.approx(last["router_entropy"])
        assert np.hypot(*row["router_norm_by_layer"]) == pytest.approx(last["norm/routers"], rel=1e-5)
        spread = [np.ptp(moe.router_bias.numpy()) for moe in layers]
        assert row.get("bias_range_by_layer", [0, 0]) == pytest.approx(spread) and any(spread) != frozen
        if before:
            moved = [(a != b).double().mean().item() for a, b in zip(before, choices, strict=True)]
            assert row["rerouted_by_layer"] == moved and row["rerouted"] == pytest.approx(np.mean(moved))
            assert any(moved) != frozen
        before = choices


@pytest.mark.parametrize(("newest", "words"), [
    ({}, ""), ({"noise_scale": 400.0}, "2.5 of the gradient noise scale (400): a smaller"),
    ({"noise_scale": 1234.0}, "about right"),
    ({"noise_scale": 3456.0}, "0.29 of the gradient noise scale (3,500): a larger"),
])  # fmt: skip
def test_the_summary_compares_the_batch_with_the_noise_scale(newest, words):
    found, run = Diagnostics(), SimpleNamespace(config=SimpleNamespace(total_batch_size=1000))
    found.newest = newest
    assert words in found.batch_text(run) and bool(words) == bool(found.batch_text(run))
