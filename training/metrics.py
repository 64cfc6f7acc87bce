"""The numbers that a run measures: one row each says how and where they are shown.

A step's record, one object of metrics.jsonl, holds these numbers by name. To show another number of the
record, add a row. This file imports nothing heavy, so that plot_log.py starts fast.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A measured number. Where a text is empty, the number does not appear in that place."""

    name: str  # key in metrics.jsonl
    label: str  # what it is, or its unit; the picture's axis shows it
    curve: str = ""  # name in TensorBoard and Weights & Biases; the part before the slash is the page
    live: str = ""  # format in the terminal's live line; it may name another number of the record
    line: str = ""  # format in the terminal's step line
    hidden: float | None = None  # the terminal does not show this value
    evaluated: bool = False  # measured by evaluations, when `eval_step` steps were done
    log_word: str = ""  # its lines in log.txt are `STEP WORD VALUE`
    llmc_word: str = ""  # its lines in main.log, llm.c's format, are `s:STEP WORD:VALUE`
    panel: str = ""  # title of its panel in the picture; panels and their curves stand in the order of rows
    drawn: str = "smoothed"  # or matplotlib's drawstyle: "default" (lines), "steps-post"
    log_scale: bool = False  # if the values span more than a factor of 5
    percent: bool = False  # the axis shows 0.5 as 50%
    axis_low: float = 0.0  # the axis begins here, or at a lower value
    axis_high: float = 0.0  # the axis reaches at least this value

    def is_shown(self, record: dict) -> bool:
        """Whether the record has a value that the terminal shows."""
        return record.get(self.name) not in (None, self.hidden)


BY_LAYER = "_by_layer"  # ends the names of lists with a number per MoE layer, which evaluations measure
OPTIMIZER, SPEED, BALANCE, ROUTER = "Optimizer", "Throughput", "Expert balance", "Router"

METRICS = (
    Metric("loss", "nats per token", "loss/train", "loss {:.3f}", "loss {:.4f}",
           log_word="train", llmc_word="trl", panel="Loss"),
    Metric("val_loss", "nats per token", "loss/val", "val {:.3f} at {eval_step}",
           evaluated=True, log_word="val", llmc_word="tel", panel="Loss"),
    Metric("val_bpb", "bits per byte", "loss/val_bpb", evaluated=True, log_word="val_bpb"),
    Metric("hella_acc_norm", "acc_norm", "hellaswag/acc_norm", evaluated=True, log_word="hella",
           llmc_word="eval", panel="HellaSwag", drawn="default", percent=True, axis_low=0.2),
    Metric("hella_acc", "acc", "hellaswag/acc", evaluated=True,
           panel="HellaSwag", drawn="default", percent=True, axis_low=0.2),
    Metric("lr", "learning rate", "optim/lr", line="lr {:.3e}", panel=OPTIMIZER, drawn="default"),
    Metric("norm", "gradient norm", "optim/norm", line="norm {:.3f}", panel=OPTIMIZER, log_scale=True),
    Metric("noise_scale", "noise scale", "optim/noise_scale", evaluated=True, panel=OPTIMIZER,
           drawn="default", log_scale=True),  # tokens; training/diagnostics.py
    Metric("ms", "milliseconds", line="{:.1f} ms"),
    Metric("tok_per_s", "tokens/s", "speed/tok_per_s", "{:,.0f} tok/s", "{:,.0f} tok/s", panel=SPEED),
    Metric("mfu", "MFU", "speed/mfu", "mfu {:.0%}", "mfu {:.1%}", panel=SPEED, percent=True),
    Metric("max_load", "max / mean load", "moe/max_load", "max load {:.2f}",
           panel=BALANCE, log_scale=True, axis_low=1, axis_high=1.1),
    Metric("max_load_ceiling", "E / K", "moe/max_load_ceiling", evaluated=True),
    Metric("starved", "starved experts", "moe/starved",
           panel=BALANCE, drawn="steps-post", percent=True, axis_high=0.05),
    Metric("rerouted", "rerouted tokens", "moe/rerouted", evaluated=True),  # mean over layers
    Metric("router_entropy", "entropy", "moe/router_entropy", panel=ROUTER),  # nats, mean over layers
    Metric("balance_loss", "balance loss", "moe/balance_loss", panel=ROUTER),  # sum over layers
    Metric("z_loss", "z-loss", "moe/z_loss", panel=ROUTER),  # sum over layers
    Metric("memory", "GiB at most", "speed/memory_gib"),
    Metric("elapsed_s", "seconds since the start"),
    Metric("scale_steps", "steps so far that only halved float16's loss scale"),
    Metric("bad_steps", "steps without an update so far", live="bad steps {}", hidden=0),
)  # fmt: skip
# Numbers called NAME/PART, such as norm/experts, by NAME: the curve is called so, and /PART.
PARTS = {"norm": "optim/norm", "val_loss": "loss/val", "val_bpb": "loss/val_bpb", "epoch": "data/epoch"}
