"""Checkpoints as folders: equal to single files, whole or not there, damage is found, no code in them is run.

Run: python -m pytest tests/training/test_sharded.py

tests/training/test_parallel.py has folders that many processes have written.
"""

import errno
import json
import os
import pickle
import resource
import shutil
import traceback
import zlib
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import CUT, equal, full_disk, little_memory
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import checkpoint
from model import GPTConfig, GPTLMHeadModel
from training import checkpoints as ckpt
from training import sharded
from training.archives import CHECKPOINT_FORMAT, CheckpointError, NewerFormatError
from training.checkpoint_writer import CheckpointWriter


def content(step: int = 5, tied: bool = True) -> dict:
    """A small checkpoint with a step of AdamW in it."""
    torch.manual_seed(step)
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=264, num_experts=3, encoding="bytes",
        encoding_size=257, tie_word_embeddings=tied,
    )  # fmt: skip
    model = GPTLMHeadModel(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    x = torch.randint(50, (2, 8))
    model(x, targets=x, return_dict=True).loss.backward()
    optimizer.step()
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": config.to_dict(),
        "step": step, "val_loss": 3.5, "loader": {"position": 7}, "rng": torch.get_rng_state(),
        "health": {}, "elapsed_s": 1.0, "train_config": {"T": 8}, "format": CHECKPOINT_FORMAT,
    }  # fmt: skip


class Alone:
    """CheckpointWriter of a single process that writes folders."""

    def __new__(cls, folder, **more):
        writer = CheckpointWriter(folder, **more)
        writer.saver = sharded.Saver(None)
        return writer


@pytest.fixture
def saved(tmp_path):
    """(path of a folder, what was saved)"""
    state = content()
    sharded.save(state, tmp_path / "model_00005")
    return tmp_path / "model_00005", state


@pytest.mark.parametrize("tied", [True, False])
def test_file_and_folder_become_each_other(tmp_path, tied):
    state = content(tied=tied)
    file = ckpt.save_checkpoint(state, tmp_path)
    folder, back = tmp_path / "model_00005", tmp_path / "back.pt"
    assert checkpoint.main(["convert", str(file), str(folder)]) == 0
    assert checkpoint.main(["convert", str(folder), str(back)]) == 0
    for path in (file, folder, back):
        assert equal(ckpt.load_checkpoint(path), state)
        assert checkpoint.main(["verify", str(path)]) == 0
    model = ckpt.load_model(f"{folder}/")
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert checkpoint.main(["convert", str(file), str(folder)]) == 2  # nothing is overwritten
    assert not list(tmp_path.glob(".*"))


def test_a_conversion_that_was_killed_can_be_repeated(saved, tmp_path):
    """What it has left goes; what other processes are writing beside it stays."""
    path, state = saved
    for name in (".copy.unfinished", ".model_00006.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half of it")
    assert checkpoint.main(["convert", f"{path}/", f"{tmp_path / 'copy'}/"]) == 0
    assert equal(ckpt.load_checkpoint(tmp_path / "copy"), state)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".model_00006.unfinished", "copy", "model_00005"]


def test_a_folder_is_a_checkpoint_even_if_latest_lies_in_it(saved):
    """As after a run whose log_dir was the checkpoint's folder."""
    path, state = saved
    (path / "latest").write_text("model_00007.pt")
    assert ckpt.follow_latest(f"{path}/") == path
    assert equal(ckpt.load_checkpoint(f"{path}/"), state)
    assert equal(ckpt.load_model(path).state_dict(), state["model"])
    (path.parent / "latest").write_text("model_00005")
    with pytest.raises(CheckpointError, match="is the folder of a run; its newest checkpoint is"):
        ckpt.load_checkpoint(f"{path.parent}/")


def test_a_folder_is_exported(saved, tmp_path):
    path, state = saved
    assert checkpoint.main(["export", str(path), str(tmp_path / "out")]) == 0
    exported = GPTLMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    learned = {name: value for name, value in state["model"].items() if value.is_floating_point()}
    assert all(torch.equal(exported[name], value) for name, value in learned.items())


@pytest.mark.parametrize("name", ["__0_0.distcp", "rest.pt", "index.json"])
def test_damage_is_found(saved, name):
    """A changed bit anywhere, a file cut off or missing: the error names the folder."""
    path, _ = saved
    whole = (path / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        changed = bytearray(whole)
        changed[place] ^= 4
        (path / name).write_bytes(changed)
        try:  # a space in a JSON file may become another character that means the same
            found = ckpt.load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert name == "index.json" and equal(found, saved[1])
    for rest in (whole[:-1], whole + b"x", b""):
        (path / name).write_bytes(rest)
        with pytest.raises(CheckpointError, match="model_00005"):
            ckpt.load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="model_00005"):
        ckpt.load_checkpoint(path)


def forge(path, change) -> None:
    """Change the index, and its checksum with it."""
    index = index_of(path)
    change(index)
    write_index(path, index)


def index_of(path) -> dict:
    return json.loads(json.loads((path / "index.json").read_text())["index"])


def write_index(path, index: dict) -> None:
    text = json.dumps(index)
    (path / "index.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "index": text}))


def test_a_forged_folder_runs_no_code_and_leads_nowhere(saved, tmp_path):
    path, state = saved
    index = index_of(path)

    class Evil:
        def __reduce__(self):
            return (print, ("evil code ran",))

    def outside(index):
        index["files"]["../secret"] = [0, 0]

    (path / ".metadata").write_bytes(pickle.dumps(Evil()))  # torch's own index is never opened
    assert equal(ckpt.load_checkpoint(path), state)
    (tmp_path / "secret").write_bytes(b"")
    forge(path, outside)
    with pytest.raises(CheckpointError, match=r"index\.json: .*'\.\./secret' is missing or is no file"):
        ckpt.load_checkpoint(path)
    write_index(path, index)
    torch.save(Evil(), path / "rest.pt")
    with pytest.raises(CheckpointError, match=r"rest\.pt: torch.load cannot read it safely"):
        sharded.read_rest(path)


def wte(index: dict) -> dict:
    return index["tensors"]["model.transformer.wte.weight"]


FORGERIES = {
    "it lacks one of files, tensors": lambda index: index.pop("tensors"),
    r"'rest\.pt' is missing": lambda index: index["files"].pop("rest.pt"),
    "'/etc/passwd' is missing or is no file": lambda index: index["files"].update({"/etc/passwd": [1, 1]}),
    r"rest\.pt.*: size or checksum is wrong": lambda index: index["files"].update({"rest.pt": []}),
    "does not fit into '/etc/passwd'": lambda index: wte(index)["parts"][0].__setitem__(2, "/etc/passwd"),
    "it is of another index.json": lambda index: index["tensors"].update(load=wte(index)),
    "there is no dtype 'load'": lambda index: wte(index).update(dtype="load"),
    "no tensor can be read from byte .* it is no torch.int32": lambda index: wte(index).update(dtype="int32"),
    "it lacks 'shape'": lambda index: wte(index).pop("shape"),
    "do not fill its shape .265, 16. exactly": lambda index: wte(index).update(shape=[265, 16]),
    "do not fill its shape .16, 264. exactly": lambda index: wte(index).update(shape=[16, 264]),
    "do not fill its shape .264, 16. exactly": lambda index: wte(index).update(parts=[]),
    "do not fill .* exactly once": lambda index: wte(index).update(parts=2 * wte(index)["parts"]),
    "no tensor can be read from byte -1": lambda index: wte(index)["parts"][0].__setitem__(3, -1),
    r"__0_0\.distcp: .* the file is cut off": lambda index: wte(index)["parts"][0].__setitem__(3, 10**9),
    "a part of .* does not fit into": lambda index: wte(index)["parts"][0].__setitem__(4, 5),
    "no tensor can be read from byte 5": lambda index: wte(index)["parts"][0].__setitem__(3, 5),
    "another index.json: it lacks 99": lambda index: index["tensors"].update({"optimizer.99.m": wte(index)}),
    "another index.json: it lacks .*wte": lambda index: index["tensors"].pop("model.transformer.wte.weight"),
}


@pytest.mark.parametrize("message", FORGERIES)
def test_a_forged_index_is_refused(saved, capsys, message):
    """Its checksum is right; the error names the file and what is wrong there, without a traceback."""
    path, _ = saved
    forge(path, FORGERIES[message])
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        ckpt.load_checkpoint(path)
    assert checkpoint.main(["verify", str(path)]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_parts_that_overlap_or_leave_a_gap_are_refused_though_their_sizes_add_up():
    def check(shape, *parts):  # each (offsets, sizes)
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in parts]
        sharded.check_grid("x", torch.Size(shape), chunks)

    cells = [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (3, 2)), ((2, 2), (3, 2))]
    check([5, 4], *cells)
    check([], ((), ()))
    wrong = [
        ([4, 4], ((0, 0), (3, 4)), ((2, 0), (1, 4))), ([4, 4], ((0, 0), (3, 4)), ((4, 0), (1, 4))),
        ([5, 4], *cells[:3], cells[2]), ([5, 4], *cells[:3]), ([5], ((0, 0), (5, 1))), ([], ((0,), (1,))),
        ([-2, -3], ((0, 0), (-2, 3))), ([5, 4],), ([],), ([4], ((1,), (4,))), ([4], ((0,), (4, 1))),
    ]  # fmt: skip
    for shape, *parts in wrong:
        with pytest.raises(ValueError, match="the parts of x do not fill its shape"):
            check(shape, *parts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[dict[str, bytes], dict]:
    """The files of a folder, by name, and what it holds."""
    moments = {"step": torch.tensor(2.0), "exp_avg": torch.randn(4, 3)}
    state = {
        "model": {"a": torch.randn(4, 3), "b": torch.arange(3), "c": torch.tensor(1.5)},
        "config": {"n_layer": 1}, "step": 5, "format": CHECKPOINT_FORMAT,
        "optimizer": {"state": {0: moments}, "param_groups": [{"params": [0]}]},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("tiny") / "model_00005"
    sharded.save(state, path)
    return {name: (path / name).read_bytes() for name in ("__0_0.distcp", "rest.pt", "index.json")}, state


def put(folder, files: dict[str, bytes]):
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / name).write_bytes(value)
    return folder


@settings(max_examples=200)
@given(
    name=st.sampled_from(["__0_0.distcp", "rest.pt", "index.json"]),
    change=st.one_of(st.binary(max_size=300), st.lists(CUT, min_size=1, max_size=4)),
    seals=st.booleans(),
)
def test_random_bytes_and_mutations_are_refused_or_harmless(tiny, tmp_path, name, change, seals):
    """In any file of a folder; also if somebody makes the checksums of the index right (`seals`), and where
    another rank has compared those (sharded.load)."""
    files, truth = tiny
    new = change if isinstance(change, bytes) else files[name]
    for place, removed, inserted in change if isinstance(change, list) else ():
        at = int(place * len(new))
        new = new[:at] + inserted + new[at + removed :]
    path = put(tmp_path / "model_00005", {**files, name: new})
    if seals and name != "index.json":
        forge(path, lambda index: index["files"].update({name: [len(new), zlib.crc32(new)]}))
    for read in (ckpt.load_checkpoint, sharded.load):
        try:
            assert equal(read(path), truth)
        except CheckpointError as error:
            assert str(path) in str(error)


def places(value, path: tuple = ()) -> list[tuple]:
    """The way to everything in nested dictionaries and lists, outermost first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


NUMBERS = st.one_of(st.integers(-2, 20), st.integers(), st.integers(2**40, 2**70), st.floats(), st.booleans())
JSON = st.recursive(
    st.one_of(NUMBERS, st.none(), st.text(max_size=5), st.sampled_from(["float32", "int64", "rest.pt", "e"])),
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=3), x, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=300)
@given(data=st.data())
def test_any_other_index_is_refused_or_gives_the_right_tensors(tiny, tmp_path, data):
    """One to three places of it hold something else, or nothing, and its checksum is right."""
    files, truth = tiny
    path = put(tmp_path / "model_00005", files)
    index = index_of(path)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, key = data.draw(st.sampled_from(places(index)[1:]))
        inner = index
        for step in way:
            inner = inner[step]
        if data.draw(st.booleans()):
            inner[key] = data.draw(JSON)
        else:
            inner.pop(key)
    write_index(path, index)
    for read in (ckpt.load_checkpoint, sharded.load):
        try:
            found = read(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            continue
        for name in found["model"].keys() & truth["model"].keys():
            assert equal(found["model"][name], truth["model"][name])
        assert found["step"] == 5 and found["optimizer"]["state"].keys() == {0}


def test_a_newer_format_is_named(saved):
    path, _ = saved
    forge(path, lambda index: index.update(format=CHECKPOINT_FORMAT + 1))
    with pytest.raises(NewerFormatError, match="update the program"):
        ckpt.load_newest(path.parent)


def test_the_newest_good_one_is_found_among_both_forms(tmp_path):
    ckpt.save_checkpoint(content(1), tmp_path)
    for step in (2, 3):
        sharded.save(content(step), tmp_path / f"model_{step:05d}")
    (tmp_path / "model_00004").mkdir()  # never finished: no index
    warnings = []
    path, state = ckpt.load_newest(tmp_path, warnings.append)
    assert path.name == "model_00003" and state["step"] == 3 and len(warnings) == 1
    (tmp_path / "model_00003" / "__0_0.distcp").unlink()
    assert ckpt.load_newest(tmp_path, warnings.append)[0].name == "model_00002"
    (tmp_path / "latest").write_text("model_00002")
    assert ckpt.load_checkpoint(tmp_path / "latest")["step"] == 2
    shutil.rmtree(tmp_path / "model_00002")
    assert ckpt.load_newest(tmp_path, warnings.append)[0].name == "model_00001.pt"


def test_old_folders_go(tmp_path):
    said = []
    writer = Alone(tmp_path, keep_last=2, keep_every=4, say=said.append)
    for step in range(1, 8):
        writer.save(content(step))
        assert writer.wait() is None
        assert (tmp_path / "latest").read_text() == f"model_{step:05d}"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "model_00004", "model_00006", "model_00007"]
    assert all("saved" in text for text in said) and len(said) == 7


def test_a_step_that_is_done_again_replaces_its_folder(tmp_path):
    writer = Alone(tmp_path, say=str)
    for val_loss in (1.0, 2.0):
        writer.save({**content(), "val_loss": val_loss})
        assert writer.wait() is None
        assert ckpt.load_checkpoint(tmp_path / "model_00005")["val_loss"] == val_loss
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "model_00005"]


def test_what_is_not_finite_is_not_saved(tmp_path):
    said = []
    writer = Alone(tmp_path, say=said.append)
    writer.save(content(1))
    bad = content(2)
    bad["model"]["transformer.wte.weight"][3, 3] = float("nan")
    writer.save(bad)
    assert isinstance(writer.wait(), CheckpointError) and "NOT WRITTEN" in said[-1]
    assert "step 2 is not saved: model.transformer.wte.weight is not finite" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "model_00001"]
    assert writer.error is not None
    writer.save(content(3))
    assert writer.wait() is None and writer.error is None
    assert ckpt.load_newest(tmp_path)[0].name == "model_00003"


def test_a_full_disk_leaves_what_there_was(tmp_path):
    """Wherever the disk is full, the error is the system's."""
    said = []
    writer = Alone(tmp_path, say=said.append)
    writer.save(content(1))
    assert writer.wait() is None
    state, folder = content(2), tmp_path / "model_00001"
    sizes = [path.stat().st_size for path in folder.iterdir()]
    for room in (0, 100, 600, 5_000, 20_000, *(size - 1 for size in sizes)):
        with full_disk(room):
            writer.save(state)
            assert isinstance(writer.wait(), OSError)
        assert "step 2: WARNING: CHECKPOINT NOT WRITTEN" in said[-1] and "model_00001" in said[-1]
        assert "File too large" in said[-1], (room, said[-1])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "model_00001"]
        assert writer.error is not None
    assert ckpt.load_newest(tmp_path)[0].name == "model_00001"
    writer.save(content(3))
    assert writer.wait() is None and writer.error is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "model_00001", "model_00003"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "rest.pt", "index.json"])
def test_a_disk_that_does_not_answer_is_no_damage(saved, name):
    """An older checkpoint is not taken in its place. Nobody can read the first page of a process's memory."""
    path, _ = saved
    sharded.save(content(4), path.with_name("model_00004"))
    (path / name).unlink()
    (path / name).symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=f"Input/output error: .*model_00005/{name}") as caught:
        ckpt.load_newest(path.parent)
    assert caught.value.errno == errno.EIO
    (path / name).unlink()
    assert ckpt.load_newest(path.parent, str)[0].name == "model_00004"


def test_too_little_memory_is_no_damage(tmp_path):
    state = {"model": {"a": torch.zeros(20 << 20)}, "config": {}, "step": 5}
    sharded.save(state, tmp_path / "model_00005")
    with little_memory(50), pytest.raises(OSError, match=r"no memory to read it.*model_00005") as caught:
        ckpt.load_newest(tmp_path)
    assert caught.value.errno == errno.ENOMEM
    assert equal(ckpt.load_newest(tmp_path)[1]["model"], state["model"])


def saves_of_a_rank(rank: int, folder: Path) -> list[tuple]:
    """What a process does that saves together with another one; after each save, how it went here."""
    torch.cuda.is_available = lambda: False  # a fork cannot use what its parent has initialised
    store, minute = f"file://{folder / 'store'}", timedelta(minutes=1)
    dist.init_process_group("gloo", init_method=store, timeout=minute, rank=rank, world_size=2)
    mesh, seen, said = init_device_mesh("cpu", (2,)), [], []
    weight = distribute_tensor(torch.arange(3_000.0).view(5, 600), mesh, [Shard(0)])
    state = {"model": {"a": weight, "b": torch.ones(7)}, "config": {}}
    writer = CheckpointWriter(folder, keep_last=9, say=said.append, rank=rank, savers=dist.group.WORLD)
    writer.retry_s = 0

    def save(step: int, here: bool, before=lambda: None, sick: float = 0.0) -> None:
        """here: whether it is this rank that something happens to."""
        good = weight.to_local().clone()
        weight.to_local()[-1] += sick if here else 0.0
        with full_disk(300 if here and not sick else resource.RLIM_INFINITY):
            writer.save({**state, "step": step}, before)
            writer.wait()
        seen.append((step, str(writer.error), writer.wants_retry()))
        weight.to_local().copy_(good + 1)  # a step of training, for which the ranks need each other
        count = torch.ones(1)
        dist.all_reduce(count)
        assert count == 2

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    save(1, here=False)
    save(2, here=rank == 1)  # which cannot write its part
    save(3, here=rank == 0)  # which cannot write its part, either
    save(4, here=False)
    save(5, here=False, before=full if rank == 0 else lambda: None)  # the log's disk is full
    save(6, here=rank == 1, sick=float("nan"))
    stage = sharded.PartWriter.stage
    no_memory = lambda self, tensors: torch.empty(1 << 60)  # noqa: E731
    sharded.PartWriter.stage = stage if rank == 0 else no_memory
    save(7, here=False)
    sharded.PartWriter.stage = stage
    save(8, here=False)
    dist.destroy_process_group()
    return seen


def test_what_befalls_one_of_two_ranks_befalls_the_save(tmp_path):
    """A full disk, bad values, no memory: both learn of it and go on; the checkpoints before stay, the next
    save succeeds. The processes are forks of this one, which spares them the imports."""
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                seen = json.dumps(saves_of_a_rank(rank, tmp_path))
            except BaseException:
                seen = traceback.format_exc()
            (tmp_path / f"seen{rank}").write_text(seen)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    texts = [(tmp_path / f"seen{rank}").read_text() for rank in (0, 1)]
    assert "Traceback" not in "".join(texts), "\n".join(texts)
    seen = [json.loads(text) for text in texts]
    assert [[step for step, error, _ in rank if error != "None"] for rank in seen] == [[2, 3, 5, 6, 7]] * 2
    # Bad values stay bad: to try again makes no sense.
    assert [[step for step, _, again in rank if again] for rank in seen] == [[2, 3, 5, 7]] * 2
    errors = [error for _, error, _ in seen[0]]
    assert "rank 1: [Errno 27] File too large" in errors[1] and "File too large" in errors[2]
    assert "No space left" in errors[4] and "rank 1: " in errors[6] and "can't allocate memory" in errors[6]
    assert errors[5] == "rank 1: step 6 is not saved: model.a is not finite"
    assert sorted(map(ckpt.step_of, tmp_path.glob("*model*"))) == [1, 4, 8]
    for step in (1, 4, 8):
        found = ckpt.load_checkpoint(tmp_path / f"model_{step:05d}")["model"]["a"]
        assert torch.equal(found, torch.arange(3_000.0).view(5, 600) + step - 1)


def test_another_model_is_refused_by_the_name_of_a_tensor(saved):
    path, state = saved
    model = GPTLMHeadModel(GPTConfig(**(state["config"] | {"n_embd": 32})))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")

    class Loader:
        def load_state_dict(self, state):
            pass

    with pytest.raises(CheckpointError, match=r"wte.weight should be \[264, 32\], but there is \[264, 16\]"):
        ckpt.restore(ckpt.load_checkpoint(path, whole=False), model, optimizer, Loader())
