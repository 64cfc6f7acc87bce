"""Write files atomically: after a crash a file is complete or does not exist."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class DataError(ValueError):
    """Training data is damaged or missing in the middle of a run."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary file beside `path`, fsync it, rename it to `path`. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise root_error(error) from None
    sync_folder(path.parent)


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
