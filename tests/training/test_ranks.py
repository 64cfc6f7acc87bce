"""All ranks are told the same: signals, a killed launcher, different settings or data, a start that waits."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, refuses, slow
from processes import finish, flags, free_port, metrics, newest, start, start_ranks, wait_for
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import train_gpt_moe
from tokens.shards import read_shard, write_shard
from training import checkpoints as ckpt
from training import faults, heartbeat, rendezvous
from training.faults import Signals

LONG = ["--max_steps", 50_000, "--checkpoint_every", 0]


def main(arguments: list[str]) -> int:
    """What `start_ranks(..., script="test_ranks")` runs: each rank may have a folder and flags of its own."""
    rank = os.environ["RANK"]
    os.chdir(os.environ.get(f"FOLDER_{rank}", "."))
    return train_gpt_moe.main([*arguments, *os.environ.get(f"FLAGS_{rank}", "").split()])


def saved_all(log_dir: Path) -> bool:
    """Whether the newest checkpoint has every step of the log, and no more."""
    return ckpt.load_newest(log_dir)[1]["step"] == newest(log_dir) + 1


# ---------------------------------------------------------------------------- signals
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU"])
@pytest.mark.parametrize("ignored", [False, True])
def test_signals_end_a_run_unless_they_are_ignored_at_its_start(name, ignored, request):
    """As nohup ignores SIGHUP. A second SIGINT is left to the system. The handlers of before come back."""
    number = getattr(signal, name)
    before = signal.SIG_IGN if ignored else signal.getsignal(number)
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, before)))
    with Signals() as signals:
        os.kill(os.getpid(), number)
        assert signals.stop_requested != ignored
        assert (signal.getsignal(number) == signal.SIG_DFL) == (name == "SIGINT" and not ignored)
        signals.agree(signals.take(torch.device("cpu")).tolist())
    assert signals.exit_code == (None if ignored else 128 + number) and not signals.save_now
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("reader", "name", "code"), [("tee", "SIGINT", 130), ("terminal", "SIGHUP", 129)])
def test_whoever_reads_the_output_is_gone(reader, name, code, data, tmp_path):
    """Ctrl-C at `... 2>&1 | tee out` ends the tee as well, and SIGHUP follows the end of a terminal."""
    if reader == "terminal":
        ours, its = os.openpty()
        run = start(flags(data, tmp_path, *LONG), os.ttyname(its))
    else:
        os.mkfifo(tmp_path / "pipe")
        run = start(flags(data, tmp_path, *LONG), tmp_path / "pipe")
        ours = os.open(tmp_path / "pipe", os.O_RDONLY)
    wait_for(tmp_path / "log.txt", 6)
    os.close(ours)
    wait_for(tmp_path / "log.txt", newest(tmp_path) + 10)
    os.kill(run.pid, getattr(signal, name))
    assert finish(run) == code and saved_all(tmp_path)


def test_signals_are_heard_inside_a_collective(data, tmp_path):
    """Rank 1 is stopped, so rank 0 waits for it, and Python with it: no handler of Python can run."""
    output = tmp_path / "out.txt"
    ranks = start_ranks(2, flags(data, tmp_path, *LONG, "--B", 2), output)
    wait_for(tmp_path / "log.txt", 6)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    seen = -1
    while seen != newest(tmp_path):  # until rank 0 has come to a step that it cannot finish alone
        seen = newest(tmp_path)
        time.sleep(0.5)
    try:
        os.kill(ranks[0].pid, signal.SIGINT)
        wait_for(output, "SIGINT: finishing this step")
        assert ranks[0].is_alive()
        os.kill(ranks[0].pid, signal.SIGINT)
        assert finish(ranks[0]) == 130
    finally:
        ranks[1].kill()


def test_a_signal_and_a_bad_step_of_one_rank_are_those_of_all(data, tmp_path):
    """Rank 1 alone meets NaN, in steps 2 and 4, and rank 1 alone is told to stop."""
    output = tmp_path / "out.txt"
    ranks = start_ranks(2, flags(data, tmp_path, *LONG, "--B", 2), output, sick={5: 1, 8: 1})
    wait_for(tmp_path / "log.txt", 9)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [finish(rank) for rank in ranks] == [143, 143], output.read_text()
    assert saved_all(tmp_path)
    assert "stopped before step" in output.read_text()
    records = metrics(tmp_path)
    assert [record["step"] for record in records if record.get("skipped")] == [2, 4]
    assert [record["bad_steps"] for record in records[:6]] == [0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------------------- a launcher that is killed
@pytest.mark.parametrize("noticed_by", ["parent", "store"])
def test_a_killed_launcher_is_like_sigterm(noticed_by, monkeypatch, capsys):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "TIMEOUT_AFTER_ERROR", 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", host.port, None, False, wait_for_workers=False)
    one = heartbeat.Heartbeat(0, 1, store, launcher_has_store=True)
    del store
    one._end_without_launcher()  # outside of a training SIGTERM would kill this process
    with Signals() as signals:
        one.start()
        if noticed_by == "parent":
            monkeypatch.setattr(os, "getppid", lambda: 1)
        else:
            del host
        end = time.monotonic() + 30
        while not signals.stop_requested:
            assert time.monotonic() < end
            time.sleep(0.01)
        one.stop(finished=True)
    assert one.lost == "" and capsys.readouterr().err.count("rank 0: torchrun was killed") == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM ddp", "SIGHUP ddp", "SIGKILL ddp", "SIGKILL fsdp"])
def test_signals_to_torchrun(data, tmp_path, how, request):
    """Most are passed on. SIGKILL is not: the ranks, which are all alive, notice it themselves."""
    name, layout = how.split()
    run = [ROOT / "train_gpt_moe.py", *flags(data, tmp_path / "log", *LONG, "--B", 2, "--parallel", layout)]
    port = f"--master_port={free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", port, *map(str, run)]
    with open(tmp_path / "out", "w") as output:
        launcher = subprocess.Popen(command, stdout=output, stderr=output)
    request.addfinalizer(launcher.kill)
    wait_for(tmp_path / "log" / "log.txt", 8)
    launcher.send_signal(getattr(signal, name))
    launcher.wait(60)
    wait_for(tmp_path / "out", "stopped before step", 60)
    assert saved_all(tmp_path / "log")
    assert ("torchrun was killed" in (tmp_path / "out").read_text()) == (name == "SIGKILL")


def test_torchrun_gets_the_error_to_print(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert faults.report(ValueError("B=0 is\nwrong")) == 2
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))  # torchrun's reader of the file
    assert failure.message["message"] == r"B=0 is\nwrong" and time.time() - failure.timestamp < 60


# ---------------------------------------------------------------------------- different settings or data
def refused_by_two(data, tmp_path, environment: dict[str, str]) -> list[str]:
    """The lines that two ranks print. Both must end with code 2 before anything is written."""
    words, out = flags(data, tmp_path / "log", "--B", 2), tmp_path / "out"
    ranks = start_ranks(2, words, out, script="test_ranks", environment=environment)
    assert [finish(rank, 60) for rank in ranks] == [2, 2] and not (tmp_path / "log").exists()
    return out.read_text().splitlines()


def test_different_settings_are_named_on_all_ranks(data, tmp_path):
    other = {"FLAGS_1": f"--max_lr 0.1 --resume auto --prompt {'x' * 1000}"}
    lines = refused_by_two(data, tmp_path, other)
    assert len(lines) == 2
    for line in lines:
        assert "max_lr=0.003 on rank 0, but 0.1 on rank 1" in line and len(line) < 500
        assert "resume='' on rank 0, but 'auto' on rank 1" in line and "prompt=" in line
        assert "log_dir" not in line


@pytest.mark.parametrize("field", ["fingerprints", *slow("validation")])
def test_different_data_are_named_on_all_ranks(data, tmp_path, field):
    """Two machines, on which the same name is another folder."""
    for machine in ("a", "b"):
        shutil.copytree(data, tmp_path / machine / "data")
    shard = tmp_path / "b" / "data" / f"{'val' if field == 'validation' else 'train'}_000000.bin"
    write_shard(shard, np.array(read_shard(shard))[::-1])
    folders = {"FOLDER_0": str(tmp_path / "a"), "FOLDER_1": str(tmp_path / "b")}
    lines = refused_by_two("data", tmp_path, folders)
    words = rf"different training data: .*{field}=\S+ on rank 0, but \S+ on rank 1"
    assert sum(bool(re.search(words, line)) for line in lines) == 2


# ---------------------------------------------------------------------------- a start that waits
@pytest.mark.parametrize(("rank", "others"), [(0, "ranks 1, 2 of WORLD_SIZE=3 ("), (1, "rank 0 at ")])
def test_a_start_that_waits_says_for_whom(rank, others, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=0.6))
    monkeypatch.setattr(rendezvous, "WAIT_MESSAGE_S", 0.1)
    end = "ranks 1, 2 of WORLD_SIZE=3 did not start|rank 1 cannot reach rank 0 at MASTER_ADDR=localhost, MAST"
    refuses(end, rendezvous.rendezvous, rank, 3, "localhost", free_port())
    assert capsys.readouterr().err.count(f"rank {rank} waits for {others}") > 1
