"""The index of a checkpoint's folder: another one is refused, or gives the right tensors.

test_checkpoints.py damages the files of folders; test_parallel.py has folders that many processes wrote."""

import copy
import json
import random
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import refuses
from models import WTE, small_checkpoint
from processes import equal, write_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import checkpoint
from training import checkpoints as ckpt
from training import sharded
from training.archives import CheckpointError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint as a folder, with WTE of shape (5, 7)."""
    sharded.save(small_checkpoint(5), tmp_path / "model_00005")
    return tmp_path / "model_00005"


@pytest.fixture
def original(folder) -> dict:
    """The index of `folder`."""
    return json.loads(json.loads((folder / "index.json").read_text())["index"])


def a(index: dict) -> dict:
    return index["tensors"][f"model.{WTE}"]


def change_part(place: int, value):
    """Of the file, offset and so on of the tensor's only part."""
    return lambda index: a(index)["parts"][0].__setitem__(place, value)


FORGERIES = {  # what the error says: the change
    "it lacks 'tensors'": lambda index: index.pop("tensors"),
    r"'rest\.pt' is missing": lambda index: index["files"].pop("rest.pt"),
    "'/etc/passwd' is missing or is no file": lambda index: index["files"].update({"/etc/passwd": [1, 1]}),
    r"rest\.pt.* is damaged": lambda index: index["files"].update({"rest.pt": []}),
    "does not fit into '/etc/passwd'": change_part(2, "/etc/passwd"),
    "it is of another index.json": lambda index: index["tensors"].update(load=a(index)),
    "another index.json: it lacks 99": lambda index: index["tensors"].update({"optimizer.99.m": a(index)}),
    "there is no dtype 'load'": lambda index: a(index).update(dtype="load"),
    "wte.weight is torch.int32 of shape": lambda index: a(index).update(dtype="int32"),
    "it lacks 'shape'": lambda index: a(index).pop("shape"),
    "do not fill its shape .6, 7. exactly": lambda index: a(index).update(shape=[6, 7]),
    "no tensor can be read from byte -1": change_part(3, -1),
    r"__0_0\.distcp: .* the file is cut off": change_part(3, 10**9),
    "a part of .* does not fit into": change_part(4, 5),
}


@pytest.mark.parametrize("message", FORGERIES)
def test_a_forged_index_is_refused(folder, original, capsys, message):
    FORGERIES[message](original)
    write_index(folder, original)
    refuses(f"{folder}.*{message}", ckpt.load_checkpoint, folder, error=CheckpointError)
    assert checkpoint.main(["verify", str(folder)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_parts_that_overlap_or_leave_a_gap_are_refused_though_their_sizes_add_up():
    def check(shape, *parts):  # each (offsets, sizes)
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in parts]
        sharded.check_grid("x", torch.Size(shape), chunks)

    cells = [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (3, 2)), ((2, 2), (3, 2))]
    check([5, 4], *cells)
    check([], ((), ()))
    wrong = [([4, 4], ((0, 0), (3, 4)), ((2, 0), (1, 4))), ([4, 4], ((0, 0), (3, 4)), ((4, 0), (1, 4))),
             ([5, 4], *cells[:3], cells[2]), ([5, 4], *cells[:3]), ([5], ((0, 0), (5, 1))),
             ([], ((0,), (1,))), ([-2, -3], ((0, 0), (-2, 3))), ([5, 4],), ([],), ([4], ((1,), (4,))),
             ([4], ((0,), (4, 1)))]  # fmt: skip
    for shape, *parts in wrong:
        refuses("the parts of x do not fill its shape", check, shape, *parts)


def test_any_other_index_is_refused_or_gives_the_right_tensors(folder, original):
    """One to three entries of it are others, or are gone, and its checksum is right."""
    truth, accepted = small_checkpoint(5), 0
    values = [*range(-2, 21), "float32", "int64", "rest.pt", *fuzz.ODD_JSON]
    for number in range(200):
        chance, index = random.Random(number), copy.deepcopy(original)
        for _ in range(chance.randint(1, 3)):
            fuzz.forge(chance, index, values)
        write_index(folder, index)
        for read in (ckpt.load_checkpoint, sharded.load):
            try:
                found = read(folder)
            except CheckpointError as error:
                assert str(folder) in str(error), number
                continue
            for name in found["model"].keys() & truth["model"].keys():
                assert equal(found["model"][name], truth["model"][name]), number
            assert found["step"] == 5 and found["optimizer"]["state"].keys() == {0}, number
            accepted += 1
    assert 0 < accepted < 200
