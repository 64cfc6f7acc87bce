"""README.md and docs/: commands and Python examples run, links lead to files, tables are whole. The everyday
suite runs one command of each script and module; with -m slow come all the others."""

import csv
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, slow
from models import NANOGPT, make_examples
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
import fineweb
import train_gpt_moe
from tokens.shards import write_shard

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
# A command is an indented line up to its comment, or a piece of code within a sentence or table.
PROGRAM = r"(?:python3?|torchrun|pip|sbatch|lm_eval|[A-Z]+=\S+) .*?"
COMMANDS = list(dict.fromkeys(
    indented or inline
    for indented, inline in re.findall(rf"^    ({PROGRAM})(?:  +#.*)?$|`({PROGRAM})`", TEXT, re.MULTILINE)
))  # fmt: skip

# Beginnings of the commands that no test here runs, by what they need, or by the test of the same thing.
LISTED = {
    "network": ['pip install "', "pip install lm_eval", "pip install trl", "pip install sentencepiece",
                "pip install torchao", "pip install -r requirements.txt$", "python fineweb.py --source tiny"],
    "another program": ["lm_eval ", "python3 -m venv"],
    "GPUs": ["torchrun ", "RANK=", "sbatch ", "python tests/rehearsal", "python -m bench gpu"],
    "minutes": ["python tests/torture.py", "python tests/fuzz.py", "python -m pytest",
                "pip install -r requirements-dev.txt"],
    "test_fineweb.py": ["python fineweb.py$", "python fineweb.py --source HuggingFaceFW/"],
    "test_sources.py": ["python fineweb.py --source FILE"],
    "test_identity.py": ["python fineweb.py --verify"],
    "test_sample.py": ["python sample.py --checkpoint log/latest --interactive"],
    "test_evaluation.py": ["python train_gpt_moe.py --data_dir web:"],
    "test_documents.py": ["python train_gpt_moe.py --align"],
    "test_log.py": [f"python train_gpt_moe.py --preset demo --{flag}" for flag in ("profile", "wandb")],
    "test_nanogpt.py": ["python sample.py --checkpoint out/", "python train_gpt_moe.py --resume out/",
                        "python train_gpt_moe.py --init_from out/"],
    "test_printed.py": ["python -m llmc --help", "python -m bench --help", "python -m analysis --help"],
    "test_sweep.py": ["python -m analysis sweep"], "test_compare.py": ["python -m analysis compare"],
    "no command, but the name of a program": ["python -m bench$"],
}  # fmt: skip
BEGINNINGS = [beginning for some in LISTED.values() for beginning in some]
RUN = [command for command in COMMANDS if not f"{command}$".startswith(tuple(BEGINNINGS))]


def split(command: str) -> tuple[str, list[str]]:
    """What a command starts (a script, a module, or -c), and the words after it."""
    words = shlex.split(command.split("&&")[-1])
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


# Of each script and module, the everyday suite runs the first command; of bench, the first `train`.
FAST = {split(c)[0]: c for c in reversed(RUN) if split(c)[0] != "bench" or split(c)[1][0] == "train"}.values()
SMALL = """--n_layer 1 --moe_every 1 --n_head 4 --n_embd 32 --num_experts 4 --num_experts_per_tok 2 --T 32
    --val_steps 1 --sample_tokens 4 --prompt Return --use_compile 0 --device cpu --plot 0 --tensorboard 0
    --hellaswag 0 --data_dir data""".split()
SHORT = "--max_steps 3 --warmup_steps 1 --B 4 --total_batch_size 128 --infer_step 2".split()
DENSE = ["--use_moe", "0"]
LLAMA = "--position rope --norm rmsnorm --activation swiglu --bias 0 --tie_word_embeddings 0".split()
SHAPES = {  # of checkpoints that have these formats
    "gpt2": DENSE, "llama": LLAMA + DENSE, "qwen3": [*LLAMA, *DENSE, "--qk_norm", "1"], "mixtral": LLAMA,
    "qwen3_moe": [*LLAMA, "--qk_norm", "1"],
}  # fmt: skip
# What a command gets behind its own flags, so that it is done in a second or a few, offline.
MORE = {
    "fineweb.py": "--encoding bytes --workers 1", "sample.py": "--max_new_tokens 4 --device cpu",
    "hellaswag.py": "--data questions.jsonl --encoding bytes --device cpu", "state": "--B 1 --T 16",
    "moe": "--rounds 1 --tokens 64 --compile 0", "head": "--rounds 1 --tokens 16",
    "train": "--rounds 1 --size d4 --B 1 --T 8 --vocab_size 64 --compile 0",
    "ladder": "--rounds 1", "loop": "--rounds 1 --B 1 --T 16",
    "checkpoint": "--rounds 1 --size d4", "hellaswag": "--rounds 1 --size d4 --limit 1",
    "routing": "--tokens 512 --drop_tokens 128 --device cpu",
    "time_to_loss": "--seconds 1", "moe_pays": "--steps 2 --seeds 1",
    "scale": "--size d4 --ranks 1,8 --micro_ms 1 --B 1 --T 16",
}  # fmt: skip


def make_run(folder: Path, shape: list[str]) -> None:
    """Checkpoints log/model_05000.pt and log/model_19073.pt of a run of two steps."""
    flags = [*SMALL, *shape, *SHORT, "--max_steps", "2", "--log_dir", str(folder / "log")]
    assert train_gpt_moe.main([*flags, "--data_dir", str(folder / "data")]) == 0
    for step in ("05000", "19073"):
        shutil.copy(folder / "log" / "model_00002.pt", folder / "log" / f"model_{step}.pt")
    (folder / "log" / "best").write_text("model_19073.pt")
    (folder / "prompt.txt").write_text("Return")
    sharded = folder / "log" / "model_19073"
    assert checkpoint.main(["convert", str(folder / "log" / "model_19073.pt"), str(sharded)]) == 0


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    """A folder with all that the pages name: data, a finished run, GPT-2, nanoGPT, texts, questions."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(data, folder / "data")
    shutil.copy(folder / "data" / "train_000000.bin", folder / "shard.bin")
    line = "The quick brown fox jumps over the lazy dog. " * 40
    text = "".join(f"{number} {line}\n\n" for number in range(60))
    for name in ("my_text.txt", "tinyshakespeare.txt", "hellaswag.txt"):
        (folder / name).write_text(text)
    for name in ("questions.jsonl", "hellaswag_val.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, make_examples(3))))
    for name in ("gpt2_data", "nanoGPT"):
        (folder / name).mkdir()
    (folder / "nanoGPT" / "model.py").write_text(NANOGPT)
    for part in ("train", "val"):
        write_shard(folder / "gpt2_data" / f"{part}_000000.bin", np.arange(4000, dtype=np.uint16))
    config = GPT2Config(n_layer=1, n_head=4, n_embd=32, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    make_run(folder, [])
    return folder


@pytest.fixture
def workshop(made, tmp_path, monkeypatch, short_demo) -> Path:
    """The current folder: a copy of `made`, in which a command may do as it likes."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_module(module: str, flags: list[str], monkeypatch) -> int:
    """The exit code of `python -m module flags`."""
    monkeypatch.setattr(sys, "argv", [module, *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    return end.value.code


def run_training(flags: list[str]) -> int:
    """The exit code of train_gpt_moe.py with these flags and small sizes, in the workshop."""
    before, after = SMALL, SHORT
    if "--preset" in flags and "--data_dir" not in flags:  # the demo has data of its own
        before, after = [], [word for word in SMALL if word not in ("--data_dir", "data")] + SHORT
    if "--resume" in flags:  # sizes are those of the checkpoint
        before, after = ["--plot", "0"], ["--max_steps", "4"]
        for path in Path("log").glob("model_*.pt"):  # a run that went on for as long as the name says
            if path.name not in (flags[-1], "model_05000.pt"):
                path.unlink()
    if "--init_from" in flags:  # sizes are GPT-2's, and so are the tokens
        before = [*SMALL[SMALL.index("--T") :], "--data_dir", "gpt2_data", "--sample_every", "0"]
    return train_gpt_moe.main([*before, *flags, *after])


@pytest.mark.parametrize("command", [*FAST, *slow(*(command for command in RUN if command not in FAST))])
def test_commands_run(command, workshop, monkeypatch, capsys, request):
    """Each command runs as it stands, but for smaller sizes and local files."""
    script, flags = split(command)
    for folder in {"my_data", "my_bytes"} & set(flags):  # by the command that README has before it
        making = f"--source my_text.txt --out {folder} --val_tokens 20000 {MORE['fineweb.py']}"
        assert script == "fineweb.py" or fineweb.main(making.split()) == 0
    if "--format" in flags:
        make_run(workshop, SHAPES[flags[flags.index("--format") + 1]])
    if "convert" in flags:
        Path(flags[-1]).unlink()
    if script == "llmc":
        make_run(workshop, DENSE)
        if "import" in flags:
            export = "export --checkpoint log/model_19073.pt --out .".split()
            assert run_module("llmc", export, monkeypatch) == 0
            Path("gpt2_d1.bin").rename("model_00001000.bin")
    monkeypatch.setattr("bench.recipes.WINDOWS", 8)  # with which time_to_loss validates
    if script == "bench" and flags[0] == "hellaswag":
        request.getfixturevalue("gpt2_encoding")

    code, more = 0, MORE.get(script if script.endswith(".py") else flags[0], "").split()
    if script == "-c":
        exec(flags[0], {})
    elif script == "train_gpt_moe.py":
        code = run_training(flags)
    else:
        code = run_module(script.removesuffix(".py"), [*flags, *more], monkeypatch)
    assert code == 0, capsys.readouterr().err


def test_python_examples_run_in_order(workshop, capsys, own_modules):
    """All of them, one after the other as a reader would. "gpt2" is a small model of random weights here."""
    assert checkpoint.main(["export", "log/model_19073.pt", "my_model"]) == 0
    names = {}
    exec(compile("\n".join(PYTHON), "docs", "exec"), names)
    assert names["loss"].shape == () and names["output"].logits.shape == (1, 4, 50257)
    assert list(Path("tensorboard_logs").glob("events.*"))
    assert "Hello" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RUN and re.search(r"\.(py|slurm)\b", c)])
def test_listed_commands_name_files_and_flags_that_exist(command):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".slurm")))
    source, flags = (ROOT / words[place]).read_text(encoding="utf-8"), words[place + 1 :]
    if words[place] in ("train_gpt_moe.py", "train.slurm"):
        train_gpt_moe.parse_config(flags)
    elif "pytest" not in words:
        for name in (word[2:] for word in flags if word.startswith("--")):
            assert re.search(rf'"--{name}"|^    {name}: ', source, re.MULTILINE), f"there is no --{name}"


def test_what_is_listed_and_the_two_first_commands_are_there():
    assert all(any(f"{command}$".startswith(known) for command in COMMANDS) for known in BEGINNINGS)
    assert all(list((ROOT / "tests").rglob(name)) for name in LISTED if name.endswith(".py"))
    assert len(RUN) >= 12
    block = "pip install -r requirements.txt && python train_gpt_moe.py --preset demo"
    assert README.index(block) < 1500
    for text in (README, (ROOT / ".ci" / "run").read_text()):
        assert "pip install -r requirements-dev.txt && python -m pytest" in text


def test_pip_lines_have_the_limits_of_the_requirements():
    """A package of requirements*.txt stands in quotes, as it stands there."""
    pages = "\n".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    limits = dict(re.findall(r"^(\w+)([<>=][^\s#]*)", pages, re.MULTILINE))
    found = re.findall(r'pip install "?(\w+)([^\s"]*)', TEXT + pages)
    assert {"torch", "accelerate"} <= limits.keys() & dict(found).keys()
    assert all(limits.get(name, wanted) == wanted for name, wanted in found), found
    assert f'pip install "torch{limits["torch"]}" --index-url' in README


def test_readme_is_short_and_counts_the_lines_of_the_reading_path():
    assert len(README.splitlines()) <= 170
    found = dict(re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", README, re.MULTILINE))
    assert len(found) == 6
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in found}
    wrong = {name: n for name, n in lengths.items() if abs(int(found[name]) - n) > 0.1 * n}
    assert not wrong, f"README's reading path: these files have so many lines now: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert all((page.parent / link).exists() for link in links), links


def test_the_picture_is_there_and_small():
    (path,) = re.findall(r"!\[.*?\]\((assets/\S+\.png)\)", README)
    assert (ROOT / path).stat().st_size < 200_000
    with Image.open(ROOT / path) as image:
        assert image.format == "PNG" and image.width >= 1000


def test_tables_of_measurements_are_whole_and_named():
    paths = sorted(ROOT.glob("docs/measurements/*.csv"))
    assert paths
    for path in paths:
        assert f"measurements/{path.name}" in TEXT, path.name
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert rows and all(len(row) == len(header) for row in rows), path.name
