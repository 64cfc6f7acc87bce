"""Checkpoints of models that no rank holds whole: a folder, to which every rank writes its part.

    log/model_XXXXX/
        __0_0.distcp, __1_0.distcp ...    each rank's parts of tensors, by torch.distributed.checkpoint
        rest.pt       what is no tensor of the model or the optimizer, as in the single file (torch.save)
        index.json    what lies where, and size and CRC-32 of each file; its own CRC-32. Written last
        .metadata     torch's own index, a pickle: never read here, it is for torch's tools

The content is that of the single file log/model_XXXXX.pt (checkpoint.py), and either becomes the other:
tensors are named model.NAME and optimizer.NUMBER.NAME, and have their whole size. A folder is written under
a temporary name, and renamed when all ranks' files are on the disk: under its name it is always whole. Any
number of ranks, in any layout, reads of it what it needs. Many machines need a file system that they share.

This is also the place of what both forms need: errors, and how a file is written so that it is whole or not
there at all.

References: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import io
import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from experts import held, local
from parallel import like

FORMAT = 1
INDEX, REST = "index.json", "rest.pt"


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, is damaged, or was made by a newer version."""


class NewerFormatError(CheckpointError):
    """A checkpoint made by a newer version of this program."""


# ---------------------------------------------------------------------------- FILES


def write_atomically(path: Path, write: Callable) -> None:
    """write(file) to a temporary file beside `path`, fsync, rename. What was at `path` stays until then.

    OSError if it cannot be written; whatever `write` raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save hides "disk full" behind a complaint of its own
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable (POSIX wants the folder fsynced; elsewhere this does nothing)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


# ---------------------------------------------------------------------------- WRITE


def split(checkpoint: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of model and optimizer by name, and the rest, in which they are missing.

    Numbers that are tensors, such as AdamW's step, stay in the rest; of tied embeddings there is one.
    """
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items()}
    if checkpoint["config"].get("tie_word_embeddings"):
        tensors.pop("model.lm_head.weight", None)
    rest = {**checkpoint, "model": {}}
    if "optimizer" in checkpoint:
        state: dict[int, dict] = {}
        for number, values in checkpoint["optimizer"]["state"].items():
            big = {name: v for name, v in values.items() if torch.is_tensor(v) and v.dim() > 0}
            tensors |= {f"optimizer.{number}.{name}": value for name, value in big.items()}
            small = {name: value for name, value in values.items() if name not in big}
            state[number] = {
                name: value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
                for name, value in small.items()
            }
        rest["optimizer"] = {**checkpoint["optimizer"], "state": state}
    return tensors, rest


def join(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    """The reverse of split."""
    checkpoint = {**rest, "model": {}}
    if "optimizer" in rest:
        state = {number: dict(values) for number, values in rest["optimizer"]["state"].items()}
        checkpoint["optimizer"] = {**rest["optimizer"], "state": state}
    for name, tensor in tensors.items():
        kind, _, name = name.partition(".")
        if kind == "model":
            checkpoint["model"][name] = tensor
        else:
            number, _, name = name.partition(".")
            checkpoint["optimizer"]["state"][int(number)][name] = tensor
    if rest["config"].get("tie_word_embeddings"):
        checkpoint["model"]["lm_head.weight"] = checkpoint["model"]["transformer.wte.weight"]
    return checkpoint


class PartWriter(dcp.FileSystemWriter):
    """torch's writer of files, which keeps in mind on rank 0 where each part of each tensor has gone."""

    def finish(self, metadata: Metadata, results: list[list]) -> None:
        """Called on rank 0 when all ranks have written."""
        self.places = {part.index: part.storage_data for rank in results for part in rank}
        super().finish(metadata, results)


class Saver:
    """Saves checkpoints together with the other ranks of a process group, for CheckpointWriter.

    group: one that works on the CPU (gloo) and is used for nothing else; None: this process alone. `rest` is
    rank 0's; so is what becomes of the folder once all parts are written.
    """

    def __init__(self, group: dist.ProcessGroup | None, folder: Path):
        self.group, self.folder = group, folder
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def stage(self, checkpoint: dict, path: Path | None = None) -> tuple:
        """Copy this rank's part to the host and begin to write it; the rest is up to `commit`.

        path: of the folder, if not model_XXXXX. A process alone does neither yet. CheckpointError on all
        ranks if a value on any is not finite; OSError on all if the folder cannot be made.
        """
        tensors, rest = split(checkpoint)
        path = path or self.folder / f"model_{rest['step']:05d}"
        temporary = path.with_name(f".{path.name}.unfinished")
        problems = torch.tensor([sum(not local(part).isfinite().all() for part in tensors.values()), 0])
        if self.rank == 0:
            try:
                if self.group is not None:  # of a process that was killed
                    for left in path.parent.glob(".model_*.*ed"):
                        shutil.rmtree(left)
                temporary.mkdir(parents=True)
            except OSError as error:
                problems[1], reason = 1, error
        if self.group is not None:
            dist.all_reduce(problems, group=self.group)
        if problems[0] > 0:
            raise CheckpointError(f"step {rest['step']} is not saved: not all of its values are finite")
        if problems[1] > 0:
            raise reason if self.rank == 0 else OSError("rank 0 cannot make the folder")
        writer = PartWriter(temporary)
        if self.group is None:
            return partial(save_alone, tensors, writer), rest, writer, path
        writing = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        return getattr(writing, "upload_completion", writing).result, rest, writer, path

    def commit(self, staged: tuple) -> Path:
        """Wait until all ranks have written their parts, and give the folder its name, which is returned.

        OSError if one could not; what has been written is then removed, which may be what a full disk needs.
        """
        written, rest, writer, path = staged
        temporary = Path(writer.path)
        try:
            metadata = written()
            files = self._checksums(temporary)
            if self.rank == 0:
                finish(temporary, path, files, metadata, writer.places, rest)
        except BaseException as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, dcp.CheckpointException):  # its text has the tracebacks of all ranks
                rank, (reason, _) = next(iter(error.failures.items()))
                raise OSError(f"{temporary}: rank {rank}: {reason}") from error
            raise
        return path

    def _checksums(self, folder: Path) -> dict[str, list[int]]:
        """Bytes and CRC-32 of all ranks' files, each read by the rank that wrote it; torch makes one each."""
        name = f"__{self.rank}_0.distcp"
        try:
            mine = size_and_checksum(folder / name) if (folder / name).exists() else (-1, 0)
        except OSError:
            mine = (-2, 0)
        rows = [torch.tensor(mine) for _ in range(self.size)]
        if self.group is not None:
            dist.all_gather(rows, torch.tensor(mine), group=self.group)
        found = {f"__{rank}_0.distcp": row.tolist() for rank, row in enumerate(rows)}
        unread = [name for name, (size, _) in found.items() if size == -2]
        if unread:
            raise OSError(f"{folder / unread[0]}: cannot be read back")
        return {name: row for name, row in found.items() if row[0] >= 0}


def save_alone(tensors: dict[str, torch.Tensor], writer: PartWriter) -> Metadata:
    """Write the tensors without other processes."""
    with warnings.catch_warnings():  # it says that this process is alone
        warnings.filterwarnings("ignore", message=".*single process")
        return dcp.save(tensors, storage_writer=writer, no_dist=True)


def finish(
    temporary: Path, path: Path, files: dict[str, list[int]], metadata: Metadata,
    places: dict[MetadataIndex, Any], rest: dict,
) -> None:  # fmt: skip
    """Write rest.pt and index.json beside the tensors, and rename the folder."""
    write_atomically(temporary / REST, lambda file: torch.save({**rest, "format": FORMAT}, file))
    files = files | {REST: list(size_and_checksum(temporary / REST))}
    missing = [name for name in files if not (temporary / name).is_file()]
    if missing:
        raise OSError(f"{temporary}: no {missing[0]} here: log_dir must be on a disk that all ranks share")
    tensors: dict[str, dict] = {}
    for name, stored in metadata.state_dict_metadata.items():
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(stored.size), "parts": []}
        for chunk in stored.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            where = [place.relative_path, place.offset, place.length]
            tensors[name]["parts"].append([list(chunk.offsets), list(chunk.sizes), *where])
    index = json.dumps({"format": FORMAT, "files": files, "tensors": tensors})
    text = json.dumps({"crc32": zlib.crc32(index.encode()), "index": index})
    write_atomically(temporary / INDEX, lambda file: file.write(text.encode()))
    if path.exists():
        remove(path)
    os.rename(temporary, path)
    sync_folder(path.parent)


def save(checkpoint: dict, path: Path) -> None:
    """Write a whole checkpoint as the folder `path`, in this process alone."""
    saver = Saver(None, path.parent)
    saver.commit(saver.stage(checkpoint, path))


# ---------------------------------------------------------------------------- READ


def read_index(path: Path) -> dict:
    """index.json. CheckpointError if it is not there or not what was written."""
    try:
        outer = json.loads((path / INDEX).read_bytes())
        text = outer["index"]
        if zlib.crc32(text.encode()) != outer["crc32"]:
            raise ValueError("its checksum is wrong")
        index = json.loads(text)
        if not ({"files", "tensors"} <= index.keys() and isinstance(index.get("format"), int)):
            raise ValueError("it lacks files, tensors or format")
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint, or damaged: {INDEX}: {error}. Use an earlier one"
        ) from error
    if index["format"] > FORMAT:
        raise NewerFormatError(
            f"{path}: made by a newer version: its format is {index['format']}, this one reads up to "
            f"{FORMAT}; update the program"
        )
    return index


def dtype_of(stored: dict) -> torch.dtype:
    """The dtype of a tensor in the index; CheckpointError for a word that names none."""
    dtype = getattr(torch, stored["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{INDEX}: there is no dtype {stored['dtype']!r}")
    return dtype


def verify(path: Path) -> None:
    """Read all files of a checkpoint's folder and compare them with their checksums. CheckpointError."""
    for name, (size, checksum) in read_index(path)["files"].items():
        file = path / Path(name).name  # a name out of a file leads nowhere else
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing: the checkpoint is damaged. Use an earlier one")
        if size_and_checksum(file) != (size, checksum):
            raise CheckpointError(
                f"{path}: size or checksum of {name} is wrong: the checkpoint is damaged. Use an earlier one"
            )


def read_rest(path: Path) -> dict:
    """What is not tensors of model and optimizer; "folder" in it says where those are."""
    read_index(path)
    try:
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets a foreign file in many ways
        raise CheckpointError(f"{path}: torch.load cannot read {REST} safely: {error}") from error
    if not isinstance(rest, dict) or not isinstance(rest.get("config"), dict) or "step" not in rest:
        raise CheckpointError(f"{path}: not a checkpoint of train_gpt_moe.py: {REST} lacks config or step")
    return {**rest, "folder": str(path)}


def load(path: Path) -> dict:
    """The whole checkpoint, as the single file would have it, on the CPU."""
    rest = read_rest(path)
    del rest["folder"]
    tensors = {
        name: torch.empty(stored["shape"], dtype=dtype_of(stored))
        for name, stored in read_index(path)["tensors"].items()
    }
    load_tensors(path, tensors)
    return join(tensors, rest)


def load_tensors(path: Path, targets: dict[str, torch.Tensor]) -> None:
    """Fill tensors, or what this rank holds of them (DTensors), with those of these names.

    No rank waits for another. CheckpointError, naming it, for a tensor that is missing or has another shape.
    """
    stored = read_index(path)["tensors"]
    for name, target in targets.items():
        if name not in stored or stored[name]["shape"] != list(target.shape):
            there = stored[name]["shape"] if name in stored else "nothing"
            raise CheckpointError(f"{path}: {name} should be {list(target.shape)}, but there is {there}")
        wanted, filled = held(target), 0
        for first, sizes, file, start, length in stored[name]["parts"]:
            shared = [
                range(max(begin, mine.start), min(begin + size, mine.stop))
                for begin, size, mine in zip(first, sizes, wanted, strict=True)
            ]
            if all(shared):
                part = read_part(path / Path(file).name, start, length)  # the name leads nowhere else
                into = local(target)[part_of(shared, [mine.start for mine in wanted])]
                into.copy_(part[part_of(shared, first)])
                filled += into.numel()
        count = math.prod(map(len, wanted))
        if filled != count:
            raise CheckpointError(f"{path}: of {name} there are {filled} elements of {count}")


def part_of(ranges: list[range], origin: list[int]) -> tuple[slice, ...]:
    """The part of a tensor that has these indices of a whole, if its first element is that at `origin`."""
    return tuple(slice(r.start - begin, r.stop - begin) for r, begin in zip(ranges, origin, strict=True))


def read_part(file: Path, start: int, length: int) -> torch.Tensor:
    """A tensor that torch.distributed.checkpoint has written there. CheckpointError if there is none."""
    try:
        with open(file, "rb") as stream:
            stream.seek(start)
            return torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets a foreign file in many ways
        raise CheckpointError(f"{file}: no tensor can be read from byte {start} on: {error}") from error


def read_parts(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """`state`, which lacks them, with weights and moments from its folder: of each what this rank holds."""
    path = Path(state["folder"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets = {f"model.{name}": torch.empty_like(t) for name, t in model.state_dict().items()}
    if state["config"].get("tie_word_embeddings"):
        targets.pop("model.lm_head.weight")
    for name, stored in read_index(path)["tensors"].items():
        if name.startswith("optimizer."):
            dtype = dtype_of(stored)
            targets[name] = torch.empty_like(parameters[int(name.split(".")[1])], dtype=dtype)
    targets = {name: target.detach() for name, target in targets.items()}
    load_tensors(path, targets)
    return join(targets, state)


def cut_weights(state: dict, model: nn.Module) -> dict:
    """A model's whole state with, of parameters that are shared out, this rank's part."""
    ours = model.state_dict()
    return {name: like(whole, ours[name]) if name in ours else whole for name, whole in state.items()}


def cut_moments(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state with, of what is as large as a parameter, this rank's part of it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        number: {k: like(v, parameters[number]) if torch.is_tensor(v) else v for k, v in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": cut}
