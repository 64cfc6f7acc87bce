"""Settings: what follows from other settings, and what a run refuses before it writes anything.

Run: python -m pytest tests/training/test_setup.py
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import dense_model
from processes import flags

import train_gpt_moe
from tokens.shards import write_shard
from train_gpt_moe import TrainConfig, parse_config
from training import checkpoints as ckpt
from training import parallel
from training.setup import check_config

ALONE = parallel.World(0, 0, 1, torch.device("cpu"))

# ---------------------------------------------------------------------------- refused

REFUSED = {
    # flags: what the error names (field and value, and the flag or program that mends it)
    "--max_stepz 5": "--max_stepz.*--max_steps", "--B": "--B.*argument", "--B eight": "--B.*'eight'",
    "--use_moe perhaps": "--use_moe.*perhaps", "5": "'5'", "--preset huge": "preset='huge'.*demo",
    "--B 0": "B=0.* 1", "--max_steps -1": "max_steps=-1.* 0", "--max_bad_steps 0": "max_bad_steps=0.* 1",
    "--hellaswag_limit -5": "hellaswag_limit=-5.* 0", "--plot_every -1": "plot_every=-1.* 0",
    "--keep_last -1": "keep_last=-1.* 0", "--max_lr nan": "max_lr=nan", "--max_lr fast": "--max_lr.*'fast'",
    "--learning_rate_decay_frac 1.5": "learning_rate_decay_frac=1.5.* 1",
    "--learning_rate_decay_frac -0.5": "learning_rate_decay_frac=-0.5",
    "--min_lr 1": "min_lr=1.0.*max_lr=0.003", "--n_embd 33": "n_embd=33.*n_head=2",
    "--T 64 --block_size 32": "T=64.*block_size=32", "--vocab_size 200": "vocab_size=200.*257",
    "--optimizer sgd": "optimizer='sgd'.*adamw", "--dtype int8": "dtype='int8'.*float32",
    "--device quantum": "device='quantum'", "--device cuda:99": "cuda:99.*--device cpu|GPU 99",
    "--write_tensors 1": "write_tensors=True.*use_moe=True.*--use_moe False",
    "--write_tensors 1 --use_moe 0 --parallel fsdp": "write_tensors=True.*parallel=fsdp",
    "--write_tensors 1 --use_moe 0 --bias 0": "write_tensors=True.*bias=False.*--write_tensors 0",
    "--data_dir nowhere": "nowhere.*fineweb.py", "--input_bin nowhere/*.bin": "nowhere",
    "--data_dir NO_VALIDATION": "no val shard.*NO_VALIDATION.*fineweb.py",
    "--data_dir EMPTY": "EMPTY.*fineweb.py", "--data_dir TEXT": "TEXT.*is text.*fineweb.py --source",
    "--data_dir TOO_SHORT": "too little data.*TOO_SHORT",
    "--log_dir FILE": "log_dir=.*cannot write there.*--log_dir",
    "--log_dir LOCKED": "log_dir=.*cannot write there.*--log_dir",
    "--log_dir FILE/below": "log_dir=.*cannot write there.*--log_dir",
    "--init_from nowhere/model_00001.pt": "nowhere/model_00001.pt: no such checkpoint",
    "--init_from FOREIGN.pt": "FOREIGN.pt: not a checkpoint",
    "--init_from SPEAKS_GPT2.pt": "encoding='gpt2' in init_from=.*'bytes' in the data.*--encoding gpt2",
}  # fmt: skip


@pytest.fixture(scope="module")
def places(data, tmp_path_factory) -> Path:
    """A folder with the bad files and folders that REFUSED names in capitals."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "FILE").write_text("a file")
    (folder / "FOREIGN.pt").write_text("not a checkpoint")
    (folder / "EMPTY").mkdir()
    (folder / "LOCKED" / ".lock").mkdir(parents=True)  # a file of that name cannot be opened
    for name in ("NO_VALIDATION", "TOO_SHORT", "TEXT"):
        shutil.copytree(data, folder / name)
    (folder / "NO_VALIDATION" / "val_000000.bin").unlink()
    write_shard(folder / "TOO_SHORT" / "train_000000.bin", np.arange(20, dtype=np.uint16))
    (folder / "TEXT" / "train_000000.bin").write_text("Call me Ishmael. " * 100)
    model = dense_model(vocab_size=384, block_size=32)
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 0}
    ckpt.save_checkpoint(state, folder).rename(folder / "SPEAKS_GPT2.pt")
    return folder


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_settings(arguments, data, places, tmp_path, capsys):
    """Exit code 2 and one line that names cause and cure; nothing is trained, nothing is written."""
    words = [re.sub(r"^[A-Z_]{4,}\d?", lambda m: str(places / m[0]), word) for word in arguments.split()]
    common = flags(data, tmp_path / "log")
    if "--init_from" in arguments:  # flags must not contradict that model's sizes
        common = f"--total_batch_size 256 --B 4 --T 16 --device cpu --data_dir {data}".split()
        common += ["--log_dir", str(tmp_path / "log")]
    before = sorted(places.rglob("*"))
    assert train_gpt_moe.main([*common, *words]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and re.search(REFUSED[arguments], said.err), said.err
    assert "step" not in said.out and sorted(places.rglob("*")) == before and not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PATH": "nowhere"}, r"torch.compile needs g\+\+,.*--use_compile False"),
        ({"CXX": "g+++"}, r"torch.compile needs g\+\+\+"),
        ({"RANK": "0"}, "not LOCAL_RANK, WORLD_SIZE"),
    ],
)
def test_a_bad_environment(change, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert train_gpt_moe.main(flags(data, tmp_path / "log", "--use_compile", True)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not (tmp_path / "log").exists()


def test_batches_that_do_not_divide_are_refused_with_the_nearest_that_does():
    world = parallel.World(0, 0, 3, torch.device("cpu"))
    assert check_config(TrainConfig(B=4, T=8, total_batch_size=192), world) == 2
    with pytest.raises(ValueError, match=r"total_batch_size=100 .* 4 \* 8 \* 3 = 96; .*_size 96"):
        check_config(TrainConfig(B=4, T=8, total_batch_size=100), world)


# ---------------------------------------------------------------------------- derived


def test_min_lr_follows_max_lr_unless_it_is_given():
    for words, expected in ([], 6e-5), (["--max_lr=1e-3"], 1e-4), (["--min_lr=1e-5"], 1e-5):
        config, given = parse_config(words)
        check_config(config, ALONE, given)
        assert config.min_lr == expected


@pytest.mark.parametrize(("steps", "expected"), [(30, 3), (5, 0), (40, 4), (41, 40), (0, 40)])
def test_a_presets_warmup_that_does_not_fit_is_made_shorter(steps, expected):
    said, words = [], ["--preset", "demo", "--max_steps", str(steps)]
    config, given = parse_config(words)
    check_config(config, ALONE, given, said.append)
    assert config.warmup_steps == expected and len(said) == (expected != 40)
    if expected == 40:
        return
    assert re.match(rf"warmup_steps={expected}, not 40: max_steps={steps}.*--warmup_steps", said[0])
    config, given = parse_config([*words, "--warmup_steps", "40"])
    for given_now in (given, None):  # a flag's warmup is refused, and that of a resumed run
        with pytest.raises(ValueError, match=rf"warmup_steps=40 .*max_steps={steps}; lower --warmup_steps"):
            check_config(config, ALONE, given_now)


def test_a_shortened_warmup_is_a_setting_of_the_run_from_then_on(data, tmp_path, capsys):
    words = flags(data, tmp_path, "--max_steps", 10, "--infer_step", 0)
    del words[(at := words.index("--warmup_steps")) : at + 2]
    assert train_gpt_moe.main(words) == 0
    assert capsys.readouterr().out.count("warmup_steps=1, not 715: max_steps=10") == 1
    resume = ["--resume", str(tmp_path / "model_00010.pt"), "--device", "cpu", "--max_steps", "11"]
    assert train_gpt_moe.main(resume) == 0
    assert "not 715" not in capsys.readouterr().out
    saved = ckpt.load_checkpoint(tmp_path / "model_00011.pt")["train_config"]
    assert (saved["warmup_steps"], saved["max_steps"]) == (1, 11)
