"""export_folder: whole folders that replace nothing but exports, and lm_eval on one.

Run: python -m pytest tests/huggingface/test_export.py"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import shared_file
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
        assert saved["eos_token_id"] == saved["bos_token_id"] == 256
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
    with pytest.raises(OSError, match="Input/output error"):
        export_folder(model, folder)
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
        with pytest.raises(FileExistsError, match=f"{name} .*{words}"):
            export_folder(model, tmp_path / name)


BAD = [
    ({}, "onnx", r"format='onnx'.*gpt_moe, gpt2"),
    (dict(encoding="bytes"), "gpt_moe", r"encoding='bytes'.*257.*vocab_size=97"),
    (dict(encoding="cl100k_base"), "gpt_moe", r"encoding='cl100k_base': .*--no-tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize("fields, format, message", BAD)
def test_bad_exports_are_refused(fields, format, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_folder(GPTLMHeadModel(tiny(**fields)), tmp_path / "out", format=format)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- lm-evaluation-harness
TASK = """
task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function hellaswag_docs.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
DOCS = """
from lm_eval.tasks.hellaswag.utils import preprocess

def process_docs(dataset):
    def make(doc):
        query = preprocess(doc["activity_label"] + ": " + doc["ctx"])
        return {"query": query, "choices": [preprocess(ending) for ending in doc["endings"]]}
    return dataset.map(make)
"""


def test_lm_eval_agrees_with_hellaswag_py(tmp_path):
    """Set LM_EVAL_PYTHON to the Python of an environment with lm_eval, if it is not installed in this one."""
    python = os.environ.get("LM_EVAL_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (pip install lm_eval, or set LM_EVAL_PYTHON)")
    hellaswag = pytest.importorskip("hellaswag")
    questions = shared_file("hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions) + "\n")
    (tmp_path / "hellaswag_local.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    (tmp_path / "hellaswag_docs.py").write_text(DOCS)
    model = byte_model(block_size=512)
    export_folder(model, tmp_path / "exported")
    command = f"""{python} -m lm_eval --model hf --tasks hellaswag_local --limit 20 --device cpu
        --model_args pretrained=exported,trust_remote_code=True --include_path . --output_path results
        --log_samples --batch_size 8"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    how = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    done = subprocess.run(command.split(), **how)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())
    theirs = results["results"]["hellaswag_local"]
    samples = next((tmp_path / "results").rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, samples), key=lambda sample: sample["doc_id"])
    for n in range(1, 21):  # question by question
        ours = hellaswag.evaluate(model, data=tmp_path / "questions.jsonl", limit=n, style="harness")
        for name in ("acc", "acc_norm"):
            assert getattr(ours, name) * n == pytest.approx(sum(sample[name] for sample in samples[:n]))
    assert (ours.n, ours.acc, ours.acc_norm) == (20, theirs["acc,none"], theirs["acc_norm,none"])
    assert ours.acc_stderr == pytest.approx(theirs["acc_stderr,none"])
