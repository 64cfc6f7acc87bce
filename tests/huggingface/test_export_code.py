"""The code in a saved folder: it runs where this project is not installed, and beside it.

Run: python -m pytest tests/huggingface/test_export_code.py"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, slow
from models import ARCHITECTURES, byte_model, strong, tiny, tokens
from processes import flags
from transformers import AutoModelForCausalLM

from huggingface.export import export_folder
from huggingface.export_code import export_code
from model import GPT, GPTLMHeadModel
from training.checkpoints import load_model

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
    with pytest.raises(ValueError, match=r"two a\.py"):
        export_code(tmp_path / "three", tmp_path / "start.py")
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
        with torch.no_grad():
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
