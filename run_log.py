"""What a run writes about itself: log.txt, metrics.jsonl, TensorBoard events, and the record it begins with.

Formats: log.txt has lines `STEP train LOSS`, `STEP val LOSS`, `STEP hella ACC`; metrics.jsonl one JSON object
per line, first {"run": {...}} and then one per step with all that was measured. plot_log.py draws them.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from checkpoint import write_atomically


class RunLog:
    """The files of a run, written by the master only: log.txt, metrics.jsonl, tb/.

    Every line is flushed at once. On a resume, lines of steps that are about to be done again are dropped, so
    that no step is missing or doubled.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool):
        self.files = {}
        for name in ("log.txt", "metrics.jsonl"):
            path = folder / name
            if path.exists():
                kept = [line for line in path.read_text().splitlines(True) if is_before(line, first_step)]
                write_atomically(path, lambda file, kept=kept: file.write("".join(kept).encode()))
            self.files[name] = open(path, "a", buffering=1)
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=first_step)

    def record(self, values: dict) -> None:
        """One object of metrics.jsonl."""
        self.files["metrics.jsonl"].write(json.dumps(values) + "\n")

    def event(self, step: int, kind: str, value: float) -> None:
        """One line of log.txt: STEP KIND VALUE."""
        self.files["log.txt"].write(f"{step} {kind} {value:.6f}\n")

    def scalars(self, step: int, **values: float | None) -> None:
        """TensorBoard curves; a double underscore in a name stands for its slash."""
        for name, value in values.items():
            if self.tensorboard is not None and value is not None:
                self.tensorboard.add_scalar(name.replace("__", "/"), value, step)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def is_before(line: str, step: int) -> bool:
    """Whether a line of log.txt or metrics.jsonl is whole and of an earlier step (or of no step)."""
    if not line.endswith("\n"):
        return False
    try:
        return (json.loads(line).get("step", -1) if line.startswith("{") else int(line.split()[0])) < step
    except (ValueError, IndexError):
        return False


def run_record(config, model, world) -> dict:
    """What a run was: resolved settings, revision of the code, versions, machine."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor()
    return {
        "config": dataclasses.asdict(config) | {"vocab_size": model.config.vocab_size},
        "model": model.config.to_diff_dict(),
        "parameters": model.get_num_params(False),
        "active_parameters": model.get_num_active_params(),
        "world_size": world.size,
        "git": revision,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "transformers": transformers.__version__, "cuda": torch.version.cuda,
        },
        "device": f"{world.device.type} {device}".strip(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def set_aside(folder: Path) -> Path | None:
    """Move what an earlier run left in the folder into a dated one in it, and say which (None: nothing)."""
    found = [path for name in ("log.txt", "metrics.jsonl", "tb", "latest", "model_*.pt", "training.*")
             for path in folder.glob(name)]  # fmt: skip
    if not found:
        return None
    old = folder / time.strftime("old_%Y%m%d-%H%M%S")
    old.mkdir()
    for path in found:
        shutil.move(path, old / path.name)
    return old
