"""README's Python examples run as they stand, its commands name files and flags that exist.

Run: python -m pytest tests/test_readme.py
"""

import importlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_hellaswag import make_examples
from test_train import TINY
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
import fineweb
import train_gpt_moe
from tokens.demo import prepare_demo
from tokens.shards import write_shard

README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    text = (ROOT / script).read_text(encoding="utf-8")
    for word in words[words.index(script) + 1 :]:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            assert re.search(rf'"--{name}"|^    {name}: ', text, re.MULTILINE), f"{script} has no {word}"


# Commands that no test can run as they stand, by their beginnings, and why; the files named test what they do
# on local data, or with two processes on the CPU.
LISTED = {
    "python fineweb.py$": "network (FineWeb-Edu); test_fineweb.py",
    "python fineweb.py --source HuggingFaceFW/": "network; test_fineweb.py",
    "torchrun ": "GPUs; test_train.py, test_parallel.py, test_nodes.py",
    "pip install -r requirements-dev.txt": "this is it",
}
RUN = [command for command in COMMANDS if not f"{command}$".startswith(tuple(LISTED))]
SMALL = """--n_layer 1 --n_head 4 --n_embd 32 --num_experts 4 --num_experts_per_tok 2 --T 32 --val_steps 1
    --sample_tokens 4 --prompt Return --use_compile 0 --device cpu --plot 0 --tensorboard 0 --hellaswag 0
    --data_dir data""".split()
SHORT = "--max_steps 3 --warmup_steps 1 --B 4 --total_batch_size 128 --infer_step 2".split()
DENSE = ["--use_moe", "0"]
LLAMA = "--position rope --norm rmsnorm --activation swiglu --bias 0 --tie_word_embeddings 0".split()
SHAPES = {  # of checkpoints that have these formats
    "gpt2": DENSE, "llama": LLAMA + DENSE, "qwen3": [*LLAMA, *DENSE, "--qk_norm", "1"], "mixtral": LLAMA,
    "qwen3_moe": [*LLAMA, "--qk_norm", "1"],
}  # fmt: skip
# What a command gets behind its own flags, so that it is done in a second, offline.
MORE = {
    "train_gpt_moe.py": SHORT,
    "fineweb.py": ["--encoding", "bytes", "--workers", "1"],
    "hellaswag.py": ["--data", "questions.jsonl", "--encoding", "bytes", "--device", "cpu"],
    "sample.py": ["--max_new_tokens", "4", "--device", "cpu"],
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with all that README's commands name: data, a finished run, GPT-2, text, questions."""
    folder = tmp_path_factory.mktemp("workshop")
    prepare_demo(str(folder / "data"))
    text = "".join(
        f"{number} {'The quick brown fox jumps over the lazy dog. ' * 40}\n\n" for number in range(60)
    )
    (folder / "my_text.txt").write_text(text)
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(example) for example in make_examples(3)))
    (folder / "gpt2_data").mkdir()
    for split in ("train", "val"):
        write_shard(folder / "gpt2_data" / f"{split}_000000.bin", np.arange(4000, dtype=np.uint16))
    config = GPT2Config(n_layer=1, n_head=4, n_embd=32, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    make_run(folder, [])
    return folder


def make_run(folder, shape: list[str]) -> None:
    """Checkpoints log/model_05000.pt and log/model_19073.pt of a run of two steps."""
    flags = [*SMALL, *shape, *SHORT, "--max_steps", "2", "--log_dir", str(folder / "log")]
    assert train_gpt_moe.main([*flags, "--data_dir", str(folder / "data")]) == 0
    for step in ("05000", "19073"):
        shutil.copy(folder / "log" / "model_00002.pt", folder / "log" / f"model_{step}.pt")
    sharded = folder / "log" / "model_19073"
    assert checkpoint.main(["convert", str(folder / "log" / "model_19073.pt"), str(sharded)]) == 0


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command, workshop, tmp_path, monkeypatch, capsys):
    """Every one of them, in a copy of the workshop: as it stands, but for smaller sizes and local files."""
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.split("&&")[-1])
    script, flags = words[1], words[2:]
    before, after = SMALL if script == "train_gpt_moe.py" else [], MORE.get(script, [])
    for made in {"my_data", "my_bytes"} & set(flags):  # by the command that README has before it
        making = ["--source", "my_text.txt", "--out", made, "--val_tokens", "20000"]
        assert script == "fineweb.py" or fineweb.main([*making, *MORE["fineweb.py"]]) == 0
    if "--format" in flags:
        make_run(tmp_path, SHAPES[flags[flags.index("--format") + 1]])
    if "convert" in flags:
        (tmp_path / words[-1]).unlink()
    if "--preset" in flags:
        before, after = [], [word for word in SMALL if word not in ("--data_dir", "data")] + SHORT
    if "--resume" in flags:  # sizes are those of the checkpoint
        before, after = ["--plot", "0"], ["--max_steps", "4"]
        for path in (tmp_path / "log").glob("model_*.pt"):  # a run that went on for as long as the name says
            if path.name not in (words[-1], "model_05000.pt"):
                path.unlink()
    if "--init_from" in flags:  # sizes are GPT-2's, and so are the tokens
        before = [*SMALL[SMALL.index("--T") :], "--data_dir", "gpt2_data", "--sample_every", "0"]
    main = importlib.import_module(script.removesuffix(".py")).main
    assert main([*before, *flags, *after]) == 0, capsys.readouterr().err


def test_what_is_listed_is_there():
    assert all(any(f"{command}$".startswith(known) for command in COMMANDS) for known in LISTED)
    assert len(RUN) >= 12


def test_file_map_has_every_file_and_its_length():
    found = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*.py")}
    assert found.keys() == lengths.keys()
    wrong = {name: n for name, n in lengths.items() if abs(int(found[name]) - n) > 0.1 * n + 5}
    assert not wrong, f"README's file map: these have so many lines now: {wrong}"


def test_the_picture_is_there_and_small():
    (path,) = re.findall(r"!\[.*?\]\((assets/\S+\.png)\)", README)
    assert (ROOT / path).stat().st_size < 200_000
    with Image.open(ROOT / path) as image:
        assert image.format == "PNG" and image.width >= 1000


def test_the_two_first_commands_are_those_that_are_promised():
    block = "pip install -r requirements.txt && python train_gpt_moe.py --preset demo"
    assert README.index(block) < 1500
    assert "pip install -r requirements-dev.txt && python -m pytest" in README
    assert "pip install -r requirements-dev.txt && python -m pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "script",
    ["train_gpt_moe", "fineweb", "hellaswag", "sample", "checkpoint", "plot_log", "bench.__main__", "llmc"],
)
def test_help_of_every_script_works(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out
