"""The files that a run writes about itself: log.txt, metrics.jsonl, main.log, TensorBoard's events in tb/.

docs/formats.md describes the files. training/metrics.py says which number goes where. plot_log.py draws."""

import dataclasses
import errno
import importlib.util
import json
import math
import operator
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from torch.utils._pytree import tree_map

from layers.usage import STARVED_BELOW
from tokens.files import remove_temporaries, sync_folder, write_atomically
from training.checkpoints import best_checkpoint, list_checkpoints
from training.metrics import BY_LAYER, METRICS, PARTS

try:
    import fcntl
    import resource
except ImportError:  # Windows does not have them
    fcntl = resource = None
PLOT_LOG = Path(__file__).parents[1] / "plot_log.py"
LOG_FILES = ("log.txt", "metrics.jsonl", "main.log")
NAMES = "|".join(map(re.escape, (*LOG_FILES, "run.json", "latest", "best", "wandb_id")))
# What a new run in the same folder moves away.
RUN_FILES = re.compile(rf"{NAMES}|model_\d{{5,}}\.pt|training\.(png|svg|pdf)|profile_\d+_\d+\.json")
RUN_FOLDERS = re.compile(r"tb|model_\d{5,}")
WORDS = sorted({word for metric in METRICS for word in (metric.log_word, metric.llmc_word) if word})
# A line of log.txt, "STEP train LOSS", or of main.log, "s:STEP trl:LOSS".
LOG_LINE = re.compile(rf"(?:s:)?(\d{{1,18}})[ :]({'|'.join(WORDS)})[ :](?:-?\d+\.\d+|nan|-?inf)\s*")


class RunLog:
    """The files of a run, on the master rank alone. The folder stays locked until close().
    If the disk is full, lines wait in memory until there is space. Files of an earlier run move into a folder
    old_DATE. A run that continues the checkpoint `resumed` drops the lines from first_step on, but not those
    of the evaluation there if evaluates_first is False. wandb: the project in Weights & Biases, "" for none.
    record: the run_record. ValueError: another run uses the folder, no wandb. OSError: writing fails."""

    def __init__(self, folder: Path, resumed: Path | None, first_step: int, tensorboard: bool,
                 wandb: str = "", evaluates_first: bool = True, say: Callable = print,
                 record: dict | None = None):  # fmt: skip
        self.folder, self.say = folder, say
        self.drawing: subprocess.Popen | None = None
        if wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb=True, but it is not installed; pip install wandb")
        self.lock = claim_folder(folder)
        if moved_to := move_old_files(folder, resumed):
            say(f"moved the files of an earlier run in {folder} to {moved_to}")
        self.files: dict[str, BinaryIO] = {}
        self.unwritten = {name: bytearray() for name in LOG_FILES}
        self.writing = threading.Lock()  # the thread that saves checkpoints also calls sync()
        self.lost = False  # whether files had to be written again, because the folder was deleted
        for path in (folder / "latest", folder / "best", folder / "run.json"):
            if path.is_dir():
                raise FileExistsError(errno.EEXIST, "it is a folder; move it away", str(path))
        for name in LOG_FILES:
            open_own(folder / name).close()  # an error for a link or a pipe, before anything reads it
        # What the run will not measure again, for the row of first_step.
        self.measured = {} if evaluates_first else read_evaluation(folder / "metrics.jsonl", first_step)
        for name in LOG_FILES:
            drop_repeated_lines(folder / name, first_step, evaluates_first)
            self.files[name] = open_own(folder / name)
        rows = (folder / "metrics.jsonl").read_bytes().splitlines()
        self.elapsed_s = read_record(rows[-1]).get("elapsed_s", 0.0) if rows else 0.0
        settings = (record or {}).get("config", {})
        if record:
            write_run_file(folder / "run.json", record, resumes=resumed is not None)
        self.wandb: Any = None
        if wandb:
            self.wandb = self._try_wandb(start_wandb, folder, resumed is not None, wandb, settings)
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

            threading.excepthook = print_thread_error
            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=first_step)
            if settings and resumed is None:
                table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
                self._tensorboard("add_text", "settings", f"| setting | value |\n|---|---|\n{table}", 0)
                plain = {k: v for k, v in settings.items() if isinstance(v, (bool, int, float, str))}
                for summary in hparams(plain, {"loss/val": 0}):
                    self._tensorboard("file_writer.add_summary", summary)

    def record(self, values: dict) -> None:
        """Write a step's row of metrics.jsonl; its numbers also go to the curves."""
        values, self.measured = self.measured | values, {}
        self._append("metrics.jsonl", json.dumps(json_safe(values), allow_nan=False))
        self._add_points(values)

    def step(self, record: dict) -> None:
        """Write the record of a training step into all files."""
        self.record(record)
        self.measurement(record["step"], "train", record["loss"])

    def evaluation(self, step: int, measured: dict, expert_load: list | None = None,
                   elapsed_s: float | None = None) -> None:  # fmt: skip
        """Write what was measured between two steps: numbers, and perhaps a "sample", which it pops.
        expert_load (MoE layers, E): rows of each expert. elapsed_s: given only after the last step, and the
        numbers then join the row of that step. At other steps the caller records them."""
        if sample := measured.pop("sample", ""):
            markdown = "    " + sample.replace("\n", "\n    ")  # four spaces: Markdown leaves it as it is
            self._tensorboard("add_text", "sample", markdown, step)
            self._send(step, {"sample": sample})
        for metric in METRICS:
            if metric.evaluated and metric.log_word and metric.name in measured:
                self.measurement(step, metric.log_word, measured[metric.name])
        if measured and expert_load and np.isfinite(expert_load).all():
            fair = np.array(expert_load) / np.mean(expert_load, axis=1, keepdims=True)  # in fair shares
            picture = (255 * np.clip(fair / 2, 0, 1)).astype(np.uint8)  # black: no rows; white: 2 shares
            picture = np.kron(picture, np.ones((16, 16), np.uint8))[..., None]  # 16 x 16 points each
            self._tensorboard("add_image", "moe/expert_load", picture, step, None, "HWC")
            if self.wandb is not None:
                self._send(step, {"moe/expert_load": sys.modules["wandb"].Image(picture)})
        if measured and elapsed_s is not None:
            self._add_to_last_row(step, measured | {"elapsed_s": elapsed_s})

    def _add_to_last_row(self, step: int, measured: dict) -> None:
        """Add what was measured after `step` steps to the row of step - 1. If there is none, write a row."""
        path = self.folder / "metrics.jsonl"
        try:
            self.sync()  # the file then has all rows
            lines = path.read_bytes().splitlines(keepends=True)
            rows = [read_record(line) for line in lines[-100:]]  # users may have added lines
            found = [i - len(rows) for i, row in enumerate(rows) if row.get("step") == step - 1]
            if not found:
                return self.record({"step": step, **measured})
            row = json.dumps(json_safe(rows[found[-1]] | measured), allow_nan=False)
            lines[found[-1]] = row.encode() + b"\n"
            with self.writing:
                write_atomically(path, lambda file: file.writelines(lines))
                self.files[path.name] = open_own(path)
        except OSError as error:
            self.say(f"WARNING: {path} lacks the last evaluation: {error}; log.txt has it")
        self._add_points({"step": step, **measured})

    def measurement(self, step: int, word: str, value: float) -> None:
        """Write a number's line in log.txt and main.log. word: its `log_word`."""
        self._append("log.txt", f"{step} {word} {value:.6f}")
        for metric in METRICS:
            if metric.log_word == word and metric.llmc_word:
                self._append("main.log", f"s:{step} {metric.llmc_word}:{value:.6f}")

    def draw(self, wait: bool = False) -> str:
        """Draw training.png in another process, unless that process is running. wait: wait for a picture of
        everything logged so far; returns the reason if there is no picture, else ""."""
        if self.drawing is not None and self.drawing.poll() is None:
            if not wait:
                return ""
            self.drawing.wait()
        command, null = [sys.executable, str(PLOT_LOG), str(self.folder)], subprocess.DEVNULL
        errors = subprocess.PIPE if wait else null
        try:
            self.drawing = subprocess.Popen(command, stdin=null, stdout=null, stderr=errors, errors="replace")
        except OSError as error:
            return str(error)
        lines = self.drawing.communicate()[1].splitlines() if wait else []
        if code := self.drawing.returncode:
            return lines[-1].removeprefix("plot_log.py: error: ") if lines else f"exit code {code}"
        for line in lines:
            if line.startswith("plot_log.py: "):
                self.say(line)
        return ""

    def _add_points(self, record: dict) -> None:
        points = {m.curve: record[m.name] for m in METRICS if m.curve and type(record.get(m.name)) is float}
        for name, value in record.items():
            kind, _, part = name.partition("/")
            points |= {f"{PARTS[kind]}/{part}": value} if part and kind in PARTS else {}
        for name in [name for name in record if name.endswith(BY_LAYER)]:
            curve = f"moe/{name.removesuffix(BY_LAYER)}/layer_"
            points |= {f"{curve}{layer}": value for layer, value in enumerate(record[name])}
        for curve, value in points.items():
            self._tensorboard("add_scalar", curve, value, record["step"])
        self._send(record["step"], points)

    def _send(self, step: int, values: dict) -> None:
        if self.wandb is not None:
            self._try_wandb(self.wandb.log, values, step)

    def _try_wandb(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # no login, no network, or any other reason: training continues
            reason = " ".join(str(error).split()) or repr(error)
            self.say(f"WARNING: no (more) wandb data of this run: {reason}; metrics.jsonl has all of it")
            self.wandb = None

    def _tensorboard(self, method: str, *arguments: Any) -> None:
        try:
            if self.tensorboard is not None:
                operator.attrgetter(method)(self.tensorboard)(*arguments)
        except OSError as error:
            self.say(f"WARNING: no more TensorBoard events of this run: {error}; metrics.jsonl has all data")
            self.tensorboard = None

    def _append(self, name: str, line: str) -> None:
        with self.writing:
            waits = any(self.unwritten.values())  # then a warning has been printed
            self.unwritten[name] += line.encode() + b"\n"
            try:
                self._write()
            except OSError as error:
                if not waits:
                    self.say(f"WARNING: {name} cannot be written: {error}; its lines wait for space")

    def _write(self) -> None:
        for name, waiting in self.unwritten.items():
            while waiting:
                written = self.files[name].write(waiting)
                del waiting[:written]

    def sync(self) -> None:
        """Write all lines to the disk; called before a checkpoint is written. OSError if that fails."""
        with self.writing:
            self._write()
            self._write_lost_files_again()
        for file in self.files.values():
            os.fsync(file.fileno())
        self._tensorboard("flush")

    def _write_lost_files_again(self) -> None:
        """Somebody may have deleted or moved the folder: make it again, with the log so far."""
        lost = [name for name in self.files if not os.path.lexists(self.folder / name)]
        for name in lost:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files[name].seek(0)  # a deleted file can be read until it is closed
            write_atomically(self.folder / name, partial(shutil.copyfileobj, self.files[name]))
            self.files[name] = open_own(self.folder / name)
        if lost:
            self.lost = True
            self.say(f"WARNING: {self.folder} has lost {', '.join(lost)}; only they are written again")

    def close(self) -> bool:
        """Close all files and unlock the folder. False if not everything could be written, or was deleted."""
        if self.drawing is not None:
            self.drawing.wait()
        if self.wandb is not None:
            self._try_wandb(self.wandb.finish)
        try:
            self.sync()
            self._tensorboard("close")
            return not self.lost
        except OSError as error:
            self.say(f"WARNING: the last lines of the log files could not be written: {error}")
            return False
        finally:
            for file in (*self.files.values(), self.lock):
                file.close()


def start_wandb(folder: Path, resumed: bool, project: str, settings: dict):
    """Start the folder's run in Weights & Biases, or continue it if `resumed`. wandb itself reads WANDB_MODE,
    WANDB_RUN_GROUP, WANDB_TAGS and its other variables."""
    import wandb

    file = folder / "wandb_id"
    known = file.read_text().strip() if resumed and file.is_file() else None
    name = os.environ.get("WANDB_NAME", os.path.basename(os.path.realpath(folder)))
    run = wandb.init(project=project, name=name, dir=folder, id=known, resume="allow", config=settings)
    write_atomically(file, lambda out: out.write(run.id.encode()))
    return run


def claim_folder(folder: Path) -> BinaryIO:
    """Make a run's folder, delete half-written files in it, lock it until the returned file is closed.
    ValueError if another run holds the lock. OSError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_own(folder / ".lock")
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = "another run is writing there; wait for its end, or give another --log_dir"
            raise ValueError(f"log_dir={folder}: {text}") from None
        except OSError:
            pass  # some network file systems have no locks
        remove_temporaries(folder)
    except OSError as error:
        text = f"log_dir={folder}: cannot write there: {error.strerror}; fix that, or give another --log_dir"
        raise OSError(error.errno, text) from error
    return lock


def open_own(path: Path) -> BinaryIO:
    """A file of a run, to append to and to read; made if it is missing. FileExistsError: a link or a pipe."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        problem = f"{path.name} is a link or no ordinary file; move it away"
        raise FileExistsError(errno.EEXIST, problem, str(path))
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows lacks it
    return open(path, "a+b", buffering=0, opener=lambda name, flags: os.open(name, flags | no_link, 0o666))


def move_old_files(folder: Path, resumed: Path | None) -> Path | None:
    """Move files that do not belong to this run into a new folder old_DATE; return it, or None. A run that
    resumes here moves only newer checkpoints: they are damaged, or the run will do their steps again. The
    files latest and best then name older ones. A link is moved itself, not what it points to; a file that no
    run has written stays."""
    checkpoints = list_checkpoints(folder)  # newest first
    targets = [os.path.realpath(path) for path in checkpoints]  # Path.resolve fails for a circle of links
    if resumed is not None and os.path.realpath(resumed) in targets:
        number = targets.index(os.path.realpath(resumed))
        found, name = checkpoints[:number], checkpoints[number].name  # `resumed` may be a link's name
        if found:
            write_atomically(folder / "latest", lambda file: file.write(name.encode()))
    else:
        entries = [e for e in os.scandir(folder) if e.is_file() or e.is_dir() or e.is_symlink()]
        found = [Path(e) for e in entries if (RUN_FOLDERS if e.is_dir() else RUN_FILES).fullmatch(e.name)]
    if not found:
        return None
    old, number = folder / time.strftime("old_%Y%m%d-%H%M%S"), 1
    while old.exists():
        number += 1
        old = old.with_name(f"{old.name.split('.')[0]}.{number}")
    old.mkdir()
    for path in found:
        path.rename(old / path.name)
    best = folder / "best"
    if best.is_file() and best.read_text(errors="replace").strip() in {path.name for path in found}:
        best.rename(old / best.name)
        if kept := best_checkpoint(folder):
            write_atomically(best, lambda file: file.write(kept.name.encode()))
    sync_folder(folder)
    return old


def drop_repeated_lines(path: Path, first_step: int, evaluates_first: bool = True) -> None:
    """Remove the lines of a log file that a run which resumes before first_step will write again."""
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = [line for line in lines if stays_after_resume(line, first_step, evaluates_first)]
    if kept and not kept[-1].endswith(b"\n"):
        kept[-1] += b"\n"
    if kept != lines:
        write_atomically(path, lambda file: file.writelines(kept))


def stays_after_resume(line: bytes, first_step: int, evaluates_first: bool = True) -> bool:
    """Whether a line of a log file stays when a run resumes before first_step. The evaluation at first_step
    stays if the run will not repeat it. A line without a step stays, and so does one that no run wrote."""
    text = line.decode(errors="replace")
    if "\0" in text or (not text.endswith("\n") and re.match(r"[{s\d]", text)):
        return False  # cut off by a kill, or damaged by a crash of the machine
    if found := LOG_LINE.fullmatch(text):
        step, is_evaluation = int(found[1]), found[2] not in ("train", "trl")
        return step < first_step or (step == first_step and is_evaluation and not evaluates_first)
    step = read_record(line).get("step")
    return type(step) is not int or step < first_step


def read_evaluation(path: Path, step: int) -> dict:
    """What metrics.jsonl has of an evaluation after `step` steps, with "eval_step"; {} if there was none."""
    for line in reversed(path.read_bytes().splitlines()):
        record = read_record(line)
        evaluated = {m.name for m in METRICS if m.evaluated}  # val_loss/NAME is one, too
        values = {k: v for k, v in record.items() if k.split("/")[0] in evaluated or k.endswith(BY_LAYER)}
        if values and record.get("eval_step") == step:
            return values | {"eval_step": step}
    return {}


def read_record(line: bytes) -> dict:
    """The JSON object in a line of metrics.jsonl; {} for any other line, such as one that a user added."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def print_thread_error(failed: threading.ExceptHookArgs) -> None:
    """For threading.excepthook: TensorBoard's thread passes its OSError to the run, which reports it."""
    if not (issubclass(failed.exc_type, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(failed)


def json_safe(value: Any) -> Any:
    """`value` with None in place of NaN and infinities, which JSON does not have."""
    return tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, value)


def write_run_file(path: Path, record: dict, resumes: bool) -> None:
    """Write run.json: the run_record. If the run resumes, "earlier" has those of its starts before."""
    old = read_record(path.read_bytes()) if resumes and path.is_file() else {}
    earlier = old.pop("earlier", [])
    if old and isinstance(earlier, list):
        record["earlier"] = [*earlier, {k: old[k] for k in record.keys() & old.keys() - {"config", "model"}}]
    write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def run_record(config, model, world, first_step: int) -> dict:
    """A run's settings, git revision, versions and machine; no environment variables."""
    # `git describe --dirty` would write to the repository.
    git = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        status = subprocess.run(git, cwd=PLOT_LOG.parent, capture_output=True, text=True, timeout=10).stdout
        revision = re.match(r"# branch.oid (\w{12})|", status)[1]
        revision = revision and revision + ("-dirty" if re.search(r"\n[^#]", status) else "")
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor()
    return {
        "config": dataclasses.asdict(config) | {"vocab_size": model.config.vocab_size},
        "model": model.config.to_diff_dict(),
        "parameters": model.get_num_params(False), "active_parameters": model.get_num_active_params(),
        "world_size": world.size, "first_step": first_step, "git": revision,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "transformers": transformers.__version__, "cuda": torch.version.cuda},
        "device": f"{world.device.type} {device}".strip(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def expert_load(usage: np.ndarray) -> dict:
    """How a step used the experts, over all ranks, as in metrics.jsonl (docs/formats.md); {} for a dense
    model. usage (MoE layers, 1 + E): see MoE.step_usage. The entropy is the mean over layers."""
    if len(usage) == 0:
        return {}
    counts = usage[:, 1:].astype(float)  # (MoE layers, E)
    share = counts / counts.sum(1, keepdims=True)
    load = share * share.shape[1]  # in fair shares
    starved, entropy = (load < STARVED_BELOW).mean(), usage[:, 0].mean()
    return {"expert_load": share.tolist(), "max_load": float(load.max()),
            "starved": float(starved), "router_entropy": float(entropy)}  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the CUDA allocator, or else of this process; 0 if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB
