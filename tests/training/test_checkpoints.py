"""Checkpoint files: whole or not there, checked before they are believed, written while training goes on.

Run: python -m pytest tests/training/test_checkpoints.py
"""

import errno
import io
import os
import pickle
import signal
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import dense_model, tiny
from processes import CUT, equal, full_disk, little_memory

import checkpoint
from model import GPT, GPTLMHeadModel
from training import archives
from training import checkpoints as ckpt
from training.archives import CheckpointError
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import load_checkpoint, load_newest, save_checkpoint
from training.upcycle import upcycle


def small(step: int = 3, **more) -> dict:
    """The smallest dictionary that is a checkpoint; its numbers depend on the step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(5, 7, generator=generator), "b": torch.arange(3) + step}
    return {"model": weights, "config": {"n_layer": 1}, "step": step, **more}


# ---------------------------------------------------------------------------- written whole or not at all


def test_a_full_disk_at_any_byte_leaves_the_last_good_checkpoint(tmp_path):
    save_checkpoint(small(1), tmp_path)
    size = (tmp_path / "model_00001.pt").stat().st_size
    for room in range(0, size, 97):
        with full_disk(room), pytest.raises(OSError, match="File too large"):
            save_checkpoint(small(2), tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["latest", "model_00001.pt"]
    assert equal(load_newest(tmp_path)[1]["model"], small(1)["model"])
    assert (tmp_path / "latest").read_text() == "model_00001.pt"


def test_a_kill_at_any_byte_leaves_the_last_good_checkpoint(tmp_path):
    save_checkpoint(small(1), tmp_path)
    whole = (tmp_path / "model_00001.pt").read_bytes()
    path = tmp_path / "model_00002.pt"

    def die(file, count):
        file.write(whole[:count])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    for count in (0, 1, len(whole) // 2, len(whole)):
        child = os.fork()
        if child == 0:
            ckpt.write_atomically(path, lambda file, count=count: die(file, count))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        found, content = load_newest(tmp_path)
        assert found.name == "model_00001.pt" and equal(content["model"], small(1)["model"])
    assert len(list(tmp_path.glob(".*.tmp"))) == 4  # the next run removes them: test_resume.py


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    kind = lambda fd: "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"  # noqa: E731
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(f"fsync {kind(fd)}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"rename {Path(b).name}"), replace(a, b)))
    save_checkpoint(small(4), tmp_path)
    assert done == [
        "fsync file", "rename model_00004.pt", "fsync folder", "fsync file", "rename latest", "fsync folder",
    ]  # fmt: skip


def test_latest_never_names_what_is_not_there_and_old_ones_go(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep_last=2, keep_every=4)
    unlink, replace = Path.unlink, os.replace

    def check():
        latest = tmp_path / "latest"
        assert not latest.exists() or (tmp_path / latest.read_text()).exists()

    monkeypatch.setattr(Path, "unlink", lambda self, **kw: (unlink(self, **kw), check()))
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), check()))
    for step in range(1, 8):
        writer.save(small(step))
    assert writer.wait() is None
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == [7, 6, 4]
    assert (tmp_path / "latest").read_text() == "model_00007.pt"


def test_all_are_kept_unless_told_otherwise(tmp_path):
    for step in range(1, 5):
        save_checkpoint(small(step), tmp_path)
    assert ckpt.prune_checkpoints(tmp_path, keep_last=0, keep_every=2) == []
    assert len(ckpt.list_checkpoints(tmp_path)) == 4


def test_old_ones_stay_if_the_new_one_reads_back_wrong(tmp_path, monkeypatch):
    said = []
    writer = CheckpointWriter(tmp_path, keep_last=1, say=said.append)
    writer.save(small(1))
    writer.wait()
    save = ckpt.save_checkpoint

    def damage(checkpoint, folder):
        path = save(checkpoint, folder)
        content = bytearray(path.read_bytes())
        content[content.index(checkpoint["model"]["a"].numpy().tobytes()) + 40] ^= 16
        path.write_bytes(content)
        return path

    monkeypatch.setattr(ckpt, "save_checkpoint", damage)
    writer.save(small(2))
    assert isinstance(writer.wait(), CheckpointError) and "CHECKPOINT NOT WRITTEN" in said[-1]
    assert load_newest(tmp_path, said.append)[0].name == "model_00001.pt"


def test_numbers_beyond_five_digits_come_last(tmp_path):
    for step in (99_999, 100_000, 7):
        save_checkpoint(small(step), tmp_path)
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == [100_000, 99_999, 7]


# ---------------------------------------------------------------------------- written in the background


def test_training_goes_on_while_it_is_written_and_does_not_change_it(tmp_path):
    may_write = threading.Event()
    weights = torch.ones(1000)
    state = {**small(1), "model": {"a": weights, "tied": weights, "part": weights[:10]}}
    writer = CheckpointWriter(tmp_path)
    writer.save(state, before=may_write.wait)
    assert not (tmp_path / "model_00001.pt").exists()  # save has returned, nothing is written yet
    weights += 1  # the next step
    may_write.set()
    assert writer.wait() is None
    model = load_checkpoint(tmp_path / "model_00001.pt")["model"]
    assert equal(model, {"a": torch.ones(1000), "tied": torch.ones(1000), "part": torch.ones(10)})
    assert model["a"].data_ptr() == model["tied"].data_ptr()  # tied weights are in the file once
    assert (tmp_path / "model_00001.pt").stat().st_size < 7000


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    """The first is not written before the second has begun to wait for it."""
    order, second_waits = [], threading.Event()
    writer = CheckpointWriter(tmp_path, say=order.append)
    writer.save(small(1), before=lambda: second_waits.wait(60) and time.sleep(0.1))
    wait = writer.wait
    monkeypatch.setattr(writer, "wait", lambda: (second_waits.set(), wait())[1])
    pause = writer.save(small(2))
    assert pause > 0.05 and "step 1: saved" in order[0]
    writer.wait()
    assert equal(load_checkpoint(tmp_path / "model_00001.pt")["model"], small(1)["model"])
    assert equal(load_checkpoint(tmp_path / "model_00002.pt")["model"], small(2)["model"])


def test_buffers_are_used_again_and_those_of_freed_tensors_are_not_kept(tmp_path):
    weights, seen = torch.ones(100), []
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2, 3):
        writer.save({**small(step), "model": {"a": weights, "new": torch.zeros(50 + step)}})
        writer.wait()
        assert len(writer._buffers) == 2
        seen += [b.data_ptr() for b in writer._buffers.values() if b.shape == (100,)]
    assert len(seen) == 3 and len(set(seen)) == 1


def test_a_failed_save_is_told_at_once_and_the_next_one_succeeds(tmp_path):
    said = []
    writer = CheckpointWriter(tmp_path, say=said.append, retry_s=0)
    writer.save(small(1))
    assert writer.wait() is None and not writer.wants_retry()
    with full_disk(1000):
        writer.save(small(2))
        error = writer.wait()
    assert isinstance(error, OSError) and "step 2: WARNING: CHECKPOINT NOT WRITTEN" in said[-1]
    assert "model_00001.pt" in said[-1] and load_newest(tmp_path)[0].name == "model_00001.pt"
    assert writer.error is not None and writer.wants_retry()
    may_write = threading.Event()
    writer.save(small(3), before=may_write.wait)
    assert writer.error is not None  # of the last save that has ended
    assert not writer.wants_retry()  # the retry is being written
    may_write.set()
    assert writer.wait() is None and load_newest(tmp_path)[0].name == "model_00003.pt"
    assert writer.error is None and not writer.wants_retry()


def test_no_memory_for_the_copy_does_not_stop_the_training(tmp_path):
    said, state = [], {**small(1), "model": {"a": torch.zeros(20 << 20)}}
    writer = CheckpointWriter(tmp_path, say=said.append)
    with little_memory(20):
        assert writer.save(state) > 0
    assert writer.error is not None and "NOT WRITTEN" in said[-1] and "allocate memory" in said[-1]
    writer.save(state)
    assert writer.wait() is None and writer.error is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(tmp_path, bad):
    state = small(5)
    state["optimizer"] = {"state": {0: {"exp_avg": torch.tensor([1.0, bad, 2.0])}}}
    with pytest.raises(CheckpointError, match=r"step 5 is not saved: optimizer.state.0.exp_avg is not"):
        save_checkpoint(state, tmp_path)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- damaged and foreign files


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[bytes, dict]:
    """A checkpoint's bytes and content."""
    path = save_checkpoint(small(3), tmp_path_factory.mktemp("good"))
    return path.read_bytes(), load_checkpoint(path)


def verdict(content: bytes, path: Path, truth: dict) -> str:
    """ "refused" or "correct"; fails on any other error, and on a wrong dictionary."""
    path.write_bytes(content)
    try:
        loaded = load_checkpoint(path)
    except CheckpointError:
        return "refused"
    assert equal(loaded, truth), "a damaged checkpoint was loaded with other content"
    return "correct"


def test_a_flipped_bit_anywhere_is_refused_or_harmless(good, tmp_path):
    """All bytes of the tensors, and a sample of the zip's directory and of what lies between them."""
    content, truth = good
    directory = content.index(b"PK\x01\x02")
    data = set()
    for tensor in truth["model"].values():
        start = content.index(tensor.numpy().tobytes())
        data |= set(range(start, start + tensor.nbytes))
    for i in sorted(data | set(range(0, directory, 9)) | set(range(directory, len(content), 2))):
        flipped = bytearray(content)
        flipped[i] ^= 1 << (i * 5) % 8
        result = verdict(bytes(flipped), tmp_path / "model_00003.pt", truth)
        assert result == "refused" or i not in data


def test_a_tensor_marked_as_a_folder_is_refused(good, tmp_path):
    """torch.load would leave the tensor uninitialised, and no checksum is wrong."""
    content, truth = good
    entry = content.index(b"PK\x01\x02")
    while content[entry + 46 :].find(b"data/0") > 20:
        entry = content.index(b"PK\x01\x02", entry + 1)
    marked = bytearray(content)
    marked[entry + 38] |= 16
    assert verdict(bytes(marked), tmp_path / "model_00003.pt", truth) == "refused"
    torch.load(tmp_path / "model_00003.pt")  # torch alone sees nothing


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    content, truth = good
    for length in range(0, len(content), 13):
        assert verdict(content[:length], tmp_path / "model_00003.pt", truth) == "refused"


@settings(max_examples=150)
@given(st.binary(max_size=600), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"PK\x05\x06"]))
def test_random_bytes_are_refused(tmp_path, content, prefix):
    path = tmp_path / "model_00001.pt"
    path.write_bytes(prefix + content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@settings(max_examples=200)
@given(cuts=st.lists(CUT, min_size=1, max_size=4))
def test_random_mutations_are_refused_or_harmless(good, tmp_path, cuts):
    content, truth = good
    for place, removed, inserted in cuts:
        at = int(place * len(content))
        content = content[:at] + inserted + content[at + removed :]
    verdict(content, tmp_path / "model_00003.pt", truth)


def foreign_files() -> dict[str, bytes]:
    """Files that are something else, and whole."""
    files = {"empty": b"", "text": b"hello\n" * 50, "pickle": pickle.dumps(small(1))}
    others = {"list": [1, 2], "tensor": torch.ones(3), "no step": {"model": {}, "config": {}}}
    for name, value in others.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    files["npz"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(small(1), buffer, _use_new_zipfile_serialization=False)
    files["old torch format"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({**small(1), "config": Path("a class instance")}, buffer)
    files["classes"] = buffer.getvalue()
    return files


@pytest.mark.parametrize("name", foreign_files())
def test_foreign_files_are_refused(tmp_path, name):
    path = tmp_path / "model_00001.pt"
    path.write_bytes(foreign_files()[name])
    with pytest.raises(CheckpointError, match=str(path)):
        load_checkpoint(path)


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path, zipped):
    trace, path = str(tmp_path / "trace"), tmp_path / "model_00001.pt"
    content = {**small(1), "config": Malice(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not os.path.exists(trace)
    pickle.loads(pickle.dumps(Malice(trace)))  # the trap works: unpickling does run it
    assert os.path.exists(trace)


def test_the_newest_good_one_is_found(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(small(step), tmp_path)
    (tmp_path / "model_00004.pt").write_bytes((tmp_path / "model_00004.pt").read_bytes()[:-50])
    content = bytearray((tmp_path / "model_00003.pt").read_bytes())
    content[content.index(small(3)["model"]["a"].numpy().tobytes()) + 9] ^= 1
    (tmp_path / "model_00003.pt").write_bytes(content)
    (tmp_path / "model_best.pt").write_bytes(b"not one of ours, by its name")
    warnings = []
    path, found = load_newest(tmp_path, warnings.append)
    assert path.name == "model_00002.pt" and found["step"] == 2
    assert "model_00004.pt" in warnings[0] and "checksum" in warnings[1] and len(warnings) == 2
    assert load_newest(tmp_path / "nowhere", warnings.append) is None


def test_too_little_memory_is_no_damage(tmp_path):
    """An older checkpoint is not taken in its place."""
    save_checkpoint(small(1), tmp_path)
    save_checkpoint({**small(2), "model": {"a": torch.zeros(20 << 20)}}, tmp_path)
    with little_memory(20), pytest.raises(OSError, match=r"no memory to read it.*model_00002\.pt") as caught:
        load_newest(tmp_path)
    assert caught.value.errno == errno.ENOMEM
    assert load_newest(tmp_path)[1]["step"] == 2


class Unanswering(io.FileIO):
    """A file, of which the bytes from `place` on cannot be read: that gives `error`."""

    place, error = 0, None

    def readinto(self, buffer) -> int:
        if self.tell() + len(buffer) > self.place:
            raise self.error
        return super().readinto(buffer)

    def readall(self) -> bytes:
        return self.read(os.fstat(self.fileno()).st_size - self.tell())

    def read(self, size: int = -1) -> bytes:
        if size < 0 or self.tell() + size > self.place:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), MemoryError()],
    ids=repr,
)
def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch, share, error):
    """Wherever in the file that is, an older one is not taken in its place."""
    save_checkpoint(small(1), tmp_path)
    path = save_checkpoint({**small(2), "model": {"a": torch.zeros(1 << 18)}}, tmp_path)
    monkeypatch.setattr(Unanswering, "place", int(share * (path.stat().st_size - 1)))
    monkeypatch.setattr(Unanswering, "error", error)
    reads = ckpt.__dict__.get("open", open)
    read_or_not = lambda p, mode: Unanswering(p) if p == path else reads(p, mode)  # noqa: E731
    monkeypatch.setattr(ckpt, "open", read_or_not, raising=False)
    text = "no memory to read it" if isinstance(error, MemoryError) else error.strerror
    for read in (ckpt.verify_checkpoint, load_checkpoint):
        with pytest.raises(OSError, match=rf"{text}.*model_00002\.pt"):
            read(path)
    monkeypatch.setattr(ckpt, "verify_checkpoint", lambda path: None)  # it answered to that
    with pytest.raises(OSError, match=rf"{text}.*model_00002\.pt"):
        load_newest(tmp_path)


def test_no_permission_and_a_folder_that_cannot_be_listed_are_no_damage(tmp_path, monkeypatch):
    save_checkpoint(small(1), tmp_path)

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(args[0]))

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "open", refuse, raising=False)
        with pytest.raises(PermissionError, match=r"model_00001\.pt"):
            load_newest(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        with pytest.raises(PermissionError, match=str(tmp_path)):
            load_newest(tmp_path)
    assert load_newest(tmp_path)[1]["step"] == 1


def test_a_compressed_file_is_refused_before_it_is_unpacked(good, tmp_path):
    """What its header says may want any amount of memory."""
    path = tmp_path / "model_00001.pt"
    with zipfile.ZipFile(io.BytesIO(good[0])) as plain, zipfile.ZipFile(path, "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"model_00001\.pt: .*kind of .* is wrong"):
        load_checkpoint(path)


def test_a_newer_format_is_never_passed_over(tmp_path, monkeypatch):
    save_checkpoint(small(1), tmp_path)
    monkeypatch.setattr(ckpt, "CHECKPOINT_FORMAT", 2)
    save_checkpoint(small(2), tmp_path)
    monkeypatch.undo()
    with pytest.raises(archives.NewerFormatError, match=r"its format is 2.* up to 1; update"):
        load_newest(tmp_path)


def test_latest_is_followed_only_to_a_checkpoint_beside_it(tmp_path):
    save_checkpoint(small(2), tmp_path)
    assert load_checkpoint(tmp_path / "latest")["step"] == 2
    (tmp_path / "latest").write_text("../../etc/passwd")
    with pytest.raises(CheckpointError, match="no checkpoint's name"):
        load_checkpoint(tmp_path / "latest")
    (tmp_path / "latest").write_text("model_00009.pt")
    with pytest.raises(FileNotFoundError, match=r"model_00009.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "latest")


def test_a_slash_at_the_end_changes_nothing(tmp_path):
    model = GPTLMHeadModel(tiny())
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 2, "val_loss": None}
    path, log = f"{save_checkpoint(state, tmp_path)}/", f"{tmp_path}/"
    ckpt.verify_checkpoint(path)
    for found in (load_checkpoint(path), load_checkpoint(f"{log}latest/"), load_newest(log)[1]):
        assert found["step"] == 2
    assert str(ckpt.list_checkpoints(log)[0]) == str(ckpt.follow_latest(path)) == path[:-1]
    assert equal(dict(ckpt.load_model(path).state_dict()), dict(model.state_dict()))
    assert checkpoint.main(["verify", path]) == 0
    assert checkpoint.main(["convert", path, f"{log}copy/"]) == 0
    assert checkpoint.main(["convert", f"{log}copy/", f"{log}copy.pt/"]) == 0
    assert equal(load_checkpoint(tmp_path / "copy.pt")["model"], load_checkpoint(path)["model"])
    assert checkpoint.main(["export", f"{log}copy/", f"{log}exported/", "--no-tokenizer"]) == 0
    assert equal(dict(ckpt.load_model(f"{log}exported/").state_dict()), dict(model.state_dict()))


# ---------------------------------------------------------------------------- models from checkpoints


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("K", "norm"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_upcycling_changes_no_logit(score, K, norm, activation):
    dense = dense_model(activation=activation)
    for parameter in dense.parameters():  # as after training: nothing small or zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    fields = dict(num_experts_per_tok=K, router_score=score, norm_topk_prob=norm, activation=activation)
    moe = tiny(num_experts=8, **fields)
    model = upcycle(dense, moe).eval()
    tokens = torch.randint(64, (4, 16))
    wanted = dense(input_ids=tokens).logits
    limit = 1e-5 * wanted.abs().max().item()
    torch.testing.assert_close(model(input_ids=tokens).logits, wanted, atol=limit, rtol=0)
    model.train()
    model(tokens, targets=tokens)
    used = (model.moe_layers()[0].get_usage_counts() > 0).sum()
    assert used > K  # tokens are spread already at the first step


def test_upcycled_experts_are_in_use_at_once_and_part_ways():
    """K = 2: of 2 x 8 experts hardly one is idle in any of the first steps, and no two of them stay equal."""
    idle = 0
    for seed in range(4):
        dense = dense_model()
        torch.manual_seed(seed)
        for parameter in dense.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model = upcycle(dense, tiny(num_experts=8, num_experts_per_tok=2)).train()
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        model.update_routers()
        for _ in range(20):
            tokens = torch.randint(64, (8, 17))
            model(tokens[:, :-1], targets=tokens[:, 1:])[1].backward()
            model.update_routers()
            optimizer.step()
            optimizer.zero_grad()
            idle += sum((moe.last_step_counts() == 0).sum().item() for moe in model.moe_layers())
        for moe in model.moe_layers():
            for projection in (moe.experts.c_fc, moe.experts.c_proj):
                assert torch.pdist(projection.flatten(1)).min() > 1e-2
    assert idle / (4 * 20) < 0.5


def test_upcycling_every_other_layer_and_what_it_refuses():
    dense = dense_model()
    mixed = upcycle(dense, tiny(num_experts=4, moe_every=2)).eval()
    assert len(mixed.moe_layers()) == 1
    tokens = torch.randint(64, (2, 16))
    logits = (model(input_ids=tokens).logits for model in (mixed, dense))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    refused = {
        "has experts already": (mixed, {}),
        "num_shared_experts=1": (dense, dict(num_shared_experts=1)),
        "expert_hidden_size=8": (dense, dict(expert_hidden_size=8)),
        "does not fit the new model": (dense, dict(n_layer=1)),
    }
    for message, (source, fields) in refused.items():
        with pytest.raises(ValueError, match=message):
            upcycle(source, tiny(num_experts=4, **fields))


def test_a_checkpoint_of_another_model_is_named_as_such(tmp_path):
    model = dense_model()
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 1}
    path = save_checkpoint(state, tmp_path)
    tokens = torch.randint(64, (2, 16))
    assert torch.equal(ckpt.load_model(path)(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for change in ({"n_embd": 32}, {"n_layer": 3}, {"n_head": 5}, {"dropout": "much"}):
        bad = state | {"config": model.config.to_dict() | change, "step": 2}
        with pytest.raises(CheckpointError, match="do not fit this model"):
            ckpt.load_model(save_checkpoint(bad, tmp_path))


def test_commands(tmp_path, capsys):
    model = dense_model(encoding="bytes", vocab_size=384, encoding_size=257)
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 1, "val_loss": 2.5}
    path = str(save_checkpoint(state, tmp_path))
    assert checkpoint.main(["verify", path]) == 0
    assert "undamaged, step 1, last validation loss before it 2.5" in capsys.readouterr().out
    assert checkpoint.main(["export", path, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists() and not list((tmp_path / "out").glob("*.bin"))
    exported = GPT.from_pretrained(tmp_path / "out")
    assert equal(dict(exported.state_dict()), dict(model.state_dict()))
    capsys.readouterr()
    for arguments in (["verify", str(tmp_path / "none.pt")], ["export", path, str(tmp_path)]):
        assert checkpoint.main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
