"""The files that checkpoints consist of: written whole or not at all, read without trust in what they hold.

    write_atomically(path, lambda file: torch.save(state, file))
    with open(path, "rb") as file:
        state = load_archive(file)      # every checksum compared first; no pickle is executed

checkpoint.py writes a checkpoint as one of them, sharded.py as a folder of several.

References: the zip format, https://pkware.com/appnote; torch.load's weights_only,
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import errno
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, is damaged, or was made by a newer version."""


class NewerFormatError(CheckpointError):
    """A checkpoint made by a newer version of this program."""


class NotFiniteError(CheckpointError):
    """Values that are infinite or NaN, in what was to be saved."""


# ---------------------------------------------------------------------------- FILES


def remove(path: Path) -> None:
    """Delete a checkpoint of either form. A folder loses its name first, so that none is ever half there."""
    if path.is_dir():
        condemned = path.with_name(f".{path.name}.removed")
        shutil.rmtree(condemned, ignore_errors=True)
        os.rename(path, condemned)
        shutil.rmtree(condemned, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size_and_checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


# ---------------------------------------------------------------------------- DAMAGE


def check_archive(file: BinaryIO) -> None:
    """Compare all of a zip archive, as torch.save makes them, with its checksums.

    ValueError, or one of the many errors that a damaged archive provokes: `judge` tells what to make of it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 17)))
    file.read()  # where the disk does not answer here, zipfile would say that this is no archive
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            # torch reads nothing into a tensor that is marked as a folder, and leaves in it what memory held.
            # It compresses nothing; an entry that says it is compressed may want any amount of memory.
            if entry.external_attr & 16 or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"kind of {entry.filename!r} is wrong")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum of {damaged!r} is wrong")


def load_archive(file: BinaryIO) -> Any:
    """What torch.save has put into the archive, whose checksums are compared first. As check_archive."""
    check_archive(file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was short; the CPU's allocator has no type of error for that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def judge(error: Exception, file: Path, text: str) -> Exception:
    """What to raise for an error that reading the file has met: CheckpointError where the file is to blame.

    OSError naming the file where the machine is: no memory, no permission, a disk that does not answer. The
    file may be good then, and to go on from an older one would lose work.
    """
    if isinstance(error, CheckpointError):
        return error
    if out_of_memory(error):
        why = str(error).splitlines()[0] if str(error) else "MemoryError"
        return OSError(errno.ENOMEM, f"no memory to read it, free some and try again ({why})", str(file))
    # A place that a damaged file says something is at may be none (EINVAL).
    of_the_file = (errno.ENOENT, errno.EISDIR, errno.EINVAL)
    if isinstance(error, OSError) and error.errno not in of_the_file:
        return OSError(error.errno or errno.EIO, error.strerror or str(error), str(file))
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
    return CheckpointError(f"{file}: {text}: {reason}. Use an earlier one")
