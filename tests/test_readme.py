"""README's Python examples run as they stand, its commands name files and flags that exist.

Run: python -m pytest tests/test_readme.py
"""

import importlib
import re
import shlex

import pytest
import torch
from conftest import ROOT
from test_train import TINY
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
import train_gpt_moe
from fineweb import prepare_demo

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^    ((?:python|torchrun|pip install .* && python) .*?)(?:  +#.*)?$", README, re.MULTILINE
)


def test_python_examples_run_in_order(tmp_path, monkeypatch, capsys):
    """All of them, one after the other as a reader would, in a folder that holds what they name.

    "gpt2" is a small local GPT-2 here, for lack of a network; GPT-2's ids are taken modulo its vocabulary.
    """
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    prepare_demo("demo")
    assert train_gpt_moe.main([*TINY, "--data_dir", "demo", "--max_steps", "3", "--B", "16"]) == 0
    (tmp_path / "log" / "model_00003.pt").rename("log/model_19073.pt")
    assert checkpoint.main(["export", "log/model_19073.pt", "my_model"]) == 0
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=128)
    tokens = dict(bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).save_pretrained(
        "gpt2"
    )
    code = "\n".join(PYTHON).replace("[[15496, 11, 314, 1101]]", "[[96, 11, 14, 101]]")
    torch.manual_seed(0)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].shape == () and names["output"].logits.shape == (1, 4, 128)
    assert list((tmp_path / "tensorboard_logs").glob("events.*"))
    assert "Hello" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_files_and_flags_that_exist(command):
    words = shlex.split(command.split("&&")[-1])
    if words[:3] == ["python", "-m", "pytest"]:
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists(), script
    text = (ROOT / script).read_text()
    for word in words[words.index(script) + 1 :]:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            assert re.search(rf'"--{name}"|^    {name}: ', text, re.MULTILINE), f"{script} has no {word}"


def test_the_two_first_commands_are_those_that_are_promised():
    block = "pip install -r requirements.txt && python train_gpt_moe.py --preset demo"
    assert README.index(block) < 1500
    assert "pip install -r requirements-dev.txt && python -m pytest" in README
    assert "pip install -r requirements-dev.txt && python -m pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "script", ["train_gpt_moe", "fineweb", "hellaswag", "sample", "checkpoint", "plot_log", "bench", "llmc"]
)
def test_help_of_every_script_works(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out
