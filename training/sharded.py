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

References: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import io
import json
import math
import os
import re
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
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from layers.sharding import local, local_ranges
from tokens.files import root_error, sync_folder, write_atomically
from training.archives import (
    CheckpointError,
    NewerFormatError,
    NotFiniteError,
    judge,
    load_archive,
    remove,
    size_and_checksum,
)
from training.parallel import like

FORMAT = 1
INDEX, REST = "index.json", "rest.pt"
FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp|rest\.pt", re.ASCII)  # names that an index may give
TENSOR = re.compile(r"model\..+|optimizer\.\d{1,9}\..+", re.ASCII | re.DOTALL)
INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN; of a DTensor this rank's. Takes no memory of the tensor's size."""
    tensor = local(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


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

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called on every rank to write its parts."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise root_error(
                error
            ) from None  # here: on its way to the other ranks it loses what is behind it

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 when all ranks have written."""
        self.places = {part.index: part.storage_data for rank in results for part in rank}
        super().finish(metadata, results)


class Saver:
    """Saves checkpoints together with the other ranks of a process group, for CheckpointWriter.

    group: one that works on the CPU (gloo) and is used for nothing else; None: this process alone. `rest` is
    rank 0's; so is what becomes of the folder once all parts are written. An error on one rank is one on all.
    """

    def __init__(self, group: dist.ProcessGroup | None, folder: Path):
        self.group, self.folder = group, folder
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def stage(self, checkpoint: dict, path: Path | None = None) -> tuple:
        """Make the folder, and copy this rank's part to the host; the rest is up to `commit`.

        path: of the folder, if not model_XXXXX. A process alone copies nothing. NotFiniteError if a value is
        not finite; OSError if the folder cannot be made; what torch raises if memory is short.
        """
        path = path or self.folder / f"model_{checkpoint['step']:05d}"
        temporary = path.with_name(f".{path.name}.unfinished")
        try:
            return *self.together(partial(self._stage, checkpoint, temporary)), path
        except BaseException:
            self._forget(temporary)
            raise

    def _stage(self, checkpoint: dict, temporary: Path) -> tuple:
        tensors, rest = split(checkpoint)
        for name, tensor in tensors.items():
            if not finite(tensor):
                raise NotFiniteError(
                    f"step {checkpoint['step']} is not saved: {name} is not finite on rank {self.rank}"
                )
        if self.rank == 0:
            # Of processes that were killed. Only a run has the folder for itself, and removes all there are.
            for left in (temporary,) if self.group is None else temporary.parent.glob(".model_*.*ed"):
                if left.exists():
                    shutil.rmtree(left)
            temporary.mkdir(parents=True)
        writer = PartWriter(temporary)
        if self.group is None:
            return partial(save_alone, tensors, writer), rest, writer
        # Not dcp.async_save: where one rank had no memory for the copy, the others would wait for it in vain.
        tensors = writer.stage(tensors)
        return partial(dcp.save, tensors, storage_writer=writer, process_group=self.group), rest, writer

    def _forget(self, temporary: Path) -> None:
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)

    def commit(self, staged: tuple) -> Path:
        """Write the parts, wait until all ranks have, and give the folder its name, which is returned.

        OSError if one could not; what has been written is then removed, which may be what a full disk needs.
        """
        written, rest, writer, path = staged
        temporary = Path(writer.path)
        try:
            metadata = written()
            files = self._checksums(temporary)
            last = partial(finish, temporary, path, files, metadata, rest)
            self.together(lambda: last(writer.places) if self.rank == 0 else None)
        except BaseException as error:
            self._forget(temporary)
            if isinstance(error, dcp.CheckpointException):  # its text has the tracebacks of all ranks
                rank, (reason, _) = next(iter(error.failures.items()))
                raise OSError(f"{temporary}: rank {rank}: {str(reason) or repr(reason)}") from error
            raise
        return path

    def together(self, work: Callable) -> Any:
        """What work() returns; if it fails on any rank, an error on all. All ranks call this."""
        result = error = None
        said = b""
        try:
            result = work()
        except Exception as problem:
            error, said = problem, (str(problem) or repr(problem)).encode(errors="replace")
        length = 400  # of the text that goes to the other ranks, as numbers
        mine = sum(isinstance(error, kind) for kind in (CheckpointError, NotFiniteError))  # which is one, too
        rows = self._gather([mine, *said[:length].ljust(length, b"\0")])
        for rank, (kind, *text) in enumerate(rows):
            there = bytes(text).rstrip(b"\0").decode(errors="replace")
            if there and error is None:
                there = there if kind else f"rank {rank}: {there}"
                error = (OSError, CheckpointError, NotFiniteError)[kind](there)
        if error is not None:
            raise error
        return result

    def _gather(self, numbers: list[int]) -> list[list[int]]:
        """The numbers that each rank has given."""
        mine = torch.tensor(numbers)
        rows = [mine] * self.size
        if self.group is not None:
            rows = [torch.empty_like(mine) for _ in rows]
            dist.all_gather(rows, mine, group=self.group)
        return [row.tolist() for row in rows]

    def _checksums(self, folder: Path) -> dict[str, list[int]]:
        """Bytes and CRC-32 of all ranks' files, each read by the rank that wrote it; torch makes one each."""
        mine = folder / f"__{self.rank}_0.distcp"
        row = self.together(lambda: size_and_checksum(mine) if mine.exists() else (-1, 0))
        rows = self._gather(list(row))
        return {f"__{rank}_0.distcp": row for rank, row in enumerate(rows) if row[0] >= 0}


def save_alone(tensors: dict[str, torch.Tensor], writer: PartWriter) -> Metadata:
    """Write the tensors without other processes."""
    with warnings.catch_warnings():  # it says that this process is alone
        warnings.filterwarnings("ignore", message=".*single process")
        return dcp.save(tensors, storage_writer=writer, no_dist=True)


def finish(
    temporary: Path, path: Path, files: dict[str, list[int]], metadata: Metadata, rest: dict,
    places: dict[MetadataIndex, Any],
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
    check_index({"files": files, "tensors": tensors})  # what would be refused is not written
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
    """index.json. CheckpointError if it is not there or not what `finish` writes; OSError as in `judge`."""
    try:
        outer = json.loads((path / INDEX).read_bytes())
        text = outer["index"]
        if zlib.crc32(text.encode()) != outer["crc32"]:
            raise ValueError("its checksum is wrong")
        index = json.loads(text)
        if not ({"files", "tensors"} <= index.keys() and isinstance(index.get("format"), int)):
            raise ValueError("it lacks files, tensors or format")
        check_format(path, index["format"])
        check_index(index)
    except Exception as error:  # RecursionError, UnicodeError, ... : JSON can be wrong in many ways
        raise judge(error, path / INDEX, "not a checkpoint, or damaged") from error
    return index


def check_format(path: Path, made: Any) -> None:
    """NewerFormatError unless this program knows the format."""
    if not isinstance(made, int) or made > FORMAT:
        raise NewerFormatError(
            f"{path}: made by a newer version: its format is {made!r}, this one reads up to {FORMAT}; "
            "update the program"
        )


def check_index(index: dict) -> None:
    """ValueError unless files and tensors fit together; TypeError and the like for what has another form."""
    if REST not in index["files"]:
        raise ValueError(f"it lacks {REST}")
    for name, (size, checksum) in index["files"].items():
        if not FILE.fullmatch(name):  # it leads nowhere else
            raise ValueError(f"{name!r} is no file of a checkpoint")
        check_counts(name, [size, checksum])
    for name, stored in index["tensors"].items():
        if not TENSOR.fullmatch(name):
            raise ValueError(f"{name!r} is no tensor of model or optimizer")
        shape, dtype, boxes = stored["shape"], dtype_of(stored), []
        check_counts(name, shape)
        for first, sizes, file, start, length in stored["parts"]:
            check_counts(name, [*first, *sizes, start, length])
            box = [(begin, begin + size) for begin, size in zip(first, sizes, strict=True)]
            count = math.prod(sizes)
            if count > 0:  # FSDP gives some ranks nothing
                boxes.append(box)
                if any(end > whole for (_, end), whole in zip(box, shape, strict=True)):
                    raise ValueError(f"a part of {name} goes beyond its shape {shape}")
            if start + length > index["files"].get(file, [-1])[0] or count * dtype.itemsize > length:
                raise ValueError(f"a part of {name} does not fit into {file!r}")
        check_cover(name, shape, boxes)


def check_counts(name: str, numbers: list) -> None:
    """ValueError unless all are integers that count something."""
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"sizes or places of {name} are no counts")


def check_cover(name: str, shape: list[int], boxes: list[list[tuple[int, int]]]) -> None:
    """ValueError unless parts, each (begin, end) per dimension, make up this shape, nothing of it twice."""
    filled, count = sum(math.prod(end - begin for begin, end in box) for box in boxes), math.prod(shape)
    if filled != count:
        raise ValueError(f"of {name} there are {filled} elements of {count}")
    if len(boxes) < 2:
        return
    # In the order along the dimension that is cut most, a part meets only those that have not ended.
    dim = max(range(len(shape)), key=lambda dim: len({box[dim] for box in boxes}))
    near: list[list[tuple[int, int]]] = []
    for box in sorted(boxes, key=lambda box: box[dim]):
        near = [other for other in near if other[dim][1] > box[dim][0]]
        for other in near:
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other, strict=True)):
                raise ValueError(f"parts of {name} overlap")
        near.append(box)


def dtype_of(stored: dict) -> torch.dtype:
    """The dtype of a tensor in the index; ValueError for a word that names none we could have saved."""
    dtype = getattr(torch, stored["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype in INTEGERS):
        raise ValueError(f"there is no dtype {stored['dtype']!r}")
    return dtype


def verify(path: Path) -> None:
    """Read all files of a checkpoint's folder and compare them with their checksums.

    CheckpointError; OSError as in `judge`.
    """
    for name, expected in read_index(path)["files"].items():
        try:
            found = size_and_checksum(path / name)
        except Exception as error:
            raise judge(error, path / name, "the checkpoint is damaged, a file is missing") from error
        if list(found) != expected:
            raise CheckpointError(
                f"{path}: size or checksum of {name} is wrong: the checkpoint is damaged. Use an earlier one"
            )


def read_rest(path: Path) -> dict:
    """What is not tensors of model and optimizer; "folder" in it says where those are.

    CheckpointError; OSError as in `judge`.
    """
    tensors = read_index(path)["tensors"]
    try:
        with open(path / REST, "rb") as file:
            rest = load_archive(file)
    except Exception as error:  # the unpickler meets a foreign file in many ways
        raise judge(error, path / REST, "torch.load cannot read it safely") from error
    kinds = {"config": dict, "step": int}
    if not isinstance(rest, dict) or any(not isinstance(rest.get(name), kinds[name]) for name in kinds):
        raise CheckpointError(f"{path}: not a checkpoint of train_gpt_moe.py: {REST} lacks config or step")
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("optimizer.")}
    optimizer = rest.get("optimizer", {"state": {}})
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    fits = isinstance(state, dict) and all(isinstance(values, dict) for values in state.values())
    tied = rest["config"].get("tie_word_embeddings")
    if not fits or not numbers <= state.keys() or (tied and "model.transformer.wte.weight" not in tensors):
        raise CheckpointError(f"{path}: {INDEX} and {REST} are not of one checkpoint. Use an earlier one")
    return {**rest, "folder": str(path)}


def load(path: Path) -> dict:
    """The whole checkpoint, as the single file would have it, on the CPU. CheckpointError; OSError."""
    rest = read_rest(path)
    del rest["folder"]
    try:
        tensors = {
            name: torch.empty(stored["shape"], dtype=dtype_of(stored))
            for name, stored in read_index(path)["tensors"].items()
        }
    except Exception as error:
        raise judge(error, path, "tensors of these shapes cannot be") from error
    load_tensors(path, tensors)
    return join(tensors, rest)


def load_tensors(path: Path, targets: dict[str, torch.Tensor]) -> None:
    """Fill tensors, or what this rank holds of them (DTensors), with those of these names.

    No rank waits for another. CheckpointError, naming it, for a tensor that is missing or has another shape;
    OSError as in `judge`.
    """
    index = read_index(path)["tensors"]
    for name, target in targets.items():
        stored = index.get(name, {"shape": "nothing"})
        if stored["shape"] != list(target.shape):
            raise CheckpointError(
                f"{path}: {name} should be {list(target.shape)}, but there is {stored['shape']}"
            )
        wanted = local_ranges(target)
        for first, sizes, file, start, length in stored["parts"]:
            shared = [
                range(max(begin, mine.start), min(begin + size, mine.stop))
                for begin, size, mine in zip(first, sizes, wanted, strict=True)
            ]
            if all(shared):
                part = read_part(path / file, start, length, sizes, dtype_of(stored))
                into = local(target)[part_of(shared, [mine.start for mine in wanted])]
                into.copy_(part[part_of(shared, first)])


def part_of(ranges: list[range], origin: list[int]) -> tuple[slice, ...]:
    """The part of a tensor that has these indices of a whole, if its first element is that at `origin`."""
    return tuple(slice(r.start - begin, r.stop - begin) for r, begin in zip(ranges, origin, strict=True))


def read_part(file: Path, start: int, length: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that torch.distributed.checkpoint has written there.

    CheckpointError if there is none, or one that is not whole or not as expected; OSError as in `judge`.
    """
    try:
        with open(file, "rb") as stream:
            if start + length > os.fstat(stream.fileno()).st_size:
                raise ValueError("the file is cut off")
            stream.seek(start)
            part = load_archive(io.BytesIO(stream.read(length)))
        plain = type(part) is torch.Tensor and part.device.type == "cpu" and part.layout == torch.strided
        if not plain or (list(part.shape), part.dtype) != (shape, dtype):
            raise ValueError(f"it is no {dtype} tensor of shape {shape}")
    except Exception as error:  # the unpickler meets a foreign file in many ways
        raise judge(error, file, f"no tensor can be read from byte {start} on") from error
    return part


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
