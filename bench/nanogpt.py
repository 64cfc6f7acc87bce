"""nanoGPT's model, optimizer and training step, from a checkout that the user names.

Reference: train.py and model.py of https://github.com/karpathy/nanoGPT
"""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn


def load_nanogpt(folder: str) -> ModuleType:
    """nanoGPT's model.py, imported under another name than ours. FileNotFoundError if the folder has none."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"nanogpt={folder!r} has no model.py; git clone https://github.com/karpathy/nanoGPT {folder}"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


class NanoGPT:
    """nanoGPT in training. fields: those of its GPTConfig."""

    def __init__(
        self, folder: str, device: torch.device, dtype: str = "float32", compiled: bool = False,
        lr: float = 1e-4, beta2: float = 0.95, **fields,
    ):  # fmt: skip
        nanogpt = load_nanogpt(folder)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
            self.model = nanogpt.GPT(nanogpt.GPTConfig(**fields)).to(device)
            self.optimizer = self.model.configure_optimizers(0.1, lr, (0.9, beta2), device.type)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def step(self, x: torch.Tensor, y: torch.Tensor, lr: float = 1e-4) -> None:
        """One optimizer step on x, y (B, T) each, as nanoGPT's train.py does it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.autocast:
            _, loss = self.forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
