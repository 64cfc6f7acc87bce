"""torch.compile, block by block.

Used by train_gpt_moe.py with use_compile=True.
"""

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
        raise ValueError(
            f"use_compile=True, but torch.compile needs {' or '.join(names)}, and that is not here; install "
            "it, or --use_compile False"
        )


def compile_blocks(model: nn.Module, layout: Layout) -> None:
    """Compile every block in place. All blocks share one graph; to compile the model as a whole takes four
    times as long.

    A block is one graph, except where ranks share an MoE layer's parameters: FSDP gathers its router, or
    ranks exchange rows, in the middle of it. Dynamo would cut graphs at DDP's buckets; blocks need no cut,
    because DDP reduces gradients between their backward passes.
    """
    torch._dynamo.config.optimize_ddp = False
    # Inductor advises TF32. With bfloat16 only the routers' products are fp32, and they must stay exact.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    for block in model.transformer.h:
        whole = not (layout.shares_parameters and isinstance(block.mlp, MoE))
        if layout.parallel == "fsdp":
            block.forward = torch.compile(block.forward, fullgraph=whole)
        else:
            block.compile(fullgraph=whole)
