"""The training script as a user runs it: files it writes, equal losses however a batch is cut, flags,
presets.

Run: python -m pytest tests/test_train_gpt_moe.py
"""

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, slow
from processes import finish, flags, losses, start_ranks

import sample
import train_gpt_moe
from model import GPT, GPTLMHeadModel
from train_gpt_moe import PRESETS, TrainConfig, parse_config
from training import parallel
from training.setup import check_config

ALONE = parallel.World(0, 0, 1, torch.device("cpu"))
EXACT = ["--dropout", 0, "--max_steps", 5]  # other cuts of a batch draw other dropout


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Five steps without dropout, a batch in one piece."""
    log_dir = tmp_path_factory.mktemp("whole")
    assert train_gpt_moe.main(flags(data, log_dir, *EXACT, "--B", 8)) == 0
    return log_dir


def test_log_files_have_every_step_once(straight):
    lines = [line.split()[:2] for line in (straight / "log.txt").read_text().splitlines()]
    expected = [[step, kind] for step in range(13) for kind in ("val", "train")]
    logged = lambda s, kind: s < 12 if kind == "train" else s % 4 == 0  # noqa: E731
    expected = [[str(s), kind] for s, kind in expected if logged(s, kind)]
    assert lines == expected and losses(straight)[-1] < losses(straight)[0]
    first, *records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert first["run"]["config"]["n_embd"] == 32 and first["run"]["config"]["B"] == 4
    assert first["run"]["versions"]["torch"] == torch.__version__ and "git" in first["run"]
    assert first["run"]["world_size"] == 1 and first["run"]["first_step"] == 0
    assert [record["step"] for record in records] == list(range(13))
    for record in records[:-1]:
        numbers = "loss lr norm ms tok_per_s elapsed_s balance_loss z_loss max_load starved router_entropy"
        for name in numbers.split():
            assert math.isfinite(record[name]), name
        assert len(record["expert_load"]) == 2
        assert all(abs(sum(layer) - 1) < 1e-9 and len(layer) == 4 for layer in record["expert_load"])
    assert {0, 4, 8, 12} == {record["step"] for record in records if "val_loss" in record}
    assert [record["elapsed_s"] for record in records] == sorted(record["elapsed_s"] for record in records)


def test_the_loss_that_is_logged_is_the_cross_entropy_alone(straight):
    """A fresh model's cross-entropy is about log V; the balance losses of two layers would add 0.02 to it."""
    record = json.loads((straight / "metrics.jsonl").read_text().splitlines()[1])
    model_loss = record["loss"] + 0.01 * record["balance_loss"]
    assert record["balance_loss"] == pytest.approx(2.0, abs=1e-3)  # no reference yet: perfect, in each layer
    assert abs(record["loss"] - record["val_loss"]) < abs(model_loss - record["val_loss"])


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
    for text in ("step    11/12 | loss", "tok/s", "validation loss", "MoE layer  1"):
        assert text in printed
    assert f"python sample.py --checkpoint {straight}/model_00012.pt" in printed


def test_sampling_from_the_checkpoint_is_reproducible(straight, capsys):
    options = "--prompt Return --num_samples 2 --max_new_tokens 10 --top_k 50 --seed 3 --device cpu".split()
    printed = []
    for source in (straight / "model_00012.pt", straight / "latest"):
        assert sample.main(["--checkpoint", str(source), *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("Return") == 2
    assert sample.main(["--checkpoint", str(straight / "model_00099.pt"), *options]) == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_accumulation_does_not_change_the_losses(whole, data, tmp_path):
    assert train_gpt_moe.main(flags(data, tmp_path, *EXACT, "--B", 2)) == 0
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("launcher", ["environment", *slow("torchrun")])
def test_two_processes_give_the_losses_of_one(whole, data, tmp_path, launcher):
    words = flags(data, tmp_path / "log", *EXACT, "--B", 2)
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(ROOT / "train_gpt_moe.py"), *words]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
    else:  # hand-set RANK, WORLD_SIZE, ...
        ranks = start_ranks(2, words, tmp_path / "output")
        assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "output").read_text()
    assert losses(tmp_path / "log") == pytest.approx(losses(whole), rel=1e-4)
    assert losses(tmp_path / "log", "val") == pytest.approx(losses(whole, "val"), rel=0.02)  # other batches


def test_a_new_run_moves_the_old_one_aside(straight, data, tmp_path):
    shutil.copytree(straight, tmp_path / "log")
    assert train_gpt_moe.main(flags(data, tmp_path / "log", "--max_steps", 1, "--warmup_steps", 0)) == 0
    (old,) = (tmp_path / "log").glob("old_*")
    assert (old / "model_00012.pt").exists() and (tmp_path / "log" / "latest").read_text() == "model_00001.pt"
    assert (old / "log.txt").read_text() == (straight / "log.txt").read_text()


def test_defaults_are_those_of_the_124m_recipe():
    config = TrainConfig()
    assert (config.total_batch_size, config.B, config.T) == (524288, 16, 1024)
    assert (config.max_lr, config.warmup_steps, config.max_steps) == (6e-4, 715, 19073)
    assert (config.weight_decay, config.beta1, config.beta2, config.grad_clip) == (0.1, 0.9, 0.95, 1.0)
    assert (config.infer_step, config.checkpoint_every) == (250, 5000)
    assert config.prompt == "Hello, I'm a language model,"


def test_flags_win_over_presets_and_aliases_are_fields():
    words = "--preset demo --T 64 --num_iterations 7 --use_moe=False --compile 0".split()
    config, given = parse_config(words)
    assert (config.T, config.max_steps, config.use_moe, config.use_compile) == (64, 7, False, False)
    assert config.n_embd == PRESETS["demo"]["n_embd"]
    assert given == {"preset", "T", "max_steps", "use_moe", "use_compile"}


def test_batches_that_do_not_divide_are_refused_with_the_nearest_that_does():
    world = parallel.World(0, 0, 3, torch.device("cpu"))
    assert check_config(TrainConfig(B=4, T=8, total_batch_size=192), world) == 2
    with pytest.raises(ValueError, match=r"total_batch_size=100 .* 4 \* 8 \* 3 = 96; .*: 96"):
        check_config(TrainConfig(B=4, T=8, total_batch_size=100), world)


@pytest.mark.parametrize(("steps", "expected"), [(30, 3), (5, 0), (40, 4), (41, 40), (0, 40)])
def test_a_presets_warmup_that_does_not_fit_is_made_shorter(steps, expected):
    said = []
    config, given = parse_config(["--preset", "demo", "--max_steps", str(steps)])
    check_config(config, ALONE, given, said.append)
    assert config.warmup_steps == expected
    if expected == 40:
        assert not said
        return
    (line,) = said
    assert line.startswith(f"warmup_steps={expected}, not 40: max_steps={steps}") and "--warmup_steps" in line
    config, given = parse_config(["--preset", "demo", "--max_steps", str(steps), "--warmup_steps", "40"])
    for given_now in (given, None):  # a flag's is refused, and a resumed run's, which keeps its settings
        with pytest.raises(ValueError, match=rf"warmup_steps=40 .*max_steps={steps}; lower --warmup_steps"):
            check_config(config, ALONE, given_now)


def test_a_shortened_warmup_is_a_setting_of_the_run_from_then_on(data, tmp_path, capsys):
    words = flags(data, tmp_path, "--max_steps", 20)
    del words[(at := words.index("--warmup_steps")) : at + 2]
    assert train_gpt_moe.main([*words, "--preset", "demo"]) == 0
    assert capsys.readouterr().out.count("warmup_steps=2, not 40: max_steps=20") == 1
    resume = ["--resume", str(tmp_path / "model_00020.pt"), "--device", "cpu"]
    assert train_gpt_moe.main([*resume, "--max_steps", "22"]) == 0
    rates = [json.loads(line).get("lr") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [rate for rate in rates if rate][:2] == pytest.approx([1.5e-3, 3e-3])
    assert "not 40" not in capsys.readouterr().out
    saved = torch.load(tmp_path / "model_00022.pt")["train_config"]
    assert (saved["warmup_steps"], saved["max_steps"]) == (2, 22)


def test_sampling_a_model_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("nope", "log/nope", "gpt2"):
        assert sample.main(["--checkpoint", name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sample.py: {name}: no such file or folder (`ls -d log/model_*` lists")
        assert error.count("\n") == 1


def test_starting_weights_from_a_checkpoint(straight, data, tmp_path):
    begun = flags(data, tmp_path, "--init_from", straight / "latest", "--max_steps", 1, "--warmup_steps", 0)
    assert train_gpt_moe.main(begun) == 0
    assert losses(tmp_path, "val")[0] == pytest.approx(losses(straight, "val")[-1], abs=1e-6)


@pytest.mark.parametrize(
    ("line", "edited", "flag"),
    [
        ("max_lr: float = setting(6e-4,", "max_lr: float = setting(1e-3,", "--max_lr=1e-3"),
        ("max_steps: int = setting(19073,", "max_steps: int = setting(100,", "--max_steps=100"),
        ("T: int = setting(1024,", "T: int = setting(512,", "--T=512"),
        ("num_experts: int = setting(2,", "num_experts: int = setting(8,", "--num_experts=8"),
        ("seed: int = setting(1337,", "seed: int = setting(7,", "--seed=7"),
    ],
)
def test_an_edited_constant_behaves_like_a_flag(tmp_path, line, edited, flag):
    """What follows from a setting (min_lr from max_lr, the warmup from max_steps) follows an edit, too."""
    code = (ROOT / "train_gpt_moe.py").read_text(encoding="utf-8")
    assert code.count(line) == 1
    (tmp_path / "edited_script.py").write_text(code.replace(line, edited), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_script", tmp_path / "edited_script.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up there
    spec.loader.exec_module(script)
    configs = []
    for module, arguments in ((script, []), (train_gpt_moe, [flag])):
        config, given = module.parse_config(arguments)
        check_config(config, ALONE, given, lambda text: None)
        configs.append(dataclasses.asdict(config))
    assert configs[0] == configs[1] != dataclasses.asdict(TrainConfig())
    assert configs[0]["min_lr"] == pytest.approx(configs[0]["max_lr"] / 10)


def test_min_lr_follows_max_lr_unless_it_is_given():
    for words, expected in ([], 6e-5), (["--max_lr=1e-3"], 1e-4), (["--min_lr=1e-5"], 1e-5):
        config, given = parse_config(words)
        check_config(config, ALONE, given)
        assert config.min_lr == expected
