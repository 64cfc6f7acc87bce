"""Checkpoints as folders, for models that no rank holds whole: every rank writes its part.

docs/formats.md lists the files. torch.distributed.checkpoint (DCP) writes the parts, and plans which parts a
rank reads. Any number of ranks, in any layout, can read a folder on a disk that they share.
Reference: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html"""

import json
import math
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tokens.files import check_regular, root_error, sync_folder, write_atomically
from training import archives
from training.archives import CheckpointError, reading, size_and_checksum
from training.schema import check_checkpoint

INDEX_FILE, REST_FILE = "index.json", "rest.pt"
FILE_NAME = re.compile(r"__\d{1,9}_\d{1,9}\.distcp|rest\.pt", re.ASCII)  # the only files an index may name
DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


def extract_tensors(checkpoint: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by model.NAME and optimizer.NUMBER.NAME, the checkpoint without them). Scalars such as AdamW's
    step stay in the checkpoint. Tied embeddings are one tensor."""
    rest = {**checkpoint, "model": {}}
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items()}
    if checkpoint["config"].get("tie_word_embeddings"):
        tensors.pop("model.lm_head.weight", None)
    if "optimizer" in checkpoint:
        rest["optimizer"] = {**checkpoint["optimizer"], "state": {}}
        for number, values in checkpoint["optimizer"]["state"].items():
            scalars = rest["optimizer"]["state"][number] = {}
            for name, value in values.items():
                if torch.is_tensor(value) and value.dim() > 0:
                    tensors[f"optimizer.{number}.{name}"] = value
                else:
                    scalars[name] = value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
    return tensors, rest


def insert_tensors(tensors: dict[str, Any], rest: dict) -> dict:
    """The inverse of extract_tensors. KeyError, IndexError or TypeError if the two do not fit together."""
    checkpoint = {**rest, "model": {}}
    if "optimizer" in rest:
        state = {number: dict(scalars) for number, scalars in rest["optimizer"]["state"].items()}
        checkpoint["optimizer"] = {**rest["optimizer"], "state": state}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "model":
            checkpoint["model"][name] = tensor
        else:
            number, moment = name.split(".", 1)
            checkpoint[kind]["state"][int(number)][moment] = tensor
    if rest["config"].get("tie_word_embeddings"):
        checkpoint["model"]["lm_head.weight"] = checkpoint["model"]["transformer.wte.weight"]
    return checkpoint


# ---------------------------------------------------------------------------- WRITE
class PartWriter(dcp.FileSystemWriter):
    """DCP's writer of files, which reports a full disk as OSError."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """DCP calls this on every rank. DCP would drop the OSError, which is the context of torch's error."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise root_error(error) from None

    def finish(self, metadata: Metadata, results: list[list]) -> None:
        """torch 2.11 leaves the places of the chunks out of the metadata that dcp.save returns."""
        super().finish(metadata, results)
        metadata.storage_data = {one.index: one.storage_data for rank in results for one in rank}


class Saver:
    """Saves checkpoints together with all ranks. group: gloo, for this object only; None: one process."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank = group, 0 if group is None else dist.get_rank(group)

    def stage(self, checkpoint: dict, path: Path) -> tuple:
        """Copy this rank's part to the host, for commit() to write to `path`. NotFiniteError; OSError."""
        writer = PartWriter(path.with_name(f".{path.name}.unfinished"))

        def copy() -> tuple[dict, dict]:
            if self.rank == 0:  # remove what killed processes left; no other run writes to this log_dir
                for leftover in [writer.path] if self.group is None else path.parent.glob(".model_*.*ed"):
                    shutil.rmtree(leftover, ignore_errors=True)
            tensors, rest = extract_tensors(checkpoint)
            archives.check_finite(archives.DIVERGED.format(checkpoint["step"]), tensors)
            # dcp.async_save would hang: if one rank had no memory for its copy, the others would wait for it.
            return tensors if self.group is None else writer.stage(tensors), rest  # one process need not copy

        return *self.together(copy), writer, path

    def commit(self, staged: tuple) -> Path:
        """Write the parts; when all ranks have, the folder gets its name. OSError: the parts are removed."""
        tensors, rest, writer, path = staged
        temporary, alone, own = writer.path, self.group is None, writer.path / f"__{self.rank}_0.distcp"
        try:
            metadata = dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=alone)
            checksums = self._gather(self.together(lambda: size_and_checksum(own) if own.exists() else None))
            files = {f"__{rank}_0.distcp": found for rank, found in enumerate(checksums) if found}
            self.together(lambda: self.rank > 0 or publish(temporary, path, files, metadata, rest))
            return path
        except BaseException as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, dcp.CheckpointException):  # its text has the tracebacks of all ranks
                rank, (reason, _) = next(iter(error.failures.items()))
                raise OSError(f"{temporary}: rank {rank}: {str(reason) or repr(reason)}") from error
            raise

    def together(self, work: Callable) -> Any:
        """Return work(). All ranks must call this; if work() fails on any rank, all ranks raise."""
        result = error = None
        try:
            result = work()
        except Exception as problem:
            error = problem
        kind = type(error) if isinstance(error, CheckpointError) else OSError
        for rank, other in enumerate(self._gather(error and (kind, str(error) or repr(error)))):
            if other:
                raise error or other[0](f"rank {rank}: {other[1]}")
        return result

    def _gather(self, value: Any) -> list:
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values


def publish(temporary: Path, path: Path, files: dict, metadata: Metadata, rest: dict) -> None:
    """Write rest.pt and index.json beside the parts, and give the folder its name."""
    for name in files:
        if not (temporary / name).is_file():
            raise OSError(f"{temporary}: no {name} here: log_dir must be on a disk that all ranks share")
    rest = {**rest, "format": archives.CHECKPOINT_FORMAT}
    write_atomically(temporary / REST_FILE, lambda file: torch.save(rest, file))
    files = files | {REST_FILE: size_and_checksum(temporary / REST_FILE)}
    tensors: dict[str, dict] = {}
    for name, stored in metadata.state_dict_metadata.items():
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(stored.size), "parts": (parts := [])}
        for chunk in stored.chunks:
            at = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            parts.append([list(chunk.offsets), list(chunk.sizes), at.relative_path, at.offset, at.length])
    index = json.dumps({"format": archives.CHECKPOINT_FORMAT, "files": files, "tensors": tensors})
    text = json.dumps({"crc32": zlib.crc32(index.encode()), "index": index})
    write_atomically(temporary / INDEX_FILE, lambda file: file.write(text.encode()))
    read_index(temporary)  # an index that read_index refuses must not replace a good checkpoint
    archives.remove(path, successor=temporary)
    sync_folder(path.parent)


def save(checkpoint: dict, path: Path) -> None:
    """Write a whole checkpoint as the folder `path`, in this process alone."""
    saver = Saver(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")  # not needed here
        saver.commit(saver.stage(checkpoint, path))


# ---------------------------------------------------------------------------- READ
class Index(NamedTuple):
    """index.json: [size, CRC-32] of each file; DCP's metadata, whose storage_data load_tensor takes."""

    path: Path
    files: dict[str, list[int]]
    metadata: Metadata

    def tensors(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """A tensor, not filled yet, for each that is stored."""
        stored = self.metadata.state_dict_metadata.items()
        return {name: torch.empty(t.size, dtype=t.properties.dtype, device=device) for name, t in stored}


def read_index(path: Path) -> Index:
    """The index of a folder, compared with its files' sizes. CheckpointError; OSError as in `reading`."""
    with reading(path / INDEX_FILE, "not a checkpoint, or damaged"):
        check_regular(path / INDEX_FILE)
        outer = json.loads((path / INDEX_FILE).read_bytes())
        if zlib.crc32(outer["index"].encode()) != outer["crc32"]:
            raise ValueError("its checksum is wrong")
        index, tensors, places = json.loads(outer["index"]), {}, {}
        archives.check_format(path, index)
        for name in (REST_FILE, *index["files"]):
            if name not in index["files"] or not FILE_NAME.fullmatch(name):  # such as ../../etc/passwd
                raise ValueError(f"{name[:40]!r} is missing or is no file of a checkpoint")
            with reading(path / name, "the checkpoint is damaged"):
                check_regular(path / name, index["files"][name][0])
        for name, stored in index["tensors"].items():
            shape, dtype, chunks = torch.Size(stored["shape"]), DTYPES.get(stored["dtype"]), []
            if dtype is None:
                raise ValueError(f"there is no dtype {stored['dtype'][:40]!r}")
            if len(stored["parts"]) > len(index["files"]):  # a rank writes one part of a tensor
                raise ValueError(f"{name} has {len(stored['parts'])} parts, more than there are files")
            for offsets, sizes, file, start, length in stored["parts"]:
                if file not in index["files"] or math.prod(sizes) * dtype.itemsize > length:
                    raise ValueError(f"a part of {name} does not fit into {file!r}")
                if 0 not in sizes:  # FSDP gives some ranks an empty part
                    chunk = dcp_metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                    places[MetadataIndex(name, offsets)] = (path / file, start, length, chunk.sizes, dtype)
                    chunks.append(chunk)
            check_grid(name, shape, chunks)
            properties = dcp_metadata.TensorProperties(dtype=dtype)
            tensors[name] = dcp_metadata.TensorStorageMetadata(properties, shape, chunks)
    return Index(path, index["files"], Metadata(tensors, storage_data=places))


def check_grid(name: str, shape: torch.Size, chunks: list) -> None:
    """ValueError unless the chunks are the cells of a grid that fills the shape. All layouts make one."""
    cells, fills = 1, all(len(c.offsets) == len(c.sizes) == len(shape) for c in chunks)
    boxes = [tuple((o, o + s) for o, s in zip(c.offsets, c.sizes, strict=False)) for c in chunks]
    for dim, size in enumerate(shape) if fills else ():
        ranges = sorted({box[dim] for box in boxes})  # each must begin where the previous one ends
        fills &= [begin for begin, _ in ranges] + [size] == [0] + [end for _, end in ranges]
        cells *= len(ranges)
    if not (fills and cells == len(boxes) == len(set(boxes))):
        raise ValueError(f"the parts of {name} do not fill its shape {list(shape)} exactly once")


def verify(path: Path) -> None:
    """Compare all files of a folder with their checksums. CheckpointError; OSError as in `reading`."""
    for name, expected in read_index(path).files.items():
        with reading(path / name, "the checkpoint is damaged"):
            if size_and_checksum(path / name) != expected:
                raise ValueError("size or checksum is wrong")


def read_rest(path: Path) -> dict:
    """The checkpoint without its tensors; the entry "index" says where they are. Errors as in read_index."""
    index = read_index(path)
    with reading(path / REST_FILE, f"it is no checkpoint of ours, or it is of another {INDEX_FILE}"):
        with open(path / REST_FILE, "rb") as file:
            rest = archives.load_archive(file)
        archives.check_format(path, rest)
        checkpoint = check_checkpoint(insert_tensors(index.tensors("meta"), rest))
    return {**rest, "config": checkpoint["config"], "index": index}


def load(path: Path) -> dict:
    """The whole checkpoint, as if read from a single file, on the CPU. Errors as in read_index."""
    rest = read_rest(path)
    with reading(path, "cannot make tensors of these shapes"):
        tensors = rest["index"].tensors()
    return fill(tensors, rest)


def fill(targets: dict[str, torch.Tensor], rest: dict) -> dict:
    """What read_rest returned, and its tensors, read into the targets of their names (of a DTensor, this
    rank's part). CheckpointError, with the name, if one is missing, misshapen or not finite."""
    path, _, metadata = rest.pop("index")
    for name, target in targets.items():
        stored = metadata.state_dict_metadata.get(name)
        shape = "nothing" if stored is None else list(stored.size)
        if shape != list(target.shape):
            raise CheckpointError(f"{path}: {name} should be {list(target.shape)}, but there is {shape}")
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(targets, metadata)
    for item in planner.create_local_plan().items:  # an item copies a box of a stored part to a target
        box = tuple(slice(o, o + size) for o, size in zip(item.storage_offsets, item.lengths, strict=True))
        part = archives.load_tensor(*metadata.storage_data[item.storage_index])
        planner.resolve_tensor(item).copy_(part[box])
    archives.check_finite(f"{path}", targets, ". Use an earlier checkpoint")
    return insert_tensors(targets, rest)
