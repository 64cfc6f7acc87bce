"""A run's folder: one run at a time writes there, and what an earlier run left is kept or moved away.

lock = claim_folder(folder)                       # ValueError if another run writes there
moved_to = move_old_files(folder, resumed=None)
drop_repeated_lines(folder / "log.txt", first_step=250)
"""

import json
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from tokens.files import sync_folder, write_atomically
from training.checkpoints import list_checkpoints

try:
    import fcntl
except ImportError:  # Windows does not have it
    fcntl = None

LOG_FILES = ("log.txt", "metrics.jsonl", "main.log")
RUN_FILES = ("latest", "model_*", *LOG_FILES, "tb", "training.*", "wandb_id")  # all that a run leaves


def claim_folder(folder: Path) -> BinaryIO:
    """Make a run's folder, delete half-written files in it, lock it until the returned file is closed.

    ValueError if another run holds the lock. OSError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = "another run is writing there; wait for its end, or give another --log_dir"
            raise ValueError(f"log_dir={folder}: {text}") from None
        except OSError:
            pass  # some network file systems have no locks
        for temporary in folder.glob(".*.[0-9]*.tmp"):  # its process was killed while it wrote
            temporary.unlink()
    except OSError as error:
        text = f"log_dir={folder}: cannot write there: {error.strerror}; mend that, or give another --log_dir"
        raise OSError(error.errno, text) from error
    return lock


def move_old_files(folder: Path, resumed: Path | None) -> Path | None:
    """Move files that do not belong to this run into a new folder old_DATE; return it, None if nothing moved.

    A run that resumes from a checkpoint in the folder moves only the newer checkpoints: they are damaged, or of
    steps that it will do again.
    """
    checkpoints = [path.resolve() for path in list_checkpoints(folder)]  # newest first
    if resumed is not None and resumed.resolve() in checkpoints:
        found = checkpoints[: checkpoints.index(resumed.resolve())]
        if found:
            write_atomically(folder / "latest", lambda file: file.write(resumed.name.encode()))
    else:
        found = [path for name in RUN_FILES for path in folder.glob(name)]
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


def drop_repeated_lines(path: Path, first_step: int, evaluates_first: bool = True) -> None:
    """Remove the lines of a log file that a run which resumes before first_step will write again."""
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    kept = [line for line in lines if stays_after_resume(line, first_step, evaluates_first)]
    if kept != lines:
        write_atomically(path, lambda file: file.writelines(kept))


def stays_after_resume(line: bytes, first_step: int, evaluates_first: bool = True) -> bool:
    """Whether a line of a log file stays when a run resumes before first_step: it is whole, and of an earlier
    step or of none. Lines of the evaluation before first_step stay if the run will not evaluate there."""
    if not line.endswith(b"\n"):
        return False
    try:
        if line.startswith(b"s:"):
            step, rest = line[2:].split()
            word, value = rest.split(b":")
            step, is_evaluation = int(step), word != b"trl"
            float(value)
        elif line.startswith(b"{"):
            record = json.loads(line)
            step = record.get("step", record.get("run", {}).get("first_step", -1))
            is_evaluation = "step" in record and "loss" not in record
        else:
            step, word, value = line.split()
            step, is_evaluation = int(step), word != b"train"
            float(value)
        return step < first_step or (step == first_step and is_evaluation and not evaluates_first)
    except (ValueError, TypeError, AttributeError):
        return False
