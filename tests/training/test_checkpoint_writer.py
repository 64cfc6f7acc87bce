"""CheckpointWriter: saving while training goes on, failures that are told, old checkpoints that go."""

import itertools
import math
import os
import resource
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import WTE
from models import small_checkpoint as small
from processes import at_call, equal, flags, full_disk, run_ranks, steps_saved
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import train_gpt_moe
from training import checkpoints as ckpt
from training import parallel, rendezvous, sharded
from training.archives import CheckpointError
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import load_checkpoint, load_newest

AGAIN = ["--device", "cpu", "--resume", "auto", "--log_dir"]
pytestmark = pytest.mark.filterwarnings("ignore:.*save in a single process")  # of torch


@pytest.fixture(params=["file", "folder"])
def make_writer(request, tmp_path):
    def make(**more) -> CheckpointWriter:
        writer = CheckpointWriter(tmp_path, **more)
        if request.param == "folder":
            writer.saver = sharded.Saver(None)
        return writer

    return make


# ---------------------------------------------------------------------------- in the background
def test_training_goes_on_while_it_is_written_and_the_next_save_waits(tmp_path):
    said, may_write, weights = [], threading.Event(), torch.ones(1000)
    writer, path = CheckpointWriter(tmp_path, say=said.append), tmp_path / "model_00001.pt"
    state = small(1, model={"a": weights, "tied": weights, "part": weights[:10]})
    writer.save(state, before=may_write.wait)
    assert not path.exists()  # save() has returned, nothing is written yet
    weights += 1  # the next step
    threading.Timer(0.05, may_write.set).start()
    writer.save(small(2))
    assert "step 1: saved" in said[0] and writer.wait() is None
    assert equal(load_checkpoint(tmp_path / "model_00002.pt")["model"], small(2)["model"])
    model = torch.load(path)["model"]
    assert equal(model, {"a": torch.ones(1000), "tied": torch.ones(1000), "part": torch.ones(10)})
    assert model["a"].data_ptr() == model["tied"].data_ptr()  # tied weights are in the file once
    assert path.stat().st_size < 8000


@pytest.mark.slow
def test_a_save_that_takes_longer_than_timeout_ends_no_rank(data, tmp_path):
    """Rank 0 writes each file for 7 s, the last one twice. Collectives may take 5 s (main, below)."""
    more = "--B 2 --max_steps 4 --checkpoint_every 2 --save_retry_s 14".split()
    words = flags(data, tmp_path / "log", *more)
    run_ranks(2, words, tmp_path / "out", script="test_checkpoint_writer", environment={"SLOW_DISK": "yes"})
    assert steps_saved(tmp_path / "log") == [4, 2]


# ---------------------------------------------------------------------------- old checkpoints
@pytest.mark.parametrize(("keep_last", "kept"), [(2, [7, 6, 4]), (0, [7, 6, 5, 4, 3, 2, 1])])
def test_old_ones_go_and_latest_always_names_one(make_writer, tmp_path, monkeypatch, keep_last, kept):
    writer, latest = make_writer(keep_last=keep_last, keep_every=4), tmp_path / "latest"

    def check(*_) -> None:
        assert not latest.exists() or (tmp_path / latest.read_text()).exists()

    for owner, name in ((Path, "unlink"), (os, "replace"), (os, "rename")):
        at_call(monkeypatch, owner, name, range(10**6), check)
    for step in range(1, 8):
        writer.save(small(step))
        assert writer.wait() is None
        assert latest.read_text() == writer.path.name and load_checkpoint(latest)["step"] == step
    assert steps_saved(tmp_path) == kept and len(os.listdir(tmp_path)) == len(kept) + 1


def test_a_step_that_is_saved_again_replaces_its_checkpoint(make_writer, tmp_path):
    writer = make_writer()
    for val_loss in (1.0, 2.0):
        writer.save(small(5, val_loss=val_loss))
        assert writer.wait() is None and load_checkpoint(writer.path)["val_loss"] == val_loss
    assert len(os.listdir(tmp_path)) == 2  # with latest


def test_old_ones_stay_if_the_new_one_reads_back_wrong(tmp_path, monkeypatch):
    said = []
    writer = CheckpointWriter(tmp_path, keep_last=1, say=said.append)
    writer.save(small(1))
    writer.wait()
    at_call(monkeypatch, ckpt, "verify_checkpoint", [0], lambda path: os.truncate(path, 1000))
    writer.save(small(2))
    assert isinstance(writer.wait(), CheckpointError) and "CHECKPOINT NOT WRITTEN" in said[-1]
    assert load_newest(tmp_path, said.append)[1]["step"] == 1


# ---------------------------------------------------------------------------- failures
def test_a_full_disk_leaves_the_last_good_one_and_the_next_save_succeeds(make_writer, tmp_path):
    said = []
    writer = make_writer(say=said.append, retry_s=0)
    writer.save(small(1))
    assert writer.wait() is None and not writer.wants_retry()
    before, good = sorted(os.listdir(tmp_path)), writer.path
    sizes = [file.stat().st_size for file in (good, *good.glob("*")) if file.is_file()]
    for room in (*range(0, max(sizes), 211), *(size - 1 for size in sizes)):
        with full_disk(room):
            writer.save(small(2))
            error = writer.wait()
        assert isinstance(error, OSError) and writer.error is error and writer.wants_retry()
        assert "step 2: WARNING: CHECKPOINT NOT WRITTEN" in said[-1] and str(good) in said[-1]
        assert "File too large" in said[-1], (room, said[-1])
        assert sorted(os.listdir(tmp_path)) == before
    assert equal(load_newest(tmp_path)[1]["model"], small(1)["model"])
    may_write = threading.Event()
    writer.save(small(3), before=may_write.wait)
    assert writer.error is error and not writer.wants_retry()  # the retry is being written
    may_write.set()
    assert writer.wait() is None and writer.error is None and not writer.wants_retry()
    assert steps_saved(tmp_path) == [3, 1]


def test_no_memory_for_the_copy_does_not_stop_the_training(tmp_path, monkeypatch):
    said = []
    writer = CheckpointWriter(tmp_path, say=said.append)
    at_call(monkeypatch, torch.Tensor, "new_empty", [0], lambda *_: torch.empty(1 << 50))  # no machine has it
    assert writer.save(small(1)) > 0
    assert writer.error is not None and "NOT WRITTEN" in said[-1] and "allocate memory" in said[-1]
    writer.save(small(2))
    assert writer.wait() is None and writer.error is None


def test_values_that_are_not_finite_are_not_saved(make_writer, tmp_path):
    writer, bad_weights, bad_moments = make_writer(say=str), small(2), small(3)
    bad_weights["model"][WTE][3, 3] = float("nan")
    bad_moments["optimizer"]["state"][0]["exp_avg"][0, 0] = float("inf")
    for state, name in ((bad_weights, f"model.{WTE}"), (bad_moments, "0.exp_avg")):
        writer.save(state)
        error = writer.wait()
        assert isinstance(error, CheckpointError) and not writer.wants_retry()
        assert f"step {state['step']} is not saved" in str(error) and f"{name} is not finite" in str(error)
        assert os.listdir(tmp_path) == []


def main(arguments: list[str]) -> int | list[tuple]:
    """One of two processes that save together. Returns (step, error, whether to try again) of each save."""
    if "SLOW_DISK" in os.environ:
        rendezvous.TIMEOUT, save, calls = timedelta(seconds=5), ckpt.save_checkpoint, itertools.count()

        def save_slowly(*args):
            time.sleep(7)
            if next(calls) == 1:
                raise OSError(28, "No space left on device")
            return save(*args)

        ckpt.save_checkpoint = save_slowly
        return train_gpt_moe.main(arguments)
    rendezvous.TIMEOUT = timedelta(seconds=2)
    world = parallel.start("cpu")
    folder, rank, mesh, seen = Path(arguments[0]), dist.get_rank(), init_device_mesh("cpu", (2,)), []
    weight = distribute_tensor(torch.arange(3_000.0).view(5, 600), mesh, [Shard(0)])
    state = small(1, C=600)
    state["model"][WTE] = weight
    savers = parallel.make_layout(world, "fsdp", 0, 1).savers
    writer = CheckpointWriter(folder, 9, say=str, rank=rank, savers=savers, retry_s=0)

    def save(step: int, here: bool = False, before=lambda: None, sick: float = 0.0) -> None:
        """here: on this rank the disk is full, or if `sick` is given a weight is sick."""
        good = weight.to_local().clone()
        weight.to_local()[-1] += sick if here else 0.0
        with full_disk(300 if here and not sick else resource.RLIM_INFINITY):
            writer.save({**state, "step": step}, before)
            writer.wait()
        seen.append((step, str(writer.error), writer.wants_retry()))
        weight.to_local().copy_(good + 1)  # a step of training, for which the ranks need each other
        world.barrier()

    save(1)
    save(2, here=rank == 1)
    save(3, here=rank == 0)
    save(4)
    save(5, before=lambda: rank == 0 and Path("/dev/full").write_text("x"))  # the log's disk is full
    save(6, here=rank == 1, sick=float("nan"))
    stage = sharded.PartWriter.stage
    if rank == 1:
        sharded.PartWriter.stage = lambda self, tensors: torch.empty(1 << 60)  # no memory for the copy
    save(7)
    sharded.PartWriter.stage = stage
    writer.save({**state, "step": 8}, before=lambda: time.sleep(2.5 * rank))  # longer than TIMEOUT
    time.sleep(2.5 * (1 - rank))
    world.check_equal("data", {})  # rank 1 waits for rank 0, and in the save's thread rank 0 for rank 1
    seen.append((8, str(writer.wait()), False))
    parallel.stop(world)
    return seen


def test_what_befalls_one_of_two_ranks_befalls_the_save(tmp_path):
    """Both ranks learn of it and go on; the checkpoints before stay, and the next save succeeds."""
    seen = run_ranks(2, [tmp_path], tmp_path / "output", script="test_checkpoint_writer")
    assert [[step for step, error, _ in rank if error != "None"] for rank in seen] == [[2, 3, 5, 6, 7]] * 2
    # A second save of bad values would fail as the first did.
    assert [[step for step, _, again in rank if again] for rank in seen] == [[2, 3, 5, 7]] * 2
    errors = [error for _, error, _ in seen[0]]
    assert "rank 1: [Errno 27] File too large" in errors[1] and "File too large" in errors[2]
    assert "No space left" in errors[4] and "rank 1: " in errors[6] and "can't allocate memory" in errors[6]
    assert errors[5].startswith("rank 1: step 6 is not saved")
    assert errors[5].endswith("model.transformer.wte.weight is not finite")
    assert steps_saved(tmp_path) == [8, 4, 1] and not list(tmp_path.glob(".model*"))
    for step in (1, 4, 8):
        found = load_checkpoint(tmp_path / f"model_{step:05d}")["model"][WTE]
        assert torch.equal(found, torch.arange(3_000.0).view(5, 600) + step - 1)


def test_the_best_step_is_kept_and_patience_ends_the_run(data, tmp_path, monkeypatch, capsys):
    """The lowest loss comes at step 2 (in the log that of step 3 is equal), and after a resume at step 5."""
    losses = dict(enumerate([5.0, 4.0, 3.0, 3.0000001, 3.25, 2.5, math.nan, 2.75, 2.625]))
    measured = lambda run, step, *_: {"val_loss": losses[step], "eval_step": step}  # noqa: E731
    monkeypatch.setattr(train_gpt_moe, "evaluate", measured)
    more = "--max_steps 12 --infer_step 1 --checkpoint_every 1 --keep_last 1 --keep_best True".split()
    assert train_gpt_moe.main(flags(data, tmp_path, *more, "--patience", 2)) == 0
    assert "2 evaluations without a lower validation loss than 3.0000 at step 2" in capsys.readouterr().out
    kept = lambda: (steps_saved(tmp_path), load_checkpoint(tmp_path / "best")["step"])  # noqa: E731
    assert kept() == ([4, 2], 2)
    assert train_gpt_moe.main([*AGAIN, str(tmp_path)]) == 0  # it ends at once: nothing has changed
    assert kept() == ([4, 2], 2)
    assert train_gpt_moe.main([*AGAIN, str(tmp_path), "--patience", "3"]) == 0
    assert kept() == ([8, 5], 5)
