"""--help, other projects' names of flags, numbers, and files of settings."""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT, refuses
from processes import STEPS, flags, full_disk, losses

import train_gpt_moe
from tokens.shards import read_meta
from train_gpt_moe import TrainConfig, parse_config
from training.quick_help import SYNONYMS, read_flags


def script(*arguments) -> subprocess.CompletedProcess:
    """train_gpt_moe.py in a Python that cannot import torch."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; sys.path[0] = '.'\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, "train_gpt_moe.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"COLUMNS": "80"})


def test_help_and_mistyped_flags_do_not_wait_for_torch():
    shown = script("--help")
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) <= 45
    assert all(f" --{field.name}" in shown.stdout for field in dataclasses.fields(TrainConfig))
    assert "--no_" not in shown.stdout and "--max-steps" not in shown.stdout
    for arguments, words in ((["--lr", "1"], "--max_lr"), (["--max_step=1"], "did you mean --max_steps?")):
        wrong = script(*arguments)
        assert wrong.returncode == 2 and words in wrong.stderr and wrong.stderr.count("\n") == 1


def test_the_flags_that_are_read_are_those_of_the_dataclass():
    groups = read_flags(train_gpt_moe.__file__).values()
    read = {name: also for flags in groups for name, also in flags.items()}
    assert read == {field.name: field.metadata["aliases"] for field in dataclasses.fields(TrainConfig)}
    known = read.keys() | {alias.removeprefix("--") for aliases in read.values() for alias in aliases}
    assert not SYNONYMS.keys() & known and {text.split()[0].strip(",") for text in SYNONYMS.values()} <= known


@pytest.mark.parametrize("name", SYNONYMS)
def test_other_names_are_answered_with_ours(name):
    refuses(f"--{name} is called --{SYNONYMS[name].split()[0]}", parse_config, [f"--{name}", "1"])


def test_help_of_a_word_shows_its_flags_with_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(["--help", "--moe_loss"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[0].split()[:2] == ["--moe_loss", "True"]
    found = {line.split()[0] for line in lines if line[0] == "-"}
    assert found == {"--moe_loss", "--moe_loss_type", "--moe_loss_coef"}


def test_numbers_may_be_powers():
    words = "--total_batch_size 2**19 --max_steps=5e2 --num_iterations 1e3 --prompt 2**19 --batch-size=8"
    config, _ = parse_config(words.split())
    assert (config.total_batch_size, config.max_steps, config.prompt) == (2**19, 1000, "2**19")
    refuses("B", parse_config, ["--B", "1.5e0"])


def test_the_settings_of_a_run_repeat_it(straight, tmp_path):
    """run.json gives the same losses; flags win over it."""
    arguments = ["--config", str(straight / "run.json"), "--log_dir", str(tmp_path), "--infer_step", "0"]
    assert train_gpt_moe.main([*arguments, "--max_steps", "4", "--checkpoint_every", "0"]) == 0
    repeated = json.loads((tmp_path / "run.json").read_text())["config"]
    assert repeated["max_steps"] == 4 and repeated["n_embd"] == 32 and STEPS > 4
    assert losses(tmp_path)[:2] == losses(straight)[:2]  # the warmup's two steps: the schedule is another one


def test_own_text_in_one_flag(tmp_path, capsys, refused):
    """Its shards lie in log_dir, which may be moved; a resumed run needs them alone."""
    (tmp_path / "my.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    more = "--max_steps", 2, "--warmup_steps", 1, "--sample_every", 1, "--text", tmp_path / "my.txt"
    assert train_gpt_moe.main(flags("unused", tmp_path / "log", *more)) == 0
    meta = read_meta(tmp_path / "log" / "data")
    assert meta["encoding"] == "bytes" and meta["tokens"] == {"val": 1800, "train": 18001 - 1800}
    assert "step 1: sample\n    Return" in capsys.readouterr().out
    (tmp_path / "my.txt").unlink()
    moved = (tmp_path / "log").rename(tmp_path / "moved")
    resume = ["--log_dir", str(moved), "--resume", "auto", "--max_steps", "3", "--device", "cpu"]
    assert train_gpt_moe.main(resume) == 0 and losses(moved)[-1] > 0
    with full_disk(500):
        assert train_gpt_moe.main(flags("unused", tmp_path / "full", "--text", __file__)) == 1
    assert f"File too large: '{tmp_path}/full/data'" in capsys.readouterr().err
    for text, flag in (("another text", "another --log_dir"), ("\0", "--errors")):
        (tmp_path / "my.txt").write_text(text)
        log_dir = moved if "log" in flag else tmp_path / "new"
        error = refused(train_gpt_moe.main, *flags("unused", log_dir, *more))
        assert flag in error and "fineweb.py --source TEXT" in error and "--data_dir" in error


def test_files_of_settings(tmp_path, monkeypatch):
    file, yaml = tmp_path / "a.json", tmp_path / "a.yaml"
    yaml.write_text("B: 3\nmax_lr: 0.5\nmin_lr: 6e-5\nwandb_project: 12e4f\n")
    config, given = parse_config(["--config", str(yaml), "--max_lr", "2", "--run_name", "x.1", "--text=~/x"])
    assert (config.B, config.max_lr, config.log_dir) == (3, 2.0, "log/x.1") and {"B", "max_lr"} <= given
    assert (config.min_lr, config.wandb_project, config.text[0]) == (6e-5, "12e4f", "/")
    wrong = {"{": "a.json", '{"Bx": 1}': "did you mean --B", '{"B": "1"}': "B='1'", "[1]": "a.json",
             "[" * 10**5: "a.json", '{"preset": []}': "preset="}  # fmt: skip
    for text, words in wrong.items():
        file.write_text(text)
        refuses(words, parse_config, ["--config", str(file)])
    refuses("nowhere", parse_config, ["--config", "nowhere"], error=FileNotFoundError)
    refuses(r"run_name='\.\./x'", parse_config, ["--run_name", "../x"])
