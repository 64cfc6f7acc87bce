"""What a run shows in the terminal: live line, plain lines, heat map, time to go. Other ranks are silent."""

import fcntl
import io
import os
import re
import struct
import sys
import termios

import pytest
import torch
from models import tiny, tokens

from model import GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training import terminal
from training.metrics import METRICS, Metric
from training.terminal import Terminal, duration, heat_map, live_line, step_line


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding, isatty = "utf-8", lambda self: True


def record(step: int, **more) -> dict:
    fields = dict(loss=3.25, lr=1e-3, norm=1.5, ms=250.0, tok_per_s=4096.0, mfu=0.456, bad_steps=0)
    return {"step": step, **fields, **more}


def test_lines_have_everything_that_is_known(monkeypatch):
    """The live line and the plain one. A row of the table METRICS adds a number to both."""
    full = record(11, max_load=1.234, bad_steps=2, val_loss=3.1, eval_step=10, hella_acc_norm=0.25)
    words = "12/500 | loss 3.250 | val 3.100 at 10 | 4,096 tok/s | mfu 46% | max load 1.23 | bad steps 2"
    assert live_line(full, 500, 200) == words
    busy = words.replace("12/500", "12/500 | ETA 9 s | evaluating")
    assert live_line(full, 500, 200, "evaluating", "ETA 9 s") == busy
    assert live_line(record(0, mfu=None), 500, 200) == "1/500 | loss 3.250 | 4,096 tok/s"
    text = "step    11/500 | loss 3.2500 | lr 1.000e-03 | norm 1.500 | 250.0 ms | 4,096 tok/s"
    assert step_line(full, 500) == text + " | mfu 45.6%" and step_line(record(11, mfu=None), 500) == text
    zeros = "step     0/500 | loss nan | lr 0.000e+00 | norm 0.000 | 250.0 ms | 4,096 tok/s | mfu 0.0%"
    assert step_line(record(0, loss=float("nan"), lr=0.0, norm=0.0, mfu=0.0), 500) == zeros
    row = Metric("memory", "GiB at most", live="{:.1f} GiB", line="memory {:.2f} GiB")
    monkeypatch.setattr(terminal, "METRICS", (*METRICS, row))
    assert live_line(record(11, memory=7.25), 500, 200).endswith(" | mfu 46% | 7.2 GiB")
    assert step_line(record(11, memory=7.25), 500).endswith(" | mfu 45.6% | memory 7.25 GiB")


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_the_live_line_fits_the_terminal_and_is_never_stale(width, monkeypatch):
    """A run that compiles, evaluates, scores HellaSwag and trains; in the end its terminal gets narrower."""
    master, slave = os.openpty()
    resize = lambda columns: fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))  # noqa: E731

    def rows() -> list[str]:
        """Everything written since the last call, cut at line feeds and carriage returns."""
        os.write(slave, b"\0")
        written = b""
        while not written.endswith(b"\0"):
            written += os.read(master, 65536)
        return [row for row in re.split("[\r\n]+", written.decode()[:-1]) if row.strip()]

    resize(width)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, os.fdopen(os.dup(slave), "w", encoding="utf-8"))
    with Terminal(TrainConfig(max_steps=500, use_compile=True), 0, is_master=True) as shown:
        with shown.during("evaluating"):
            assert "evaluating" in rows()[-1]
            shown.evaluation(0, {"val_loss": 5.5, "val_bpb": 1.25})
            said, line = rows()[-2:]
            assert said == "step 0: validation loss 5.5000 nats per token, 1.2500 bits per byte"
            assert width == 30 or "evaluating | val 5.500 at 0" in line  # at once
            shown.show("HellaSwag 3,100/10,042")
            assert "HellaSwag 3,100/10,042" in rows()[-1]
        assert "compiling (about a minute)" in rows()[-1]
        for step in range(20):
            shown.step(record(step))
        lines = rows()
        assert len(lines) == 20 and {len(line) for line in lines} == {width - 1}
        words, most = lines[-1].rstrip().split(" | "), {30: 3, 60: 4}.get(width, 6)
        assert words[0] == "20/500" and words[1].startswith("ETA ") and len(words) == most
        resize(30)
        shown.draw()
        assert len(rows()[-1]) == 29
    os.close(master)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_file_gets_every_line_whatever_the_other_stream_is(name, monkeypatch, capsys):
    """`python train_gpt_moe.py > out.txt` in a terminal, and 2> err.txt."""
    other = "stderr" if name == "stdout" else "stdout"
    monkeypatch.setattr(sys, other, Screen())
    shown = Terminal(TrainConfig(max_steps=3, log_every=1), 0, is_master=True)
    for step in range(3):
        shown.step(record(step))
    text = capsys.readouterr().out if name == "stdout" else sys.stdout.getvalue()
    assert not shown.watched and text.count("| lr ") == 3
    assert name == "stderr" or sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, other, None)  # as of pythonw
    assert not Terminal(TrainConfig(max_steps=3), 0, is_master=True).watched


def test_plain_lines_are_greppable_and_the_time_to_go_is_told_once(capsys):
    shown = Terminal(TrainConfig(max_steps=40, log_every=10), 0, is_master=True)
    for step in range(40):
        shown.step(record(step, ms=9000.0 if step < 3 else 250.0))  # the first ones compile
    lines = capsys.readouterr().out.splitlines()
    found = [re.match(r"step +(\d+)/40 \| loss 3\.2500 \| lr 1\.000e-03 \| norm", line) for line in lines]
    assert [match[1] for match in found if match] == ["0", "10", "20", "30", "39"]
    (told,) = [line for line in lines if "to go" in line]
    assert told.startswith("step 12: about 7 s to go at 250.0 ms a step")
    texts = {0.4: "0 s", 42: "42 s", 303: "5 min 03 s", 7800: "2 h 10 min", 273600: "3 d 04 h"}
    assert {seconds: duration(seconds) for seconds in texts} == texts


@pytest.mark.parametrize("steps", [1, 2, 7, 19, 20, 21, 60])
def test_the_average_is_llmcs_and_only_its_preset_prints_it(steps, capsys):
    """Of its train_gpt2.py: steps > 0 and > num_iterations - 20; of a run of one step, that step."""
    shown = Terminal(TrainConfig(max_steps=steps, log_every=100), 0, is_master=True)
    for step in range(steps):
        shown.step(record(step, ms=100.0 + step))
    timings = [100.0 + step for step in range(steps) if step > 0 and step > steps - 20] or [100.0] * steps
    line = f"final {len(timings)} iters avg: {sum(timings) / len(timings):.3f}ms\npeak memory"
    for preset in ("", "llmc"):
        shown.config.preset = preset
        shown.summary(7 << 20, "none")
        said = capsys.readouterr().out
        assert (line in said, "7 MiB at most" in said) == (bool(preset), not preset)


def test_the_experts_have_a_row_per_layer_after_the_first_step_and_other_ranks_are_silent(capsys):
    model, idx = GPTLMHeadModel(tiny()), tokens()
    model.train()(idx, targets=idx)
    model.update_routers()
    lines = ["step 250: MoE layer  0", "step 250: MoE layer  1", "text", "step     0/2"]
    for is_master, expected in ((True, lines), (False, [])):
        shown = Terminal(TrainConfig(max_steps=2), 0, is_master)
        shown.experts(0, model)
        shown.experts(250, model)
        shown.say("text")
        shown.step(record(0))
        out, err = capsys.readouterr()
        assert [line.split("|")[0].strip() for line in out.splitlines()] == expected and err == ""


@pytest.mark.parametrize(("encoding", "cells"), [("utf-8", "▄█ "), ("ascii", "=@ ")])
def test_heat_map_shows_loads_in_fair_shares(monkeypatch, encoding, cells):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    even, uneven = heat_map(torch.tensor([[5, 5, 5], [100, 200, 0]]))
    assert even == f"MoE layer  0 |{cells[0] * 3}| max/mean 1.00"
    assert uneven == f"MoE layer  1 |{cells}| max/mean 2.00, 1 starved"
    monkeypatch.setattr(terminal, "columns", lambda: 80)
    assert heat_map(torch.ones(12, 64))[11] == "MoE layer 11 max/mean 1.00"  # 64 bars do not fit
