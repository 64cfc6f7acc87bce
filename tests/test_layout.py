"""The project's shape: which file imports which, no side effects of imports, lengths, docstrings.

Run: python -m pytest tests/test_layout.py
"""

import ast
import inspect
import subprocess
import sys

import pytest
from conftest import ROOT

# Imports point one way: a file may import only what stands behind it here.
MAY_IMPORT = {
    "attention": set(),
    "shards": set(),
    "sources": set(),
    "fineweb": {"shards", "sources"},
    "experts": set(),
    "mixture_of_experts": {"experts"},
    "plot_log": set(),
    "flags": set(),
    "progress": set(),
    "convert_llama": set(),
    "convert": {"convert_llama"},
    "callbacks": {"mixture_of_experts"},
    "expert_parallel": {"experts"},
    "watch": set(),
    "parallel": {"expert_parallel", "experts", "mixture_of_experts", "watch"},
    "muon": {"experts"},
    "linear_cross_entropy": set(),
    "gpt_config": set(),
    "model": {
        "attention", "callbacks", "convert", "experts", "gpt_config", "linear_cross_entropy",
        "mixture_of_experts",
    },
    "hellaswag": {"model", "checkpoint", "parallel"},  # inside main only
    "archives": set(),
    "sharded": {"archives", "experts", "parallel"},
    "upcycle": {"mixture_of_experts", "model"},
    "checkpoint": {"archives", "model", "convert", "sharded", "upcycle"},
    "run_log": {"archives", "checkpoint"},
    "preflight": {"experts", "linear_cross_entropy", "model"},
    "prepare": {"attention", "checkpoint", "fineweb", "model", "muon", "parallel"},
    "faults": {"checkpoint", "parallel", "run_log"},
    "sample": {"model", "fineweb", "checkpoint", "parallel"},
    "llmc": {"archives", "model", "fineweb", "checkpoint"},
    "measure": {"attention"},
    "ladder": {"attention", "fineweb", "measure", "model", "muon"},
    "recipes": {"fineweb", "measure", "mixture_of_experts", "prepare", "train_gpt_moe"},
    "traffic": {"model", "preflight"},
    "scaling": {"experts", "measure", "model", "parallel", "traffic"},
    "bench": {
        "checkpoint", "experts", "fineweb", "hellaswag", "ladder", "linear_cross_entropy", "measure",
        "mixture_of_experts", "model", "muon", "parallel", "recipes", "run_log", "scaling",
        "train_gpt_moe",
    },
    "evaluation": {"convert", "faults", "fineweb", "hellaswag", "model"},
    "train_gpt_moe": {
        "attention", "checkpoint", "evaluation", "faults", "fineweb", "flags", "hellaswag", "llmc",
        "mixture_of_experts", "model", "muon", "parallel", "plot_log", "preflight", "prepare", "progress",
        "run_log",
    },
}  # fmt: skip
FILES = sorted(path.stem for path in ROOT.glob("*.py"))


def imported_modules(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    ours = imported_modules(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))) & set(FILES)
    assert name in MAY_IMPORT, f"{name}.py is not in the table of this test"
    assert ours <= MAY_IMPORT[name], f"{name}.py imports {ours - MAY_IMPORT[name]}"


def test_hellaswag_imports_the_model_only_in_main():
    tree = ast.parse((ROOT / "hellaswag.py").read_text(encoding="utf-8"))
    outside = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    assert not imported_modules(ast.Module(outside, [])) & set(FILES)


def test_no_file_begins_work_when_imported():
    """Importing all of them prints nothing, starts no process group and writes no file."""
    code = "import sys; sys.path.insert(0, '.')\n" + "".join(f"import {name}\n" for name in FILES)
    code += "import torch.distributed as dist; assert not dist.is_initialized()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("name", FILES)
def test_public_names_have_docstrings(name):
    """Every public module, class, function and method says what it does."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name}.py has no docstring"
    missing = []

    def look(node, prefix=""):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
                plumbing = child.name in ("forward", "setup_context", "backward") or child.decorator_list
                if not ast.get_docstring(child) and not (isinstance(child, ast.FunctionDef) and plumbing):
                    missing.append(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    look(child, f"{child.name}.")

    look(tree)
    assert not missing, f"{name}.py: no docstring for {', '.join(missing)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/test_*.py")), ids=lambda path: path.stem)
def test_every_test_file_opens_with_its_command(path):
    assert f"python -m pytest tests/{path.name}" in (
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    )


def test_settings_of_the_model_are_settings_of_the_run():
    """Every field of GPTConfig is a flag of train_gpt_moe.py with the same default, but for derived ones."""
    import dataclasses

    from model import GPTConfig
    from train_gpt_moe import TrainConfig

    run = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    set_by_data = {"encoding", "encoding_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    for name in set(inspect.get_annotations(GPTConfig)) - set_by_data:
        assert name in run, f"train_gpt_moe.py has no --{name}"
        if name not in ("vocab_size", "block_size"):  # 0: as the data, as T
            assert run[name] == GPTConfig.__dataclass_fields__[name].default, name
