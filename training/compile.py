"""torch.compile, block by block (--use_compile)."""

import os
import shutil
import sys
import warnings

import torch
import torch.nn as nn

from mixture_of_experts import MoE
from training.parallel import Layout


def check_compiler(device: torch.device) -> None:
    """ValueError if the compiler that torch.compile needs for this device is not installed."""
    if device.type == "cuda":  # for Triton
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
    if not any(map(shutil.which, names)):
        problem = f"use_compile=True, but torch.compile needs {' or '.join(names)}, and that is not here"
        raise ValueError(f"{problem}; install it, or --use_compile False")


def compile_blocks(model: nn.Module, layout: Layout) -> None:
    """Compile every block in place. All share one graph; to compile the whole model takes four times as long.

    A block is one graph, except where ranks share an MoE layer's parameters: FSDP gathers its router, or
    ranks exchange rows, in the middle of it.
    """
    torch._dynamo.config.optimize_ddp = False  # no cuts at DDP's buckets: it reduces between the blocks
    # Inductor advises TF32. With bfloat16 only the routers' products are fp32, and they must stay exact.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    for block in model.transformer.h:
        whole = not (layout.shares_parameters and isinstance(block.mlp, MoE))
        if layout.parallel == "fsdp":
            block.forward = torch.compile(block.forward, fullgraph=whole)
        else:
            block.compile(fullgraph=whole)
