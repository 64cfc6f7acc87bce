"""A run's files read back: TensorBoard events, metrics, main.log, the picture drawn meanwhile, wandb.

Run: python -m pytest tests/training/test_log.py
"""

import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
from models import make_examples
from PIL import Image
from processes import flags

import train_gpt_moe
from model import GPTLMHeadModel
from training import evaluation, log
from training.log import RunLog
from training.metrics import METRICS, Metric

SAMPLES = ["--sample_every", 8, "--sample_tokens", 8]


def run(data: str, folder, *more) -> int:
    return train_gpt_moe.main(flags(data, folder, "--hellaswag", 0, *more))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The log folder of a run with everything that can be logged."""
    folder = tmp_path_factory.mktemp("run")
    assert run(data, folder, *SAMPLES, "--tensorboard", 1, "--plot_every", 6) == 0
    return folder


@pytest.fixture(scope="module")
def records(finished) -> list[dict]:
    return [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][1:]


def read_events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tb"), {"scalars": 0, "histograms": 0, "tensors": 0})
    return found.Reload()


@pytest.fixture(scope="module")
def events(finished):
    return read_events(finished)


def test_tensorboard_curves_are_the_metrics(events, records):
    names = {
        "loss/train": "loss", "loss/balance": "balance_loss", "loss/z": "z_loss", "lr": "lr", "norm": "norm",
        "tok_per_s": "tok_per_s", "max_load": "max_load", "memory_gib": "memory", "starved": "starved",
        "router_entropy": "router_entropy",
    }  # fmt: skip
    for curve, name in names.items():
        expected = {r["step"]: r[name] for r in records if name in r}
        found = {event.step: event.value for event in events.Scalars(curve)}
        assert found == pytest.approx(expected, rel=1e-6), curve
    found = {event.step: event.value for event in events.Scalars("loss/val")}
    assert found == pytest.approx({r["step"]: r["val_loss"] for r in records if "val_loss" in r}, rel=1e-6)
    assert all(0.05 < r["memory"] < 100 for r in records if "loss" in r)


def test_tensorboard_has_hellaswag_and_mfu(data, tmp_path, monkeypatch):
    """Both accuracies, at the last step as well, also where the run is made longer later on."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(example) for example in make_examples(8)))
    monkeypatch.setattr(GPTLMHeadModel, "estimate_mfu", lambda self, *rest, **named: 0.25)
    more = ["--hellaswag", 1, "--hellaswag_data", questions, "--tensorboard", 1]
    assert run(data, tmp_path, *more, "--max_steps", 6) == 0  # evaluated at steps 0, 4 and 6
    assert run(data, tmp_path, *more, "--resume", "auto", "--max_steps", 9) == 0
    events = read_events(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [record for line in lines if "step" in (record := json.loads(line))]
    curves = {"hellaswag": "hella_acc_norm", "hellaswag_plain": "hella_acc", "loss/val": "val_loss"}
    for curve, name in curves.items():
        expected = {record["step"]: record[name] for record in records if name in record}
        assert list(expected) == [0, 4, 6, 8, 9]
        assert {e.step: e.value for e in events.Scalars(curve)} == pytest.approx(expected, rel=1e-6), curve
    assert {event.step: event.value for event in events.Scalars("mfu")} == dict.fromkeys(range(9), 0.25)


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
    found = events.Tensors("sample/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in found}
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

    def dies(run, step):
        if step == 8:
            raise KeyboardInterrupt  # nothing saves this
        return sample(run, step)

    monkeypatch.setattr(evaluation, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, *SAMPLES)
    assert (tmp_path / "main.log").read_text().count("s:7 trl") == 1
    (tmp_path / "main.log").write_text((tmp_path / "main.log").read_text() + "s:8 tr")  # cut by a kill
    monkeypatch.setattr(evaluation, "sample", sample)
    assert run(data, tmp_path, "--resume", "auto") == 0
    assert (tmp_path / "main.log").read_text() == (finished / "main.log").read_text()


def test_the_picture_is_drawn_during_the_run(finished):
    with Image.open(finished / "training.png") as image:  # --plot is off: nothing is drawn at the end
        assert image.format == "PNG" and image.width >= 1000 and image.height >= 600


def test_the_last_picture_is_waited_for_and_a_failure_is_told(tmp_path, monkeypatch):
    opened, said = RunLog(tmp_path, None, 0, tensorboard=False), []
    opened.say = said.append
    opened.step({"step": 0, "loss": float("nan")})
    opened.step({"step": 1, "loss": 5.0})
    assert opened.close()
    assert opened.draw(wait=True) == "" and (tmp_path / "training.png").stat().st_size > 500
    assert said[-1].startswith("plot_log: warning: ") and "1 of 2 steps have no finite loss" in said[-1]
    shutil.rmtree(tmp_path)
    assert opened.draw(wait=True).startswith(f"{tmp_path}: no metrics.jsonl and no log.txt in this folder")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    assert "No such file" in opened.draw(wait=True) and "No such file" in opened.draw()


def test_what_was_measured_between_two_steps(tmp_path, monkeypatch):
    """Lines and histograms before a step; after the last step a record, too. A new row has a curve."""
    row = Metric("val_bpb", "bits per byte", curve="loss/bpb", evaluated=True, log_word="bpb")
    monkeypatch.setattr(log, "METRICS", (*METRICS, row))
    opened = RunLog(tmp_path, None, 0, tensorboard=True)
    measured = {"val_loss": 3.25, "hella_acc": 0.25, "hella_acc_norm": 0.5, "val_bpb": 1.125}
    opened.evaluation(0, {}, expert_load=[[0.5, 0.5]], elapsed_s=0.5)  # nothing was measured
    opened.evaluation(1, {"sample": "Return"})
    opened.evaluation(2, measured, expert_load=[[0.5, 0.5]])
    opened.step({"step": 2, "loss": 3.5})
    opened.evaluation(3, measured, elapsed_s=9.5)
    assert opened.close()
    kinds = {"val": "3.250000", "hella": "0.500000", "bpb": "1.125000"}
    lines = [f"{step} {word} {value}" for step in (2, 3) for word, value in kinds.items()]
    assert (tmp_path / "log.txt").read_text().splitlines() == [*lines[:3], "2 train 3.500000", *lines[3:]]
    text = "s:2 tel:3.250000\ns:2 eval:0.500000\ns:2 trl:3.500000\ns:3 tel:3.250000\ns:3 eval:0.500000\n"
    assert (tmp_path / "main.log").read_text() == text
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": 2, "loss": 3.5}, {"step": 3, "elapsed_s": 9.5, **measured}]
    events = read_events(tmp_path)
    assert [event.value for event in events.Scalars("loss/bpb")] == [1.125]
    assert [event.step for event in events.Histograms("expert_load/layer_0")] == [2]
    assert [event.step for event in events.Tensors("sample/text_summary")] == [1]


def pretend_wandb(monkeypatch, init) -> None:
    """Install a wandb that has this init."""
    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_gets_the_same_names(data, tmp_path, monkeypatch):
    logged, started, ended = [], [], []
    log_values, end = lambda values, step: logged.append((step, values)), lambda: ended.append(1)
    handle = types.SimpleNamespace(id="abc123", log=log_values, finish=end)

    def init(**fields):
        started.append(fields)
        return handle

    pretend_wandb(monkeypatch, init)
    assert run(data, tmp_path, "--wandb", 1, "--sample_every", 12, "--sample_tokens", 4) == 0
    assert started[0]["id"] is None and started[0]["dir"] == str(tmp_path) and ended == [1]
    steps = [step for step, _ in logged]
    assert steps == sorted(steps)  # wandb drops what comes late
    found = {name for _, values in logged for name in values}
    assert {"loss/train", "loss/val", "loss/balance", "lr", "norm", "memory_gib", "sample"} <= found
    assert run(data, tmp_path, "--wandb", 1, "--resume", "auto", "--max_steps", 14) == 0
    assert started[1]["id"] == "abc123"


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_failing_wandb_costs_a_warning_and_nothing_else(data, tmp_path, monkeypatch, capsys, fails_at):
    """No login, say, which wandb tells in two lines, or no network any more."""

    class UsageError(Exception):
        pass

    def fails(*args, **named):
        raise UsageError("api_key not configured (no-tty).\ncall wandb.login(key=...)")

    calls = dict.fromkeys(("log", "finish"), lambda *args, **named: None) | {fails_at: fails}
    handle = types.SimpleNamespace(id="x", **calls)
    pretend_wandb(monkeypatch, fails if fails_at == "init" else lambda **fields: handle)
    assert run(data, tmp_path, "--wandb", 1) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "api_key not configured (no-tty). call wandb.login(key=...)" in warnings[0]
    steps = [json.loads(line).get("step") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [None, *range(13)]


def test_wandb_that_is_not_there(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(data, tmp_path, "--wandb", 1) == 2
    assert "pip install wandb" in capsys.readouterr().err
