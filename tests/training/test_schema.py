"""Forged checkpoints: every value that no run writes is refused in one line, before anything uses it."""

import json
import math
import os
import shutil

import pytest
import torch
from fuzz import DOUBLED as DEEP  # 2^40 entries, and yet a small file
from processes import flags, write_index

import checkpoint
import hellaswag
import sample
import train_gpt_moe
from train_gpt_moe import TrainConfig
from training import archives, sharded
from training import checkpoints as ckpt
from training.archives import check_format
from training.schema import check_checkpoint

SPARSE = torch.ones(4).to_sparse()
# Values that are wrong in most places: other types, not finite, negative, nested, very large.
WRONG = ("x", -5, True, None, math.nan, [], {}, {1: 2}, DEEP, 10**5000, torch.ones(2), b"x")
# Where they are put, and further values that are wrong there.
PLACES = {"model": (), "config": (), "step": (1.0, 10**30), "val_loss": (), "optimizer": (), "loader": (),
          "rng": (torch.zeros(5, dtype=torch.uint8),), "train_config": (), "elapsed_s": (math.inf,),
          "health": ({"is_spike": 1},), "diagnostics": ({"noise": torch.ones(2)}, {"choices": torch.ones(2)}),
          "scaler": ({"scale": 1.0},), "world_size": (0,), "format": (0,),
          "model.lm_head.weight": (torch.ones(3, 3), torch.ones(1).expand(10**6, 10**6)),
          "model.transformer.h.0.attn.c_attn.weight": (SPARSE,), "config.n_layer": (10**8, 1, 0),
          "config.n_embd": (10**9, 64), "config.vocab_size": (10**9,), "config.activation": ("swiglu",),
          "config.use_moe": (False,), "config.moe_every": (2,), "loader.position": (10**30,),
          "optimizer.state": (), "optimizer.state.0": (), "health.mean": (), "train_config.B": (0,),
          "optimizer.param_groups": ([{}], [{"params": [0]}]), "train_config.max_lr": ("1e-3", math.inf),
          "train_config.min_lr": (), "train_config.optimizer": ()}  # fmt: skip
# Which of WRONG are right in some places.
RIGHT = {"val_loss": (None, math.nan, -5), "health.mean": (-5,), "train_config.min_lr": (None,)}
RIGHT |= {"config.use_moe": (True,), "optimizer.state": ({},), "optimizer.state.0": ({},)}
RIGHT |= {"train_config": ({},), "diagnostics": ({},), "scaler": ({},)}


def forge(content: dict, place: str, value) -> dict:
    """A copy of the dictionary with another value at `place`, keys joined by dots."""
    if place in content:  # the name of a tensor
        return {**content, place: value}
    key, _, inner = place.partition(".")
    key = int(key) if key.isdigit() else key
    return {**content, key: forge(content[key], inner, value) if inner else value}


@pytest.fixture(scope="module")
def good(straight):
    """The checkpoint of a finished run."""
    return torch.load(straight / "model_00012.pt")


@pytest.mark.parametrize("place", PLACES)
def test_what_no_run_writes_is_refused(good, place, tmp_path):
    path = tmp_path / "model_00012.pt"
    for value in (*WRONG, *PLACES[place]):
        right = RIGHT.get(place, ())
        if any(value is other or (type(value), value) == (type(other), other) for other in right):
            continue
        with pytest.raises(ValueError) as error:
            forged = forge(good, place, value)
            check_format(path, forged)
            ckpt.keep_settings(TrainConfig(), set(), check_checkpoint(forged), path, lambda text: None)
            raise AssertionError(f"{place} may be {type(value)}")
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(("place", "value", "words"), [
    ("config.n_layer", "x", "n_layer"), ("step", DEEP, "nested"),
    ("model.transformer.ln_f.weight", torch.empty(32, device="meta"), "ln_f.weight"),
    ("model.lm_head.weight", None, "model"),
    ("model.transformer.ln_f.weight", torch.tensor([1.0] * 31 + [math.nan]), "transformer.ln_f.weight"),
    ("optimizer", {"state": {}, "param_groups": [{"params": [], "lr": SPARSE}]}, "lr is no plain tensor"),
])  # fmt: skip
def test_every_command_refuses_it_in_one_line(good, place, value, words, refused, data, tmp_path):
    path = tmp_path / "model_00012.pt"
    torch.save(forge(good, place, value), path)
    log = flags(data, tmp_path / "log")
    for main, *arguments in (
        (checkpoint.main, "verify", path), (checkpoint.main, "export", path, tmp_path / "exported"),
        (checkpoint.main, "convert", path, tmp_path / "folder"),
        (sample.main, "--checkpoint", path, "--device", "cpu"),
        (hellaswag.main, "--model", path, "--device", "cpu"),
        (train_gpt_moe.main, *log, "--init_from", path), (train_gpt_moe.main, *log, "--resume", path),
    ):  # fmt: skip
        line = refused(main, *arguments)
        assert str(path) in line and words in line and len(line) < 500
    assert not (tmp_path / "exported").exists() and not (tmp_path / "folder").exists()


@pytest.mark.parametrize("forged", [
    ("optimizer.state.0.exp_avg", torch.ones(3)), ("optimizer.state.0", {"step": torch.ones(())}),
    ("rng", torch.zeros_like(torch.get_rng_state())), ("loader.T", "x" * 10**6),
    ("optimizer.state.3.exp_avg", torch.tensor(math.inf)), ("optimizer.state.0.step", torch.ones(2)),
])  # fmt: skip
def test_a_run_is_not_resumed_from_it(good, forged, refused, data, tmp_path):
    path = tmp_path / "model_00012.pt"
    torch.save(forge(good, *forged), path)
    line = refused(train_gpt_moe.main, *flags(data, tmp_path / "log", "--resume", path))
    word = {"rng": "mt19937", "loader.T": "T="}.get(forged[0], forged[0].split(".")[0])
    assert word in line and len(line) < 700


# ---------------------------------------------------------------------------- FOLDERS
@pytest.mark.parametrize(("place", "value"), [
    ("optimizer.param_groups", None), ("loader", None), ("rng", "x"), ("step", -5), ("format", True),
    ("train_config", DEEP), ("model.transformer.h.0.ln_1.weight", torch.full((32,), math.nan)),
    ("model.transformer.h.0.ln_1.weight", torch.ones(32).to(torch.float8_e4m3fn)),
])  # fmt: skip
def test_a_forged_folder_is_refused(good, place, value, refused, tmp_path, monkeypatch):
    path = tmp_path / "model_00012"
    with monkeypatch.context() as patch:
        patch.setattr(archives, "check_finite", lambda *_: None)  # otherwise it is not saved
        sharded.save(forge(good, place, value) if place.startswith("model") else good, path)
    if not place.startswith("model"):
        torch.save(forge(torch.load(path / "rest.pt"), place, value), path / "rest.pt")
        index = json.loads(json.loads((path / "index.json").read_text())["index"])
        index["files"]["rest.pt"] = archives.size_and_checksum(path / "rest.pt")
        write_index(path, index)
    line = refused(checkpoint.main, "verify", path)
    assert (place.split(".")[0] if value is not DEEP else "nested") in line and len(line) < 500


@pytest.mark.parametrize("replace", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
@pytest.mark.parametrize("name", ["folder/rest.pt", "folder/__0_0.distcp", "folder/index.json", "file.pt"])
def test_what_is_no_ordinary_file_is_not_read(good, replace, name, refused, tmp_path):
    sharded.save(good, tmp_path / "folder")
    (tmp_path / name).unlink(missing_ok=True)
    replace(tmp_path / name)
    path = tmp_path / name.split("/")[0]
    assert str(path) in refused(checkpoint.main, "verify", path)


# ---------------------------------------------------------------------------- LISTS
def test_list_and_retention_know_the_validation_losses(straight, tmp_path, capsys):
    log = shutil.copytree(straight, tmp_path / "log")
    assert checkpoint.main(["list", str(log)]) == 0
    _, newest, *others = capsys.readouterr().out.splitlines()
    losses, bits = ckpt.validation_losses(log), ckpt.validation_losses(log, "val_bpb")
    assert newest.split()[0] == "12" and f" {losses[12]:.4f} " in newest and len(others) == 3
    assert newest.split()[5] == f"{bits[12]:.4f}" and others[0].split()[4:6] == ["-", "-"]
    assert ckpt.load_checkpoint(log / "model_00009.pt")["val_loss_step"] == 8
    (log / "log.txt").write_text("3 val 2.5\n6 val nan\n9 val 4\n12 val 1000\n")  # a run that diverged
    ckpt.prune_checkpoints(log, 1, 0)
    assert [path.name for path in ckpt.list_checkpoints(log)] == ["model_00012.pt", "model_00003.pt"]
    assert checkpoint.main(["list", str(tmp_path)]) == 2 and "no checkpoint" in capsys.readouterr().err
