"""The commands of `python -m bench` at tiny sizes: what they compare, their tables, their options."""

import json
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT
from models import NANOGPT, make_examples

import hellaswag
from bench import __main__ as bench
from bench import ladder, loop, models
from model import GPTConfig, GPTLMHeadModel
from training import faults
from training.log import RunLog

CPU = torch.device("cpu")


@pytest.fixture
def d4(monkeypatch):
    """--size d4 is smaller still."""
    monkeypatch.setitem(models.MODEL_SIZES, "d4", dict(n_layer=1, n_head=2, n_embd=16, use_moe=False))


def test_whole_models_beside_nanogpts(d4, rows_of, tmp_path, capsys, monkeypatch):
    tiny_moe = dict(n_layer=1, n_head=2, n_embd=16, num_experts=4, expert_hidden_size=16)
    monkeypatch.setitem(models.MODEL_SIZES, "d12-moe8x2", tiny_moe)
    (tmp_path / "model.py").write_text(NANOGPT)
    flags = ["train", "--size", "d4,d12-moe8x2", "--B", 2, "--T", 8, "--vocab_size", 32, "--rounds", 1]
    rows = rows_of(bench.main, *flags, "--nanogpt", tmp_path)
    assert "number of parameters" not in capsys.readouterr().out
    whose = [(row["model"], row["whose"]) for row in rows]
    assert whose == [("d4", "ours"), ("d4", "nanoGPT"), ("d12-moe8x2", "ours")]
    for row in rows:
        assert float(row["tokens/s"]) > 0 and float(row["peak MiB"]) > 0 and row["B x T"] == "2 x 8"
    assert float(rows[1]["time x nanoGPT"]) == 1 and float(rows[0]["memory x nanoGPT"]) > 0
    assert rows[2]["time x nanoGPT"] == ""  # nanoGPT has no such model


def test_what_a_person_can_mend_is_told_in_a_line(tmp_path, refused):
    wrong = {f"{command} --size d5": "size='d5'" for command in ("train", "hellaswag", "checkpoint")}
    scale = {"--layouts ddp,ep2": "layouts='ep2': choose from ddp, zero", "--ranks 4,x": "ranks='4,x'"}
    scale |= {f"--size {sizes}": f"size='{sizes}': choose from d4" for sizes in ("d13", "d4,d6")}
    scale["--size d12 --layouts ep"] = "layouts='ep': size d12 has no experts to share"
    wrong |= {f"scale --micro_ms 1 {flags}": message for flags, message in scale.items()}
    wrong[f"train --size d4 --nanogpt {tmp_path}"] = "git clone https://github.com/karpathy/nanoGPT"
    wrong["train --size d4 --layout ep"] = "layout='ep': size d4 has no experts to share"
    wrong["scale --size d12"] = "micro_ms=0: give a micro-step's milliseconds"
    wrong["moe --device xyz"] = "device='xyz' is no device"
    for flags, message in wrong.items():
        assert message in refused(bench.main, *flags.split())


@pytest.mark.parametrize("flags, message", [
    ("hellaswag --limit 0", "--limit 0: must be above 0"), ("moe --tokens -1", "-1: must be at least 0"),
    ("moe --csv nowhere/x.csv", "--csv nowhere/x.csv: there is no such folder"),
    ("moe --csv .", "--csv .: it is a folder; name a file in it"),
    ("time_to_loss --seconds inf", "--seconds inf: must be above 0, and finite"),
    ("scale --micro_ms nan", "--micro_ms nan: must be at least 0, and finite"),
    ("time_to_loss --png x.bmp", "--png x.bmp: the name must end in .png, .svg or .pdf"),
    ("moe --size d12", "unrecognized arguments: --size d12"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_runs(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(flags.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_help_names_every_command_and_options_import_nothing_heavy(capsys):
    code = "import sys; from bench.__main__ import *; parse_options(['moe']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in bench.COMMANDS)


def test_hellaswag_of_both_methods(d4, rows_of, tmp_path, monkeypatch, refused):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, make_examples(9, longest=1))))
    load = hellaswag.load_questions
    bytes_ = lambda path, limit, style, _, *sizes: load(path, limit, style, "bytes", *sizes)  # noqa: E731
    monkeypatch.setattr(hellaswag, "load_questions", bytes_)
    flags = ["--size", "d4", "--data", tmp_path / "q.jsonl", "--limit", 3, "--rounds", 1]
    plain, ours = rows_of(bench.main, "hellaswag", *flags)
    assert (plain["questions"], plain["same choices"], ours["same choices"]) == ("3", "3", "3")
    _, ours_of_one = rows_of(bench.main, "hellaswag", *flags, "--data", "random", "--limit", 1)
    assert ours_of_one["same choices"] == "1"
    assert float(plain["x plain"]) == 1 and float(ours["losses off by"]) < 1e-4
    error = refused(bench.main, "hellaswag", *flags, "--data", tmp_path / "none")
    assert "cannot read the questions" in error


def test_checkpoints(d4, rows_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = rows_of(bench.main, "checkpoint", "--size", "d4", "--rounds", 2)
    pauses, background = {"first pause", "pause of training"}, "writing and reading back, in the background"
    assert {row["part"] for row in rows} == pauses | {background, "verifying", "verifying and loading"}
    parameters = GPTLMHeadModel(GPTConfig(**models.MODEL_SIZES["d4"])).get_num_params(non_embedding=False)
    assert [float(row["GB"]) for row in rows] == pytest.approx([12e-9 * parameters] * 5, rel=0.02)
    assert all(float(row["ms"]) > 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_every_rung_is_climbed(rows_of, monkeypatch):
    monkeypatch.setitem(ladder.SHAPES, "cpu", (1, 2, 8, 1, 8))
    settings, climb = [], ladder.climb
    monkeypatch.setattr(ladder, "climb", lambda s, *rest: settings.append(s) or climb(s, *rest))
    before = torch.get_float32_matmul_precision()
    rows = rows_of(bench.main, "ladder", "--device", "cpu", "--rounds", 1)
    assert torch.get_float32_matmul_precision() == before
    assert [row["rung"] for row in rows] == list(ladder.rungs_for(CPU, compiled=False))
    product = 1.0
    for row in rows:
        product *= float(row["x rung before"])
        assert float(row["x first"]) == pytest.approx(product)
    assert settings[-1]["moe"] and settings[-1]["fused"] and not settings[0]["fused"]
    for device in (CPU, torch.device("cuda")):
        for below, above in pairwise(ladder.rungs_for(device, compiled=True).values()):
            assert sum(below[name] != above[name] for name in below) == 1  # one change at a time


def test_what_of_a_step_is_the_loops_own(d4, short_demo, rows_of, monkeypatch):
    """By a clock that only these two move."""
    clock = SimpleNamespace(now=0.0)

    def lasts(seconds, function):
        def timed(*arguments):
            clock.now += seconds
            return function(*arguments)

        return timed

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(loop, "train_step", lasts(2, loop.train_step))
    monkeypatch.setattr(RunLog, "step", lasts(3, RunLog.step))
    monkeypatch.setattr(faults, "gc", collector := Mock())
    runs, set_up = [], loop.set_up
    monkeypatch.setattr(loop, "set_up", lambda *arguments: runs.append(set_up(*arguments)) or runs[-1])
    flags = ["--device", "cpu", "--size", "d4", "--vocab_size", 384, "--rounds", 1, "--B", 2, "--T", 16]
    rows = rows_of(bench.main, "loop", *flags)
    found = {row["part"]: (float(row["ms"]), float(row["% of a step"])) for row in rows}
    steps = {"a step of the loop": (5000, 100), "train_step alone": (2000, 40)}
    assert found == steps | {"the loop's own": (3000, 60)}
    fields = dict(block_size=16, vocab_size=384) | models.MODEL_SIZES["d4"]
    model = GPTLMHeadModel(GPTConfig(**fields))
    assert runs[0].model.get_num_params(False) == model.get_num_params(False)
    called = [name for name, *_ in collector.method_calls]
    assert called == ["collect", "freeze", "disable", "enable", "unfreeze"]  # as it was before the run
