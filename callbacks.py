"""Callbacks that show how Mixture-of-Experts layers use their experts under transformers.Trainer.

    Trainer(..., callbacks=[MoEUsageLoggingCallback(logger=logging.getLogger("MoE"), log_interval=100)])
    Trainer(..., callbacks=[MoEUsageTensorBoardCallback(log_interval=100, tb_writer=SummaryWriter("runs"))])

Either of them also tells the routers where an optimizer step ends, which the balance losses and loss-free
balancing need (mixture_of_experts.py says why). Without one the balance losses are the textbook's, of each
micro-batch alone, and loss-free balancing does nothing. Counts are of training only, over all ranks, since
the last report.
"""

import logging

import torch
from transformers import TrainerCallback

try:
    from .mixture_of_experts import MoE, update_routers
except ImportError:
    from mixture_of_experts import MoE, update_routers


class MoEUsageCallback(TrainerCallback):
    """What both share: step boundaries for the routers, counts over all ranks handed to self._report."""

    def __init__(self, log_interval: int = 100):
        if log_interval < 1:
            raise ValueError(f"log_interval={log_interval}: must be at least 1 step")
        self.log_interval = log_interval

    def _get_moe_layers(self, model) -> list[MoE]:
        """All MoE layers of a model (wrapped by DDP, FSDP or compile, or not), in the order of its blocks."""
        return [module for module in model.modules() if isinstance(module, MoE)]

    def _take_counts(self, model) -> list[torch.Tensor]:
        """Routed rows per expert since the last call, (E,) int64 on the CPU per layer; counts start anew."""
        layers = self._get_moe_layers(model)
        counts = [
            layer.get_usage_counts().cpu() for layer in layers
        ]  # update_routers has summed them over ranks
        for layer in layers:
            layer.reset_usage_counts()
        return counts

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called before the first step: from here on the routers' statistics are those of whole steps."""
        update_routers(self._get_moe_layers(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Called after each optimizer step on every rank; the master reports if the interval is met."""
        update_routers(self._get_moe_layers(model))
        if state.global_step % self.log_interval == 0:
            counts = self._take_counts(model)
            if state.is_world_process_zero:
                self._report(counts, state)


class MoEUsageLoggingCallback(MoEUsageCallback):
    """Logs the experts' shares of every MoE layer, every `log_interval` steps and after an epoch."""

    def __init__(self, logger: logging.Logger | None = None, log_interval: int = 100):
        super().__init__(log_interval)
        self.logger = logger or logging.getLogger(__name__)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Reports what came since the last report, unless a report has just been made."""
        if state.global_step % self.log_interval != 0:
            counts = self._take_counts(model)
            if state.is_world_process_zero:
                self._report(counts, state)

    def _report(self, counts, state):
        for layer, count in enumerate(counts):
            total = max(int(count.sum()), 1)
            shares = " ".join(f"{100 * int(n) / total:.1f}%" for n in count)
            most = int(count.max()) * len(count) / total
            load = f"{total} assignments, max/mean {most:.2f}, shares {shares}"
            self.logger.info(f"step {state.global_step} MoE layer {layer}: {load}")


class MoEUsageTensorBoardCallback(MoEUsageCallback):
    """Writes counts, shares and max/mean load of every MoE layer to TensorBoard every `log_interval` steps.

    `tb_writer`: a torch.utils.tensorboard.SummaryWriter, which stays open; without one the callback makes
    its own under args.logging_dir (or output_dir), on the master only, and closes it at the end.
    """

    def __init__(self, log_interval: int = 100, tb_writer=None):
        super().__init__(log_interval)
        self.tb_writer = tb_writer
        self._owns_writer = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens a writer on the master if none was given."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is None and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.tb_writer = SummaryWriter(log_dir=getattr(args, "logging_dir", None) or args.output_dir)
            self._owns_writer = True

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the writer if this callback opened it."""
        if self._owns_writer:
            self.tb_writer.close()
            self.tb_writer, self._owns_writer = None, False

    def _report(self, counts, state):
        if self.tb_writer is None:
            return
        step = state.global_step
        for layer, count in enumerate(counts):
            share = count / count.sum().clamp(min=1)
            for expert in range(len(count)):
                self.tb_writer.add_scalar(f"moe/layer_{layer}/expert_{expert}", share[expert], step)
            self.tb_writer.add_scalar(f"moe/layer_{layer}/max_load", share.max() * len(count), step)
            self.tb_writer.add_histogram(f"moe/layer_{layer}/counts", count, step)
        self.tb_writer.flush()
