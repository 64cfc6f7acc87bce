"""export_folder: whole folders that replace nothing but exports.

Run: python -m pytest tests/huggingface/test_export.py"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import refuses
from models import byte_model, tiny, tokens
from processes import full_disk

from huggingface.export import export_folder
from model import GPTConfig, GPTLMHeadModel


def test_an_export_says_how_its_texts_end_and_forgets_usage(tmp_path):
    model = byte_model().train()
    model.update_routers()
    model(tokens(), targets=tokens())
    model.update_routers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_folder(model, tmp_path / "out")
    for file in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path / "out" / file).read_text())
        assert saved["eos_token_id"] == saved["bos_token_id"] == saved["pad_token_id"] == 256
    assert model.config.eos_token_id is None and "auto_map" not in model.config.to_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = GPTLMHeadModel.from_pretrained(tmp_path / "out")
    assert all(moe.get_usage_counts().sum() == 0 for moe in again.moe_layers())
    assert torch.equal(again.eval()(tokens()).logits, model.eval()(tokens()).logits)
    export_folder(model, tmp_path / "bare", tokenizer=False, max_shard_size="100KB")
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    assert (tmp_path / "bare" / "model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["eos_token_id"] is None


def test_an_export_replaces_an_export_or_leaves_it_whole(tmp_path, monkeypatch):
    model, folder = byte_model(), tmp_path / "deep" / "out"
    export_folder(model, folder)
    assert json.loads((folder / "export.json").read_text())["files"] == sorted(os.listdir(folder))
    export_folder(byte_model(n_head=2), folder)
    assert GPTConfig.from_pretrained(folder).n_head == 2
    assert os.listdir(folder.parent) == ["out"]  # nothing temporary stays

    with full_disk(100_000), pytest.raises(Exception, match=r"os error 27|File too large"):
        export_folder(model, folder)
    rename = Path.rename

    def fail_once(path, target):
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    refuses("Input/output error", export_folder, model, folder, error=OSError)
    assert GPTConfig.from_pretrained(folder).n_head == 2 and os.listdir(folder.parent) == ["out"]


def test_nothing_else_is_replaced(tmp_path):
    model = byte_model()
    (tmp_path / "empty").mkdir()
    export_folder(model, tmp_path / "empty")
    (tmp_path / "empty" / "my notes.txt").write_text("keep me")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name, words in dict(empty="'my notes.txt'", thesis="'config.json'", file="is a file").items():
        refuses(f"{name} .*{words}", export_folder, model, tmp_path / name, error=FileExistsError)


BAD = [({}, "onnx", r"format='onnx'.*gpt_moe, gpt2"),
       (dict(encoding="bytes"), "gpt_moe", r"encoding='bytes'.*257.*vocab_size=97"),
       (dict(encoding="cl100k_base"), "gpt_moe", r"encoding='cl100k_base': .*--no-tokenizer")]  # fmt: skip


@pytest.mark.parametrize("fields, format, message", BAD)
def test_bad_exports_are_refused(fields, format, message, tmp_path):
    refuses(message, export_folder, GPTLMHeadModel(tiny(**fields)), tmp_path / "out", format=format)
    assert os.listdir(tmp_path) == []
