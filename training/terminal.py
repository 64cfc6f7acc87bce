"""What a run prints: one live line if the output is a terminal, otherwise plain lines for grep.

Only the master rank prints. training/metrics.py says which numbers are shown, and how."""

import os
import shlex
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from layers.usage import STARVED_BELOW
from tokens.printable import printable
from training.metrics import METRICS

LEVELS = " ▁▂▃▄▅▆▇█"  # load of an expert: from none to twice its fair share or more
PLAIN_LEVELS = " .:-=+*#@"  # the same in ASCII
WARMUP, MEASURED = 3, 10  # steps: the first ones compile and are skipped, the next ones are timed for the ETA


def tell(text: str, write: Callable = print) -> None:
    """Print lines. A failure is ignored, because the log files have the same numbers."""
    try:
        write(printable(text, keep="\n\t"))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has ended: Ctrl-C also ends the tee of `... | tee out`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
    except OSError:  # stdout is a file on a full disk
        pass


class Terminal:
    """The terminal of a run of `config` (TrainConfig) that begins at first_step."""

    def __init__(self, config: Any, first_step: int, is_master: bool):
        self.config, self.is_master = config, is_master
        # If stdout or stderr is a file, it should get all lines, so there is no live line.
        self.watched = is_master and all(s is not None and s.isatty() for s in (sys.stdout, sys.stderr))
        self.bar = tqdm(total=config.max_steps, initial=first_step, disable=not self.watched, smoothing=0.05,
                        bar_format="{desc} {bar:10} ETA {remaining}", dynamic_ncols=True)  # fmt: skip
        self.ms: list[float] = []  # of every step
        self.evaluated: dict[str, float] = {}  # the newest values that evaluations measured

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def say(self, text: str) -> None:
        """Print a separate line on the master's stdout."""
        if self.is_master:
            tell(text, self.bar.write if self.watched else print)

    def step(self, record: dict) -> None:
        """Show the record of a step: in the live line, or every log_every steps in a separate line."""
        config, step = self.config, record["step"]
        self.ms.append(record["ms"])
        self.evaluated |= {m.name: record[m.name] for m in METRICS if m.evaluated and m.name in record}
        self.bar.set_description_str(live_line(self.evaluated | record, config.max_steps), refresh=False)
        self.bar.update()
        if not self.watched and (step % config.log_every == 0 or step == config.max_steps - 1):
            self.say(step_line(record, config.max_steps))
        if len(self.ms) == WARMUP + MEASURED and step < config.max_steps - 1:
            ms = statistics.median(self.ms[WARMUP:])
            left = duration((config.max_steps - 1 - step) * ms / 1000)
            self.say(f"step {step}: about {left} to go at {ms:.1f} ms a step, evaluations not counted")

    def experts(self, step: int, model: Any) -> None:
        """Show how the last optimizer step used the experts; nothing before the first step."""
        if self.is_master and step > 0 and model.moe_layers() and not self.config.inference_only:
            rows = heat_map(torch.stack([moe.last_step_counts() for moe in model.moe_layers()]))
            self.say("\n".join(f"step {step}: {row}" for row in rows))

    def summary(self, model: Any, memory: int, val_loss: float | None, checkpoint: Any) -> None:
        """Say how a finished run ended. memory: peak, in bytes. checkpoint: path of the newest, or "none"."""
        config, lines = self.config, []
        if model.moe_layers() and config.max_steps > 0 and not config.inference_only:
            lines.append(f"how the last step used the experts (even: {100 / model.config.num_experts:.1f}%)")
            for layer, moe in enumerate(model.moe_layers()):
                counts = moe.last_step_counts().cpu()
                share = counts / counts.sum().clamp(min=1)
                cells = " ".join(f"{100 * s:5.1f}%" for s in share.tolist())
                lines.append(f"  MoE layer {layer:2d}: {cells}   max/mean {share.max() * len(share):.2f}")
        lines.append("final {} iters avg: {:.3f}ms".format(*self.average_ms()))
        lines.append(f"peak memory consumption: {memory // 2**20} MiB")
        if val_loss is not None:
            lines.append(f"validation loss {val_loss:.4f} nats per token after {config.max_steps} steps")
        if str(checkpoint) != "none":
            command = ["python", "sample.py", "--checkpoint", str(checkpoint), "--prompt", config.prompt]
            lines += [f"checkpoint      {checkpoint}", f"next            {shlex.join(command)}"]
        self.say("\n".join(lines))

    def average_ms(self) -> tuple[int, float]:
        """(number, mean milliseconds) of the last steps, as in llm.c's train_gpt2.py: at most 19. The first
        step, which compiles, counts only if it is the only one."""
        last = self.ms[1:][-19:] or self.ms
        return len(last), statistics.fmean(last) if last else 0.0


def live_line(record: dict, max_steps: int) -> str:
    """The live line: progress, and the numbers that are known."""
    words = [m.live.format(record[m.name]) for m in METRICS if m.live and m.is_shown(record)]
    return " | ".join([f"{record['step'] + 1}/{max_steps}", *words])


def step_line(record: dict, max_steps: int) -> str:
    """A step's line for logs: every number with its name or unit, always in the same order."""
    words = [m.line.format(record[m.name]) for m in METRICS if m.line and m.is_shown(record)]
    return " | ".join([f"step {record['step']:5d}/{max_steps}", *words])


def heat_map(counts: torch.Tensor) -> list[str]:
    """Routed rows (MoE layers, E) as one line per layer, with one bar per expert. High bar: many rows."""
    levels = LEVELS
    try:
        levels.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        levels = PLAIN_LEVELS
    counts = counts.cpu().double()  # .cpu() first: MPS has no float64
    load = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)  # in fair shares
    lines = []
    for layer, row in enumerate(load.tolist()):
        cells = "".join(levels[min(len(levels) - 1, round(4 * share))] for share in row)
        starved = sum(share < STARVED_BELOW for share in row)
        tail = f", {starved} starved" if starved else ""
        lines.append(f"MoE layer {layer:2d} |{cells}| max/mean {max(row):.2f}{tail}")
    return lines


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 42 s, 5 min 03 s, 2 h 10 min, 3 d 04 h."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller:02d} {name}"
    return f"{whole} s"
