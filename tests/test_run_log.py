"""A run's files read back: TensorBoard events, metrics, main.log, the picture drawn meanwhile, wandb.

Run: python -m pytest tests/test_run_log.py
"""

import json
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image
from processes import TINY

import evaluation
import train_gpt_moe
from fineweb import prepare_demo


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("data") / "demo")
    prepare_demo(folder)
    return folder


def run(data: str, folder, *flags) -> int:
    words = [*TINY, "--data_dir", data, "--log_dir", folder, "--hellaswag", 0, *flags]
    return train_gpt_moe.main([str(word) for word in words])


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert (
        run(data, folder, "--tensorboard", 1, "--sample_every", 8, "--sample_tokens", 8, "--plot_every", 6)
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def records(finished) -> list[dict]:
    return [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def events(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(finished / "tb"), {"scalars": 0, "histograms": 0, "tensors": 0})
    return found.Reload()


def test_tensorboard_curves_are_the_metrics(events, records):
    names = {
        "loss/train": "loss", "loss/balance": "balance_loss", "loss/z": "z_loss", "lr": "lr", "norm": "norm",
        "tok_per_s": "tok_per_s", "max_load": "max_load", "memory_gib": "memory",
    }  # fmt: skip
    for curve, name in names.items():
        expected = {r["step"]: r[name] for r in records if name in r}
        found = {event.step: event.value for event in events.Scalars(curve)}
        assert found == pytest.approx(expected, rel=1e-6), curve
    found = {event.step: event.value for event in events.Scalars("loss/val")}
    assert found == pytest.approx({r["step"]: r["val_loss"] for r in records if "val_loss" in r}, rel=1e-6)
    assert all(0.05 < r["memory"] < 100 for r in records if "loss" in r)


def test_tensorboard_histograms_are_the_experts_loads(events, records):
    """The load at an evaluation is that of the step before it; fair = 1, so four experts sum to 4."""
    load = {r["step"]: np.array(r["expert_load"]) for r in records if "expert_load" in r}
    for layer in range(2):
        found = events.Histograms(f"expert_load/layer_{layer}")
        assert [event.step for event in found] == [4, 8, 12]
        for event in found:
            value = event.histogram_value
            assert value.num == 4 and value.sum == pytest.approx(4)
            assert value.max == pytest.approx(4 * load[event.step - 1][layer].max())


def test_tensorboard_has_the_samples(events):
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("sample/text_summary")
    }
    assert list(texts) == [0, 8, 12] and all(text.startswith("    Return") for text in texts.values())


def test_main_log_is_llmcs(finished, records):
    lines = (finished / "main.log").read_text().splitlines()
    found = [re.fullmatch(r"s:(\d+) (trl|tel):(\d+\.\d{6})", line).groups() for line in lines]
    losses = {int(step): float(loss) for step, kind, loss in found if kind == "trl"}
    assert losses == pytest.approx({r["step"]: r["loss"] for r in records if "loss" in r}, abs=1e-6)
    assert [int(step) for step, kind, _ in found if kind == "tel"] == [0, 4, 8, 12]


def test_main_log_has_every_line_once_after_a_resume(data, finished, tmp_path, monkeypatch):
    """A run that dies after step 7, with step 6 its last checkpoint, writes steps 6 and 7 a second time."""
    sample = evaluation.sample

    def dies(model, config, step, autocast):
        if step == 8:
            raise KeyboardInterrupt  # nothing saves this
        return sample(model, config, step, autocast)

    monkeypatch.setattr(evaluation, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, "--sample_every", 8, "--sample_tokens", 8)
    assert (tmp_path / "main.log").read_text().count("s:7 trl") == 1
    (tmp_path / "main.log").write_text((tmp_path / "main.log").read_text() + "s:8 tr")  # cut by a kill
    monkeypatch.setattr(evaluation, "sample", sample)
    assert run(data, tmp_path, "--resume", "auto") == 0
    assert (tmp_path / "main.log").read_text() == (finished / "main.log").read_text()


def test_the_picture_is_drawn_during_the_run(finished):
    with Image.open(finished / "training.png") as image:  # --plot is off: nothing is drawn at the end
        assert image.format == "PNG" and image.width >= 1000 and image.height >= 600


def test_wandb_gets_the_same_names(data, tmp_path, monkeypatch):
    logged, started, ended = [], [], []
    handle = types.SimpleNamespace(
        id="abc123", log=lambda values, step: logged.append((step, values)), finish=lambda: ended.append(1)
    )

    def init(**fields):
        started.append(fields)
        return handle

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert run(data, tmp_path, "--wandb", 1, "--sample_every", 12, "--sample_tokens", 4) == 0
    assert started[0]["id"] is None and started[0]["dir"] == str(tmp_path) and ended == [1]
    steps = [step for step, _ in logged]
    assert steps == sorted(steps)  # wandb drops what comes late
    found = {name for _, values in logged for name in values}
    assert {"loss/train", "loss/val", "loss/balance", "lr", "norm", "memory_gib", "sample"} <= found
    assert run(data, tmp_path, "--wandb", 1, "--resume", "auto", "--max_steps", 14) == 0
    assert started[1]["id"] == "abc123"


def test_wandb_that_is_not_there(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(data, tmp_path, "--wandb", 1) == 2
    assert "pip install wandb" in capsys.readouterr().err
