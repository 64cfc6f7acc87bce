"""Write files atomically: after a crash a file is complete or does not exist."""

import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class DataError(ValueError):
    """Training data is damaged or missing in the middle of a run."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary file beside `path`, fsync it, rename it to `path`. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # "x" neither opens a file that exists nor follows a link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        error = root_error(error)
        if getattr(error, "filename", None) == str(temporary):  # the user knows only the other name
            error = OSError(error.errno, error.strerror, str(path))
        raise error from None
    sync_folder(path.parent)


def remove_temporaries(folder: str | Path, names: str = ".+") -> None:
    """Delete what killed calls of write_atomically left in the folder, of files whose names match `names`."""
    ours = re.compile(rf"\.({names})\.[0-9a-f]{{16}}\.tmp")
    for entry in os.scandir(folder):
        if ours.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def check_regular(path: str | Path, size: int | None = None) -> None:
    """ValueError unless it is an ordinary file, of this size if given. Reading a pipe may not end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no ordinary file")
    if size not in (None, found.st_size):
        raise ValueError(f"its size is {found.st_size} bytes, not {size}")


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable. POSIX needs an fsync of the folder; other systems do not."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def root_error(error: BaseException) -> BaseException:
    """The OSError, such as "disk full", that torch.save hides behind a RuntimeError; otherwise `error`."""
    hidden = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)
    return error.__context__ if hidden else error
