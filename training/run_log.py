"""What a run writes about itself: log.txt, metrics.jsonl, main.log, TensorBoard events, its first record.

Formats: log.txt has lines `STEP train LOSS`, `STEP val LOSS`, `STEP hella ACC`; metrics.jsonl one JSON object
per line, {"run": {...}} at the start and at each resume, and one per step with all that was measured (null
where it was not finite); main.log llm.c's lines `s:STEP trl:LOSS`, `s:STEP tel:LOSS`, `s:STEP eval:ACC`.
plot_log.py draws them.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers

from tokens.files import sync_folder, write_atomically
from training.checkpoints import list_checkpoints

try:
    import fcntl
    import resource
except ImportError:  # Windows has no such locks, nor such counters
    fcntl = resource = None


# TensorBoard's curves, by what is measured. Training and validation loss share a page.
CURVES = {
    "loss": "loss/train", "val_loss": "loss/val", "balance_loss": "loss/balance", "z_loss": "loss/z",
    "lr": "lr", "norm": "norm", "tok_per_s": "tok_per_s", "mfu": "mfu", "max_load": "max_load",
    "starved": "starved", "router_entropy": "router_entropy",
    "hella_acc_norm": "hellaswag", "hella_acc": "hellaswag_plain", "memory": "memory_gib",
}  # fmt: skip
LLMC_NAMES = {"train": "trl", "val": "tel", "hella": "eval"}  # of main.log


class RunLog:
    """The files of a run, written by the master only: log.txt, metrics.jsonl, main.log, tb/.

    Every line reaches the system at once. On a resume, lines of steps that are about to be done again are
    dropped, and with them a line that a kill has cut, so that no step is missing or doubled. Lines that a
    full disk refuses are kept and written as soon as there is room; the training does not stop for them.
    While it is open the folder is locked; what does not belong to this run is moved aside (set_aside).

    resumed: the checkpoint that the run goes on from, first_step its step; None and 0 for a new run. wandb:
    send TensorBoard's curves, under the same names, to Weights & Biases as well; where that fails, a warning
    is all. again: whether what is measured at first_step is going to be; where it is not, what a finished run
    has measured there stays.
    ValueError if another run has the folder or wandb is not installed, OSError if it cannot be written.
    """

    def __init__(
        self, folder: Path, resumed: Path | None, first_step: int, tensorboard: bool, wandb: bool = False,
        again: bool = True, say: Callable = print,
    ):  # fmt: skip
        self.folder, self.say, self.failing = folder, say, False
        self.drawing: subprocess.Popen | None = None
        if wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb=True, but it is not installed; pip install wandb")
        self.lock, self.writing = claim_folder(folder), threading.Lock()
        aside = set_aside(folder, resumed)
        if aside:
            say(f"moved what an earlier run left in {folder} to {aside}")
        self.files: dict[str, BinaryIO] = {}
        self.unwritten = {name: bytearray() for name in ("log.txt", "metrics.jsonl", "main.log")}
        for name in self.unwritten:
            path = folder / name
            lines = path.read_bytes().splitlines(True) if path.exists() else []
            kept = [line for line in lines if is_kept(line, first_step, again)]
            if kept != lines:
                write_atomically(path, lambda file, kept=kept: file.writelines(kept))
            self.files[name] = open(path, "ab", buffering=0)
        self.wandb: Any = None
        with self._wandb_may_fail():
            self.wandb = start_wandb(folder, resumed is not None) if wandb else None
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=first_step)
            for line in (folder / "metrics.jsonl").read_text().splitlines() if not again else ():
                record = json.loads(line)
                if record.get("step") == first_step:  # what a run that is now made longer measured in the end
                    self._scalars(first_step, record)

    def record(self, values: dict) -> None:
        """One object of metrics.jsonl; what was measured at a step also becomes a point of every curve."""
        self._append("metrics.jsonl", json.dumps(finite(values), allow_nan=False))
        if "step" in values:
            self._scalars(values["step"], values)

    def step(self, record: dict) -> None:
        """What was measured in a training step, in all files."""
        self.record(record)
        self._line(record["step"], "train", record["loss"])

    def measurement(self, step: int, kind: str, value: float) -> None:
        """A line of log.txt, STEP KIND VALUE, and of main.log; its curve gets it with the step's record."""
        self._line(step, kind, value)

    def sample(self, step: int, text: str) -> None:
        """Sampled text, for TensorBoard."""
        with self._tensorboard_may_fail() as board:
            if board is not None:
                board.add_text("sample", "    " + text.replace("\n", "\n    "), step)  # Markdown: as it is
        self._send(step, {"sample": text})

    def experts(self, step: int, load: list[list[float]]) -> None:
        """Every expert's share of the routed rows, by MoE layer, as TensorBoard's histograms (fair = 1)."""
        with self._tensorboard_may_fail() as board:
            for layer, share in enumerate(load):
                fair = len(share) * np.array(share)
                if board is not None and np.isfinite(fair).all():
                    board.add_histogram(f"expert_load/layer_{layer}", fair, step)

    def evaluation(self, step, measured, model, last) -> None:
        """What was measured between two steps, in all files."""
        if text := measured.pop("sample", ""):
            self.sample(step, text)
        for kind, name in (("val", "val_loss"), ("hella", "hella_acc_norm")):
            if name in measured:
                self.measurement(step, kind, measured[name])
        if measured and model is not None and model.moe_layers() and step > 0:
            self.experts(step, expert_load(model)["expert_load"])
        if last and measured:
            self.record({"step": step, "elapsed_s": self.elapsed(), **measured})

    def draw_last(self) -> str:
        """Draw and wait."""
        self.draw()
        self.drawing.wait()
        return f"picture         {self.folder}/training.png"

    def draw(self) -> None:
        """Draw training.png in a process of its own, unless the last one is still at it."""
        if self.drawing is None or self.drawing.poll() is not None:
            command = [sys.executable, str(Path(__file__).parents[1] / "plot_log.py"), str(self.folder)]
            self.drawing = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _line(self, step: int, kind: str, value: float) -> None:
        self._append("log.txt", f"{step} {kind} {value:.6f}")
        self._append("main.log", f"s:{step} {LLMC_NAMES[kind]}:{value:.6f}")

    def _scalars(self, step: int, values: dict) -> None:
        known = {curve: values[name] for name, curve in CURVES.items() if values.get(name) is not None}
        with self._tensorboard_may_fail() as board:
            for curve, value in known.items() if board is not None else ():
                board.add_scalar(curve, value, step)
        self._send(step, known)

    def _send(self, step: int, values: dict) -> None:
        with self._wandb_may_fail():
            if self.wandb is not None:
                self.wandb.log(values, step=step)

    @contextlib.contextmanager
    def _wandb_may_fail(self):
        try:
            yield
        except Exception as error:  # whatever it is (no login, no network), training goes on
            reason = " ".join(str(error).split()) or repr(error)
            self.say(f"WARNING: wandb gets nothing (more) of this run: {reason}; metrics.jsonl has it all")
            self.wandb = None

    @contextlib.contextmanager
    def _tensorboard_may_fail(self):
        try:
            yield self.tensorboard
        except OSError as error:
            self.say(
                f"WARNING: no more TensorBoard events of this run: {error}; metrics.jsonl has everything"
            )
            self.tensorboard = None

    def _append(self, name: str, line: str) -> None:
        with self.writing:
            self.unwritten[name] += line.encode() + b"\n"
            try:
                self._write()
                self.failing = False
            except OSError as error:
                if not self.failing:
                    self.say(
                        f"WARNING: {name} cannot be written: {error}; its lines wait until there is room"
                    )
                self.failing = True

    def _write(self) -> None:
        for name, waiting in self.unwritten.items():
            while waiting:
                written = self.files[name].write(waiting)
                del waiting[:written]

    def sync(self) -> None:
        """Make all lines durable, before a checkpoint that knows of their steps is. OSError if that fails."""
        with self.writing:
            self._write()
        for file in self.files.values():
            os.fsync(file.fileno())
        with self._tensorboard_may_fail() as board:
            if board is not None:
                board.flush()

    def close(self) -> bool:
        """Close all files and let go of the folder. Whether everything could be written."""
        if self.drawing is not None:
            self.drawing.wait()
        with self._wandb_may_fail():
            if self.wandb is not None:
                self.wandb.finish()
        try:
            self.sync()
            with self._tensorboard_may_fail() as board:
                if board is not None:
                    board.close()
            return True
        except OSError as error:
            self.say(f"WARNING: the last lines of the log files could not be written: {error}")
            return False
        finally:
            for file in (*self.files.values(), self.lock):
                file.close()


def start_wandb(folder: Path, resumed: bool):
    """The run of Weights & Biases that belongs to the folder: a new one, or where `resumed` the old one."""
    import wandb

    file, known = folder / "wandb_id", None
    if resumed and file.is_file():
        known = file.read_text().strip()
    run = wandb.init(project="gpt-moe", name=folder.resolve().name, dir=str(folder), id=known, resume="allow")
    write_atomically(file, lambda out: out.write(run.id.encode()))
    return run


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not know: NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_kept(line: bytes, step: int, again: bool = True) -> bool:
    """Whether a line of a log file is whole and of an earlier step (or of no step), or unless it will be
    measured `again`, of an evaluation before this step."""
    if not line.endswith(b"\n"):
        return False
    try:
        if line.startswith(b"s:"):
            number, rest = line[2:].split()
            kind, value = rest.split(b":")
            number, trained = int(number), kind == b"trl"
            float(value)
        elif line.startswith(b"{"):
            record = json.loads(line)
            number = record.get("step", record.get("run", {}).get("first_step", -1))
            trained = "step" not in record or "loss" in record
        else:
            number, kind, value = line.split()
            number, trained = int(number), kind == b"train"
            float(value)
        return number < step + (not again and not trained)
    except (ValueError, TypeError, AttributeError):
        return False


def run_record(config, model, world, first_step: int) -> dict:
    """What a run was: settings, revision of the code, versions, machine; nothing out of the environment."""
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
        "first_step": first_step,
        "git": revision,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "transformers": transformers.__version__, "cuda": torch.version.cuda,
        },
        "device": f"{world.device.type} {device}".strip(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def expert_load(model) -> dict:
    """Of the last optimizer step, all ranks: every MoE layer's shares of routed rows by expert; the largest
    max/mean; the fraction of experts with less than 10% of a fair share, and the entropy of the routing
    probabilities in nats, both means over the layers (the latter NaN before a process's first step)."""
    found = [(moe.last_step_counts(), moe.last_step_entropy()) for moe in model.moe_layers()]
    read = torch.stack([torch.cat((counts.float(), entropy[None])) for counts, entropy in found]).cpu()
    counts, entropy = read[:, :-1].double(), read[:, -1]  # (layers, E), (layers,): in one transfer
    share = counts / counts.sum(1, keepdim=True)
    load = share * share.size(1)
    return {
        "expert_load": share.tolist(), "max_load": load.max().item(),
        "starved": (load < 0.1).double().mean().item(), "router_entropy": entropy.mean().item(),
    }  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the CUDA allocator, elsewhere of this process; 0 where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def claim_folder(folder: Path) -> BinaryIO:
    """Make the folder of a run, lock it for as long as the returned file is open, remove half-written files.

    ValueError if another run holds the lock: two runs in one folder would destroy each other's files. OSError
    if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"log_dir={folder}: another run is writing there; wait for its end, or give another --log_dir"
            ) from None
        except OSError:
            pass  # a network file system without locks
        for temporary in folder.glob(".*.[0-9]*.tmp"):  # of a process that was killed while it wrote
            temporary.unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"log_dir={folder}: cannot write there: {error.strerror}; mend that, or give another --log_dir",
        ) from error
    return lock


def set_aside(folder: Path, resumed: Path | None) -> Path | None:
    """Move what does not belong to this run into a dated folder in `folder`, and say which (None: nothing).

    That is everything an earlier run left; or, where this run goes on from a checkpoint in the folder, the
    newer checkpoints: damaged ones, and those of steps that are about to be done again, perhaps differently.
    """
    checkpoints = [path.resolve() for path in list_checkpoints(folder)]  # newest first
    if resumed is not None and resumed.resolve() in checkpoints:
        found = checkpoints[: checkpoints.index(resumed.resolve())]
        if found:
            write_atomically(folder / "latest", lambda file: file.write(resumed.name.encode()))
    else:
        names = (
            "latest",
            "model_*",
            "log.txt",
            "metrics.jsonl",
            "main.log",
            "tb",
            "training.*",
            "wandb_id",
        )
        found = [path for name in names for path in folder.glob(name)]
    if not found:
        return None
    old, number = folder / time.strftime("old_%Y%m%d-%H%M%S"), 1
    while old.exists():
        number += 1
        old = old.with_name(f"{old.name.split('.')[0]}.{number}")
    old.mkdir()
    for path in found:
        shutil.move(path, old / path.name)
    sync_folder(folder)
    return old
