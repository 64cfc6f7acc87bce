"""The device of the tests, one thread, and what some of them need of this machine."""

import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton, if installed, runs its kernels on the CPU

# Compiled CPU code on several threads of a busy machine can be a hundred times slower than on one.
torch.set_num_threads(1)

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU with Triton's interpreter
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on a CPU"
)
