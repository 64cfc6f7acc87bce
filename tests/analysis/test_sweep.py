"""python -m analysis sweep: its plan, what it refuses, skips and continues, failures, signals."""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from processes import TINY, flags, losses, same_run, wait_for

import train_gpt_moe
from analysis import sweep
from analysis.__main__ import main

# Stands for train_gpt_moe.py: seed 2 fails, the others write a finished log, seed 1 without validation.
FAKE = """
import json, os, sys
from pathlib import Path
words, print_ = sys.argv[1:], lambda text: print(text, flush=True)
value = lambda name: words[words.index(name) + 1]
folder, seed = Path(value("--log_dir")), value("--seed")
if seed == "2":
    print_("train_gpt_moe.py: error: out of luck"), print_("more text"), sys.exit(1)
names = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"
print_(json.dumps({name: os.environ.get(name) for name in names}))
(folder / "run.json").write_text(json.dumps({"config": {"max_steps": 12, "seed": int(seed)}}))
last = {"step": 11, "loss": 1.5} if seed == "1" else {"step": 12, "val_loss": 1.25}
(folder / "metrics.jsonl").write_text(json.dumps(last | {"elapsed_s": 7}) + chr(10))
"""


def arguments(data, log_dir, *words, more=()) -> list[str]:
    """A sweep of TINY's runs over the settings in `words`."""
    swept = {word.split("=")[0] for word in words}
    tiny = [word for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] not in swept for word in pair]
    return ["sweep", "--log_dir", str(log_dir), *words, "--", *tiny, "--data_dir", str(data), *more]


def test_the_commands_parse_and_their_folders_tell_what_differs(data, capsys):
    words = "--seed 1,2 --max_lr=1e-2,2e-2 --bias True".split()
    words += ["--moe_loss_type", "load_balancing,variance_penalty"]
    assert main(arguments(data, "out", "--dry_run", *words)) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [train_gpt_moe.parse_config(shlex.split(line)[2:])[0] for line in lines]
    assert [shlex.split(line)[0] for line in lines] == ["python"] * 8 and not Path("out").exists()
    assert len({(c.seed, c.max_lr, c.moe_loss_type) for c in found}) == 8 and found[0].resume == "auto"
    assert all(c.log_dir == f"out/max_lr={c.max_lr},moe_loss_type={c.moe_loss_type}-s{c.seed}" for c in found)
    assert main(arguments(data, "out", "--array", "5", *words)) == 0
    assert capsys.readouterr().out == f"{lines[5]}\n"


@pytest.mark.parametrize("words, named", [
    ("--max_lrs 1,2", "did you mean --max_lr"), ("--seed 1,x", "'x'"), ("--seed", "--seed"),
    ("--moe_loss_type load_balancing,none", "moe_loss_type='none'"), ("--seed 1,1", "--seed 1"),
    ("--seed 1 --seed 2", "given twice"), ("--run_name a,b", "run_name"),
    ("--jobs 0", "--jobs 0"), ("--array 1", "--array 1"),
])  # fmt: skip
def test_bad_settings_are_refused_before_anything_starts(data, refused, tmp_path, words, named):
    assert named in refused(main, *arguments(data, tmp_path / "out", *words.split()))
    assert not (tmp_path / "out").exists()


def test_finished_runs_are_skipped_and_failures_are_reported(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sweep, "PYTHON", [sys.executable, "-c", FAKE])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    log = tmp_path / "out"
    assert main(arguments(data, log, "--seed", "1,2,3", "--jobs", "2")) == 1
    said = capfd.readouterr().out
    assert f"failed    {log}/s2: train_gpt_moe.py: error: out of luck ({log}/s2/output.txt)" in said
    assert f"finished  {log}/s3: validation loss 1.2500, 12 steps, 7.0 s" in said
    assert f"finished  {log}/s1: 12 steps, 7.0 s" in said
    assert f"failed: {log}/s2" in said and f"python -m analysis compare {log}" in said
    assert main(arguments(data, tmp_path / "none", "--seed", "2")) == 1
    assert "compare with" not in capfd.readouterr().out  # there is no run
    shares = [json.loads((log / name / "output.txt").read_text()) for name in ("s1", "s3")]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"3"}
    assert shares[0]["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.chdir(tmp_path)
    assert main(arguments(data, log, "--seed", "1,3", more=["--preset", "demo"])) == 0
    assert not Path("demo_data").exists()  # the runs have another data_dir
    said = capfd.readouterr().out
    assert said.count("finished  ") == 2 and said.count(", before") == 2 and "started" not in said


def test_a_folder_of_another_run_is_refused_and_a_stopped_run_continues(data, straight, tmp_path, refused):
    shutil.copytree(straight, tmp_path / "s1337")
    words = arguments(data, tmp_path)
    place = words.index("--min_lr")
    del words[place : place + 2]  # the run has filled it in
    options = argparse.Namespace(log_dir=str(tmp_path), flags=[], common=words[4:])
    (job,) = sweep.plan(options)
    sweep.look_for_earlier(job)
    assert job.state == "finished"
    (tmp_path / "s1337" / "model_00012.pt").unlink()  # as after a kill while it was written
    sweep.look_for_earlier(job)
    assert job.state == "continued"
    for log in ("metrics.jsonl", "log.txt"):
        (tmp_path / "s1337" / log).unlink()
    sweep.look_for_earlier(job)  # its checkpoints suffice
    assert job.state == "continued"
    line = refused(main, *words, "--dropout", "0.2")
    assert "dropout=0.1, not 0.2" in line and f"rm -r {tmp_path}/s1337" in line


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_started_again_ends_as_undisturbed_runs(data, tmp_path):
    command = [sys.executable, "-m", "analysis"]
    command += arguments(data, tmp_path / "out", "--jobs", "2", "--seed", "1,2", more=["--max_steps", "40"])
    with open(tmp_path / "printed", "w") as file:
        first = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        wait_for(tmp_path / "out" / "s1" / "log.txt", 8)
        first.send_signal(signal.SIGTERM)
        assert first.wait(300) == 128 + signal.SIGTERM
        said = (tmp_path / "printed").read_text()
        assert said.count("] stopped") == 2 and "continue with: python -m analysis sweep" in said, said
        assert subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode == 0
    assert "] continued" in (tmp_path / "printed").read_text()
    for seed in (1, 2):
        assert train_gpt_moe.main(flags(data, tmp_path / f"s{seed}", "--max_steps", 40, "--seed", seed)) == 0
        assert losses(tmp_path / "out" / f"s{seed}", "val") == losses(tmp_path / f"s{seed}", "val")
        same_run(tmp_path / "out" / f"s{seed}", tmp_path / f"s{seed}")
