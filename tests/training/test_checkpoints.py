"""Checkpoints, as files and as folders: whole or not there, and checked before they are believed.

test_checkpoint_writer.py has the thread that saves them; test_parallel.py has folders of many processes."""

import copy
import errno
import io
import json
import os
import pickle
import random
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import fuzz
import numpy as np
import pytest
import torch
from conftest import refuses
from models import WTE, Malice, dense_model, tokens
from models import small_checkpoint as small
from processes import at_call, equal, little_memory, write_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import checkpoint
from training import archives, sharded
from training import checkpoints as ckpt
from training.archives import CheckpointError, NewerFormatError
from training.checkpoints import load_checkpoint, load_newest, save_checkpoint


def save_folder(checkpoint: dict, log_dir: Path) -> Path:
    path = ckpt.checkpoint_path(log_dir, checkpoint["step"], suffix="")
    sharded.save(checkpoint, path)
    return path


@pytest.fixture(params=["file", "folder"])
def save(request):
    """A function that saves a checkpoint in one of its two forms and returns its path."""
    return {"file": save_checkpoint, "folder": save_folder}[request.param]


# ---------------------------------------------------------------------------- written whole or not at all
def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So a kill at any byte leaves a file of another name, which the next run removes (test_resume.py)."""
    done = []
    kind = lambda fd: "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"  # noqa: E731
    at_call(monkeypatch, os, "fsync", range(9), lambda fd: done.append(f"fsync {kind(fd)}"))
    at_call(monkeypatch, os, "replace", range(9), lambda _, to: done.append(f"rename {Path(to).name}"))
    save_checkpoint(small(4), tmp_path)
    assert done == ["fsync file", "rename model_00004.pt", "fsync folder", "fsync file", "rename latest",
                    "fsync folder"]  # fmt: skip
    there = []  # whether the folder has its name while one is deleted, which takes long
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: there.append((tmp_path / "model_00005").exists()))
    save_folder(small(5), tmp_path)
    save_folder(small(5), tmp_path)
    assert there == [False, True, True, True, True]


# ---------------------------------------------------------------------------- found
def test_the_newest_good_one_is_found_among_both_forms(tmp_path, monkeypatch):
    for step in (1, 3, 100_000):
        save_checkpoint(small(step), tmp_path)
    for step in (2, 99_999):
        save_folder(small(step), tmp_path)
    os.truncate(tmp_path / "model_100000.pt", 1500)
    (tmp_path / "model_99999" / "__0_0.distcp").unlink()
    (tmp_path / "model_00004").mkdir()  # never finished: no index
    content = (tmp_path / "model_00003.pt").read_bytes()
    weights = small(3)["model"][WTE].numpy().tobytes()
    (tmp_path / "model_00003.pt").write_bytes(content.replace(weights, weights[::-1]))
    (tmp_path / "model_best.pt").write_bytes(b"not one of ours, by its name")
    warnings = []
    path, found = load_newest(tmp_path, warnings.append)
    assert path.name == "model_00002" and found["step"] == 2 and len(warnings) == 4
    skipped = "model_100000.pt", "model_99999", "model_00004", r"model_00003.pt: .*checksum"
    for warning, text in zip(warnings, skipped, strict=True):
        assert re.search(text, warning), warning
    (tmp_path / "model_00002" / "index.json").unlink()
    assert load_newest(tmp_path, str)[0].name == "model_00001.pt"
    assert load_newest(tmp_path / "nowhere") is None
    refuse = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", str(tmp_path)))
    monkeypatch.setattr(os, "listdir", refuse)
    refuses(str(tmp_path), load_newest, tmp_path, error=PermissionError)


def test_all_ranks_resume_what_rank_0_has_found_at_step_0_too(save, tmp_path):
    path, ranks = save(small(0), tmp_path), []
    config = SimpleNamespace(resume="auto", log_dir=str(tmp_path))
    for rank in (0, 1):
        world = Mock(is_master=rank == 0, device="cpu", sum=lambda found: ranks.append(found) or ranks[0])
        found, state = ckpt.find_resumed(config, world, print)
        assert found == path and state["step"] == 0


def test_latest_is_followed_only_to_a_checkpoint_beside_it(save, tmp_path):
    path, latest = save(small(2), tmp_path), tmp_path / "latest"
    latest.write_text(path.name)
    if path.is_dir():  # it may have been a run's log_dir
        (path / "latest").write_text("model_00007.pt")
    for name in (path, latest, f"{path}/", f"{latest}/"):
        assert load_checkpoint(name)["step"] == 2 and ckpt.follow_latest(name) == path
    assert ckpt.list_checkpoints(f"{tmp_path}/") == [path]
    latest.write_text("../../etc/passwd")
    refuses("no checkpoint's name", load_checkpoint, latest, error=CheckpointError)
    latest.write_text("model_00009.pt")
    refuses(r"model_00009.pt: no such checkpoint", load_checkpoint, latest, error=FileNotFoundError)
    refuses(f"is the folder of a run; .*{latest}", load_checkpoint, f"{tmp_path}/", error=CheckpointError)


def test_a_newer_format_is_never_passed_over(save, tmp_path, monkeypatch):
    save(small(1), tmp_path)
    with monkeypatch.context() as patch:
        for module in (ckpt, archives):
            patch.setattr(module, "CHECKPOINT_FORMAT", 2)
        save(small(2), tmp_path)
    refuses(r"model_00002.* format is 2.* up to 1; update", load_newest, tmp_path, error=NewerFormatError)


# ---------------------------------------------------------------------------- the machine is to blame
def test_too_little_memory_is_no_damage(save, tmp_path):
    save(small(1), tmp_path)
    save(small(2, V=5 << 18), tmp_path)  # above 32 MB a tensor is never given memory that was freed before
    with little_memory(20), pytest.raises(OSError, match=r"no memory to read it.*model_00002") as caught:
        load_newest(tmp_path)
    assert caught.value.errno == errno.ENOMEM
    assert load_newest(tmp_path)[1]["step"] == 2


class Unanswering(io.FileIO):
    """A file of which the bytes from `place` on cannot be read: that raises `error`."""

    place, error = 0, None
    read, readall = io.RawIOBase.read, io.RawIOBase.readall  # these two call readinto

    def readinto(self, buffer) -> int:
        if self.tell() + len(buffer) > self.place:
            raise self.error
        return super().readinto(buffer)


@pytest.mark.parametrize("name", ["model_00002.pt", "model_00002/__0_0.distcp", "model_00002/rest.pt"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch, name, error):
    """At the first byte, in the middle, at the last byte; also once the checksums have been compared."""
    save_checkpoint(small(1), tmp_path)
    (save_folder if "/" in name else save_checkpoint)(small(2, V=1 << 15), tmp_path)
    file, message = tmp_path / name, f"{getattr(error, 'strerror', 'no memory to read it')}.*{name}"
    monkeypatch.setattr(Unanswering, "error", error)
    read_or_not = lambda p, mode: Unanswering(p) if p == file else open(p, mode)  # noqa: E731
    for module in (ckpt, archives, sharded):
        monkeypatch.setattr(module, "open", read_or_not, raising=False)
    for place in (0, file.stat().st_size // 2, file.stat().st_size - 1):
        monkeypatch.setattr(Unanswering, "place", place)
        for read in (ckpt.verify_checkpoint, load_checkpoint):
            refuses(message, read, tmp_path / name.split("/")[0], error=OSError)
        with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
            patch.setattr(ckpt, "verify_checkpoint", lambda path: None)
            load_newest(tmp_path)


# ---------------------------------------------------------------------------- damaged and foreign files
FILES = ["model_00003.pt", "model_00003/__0_0.distcp", "model_00003/rest.pt", "model_00003/index.json"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of FILES: one checkpoint in both forms."""
    folder = tmp_path_factory.mktemp("good")
    for save in (save_checkpoint, save_folder):
        save(small(3), folder)
    return {name: (folder / name).read_bytes() for name in FILES}


def verdict(good: dict[str, bytes], folder: Path, name: str, content: bytes) -> str:
    """ "refused" or "correct": what becomes of a checkpoint of which one file has this content."""
    (folder / "model_00003").mkdir(exist_ok=True)
    for other, whole in good.items():
        (folder / other).write_bytes(content if other == name else whole)
    path, result = folder / name.split("/")[0], "correct"
    for read in (sharded.load, load_checkpoint) if path.is_dir() else (load_checkpoint,):
        try:  # sharded.load is what ranks do when another one has compared the folder's checksums
            found = read(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            result = "refused"
        else:
            truth = {**small(3), "format": archives.CHECKPOINT_FORMAT}
            assert equal(found, truth), "a damaged checkpoint was loaded with other content"
    return result


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_or_harmless_and_a_cut_is_refused(good, tmp_path, name):
    content, is_part = good[name], name in FILES[1:3]
    for i in range(0, len(content), len(content) // 40):
        flipped = bytearray(content)
        flipped[i] ^= 1 << (i * 5) % 8
        result = verdict(good, tmp_path, name, bytes(flipped))
        assert result == "refused" or not is_part  # zip files and JSON have bits without a meaning
    for length in (*range(0, len(content), len(content) // 20), len(content) - 1):
        assert verdict(good, tmp_path, name, content[:length]) == "refused"


def test_a_tensor_marked_as_a_folder_and_a_compressed_file_are_refused(good, tmp_path):
    """torch.load would leave the tensor uninitialised, and no checksum is wrong. A compressed entry could ask
    for memory of any size."""
    marked = bytearray(good["model_00003.pt"])
    entry = marked.rindex(b"PK\x01\x02", 0, marked.rindex(b"data/0"))  # in the table at the end of the file
    marked[entry + 38] |= 16
    assert verdict(good, tmp_path, "model_00003.pt", bytes(marked)) == "refused"
    torch.load(tmp_path / "model_00003.pt")  # torch alone sees nothing
    path = tmp_path / "model_00001.pt"
    with zipfile.ZipFile(io.BytesIO(good["model_00003.pt"])) as plain, zipfile.ZipFile(path, "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    refuses(r"model_00001\.pt: .*kind of .* is wrong", load_checkpoint, path, error=CheckpointError)


FOREIGN = {  # name: what writes it
    "empty": lambda file: None, "npz": lambda file: np.savez(file, a=np.ones(3)),
    "list": lambda file: torch.save([1, 2], file),
    "no step": lambda file: torch.save({"model": {}, "config": {}}, file),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused(tmp_path, name):
    path = tmp_path / "model_00001.pt"
    with open(path, "wb") as file:
        FOREIGN[name](file)
    refuses(str(path), load_checkpoint, path, error=CheckpointError)


@pytest.mark.parametrize("place", ["file", "old torch format", "rest.pt", ".metadata"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, place):
    trace, folder, file = tmp_path / "trace", save_folder(small(1), tmp_path), tmp_path / "model_00001.pt"
    bad = {**small(1), "config": Malice(trace)}
    if place == ".metadata":  # torch's own index, a pickle: it is never opened
        (folder / place).write_bytes(pickle.dumps(bad))
        assert equal(load_checkpoint(folder)["model"], small(1)["model"])
    elif place == "rest.pt":
        torch.save(bad, folder / place)
        index = json.loads(json.loads((folder / "index.json").read_text())["index"])
        index["files"][place] = archives.size_and_checksum(folder / place)
        write_index(folder, index)
        with pytest.raises(CheckpointError, match=r"rest\.pt: it is no checkpoint.*: it holds code \(io"):
            sharded.read_rest(folder)
    else:
        torch.save(bad, file, _use_new_zipfile_serialization=place == "file")
        refuses(str(file), load_checkpoint, file, error=CheckpointError)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malice(trace)))  # the trap works: unpickling does run it
    assert trace.exists()


def test_a_checkpoint_of_another_model_is_named_as_such(tmp_path):
    model = dense_model()
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 1}
    path = save_checkpoint(state, tmp_path)
    assert torch.equal(ckpt.load_model(path)(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    for change in ({"n_embd": 32}, {"n_layer": 3}, {"n_head": 5}, {"dropout": "much"}):
        bad = state | {"config": model.config.to_dict() | change, "step": 2}
        with pytest.raises(CheckpointError, match=f"model_00002.*({'|'.join(change)}|embedding)"):
            ckpt.load_model(save_checkpoint(bad, tmp_path))


# ---------------------------------------------------------------------------- the index of a folder
@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint as a folder, with WTE of shape (5, 7)."""
    return save_folder(small(5), tmp_path)


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
    refuses(f"{folder}.*{message}", load_checkpoint, folder, error=CheckpointError)
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
    truth, accepted = small(5), 0
    values = [*range(-2, 21), "float32", "int64", "rest.pt", *fuzz.ODD_JSON]
    for number in range(200):
        chance, index = random.Random(number), copy.deepcopy(original)
        for _ in range(chance.randint(1, 3)):
            fuzz.forge(chance, index, values)
        write_index(folder, index)
        for read in (load_checkpoint, sharded.load):
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
