"""What becomes of signals, bad steps, full disks, bad data and other errors in the middle of a run."""

import ast
import functools
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import note_reads, refuses
from models import make_examples
from processes import at_call, equal, flags, full_disk, metrics, newest, poisoned, same_run, steps_saved
from test_layout import NAMES, parsed
from torch._dynamo.exc import TorchDynamoException

import hellaswag
import train_gpt_moe
from model import GPTLMHeadModel
from tokens.shards import DistributedDataLoader
from training import checkpoints as ckpt
from training import evaluation, faults
from training.checkpoint_writer import CheckpointWriter
from training.faults import Health, Signals
from training.log import RunLog
from training.schema import check_checkpoint


# ---------------------------------------------------------------------------- signals
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


@pytest.mark.parametrize(("name", "at", "batches", "saved"), [
    ("SIGTERM", 10, 11, [4, 3]), ("SIGUSR1", 10, 33, [12, 9, 6, 4, 3]),
    pytest.param("SIGTERM", 30, 31, [12, 9, 6, 3], marks=pytest.mark.slow),
])  # fmt: skip
def test_a_signal_ends_an_evaluation(straight, data, tmp_path, monkeypatch, capfd, name, at, batches, saved):
    """Each evaluation and each step has two batches; batch 10, counted from 0, begins the evaluation before
    step 4, batch 30 the one after the last step. The run does not finish that evaluation, but saves. SIGTERM
    ends the run, which evaluates after its resume; SIGUSR1 does not, so the run evaluates anew."""
    told = lambda *_: os.kill(os.getpid(), getattr(signal, name))  # noqa: E731
    calls = at_call(monkeypatch, faults, "next_batch", [at], told)
    stops = name == "SIGTERM"
    assert train_gpt_moe.main(flags(data, tmp_path)) == (143 if stops else 0)
    said, last = capfd.readouterr(), saved[0]
    assert len(calls) == batches and steps_saved(tmp_path) == saved and newest(tmp_path) == last - 1
    assert f"{name}: finishing this step, then saving{' and stopping' * stops}\n" in said.err
    assert (f"stopped before step {last}; the newest checkpoint is {tmp_path}/model_" in said.out) == stops
    if stops:
        assert f"continue with: python train_gpt_moe.py --log_dir {tmp_path} --resume auto" in said.out
        assert train_gpt_moe.main(flags(data, tmp_path, "--resume", "auto")) == 0
    same_run(straight, tmp_path)


def test_hellaswag_gives_way_to_a_signal_and_is_done_after_the_resume(data, tmp_path, monkeypatch, capsys):
    """SIGTERM at its second batch, after the last step: the run saves, stops, and asks everything later."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(example) for example in make_examples(10)))
    monkeypatch.setattr(hellaswag, "TOKENS_PER_BATCH", {"cpu": 128})
    told = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    batches = at_call(monkeypatch, hellaswag, "scored_logits", [1], told)
    more = ["--max_steps", 3, "--infer_step", 0, "--hellaswag", 1, "--hellaswag_data", questions]
    assert train_gpt_moe.main(flags(data, tmp_path, *more)) == 143
    assert len(batches) == 2 and steps_saved(tmp_path) == [3]
    assert train_gpt_moe.main(flags(data, tmp_path, *more, "--resume", "auto")) == 0
    assert len(batches) > 4 and "of 10 questions" in capsys.readouterr().out
    assert [record["step"] for record in metrics(tmp_path) if "hella_acc" in record] == [2]
    assert (tmp_path / "log.txt").read_text().count("3 val ") == 1


# ---------------------------------------------------------------------------- bad steps
def test_a_bad_step_changes_nothing_but_the_place_in_the_data(data, tmp_path, monkeypatch, capsys):
    """Steps 4 and 5 meet NaN (two micro-steps each). The run goes on as if it had only skipped their data."""
    monkeypatch.setattr(GPTLMHeadModel, "forward", poisoned(GPTLMHeadModel.forward, {8: -1, 11: -1}))
    assert train_gpt_moe.main(flags(data, tmp_path, "--max_steps", 8, "--checkpoint_every", 2)) == 0
    records = metrics(tmp_path)
    assert [record["step"] for record in records if record.get("skipped")] == [4, 5]
    assert [record["loss"] for record in records[4:6]] == [None, None] and records[6]["loss"] < 6
    assert [record.get("bad_steps") for record in records[3:7]] == [0, 1, 2, 2]
    assert "expert_load" not in records[4] and "expert_load" in records[6]
    assert {"4 train nan", "5 train nan"} <= set((tmp_path / "log.txt").read_text().splitlines())
    assert capsys.readouterr().out.count("WARNING: no update: loss nan, norm nan") == 2
    before, after, end = (ckpt.load_checkpoint(tmp_path / f"model_0000{step}.pt") for step in (4, 6, 8))
    assert equal(before["model"], after["model"]) and equal(before["optimizer"], after["optimizer"])
    assert after["loader"]["position"] - before["loader"]["position"] == 2 * 256 // 32
    assert (after["health"]["bad_steps"], after["health"]["in_a_row"]) == (2, 2)
    assert end["health"]["in_a_row"] == 0 and not equal(after["model"], end["model"])
    monkeypatch.setattr(GPTLMHeadModel, "forward", poisoned(GPTLMHeadModel.forward, {0: -1}))
    again = ["--resume", str(tmp_path / "model_00006.pt"), "--device", "cpu", "--max_bad_steps", "3"]
    assert train_gpt_moe.main(again) == 1  # a run that resumes after two bad steps meets a third
    assert "stopped at step 6: 3 steps in a row" in capsys.readouterr().err


def test_too_many_bad_steps_end_the_run_with_a_diagnosis(straight, data, tmp_path, monkeypatch, capsys):
    log_dir = tmp_path / "log"
    shutil.copytree(straight, log_dir, ignore=shutil.ignore_patterns("model_00009.pt", "model_00012.pt"))
    forward, before = GPTLMHeadModel.forward, (log_dir / "model_00006.pt").read_bytes()
    sick = poisoned(forward, {4: -1, 6: -1, 7: -1, 8: -1})  # in micro-steps of the steps 8, 9, 9, 10
    monkeypatch.setattr(GPTLMHeadModel, "forward", sick)
    arguments = ["--resume", "auto", "--log_dir", str(log_dir), "--max_bad_steps", "3", "--device", "cpu"]
    assert train_gpt_moe.main([*arguments, "--checkpoint_every", "100"]) == 1
    error = capsys.readouterr().err
    assert "stopped at step 10: 3 steps in a row" in error
    assert f"newest checkpoint is {log_dir / 'model_00008.pt'}" in error  # before the bad steps
    assert "parameters that are not finite: none" in error
    assert re.search(r"gradient is not finite: transformer\.wte\.weight, .* and \d+ more \(of \d+\)", error)
    assert "micro-step 0 is the first whose loss is not finite" in error
    first = DistributedDataLoader(data, B=1, T=32, seed=1337).locate(10 * 8)  # row of step 10
    assert "batch: {} at token {}, ".format(*first) in error
    assert (log_dir / "model_00006.pt").read_bytes() == before
    monkeypatch.setattr(GPTLMHeadModel, "forward", forward)  # it was the machine: on another one it goes on
    assert train_gpt_moe.main([*arguments, "--max_bad_steps", "10", "--checkpoint_every", "3"]) == 0
    same_run(straight, log_dir)


def test_weights_that_are_not_finite_are_named_and_never_saved(data, tmp_path, monkeypatch, capsys):
    """The evaluation before step 4 logs its loss as nan, and has no sample."""
    broken = lambda model, *args: model.transformer.h[0].mlp.experts.c_fc.data[0].fill_(float("nan"))  # noqa: E731
    at_call(monkeypatch, GPTLMHeadModel, "forward", [10], broken)  # in step 3
    more = ["--max_bad_steps", 2, "--checkpoint_every", 1, "--sample_every", -1, "--sample_tokens", 2]
    assert train_gpt_moe.main(flags(data, tmp_path, *more)) == 1
    said = capsys.readouterr()
    assert "parameters that are not finite: transformer.h.0.mlp.experts.c_fc\n" in said.err
    assert "CHECKPOINT NOT WRITTEN: step 4 is not saved" in said.out
    assert "model.transformer.h.0.mlp.experts.c_fc" in said.out and "--max_lr" in said.out
    assert "step 4: no sample: the model's logits are NaN" in said.out
    assert "4 val nan\n" in (tmp_path / "log.txt").read_text()
    assert steps_saved(tmp_path) == [3, 2, 1] and (tmp_path / "latest").read_text() == "model_00003.pt"


def test_float16_looks_for_its_scale_without_ending_the_run(data, tmp_path, monkeypatch, capsys):
    """Gradients times 2^40 overflow, in more than max_bad_steps steps until the scale is small enough."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr("training.setup.torch.amp.GradScaler", scaler)
    words = flags(data, tmp_path, "--dtype", "float16", "--max_bad_steps", 3, "--max_steps", 40)
    assert train_gpt_moe.main([*words, "--total_batch_size", "128", "--infer_step", "0"]) == 0
    records, said = metrics(tmp_path), capsys.readouterr().out
    halved = [record["step"] for record in records if record.get("skipped") == "scale"]
    assert 3 < len(halved) < 30 and halved == list(range(len(halved)))  # and then it has been found
    assert said.count("loss scale was too large") == len(halved) and "WARNING" not in said
    assert (records[-1]["scale_steps"], records[-1]["bad_steps"]) == (len(halved), 0)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    saved = ckpt.load_checkpoint(tmp_path / "latest")
    assert saved["health"].pop("scale_steps") == len(halved) and saved["scaler"]["scale"] < 2**37
    check_checkpoint(saved)  # as older versions wrote it
    health, inf = Health(), float("inf")
    for *values, expected in ((4, inf, 2, "scale"), (4, inf, 1, "bad"), (inf, inf, 9, "bad"), (4, 1, 9, "")):
        assert health.skips(*values) == expected, values


def test_a_step_waits_for_the_device_once(data, tmp_path, monkeypatch):
    """Reads in the files of the loop; expert 3 gets no rows."""
    reads, begun = note_reads(monkeypatch, r"training/(?!log)|_gpt_moe|mixture_of"), []
    at_call(monkeypatch, train_gpt_moe, "train_step", range(99), lambda *_: begun.append(len(reads)))
    idle = lambda model, *_: [moe.router_bias[3].fill_(-100) for moe in model.moe_layers()]  # noqa: E731
    at_call(monkeypatch, GPTLMHeadModel, "forward", range(99), idle)
    assert train_gpt_moe.main(flags(data, tmp_path, "--infer_step", 0, "--checkpoint_every", 0)) == 0
    assert all(record["starved"] >= 0.25 for record in metrics(tmp_path))
    assert {end - begin for begin, end in itertools.pairwise(begun)} == {1}, reads


def test_a_jump_of_the_loss_is_noticed_once_the_mean_is_known():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    falling = [4 + 3 * 0.98**step + 0.05 * z for step, z in enumerate(noise)]
    health = Health()
    assert not any(health.is_spike(loss) for loss in falling)
    copy = Health(dict(vars(health)))
    assert copy.is_spike(5.0) and health.is_spike(5.0) and vars(copy) == vars(health)
    assert not health.is_spike(4.0)
    assert not any(Health().is_spike(loss) for loss in (1.0, 100.0, 1.0))  # too early to tell


# ---------------------------------------------------------------------------- errors in the middle of a run
@pytest.mark.parametrize("cut", [False, True])
def test_bad_data_in_the_middle_saves_first_and_goes_on_when_mended(
    straight, data, tmp_path, monkeypatch, refused, cut
):
    """A token that is not in the vocabulary, or a shard that becomes shorter while the run reads it."""
    broken, log_dir = tmp_path / "data", tmp_path / "log"
    shutil.copytree(data, broken)
    loader = DistributedDataLoader(str(broken), B=4, T=32, seed=1337)
    path, offset = loader.locate(7 * 8 + 5)  # of the second micro-step
    good = Path(path).read_bytes()
    at = 1024 + 2 * (offset + 3)
    if cut:
        at_call(monkeypatch, train_gpt_moe, "train_step", [3], lambda *_: os.truncate(path, 2000))
    else:
        Path(path).write_bytes(good[:at] + b"\xff\xff" + good[at + 2 :])
    words = flags(broken, log_dir, "--checkpoint_every", 100)
    line = refused(train_gpt_moe.main, *words)
    problem = "no token at offset " if cut else f"token 65535 at offset {offset + 3}"
    assert f"{path}: {problem}" in line and "Repair the data" in line
    (saved,) = steps_saved(log_dir)
    assert 3 <= saved <= 5 if cut else saved == 7  # batches that were ready before the cut are good
    Path(path).write_bytes(good)
    assert train_gpt_moe.main([*words, "--resume", "auto"]) == 0
    same_run(straight, log_dir)


@pytest.mark.parametrize(("owner", "name", "call", "more", "step"), [
    (evaluation, "validate", 1, ["--infer_step", 6, "--checkpoint_every", 100], 6),
    (RunLog, "step", 4, [], 3),  # after an update, whose log line is not written
], ids=["evaluation", "log"])  # fmt: skip
def test_an_error_loses_no_step_and_saves_no_mixture(
    straight, data, tmp_path, monkeypatch, owner, name, call, more, step
):
    at_call(monkeypatch, owner, name, [call], Mock(side_effect=RuntimeError("something unforeseen")))
    refuses("something unforeseen", train_gpt_moe.main, flags(data, tmp_path, *more), error=RuntimeError)
    assert steps_saved(tmp_path) == [step]
    saved, expected = (ckpt.load_checkpoint(path / f"model_0000{step}.pt") for path in (tmp_path, straight))
    for entry in ("model", "optimizer", "loader", "health", "rng"):
        assert equal(saved[entry], expected[entry]), entry


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0")
CXX_ERROR = "C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.cpp:1: fatal error: omp.h: no such file\n"


@pytest.mark.parametrize(("error", "call", "saved", "words"), [
    (FULL, 7, [2], ["B=4, T=32, n_layer=2", "--B", "--T", "--n_layer", "--n_embd", "allocate 20.00 GiB"]),
    (TorchDynamoException(CXX_ERROR), 0, [], ["a.cpp:1: fatal error: omp.h", "--use_compile False\n"]),
], ids=["memory", "compiler"])  # fmt: skip
def test_a_lack_of_memory_or_of_a_compiler_names_what_helps(error, call, saved, words, data, tmp_path,
                                                            monkeypatch, capsys):  # fmt: skip
    at_call(monkeypatch, GPTLMHeadModel, "forward", [call], Mock(side_effect=error))
    assert train_gpt_moe.main(flags(data, tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert steps_saved(tmp_path) == saved


def test_a_save_that_failed_is_tried_again(straight, data, tmp_path, monkeypatch, capsys):
    """A disk that is full for a while: when the run saves before step 6, and in the end, after step 12."""
    at_call(monkeypatch, ckpt, "save_checkpoint", [0, 2, 3], Mock(side_effect=OSError(28, "full")))
    wants_retry = CheckpointWriter.wants_retry  # here after the save has ended, however slow its thread is
    monkeypatch.setattr(CheckpointWriter, "wants_retry", lambda self: (self.wait(), wants_retry(self))[1])
    assert train_gpt_moe.main(flags(data, tmp_path, "--checkpoint_every", 6, "--save_retry_s", 0)) == 0
    said = capsys.readouterr()
    assert said.out.count("CHECKPOINT NOT WRITTEN: [Errno 28]") == 3 and not said.err
    assert steps_saved(tmp_path) == [12, 7]
    same_run(straight, tmp_path)


def test_a_full_disk_does_not_end_a_run_but_its_exit_code_says_so(data, tmp_path, capsys):
    """No checkpoint fits (its size is 1.1 MB); the logs do. After the last step there are ten more tries."""
    words = flags(data, tmp_path, "--max_steps", 3, "--checkpoint_every", 1, "--save_retry_s", 0.01)
    with full_disk(500_000):
        assert train_gpt_moe.main(words) == 1
    said = capsys.readouterr()
    assert said.out.count("CHECKPOINT NOT WRITTEN: [Errno 27] File too large") >= 3 + 10
    assert said.out.count(f"free space in {tmp_path}; next try in 0 s") == 10
    assert "the newest checkpoint is none" in said.err and "Traceback" not in said.err
    assert newest(tmp_path) == 2 and not list(tmp_path.glob("*model*"))


def test_what_cannot_be_sampled_a_jump_and_an_unnamed_best_step_do_not_end_a_run(
    data, tmp_path, monkeypatch, capsys
):
    """The prompt has no tokens, the loss jumps, and the disk is full where the best step is named."""
    no_network = Mock(side_effect=ConnectionError("tiktoken cannot fetch the files of gpt2"))
    at_call(monkeypatch, evaluation, "encode_prompt", [0], no_network)
    monkeypatch.setattr(Health, "is_spike", lambda self, loss: True)
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("training.checkpoint_writer.write_atomically", full)
    more = ["--max_steps", 1, "--warmup_steps", 0, "--sample_every", 1, "--keep_best", True]
    assert train_gpt_moe.main(flags(data, tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert f"step 1: WARNING: {tmp_path}/best does not name this step: [Errno 28]" in said
    assert steps_saved(tmp_path) == [1]
    assert "no samples in this run: tiktoken cannot fetch the files of gpt2" in said
    assert ": sample\n" not in said
    assert metrics(tmp_path)[0]["spike"] and "step 0: the loss jumped to" in said


def test_exit_codes(monkeypatch, capsys):
    settings = ValueError("x"), FileNotFoundError(2, "x"), PermissionError(13, "x"), OSError(30, "read-only")
    failures = OSError(28, "No space left on device"), OSError(5, "I/O")
    for code, errors in (2, (*settings, faults.DataError("x"))), (1, failures):
        for error in errors:
            assert faults.report(error) == code, error
            assert capsys.readouterr().err.startswith("train_gpt_moe.py: error: ")
    monkeypatch.setattr(train_gpt_moe, "set_up", Mock(side_effect=KeyboardInterrupt))
    assert train_gpt_moe.main(["--device", "cpu"]) == 130


# ---------------------------------------------------------------------------- security
def test_the_log_names_no_environment(straight):
    """conftest.py sets HF_TOKEN for this run."""
    files = [path for path in straight.parent.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"hf_secret_value" in path.read_bytes() for path in files)


def test_no_code_that_could_run_what_a_file_says():
    """No eval, exec, pickle, shell or plain http; torch.load only with weights_only=True."""
    nodes = [(name, node) for name in NAMES for node in ast.walk(parsed(name))]
    for name, node in nodes:
        where = f"{name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            wrong = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"} & set(names)
            assert not wrong or name == "tokens/nanogpt_data.py", where  # it refuses all names
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"http://(?!localhost)", node.value), where
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), where
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), where
        assert keywords.get("shell") != "True" and keywords.get("allow_pickle") != "True", where
        assert keywords.get("trust_remote_code") != "True", where
        assert called != "torch.load" or keywords.get("weights_only") == "True", where
        between_ranks = called.startswith("dist.") and "object" in called  # pickles; SECURITY.md says where
        assert not between_ranks or name == "training/sharded.py", where
