"""Shared by all tests: one thread, no network, fixed random numbers, data and a finished run, and where the
development data lies (if it does).

Run: python -m pytest            # everyday, some minutes
     python -m pytest tests/test_model.py    # one file
     python -m pytest -m slow    # the rest: restarts, launchers, four ranks, compilers, all README commands
"""

import atexit
import contextlib
import csv
import gc
import itertools
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

# Before torch and transformers are imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # rounding depends on it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MALLOC_TOP_PAD_", "131072")  # malloc's default; so no run changes it for later tests

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

# A shell that starts this in the background has SIGINT and SIGQUIT ignored; processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it

atexit.register(gc.unfreeze)  # so Python frees at its end what little_to_collect, below, has frozen

# multiprocessing's servers have a socket there, whose path may have 107 characters.
if len(tempfile.gettempdir()) > 50 and multiprocessing.parent_process() is None:
    short_folder = tempfile.TemporaryDirectory(dir="/tmp")
    multiprocessing.current_process()._config["tempdir"] = short_folder.name

if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED_DATA / "tiktoken_cache").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED_DATA / "tiktoken_cache")


def shared_file(name: str) -> Path:
    """Path of a development data file; skips the calling test where it does not exist."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} of the development data, which is not part of the repository")
    return path


def slow(*values) -> list:
    """Values of a test's parameter that only `python -m pytest -m slow` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def pytest_collectstart():
    """Before the first test file is imported. The process of xdist that hands out tests collects none, so the
    others need not wait until it has imported torch."""
    import devices  # noqa: F401 (it sets a variable that Triton reads when it is imported)
    from hypothesis import HealthCheck, settings

    # The same examples every time, however slow the machine is.
    calm = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=calm)
    settings.load_profile("same")


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """A run calls gc.collect() several times. With all modules that the tests import, a call takes 0.3 s. So
    this freezes the objects that exist before a test file. The file's runs must not unfreeze them."""
    from training import faults

    gc.collect()
    gc.freeze()
    collector = SimpleNamespace(**vars(gc) | dict.fromkeys(("freeze", "unfreeze"), lambda: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "gc", collector)
        yield


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """A folder with shards of bytes."""
    from processes import write_data

    return write_data(tmp_path_factory.mktemp("data") / "bytes")


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory) -> Path:
    """The log folder of an undisturbed run with processes.flags, to be read only; beside it `printed`."""
    from processes import flags

    import train_gpt_moe

    folder, secret = tmp_path_factory.mktemp("straight"), pytest.MonkeyPatch.context()
    with open(folder / "printed", "w") as file, contextlib.redirect_stdout(file), secret as patch:
        patch.setenv("HF_TOKEN", "hf_secret_value_of_the_test")  # which no file may hold
        assert train_gpt_moe.main(flags(data, folder / "log")) == 0
    return folder / "log"


def refuses(words: str, call: Callable, *arguments, error=ValueError, **named) -> str:
    """call(*arguments, **named) must raise this error. Returns its message, which must match `words`."""
    with pytest.raises(error, match=words) as raised:
        call(*arguments, **named)
    return str(raised.value)


def note_reads(monkeypatch, files: str = "") -> list[str]:
    """A list of the files that call what would copy numbers from a GPU; those that the pattern finds."""
    import torch
    from processes import at_call

    reads = []

    def note(*args):
        place = sys._getframe(2).f_code.co_filename
        reads.extend([place] if re.search(files, place) else [])

    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        at_call(monkeypatch, torch.Tensor, name, range(10**6), note)
    return reads


@pytest.fixture
def refused(capsys):
    """Function that runs a command's main, which must end with code 2 and one line; returns the line."""

    def run(main, *arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.fixture
def rows_of(tmp_path):
    """Function that runs a command's main, which must succeed, with --csv; returns the rows of that table."""

    def run(main, *arguments) -> list[dict[str, str]]:
        path = tmp_path / "rows.csv"
        assert main([*map(str, arguments), "--csv", str(path)]) == 0
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))

    return run


@pytest.fixture
def short_demo(monkeypatch):
    """The demo corpus is made of its first documents only, as all of them take seconds."""
    from tokens import demo

    documents = demo.demo_documents
    monkeypatch.setattr(demo, "demo_documents", lambda: itertools.islice(documents(), 30))


@pytest.fixture
def gpt2_encoding():
    """GPT-2's tiktoken encoding; skips where neither cache nor network has its files."""
    import tiktoken

    shared_file("tiktoken_cache")
    return tiktoken.get_encoding("gpt2")


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A folder of its own for the code of exported models; Python must not keep another one's package."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    others = [folder for folder in sys.path if os.path.isdir(os.path.join(folder, "transformers_modules"))]
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in others])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    forget()
    yield
    forget()
