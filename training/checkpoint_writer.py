"""Write checkpoints in a background thread; decide what a run saves, and when it tries a save again."""

import contextlib
import dataclasses
import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from tokens.files import write_atomically
from tokens.own_tokenizers import KNOWN
from training import checkpoints as ckpt
from training import faults, parallel, sharded
from training.archives import NotFiniteError


class CheckpointWriter:
    """Saves checkpoints in a thread: training waits only while its state is copied. If a save fails (disk
    full, no memory, a value not finite), the writer warns, and training continues. It verifies a checkpoint
    before it deletes old ones. Without `savers`, rank 0 saves alone; otherwise all ranks save one folder."""

    def __init__(self, folder: str | Path, keep_last: int = 0, keep_every: int = 0, say: Callable = print,
                 rank: int = 0, savers: Any = None, retry_s: float = 60):  # fmt: skip
        self.folder, self.keep_last, self.keep_every, self.say = Path(folder), keep_last, keep_every, say
        self.rank, self.saver = rank, sharded.Saver(savers) if savers is not None else None
        self.path: Path | None = None  # the newest checkpoint that this object has written
        self.error: Exception | None = None  # the error of the last finished save
        self.retry_s, self.tried_at, self.tries_left = retry_s, 0.0, 10
        self.seconds = 0.0  # time of the last save in the thread
        on_cuda = torch.cuda.is_initialized()  # then copies are in pinned memory. Every save uses it again
        self._stager = DefaultStager(StagingOptions(on_cuda, False, False, use_non_blocking_copy=on_cuda))
        self._thread: threading.Thread | None = None

    def save(self, checkpoint: dict, before: Callable[[], None] = lambda: None) -> float:
        """Copy; the thread calls before() and writes the copy. Returns how many seconds training waited."""
        begin = self.tried_at = time.perf_counter()
        self.wait()
        if self.saver is None and self.rank != 0:
            return 0.0
        step = checkpoint["step"]
        try:
            if self.saver is not None:
                path = ckpt.checkpoint_path(self.folder, step, suffix="")
                write = partial(self.saver.commit, self.saver.stage(checkpoint, path))
            else:
                write = partial(ckpt.save_checkpoint, self._stager.stage(checkpoint), self.folder)
        except Exception as error:  # handled like an error in the thread
            self._report_failure(step, error)
            return time.perf_counter() - begin
        pause = time.perf_counter() - begin
        # heartbeat.py waits for the thread of this name
        self._thread = threading.Thread(None, self._write, "checkpoint", (step, write, before, pause))
        self._thread.start()
        return pause

    def wait(self) -> Exception | None:
        """Wait until the last save has ended; returns its exception, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.error

    def wants_retry(self) -> bool:
        """Whether the last save failed, may succeed now, and began more than retry_s seconds ago."""
        late = time.perf_counter() - self.tried_at > self.retry_s
        writing = self._thread is not None and self._thread.is_alive()
        return late and self._is_retryable() and not writing

    def _is_retryable(self) -> bool:
        return self.error is not None and not isinstance(self.error, NotFiniteError)

    def wants_last_retry(self, stop: bool) -> bool:
        """After the last save of a run: whether to try again, at most ten times. Waits for retry_s."""
        self.wait()
        if stop or self.tries_left == 0 or not self._is_retryable():
            return False
        self.tries_left -= 1
        left = max(self.retry_s - (time.perf_counter() - self.tried_at), 0)
        full = getattr(self.error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = f"free space in {self.folder}" if full else f"make {self.folder} a folder that can be written"
        self.say(f"the run is lost without it: {mend}; next try in {left:.0f} s")
        time.sleep(left)
        return True

    def _write(self, step: int, write: Callable[[], Path], before: Callable[[], None], pause: float) -> None:
        begin = time.perf_counter()
        together = self.saver.together if self.saver is not None else lambda work: work()
        try:
            together(before)
            path = write()
            together(partial(self._accept, path))
        except Exception as error:  # training continues after any error
            return self._report_failure(step, error)
        self.path, self.error = path, None
        self.seconds = time.perf_counter() - begin
        if self.rank == 0:
            size = sum(file.stat().st_size for file in (path, *path.glob("*")) if file.is_file())
            took = f"{self.seconds:.2f} s, training paused {1000 * pause:.0f} ms"
            self.say(f"step {step}: saved {path} ({size / 1e6:.0f} MB in {took})")

    def _accept(self, path: Path) -> None:
        if self.rank == 0 and self.saver is not None:  # save_checkpoint has done it for a file
            write_atomically(self.folder / "latest", lambda file: file.write(path.name.encode()))
        if self.rank == 0 and self.keep_last > 0:  # read it back before old ones are deleted
            ckpt.verify_checkpoint(path)
            ckpt.prune_checkpoints(self.folder, self.keep_last, self.keep_every)

    def _report_failure(self, step: int, error: Exception) -> None:
        error.__traceback__ = error.__cause__ = error.__context__ = None  # frames hold the copy
        self.error = error
        try:
            newest = self.path or next(iter(ckpt.list_checkpoints(self.folder)), "none yet")
        except OSError:  # the disk may have caused the failure
            newest = "unknown"
        text = f"CHECKPOINT NOT WRITTEN: {str(error) or repr(error)}"
        self.say(f"step {step}: WARNING: {text}. Training continues; newest: {newest}")


class RunSaver:
    """Saves a run (training.setup.Run). All ranks call its methods at the same steps."""

    def __init__(self, run: Any):
        config, layout = run.config, run.layout
        self.run, self.say = run, run.say
        self.saved_step = run.resumed.get("step", 0)
        self.losses = ckpt.validation_losses(config.log_dir) if layout.world.is_master else {}  # by step
        self.failed = False  # after saving_on_errors: whether a checkpoint or a line of a log is missing
        where = (config.log_dir, config.keep_last, config.keep_every)
        self.writer = CheckpointWriter(*where, run.say, layout.world.rank, layout.savers, config.save_retry_s)

    def remember(self, step: int, val_loss: float | None, val_loss_step: int | None) -> None:
        """Store this step's checkpoint without weights and optimizer. val_loss: of an earlier step."""
        run = self.run
        run.updating = False
        self.state = dict(step=step, val_loss=val_loss, val_loss_step=val_loss_step)
        self.state |= dict(loader=run.train_loader.state_dict(), health=dict(vars(run.health)))
        self.state |= dict(rng=torch.get_rng_state(), diagnostics=run.diagnostics.state_dict())
        if run.health.in_a_row == 0 or step == self.saved_step:  # a run may resume after bad steps
            self.last_good_state = self.state

    def save(self, again: bool = False) -> None:
        """Start to write the remembered step's checkpoint, unless it is saved. again: write it anyway."""
        run, step = self.run, self.state["step"]
        if not run.trains or (step <= self.saved_step and not again):
            return
        self.wait()
        self.writer.save(self._checkpoint(), run.log.sync if run.log else lambda: None)
        self.saved_step = step

    def judge(self, step: int, val_loss: float) -> bool:
        """Call after each evaluation. With keep_best, save a step with the lowest loss so far, and name its
        checkpoint in the file `best`. Returns whether the last `patience` evaluations found no lower loss."""
        config, layout, self.losses[step] = self.run.config, self.run.layout, val_loss
        finite = {step: loss for step, loss in self.losses.items() if math.isfinite(loss)}
        best = min(finite, key=finite.get, default=None)
        if config.keep_best and layout.any(layout.world.is_master and best == step):
            self.save()
            self.wait()
            if layout.world.is_master:
                self._name_best(step)
        since = sum(other > best for other in self.losses) if best is not None else 0
        if stops := layout.any(layout.world.is_master and 0 < config.patience <= since):
            why = f"{since} evaluations without a lower validation loss than {finite.get(best, 0):.4f}"
            self.say(f"step {step}: the run ends after {why} at step {best} (--patience {config.patience})")
        return stops

    def _name_best(self, step: int) -> None:
        try:
            found = [p.name for p in ckpt.list_checkpoints(self.writer.folder) if ckpt.step_of(p) == step]
            if found:
                write_atomically(self.writer.folder / "best", lambda file: file.write(found[0].encode()))
        except OSError as error:  # a full disk: training goes on
            self.say(f"step {step}: WARNING: {self.writer.folder}/best does not name this step: {error}")

    def wait(self) -> None:
        """Wait on all ranks until the last save has ended."""
        self.writer.wait()
        self.run.layout.world.barrier()

    def _checkpoint(self) -> dict:  # docs/formats.md lists its entries
        run = self.run
        more = dict(model=dict(run.model.state_dict()), config=run.model.config.to_dict())
        more |= dict(optimizer=parallel.optimizer_state(run.optimizer, run.layout))
        more |= dict(scaler=run.scaler.state_dict(), train_config=dataclasses.asdict(run.config))
        if known := KNOWN.get(run.model.config.encoding):
            more["tokenizer"] = known.text
        return self.state | more | dict(elapsed_s=run.elapsed(), world_size=run.layout.world.size)

    def is_urgent(self) -> bool:
        """Whether any rank has been told to stop, or to save while the newest step is not saved."""
        signals, unsaved = self.run.signals, self.run.trains and self.state["step"] > self.saved_step
        return self.run.layout.any(signals.stop_requested or (signals.save_requested and unsaved))

    def retry_until_saved(self) -> None:
        """At the end of a run: repeat a save that failed until it succeeds or the run is told to stop."""
        while True:
            wants = self.writer.wants_last_retry(self.run.signals.stop_requested)  # after up to save_retry_s
            self.wait()  # a collective would time out
            if not self.run.layout.any(wants):
                return
            self.save(again=True)

    def save_before_bad_steps(self) -> None:
        """Save the state of the last good step, so that a resumed run tries all skipped steps again."""
        self.state = self.last_good_state
        self.save()

    def newest(self) -> Path | str:
        """The newest checkpoint of the run, or "none"."""
        return next(iter(ckpt.list_checkpoints(self.run.config.log_dir)), "none")

    def describe_best(self) -> str:
        """The checkpoint with the lowest validation loss, in words, unless it is the newest or unknown."""
        best = ckpt.best_checkpoint(self.run.config.log_dir)
        if best in (None, self.newest()):
            return ""
        loss = ckpt.validation_losses(best.parent)[ckpt.step_of(best)]
        return f", the one with the lowest validation loss ({loss:.4f}) is {best}"

    @contextlib.contextmanager
    def saving_on_errors(self) -> Iterator[None]:
        """After an error rank 0 saves the last finished step, if it holds all of it. Waits for the save."""
        run = self.run
        try:
            yield
            self.wait()
        except Exception:
            step = self.state["step"]
            savable = run.trains and not run.updating and not run.layout.saves_together
            if run.layout.world.is_master and savable and step > self.saved_step:
                faults.discard_routing(run.model)
                self.say(f"step {step}: an error; saving the steps before it")
                self.writer.save(self._checkpoint(), run.log.sync)
                self.say(f"when the cause is gone, continue with: {ckpt.resume_command(run.config)}")
            raise
        finally:
            self.failed = self.writer.wait() is not None
            self.failed |= run.log is not None and not run.log.close()
