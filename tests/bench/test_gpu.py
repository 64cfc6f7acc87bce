"""python -m bench gpu: all parts on a CPU, parts that fail, and trainings that it runs on a GPU.

Run: python -m pytest tests/bench/test_gpu.py"""

import csv
import multiprocessing
import os
import re
import time

import pytest
import torch
from conftest import needs_gpu
from models import tiny

from bench import __main__ as bench
from bench import gpu, ladder, models
from bench.measure import RandomBatch, make_run
from model import GPTLMHeadModel
from train_gpt_moe import TrainConfig, train_step

ENGINES = [pytest.param("cuda", engine, 200, marks=needs_gpu) for engine in gpu.ENGINES]


@pytest.mark.parametrize("device, engine, steps", [("cpu", "loop", 20), *ENGINES])
def test_training_on_a_gpu(device, engine, steps):
    """In bf16 there, with every engine."""
    model = GPTLMHeadModel(tiny(expert_hidden_size=64)).to(device)
    for layer in model.moe_layers():
        layer.experts.engine = engine
    config = TrainConfig(max_lr=3e-3, min_lr=3e-3, warmup_steps=0)
    dtype = "bfloat16" if device == "cuda" else "float32"
    run = make_run(model, RandomBatch(model, 4, 24), dtype=dtype, config=config)
    losses = torch.tensor([train_step(run, step)["loss"] for step in range(steps)])
    assert losses.isfinite().all() and losses[-1] < 0.99**steps * losses[0]


@pytest.fixture
def forked(monkeypatch):
    """Parts are forks of this process, and find what the test has changed."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu.multiprocessing, "get_context", lambda method: fork)


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(forked, short_demo, tmp_path, capfd, monkeypatch):
    for name in ("d4", "d4-moe4x2"):
        monkeypatch.setitem(models.MODEL_SIZES, name, models.MODEL_SIZES[name] | dict(n_layer=1, n_embd=32))
    monkeypatch.setitem(ladder.SHAPES, "cpu", (1, 2, 8, 1, 8))
    code = bench.main(["gpu", "--device", "cpu", "--minutes", "60", "--csv", str(tmp_path / "t.csv")])
    assert code == 0, capfd.readouterr()
    parts = list(dict.fromkeys(row[0] for row in csv.reader((tmp_path / "t.csv").open(newline=""))))
    assert parts == [name for name in gpu.PARTS if not name.endswith(("engine", "tests"))]
    printed = capfd.readouterr().out
    assert all(f"\n{part}: at most " in printed and f"| {part} | " in printed for part in parts)
    assert printed.count("| done |") == len(parts) and "| fsdp | d4-moe4x2 | " in printed


def test_a_part_that_fails_does_not_stop_the_others(forked, capfd, monkeypatch):
    parts = {"wrong": lambda o: [{"ok": "no"}], "fails": lambda o: 1 / 0, "dies": lambda o: os._exit(7),
             "hangs": lambda o: time.sleep(99), "works": lambda o: [{"x": 0.5}, {"x": 2}]}  # fmt: skip
    monkeypatch.setattr(gpu, "PARTS", {name: (1, function) for name, function in parts.items()})
    assert bench.main(["gpu", "--device", "cpu", "--minutes", "0.05"]) == 1
    printed = capfd.readouterr().out
    ends = dict(re.findall(r"^\| (\w+) \| [\d.]+ \| (.*) \|$", printed, re.MULTILINE))
    assert ends == dict(wrong="failed", fails="failed", dies="code 7", hangs="stopped", works="done")
    assert "\nfailed: ZeroDivisionError: division by zero (" in printed
    assert "| x |\n|---|\n| 0.50 |\n| 2 |\n" in printed
