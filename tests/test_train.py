"""The training script as a user runs it: files it writes, equal losses however a batch is cut, flags,
presets.

Run: python -m pytest tests/test_train.py
"""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from processes import finish, start_ranks

import sample
import train_gpt_moe
from model import GPT, GPTLMHeadModel
from tokens.demo import prepare_demo
from train_gpt_moe import PRESETS, TrainConfig, parse_config
from training import parallel
from training.optimizers import learning_rate
from training.setup import check_config

TINY = """--n_layer 2 --n_head 2 --n_embd 32 --num_experts 4 --num_experts_per_tok 2 --T 32 --total_batch_size
512
    --max_steps 5 --warmup_steps 2 --max_lr 3e-3 --min_lr 3e-4 --infer_step 3 --val_steps 2 --sample_tokens 8
    --prompt Return --use_compile False --device cpu --plot False""".split()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("data") / "demo")
    prepare_demo(folder)
    return folder


def train(*flags: str) -> None:
    assert train_gpt_moe.main([*TINY, *map(str, flags)]) == 0


def losses(log_dir, kind="train") -> list[float]:
    lines = (log_dir / "log.txt").read_text().split("\n")
    return [float(line.split()[2]) for line in lines if f" {kind} " in line]


@pytest.fixture(scope="module")
def finished(demo_data, tmp_path_factory):
    """A finished run of five steps, with what it printed."""
    log_dir = tmp_path_factory.mktemp("run")
    flags = [*TINY, "--data_dir", demo_data, "--log_dir", str(log_dir), "--B", "16", "--tensorboard", "True"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt_moe.py"), *flags], capture_output=True, text=True, cwd=log_dir
    )
    assert run.returncode == 0, run.stderr
    return log_dir, run.stdout


def test_log_files_have_every_step_once(finished):
    log_dir, _ = finished
    lines = (log_dir / "log.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["0", "val"], ["0", "train"], ["1", "train"], ["2", "train"], ["3", "val"], ["3", "train"],
        ["4", "train"], ["5", "val"],
    ]  # fmt: skip
    assert losses(log_dir)[-1] < losses(log_dir)[0]
    first, *records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    assert first["run"]["config"]["n_embd"] == 32 and first["run"]["config"]["B"] == 16
    assert first["run"]["versions"]["torch"] == torch.__version__ and "git" in first["run"]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
    for record in records[:-1]:
        numbers = "loss lr norm ms tok_per_s elapsed_s balance_loss z_loss max_load starved router_entropy"
        for name in numbers.split():
            assert math.isfinite(record[name]), name
        assert len(record["expert_load"]) == 2
        assert all(abs(sum(layer) - 1) < 1e-9 and len(layer) == 4 for layer in record["expert_load"])
    assert {0, 3, 5} == {record["step"] for record in records if "val_loss" in record}
    assert [record["elapsed_s"] for record in records] == sorted(record["elapsed_s"] for record in records)
    assert list((log_dir / "tb").glob("events.*"))


def test_the_loss_that_is_logged_is_the_cross_entropy_alone(finished):
    """A fresh model's cross-entropy is about log V; the balance losses of two layers would add 0.02 to it."""
    log_dir, _ = finished
    record = json.loads((log_dir / "metrics.jsonl").read_text().splitlines()[1])
    model_loss = record["loss"] + 0.01 * record["balance_loss"]
    assert record["balance_loss"] == pytest.approx(2.0, abs=1e-3)  # no reference yet: perfect, in each layer
    assert abs(record["loss"] - record["val_loss"]) < abs(model_loss - record["val_loss"])


def test_checkpoint_is_plain_and_loads_as_documented(finished):
    log_dir, _ = finished
    checkpoint = torch.load(log_dir / "model_00005.pt")  # weights_only, torch's default
    assert checkpoint["step"] == 5 and (log_dir / "latest").read_text() == "model_00005.pt"
    assert {"model", "config", "step", "val_loss", "optimizer", "loader", "rng", "train_config"} <= set(
        checkpoint
    )
    assert type(checkpoint["config"]) is dict
    assert not any("_orig_mod" in name or name.startswith("module.") for name in checkpoint["model"])
    for kind in (GPT, GPTLMHeadModel):
        model = kind(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
        assert len(model.generate("Hello", max_length=12)) > 5


def test_what_a_finished_run_prints(finished):
    log_dir, printed = finished
    assert "step     4/5 | loss" in printed and "tok/s" in printed
    assert "validation loss" in printed and "MoE layer  1" in printed
    assert f"python sample.py --checkpoint {log_dir}/model_00005.pt" in printed


def test_sampling_from_the_checkpoint_is_reproducible(finished, capsys):
    log_dir, _ = finished
    flags = "--prompt Return --num_samples 2 --max_new_tokens 10 --top_k 50 --seed 3 --device cpu".split()
    printed = []
    for source in (log_dir / "model_00005.pt", log_dir / "latest"):
        assert sample.main(["--checkpoint", str(source), *flags]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("Return") == 2
    assert sample.main(["--checkpoint", str(log_dir / "model_00009.pt"), *flags]) == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_accumulation_does_not_change_the_losses(demo_data, tmp_path):
    for name, B in (("one", 16), ("four", 4)):
        train("--data_dir", demo_data, "--log_dir", tmp_path / name, "--B", B, "--tensorboard", "False")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("launcher", ["torchrun", "environment"])
def test_two_processes_give_the_losses_of_one(finished, demo_data, tmp_path, launcher):
    flags = [*TINY, "--data_dir", demo_data, "--log_dir", str(tmp_path), "--B", "4", "--tensorboard", "False"]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(ROOT / "train_gpt_moe.py"), *flags]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
    else:  # hand-set RANK, WORLD_SIZE, ...
        ranks = start_ranks(2, flags, tmp_path / "output")
        assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "output").read_text()
    assert losses(tmp_path) == pytest.approx(losses(finished[0]), rel=1e-4)
    assert losses(tmp_path, "val") == pytest.approx(losses(finished[0], "val"), rel=0.02)  # half the batches


def test_a_new_run_moves_the_old_one_aside(demo_data, tmp_path):
    for _ in range(2):
        train("--data_dir", demo_data, "--log_dir", tmp_path, "--B", 16, "--max_steps", 3)
    (old,) = tmp_path.glob("old_*")
    assert (old / "model_00003.pt").exists() and (old / "log.txt").read_text() == (
        tmp_path / "log.txt"
    ).read_text()


def test_learning_rate_schedule():
    config = TrainConfig(max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == learning_rate(10, config) == 1.0
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == pytest.approx(0.1)


def test_defaults_are_those_of_the_124m_recipe():
    config = TrainConfig()
    assert (config.total_batch_size, config.B, config.T) == (524288, 16, 1024)
    assert (config.max_lr, config.warmup_steps, config.max_steps) == (6e-4, 715, 19073)
    assert (config.weight_decay, config.beta1, config.beta2, config.grad_clip) == (0.1, 0.9, 0.95, 1.0)
    assert (config.infer_step, config.checkpoint_every) == (250, 5000)
    assert config.prompt == "Hello, I'm a language model,"


def test_flags_win_over_presets_and_aliases_are_fields():
    config, given = parse_config(
        "--preset demo --T 64 --num_iterations 7 --use_moe=False --compile 0".split()
    )
    assert (config.T, config.max_steps, config.use_moe, config.use_compile) == (64, 7, False, False)
    assert config.n_embd == PRESETS["demo"]["n_embd"]
    assert given == {"preset", "T", "max_steps", "use_moe", "use_compile"}


def test_batches_that_do_not_divide_are_refused_with_the_nearest_that_does():
    world = parallel.World(0, 0, 3, torch.device("cpu"))
    assert check_config(TrainConfig(B=4, T=8, total_batch_size=192), world) == 2
    with pytest.raises(
        ValueError, match=r"total_batch_size=100 .* 4 \* 8 \* 3 = 96; the nearest that is: 96"
    ):
        check_config(TrainConfig(B=4, T=8, total_batch_size=100), world)


@pytest.mark.parametrize(("steps", "expected"), [(30, 3), (5, 0), (40, 4), (41, 40), (0, 40)])
def test_a_presets_warmup_that_does_not_fit_is_made_shorter(steps, expected):
    world, said = parallel.World(0, 0, 1, torch.device("cpu")), []
    config, given = parse_config(["--preset", "demo", "--max_steps", str(steps)])
    check_config(config, world, given, said.append)
    assert config.warmup_steps == expected
    if expected == 40:
        assert not said
        return
    (line,) = said
    assert line.startswith(f"warmup_steps={expected}, not 40: max_steps={steps}") and "--warmup_steps" in line
    config, given = parse_config(["--preset", "demo", "--max_steps", str(steps), "--warmup_steps", "40"])
    for flags in (given, None):  # a flag's is refused, and a resumed run's, which keeps its settings
        with pytest.raises(ValueError, match=rf"warmup_steps=40 .*max_steps={steps}; lower --warmup_steps"):
            check_config(config, world, flags)


def test_a_short_demo_and_its_resume(demo_data, tmp_path, capsys):
    """The shortened warmup is a setting of the run from then on."""
    flags = ["--preset", "demo", *TINY[: TINY.index("--max_steps")], "--data_dir", demo_data, "--B", "16"]
    flags += ["--log_dir", str(tmp_path), "--val_steps", "1", "--sample_every", "0", "--plot", "False"]
    flags += ["--device", "cpu"]
    assert train_gpt_moe.main([*flags, "--max_steps", "20"]) == 0
    assert capsys.readouterr().out.count("warmup_steps=2, not 40: max_steps=20") == 1
    resume = ["--resume", str(tmp_path / "model_00020.pt"), "--device", "cpu", "--plot", "False"]
    assert train_gpt_moe.main([*resume, "--max_steps", "22"]) == 0
    rates = [json.loads(line).get("lr") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [rate for rate in rates if rate][:2] == pytest.approx([5e-3, 1e-2])
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


def test_starting_weights_from_a_checkpoint(finished, demo_data, tmp_path):
    log_dir, _ = finished
    train(
        "--data_dir", demo_data, "--log_dir", tmp_path, "--B", 16, "--init_from", log_dir / "model_00005.pt"
    )
    assert losses(tmp_path, "val")[0] == pytest.approx(losses(log_dir, "val")[-1], abs=1e-6)


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
    world, configs = parallel.World(0, 0, 1, torch.device("cpu")), []
    for module, arguments in ((script, []), (train_gpt_moe, [flag])):
        config, given = module.parse_config(arguments)
        check_config(config, world, given, lambda text: None)
        configs.append(dataclasses.asdict(config))
    assert configs[0] == configs[1] != dataclasses.asdict(TrainConfig())
    assert configs[0]["min_lr"] == pytest.approx(configs[0]["max_lr"] / 10)


def test_min_lr_follows_max_lr_unless_it_is_given():
    world = parallel.World(0, 0, 1, torch.device("cpu"))
    for flags, expected in ([], 6e-5), (["--max_lr=1e-3"], 1e-4), (["--min_lr=1e-5"], 1e-5):
        config, given = parse_config(flags)
        check_config(config, world, given)
        assert config.min_lr == expected
