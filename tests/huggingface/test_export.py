"""export_folder: whole folders that replace nothing but exports; the code in them runs elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refuses, slow
from models import ARCHITECTURES, byte_model, strong, tiny, tokens
from processes import flags, full_disk
from test_pretrained import trained
from transformers import AutoModelForCausalLM

from huggingface.export import export_folder
from huggingface.export_code import export_code
from model import GPT, GPTConfig, GPTLMHeadModel
from training.checkpoints import load_model


def test_an_export_says_how_its_texts_end_and_forgets_usage(tmp_path):
    model = trained(vocab_size=384, encoding="bytes")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_folder(model, tmp_path / "out")
    for file in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path / "out" / file).read_text())
        assert saved["eos_token_id"] == saved["bos_token_id"] == saved["pad_token_id"] == 256
    assert model.config.eos_token_id is None and "auto_map" not in model.config.to_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = GPTLMHeadModel.from_pretrained(tmp_path / "out")
    assert all(moe.get_usage_counts().sum() == 0 for moe in again.moe_layers())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
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
    (tmp_path / f".empty.{os.getpid()}.tmp").mkdir()  # of a killed process in a container
    export_folder(model, tmp_path / "empty")
    (tmp_path / "empty" / "my notes.txt").write_text("keep me")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name, words in dict(empty="'my notes.txt'", thesis="'config.json'", file="is a file").items():
        refuses(f"{name} .*{words}", export_folder, model, tmp_path / name, error=FileExistsError)


@pytest.mark.parametrize("fields, format, message", [
    ({}, "onnx", r"format='onnx'.*gpt_moe, gpt2"),
    (dict(encoding="bytes"), "gpt_moe", r"encoding='bytes'.*257.*vocab_size=97"),
    (dict(encoding="cl100k_base"), "gpt_moe", r"encoding='cl100k_base': .*--no-tokenizer"),
])  # fmt: skip
def test_bad_exports_are_refused(fields, format, message, tmp_path):
    refuses(message, export_folder, GPTLMHeadModel(tiny(**fields)), tmp_path / "out", format=format)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- CODE
PROMPTS, GREEDY = ["Hello, I'm", "Oh"], dict(max_new_tokens=8, do_sample=False)
ELSEWHERE = """
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits

trust, prompts = dict(trust_remote_code=True), ["Hello, I'm", "Oh"]
greedy = dict(max_new_tokens=8, do_sample=False)
kinds = AutoConfig, AutoModelForCausalLM, AutoModel, AutoTokenizer
config, model, base, tokenizer = parts = [kind.from_pretrained("exported", **trust) for kind in kinds]
writer = pipeline("text-generation", "exported", **trust)
alone = [writer(prompt, **greedy) for prompt in prompts]
batch = writer(prompts, batch_size=2, **greedy)
with torch.no_grad():
    hidden = base(torch.arange(20)[None]).last_hidden_state
found = dict(
    names=[type(part).__name__ for part in parts[:3]], home=type(model).__module__.split(".")[0],
    logits=logits(model), hidden=hidden, ids=tokenizer(prompts[0])["input_ids"],
    texts=[[rows[0]["generated_text"] for rows in texts] for texts in (alone, batch)],
    strings=[model.generate(prompt, **greedy) for prompt in prompts],
)
torch.save(found, "found.pt")

# What was saved can be saved again: a model, and a configuration alone.
model = AutoModelForCausalLM.from_pretrained("saved", **trust)
model.save_pretrained("saved again")
assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("saved again", **trust)), logits(model))
AutoConfig.from_pretrained("config", **trust).save_pretrained("config again")
config = AutoConfig.from_pretrained("config again", **trust)
again = AutoModelForCausalLM.from_config(config, **trust)
again.load_state_dict(model.state_dict())
assert torch.equal(logits(again), logits(model))
"""


def run_elsewhere(code, arguments, cwd) -> None:
    """Run Python code in a process that has this project neither on its path nor as its folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("where", ["here, without our modules", *slow("in a new process")])
def test_folders_work_where_the_project_is_not_installed(where, tmp_path, monkeypatch, own_modules):
    exported = byte_model(**ARCHITECTURES["window, global"])
    export_folder(exported, tmp_path / "exported")
    saved = strong(GPT(tiny(num_shared_experts=1)))  # a GPT is also a model with a head
    saved.save_pretrained(tmp_path / "saved")  # without export_folder
    saved.config.save_pretrained(tmp_path / "config")
    if where == "in a new process":
        run_elsewhere(ELSEWHERE, [], tmp_path)
    else:
        with monkeypatch.context() as patch:
            ours = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
            for name in [name for name in sys.modules if name.split(".")[0] in ours]:
                patch.setitem(sys.modules, name, None)  # importing it is an error
            patch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(ROOT))])
            patch.chdir(tmp_path)
            exec(ELSEWHERE, {})
    found, ids = torch.load(tmp_path / "found.pt"), torch.arange(20)[None]
    assert found["names"] == ["GPTConfig", "GPTLMHeadModel", "GPT"]
    assert found["home"] == "transformers_modules" and found["ids"] == list(PROMPTS[0].encode())
    expected = exported(ids, output_hidden_states=True)
    assert torch.allclose(found["logits"], expected.logits, atol=1e-5)
    assert torch.allclose(found["hidden"], expected.hidden_states[-1], atol=1e-5)
    texts = [exported.generate(prompt, **GREEDY) for prompt in PROMPTS]
    assert found["texts"] == [texts, texts] and found["strings"] == texts and texts[0] != PROMPTS[0]
    again = GPTLMHeadModel.from_pretrained(tmp_path / "saved again")
    assert torch.equal(again(ids).logits, saved(ids, labels=ids).logits)


def test_code_is_exported_flat_and_again(tmp_path):
    files = {
        "start.py": '"""\nfrom other.b import y\n"""\nfrom os.path import join\nfrom layers.a import x\n',
        "layers/a.py": "def f():\n    from other.b import (\n        y,\n    )\n\n\nx = f\n",
        "other/b.py": "from start import nothing\ny = 1\n",
    }
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    for folder, start in (("one", tmp_path), ("two", tmp_path / "one")):
        (tmp_path / folder).mkdir()
        export_code(tmp_path / folder, start / "start.py")
        copies = {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}
        assert copies == {
            "start.py": files["start.py"].replace("\nfrom layers.a", "\nfrom .a"),  # the docstring stays
            "a.py": files["layers/a.py"].replace("other.b", ".b"),
            "b.py": files["other/b.py"].replace("start", ".start"),
        }
    (tmp_path / "other" / "a.py").write_text("")
    (tmp_path / "other" / "b.py").write_text("from other.a import nothing\n")
    (tmp_path / "three").mkdir()
    refuses(r"two a\.py", export_code, tmp_path / "three", tmp_path / "start.py")
    assert not list((tmp_path / "three").iterdir())


BEFORE_THE_REDESIGN = "83a183f"
BEFORE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, "before")
import checkpoint, train_gpt_moe
assert train_gpt_moe.main(sys.argv[1:]) == 0
assert checkpoint.main(["export", "log/model_00003.pt", "folder"]) == 0
model = checkpoint.load_model("log/model_00003.pt").eval()
with torch.no_grad():
    torch.save(model(torch.arange(30)[None]).logits, "logits.pt")
"""


@pytest.mark.slow
def test_checkpoints_and_folders_of_before_the_redesign_load(data, tmp_path):
    archive = ["git", "archive", "-o", str(tmp_path / "before.tar"), BEFORE_THE_REDESIGN]
    if subprocess.run(archive, cwd=ROOT, capture_output=True).returncode != 0:
        pytest.skip(f"git has no revision {BEFORE_THE_REDESIGN} here")
    shutil.unpack_archive(tmp_path / "before.tar", tmp_path / "before")
    shape = ["--max_steps", 3, "--num_experts", 4, "--num_shared_experts", 1, "--qk_norm", "True"]
    run_elsewhere(BEFORE, flags(data, tmp_path / "log", *shape), tmp_path)
    exported = GPTLMHeadModel.from_pretrained(tmp_path / "folder")
    for model in (load_model(tmp_path / "log" / "model_00003.pt"), exported):
        assert model.config.num_experts == 4
        logits = model.eval()(torch.arange(30)[None]).logits
        assert torch.allclose(logits, torch.load(tmp_path / "logits.pt"), rtol=0, atol=1e-6)


def test_a_folders_code_beside_ours_has_operators_of_its_own(tmp_path, own_modules):
    """torch would replace operators of the same name, and ours would call freed memory."""
    ours = byte_model().train()
    export_folder(ours, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
    package = type(theirs).__module__.removesuffix(".model")
    for name, operator in (("experts", "expert_mlp"), ("linear_cross_entropy", "chunked")):
        places = (f"layers.{name}", f"{package}.{name}")
        mine, other = (getattr(sys.modules[place], operator) for place in places)
        assert mine._opoverload.name() != other._opoverload.name()
    ids, losses = tokens(T=5), []
    for model in (ours, theirs, ours):
        model.loss_chunk = 2
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1]) and losses[0] == losses[2]
