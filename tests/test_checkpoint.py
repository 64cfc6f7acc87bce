"""The command line of checkpoint.py: verify, convert, average, export, for files and folders."""

import shutil

import pytest
import torch
from models import dense_model
from processes import equal

import train_gpt_moe
from checkpoint import main
from model import GPT
from training.checkpoints import list_checkpoints, load_checkpoint, load_model, save_checkpoint


@pytest.mark.parametrize("tied", [True, False])
def test_file_and_folder_become_each_other_and_an_export(straight, tmp_path, tied):
    """A name may end with a slash. What a killed conversion has left is replaced."""
    state = load_checkpoint(straight / "latest")
    if not tied:
        model = dense_model(tie_word_embeddings=False, encoding="bytes", vocab_size=257)
        state |= {"model": model.state_dict(), "config": model.config.to_dict()}
    file, folder, back = tmp_path / "model_00012.pt", tmp_path / "model_00012", tmp_path / "back.pt"
    save_checkpoint(state, tmp_path)
    for name in (".model_00012.unfinished", ".model_00015.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__7_0.distcp").write_bytes(b"half of it")
    assert main(["convert", f"{file}/", f"{folder}/"]) == 0
    assert main(["convert", f"{folder}/", f"{back}/"]) == 0
    learned = {name: value for name, value in state["model"].items() if value.is_floating_point()}
    for path in (file, folder, back):
        exported = tmp_path / f"export_of_{path.name}"
        assert equal(load_checkpoint(path), state)
        assert main(["verify", f"{path}/"]) == 0
        assert main(["export", f"{path}/", f"{exported}/"]) == 0
        for name in (path, exported):
            model = load_model(f"{name}/")
            assert (model.lm_head.weight is model.transformer.wte.weight) == tied
            assert equal({name: model.state_dict()[name] for name in learned}, learned)
        assert (exported / "model.safetensors").exists() and not list(exported.glob("*.bin"))
    assert GPT.from_pretrained(exported).config.encoding == "bytes"
    assert [path.name for path in folder.glob("__*")] == ["__0_0.distcp"]
    hidden = [path.name for path in tmp_path.glob(".*")]
    assert hidden == [".model_00015.unfinished"]  # another process may be writing it


def test_average_of_a_runs_newest_checkpoints(straight, tmp_path, refused):
    """The weights are the means, the rest is the newest one's; other settings of the run do not matter."""
    paths, mean = list_checkpoints(straight)[:3], tmp_path / "mean.pt"
    assert main(["average", str(straight), str(mean), "--last", "3"]) == 0
    states, found = [load_checkpoint(path) for path in paths], load_checkpoint(mean)
    for name, value in found["model"].items():
        values = torch.stack([state["model"][name].double() for state in states])
        expected = values.mean(0).to(value.dtype) if value.is_floating_point() else states[0]["model"][name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert (found["step"], found["config"]) == (states[0]["step"], states[0]["config"])
    assert equal(load_model(mean).state_dict(), found["model"])
    error = refused(train_gpt_moe.main, "--resume", mean)  # it has no optimizer
    assert str(mean) in error and "--init_from" in error
    shutil.copytree(straight, tmp_path / "two")
    model = dense_model(n_kv_head=2)  # its configuration has one name more
    other = dict(model=model.state_dict(), config=model.config.to_dict(), step=11)
    save_checkpoint(other, tmp_path / "two")
    for folder, last, named in ((straight, 1, "last=1"), (straight, 99, "last=99"),
                                ("two", 2, "block_size"), ("none", 2, "but there are 0")):  # fmt: skip
        assert named in refused(main, "average", tmp_path / folder, tmp_path / "new", "--last", last)
    assert not (tmp_path / "new").exists()


def test_what_is_printed(straight, tmp_path, capsys, refused):
    path = str(straight / "model_00012.pt")
    val_loss = load_checkpoint(path)["val_loss"]
    assert main(["verify", path]) == 0
    assert f"undamaged, step 12, last validation loss before it {val_loss}" in capsys.readouterr().out
    (tmp_path / "file").write_text("of somebody else")
    for words in (["export", path, tmp_path], ["convert", path, tmp_path / "file"]):
        assert str(words[-1]) in refused(main, *words)
