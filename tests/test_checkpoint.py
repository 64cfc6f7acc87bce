"""The command line of checkpoint.py: verify, convert, export, for files and folders.

Run: python -m pytest tests/test_checkpoint.py"""

import pytest
import torch
from models import dense_model
from processes import equal

from checkpoint import main
from model import GPT
from training.checkpoints import load_checkpoint, load_model, save_checkpoint


@pytest.mark.parametrize("tied", [True, False])
def test_file_and_folder_become_each_other(straight, tmp_path, tied):
    """A name may end with a slash. What a killed conversion has left is replaced."""
    state = load_checkpoint(straight / "latest")
    if not tied:
        model = dense_model(tie_word_embeddings=False)
        state |= {"model": model.state_dict(), "config": model.config.to_dict()}
    file, folder, back = tmp_path / "model_00012.pt", tmp_path / "model_00012", tmp_path / "back.pt"
    save_checkpoint(state, tmp_path)
    for name in (".model_00012.unfinished", ".model_00015.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__7_0.distcp").write_bytes(b"half of it")
    assert main(["convert", f"{file}/", f"{folder}/"]) == 0
    assert main(["convert", f"{folder}/", f"{back}/"]) == 0
    for path in (file, folder, back):
        assert equal(load_checkpoint(path), state)
        assert main(["verify", f"{path}/"]) == 0
    assert [path.name for path in folder.glob("__*")] == ["__0_0.distcp"]
    model = load_model(f"{folder}/")
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    hidden = [path.name for path in tmp_path.glob(".*")]
    assert hidden == [".model_00015.unfinished"]  # another process may be writing it


def test_export_of_a_file_and_a_folder(straight, tmp_path):
    assert main(["convert", str(straight / "latest"), str(tmp_path / "folder")]) == 0
    state = load_checkpoint(straight / "latest")["model"]
    for name, source in (("a", straight / "latest"), ("b", tmp_path / "folder")):
        assert main(["export", f"{source}/", f"{tmp_path / name}/"]) == 0
        exported = load_model(f"{tmp_path / name}/").state_dict()
        learned = {name: value for name, value in state.items() if value.is_floating_point()}
        assert all(torch.equal(exported[name], value) for name, value in learned.items())
    assert (tmp_path / "a" / "model.safetensors").exists() and not list((tmp_path / "a").glob("*.bin"))
    assert GPT.from_pretrained(tmp_path / "a").config.encoding == "bytes"


def test_what_is_printed(straight, tmp_path, capsys, refused):
    path = str(straight / "model_00012.pt")
    val_loss = load_checkpoint(path)["val_loss"]
    assert main(["verify", path]) == 0
    assert f"undamaged, step 12, last validation loss before it {val_loss}" in capsys.readouterr().out
    (tmp_path / "file").write_text("of somebody else")
    for words, named in ((["verify", tmp_path / "none.pt"], "none.pt"),
                         (["export", path, tmp_path], tmp_path),
                         (["convert", path, tmp_path / "file"], tmp_path / "file")):  # fmt: skip
        assert str(named) in refused(main, *words)
