"""python -m bench gpu: all parts on a CPU, parts that fail, and trainings that it runs on a GPU."""

import re

import pytest
import torch
from devices import needs_gpu
from models import tiny

from bench import __main__ as bench
from bench import gpu
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


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(rows_of, tmp_path, capfd):
    rows = rows_of(bench.main, "gpu", "--device", "cpu", "--minutes", 60)
    printed = capfd.readouterr().out
    for part in gpu.list_parts(on_cuda=False):
        assert f"\n{part}: at most " in printed and f"| {part} | " in printed
        assert len((tmp_path / f"rows_{part}.csv").read_text().splitlines()) > 1
    assert len(rows) == printed.count("| done |")


def test_a_part_that_fails_does_not_stop_the_others(capfd, monkeypatch):
    parts = {"hangs": (1, "-c 'import time; time.sleep(99)'"), "wrong": (9, "-m bench --nothing"),
             "dies": (9, "-c 'import os; os._exit(7)'"), "works": (9, "-c 'print(5)'")}  # fmt: skip
    monkeypatch.setattr(gpu, "list_parts", lambda on_cuda: parts)
    assert bench.main(["gpu", "--device", "cpu", "--minutes", "0.2"]) == 1
    printed = capfd.readouterr().out
    ends = dict(re.findall(r"^\| (\w+) \| [\d.]+ \| (.*) \|$", printed, re.MULTILINE))
    assert ends == dict(wrong="failed, code 2", dies="failed, code 7", works="done", hangs="stopped")
    assert "\n5\n" in printed
