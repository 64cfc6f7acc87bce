"""Callbacks for transformers.Trainer that show how Mixture-of-Experts layers use their experts.

    Trainer(..., callbacks=[MoEUsageLoggingCallback(logger=logging.getLogger("MoE"), log_interval=100)])
    Trainer(..., callbacks=[MoEUsageTensorBoardCallback(log_interval=100, tb_writer=SummaryWriter("runs"))])

Both also tell the routers where an optimizer step ends, which the balance losses and loss-free balancing need
(docs/huggingface.md). A report counts each expert's rows in training, on all ranks, since the last report."""

import logging
import os

import torch
from transformers import TrainerCallback

from mixture_of_experts import MoE, update_routers


class MoEUsageCallback(TrainerCallback):
    """Base class of both callbacks: ends the routers' steps, and sums counts over all ranks for _report."""

    def __init__(self, log_interval: int = 100):
        if log_interval < 1:
            raise ValueError(f"log_interval={log_interval}: must be at least 1 step")
        self.log_interval = log_interval
        self._counts: list[torch.Tensor] = []  # (E,) int64 per layer since the last report, on its device

    def _get_moe_layers(self, model) -> list[MoE]:
        """All MoE layers in the order of the blocks; DDP, FSDP or compile may have wrapped the model."""
        return [module for module in model.modules() if isinstance(module, MoE)]

    def _report_counts(self, model, state) -> None:
        """Report the steps since the last report, if any, on the master. Then set the counts to zero."""
        counts, self._counts = [count.cpu() for count in self._counts], []
        for layer in self._get_moe_layers(model) if counts else ():
            layer.reset_usage_counts()
        if counts and state.is_world_process_zero:
            self._report(counts, state.global_step)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """From now on routing statistics cover whole optimizer steps."""
        layers, smoothing = self._get_moe_layers(model), getattr(args, "label_smoothing_factor", 0)
        if layers and smoothing > 0:
            raise ValueError(f"label_smoothing_factor={smoothing}: Trainer then omits balance losses; use 0")
        update_routers(layers)
        resumed = state.global_step > 0  # then the layers hold counts that are not reported yet
        self._counts = [layer.get_usage_counts() for layer in layers] if resumed else []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Every rank closes the optimizer step; at the interval the master reports."""
        layers = self._get_moe_layers(model)
        update_routers(layers)
        # The sum is kept here, because another callback may reset the sums in the layers.
        counts = [layer.last_step_counts() for layer in layers]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts
        if state.global_step % self.log_interval == 0:
            self._report_counts(model, state)


class MoEUsageLoggingCallback(MoEUsageCallback):
    """Logs every MoE layer's shares, at level INFO, every `log_interval` steps and after an epoch."""

    def __init__(self, logger: logging.Logger | None = None, log_interval: int = 100):
        super().__init__(log_interval)
        self.logger = logger or logging.getLogger(__name__)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Reports the steps since the last report."""
        self._report_counts(model, state)

    def _report(self, counts, step):
        for layer, count in enumerate(counts):
            assigned = int(count.sum())
            shares = " ".join(f"{100 * int(n) / max(assigned, 1):.1f}%" for n in count)
            load = f"{assigned} assignments, max/mean {int(count.max()) * len(count) / max(assigned, 1):.2f}"
            self.logger.info(f"step {step} MoE layer {layer}: {load}, shares {shares}")


class MoEUsageTensorBoardCallback(MoEUsageCallback):
    """Writes every MoE layer's shares, max/mean load and counts to TensorBoard every `log_interval` steps.
    tb_writer: a SummaryWriter, which stays open. If it is None, the master opens and closes one."""

    def __init__(self, log_interval: int = 100, tb_writer=None):
        super().__init__(log_interval)
        self.tb_writer, self._own_writer = tb_writer, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Opens a writer on the master if none was given."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if self.tb_writer is None and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs")
            self.tb_writer = self._own_writer = SummaryWriter(log_dir=folder)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Reports the steps since the last report, and closes the writer if this callback opened it."""
        self._report_counts(model, state)
        if self._own_writer:
            self._own_writer.close()
            self.tb_writer = self._own_writer = None

    def _report(self, counts, step):
        for layer, count in enumerate(counts):
            share = count / count.sum().clamp(min=1)
            for expert, value in enumerate(share.tolist()):
                self.tb_writer.add_scalar(f"moe/layer_{layer}/expert_{expert}", value, step)
            self.tb_writer.add_scalar(f"moe/layer_{layer}/max_load", share.max() * len(count), step)
            self.tb_writer.add_histogram(f"moe/layer_{layer}/counts", count, step)
        self.tb_writer.flush()
