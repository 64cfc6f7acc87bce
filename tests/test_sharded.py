"""Checkpoints as folders: equal to single files, whole or not there, damage is found, no code in them is run.

Run: python -m pytest tests/test_sharded.py

tests/test_parallel.py has folders that many processes have written.
"""

import json
import pickle
import shutil
import zlib

import pytest
import torch
from processes import equal, full_disk

import checkpoint as ckpt
import sharded
from checkpoint import CheckpointError
from model import GPTConfig, GPTLMHeadModel


def content(step: int = 5, tied: bool = True) -> dict:
    """A small checkpoint with a step of AdamW in it."""
    torch.manual_seed(step)
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=264, num_experts=3, encoding="bytes",
        encoding_size=257, tie_word_embeddings=tied,
    )  # fmt: skip
    model = GPTLMHeadModel(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    x = torch.randint(50, (2, 8))
    model(x, targets=x, return_dict=True).loss.backward()
    optimizer.step()
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": config.to_dict(),
        "step": step, "val_loss": 3.5, "loader": {"position": 7}, "rng": torch.get_rng_state(),
        "health": {}, "elapsed_s": 1.0, "train_config": {"T": 8}, "format": sharded.FORMAT,
    }  # fmt: skip


class Alone:
    """CheckpointWriter of a single process that writes folders."""

    def __new__(cls, folder, **more):
        writer = ckpt.CheckpointWriter(folder, **more)
        writer.saver = sharded.Saver(None, folder)
        return writer


@pytest.fixture
def saved(tmp_path):
    """(path of a folder, what was saved)"""
    state = content()
    sharded.save(state, tmp_path / "model_00005")
    return tmp_path / "model_00005", state


@pytest.mark.parametrize("tied", [True, False])
def test_file_and_folder_become_each_other(tmp_path, tied):
    state = content(tied=tied)
    file = ckpt.save_checkpoint(state, tmp_path)
    folder, back = tmp_path / "model_00005", tmp_path / "back.pt"
    assert ckpt.main(["convert", str(file), str(folder)]) == 0
    assert ckpt.main(["convert", str(folder), str(back)]) == 0
    for path in (file, folder, back):
        assert equal(ckpt.load_checkpoint(path), state)
        assert ckpt.main(["verify", str(path)]) == 0
    model = ckpt.load_model(folder)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert ckpt.main(["convert", str(file), str(folder)]) == 2  # nothing is overwritten
    assert not list(tmp_path.glob(".*"))


def test_a_folder_is_exported(saved, tmp_path):
    path, state = saved
    assert ckpt.main(["export", str(path), str(tmp_path / "out")]) == 0
    exported = GPTLMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    learned = {name: value for name, value in state["model"].items() if value.is_floating_point()}
    assert all(torch.equal(exported[name], value) for name, value in learned.items())


@pytest.mark.parametrize("name", ["__0_0.distcp", "rest.pt", "index.json"])
def test_damage_is_found(saved, name):
    """A changed bit anywhere, a file cut off or missing: the error names the folder."""
    path, _ = saved
    whole = (path / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        changed = bytearray(whole)
        changed[place] ^= 4
        (path / name).write_bytes(changed)
        try:  # a space in a JSON file may become another character that means the same
            found = ckpt.load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert name == "index.json" and equal(found, saved[1])
    for rest in (whole[:-1], whole + b"x", b""):
        (path / name).write_bytes(rest)
        with pytest.raises(CheckpointError, match="model_00005"):
            ckpt.load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="model_00005"):
        ckpt.load_checkpoint(path)


def forge(path, change) -> None:
    """Change the index, and its checksum with it."""
    index = sharded.read_index(path)
    change(index)
    write_index(path, index)


def write_index(path, index: dict) -> None:
    text = json.dumps(index)
    (path / "index.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "index": text}))


def test_a_forged_folder_runs_no_code_and_leads_nowhere(saved, tmp_path):
    path, state = saved
    index = sharded.read_index(path)

    class Evil:
        def __reduce__(self):
            return (print, ("evil code ran",))

    def outside(index):
        index["files"]["../secret"] = index["files"].pop("rest.pt")

    (path / ".metadata").write_bytes(pickle.dumps(Evil()))  # torch's own index is never opened
    assert equal(ckpt.load_checkpoint(path), state)
    forge(path, lambda index: index["tensors"]["model.transformer.wte.weight"].update(dtype="load"))
    with pytest.raises(CheckpointError, match="no dtype 'load'"):
        ckpt.load_checkpoint(path)
    forge(path, lambda index: index["tensors"]["model.transformer.wte.weight"].update(dtype="float32"))
    forge(path, lambda index: index["tensors"]["model.transformer.wpe.weight"].update(parts=[]))
    with pytest.raises(CheckpointError, match=r"of model.transformer.wpe.weight there are 0 elements of"):
        ckpt.load_checkpoint(path)
    forge(path, lambda index: index.pop("tensors"))
    with pytest.raises(CheckpointError, match="it lacks files, tensors or format"):
        ckpt.load_checkpoint(path)
    write_index(path, index)
    (tmp_path / "secret").write_bytes(b"")
    forge(path, outside)
    with pytest.raises(CheckpointError, match="secret is missing"):
        ckpt.load_checkpoint(path)
    torch.save(Evil(), path / "rest.pt")
    with pytest.raises(CheckpointError, match=r"cannot read rest\.pt safely"):
        sharded.read_rest(path)


def test_a_newer_format_is_named(saved):
    path, _ = saved
    forge(path, lambda index: index.update(format=sharded.FORMAT + 1))
    with pytest.raises(ckpt.NewerFormatError, match="update the program"):
        ckpt.load_newest(path.parent)


def test_the_newest_good_one_is_found_among_both_forms(tmp_path):
    ckpt.save_checkpoint(content(1), tmp_path)
    for step in (2, 3):
        sharded.save(content(step), tmp_path / f"model_{step:05d}")
    (tmp_path / "model_00004").mkdir()  # never finished: no index
    warnings = []
    path, state = ckpt.load_newest(tmp_path, warnings.append)
    assert path.name == "model_00003" and state["step"] == 3 and len(warnings) == 1
    (tmp_path / "model_00003" / "__0_0.distcp").unlink()
    assert ckpt.load_newest(tmp_path, warnings.append)[0].name == "model_00002"
    (tmp_path / "latest").write_text("model_00002")
    assert ckpt.load_checkpoint(tmp_path / "latest")["step"] == 2
    shutil.rmtree(tmp_path / "model_00002")
    assert ckpt.load_newest(tmp_path, warnings.append)[0].name == "model_00001.pt"


def test_old_folders_go(tmp_path):
    said = []
    writer = Alone(tmp_path, keep_last=2, keep_every=4, say=said.append)
    for step in range(1, 8):
        writer.save(content(step))
        assert writer.wait() is None
        assert (tmp_path / "latest").read_text() == f"model_{step:05d}"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "model_00004", "model_00006", "model_00007"]
    assert all("saved" in text for text in said) and len(said) == 7


def test_a_step_that_is_done_again_replaces_its_folder(tmp_path):
    writer = Alone(tmp_path, say=str)
    for val_loss in (1.0, 2.0):
        writer.save({**content(), "val_loss": val_loss})
        assert writer.wait() is None
        assert ckpt.load_checkpoint(tmp_path / "model_00005")["val_loss"] == val_loss
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "model_00005"]


def test_what_is_not_finite_is_not_saved(tmp_path):
    said = []
    writer = Alone(tmp_path, say=said.append)
    writer.save(content(1))
    bad = content(2)
    bad["model"]["transformer.wte.weight"][3, 3] = float("nan")
    writer.save(bad)
    assert isinstance(writer.wait(), CheckpointError) and "NOT WRITTEN" in said[-1]
    assert [path.name for path in ckpt.list_checkpoints(tmp_path)] == ["model_00001"]
    writer.save(content(3))
    assert writer.wait() is None and ckpt.load_newest(tmp_path)[0].name == "model_00003"


def test_a_full_disk_leaves_what_there_was(tmp_path):
    said = []
    writer = Alone(tmp_path, say=said.append)
    writer.save(content(1))
    assert writer.wait() is None
    with full_disk(20_000):
        writer.save(content(2))
        assert writer.wait() is not None
    assert "CHECKPOINT NOT WRITTEN" in said[-1] and "model_00001" in said[-1]
    assert ckpt.load_newest(tmp_path)[0].name == "model_00001"
    writer.save(content(3))
    assert writer.wait() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "model_00001", "model_00003"]


def test_another_model_is_refused_by_the_name_of_a_tensor(saved):
    path, state = saved
    model = GPTLMHeadModel(GPTConfig(**(state["config"] | {"n_embd": 32})))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")

    class Loader:
        def load_state_dict(self, state):
            pass

    with pytest.raises(CheckpointError, match=r"wte.weight should be \[264, 32\], but there is \[264, 16\]"):
        ckpt.restore(ckpt.load_checkpoint(path, whole=False), model, optimizer, Loader())
