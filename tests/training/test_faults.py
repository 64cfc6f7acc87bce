"""What becomes of signals, sick steps, full disks, lost data and bad settings.

Run: python -m pytest tests/training/test_faults.py
"""

import ast
import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from models import dense_model, make_examples
from processes import (
    STEPS,
    equal,
    finish,
    flags,
    full_disk,
    metrics,
    newest,
    poisoned,
    same_run,
    start,
    start_ranks,
    wait_for,
    wait_for_text,
)  # fmt: skip

import hellaswag
import train_gpt_moe
from model import GPTLMHeadModel
from tokens.shards import DistributedDataLoader, read_shard, write_shard
from training import checkpoints as ckpt
from training import evaluation, faults, parallel
from training.checkpoint_writer import CheckpointWriter
from training.faults import Health, Signals
from training.log import RunLog
from training.setup import Run


def main(arguments: list[str]) -> int:
    """What `start_ranks(..., script="test_faults")` runs: a rank that waits for the first one's error."""
    faults.REPORT_DELAY = 600
    return train_gpt_moe.main(arguments)


# ---------------------------------------------------------------------------- signals


LONG = ["--max_steps", 50_000, "--checkpoint_every", 0]


def started(data, log_dir, output, *more, lines: int = 6):
    """A run that has logged some steps and has thousands to go."""
    process = start(flags(data, log_dir, *LONG, *more), output)
    wait_for(log_dir / "log.txt", lines)
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_saving(data, tmp_path, name, code):
    output = tmp_path / "out.txt"
    process = started(data, tmp_path, output)
    os.kill(process.pid, getattr(signal, name))
    assert finish(process) == code, output.read_text()
    said = output.read_text()
    assert f"{name}: finishing this step, then saving and stopping" in said and "Traceback" not in said
    (path,) = ckpt.list_checkpoints(tmp_path)
    assert ckpt.load_checkpoint(path)["step"] == newest(tmp_path) + 1  # every step in the log, and no more
    assert f"stopped before step {newest(tmp_path) + 1}; --resume auto continues from {path}" in said


def test_sigusr1_saves_and_goes_on_and_a_second_sigint_stops_at_once(data, tmp_path):
    output = tmp_path / "out.txt"
    process = started(data, tmp_path, output)
    os.kill(process.pid, signal.SIGUSR1)
    wait_for(tmp_path / "latest", 0)
    saved = ckpt.list_checkpoints(tmp_path)
    wait_for(tmp_path / "log.txt", newest(tmp_path) + 10)
    assert process.is_alive() and len(saved) == 1 and ckpt.load_checkpoint(saved[0])["step"] > 1
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before the step is over
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    wait_for_text(output, "SIGINT")
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(process.pid, signal.SIGINT)
    assert finish(process) in (-signal.SIGINT, 130)


def test_a_machine_without_a_compiler(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert train_gpt_moe.main([*flags(data, tmp_path / "log"), "--use_compile", "True"]) == 2
    error = capsys.readouterr().err
    assert "torch.compile needs g++, which is not installed; install it, or --use_compile False" in error
    assert error.count("\n") == 1 and not (tmp_path / "log").exists()
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "g+++")
    assert train_gpt_moe.main([*flags(data, tmp_path / "log"), "--use_compile", "True"]) == 2
    assert "torch.compile needs g+++" in capsys.readouterr().err


def test_a_reader_that_is_gone_stops_nothing(data, tmp_path):
    """Ctrl-C at `python train_gpt_moe.py 2>&1 | tee out` ends the tee as well."""
    os.mkfifo(tmp_path / "pipe")
    process = start(flags(data, tmp_path, *LONG), tmp_path / "pipe")
    with open(tmp_path / "pipe") as reader:
        assert any("| loss" in line for line in reader)
    wait_for(tmp_path / "log.txt", newest(tmp_path) + 10)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    (path,) = ckpt.list_checkpoints(tmp_path)
    assert ckpt.load_checkpoint(path)["step"] == newest(tmp_path) + 1


def test_signals_are_heard_inside_a_collective(data, tmp_path):
    """Rank 1 is stopped, so rank 0 waits for it, and Python with it: no handler of Python can run."""
    output = tmp_path / "out.txt"
    ranks = start_ranks(2, flags(data, tmp_path, *LONG, "--B", 2), output)
    wait_for(tmp_path / "log.txt", 6)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    seen = -1
    while seen != newest(tmp_path):  # until rank 0 has come to a step that it cannot finish alone
        seen = newest(tmp_path)
        time.sleep(1)
    try:
        os.kill(ranks[0].pid, signal.SIGINT)
        wait_for_text(output, "SIGINT: finishing this step")
        assert ranks[0].is_alive()
        os.kill(ranks[0].pid, signal.SIGINT)
        assert finish(ranks[0]) == 130
    finally:
        ranks[1].kill()


def test_the_second_sigint_is_not_ours_any_more():
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_requested and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_between_taking_and_agreeing_is_not_lost():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        first = signals.take(torch.device("cpu"))
        os.kill(os.getpid(), signal.SIGTERM)
        signals.agree(first.tolist())
        assert signals.save_now and signals.exit_code is None and signals.stop_requested
        signals.agree(signals.take(torch.device("cpu")).tolist())
        assert not signals.save_now and signals.exit_code == 143
        signals.agree([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        assert signals.exit_code == 130
        signals.agree(signals.take(torch.device("cpu")).tolist())
        assert signals.exit_code == 130  # it stays


def test_one_rank_is_told_and_all_stop_at_the_same_step(data, tmp_path):
    output = tmp_path / "out.txt"
    ranks = start_ranks(2, flags(data, tmp_path, *LONG, "--B", 2), output)
    wait_for(tmp_path / "log.txt", 6)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [finish(rank) for rank in ranks] == [143, 143], output.read_text()
    (path,) = ckpt.list_checkpoints(tmp_path)
    assert ckpt.load_checkpoint(path)["step"] == newest(tmp_path) + 1
    assert "stopped before step" in output.read_text()


def test_an_evaluation_gives_way_to_a_signal():
    class Loader:
        asked = 0

        def reset(self):
            pass

        def next_batch(self):
            self.asked += 1
            return torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)

    model, loader, world = dense_model(), Loader(), parallel.World(0, 0, 1, torch.device("cpu"))
    config = train_gpt_moe.TrainConfig(val_steps=5)
    run = Run(config, parallel.Layout(world), model, None, None, val_loader=loader)
    assert evaluation.validate(run, lambda: loader.asked == 3) is None
    assert loader.asked == 3
    assert evaluation.validate(run, lambda: False) == pytest.approx(4.1, abs=0.2)


@pytest.fixture
def signal_at_batch(monkeypatch):
    """signal_at_batch(name, n): this process gets the signal at the n-th batch of all evaluations, from 0."""
    next_batch, batches = faults.next_batch, itertools.count()

    def arrange(name: str, number: int) -> None:
        def told(loader):
            if not torch.is_grad_enabled() and next(batches) == number:
                os.kill(os.getpid(), getattr(signal, name))
            return next_batch(loader)

        monkeypatch.setattr(faults, "next_batch", told)

    return arrange


@pytest.mark.parametrize(("batch", "step"), [(2, 4), (6, STEPS)])
def test_a_cut_evaluation_is_done_after_the_resume(straight, data, tmp_path, signal_at_batch, batch, step):
    """SIGTERM in the evaluation before step 4, and in the one at the end: a long one is not waited for."""
    signal_at_batch("SIGTERM", batch)
    assert train_gpt_moe.main(flags(data, tmp_path)) == 143
    assert ckpt.load_newest(tmp_path)[1]["step"] == step and newest(tmp_path) == step - 1
    assert train_gpt_moe.main(flags(data, tmp_path, "--resume", "auto")) == 0
    same_run(straight, tmp_path)


def test_sigusr1_in_an_evaluation_saves_at_once(straight, data, tmp_path, signal_at_batch, monkeypatch):
    """... and evaluates anew: the run is the same, but for one more checkpoint."""
    events, validate, save = [], evaluation.validate, CheckpointWriter.save

    def validated(*arguments):
        loss = validate(*arguments)
        events.append("cut short" if loss is None else "evaluated")
        return loss

    def saved(self, checkpoint, *arguments):
        events.append(checkpoint["step"])
        return save(self, checkpoint, *arguments)

    monkeypatch.setattr(evaluation, "validate", validated)
    monkeypatch.setattr(CheckpointWriter, "save", saved)
    signal_at_batch("SIGUSR1", 2)
    assert train_gpt_moe.main(flags(data, tmp_path)) == 0
    assert events[:6] == ["evaluated", 3, "cut short", 4, "evaluated", 6]
    same_run(straight, tmp_path)


@pytest.mark.parametrize("fails", [[0], [1, 2]])
def test_a_save_that_failed_is_tried_again(straight, data, tmp_path, monkeypatch, capsys, fails):
    """A disk that is full for a while: when the run saves before step 6, or in the end, before step 12."""
    save, tries = ckpt.save_checkpoint, itertools.count()

    def sometimes(checkpoint, folder):
        if next(tries) in fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(checkpoint, folder)

    monkeypatch.setattr(ckpt, "save_checkpoint", sometimes)
    wants_retry = CheckpointWriter.wants_retry  # here after the save has ended, however slow its thread is
    monkeypatch.setattr(CheckpointWriter, "wants_retry", lambda self: (self.wait(), wants_retry(self))[1])
    assert train_gpt_moe.main(flags(data, tmp_path, "--checkpoint_every", 6, "--save_retry_s", 0)) == 0
    said = capsys.readouterr()
    assert said.out.count("CHECKPOINT NOT WRITTEN: [Errno 28]") == len(fails) and not said.err
    first, last = sorted(int(path.stem.removeprefix("model_")) for path in ckpt.list_checkpoints(tmp_path))
    assert (first, last) == (7 if 0 in fails else 6, 12)
    same_run(straight, tmp_path)


def test_hellaswag_gives_way_to_a_signal_and_is_done_after_the_resume(data, tmp_path, monkeypatch):
    """SIGTERM at its second batch before step 4: the run saves, stops, and asks all questions later."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(example) for example in make_examples(30)))
    scored_logits, batches = hellaswag.scored_logits, []

    def told_to_stop(model, batch, shared):
        batches.append(batch)
        if len(batches) == before + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return scored_logits(model, batch, shared)

    monkeypatch.setattr(hellaswag, "scored_logits", told_to_stop)
    monkeypatch.setattr(hellaswag, "TOKENS_PER_BATCH", {"cpu": 128})
    arguments = ["--hellaswag", 1, "--hellaswag_data", questions]
    before = 10**6
    whole = tmp_path / "whole"
    assert train_gpt_moe.main(flags(data, whole, *arguments)) == 0
    of_one_evaluation = len(batches) // 4  # at steps 0, 4, 8 and 12
    assert of_one_evaluation >= 5
    batches.clear()
    before = of_one_evaluation
    assert train_gpt_moe.main(flags(data, tmp_path / "run", *arguments)) == 143
    assert len(batches) == before + 2
    assert ckpt.load_newest(tmp_path / "run")[1]["step"] == 4
    batches.clear()
    before = 10**6
    assert train_gpt_moe.main(flags(data, tmp_path / "run", "--resume", "auto")) == 0
    assert len(batches) == 3 * of_one_evaluation
    same_run(whole, tmp_path / "run")


def test_a_prompt_without_tokens_costs_the_samples_and_nothing_else(data, tmp_path, monkeypatch, capsys):
    """As on a machine without network where tiktoken has never been."""

    def no_network(text, config):
        raise ConnectionError("tiktoken cannot fetch the files of gpt2")

    monkeypatch.setattr(evaluation, "encode_prompt", no_network)
    assert train_gpt_moe.main(flags(data, tmp_path, "--sample_every", 4)) == 0
    said = capsys.readouterr().out
    assert "no samples in this run: tiktoken cannot fetch the files of gpt2" in said
    assert ": sample: " not in said


# ---------------------------------------------------------------------------- sick steps


def test_a_sick_step_changes_nothing_but_the_place_in_the_data(data, tmp_path, monkeypatch, capsys):
    """Steps 4 and 5 meet NaN (two micro-steps each). The run goes on as if it had only skipped their data."""
    monkeypatch.setattr(GPTLMHeadModel, "forward", poisoned(GPTLMHeadModel.forward, {8: -1, 11: -1}))
    saved, save = [], CheckpointWriter.save
    note = lambda self, state, before: saved.append(self._copy(state, {})) or save(self, state, before)  # noqa: E731
    monkeypatch.setattr(CheckpointWriter, "save", note)
    assert train_gpt_moe.main(flags(data, tmp_path, "--checkpoint_every", 1)) == 0
    records = metrics(tmp_path)
    assert [record["step"] for record in records if record.get("skipped")] == [4, 5]
    assert [record["loss"] for record in records[4:6]] == [None, None] and records[6]["loss"] < 6
    assert [record.get("bad_steps") for record in records[3:7]] == [0, 1, 2, 2]
    assert "expert_load" not in records[4] and "expert_load" in records[6]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "4 train nan" in lines and "5 train nan" in lines
    assert capsys.readouterr().out.count("WARNING: no update: loss nan, norm nan") == 2
    before, after = saved[3], saved[5]  # at the beginnings of steps 4 and 6
    assert equal(before["model"], after["model"]) and equal(before["optimizer"], after["optimizer"])
    assert after["loader"]["position"] - before["loader"]["position"] == 2 * 256 // 32
    assert (after["health"]["bad_steps"], after["health"]["in_a_row"]) == (2, 2)
    assert saved[6]["health"]["in_a_row"] == 0
    assert all(tensor.isfinite().all() for tensor in saved[-1]["model"].values())


def test_a_sick_step_of_one_rank_is_left_out_by_all(data, tmp_path):
    """Rank 1 alone meets NaN; without dropout the weights of both ranks stay equal, and finite."""
    output = tmp_path / "out.txt"
    more = ["--B", 2, "--max_steps", 8, "--max_bad_steps", 3, "--dropout", 0]
    ranks = start_ranks(2, flags(data, tmp_path / "log", *more), output, sick={5: 1, 8: 1})
    assert [finish(rank) for rank in ranks] == [0, 0], output.read_text()
    records = metrics(tmp_path / "log")
    assert [record["step"] for record in records if record.get("skipped")] == [2, 4]
    assert [record["bad_steps"] for record in records[:8]] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_too_many_sick_steps_end_the_run_with_a_diagnosis(straight, data, tmp_path, monkeypatch, capsys):
    """Parameters and the batch's place are named; what was good is saved, and --resume goes on from it."""
    for path in straight.iterdir():
        shutil.copy(path, tmp_path) if path.is_file() else None
    for step in (9, 12):
        (tmp_path / f"model_{step:05d}.pt").unlink()
    sick = {4: -1, 6: -1, 7: -1, 8: -1}  # micro-steps of the steps 8, 9, 9, 10
    forward = GPTLMHeadModel.forward
    monkeypatch.setattr(GPTLMHeadModel, "forward", poisoned(forward, sick))
    before = (tmp_path / "model_00006.pt").read_bytes()
    arguments = ["--resume", "auto", "--log_dir", str(tmp_path), "--max_bad_steps", "3", "--device", "cpu"]
    assert train_gpt_moe.main([*arguments, "--checkpoint_every", "100"]) == 1
    error = capsys.readouterr().err
    assert "stopped at step 10: 3 steps in a row without a finite loss and gradient" in error
    assert f"the last good checkpoint is {tmp_path / 'model_00008.pt'}" in error  # before the sick steps
    assert "parameters that are not finite: none" in error
    assert re.search(r"gradient is not finite: transformer\.wte\.weight, .* and \d+ more \(of \d+\)", error)
    assert "micro-step 0 is the first whose loss is not finite" in error
    place = re.search(r"batch: (\S+) at token (\d+), ", error)
    stream = np.array(read_shard(place[1]))[int(place[2]) :][:33]  # what rank 0 read first in step 10
    loader = DistributedDataLoader(os.path.join(data, "train_*.bin"), B=1, T=32, seed=1337)
    loader.load_state_dict({**loader.state_dict(), "position": 10 * 8})
    x, y = loader.next_batch()
    assert stream.tolist() == [*x[0].tolist(), y[0, -1].item()]
    assert (tmp_path / "model_00006.pt").read_bytes() == before
    monkeypatch.setattr(GPTLMHeadModel, "forward", forward)  # it was the machine: on another one it goes on
    assert train_gpt_moe.main([*arguments, "--max_bad_steps", "10", "--checkpoint_every", "3"]) == 0
    same_run(straight, tmp_path)


def test_weights_that_are_not_finite_are_named_and_never_saved(data, tmp_path, monkeypatch, capsys):
    forward = GPTLMHeadModel.forward

    def break_weights(self, *args, **kwargs):
        if self.training and kwargs.get("targets") is not None and next(count) == 6:
            self.transformer.h[1].mlp.experts.c_fc.data[0] = float("nan")
        return forward(self, *args, **kwargs)

    count = iter(range(10**6))
    monkeypatch.setattr(GPTLMHeadModel, "forward", break_weights)
    assert train_gpt_moe.main(flags(data, tmp_path, "--max_bad_steps", 4, "--checkpoint_every", 1)) == 1
    said = capsys.readouterr()
    assert "parameters that are not finite: transformer.h.1.mlp.experts.c_fc\n" in said.err
    assert "CHECKPOINT NOT WRITTEN: step 4 is not saved: model.transformer.h.1.mlp.experts.c_fc" in said.out
    assert ckpt.load_newest(tmp_path)[1]["step"] == 3
    assert (tmp_path / "latest").read_text() == "model_00003.pt"


def test_a_jump_of_the_loss_is_noticed_once_the_mean_is_known():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    falling = [4 + 3 * 0.98**step + 0.05 * z for step, z in enumerate(noise)]
    health = Health()
    assert not any(health.is_spike(loss) for loss in falling)
    copy = Health(health.state_dict())
    assert copy.is_spike(5.0) and health.is_spike(5.0) and vars(copy) == vars(health)
    assert not health.is_spike(4.0)
    assert not any(Health().is_spike(loss) for loss in (1.0, 100.0, 1.0))  # too early to tell


def test_a_jump_is_logged_and_nothing_else(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Health, "is_spike", lambda self, loss: True)
    assert train_gpt_moe.main(flags(data, tmp_path, "--max_steps", 3)) == 0
    assert all(record["spike"] for record in metrics(tmp_path)[:3])
    assert "step 2: the loss jumped to" in capsys.readouterr().out


# ---------------------------------------------------------------------------- errors in the middle of a run


def test_bad_data_in_the_middle_saves_first_and_goes_on_when_mended(straight, data, tmp_path, capsys):
    """A token beyond the vocabulary in the sample that begins step 7: exit code 2, and nothing is lost."""
    broken, log_dir = tmp_path / "data", tmp_path / "log"
    shutil.copytree(data, broken)
    loader = DistributedDataLoader(str(broken), B=4, T=32, seed=1337)
    path, offset = loader.locate(7 * 8 + 5)  # of the second micro-step
    content = bytearray(Path(path).read_bytes())
    good = bytes(content)
    at = 1024 + 2 * (offset + 3)
    content[at : at + 2] = b"\xff\xff"
    Path(path).write_bytes(content)
    assert train_gpt_moe.main(flags(broken, log_dir, "--checkpoint_every", 100)) == 2
    error = capsys.readouterr().err
    assert f"{path}: token 65535 at offset {offset + 3}" in error and len(error.splitlines()) == 1
    assert ckpt.load_newest(log_dir)[1]["step"] == 7
    Path(path).write_bytes(good)
    assert train_gpt_moe.main(flags(broken, log_dir, "--resume", "auto", "--checkpoint_every", 100)) == 0
    same_run(straight, log_dir)


def test_an_error_of_any_kind_loses_no_step(straight, data, tmp_path, monkeypatch):
    """A failing evaluation, here: the weights are saved as they were, and the error is not hidden."""
    validate, calls = evaluation.validate, []

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("something unforeseen")
        return validate(*args)

    monkeypatch.setattr(evaluation, "validate", fail_at_the_third)
    with pytest.raises(RuntimeError, match="something unforeseen"):
        train_gpt_moe.main(flags(data, tmp_path, "--checkpoint_every", 100))
    assert ckpt.load_newest(tmp_path)[1]["step"] == 8
    assert train_gpt_moe.main(flags(data, tmp_path, "--resume", "auto", "--checkpoint_every", 100)) == 0
    same_run(straight, tmp_path)


def test_an_error_between_update_and_next_step_saves_no_mixture(straight, data, tmp_path, monkeypatch):
    """Then the weights are those of the next step already, but its log line is not written."""
    step = RunLog.step

    def fail_at_five(self, record):
        if record["step"] == 5:
            raise RuntimeError("something unforeseen")
        step(self, record)

    monkeypatch.setattr(RunLog, "step", fail_at_five)
    with pytest.raises(RuntimeError, match="something unforeseen"):
        train_gpt_moe.main(flags(data, tmp_path))
    assert ckpt.load_newest(tmp_path)[1]["step"] == 3
    monkeypatch.undo()
    assert train_gpt_moe.main(flags(data, tmp_path, "--resume", "auto")) == 0
    same_run(straight, tmp_path)


def test_out_of_memory_names_what_to_lower(data, tmp_path, monkeypatch, capsys):
    forward, count = GPTLMHeadModel.forward, iter(range(100))

    def full(self, *args, **kwargs):
        if self.training and next(count) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPTLMHeadModel, "forward", full)
    assert train_gpt_moe.main(flags(data, tmp_path)) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Tried to allocate 20.00 GiB" in error
    assert "out of memory with B=4, T=32, n_layer=2: lower --B" in error
    assert "--T" in error and "--n_embd" in error
    assert ckpt.load_newest(tmp_path)[1]["step"] == 2


def test_a_full_disk_does_not_end_a_run_but_its_exit_code_says_so(straight, data, tmp_path, capsys):
    """No checkpoint fits (their size is 1.1 MB); the logs do. Later there is room, and nothing is missing."""
    with full_disk(500_000):
        assert train_gpt_moe.main(flags(data, tmp_path, "--save_retry_s", 0.01)) == 1
    said = capsys.readouterr()
    problem = "CHECKPOINT NOT WRITTEN: [Errno 27] File too large. Training continues; newest: none yet"
    assert said.out.count(problem) >= 4 + 10
    assert said.out.count(f"the run is lost without it: free space in {tmp_path}; next try in 0 s") == 10
    assert "some files could not be written" in said.err and "Traceback" not in said.err
    assert (tmp_path / "log.txt").read_bytes() == (straight / "log.txt").read_bytes()
    assert not list(tmp_path.glob("*model*"))
    assert train_gpt_moe.main(flags(data, tmp_path, "--resume", "auto")) == 0
    same_run(straight, tmp_path)


# ---------------------------------------------------------------------------- bad settings


SETTINGS = {
    # flags: what the error names
    "--max_stepz 5": "--max_stepz.*did you mean --max_steps",
    "--B": "--B.*expected one argument",
    "--B eight": "--B.*invalid int value: 'eight'",
    "--max_lr fast": "--max_lr.*invalid float value: 'fast'",
    "--use_moe perhaps": "--use_moe.*perhaps",
    "5": "'5' is no flag",
    "--preset huge": "preset='huge': choose one of .*demo",
    "--n_embd 33": "n_embd=33.*n_head=2",
    "--num_experts_per_tok 5": "num_experts_per_tok=5.*num_experts=4",
    "--warmup_steps 12": "warmup_steps=12.*max_steps=12.*--warmup_steps",
    "--learning_rate_decay_frac 1.5": "learning_rate_decay_frac=1.5: must be at most 1",
    "--learning_rate_decay_frac -0.5": "learning_rate_decay_frac=-0.5",
    "--hellaswag_limit -5": "hellaswag_limit=-5: must be at least 0",
    "--plot_every -1": "plot_every=-1: must be at least 0",
    "--write_tensors 1 --use_moe 0 --parallel fsdp": "write_tensors=True.*parallel=fsdp",
    "--write_tensors 1": "write_tensors=True.*use_moe=True.*--use_moe False",
    "--write_tensors 1 --use_moe 0 --bias 0": "write_tensors=True: .*bias=False.*--write_tensors 0",
    "--T 64 --block_size 32": "T=64.*block_size=32",
    "--B 3": r"total_batch_size=256.*3 \* 32 \* 1 = 96.*nearest.*288",
    "--B 0": "B=0: must be at least 1",
    "--max_steps -1": "max_steps=-1: must be at least 0",
    "--max_lr nan": "max_lr=nan",
    "--min_lr 1": "min_lr=1.0 is more than max_lr=0.003",
    "--max_bad_steps 0": "max_bad_steps=0: must be at least 1",
    "--keep_last -1": "keep_last=-1: must be at least 0",
    "--dropout 1.5": "dropout=1.5",
    "--activation tanh": "activation='tanh': choose one of gelu, relu2, swiglu",
    "--moe_loss_type none": "moe_loss_type='none': choose one of load_balancing",
    "--position rope --n_embd 34": "n_embd=34",
    "--n_kv_head 3": "n_head=2.*n_kv_head=3",
    "--vocab_size 200": "vocab_size=200.*257",
    "--optimizer sgd": "optimizer='sgd': choose one of",
    "--dtype int8": "dtype='int8': choose one of",
    "--device quantum": "device='quantum'",
    "--device cuda": "device='cuda'.*--device cpu",
    "--parallel magic": "parallel='magic': choose one of",
    "--init_from nowhere/model_00001.pt": "nowhere/model_00001.pt: no such checkpoint",
    "--resume nowhere/model_00001.pt": "nowhere/model_00001.pt: no such checkpoint",
    "--data_dir nowhere": "nowhere.*fineweb.py",
    "--input_bin nowhere/*.bin": "nowhere",
    "--log_dir FILE": "log_dir=.*cannot write there.*--log_dir",
    "--log_dir FILE/below": "log_dir=.*cannot write there.*--log_dir",
    "--data_dir NO_VALIDATION": "no val shard.*NO_VALIDATION.*fineweb.py",
    "--data_dir EMPTY": "EMPTY.*fineweb.py",
    "--data_dir TOO_SHORT": "too little data.*TOO_SHORT",
    "--data_dir TEXT": "TEXT.*is text.*fineweb.py --source",
    "--init_from FOREIGN.pt": "FOREIGN.pt: not a checkpoint",
    "--init_from SPEAKS_GPT2.pt": "encoding='gpt2' in init_from=.*'bytes' in the data.*--encoding gpt2",
}


@pytest.fixture(scope="module")
def places(data, tmp_path_factory) -> Path:
    """A folder with the bad files and folders that SETTINGS names in capitals."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "FILE").write_text("a file")
    (folder / "FOREIGN.pt").write_text("not a checkpoint")
    (folder / "EMPTY").mkdir()
    for name in ("NO_VALIDATION", "TOO_SHORT", "TEXT"):
        shutil.copytree(data, folder / name)
    (folder / "NO_VALIDATION" / "val_000000.bin").unlink()
    write_shard(folder / "TOO_SHORT" / "train_000000.bin", np.arange(20, dtype=np.uint16))
    (folder / "TEXT" / "train_000000.bin").write_text("Call me Ishmael. " * 100)
    model = dense_model(vocab_size=384, block_size=32)
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 0}
    ckpt.save_checkpoint(state, folder)
    (folder / "model_00000.pt").rename(folder / "SPEAKS_GPT2.pt")
    return folder


@pytest.mark.parametrize("arguments", SETTINGS)
def test_bad_settings(arguments, data, places, tmp_path, capsys):
    """Exit code 2 and one line that names cause and cure; nothing is trained, nothing written."""
    words = [re.sub(r"^[A-Z_]{4,}\d?", lambda m: str(places / m[0]), word) for word in arguments.split()]
    common = flags(data, tmp_path / "log")
    if "--init_from" in arguments:  # whose architecture may not be contradicted
        common = f"--total_batch_size 256 --B 4 --T 16 --device cpu --data_dir {data}".split()
        common += ["--log_dir", str(tmp_path / "log")]
    before = sorted(places.rglob("*"))
    assert train_gpt_moe.main([*common, *words]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "Traceback" not in said.err
    assert re.search(SETTINGS[arguments], said.err), said.err
    assert "step" not in said.out and sorted(places.rglob("*")) == before and not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "not LOCAL_RANK, WORLD_SIZE"),
        (dict(RANK="2", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"), "RANK=2"),
    ],
)
def test_a_wrong_world(environment, message, data, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train_gpt_moe.main(flags(data, tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_permission(straight, data, tmp_path, monkeypatch, capsys):
    """Root may write anywhere, and so becomes nobody; who may not pass through the folders above, either, nor
    import what no run before (`straight`) has imported."""
    shutil.copytree(data, tmp_path / "data")
    folders, user = (tmp_path, tmp_path / "data"), os.geteuid()
    for path in (*folders, *folders[1].iterdir()):
        path.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    try:
        if user == 0:
            os.seteuid(65534)
        assert train_gpt_moe.main(flags("data", "log")) == 2
    finally:
        os.seteuid(user)
        for folder in folders:
            folder.chmod(0o755)
    assert re.search("cannot write there: Permission denied.*--log_dir", capsys.readouterr().err)


def test_two_ranks_complain_once(data, tmp_path):
    """The launcher ends the second rank before it repeats what the first has said; here the test does it."""
    output = tmp_path / "out.txt"
    wrong = flags(data, tmp_path / "log", "--num_experts_per_tok", 9)
    ranks = start_ranks(2, wrong, output, script="test_faults")
    wait_for_text(output, "num_experts_per_tok=9")
    ranks[1].terminate()
    assert finish(ranks[0]) == 2
    assert finish(ranks[1]) == -signal.SIGTERM
    assert output.read_text().count("num_experts_per_tok=9 is more than num_experts=4") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2), (FileNotFoundError(2, "x"), 2), (PermissionError(13, "x"), 2),
        (OSError(30, "read-only"), 2), (OSError(28, "No space left on device"), 1), (OSError(5, "I/O"), 1),
        (faults.DataError("x"), 2),
    ],
)  # fmt: skip
def test_exit_codes(error, code, capsys):
    assert faults.report(error) == code
    assert capsys.readouterr().err.startswith("train_gpt_moe.py: ")


def test_the_log_names_no_environment(straight):
    """conftest.py sets HF_TOKEN for this run."""
    files = [path for path in straight.parent.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"hf_secret_value" in path.read_bytes() for path in files)


# ---------------------------------------------------------------------------- security


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_no_code_that_could_run_what_a_file_says(path):
    """No eval, exec, pickle, shell or plain http; torch.load only with weights_only=True."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            assert not {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"} & set(names), node.lineno
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"http://(?!localhost)", node.value), node.value
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), node.lineno
        assert keywords.get("shell") != "True" and keywords.get("allow_pickle") != "True", node.lineno
        assert keywords.get("trust_remote_code") != "True", node.lineno
        assert name != "torch.load" or keywords.get("weights_only") == "True", node.lineno
        assert "object" not in name or "dist." not in name, f"line {node.lineno} pickles between processes"
