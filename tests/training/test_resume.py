"""A run that was killed and goes on is the same run: losses, weights, moments, routers, data, log files."""

import json
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import slow
from processes import equal, finish, flags, full_disk, metrics, newest, read_rows, run_ranks, same_run, start
from test_log import resumed

import train_gpt_moe
from train_gpt_moe import TrainConfig
from training import checkpoints as ckpt
from training import log as run_log
from training.log import RunLog

RESUME = ["--device", "cpu", "--resume", "auto", "--log_dir"]


def resume(source, *more) -> int:
    return train_gpt_moe.main(["--resume", str(source), "--device", "cpu", *map(str, more)])


# ---------------------------------------------------------------------------- the same run
@pytest.mark.parametrize("kills", [1, *slow(4)])
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(straight, data, tmp_path, kills):
    """SIGKILL at random moments: some steps after the newest checkpoint, and a random time after that."""
    chance, output, log_dir, killed = random.Random(1), tmp_path / "out.txt", tmp_path / "log", 0
    command = flags(data, log_dir, "--checkpoint_every", 1, "--resume", "auto")
    while killed < kills:
        saved = ckpt.list_checkpoints(log_dir)
        target = (ckpt.step_of(saved[0]) if saved else 1) + chance.randint(0, 2)
        process = start(command, output)
        while process.is_alive() and (not (log_dir / "latest").exists() or newest(log_dir) < target):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it had finished before it was killed
            shutil.rmtree(log_dir)
            killed = 0
            continue
        killed += 1
        assert (log_dir / (log_dir / "latest").read_text()).exists()
    process = start(command, output)
    assert finish(process) == 0 and "resumed" in output.read_text(), output.read_text()
    same_run(straight, log_dir)
    elapsed = [record["elapsed_s"] for record in read_rows(log_dir)]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0


@pytest.mark.parametrize("optimizer", ["adamw", *slow("muon")])
def test_another_layout_and_another_B_continue_the_same_stream(data, tmp_path, optimizer):
    """Two ranks share experts and everything else. Without dropout, whose noise is each rank's own, losses
    differ by rounding only."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--dropout", 0, "--max_steps", 6, "--optimizer", optimizer, "--log_norms", True]
    more += ["--ngram_order", 3, "--ngram_rows", 64, "--adagrad_ngrams", True]  # AdamW's, without muon
    assert train_gpt_moe.main(flags(data, whole, *more)) == 0
    parts.mkdir()
    shutil.copy(whole / "model_00003.pt", parts)
    more = [*RESUME, parts, "--B", 2, "--parallel", "fsdp", "--ep_size", 2]
    run_ranks(2, more, tmp_path / "out")
    said = (tmp_path / "out").read_text()
    assert "resume: B was 4 and is 2 from step 3 on" in said and "processes were 1 and are 2" in said
    assert said.count("resumed") == 1
    assert (parts / "latest").read_text() == "model_00006" and (parts / "model_00006").is_dir()
    ends = [ckpt.load_checkpoint(folder / "latest") for folder in (whole, parts)]
    assert equal(ends[0]["loader"], ends[1]["loader"])
    losses = [[r["loss"] for r in metrics(folder) if 3 <= r["step"] < 6] for folder in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4) and len(losses[1]) == 3
    norms = [{k: v for k, v in metrics(log)[-2].items() if k.startswith("norm")} for log in (whole, parts)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and len(norms[0]) == 6
    for name, tensor in ends[0]["model"].items():
        if tensor.is_floating_point() and not name.endswith("router_bias"):
            torch.testing.assert_close(ends[1]["model"][name], tensor, rtol=0, atol=2e-3, msg=name)


# ---------------------------------------------------------------------------- settings of a resumed run
@pytest.fixture
def stopped(straight, tmp_path) -> Path:
    """A copy of the undisturbed run as it was after 6 steps."""
    later = shutil.ignore_patterns("model_00009.pt", "model_00012.pt")
    return shutil.copytree(straight, tmp_path / "stopped", ignore=later)


def test_a_field_that_an_older_checkpoint_lacks_has_its_default(straight):
    """A preset may set the field by now. The optimizer's state is of the default."""
    path, said = straight / "model_00006.pt", []
    state = ckpt.load_checkpoint(path)
    del state["train_config"]["muon_experts"], state["train_config"]["muon_steps"]
    config = TrainConfig(muon_experts=False, muon_steps=3)
    ckpt.keep_settings(config, set(), state, path, said.append)
    assert config.muon_experts is True and config.muon_steps == 5 and "muon_steps=5" in said[-1]
    with pytest.raises(ValueError, match=r"muon_experts=True in .* omit the flag"):
        ckpt.keep_settings(TrainConfig(muon_experts=False), {"muon_experts"}, state, path, said.append)


def test_a_flag_that_leaves_a_size_to_the_data_may_be_given_again(straight):
    """As torchrun gives all flags again when it restarts a run."""
    path, sizes = straight / "model_00006.pt", dict(block_size=0, vocab_size=-1, ngram_order=-1)
    state, config = ckpt.load_checkpoint(path), TrainConfig(**sizes)
    state["config"]["ngram_order"] = 6
    ckpt.keep_settings(config, set(sizes), state, path)
    assert (config.block_size, config.vocab_size, config.ngram_order) == (32, 384, 6)


@pytest.mark.parametrize(("flag", "value", "before"), [
    ("n_layer", 3, 2), ("n_embd", 64, 32), ("num_experts", 8, 4), ("T", 16, 32), ("seed", 7, 1337),
    ("activation", "relu2", "'gelu'"), ("tie_word_embeddings", False, True), ("block_size", 64, 32),
    ("moe_loss_type", "variance_penalty", "'load_balancing'"), ("vocab_size", 512, 384),
])  # fmt: skip
def test_another_run_is_refused_naming_field_and_values(stopped, refused, flag, value, before):
    content = {path: path.read_bytes() for path in stopped.glob("*.*")}
    error = refused(train_gpt_moe.main, *RESUME, stopped, f"--{flag}", value)
    for text in (f"resume: {flag}={before}", f"--{flag} {value!r} now", "--init_from"):
        assert text in error
    assert content == {path: path.read_bytes() for path in stopped.glob("*.*")}


def test_data_of_another_encoding_is_refused(stopped, data, tmp_path, refused):
    """test_identity.py has other tokens."""
    meta = Path(shutil.copytree(data, tmp_path / "other"), "meta.json")
    meta.write_text(meta.read_text().replace("bytes", "gpt2"))
    error = refused(train_gpt_moe.main, *RESUME, stopped, "--data_dir", tmp_path / "other")
    assert "encoding='bytes'" in error and "'gpt2'" in error


def test_the_same_data_elsewhere_and_settings_that_may_change_are_accepted(stopped, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "moved")
    more = "--max_steps 8 --max_lr 1e-3 --weight_decay 0.2 --infer_step 5 --log_every 2".split()
    more += ["--total_batch_size", 128, "--log_dir", stopped, "--data_dir", tmp_path / "moved"]
    assert resume("auto", *more) == 0
    said = capsys.readouterr().out
    for line in ("max_steps was 12 and is 8 from step 6 on", "max_lr was 0.003 and is 0.001",
                 "weight_decay was 0.1 and is 0.2", "infer_step was 4 and is 5", "log_every was 1 and is 2",
                 "total_batch_size was 256 and is 128"):  # fmt: skip
        assert f"resume: {line}" in said
    state = ckpt.load_checkpoint(stopped / "model_00008.pt")
    assert max(group["weight_decay"] for group in state["optimizer"]["param_groups"]) == 0.2
    assert state["loader"]["position"] == (6 * 256 + 2 * 128) // 32
    assert [record["step"] for record in metrics(stopped)] == list(range(8))


def test_a_finished_run_is_made_longer(stopped, data, capsys):
    """Step 7 ends the first run, with a validation loss that the longer run does not measure: it stays, and
    the row of step 7 has it, too. No step has two rows."""
    on = ["auto", "--log_dir", stopped, "--data_dir", data]
    assert resume(*on, "--max_steps", 7) == 0
    final = [line for line in (stopped / "log.txt").read_text().splitlines() if line.startswith("7 ")]
    assert [line.split()[1] for line in final] == ["val", "val_bpb"]
    assert resume(*on, "--max_steps", 8) == 0
    assert "resume: max_steps was 7 and is 8 from step 7 on" in capsys.readouterr().out
    lines = (stopped / "log.txt").read_text().splitlines()
    assert set(final) < set(lines) and sum(line.startswith("7 train ") for line in lines) == 1
    rows = metrics(stopped)
    assert [(row["step"], "loss" in row) for row in rows] == [(step, True) for step in range(8)]
    assert rows[6]["eval_step"] == 7 and rows[7]["eval_step"] == 8
    starts = json.loads((stopped / "run.json").read_text())["earlier"]
    assert [start["first_step"] for start in starts] == [0, 6] and starts[0]["versions"]
    for fewer in ("--max_steps", "5"), ("--preset", "llmc", "--max_steps", "5"):
        assert resume(*on, *fewer) == 2
        assert "has done 8 steps already, but max_steps=5" in capsys.readouterr().err


def test_a_preset_changes_nothing_but_what_differs_is_named(stopped, capsys):
    """gpt2 has use_moe=False: the first command's flag won over it, and need not be given again."""
    for preset in ("demo", "gpt2"):
        assert resume("auto", "--log_dir", stopped, "--preset", preset, "--max_steps", 6) == 0
        said = capsys.readouterr().out
        (line,) = [line for line in said.splitlines() if "resume: " in line and "B=4" in line]
        assert not any(name in line for name in ("n_layer", "use_moe", "max_steps"))
        assert "resume: max_steps was 12 and is 6 from step 6 on" in said


# ---------------------------------------------------------------------------- which checkpoint, which files
def test_damaged_checkpoints_are_skipped_and_put_aside(straight, stopped, capsys):
    """Without flags the settings are those of the run."""
    content = (stopped / "model_00006.pt").read_bytes()
    (stopped / "model_00006.pt").write_bytes(content[: len(content) // 2])
    (stopped / ".model_00009.pt.0123456789abcdef.tmp").write_bytes(content[:1000])
    assert resume("auto", "--log_dir", stopped) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in ("WARNING: skipping", "model_00006.pt", "resumed", "at step 3"))
    (settings,) = (line for line in said.splitlines() if "resume:" in line)
    assert "B=4" in settings and "max_lr=0.003" in settings
    (old,) = stopped.glob("old_*")
    assert (old / "model_00006.pt").stat().st_size == len(content) // 2 and not list(stopped.glob(".*.tmp"))
    same_run(straight, stopped)


def test_an_earlier_checkpoint_starts_a_new_branch(straight, tmp_path):
    """Newer checkpoints of the branch that is left must not be taken by the next --resume auto."""
    log_dir = shutil.copytree(straight, tmp_path / "log")
    (log_dir / "best").write_text("model_00009.pt")
    with open(log_dir / "log.txt", "a") as file:
        file.write("3 val 4.000000\n9 val 3.000000\n")
    assert resume(log_dir / "model_00003.pt", "--max_steps", 5) == 0
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(log_dir)] == [5, 3]
    (old,) = log_dir.glob("old_*")
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(old)] == [12, 9, 6]
    assert (log_dir / "latest").read_text() == "model_00005.pt"
    assert (log_dir / "best").read_text() == "model_00003.pt"
    assert (old / "best").read_text() == "model_00009.pt"


def test_with_nothing_to_resume_it_starts_afresh(straight, data, tmp_path, capsys):
    tmp_path.joinpath("log.txt").write_text("0 val 5.9\n0 train 5.9\n1 tr")
    tmp_path.joinpath("metrics.jsonl").write_text('{"run": {}}\n{"step": 0, "loss": 5.9}\n{"st')
    more = ["--resume", "auto", "--max_steps", 3, "--seed", 1_732_243_200]  # a large seed
    assert train_gpt_moe.main(flags(data, tmp_path, *more)) == 0
    (old,) = tmp_path.glob("old_*")
    assert (old / "log.txt").read_text().endswith("1 tr") and "resumed" not in capsys.readouterr().out
    assert [record["step"] for record in metrics(tmp_path)] == [0, 1, 2]


def test_a_folder_belongs_to_one_run_at_a_time(data, tmp_path, refused):
    lock = run_log.claim_folder(tmp_path)
    assert "another run is writing there" in refused(train_gpt_moe.main, *flags(data, tmp_path))
    lock.close()
    run_log.claim_folder(tmp_path).close()


# ---------------------------------------------------------------------------- log files
def test_a_log_cut_at_any_byte_gets_every_step_once(tmp_path):
    """Steps 0 to 4 were logged, the kill has cut the file, the run goes on from step 3."""
    records = [{"step": step, "loss": step / 7} for step in range(5)]
    whole = {"log.txt": "".join(f"{s} val 1.0\n{s} train 1.5\n" for s in range(5)).encode(),
             "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode()}  # fmt: skip
    lines = {"log.txt": 6, "metrics.jsonl": 3}
    kept = {name: b"".join(text.splitlines(True)[: lines[name]]) for name, text in whole.items()}
    new = {"log.txt": b"3 train inf\n", "metrics.jsonl": b'{"step": 3, "loss": null}\n'}
    for name, content in whole.items():
        for length in range(len(kept[name]), len(content) + 1, 2):
            (tmp_path / name).write_bytes(content[:length] + b"\0" * (length % 3))
            log = resumed(tmp_path, 3)
            log.record({"step": 3, "loss": float("nan")})
            log.measurement(3, "train", float("inf"))
            assert log.close()
            assert (tmp_path / name).read_bytes() == kept[name] + new[name]
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()


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
    assert (tmp_path / "log.txt").read_text() == "".join(f"{step} train 1.500000\n" for step in range(40))


def test_tensorboard_on_a_full_disk_stops_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # in place of pytest's
    log = RunLog(tmp_path, None, 0, tensorboard=True)
    with full_disk(2000):  # 200 of its events do not fit, and neither do all lines of the logs
        for step in range(40):
            log.step({"step": step, "loss": 1.5, "lr": 0.1, "norm": 2.0, "tok_per_s": 7.0})
            time.sleep(0.002)  # its writer is a thread
    log.step({"step": 40, "loss": 1.5})
    assert log.close() and log.tensorboard is None
    said, error = capfd.readouterr()
    assert said.count("WARNING: no more TensorBoard events") == 1 and said.count("cannot be written") == 1
    assert "Trace" not in error
    assert [record["step"] for record in metrics(tmp_path)] == list(range(41))
