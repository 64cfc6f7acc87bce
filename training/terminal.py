"""What a run prints: one live line if the output is a terminal, otherwise plain lines for grep.

Only the master rank prints. training/metrics.py says which numbers are shown, and how."""

import contextlib
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from layers.usage import STARVED_BELOW
from tokens.printable import printable
from training.metrics import METRICS

LEVELS = " ▁▂▃▄▅▆▇█"  # load of an expert: from none to twice its fair share or more
PLAIN_LEVELS = " .:-=+*#@"  # the same in ASCII
WARMUP, MEASURED = 3, 10  # steps: the first ones compile and are skipped, the next ones are timed for the ETA


def tell(text: str) -> None:
    """Print lines. A failure is ignored, because the log files have the same numbers."""
    try:
        print(printable(text, keep="\n\t"))
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
        self.newest: dict[str, Any] = {"step": first_step - 1}  # the newest step's record
        self.evaluated: dict[str, Any] = {}  # what the newest evaluation measured, and its "eval_step"
        self.state = "compiling (about a minute)" if config.use_compile else ""  # what the user waits for
        self.eta = ""
        self.ms: list[float] = []  # of every step
        self.began = 0.0  # when the first WARMUP steps were done
        self.lock = threading.RLock()  # the thread that saves checkpoints also prints

    def __enter__(self) -> "Terminal":
        self.draw()
        return self

    def __exit__(self, *_) -> None:
        self.draw()
        self._put("\n")
        self.watched = False

    def say(self, text: str) -> None:
        """Print a separate line on the master's stdout."""
        if self.is_master:
            with self.lock:
                self._put("\r" + " " * (columns() - 1) + "\r")
                tell(text)
                self.draw()

    def show(self, state: str) -> None:
        """Show in the live line what the user waits for; "" for training."""
        self.state = state
        self.draw()

    @contextlib.contextmanager
    def during(self, state: str) -> Iterator[None]:
        """Show `state` in the live line during this block."""
        before = self.state
        self.show(state)
        yield
        self.show(before)

    def draw(self) -> None:
        """Draw the live line again, in the width that the terminal has now."""
        width = columns() - 1  # a character in the last column may begin a new row
        text = live_line(self.newest | self.evaluated, self.config.max_steps, width, self.state, self.eta)
        self._put("\r" + text.ljust(width))

    def _put(self, text: str) -> None:
        if self.watched:
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except (OSError, ValueError):  # the terminal was closed
                self.watched = False

    def step(self, record: dict) -> None:
        """Show the record of a step: in the live line, or every log_every steps in a separate line."""
        config, step, now = self.config, record["step"], time.perf_counter()
        left = config.max_steps - 1 - step
        self.newest = record
        self.ms.append(record["ms"])
        timed = len(self.ms) - WARMUP
        if timed <= 0:
            self.began = now
        else:  # at the mean speed so far, evaluations and saves between the steps included
            self.eta = f"ETA {duration(left * (now - self.began) / timed)}"
        self.show("")
        if not self.watched and (step % config.log_every == 0 or left == 0):
            self.say(step_line(record, config.max_steps))
        if not self.watched and timed == MEASURED and left > 0:
            ms = statistics.median(self.ms[WARMUP:])
            text = f"about {duration(left * ms / 1000)} to go at {ms:.1f} ms a step, evaluations not counted"
            self.say(f"step {step}: {text}")

    def evaluation(self, step: int, measured: dict) -> None:
        """Print what validate() measured after `step` steps. The live line shows it from now on."""
        self.evaluated = measured | {"eval_step": step}
        lines = [f"step {step}: validation loss {loss_text(measured)}"]
        for key in measured:
            if name := key.partition("val_loss/")[2]:
                lines.append(f"step {step}: validation loss of {name} {loss_text(measured, f'/{name}')}")
        self.say("\n".join(lines))

    def experts(self, step: int, model: Any) -> None:
        """Show how the last optimizer step used the experts; nothing before the first step."""
        if self.is_master and step > 0 and model.moe_layers():
            rows = heat_map(torch.stack([moe.last_step_counts() for moe in model.moe_layers()]))
            self.say("\n".join(f"step {step}: {row}" for row in rows))

    def summary(self, memory: int, checkpoint: Any, batch: str = "", speaks: bool = True) -> None:
        """Say how a finished run ended. memory: peak, in bytes. checkpoint: path of the newest, or "none".
        batch: the batch against the gradient noise scale, in words. speaks: the model's tokens are text."""
        config, mib = self.config, memory // 2**20
        lines = [f"memory          {mib:,} MiB at most"]
        if config.preset == "llmc":  # as train_gpt2.py: at most 19 steps, without the first, which compiles
            last = self.ms[1:][-19:] or self.ms or [0.0]
            lines = [f"final {len(last)} iters avg: {statistics.fmean(last):.3f}ms"]
            lines.append(f"peak memory consumption: {mib} MiB")
        elif self.ms:
            lines.append(f"speed           {statistics.median(self.ms):.1f} ms a step (median)")
        if self.evaluated and (done := self.evaluated["eval_step"]) == self.newest["step"] + 1:
            lines.append(f"validation loss {loss_text(self.evaluated)}, after {done} steps")
        if batch:
            lines.append(f"batch           {batch}")
        if epochs := [name for name in self.newest if name.startswith("epoch/")]:
            each = (f"{name.removeprefix('epoch/')} {self.newest[name]:.2f}" for name in epochs)
            lines.append(f"epochs          {', '.join(each)}")
        if str(checkpoint) != "none":
            lines.append(f"checkpoint      {checkpoint}")
        if str(checkpoint) != "none" and speaks:
            command = ["python", "sample.py", "--checkpoint", str(checkpoint), "--prompt", config.prompt]
            lines.append(f"next            {shlex.join(command)}")
            if config.use_moe and not config.init_from:
                command = ["python", "-m", "analysis", "routing", str(checkpoint)]
                lines.append(f"                see what the experts learnt: {shlex.join(command)}")
        self.say("\n".join(lines))


def columns() -> int:
    """Width of the terminal now; 80 if it is unknown, 1000 for a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, AttributeError):
        return 1000


def loss_text(measured: dict, suffix: str = "") -> str:
    """The validation loss in nats per token and, if it is known, in bits per byte. suffix: of a named set."""
    bits = measured.get(f"val_bpb{suffix}")
    words = f"{measured[f'val_loss{suffix}']:.4f} nats per token"
    return words if bits is None else f"{words}, {bits:.4f} bits per byte"


def live_line(record: dict, max_steps: int, width: int, state: str = "", eta: str = "") -> str:
    """The live line in at most `width` columns. If there is little space, the words that stand first in this
    order stay: state, progress, ETA, the record's numbers."""
    words = [word for word in (state, f"{record['step'] + 1}/{max_steps}", eta) if word]
    words += [m.live.format(record[m.name], **record) for m in METRICS if m.live and m.is_shown(record)]
    while len(" | ".join(words)) > width and len(words) > 1:
        words.pop()
    first = 1 + bool(eta)  # progress and ETA stand before the state
    words = words[1 : 1 + first] + words[:1] + words[1 + first :] if state else words
    return " | ".join(words)[:width]


def step_line(record: dict, max_steps: int) -> str:
    """A step's line for logs: every number with its name or unit, always in the same order."""
    words = [m.line.format(record[m.name]) for m in METRICS if m.line and m.is_shown(record)]
    return " | ".join([f"step {record['step']:5d}/{max_steps}", *words])


def heat_map(counts: torch.Tensor) -> list[str]:
    """Routed rows (MoE layers, E) as one line per layer, with one bar per expert (none if the terminal is too
    narrow for them). High bar: many rows."""
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
        bars = f"|{cells}| " if len(row) < columns() - 50 else ""
        lines.append(f"MoE layer {layer:2d} {bars}max/mean {max(row):.2f}{tail}")
    return lines


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 42 s, 5 min 03 s, 2 h 10 min, 3 d 04 h."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller:02d} {name}"
    return f"{whole} s"
