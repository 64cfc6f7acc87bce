"""The training script as a user runs it: the files it writes, equal losses however a batch is cut, flags."""

import dataclasses
import importlib
import json
import math
import re

import pytest
import torch
from conftest import ROOT
from processes import flags, losses, metrics, run_ranks

import plot_log
import train_gpt_moe
from model import GPT, GPTLMHeadModel
from train_gpt_moe import TrainConfig
from training import parallel
from training.setup import check_config


def test_log_files_have_every_step_once(straight):
    lines = [line.split()[:2] for line in (straight / "log.txt").read_text().splitlines()]
    order = "0v 0v 0t 1t 2t 3t 4v 4v 4t 5t 6t 7t 8v 8v 8t 9t 10t 11t 12v 12v".split()
    assert [step + kind[0] for step, kind in lines] == order and losses(straight)[-1] < losses(straight)[0]
    run = json.loads((straight / "run.json").read_text())
    assert run["config"]["n_embd"] == 32 and run["config"]["B"] == 4 and "git" in run
    assert run["versions"]["torch"] == torch.__version__ and "earlier" not in run
    assert run["world_size"] == 1 and run["first_step"] == 0
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(12))
    assert {type(x) for record in records for x in record.values()} <= {int, float, list, type(None)}
    assert plot_log.read_run(str(straight)).config == run["config"]
    numbers = "loss lr norm ms tok_per_s elapsed_s balance_loss z_loss max_load starved router_entropy"
    for record in records:
        assert all(math.isfinite(record[name]) for name in numbers.split()), record
        assert [(len(layer), sum(layer)) for layer in record["expert_load"]] == [(4, pytest.approx(1))] * 2
    evaluated = [record for record in records if "eval_step" in record]
    assert [r["step"] for r in evaluated] == [0, 4, 8, 11]  # the last evaluation has joined the last row
    assert [r["eval_step"] for r in evaluated] == [0, 4, 8, 12]
    for kind, name in (("val", "val_loss"), ("val_bpb", "val_bpb")):
        assert losses(straight, kind) == pytest.approx([r[name] for r in evaluated], abs=1e-6)


def test_the_loss_that_is_logged_is_the_cross_entropy_alone(straight, data, tmp_path):
    """The routers' losses would be a multiple of their coefficients, which differ by a factor of 1,000."""
    more = "--max_steps 3 --moe_loss_coef 10 --router_z_loss_coef 1 --checkpoint_every 0 --infer_step 0"
    assert train_gpt_moe.main(flags(data, tmp_path, *more.split())) == 0
    first, other = metrics(straight)[0], metrics(tmp_path)[0]
    assert first["balance_loss"] == pytest.approx(2.0, abs=1e-3)  # no reference yet: perfect, in each layer
    assert first["loss"] == other["loss"]


def test_checkpoint_is_plain_and_loads_as_documented(straight):
    checkpoint = torch.load(straight / "model_00012.pt")  # weights_only, torch's default
    assert checkpoint["step"] == 12 and (straight / "latest").read_text() == "model_00012.pt"
    parts = {"model", "config", "step", "val_loss", "optimizer", "loader", "rng", "train_config"}
    assert parts <= set(checkpoint) and type(checkpoint["config"]) is dict
    assert not any("_orig_mod" in name or name.startswith("module.") for name in checkpoint["model"])
    for kind in (GPT, GPTLMHeadModel):
        model = kind(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
        assert len(model.generate("Hello", max_length=12)) > 5


def test_what_a_finished_run_prints(straight):
    printed = (straight.parent / "printed").read_text()
    command = f"python sample.py --checkpoint {straight}/model_00012.pt"
    once = ("step    11/12 | loss", " bits per byte, after 12 steps", "step 12: MoE layer  1 |", command)
    once += (f"see what the experts learnt: python -m analysis routing {straight}/model_00012.pt",)
    assert [printed.count(text) for text in once] == [1] * 5 and "iters avg" not in printed


def test_two_processes_give_the_losses_of_one_and_say_everything_once(data, tmp_path):
    """One process has the batch in one piece, two have it in four. They validate on the same samples."""
    more = ["--dropout", 0, "--max_steps", 3]  # other cuts of a batch draw other dropout
    assert train_gpt_moe.main(flags(data, tmp_path / "one", *more, "--B", 8)) == 0
    run_ranks(2, flags(data, tmp_path / "two", *more, "--B", 2, "--val_steps", 4), tmp_path / "output")
    said = (tmp_path / "output").read_text()
    assert "warn" not in said.lower(), said
    for text in "parameters  |step 0: validation loss|step     0/3|step 3: saved|speed  ".split("|"):
        assert sum(line.startswith(text) for line in said.splitlines()) == 1, text
    for kind in ("train", "val", "val_bpb"):
        assert losses(tmp_path / "two", kind) == pytest.approx(losses(tmp_path / "one", kind), rel=1e-4)


def test_defaults_are_those_of_the_124m_recipe():
    config = TrainConfig()
    assert (config.total_batch_size, config.B, config.T) == (524288, 16, 1024)
    assert (config.max_lr, config.warmup_steps, config.max_steps) == (6e-4, 715, 19073)
    assert (config.weight_decay, config.beta1, config.beta2, config.grad_clip) == (0.1, 0.9, 0.95, 1.0)
    assert (config.infer_step, config.checkpoint_every) == (250, 5000)
    assert config.prompt == "Hello, I'm a language model,"


def test_edited_constants_behave_like_flags(tmp_path, monkeypatch):
    """What follows from a setting (min_lr from max_lr, the warmup from max_steps) follows an edit, too."""
    code, words = (ROOT / "train_gpt_moe.py").read_text(encoding="utf-8"), []
    for name, value in dict(max_lr="1e-3", max_steps="100", T="512", num_experts="8").items():
        code, edits = re.subn(rf"(?m)^(    {name}: \w+ = setting\()[^,]+", rf"\g<1>{value}", code)
        assert edits == 1, name
        words.append(f"--{name}={value}")
    (tmp_path / "edited_script.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    configs = []
    for module, arguments in ((importlib.import_module("edited_script"), []), (train_gpt_moe, words)):
        config, given = module.parse_config(arguments)
        check_config(config, parallel.World(0, 0, 1, torch.device("cpu")), given, lambda text: None)
        configs.append(dataclasses.asdict(config))
    assert configs[0] == configs[1]
    assert (config.T, config.min_lr, config.warmup_steps) == (512, pytest.approx(1e-4), 10)
