"""Flags with values that no run can have: one line names the field and the value, and nothing is written.

Run: python -m pytest tests/training/test_flags.py
"""

import os

import pytest
import torch
from models import make_examples, tiny
from processes import flags, full_disk

import hellaswag
import train_gpt_moe
from model import GPTLMHeadModel
from tokens import shards
from tokens.hellaswag_files import HellaSwagUnavailable, iterate_examples
from training.checkpoint_writer import CheckpointWriter

LONG = "x" * 5000
BAD = {  # flag: value, what the error names, exit code
    "beta1": ("inf", "beta1=inf: must be a finite number", 2),
    "beta2": ("1", "beta2=1.0: must be below 1", 2),
    "save_retry_s": ("nan", "save_retry_s=nan: must be a finite number", 2),
    "router_lr_mult": ("1e999", "router_lr_mult=inf: must be a finite number", 2),
    "rope_theta": ("inf", "rope_theta=inf: must be a finite number", 2),
    "max_steps": (2**70, "max_steps=118059162", 2),
    "seed": (2**63, "seed=9223372036854775808: it is too large", 2),
    "keep_every": ("9" * 5000, "invalid int value", 2),
    "n_layer": (2**40, "n_layer=1099511627776: must be at most 10000", 2),
    "n_embd": (2**50, "out of memory with B=4, T=32, n_layer=2", 1),
    "vocab_size": (2**58, "out of memory", 1),
    "prompt": ("caf\udce9", r"prompt='caf\udce9': must be text in UTF-8", 2),
    "data_dir": ("a\udce9" * 999, r"data_dir='a\udce9", 2),
    "resume": (f"{LONG}.pt", "File name too long", 2),
    "input_bin": (LONG, "no data: xxx", 2),
    "log_dir": (LONG, "log_dir=xxx", 2),
}
PLACES = {  # flag: where it points to, what the error names
    "init_from": {
        "/nope": "/nope: no such file or folder (`ls -d log/model_*`", "../a/b": "../a/b: no such file",
        "nope": "nor a model that can be downloaded", "PIPE": "it is no ordinary file",
        "/dev/zero": "/dev/zero: it is no ordinary file", LONG: "File name too long",
    },
    "resume": {"PIPE": "no ordinary file", "/dev/zero": "no ordinary file"},
    "input_bin": {"PIPE": "no data: ", "/dev/zero": "no data: /dev/zero is neither a folder nor a file"},
    "log_dir": {"": "log_dir=''", " ": "log_dir=''", "PIPE": "cannot write there"},
}  # fmt: skip


def refusal(arguments: list, capsys) -> tuple[int, str]:
    """The exit code, and the only line on stderr, which is of bounded length."""
    code = train_gpt_moe.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and len(error) < 2100
    return code, error


@pytest.mark.parametrize("name", BAD)
def test_values(name, data, tmp_path, capsys):
    value, message, expected = BAD[name]
    code, error = refusal(flags(data, tmp_path / "log", f"--{name}", value), capsys)
    assert message in error and code == expected and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "where"), [(name, where) for name in PLACES for where in PLACES[name]])
def test_places(name, where, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("PIPE")
    common = flags(data, "log")
    if name == "init_from":  # whose architecture no flag may contradict
        common = f"--total_batch_size 256 --B 4 --T 16 --device cpu --data_dir {data} --log_dir log".split()
    code, error = refusal([*common, f"--{name}", where], capsys)
    assert PLACES[name][where] in error and code == 2 and [*tmp_path.iterdir()] == [tmp_path / "PIPE"]
    assert not any(jargon in error for jargon in ("repo_type", "revision", "Traceback"))


def test_pipes_among_the_data_are_not_read(tmp_path, capsys):
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(ValueError, match=r"meta.json is damaged .*no ordinary file"):
        shards.read_meta(tmp_path)
    for questions in (tmp_path / "meta.json", "/dev/zero"):
        with pytest.raises(HellaSwagUnavailable, match="it is no ordinary file"):
            next(iterate_examples(data=questions))


def test_a_model_that_gives_nan_gets_no_accuracy(monkeypatch, tmp_path):
    question = hellaswag.build_question(make_examples(1)[0], "bytes", "completion", 24)
    monkeypatch.setattr(hellaswag, "load_on_all_ranks", lambda *rest: [question])
    monkeypatch.setattr(hellaswag, "score_batched", lambda *rest: torch.full((1, 4), torch.nan))
    with pytest.raises(FloatingPointError):
        hellaswag.evaluate(GPTLMHeadModel(tiny()), tmp_path, encoding="bytes")


@pytest.mark.parametrize(
    ("full", "advice"), [(True, "free space in"), (False, "a folder that can be written")]
)
def test_the_advice_after_a_failed_save_fits_its_cause(full, advice, tmp_path):
    said = []
    with full_disk(100 if full else 10**9):
        writer = CheckpointWriter(tmp_path / ("." if full else "gone"), say=said.append, retry_s=0)
        writer.save({"step": 1, "model": {"w": torch.zeros(99)}})
        assert writer.wants_last_retry(stop=False)
    assert advice in said[-1]
