"""What all scripts print alike: errors in one line, and commands that can be copied."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, refuses

import fineweb
import plot_log
import train_gpt_moe
from tokens.identity import DEFAULTS
from tokens.shards import DistributedDataLoader, find_shards, read_meta
from train_gpt_moe import TrainConfig
from training import checkpoints as ckpt
from training.parallel import World

SCRIPTS = {  # name in messages: arguments that are wrong
    "train_gpt_moe.py": "--B 0", "fineweb.py": "--shard_size 0", "hellaswag.py": "--model no.pt",
    "sample.py": "--checkpoint no.pt", "plot_log.py": "no", "checkpoint.py": "verify no.pt",
    "python -m bench": "scale --size d13", "python -m llmc": "export --checkpoint no.pt --out .",
    "python -m analysis": "routing no.pt",
}  # fmt: skip


def main_of(script: str):
    name = script.split()[-1].removesuffix(".py")
    modules = {"bench": "bench.__main__", "llmc": "llmc.files", "analysis": "analysis.__main__"}
    return importlib.import_module(modules.get(name, name)).main


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_errors_in_one_line_of_every_script(script, tmp_path, monkeypatch, capsys, refused):
    """Our errors, and argparse's for an unknown flag."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script])
    assert refused(main_of(script), *SCRIPTS[script].split()).startswith(f"{script}: error: ")
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main_of(script)(["--no_flag"]))
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{script}: error: ")
    with pytest.raises(SystemExit, match="0"):
        sys.exit(main_of(script)(["--help"]))
    said = capsys.readouterr().out
    assert "usage" in said or "python train_gpt_moe.py" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_and_a_missing_package_are_one_line(script):
    """-S hides all packages. An old Python must also be able to parse what it reads first."""
    name = script.split()[-1]
    path = ROOT / (name if name.endswith(".py") else f"{name}/__main__.py")
    for file in (path, ROOT / "tokens" / "requirements.py", ROOT / "tokens" / "__init__.py"):
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))
    setting = f"import runpy, sys; sys.argv = [{str(path)!r}, 'scale']; sys.path.insert(0, {str(ROOT)!r})"
    for more, words in (("", "pip install -r requirements.txt"), ("; sys.version_info = (3, 10)", "3.11")):
        code = f"{setting}{more}; runpy.run_path(sys.argv[0], run_name='__main__')"
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, done.stderr
        assert done.stderr.startswith(f"{script}: error: ")


def test_without_network_no_folder_stays(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("datasets.load_dataset", mock.Mock(side_effect=ConnectionError("no network")))
    assert "no network" in refused(fineweb.main, "--encoding", "bytes", "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def check(command: str) -> None:
    """The script's parser must take the command; small ones also do their work."""
    words = shlex.split(command)
    while words[0] in ("python", "torchrun", "-m") or words[0].startswith("--"):
        assert not words.pop(0).endswith("=")
    script, *arguments = words
    arguments += ["--tokens", "512", "--drop_tokens", "0"] if script == "analysis" else []
    if script == "train_gpt_moe.py":
        train_gpt_moe.parse_config(arguments)
    elif script != "fineweb.py" or ("--source" in command and "=TEXT" not in command) or "--demo" in command:
        assert main_of(script)(arguments) == 0, command
    else:  # a download, or TEXT stands for a source
        with mock.patch.object(fineweb, "build") as build:
            assert fineweb.main(arguments) == 0 and build.called


def test_printed_commands_can_be_run(straight, tmp_path, monkeypatch, capsys, short_demo):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # fineweb.py starts no processes
    shutil.copytree(straight, "log/my run")
    (tmp_path / "my text.txt").write_text("some words " * 300)
    make = ["--source", "my text.txt", "--encoding", "bytes", "--out", "my data", "--workers", "1"]
    assert fineweb.main(make) == 0 and fineweb.DataConfig(**DEFAULTS) == fineweb.DataConfig()
    (val,), lines = find_shards("my data", "val"), []
    config = TrainConfig(log_dir="log/none", resume="auto", device="cpu", parallel="fsdp", ep_size=2)
    assert ckpt.find_resumed(config, World(0, 0, 1, torch.device("cpu")), lines.append) == (None, None)
    found = {"log/my run": lines[0], "--out 'no data'": refuses("data", read_meta, "no data", error=OSError),
             "--log_dir 'no log'": refuses("no log", plot_log.find_runs, ["no log"], error=OSError),
             "--demo": refuses("no data", find_shards, "no*.bin", error=OSError),
             "--val_tokens=401": refuses("val_", DistributedDataLoader, [val], 20, 20)}  # fmt: skip
    names = "LOCAL_WORLD_SIZE GROUP_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split()
    with mock.patch.dict("os.environ", dict.fromkeys(names, "2")):
        found["torchrun --nproc_per_node=2 --nnodes=2"] = ckpt.resume_command(config)
    with open(val, "r+b") as file:
        file.truncate(1200)
    found["--val_tokens=330"] = refuses("val_", DistributedDataLoader, [val], 1, 8)  # rebuilds the cut shard
    capsys.readouterr()
    with mock.patch.object(fineweb, "build", side_effect=KeyboardInterrupt):
        fineweb.main(make)
    found[shlex.join(make)] = capsys.readouterr().err
    assert train_gpt_moe.main(["--log_dir", "log/my run", "--resume", "auto", "--device", "cpu"]) == 0
    found["--device cpu --max_steps 24"] = capsys.readouterr().out  # a finished run
    for words, text in found.items():
        commands = re.findall(r"(?:python|torchrun) [^`\n]+", text)
        assert any(words in command for command in commands), text
        for command in commands:
            check(command)
    assert DistributedDataLoader([val], 1, 8) and DistributedDataLoader("my data_2/val*", 20, 20)
