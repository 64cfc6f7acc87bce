"""What a run shows while it goes on: a live line where a person watches, plain lines for grep elsewhere.

    progress = Progress(config, first_step, is_master)
    progress.say("step 250: validation loss 3.2924")       # above the live line
    progress.step(record)                                  # record: as in metrics.jsonl
    progress.experts(250, model)                           # a row of characters per MoE layer
    progress.close()

Ranks other than the master show nothing. Used by train_gpt_moe.py.
"""

import os
import shlex
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

LEVELS = " ▁▂▃▄▅▆▇█"  # of an expert's load, from none to twice its fair share or more
PLAIN_LEVELS = " .:-=+*#@"  # for terminals that know no others
WARMUP, MEASURED = 3, 10  # steps before the time to go is told: the first ones compile, and fill caches


def tell(text: str, write: Callable = print) -> None:
    """Print a line. Never an error: nobody need read it, and the log files have all that matters."""
    try:
        write(text)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more: Ctrl-C ends the tee of `... | tee out`, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
    except OSError:  # a full disk behind it
        pass


class Progress:
    """The terminal of a run of `config` (TrainConfig) that begins at first_step."""

    def __init__(self, config: Any, first_step: int, is_master: bool):
        self.config, self.is_master = config, is_master
        # A file that stdout goes to wants all the lines that a live line stands for.
        streams = (sys.stdout, sys.stderr)
        self.watched = is_master and all(stream is not None and stream.isatty() for stream in streams)
        self.bar = tqdm(
            total=config.max_steps, initial=first_step, disable=not self.watched, smoothing=0.05,
            bar_format="{desc} {bar:10} ETA {remaining}", dynamic_ncols=True,
        )  # fmt: skip
        self.ms: list[float] = []  # of every step
        self.val_loss: float | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def say(self, text: str) -> None:
        """A line of its own, on the master's stdout."""
        if self.is_master:
            tell(text, self.bar.write if self.watched else print)

    def step(self, record: dict) -> None:
        """Show an optimizer step: in the live line, or every log_every steps in a line of its own."""
        config, step = self.config, record["step"]
        self.ms.append(record["ms"])
        self.val_loss = record.get("val_loss", self.val_loss)
        self.bar.set_description_str(live_line(record, config.max_steps, self.val_loss), refresh=False)
        self.bar.update()
        if not self.watched and (step % config.log_every == 0 or step == config.max_steps - 1):
            self.say(step_line(record, config.max_steps))
        left = config.max_steps - 1 - step
        if len(self.ms) == WARMUP + MEASURED and left > 0:
            seconds = statistics.median(self.ms[WARMUP:]) / 1000
            self.say(
                f"step {step}: about {duration(left * seconds)} to go at {1000 * seconds:.1f} ms a step, "
                "evaluations not counted"
            )

    def experts(self, step: int, model: Any) -> None:
        """How the last optimizer step used the experts, a character for each; nothing before the first."""
        if self.is_master and step > 0 and model.moe_layers() and not self.config.inference_only:
            rows = heat_map(torch.stack([moe.last_step_counts() for moe in model.moe_layers()]))
            self.say("\n".join(f"step {step}: {row}" for row in rows))

    def close(self) -> None:
        """Leave the terminal as it is."""
        self.bar.close()

    def summary(self, model: Any, memory: int, val_loss: float | None, checkpoint: Any) -> None:
        """What a finished run has come to; memory: bytes at most; checkpoint: the newest one, or "none"."""
        lines = []
        if model.moe_layers() and self.config.max_steps > 0 and not self.config.inference_only:
            lines.append(f"how the last step used the experts (even: {100 / model.config.num_experts:.1f}%)")
            lines.append(usage_table(model))
        count, average = self.average_ms()
        lines.append(f"final {count} iters avg: {average:.3f}ms")
        lines.append(f"peak memory consumption: {memory // 2**20} MiB")
        if val_loss is not None:
            steps = self.config.max_steps
            lines.append(f"validation loss {val_loss:.4f} nats per token after {steps} steps")
        if str(checkpoint) != "none":
            lines.append(f"checkpoint      {checkpoint}")
            command = ["python", "sample.py", "--checkpoint", str(checkpoint), "--prompt", self.config.prompt]
            lines.append(f"next            {shlex.join(command)}")
        self.say("\n".join(lines))

    def average_ms(self) -> tuple[int, float]:
        """(number, mean milliseconds) of the last steps, at most 19 and without the first, which compiles; as
        llm.c's train_gpt2.py tells it. A run's only step counts."""
        last = self.ms[1:][-19:] or self.ms
        return len(last), statistics.fmean(last) if last else 0.0


def live_line(record: dict, max_steps: int, val_loss: float | None) -> str:
    """A step in a few words: progress, losses, speed, and if there are any bad steps and experts."""
    words = [f"{record['step'] + 1}/{max_steps}", f"loss {record['loss']:.3f}"]
    words += [f"val {val_loss:.3f}"] if val_loss is not None else []
    words += [f"{record['tok_per_s']:,.0f} tok/s"]
    words += [f"mfu {100 * record['mfu']:.0f}%"] if record.get("mfu") is not None else []
    words += [f"max load {record['max_load']:.2f}"] if "max_load" in record else []
    words += [f"bad steps {record['bad_steps']}"] if record.get("bad_steps") else []
    return " | ".join(words)


def step_line(record: dict, max_steps: int) -> str:
    """A step for logs: every field named, always in the same order."""
    utilisation = "" if record["mfu"] is None else f" | mfu {100 * record['mfu']:.1f}%"
    return (
        f"step {record['step']:5d}/{max_steps} | loss {record['loss']:.4f} | lr {record['lr']:.3e} | "
        f"norm {record['norm']:.3f} | {record['ms']:.1f} ms | {record['tok_per_s']:,.0f} tok/s{utilisation}"
    )


def heat_map(counts: torch.Tensor) -> list[str]:
    """Routed rows (MoE layers, E) as a line per layer: a character per expert, the higher the busier."""
    try:
        LEVELS.encode(getattr(sys.stdout, "encoding", None) or "ascii")
        levels = LEVELS
    except UnicodeEncodeError:
        levels = PLAIN_LEVELS
    counts = counts.cpu().double()  # in this order: MPS has no float64
    load = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)  # in fair shares
    lines = []
    for layer, row in enumerate(load.tolist()):
        cells = "".join(levels[min(len(levels) - 1, round(4 * share))] for share in row)
        dead = sum(share < 0.1 for share in row)
        lines.append(
            f"MoE layer {layer:2d} |{cells}| max/mean {max(row):.2f}" + (f", {dead} starved" if dead else "")
        )
    return lines


def usage_table(model: Any) -> str:
    """Percentages of the last step's routed rows, a line per MoE layer and a column per expert."""
    lines = []
    for layer, moe in enumerate(model.moe_layers()):
        counts = moe.last_step_counts().cpu()
        share = counts / counts.sum().clamp(min=1)
        lines.append(
            f"  MoE layer {layer:2d}: " + " ".join(f"{100 * s:5.1f}%" for s in share.tolist())
            + f"   max/mean {share.max() * len(share):.2f}"
        )  # fmt: skip
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 42 s, 5 min 03 s, 2 h 10 min, 3 d 04 h."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller:02d} {name}"
    return f"{whole} s"
