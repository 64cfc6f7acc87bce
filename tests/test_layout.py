"""The project's shape: which file imports which, no side effects of imports."""

import ast
import dataclasses
import functools
import inspect
import re
import subprocess

import pytest
from conftest import ROOT

from model import GPTConfig
from train_gpt_moe import TrainConfig

# Imports point one way: a file or folder may import only itself and what stands left of its <.
ORDER = """tokens layers < mixture_of_experts < huggingface < model < fineweb hellaswag < training < llmc
    < train_gpt_moe < sample plot_log checkpoint bench < analysis"""
PLACES = {name: number for number, names in enumerate(ORDER.split("<")) for name in names.split()}
PATHS = sorted([*ROOT.glob("*.py"), *(path for name in PLACES for path in ROOT.glob(f"{name}/*.py"))])
NAMES = [path.relative_to(ROOT).as_posix() for path in PATHS]
# The main functions of these two scripts may reach further than the rest of the file.
MAIN_MAY_REACH = ("fineweb.py", "hellaswag.py")
# Outermost statements that only define names, and how the other ones that are allowed begin.
DEFINING = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
DEFINING |= ast.AugAssign
ALLOWED = r"if (__name__ == '__main__'|sys.version_info < .*|TYPE_CHECKING|triton is not None):"
ALLOWED += r"|if os.path.abspath\(getattr\(sys.modules\['__main__'\]"
ALLOWED += r"|try:\n    import |\w+\.register_autograd\("


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imported(nodes: list[ast.stmt]) -> set[str]:
    """The files and folders of ours that these statements import."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & PLACES.keys()


def test_imports_point_one_way():
    for name in NAMES:
        place, body = name.split("/")[0].removesuffix(".py"), parsed(name).body
        assert place in PLACES, f"{place} is not in the table of this test"
        if name in MAIN_MAY_REACH:
            body = [node for node in body if getattr(node, "name", "") != "main"]
        wrong = {other for other in imported(body) - {place} if PLACES[other] >= PLACES[place]}
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_every_python_file_has_a_place_and_the_top_level_stays_small():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a checkout of git")
    assert {name for name in tracked.stdout.split() if not name.startswith("tests/")} <= set(NAMES)
    assert sum("/" not in name for name in NAMES) <= 9


def test_no_file_begins_work_when_imported():
    for name in NAMES:
        _docstring, *statements = parsed(name).body
        rest = [ast.unparse(node) for node in statements if not isinstance(node, DEFINING)]
        wrong = [text for text in rest if not re.match(ALLOWED, text)]
        assert not wrong or name.endswith("__main__.py"), f"{name}: {wrong}"


def test_settings_of_the_model_are_settings_of_the_run():
    run = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    set_by_data = {"encoding", "encoding_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    for name in set(inspect.get_annotations(GPTConfig)) - set_by_data:
        assert name in run, f"train_gpt_moe.py has no --{name}"
        if name not in ("vocab_size", "block_size"):  # 0: as the data, as T
            assert run[name] == GPTConfig.__dataclass_fields__[name].default, name
