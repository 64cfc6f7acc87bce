"""Several machines, played by several launchers on this one: rendezvous, lost ranks, Slurm, environment."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, refuses, slow
from processes import finish, flags, free_port, run_ranks, same_run, start_ranks, wait_for

import train_gpt_moe
from training import heartbeat, parallel, rendezvous
from training.setup import check_config

HOST = socket.gethostname()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# So long that a kill after a few steps comes before the end, however late it is.
SHORT = ["--B", 2, "--max_steps", 80, "--checkpoint_every", 5, "--infer_step", 40]
LONG = ["--B", 2, "--max_steps", 50_000, "--checkpoint_every", 0]


def main(arguments: list[str]) -> int:
    """What `start(..., script="test_nodes")` runs: a training with frequent heartbeats and other timeouts."""
    heartbeat.INTERVAL, heartbeat.TIMEOUT_AFTER_ERROR = 0.1, 1.5
    heartbeat.HEARTBEAT_TIMEOUT, heartbeat.EXIT_TIMEOUT = map(float, os.environ["TIMEOUTS"].split())
    return train_gpt_moe.main(arguments)


@pytest.fixture(scope="module")
def one_node(data, tmp_path_factory) -> Path:
    """The log of two processes on one machine, undisturbed."""
    log_dir = tmp_path_factory.mktemp("one_node") / "log"
    run_ranks(2, flags(data, log_dir, *SHORT), log_dir.parent / "out")
    return log_dir


def kill_worker(log_dir: Path, rank: int) -> int:
    """Kill the training process of this rank that writes to log_dir, after some steps. Returns its id."""
    wait_for(log_dir / "log.txt", 8)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours
            words, environment = ((folder / f).read_bytes().split(b"\0") for f in ("cmdline", "environ"))
            of_run = str(log_dir).encode() in words and b"torch.distributed.run" not in words
            if of_run and f"RANK={rank}".encode() in environment:
                os.kill(int(folder.name), signal.SIGKILL)
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_static_rendezvous_and_a_lost_worker_without_restarts(one_node, data, tmp_path, request):
    """The command of docs/many_gpus.md. Both launchers end; the run goes on, and ends as on one machine."""
    page = (ROOT / "docs" / "many_gpus.md").read_text(encoding="utf-8")
    command = re.search(r"^ +torchrun (.*--node_rank=0 .*) train_gpt_moe.py", page, re.MULTILINE)[1]
    port = free_port()
    for name, value in {"master_addr": "127.0.0.1", "master_port": port, "nproc_per_node": 1}.items():
        command, found = re.subn(rf"--{name}=\S+", f"--{name}={value}", command)
        assert found == 1
    script = [str(ROOT / "train_gpt_moe.py"), *flags(data, tmp_path / "log", *SHORT), "--resume", "auto"]

    launchers = []
    for node in (0, 1):
        words = [*TORCHRUN, *command.replace("--node_rank=0", f"--node_rank={node}").split(), *script]
        with open(tmp_path / f"node{node}", "a") as output:
            launchers.append(subprocess.Popen(words, stdout=output, stderr=output))
        request.addfinalizer(launchers[-1].kill)
    victim = kill_worker(tmp_path / "log", 1)
    assert [launcher.wait(300) for launcher in launchers] == [1, 1]
    said = (tmp_path / "node0").read_text()
    assert f"rank 1 (process {victim} on {HOST}) is lost" in said
    assert "Signal 9 (SIGKILL)" in (tmp_path / "node1").read_text()
    run_ranks(2, script[1:], tmp_path / "out")
    same_run(one_node, tmp_path / "log")


@pytest.mark.slow
def test_the_slurm_script_brings_a_lost_worker_back(one_node, data, tmp_path, request):
    """Slurm's commands are played: srun starts its task once per machine. A worker of the second machine is
    killed; --max-restarts starts all again on both, and the run ends as on one machine."""
    commands = {
        "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "127.0.0.1\\nnode2\\n"',
        "srun": 'test "$1" = --kill-on-bad-exit=1 && shift && ("$@" & one=$!; "$@"; other=$?; wait $one '
        "&& exit $other)",
        "torchrun": f'exec {shlex.join(TORCHRUN)} --local_addr=127.0.0.1 "$@"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = dict(SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1")
    job["SLURM_JOB_ID"] = str(4_711_0000 + free_port() - 20_000)  # the port follows from it
    words = ["bash", ROOT / "train.slurm", *flags(data, tmp_path / "log", *SHORT)]
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with open(tmp_path / "out", "w") as output:
        options = dict(env=environment, cwd=ROOT, start_new_session=True)
        task = subprocess.Popen(list(map(str, words)), stdout=output, stderr=output, **options)
    request.addfinalizer(lambda: task.poll() is None and os.killpg(task.pid, signal.SIGKILL))
    kill_worker(tmp_path / "log", 1)
    code, said = task.wait(600), (tmp_path / "out").read_text()
    assert code == 0 and re.search(r"resumed .*model_00\d\d\d.pt at step", said), said
    same_run(one_node, tmp_path / "log")


def test_examples_in_the_slurm_script_have_a_batch_that_fits():
    text = (ROOT / "train.slurm").read_text()
    examples = re.findall(r"^#     sbatch (?:--nodes=(\d+) )?train\.slurm(.*?) +#", text, re.MULTILINE)
    assert len(examples) == 2
    for nodes, words in examples:
        config, given = train_gpt_moe.parse_config(words.split())
        check_config(config, parallel.World(0, 0, 8 * int(nodes or 2), torch.device("cpu")), given)


@pytest.mark.parametrize("lost", [*slow(0), 1])
@pytest.mark.parametrize(("name", "size", "timeouts"), [("SIGKILL", 3, "60 120"), ("SIGSTOP", 2, "2.5 0.3")])
def test_a_lost_rank_is_named_and_nobody_waits(data, tmp_path, name, size, timeouts, lost):
    """Processes started by hand, without a launcher that would end the others. Rank 0 has the store. A killed
    process gives the others an error. A stopped one does not, and neither does a machine without network."""
    arguments = flags(data, tmp_path / "log", *LONG, "--total_batch_size", 384)
    ranks = start_ranks(size, arguments, tmp_path / "out", {}, "test_nodes", {"TIMEOUTS": timeouts})
    wait_for(tmp_path / "log" / "log.txt", 2)
    os.kill(ranks[lost].pid, getattr(signal, name))
    try:
        assert {finish(rank) for rank in ranks if rank is not ranks[lost]} == {1}
    finally:
        ranks[lost].kill()
    said = (tmp_path / "out").read_text()
    assert said.count(f"rank {lost} (process {ranks[lost].pid} on {HOST})") == size - 1
    assert ("ends instead of waiting" in said) == (name == "SIGSTOP") and "Traceback" not in said


def test_all_learn_who_is_lost_and_none_that_has_finished_is_missed(monkeypatch):
    """Heartbeats of five ranks in this process. Rank 2 finishes, then ranks 3 and 4 are lost together."""
    times = dict(INTERVAL=0.05, HEARTBEAT_TIMEOUT=1.0, TIMEOUT_AFTER_ERROR=0.5)
    for name, seconds in (times | dict(EXIT_TIMEOUT=600.0)).items():  # whose end would end this process
        monkeypatch.setattr(heartbeat, name, seconds)
    host = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    connect = lambda: dist.TCPStore("127.0.0.1", host.port, None, False, wait_for_workers=False)  # noqa: E731
    ranks = [heartbeat.Heartbeat(rank, 5, connect()) for rank in range(5)]
    for rank in ranks:
        rank.start()
    try:
        ranks[2].stop(finished=True)
        assert ranks[1].lost_after_error() == ""  # an error of another kind: all are alive
        for rank in ranks[3:]:
            rank.stopped.set()
        assert ranks[0].found.wait(60) and ranks[1].found.wait(60)
        assert ranks[0].lost == ranks[1].lost == ranks[1].lost_after_error()
        place = f"(process {os.getpid()} on {HOST})"
        assert ranks[0].lost.startswith(f"rank 3 {place}, rank 4 {place} are lost")
    finally:
        for rank in ranks:
            rank.stop()


WORLD = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
BAD = [  # variable, value, words that the message must contain
    ("RANK", "-1", "RANK='-1'"), ("RANK", "2", "RANK=2 .*WORLD_SIZE"), ("RANK", "1_0", "RANK='1_0'"),
    ("RANK", "\uff11", "RANK='\uff11'"), ("LOCAL_RANK", "", "LOCAL_RANK=''"),
    ("WORLD_SIZE", "0", "WORLD_SIZE='0'"), ("WORLD_SIZE", "9" * 5000, "999' in the environment"),
    ("MASTER_PORT", "99999", "MASTER_PORT='99999'"), ("MASTER_ADDR", "a..b", "MASTER_ADDR='a..b'"),
    ("MASTER_ADDR", "x.invalid", "MASTER_ADDR='x.invalid'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_an_environment_that_makes_no_sense_is_named(name, value, message, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for variable in (WORLD | {name: value}).items():
        monkeypatch.setenv(*variable)
    refuses(message, parallel.start, "cpu")


def test_a_port_that_is_taken(monkeypatch):
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=1))
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        words = "rank 0 cannot reach rank 0 at .* free on rank 0's machine"
        refuses(words, rendezvous.rendezvous, 0, 2, "localhost", taken.getsockname()[1])
