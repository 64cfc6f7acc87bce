"""The checkpoints of a run: what they hold, when a failed save is repeated, what is saved after an error."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from training import faults, parallel
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import list_checkpoints


class RunSaver:
    """Saves a run (training.setup.Run). All ranks call its methods at the same steps."""

    def __init__(self, run: Any, say: Callable[[str], None]):
        config, layout = run.config, run.layout
        self.run, self.say = run, say
        self.saved_step = run.resumed.get("step", 0)
        self.failed = False  # after saving_on_errors: whether a checkpoint or a line of a log is missing
        where = (config.log_dir, config.keep_last, config.keep_every)
        self.writer = CheckpointWriter(*where, say, layout.world.rank, layout.savers, config.save_retry_s)

    def remember(self, step: int, val_loss: float | None) -> None:
        """Note what a checkpoint of this step holds besides weights and optimizer state, which are its."""
        run = self.run
        run.updating = False
        self.state = {
            "step": step, "val_loss": val_loss, "loader": run.train_loader.state_dict(),
            "health": run.health.state_dict(), "rng": torch.get_rng_state(),
        }  # fmt: skip
        if run.health.in_a_row == 0:
            self.last_good_state = self.state

    def save(self, again: bool = False) -> None:
        """Start writing the checkpoint of the remembered step, unless it is saved. again: in any case."""
        run, step = self.run, self.state["step"]
        if not run.trains or (step <= self.saved_step and not again):
            return
        if run.layout.world.is_master or run.layout.saves_together:
            self.writer.save(self._checkpoint(), run.log.sync if run.log else lambda: None)
        self.saved_step = step

    def _checkpoint(self) -> dict:
        """The dictionary that docs/formats.md lists."""
        run = self.run
        return {
            **self.state, "model": run.model.state_dict(), "config": run.model.config.to_dict(),
            "optimizer": parallel.optimizer_state(run.optimizer, run.layout),
            "scaler": run.scaler.state_dict(), "train_config": dataclasses.asdict(run.config),
            "elapsed_s": run.elapsed(), "world_size": run.layout.world.size,
        }  # fmt: skip

    def is_urgent(self) -> bool:
        """Whether any rank has been told to stop, or to save a step that is not saved yet."""
        signals, unsaved = self.run.signals, self.run.trains and self.state["step"] > self.saved_step
        return self.run.layout.any(signals.stop_requested or (signals.save_requested and unsaved))

    def request_retry(self) -> None:
        """If the last save failed some time ago, ask all ranks to save after this step."""
        if self.writer.wants_retry():
            self.run.signals.request_save()

    def retry_until_saved(self) -> None:
        """At the end of a run: repeat a save that failed until it succeeds or the run is told to stop."""
        while self.run.layout.any(self.writer.wants_last_retry(self.run.signals.stop_requested)):
            self.save(again=True)

    def save_before_bad_steps(self) -> None:
        """Save as of the last good step, so that a resumed run tries all of the skipped steps again."""
        self.state = self.last_good_state
        self.save()

    def newest(self) -> Path | str:
        """The newest checkpoint of the run, or "none"."""
        return next(iter(list_checkpoints(self.run.config.log_dir)), "none")

    @contextlib.contextmanager
    def saving_on_errors(self) -> Iterator[None]:
        """If an error ends the block, rank 0 saves what has been trained, alone, if it has everything and
        weights and optimizer state belong to the same step. In any case finish what is being written."""
        run = self.run
        try:
            yield
        except Exception:
            step = self.state["step"]
            savable = run.trains and not run.updating and not run.layout.saves_together
            if run.layout.world.is_master and savable and step > self.saved_step:
                faults.discard_routing(run.model)
                self.say(f"step {step}: an error; saving what has been trained before it")
                self.writer.save(self._checkpoint(), run.log.sync)
            raise
        finally:
            self.failed = self.writer.wait() is not None
            self.failed |= run.log is not None and not run.log.close()
