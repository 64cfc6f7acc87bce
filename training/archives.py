"""Read torch.save's zip archives, which checkpoints consist of, without trust in their content.

References: https://pkware.com/appnote (CRC-32: 4.4.7); torch.load's weights_only, serialization notes"""

import contextlib
import errno
import io
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from layers.sharding import local

CHECKPOINT_FORMAT = 1  # of files and folders alike
DIVERGED = "step {} is not saved: the run has diverged (lower --max_lr, --router_lr_mult, --expert_lr_mult)"


class CheckpointError(ValueError):
    """A file is not a checkpoint of this program, is damaged, or was made by a newer version."""


class NewerFormatError(CheckpointError):
    """A checkpoint was made by a newer version of this program."""


class NotFiniteError(CheckpointError):
    """A tensor holds NaN or an infinite value."""


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its numbers in memory, as a run's have: not sparse, quantised, meta or float8."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and not (tensor.is_floating_point() and tensor.dtype.itemsize == 1)


def check_finite(where: str, tensors: dict[str, torch.Tensor], mend: str = "") -> None:
    """NotFiniteError, naming the first, for a tensor with a NaN or infinite value in this rank's part."""
    for name, tensor in tensors.items():
        tensor = local(tensor)
        if tensor.is_floating_point() and tensor.numel() > 0:
            smallest, largest = tensor.aminmax()  # NaN if any value is; isfinite() would allocate a mask
            if not (smallest.isfinite() and largest.isfinite()):
                raise NotFiniteError(f"{where}: {name} is not finite{mend}")


def remove(path: Path, successor: Path | None = None) -> None:
    """Delete a checkpoint, if it exists. A folder is renamed first: no incomplete one keeps its name.
    successor: a folder that takes the name."""
    renamed = path.with_name(f".{path.name}.removed")
    if path.is_dir():
        shutil.rmtree(renamed, ignore_errors=True)
        os.rename(path, renamed)
    else:
        path.unlink(missing_ok=True)
    if successor is not None:
        os.rename(successor, path)
    shutil.rmtree(renamed, ignore_errors=True)


def size_and_checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def check_archive(file: BinaryIO) -> None:
    """Compare all that torch.save wrote with its checksums. Raises any error: use it inside `reading`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 17)))
    file.read()  # raises the disk's error; zipfile would raise "not a zip file" instead
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            # torch leaves a tensor uninitialised if its entry is marked as a folder. torch.save compresses
            # nothing; an entry that claims to be compressed could ask for any amount of memory.
            if entry.external_attr & 16 or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"kind of {entry.filename!r} is wrong")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"checksum of {damaged!r} is wrong")


def load_archive(file: BinaryIO) -> Any:
    """What torch.save wrote, with tensors on the CPU. check_archive runs first; its errors are raised."""
    check_archive(file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def load_tensor(file: Path, start: int, length: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in the archive at this place of a file. CheckpointError if it is damaged or unexpected."""
    with reading(file, f"no tensor can be read from byte {start} on"), open(file, "rb") as stream:
        if start + length > os.fstat(stream.fileno()).st_size:
            raise ValueError("the file is cut off")
        stream.seek(start)
        tensor = load_archive(io.BytesIO(stream.read(length)))
        plain = type(tensor) is torch.Tensor and is_plain(tensor)
        if not plain or (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(f"it is no {dtype} tensor of shape {list(shape)}")
    return tensor


def check_format(path: Path, content: Any) -> None:
    """NewerFormatError for a dictionary that a newer version of this program has written; ValueError."""
    made = content.get("format", CHECKPOINT_FORMAT) if isinstance(content, dict) else CHECKPOINT_FORMAT
    if type(made) is not int or made < 1:
        raise ValueError("its format is no number from 1 on")
    if made > CHECKPOINT_FORMAT:
        what = f"its format is {made}, this one reads up to {CHECKPOINT_FORMAT}"
        raise NewerFormatError(f"{path}: made by a newer version: {what}; update the program")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch has no exception type for that on a CPU, only two messages."""
    messages = "DefaultCPUAllocator|Storage size calculation overflowed"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(re.search(messages, str(error)))


@contextlib.contextmanager
def reading(file: Path, problem: str) -> Iterator[None]:
    """Replace an error of the block by a CheckpointError, with `problem`. If the machine is the cause (no
    memory, no permission, a disk that does not answer), raise OSError, because the file may be good."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            why = str(error).splitlines()[0] if str(error) else "MemoryError"
            text = f"no memory to read it, free some and try again ({why})"
            raise OSError(errno.ENOMEM, text, str(file)) from error
        of_the_file = (errno.ENOENT, errno.EISDIR, errno.EINVAL)  # EINVAL: an offset that does not exist
        if isinstance(error, OSError) and error.errno not in of_the_file:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(file)) from error
        reason = (str(error).strip() or repr(error)).splitlines()[0][:400]
        if type(error).__name__ == "UnpicklingError":  # torch's text advises to run the file's code
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds code ({code[1]:.80}), which is not run" if code else "its pickle is damaged"
        reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
        raise CheckpointError(f"{file}: {problem}: {reason}. Use an earlier one") from error
