"""A run that was killed and goes on is the same run: losses, weights, moments, routers, data, log files.

Run: python -m pytest tests/training/test_resume.py
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, slow
from processes import (
    STEPS,
    equal,
    finish,
    flags,
    full_disk,
    metrics,
    newest,
    same_run,
    start,
    start_ranks,
    wait_for,
    wait_for_text,
)  # fmt: skip

import train_gpt_moe
from tokens.shards import read_shard, write_shard
from training import checkpoints as ckpt
from training import log as run_log
from training.log import RunLog


def resume(source, *more) -> int:
    return train_gpt_moe.main(["--resume", str(source), "--device", "cpu", *map(str, more)])


# ---------------------------------------------------------------------------- the same run


@pytest.mark.parametrize("most", [1, *slow(5)])
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(data, tmp_path, most):
    """SIGKILL at random moments, by the number of steps in the log and a random time after that."""
    chance, steps = random.Random(1), 20 + 8 * most  # too many for the moments between three kills
    undisturbed, log_dir = tmp_path / "undisturbed", tmp_path / "log"
    assert train_gpt_moe.main(flags(data, undisturbed, "--max_steps", steps)) == 0
    output, kills = tmp_path / "out.txt", 0
    while kills < most:
        last = ckpt.list_checkpoints(log_dir)
        target = (ckpt.step_of(last[0]) if last else 0) + chance.randint(2, 5)
        process = start(flags(data, log_dir, "--max_steps", steps, "--resume", "auto"), output)
        begun = log_dir / ("latest" if most == 1 else "log.txt")  # a single kill leaves a checkpoint
        while process.is_alive() and (not begun.exists() or newest(log_dir) < target):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster
            break
        kills += 1
        if (log_dir / "latest").exists():  # it is written after the checkpoint it names
            assert (log_dir / (log_dir / "latest").read_text()).exists()
    assert kills >= min(most, 3)
    process = start(flags(data, log_dir, "--max_steps", steps, "--resume", "auto"), output)
    assert finish(process) == 0 and "resumed" in output.read_text(), output.read_text()
    same_run(undisturbed, log_dir)
    record = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    elapsed = [r["elapsed_s"] for r in record if "step" in r]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0


def test_the_parts_that_must_be_the_same_are_in_the_comparison(straight):
    """What same_run compares holds all that makes a run: moments, biases, counters, position, randomness."""
    state = ckpt.load_checkpoint(straight / "latest")
    names = state["model"].keys()
    for part in ("router_bias", "usage_counts", "reference_totals"):
        found = [name for name in names if name.endswith(part)]
        assert found and all(state["model"][name].any() for name in found), part
    moments = state["optimizer"]["state"][0]
    assert {"exp_avg", "exp_avg_sq", "step"} <= moments.keys() and moments["step"] == STEPS
    assert state["loader"]["position"] == STEPS * 256 // 32
    assert state["rng"].numel() > 1000 and state["health"]["seen"] == STEPS


def test_another_number_of_ranks_and_another_B_go_on_in_the_same_stream(straight, data, tmp_path):
    """Without dropout, whose noise is each rank's own, losses differ by rounding only."""
    exact = ["--dropout", 0, "--data_dir", data]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_gpt_moe.main(flags(data, whole, *exact, "--max_steps", 9)) == 0
    parts.mkdir()
    shutil.copy(whole / "model_00003.pt", parts)
    more = ["--resume", "auto", "--log_dir", parts, "--B", 2, "--device", "cpu"]
    ranks = start_ranks(2, more, tmp_path / "out")
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert "resume: B was 4 and is 2 from step 3 on" in said and "processes were 1 and are 2" in said
    assert said.count("resumed") == 1
    ends = [ckpt.load_checkpoint(folder / "model_00009.pt") for folder in (whole, parts)]
    assert equal(ends[0]["loader"], ends[1]["loader"])
    losses = [[r["loss"] for r in metrics(folder) if 3 <= r["step"] < 9] for folder in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4) and len(losses[1]) == 6
    for name, tensor in ends[0]["model"].items():
        if tensor.is_floating_point() and not name.endswith("router_bias"):
            torch.testing.assert_close(ends[1]["model"][name], tensor, rtol=0, atol=2e-3, msg=name)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_passes_sigterm_on(data, tmp_path, request):
    """A worker is killed: --max-restarts resumes. torchrun is told to stop: all save. Then the same end."""
    undisturbed, log_dir = tmp_path / "undisturbed", tmp_path / "log"
    # So many steps that the signals come before the end, however late they are.
    more = ["--B", 2, "--max_steps", 100, "--checkpoint_every", 10, "--infer_step", 50]
    others = start_ranks(2, flags(data, undisturbed, *more), tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=3", str(ROOT / "train_gpt_moe.py"), *flags(data, log_dir, *more)]
    with open(tmp_path / "torchrun", "w") as output:
        launcher = subprocess.Popen([*command, "--resume", "auto"], stdout=output, stderr=output)
    request.addfinalizer(launcher.kill)
    wait_for(log_dir / "log.txt", 1)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    named = lambda pid: b"train_gpt_moe.py" in Path(f"/proc/{pid}/cmdline").read_bytes()  # noqa: E731
    workers = [int(pid) for pid in children if named(pid)]
    assert len(workers) == 2
    wait_for(log_dir / "log.txt", 12)
    os.kill(workers[1], signal.SIGKILL)
    wait_for_text(tmp_path / "torchrun", "resumed")  # the restarted workers
    wait_for(log_dir / "metrics.jsonl", (log_dir / "metrics.jsonl").read_bytes().count(b"\n") + 5)
    launcher.terminate()
    launcher.wait(300)
    said = (tmp_path / "torchrun").read_text()
    assert "SIGTERM: finishing this step" in said and "stopped before step" in said
    stopped = ckpt.step_of(ckpt.list_checkpoints(log_dir)[0])
    assert stopped == newest(log_dir) + 1 < 100  # nothing that was trained is missing
    assert [finish(rank) for rank in others] == [0, 0]
    ranks = start_ranks(2, flags(data, log_dir, *more, "--resume", "auto"), tmp_path / "out")
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "out").read_text()
    same_run(undisturbed, log_dir)


# ---------------------------------------------------------------------------- settings of a resumed run


@pytest.fixture
def stopped(straight, tmp_path) -> Path:
    """A copy of the undisturbed run as it was after 6 steps."""
    log_dir = tmp_path / "stopped"
    shutil.copytree(straight, log_dir)
    for path in ckpt.list_checkpoints(log_dir):
        if ckpt.step_of(path) > 6:
            path.unlink()
    return log_dir


def test_settings_are_kept_without_flags(straight, stopped, capsys):
    """Nothing but the checkpoint is named: its folder is log_dir, its settings are those of the run."""
    assert resume(stopped / "model_00006.pt") == 0
    same_run(straight, stopped)
    said = [line for line in capsys.readouterr().out.splitlines() if "resume:" in line]
    assert len(said) == 1 and "settings from the checkpoint" in said[0]


@pytest.mark.parametrize(
    ("flag", "value", "before"),
    [
        ("n_layer", 3, 2), ("n_embd", 64, 32), ("num_experts", 8, 4), ("T", 16, 32), ("seed", 7, 1337),
        ("activation", "relu2", "'gelu'"), ("tie_word_embeddings", False, True), ("block_size", 64, 32),
        ("moe_loss_type", "variance_penalty", "'load_balancing'"), ("vocab_size", 512, 384),
    ],
)  # fmt: skip
def test_another_run_is_refused_naming_field_and_values(stopped, capsys, flag, value, before):
    content = {path: path.read_bytes() for path in stopped.glob("*.*")}
    assert resume("auto", "--log_dir", stopped, f"--{flag}", value) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error and "--init_from" in error
    assert f"resume: {flag}={before}" in error and f"--{flag} {value!r} now" in error
    assert content == {path: path.read_bytes() for path in stopped.glob("*.*")}


def other_data(data, folder: Path, change) -> str:
    """A copy of the data with changed training tokens or meta.json."""
    shutil.copytree(data, folder)
    change(folder)
    return str(folder)


def cut(folder: Path) -> None:
    path = folder / "train_000000.bin"
    write_shard(path, np.array(read_shard(path)[:-1000]))


def other_tokens(folder: Path) -> None:
    path = folder / "train_000000.bin"
    tokens = np.array(read_shard(path))
    tokens[:200] = tokens[200:400]
    write_shard(path, tokens)


def other_encoding(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"encoding": "gpt2"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [(cut, "tokens="), (other_tokens, "sha256="), (other_encoding, "encoding='bytes' .* 'gpt2'")],
)
def test_other_data_is_refused(stopped, data, tmp_path, capsys, change, message):
    other = other_data(data, tmp_path / "other", change)
    assert resume("auto", "--log_dir", stopped, "--data_dir", other) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_the_same_data_elsewhere_and_settings_that_may_change_are_accepted(stopped, data, tmp_path, capsys):
    moved = other_data(data, tmp_path / "moved", lambda folder: None)
    more = "--max_steps 10 --max_lr 1e-3 --weight_decay 0.2 --infer_step 5 --log_every 2".split()
    more += ["--total_batch_size", 128, "--log_dir", stopped, "--data_dir", moved]
    assert resume("auto", *more) == 0
    said = capsys.readouterr().out
    for line in (
        "max_steps was 12 and is 10 from step 6 on", "max_lr was 0.003 and is 0.001",
        "weight_decay was 0.1 and is 0.2", "infer_step was 4 and is 5", "log_every was 1 and is 2",
        "total_batch_size was 256 and is 128",
    ):  # fmt: skip
        assert f"resume: {line}" in said
    state = ckpt.load_checkpoint(stopped / "model_00010.pt")
    assert max(group["weight_decay"] for group in state["optimizer"]["param_groups"]) == 0.2
    assert state["loader"]["position"] == (6 * 256 + 4 * 128) // 32
    assert [record["step"] for record in metrics(stopped)] == list(range(11))


def test_a_finished_run_is_made_longer(stopped, data, tmp_path, capsys):
    """Its last validation loss stays, of a step at which the longer run measures nothing."""
    on = ["auto", "--log_dir", stopped, "--data_dir", data]
    assert resume(*on, "--max_steps", 7, "--tensorboard", "True", "--seed", 1337) == 0
    capsys.readouterr()
    final = [line for line in (stopped / "log.txt").read_text().splitlines() if line.startswith("7 ")]
    assert len(final) == 1 and final[0].startswith("7 val ")
    assert resume(*on, "--max_steps", 8) == 0
    assert "resume: max_steps was 7 and is 8 from step 7 on" in capsys.readouterr().out
    lines = (stopped / "log.txt").read_text().splitlines()
    assert final[0] in lines and sum(line.startswith("7 train ") for line in lines) == 1
    assert [r["step"] for r in metrics(stopped) if "loss" in r] == list(range(8))
    assert {r["step"] for r in metrics(stopped) if "loss" not in r} == {7, 8}
    for fewer in ("--max_steps", "5"), ("--preset", "llmc", "--max_steps", "5"):
        assert resume(*on, *fewer) == 2
        assert "has done 8 steps already, but max_steps=5" in capsys.readouterr().err


def test_constants_that_are_not_the_checkpoints_are_named(stopped, data, capsys):
    on = ["auto", "--log_dir", stopped, "--data_dir", data]
    assert resume(*on, "--preset", "demo", "--max_steps", 6) == 0
    said = capsys.readouterr().out
    assert "resume: max_steps was 12 and is 6 from step 6 on" in said
    (line,) = [line for line in said.splitlines() if "settings from the checkpoint" in line]
    assert "B=4" in line and "max_lr=0.003" in line and "n_layer" not in line and "max_steps" not in line


def test_a_preset_changes_nothing_in_a_resumed_run(data, tmp_path):
    """The first command had flags that win over the preset; the second one need not repeat them."""
    more = ["--preset", "gpt2", "--use_moe", True, "--max_steps", 3, "--warmup_steps", 1]
    more += ["--seed", 1_732_243_200]  # any seed will do
    assert train_gpt_moe.main(flags(data, tmp_path, *more)) == 0
    assert resume("auto", "--preset", "gpt2", "--log_dir", tmp_path) == 0
    assert ckpt.load_newest(tmp_path)[1]["config"]["use_moe"]


# ---------------------------------------------------------------------------- which checkpoint, which files


def test_damaged_checkpoints_are_skipped_and_put_aside(straight, stopped, capsys):
    content = (stopped / "model_00006.pt").read_bytes()
    (stopped / "model_00006.pt").write_bytes(content[: len(content) // 2])
    (stopped / ".model_00009.pt.0123456789abcdef.tmp").write_bytes(content[:1000])
    assert resume("auto", "--log_dir", stopped) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in ("WARNING: skipping", "model_00006.pt", "resumed", "at step 3"))
    (old,) = stopped.glob("old_*")
    assert (old / "model_00006.pt").stat().st_size == len(content) // 2 and not list(stopped.glob(".*.tmp"))
    same_run(straight, stopped)


def test_an_earlier_checkpoint_starts_a_new_branch(straight, tmp_path):
    """Newer checkpoints of the branch that is left must not be taken by the next --resume auto."""
    log_dir = tmp_path / "log"
    shutil.copytree(straight, log_dir)
    assert resume(log_dir / "model_00003.pt", "--max_steps", 5) == 0
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(log_dir)] == [5, 3]
    (old,) = log_dir.glob("old_*")
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(old)] == [12, 9, 6]
    assert (log_dir / "latest").read_text() == "model_00005.pt"


def test_with_nothing_to_resume_it_starts_afresh(straight, data, tmp_path, capsys):
    """Also after a crash before the first checkpoint, whose log is put aside."""
    tmp_path.joinpath("log.txt").write_text("0 val 5.9\n0 train 5.9\n1 tr")
    tmp_path.joinpath("metrics.jsonl").write_text('{"run": {}}\n{"step": 0, "loss": 5.9}\n{"st')
    assert train_gpt_moe.main(flags(data, tmp_path, "--resume", "auto")) == 0
    (old,) = tmp_path.glob("old_*")
    assert (old / "log.txt").read_text().endswith("1 tr") and "resumed" not in capsys.readouterr().out
    same_run(straight, tmp_path)


def test_a_finished_run_that_is_resumed_is_finished(straight, stopped):
    shutil.copy(straight / "model_00012.pt", stopped)
    assert resume("auto", "--log_dir", stopped) == 0
    same_run(straight, stopped)
    assert len(list(stopped.glob("old_*"))) == 0


def test_weights_alone_and_missing_files_cannot_be_resumed(straight, tmp_path, capsys):
    state = ckpt.load_checkpoint(straight / "latest")
    path = ckpt.save_checkpoint({name: state[name] for name in ("model", "config", "step")}, tmp_path)
    for source, message in ((path, "--init_from"), (tmp_path / "none.pt", "no such checkpoint")):
        assert resume(source) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_a_folder_belongs_to_one_run_at_a_time(data, tmp_path, capsys):
    lock = run_log.claim_folder(tmp_path)
    assert train_gpt_moe.main(flags(data, tmp_path)) == 2
    assert "another run is writing there" in capsys.readouterr().err
    lock.close()
    run_log.claim_folder(tmp_path).close()


# ---------------------------------------------------------------------------- log files


def test_a_log_cut_at_any_byte_gets_every_step_once(tmp_path):
    """Steps 0 to 4 were logged, the kill has cut the file, the run goes on from step 3."""
    records = [{"run": {"first_step": 0}}, *({"step": step, "loss": step / 7} for step in range(5))]
    whole = {
        "log.txt": "".join(f"{s} val 1.0\n{s} train 1.5\n" for s in range(5)).encode(),
        "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode(),
    }
    lines = {"log.txt": 6, "metrics.jsonl": 4}
    kept = {name: b"".join(text.splitlines(True)[: lines[name]]) for name, text in whole.items()}
    new = {"log.txt": b"3 train inf\n", "metrics.jsonl": b'{"step": 3, "loss": null}\n'}
    for name, content in whole.items():
        for length in range(len(kept[name]), len(content) + 1):
            (tmp_path / name).write_bytes(content[:length] + b"\0" * (length % 3))
            (tmp_path / "model_00003.pt").touch()
            log = RunLog(tmp_path, tmp_path / "model_00003.pt", 3, tensorboard=False)
            log.record({"step": 3, "loss": float("nan")})
            log.measurement(3, "train", float("inf"))
            assert log.close()
            assert (tmp_path / name).read_bytes() == kept[name] + new[name]
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (b"2 train 1.500000\n", True), (b"3 train 1.500000\n", False), (b"2 train nan\n", True),
        (b"2 train 1.5", False), (b"2 train\n", True), (b"\0\0\0\n", False), (b"\xff\n", True),
        (b'{"step": 2}\n', True), (b'{"step": 3}\n', False), (b'{"step": 2}', False), (b'{"st\n', True),
        (b'{"run": {}}\n', True), (b'{"run": {"first_step": 2}}\n', True), (b'{"step": "2"}\n', True),
        (b'{"run": {"first_step": 3}}\n', False), (b'{"run": 3}\n', True), (b"[1]\n", True), (b"\n", True),
        (b"4 apples\n", True), (b"4 apples", True), (b"4 tra", False), (b"[" * 9999 + b"\n", True),
    ],
)  # fmt: skip
def test_which_lines_a_run_that_goes_on_from_step_3_keeps(line, kept):
    assert run_log.stays_after_resume(line, 3) == kept


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (b"3 val 1.500000\n", True), (b"3 hella 0.25\n", True), (b"3 train 1.500000\n", False),
        (b"s:3 tel:1.5\n", True), (b"s:3 trl:1.5\n", False), (b"4 val 1.5\n", False), (b"3 val\n", True),
        (b'{"step": 3, "val_loss": 1.5}\n', True), (b'{"step": 3, "loss": 1.5}\n', False),
        (b'{"run": {"first_step": 3}}\n', False),
    ],
)  # fmt: skip
def test_which_lines_stay_where_step_3_is_not_evaluated_again(line, kept):
    assert run_log.stays_after_resume(line, 3, evaluates_first=False) == kept


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, capsys):
    log = RunLog(tmp_path, None, 0, tensorboard=False)
    for step in range(40):
        if step < 10 or step >= 30:
            log.measurement(step, "train", 1.5)
        else:
            with full_disk(135):  # in the middle of a line
                log.measurement(step, "train", 1.5)
                with pytest.raises(OSError, match="File too large"):
                    log.sync()  # no checkpoint that knows of these steps before their lines
    assert capsys.readouterr().out.count("WARNING: log.txt cannot be written") == 1
    with full_disk(100):
        log.measurement(40, "train", 1.5)
        assert not log.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines == [f"{step} train 1.500000" for step in range(40)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of its thread
def test_tensorboard_on_a_full_disk_stops_alone(tmp_path, capsys):
    log = RunLog(tmp_path, None, 0, tensorboard=True)
    with full_disk(2000):  # 200 of its events do not fit, and neither do all lines of the logs
        for step in range(40):
            log.step({"step": step, "loss": 1.5, "lr": 0.1, "norm": 2.0, "tok_per_s": 7.0})
            time.sleep(0.002)  # its writer is a thread
    log.step({"step": 40, "loss": 1.5})
    assert log.close() and log.tensorboard is None
    said = capsys.readouterr().out
    assert said.count("WARNING: no more TensorBoard events") == 1 and said.count("cannot be written") == 1
    assert [record["step"] for record in metrics(tmp_path)] == list(range(41))


# ---------------------------------------------------------------------------- begin with other weights


@pytest.mark.parametrize("K", [2, *slow(1)])
def test_upcycling_end_to_end(K, data, tmp_path):
    """A dense checkpoint becomes a MoE: same validation loss at first; its experts, equal then, part ways.

    With K = 2 most are in use at once; with K = 1 most wait for their tokens, and stay the copies they were.
    """
    dense, log_dir = tmp_path / "dense", tmp_path / "moe"
    assert train_gpt_moe.main(flags(data, dense, "--use_moe", False, "--max_steps", 6)) == 0
    arguments = ["--init_from", str(dense / "latest"), "--data_dir", data, "--log_dir", str(log_dir)]
    arguments += "--use_moe True --num_experts 8 --max_steps 3 --warmup_steps 0 --checkpoint_every 1".split()
    arguments += ["--num_experts_per_tok", str(K)]
    arguments += "--T 32 --B 4 --total_batch_size 256 --val_steps 2 --prompt A --device cpu".split()
    arguments += ["--use_compile", "False"]
    assert train_gpt_moe.main(arguments) == 0
    assert metrics(log_dir)[0]["val_loss"] == pytest.approx(metrics(dense)[-1]["val_loss"], abs=1e-5)
    state = ckpt.load_checkpoint(log_dir / "model_00003.pt")
    assert state["config"]["num_experts"] == 8 and state["config"]["n_embd"] == 32
    experts = state["model"]["transformer.h.1.mlp.experts.c_fc"]
    loads = torch.tensor([record["expert_load"] for record in metrics(log_dir)[:-1]])  # (steps, layers, E)
    assert K == 1 or (loads[-1] == 0).sum() <= 4  # idle of 2 x 8, in the third step
    busy = loads[:, 1].sum(0) > 0
    assert busy.sum() > 2
    apart = torch.pdist(experts[busy].flatten(1))
    assert apart.min() > 1e-3, "two experts are still the same"
    assert state["train_config"]["n_embd"] == 32 and state["train_config"]["dropout"] == 0.1  # the source's
    # Killed and resumed with the same command, it goes on from its own checkpoint, not from init_from.
    (log_dir / "model_00003.pt").unlink()
    assert train_gpt_moe.main([*arguments, "--resume", "auto"]) == 0
    assert equal(state["model"], ckpt.load_checkpoint(log_dir / "model_00003.pt")["model"])


def test_beginning_with_weights_refuses_flags_that_contradict_them(straight, data, tmp_path, capsys):
    refused = {
        ("--n_layer", 3): "n_layer=3, but init_from=", ("--num_experts", 8): "num_experts=8, but init_from=",
        ("--use_moe", False): "use_moe=False, but init_from=", ("--T", 64): "T=64, but init_from=",
    }  # fmt: skip
    for (flag, value), message in refused.items():
        arguments = ["--init_from", straight / "latest", "--data_dir", data, "--log_dir", tmp_path]
        arguments += ["--B", 1, "--total_batch_size", 64, "--device", "cpu", "--T", 32, flag, value]
        assert train_gpt_moe.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "log.txt").exists()


def test_a_moe_can_begin_a_new_run_with_another_balance_loss(straight, data, tmp_path):
    arguments = ["--init_from", str(straight / "latest"), "--data_dir", data, "--log_dir", str(tmp_path)]
    arguments += "--max_steps 2 --warmup_steps 1 --T 16 --block_size 16 --B 4 --total_batch_size 64".split()
    arguments += "--moe_loss_type diversity_regularization --device cpu --use_compile False".split()
    assert train_gpt_moe.main(arguments) == 0
    state = ckpt.load_checkpoint(tmp_path / "latest")
    config = state["config"]
    assert config["block_size"] == 16 and config["moe_loss_type"] == "diversity_regularization"
    assert metrics(tmp_path)[0]["val_loss"] < 5.0  # the weights came along: a fresh model has log 384 = 5.95
