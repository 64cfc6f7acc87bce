"""Shared by all tests: one thread, no network, and where the development data lies (if it does).

Run everything: python -m pytest
"""

import os
import signal
import sys
from pathlib import Path

# Before torch and transformers are imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

# A shell that starts this in the background has Ctrl-C ignored, and the tests' processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled CPU code on several threads of a busy machine can be a hundred times slower than on one.
torch.set_num_threads(1)

if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED_DATA / "tiktoken_cache").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED_DATA / "tiktoken_cache")


def shared_file(name: str) -> Path:
    """Path of a development data file; skips the calling test where it does not exist."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} of the development data, which is not part of the repository")
    return path


@pytest.fixture
def gpt2_encoding():
    """GPT-2's tiktoken encoding; skips where neither cache nor network has its files."""
    import tiktoken

    shared_file("tiktoken_cache")
    return tiktoken.get_encoding("gpt2")
