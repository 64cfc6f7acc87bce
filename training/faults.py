"""What can go wrong in a run, and what becomes of it: signals, sick steps, errors and their exit codes.

    SIGTERM, SIGINT (Ctrl-C)    finish the step, save, exit with 143 or 130; a second SIGINT stops at once
    SIGUSR1                     save now and go on
    loss or gradient not finite the step's update is left out on all ranks; too many in a row end the run
    lost rank, bad data, no memory    what has been trained is saved, where rank 0 has all of it and learns of
                                it (one process; DDP on gloo), then exit; --resume auto goes on

Whoever stops a run must leave it time to save: torchrun sends its workers SIGKILL 30 seconds after SIGTERM,
or, from torch 2.13 on, what --shutdown-timeout says.
"""

import contextlib
import errno
import math
import os
import signal
import socket
import sys
import threading
import time

import torch
import torch.nn as nn

from tokens.files import DataError

REPORT_DELAY = 3.0  # seconds by which other ranks let the first one report an error that all have
OK, FAILED, BAD_SETTINGS = 0, 1, 2  # exit codes; after a signal it is 128 + its number
# What is wrong with a path that somebody gave; other errors of the system (disk full, ...) are failures.
MENDABLE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

# ---------------------------------------------------------------------------- SIGNALS


class Signals:
    """Signals as requests, which the loop learns once a step, all ranks at the same step.

        signals.catch()
        flags = all_reduce(signals.take(device))     # what this rank has got since the last time
        signals.agree(flags.tolist())                # what any rank has got: exit_code, save_now
        signals.release()

    Before and after that signals do what they always do; a second SIGINT ends the process at once, too.

    Python runs its handlers between two of its instructions, never while it waits inside a collective. The
    system's side of the handler, though, writes the signal's number to a socket (signal.set_wakeup_fd), where
    a thread of ours reads it whatever the main thread waits for.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")

    def __init__(self, talkative: bool):
        self.talkative = talkative
        self.exit_code: int | None = None  # of the signal that ends the run
        self.save_now = False
        self._got: set[str] = set()
        self._before: dict[int, object] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None

    def catch(self) -> None:
        """From here on signals are requests."""
        for name in self.NAMES:
            if hasattr(signal, name):  # Windows lacks SIGUSR1
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._receive)
        self._wakeup = socket.socketpair()
        for end in self._wakeup:
            end.setblocking(end is self._wakeup[0])
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._wakeup[0],), daemon=True).start()

    def release(self) -> None:
        """Give the signals back to whom they were before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            self._wakeup[1].close()  # the thread reads the end of the stream
            self._wakeup = None

    def _receive(self, number: int, frame) -> None:
        """In the main thread, as soon as it comes back to Python."""
        self._got.add(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def _listen(self, wakeup: socket.socket) -> None:
        """In a thread of its own, at once."""
        interrupts = 0
        with wakeup:
            while numbers := wakeup.recv(64):
                interrupts += numbers.count(signal.SIGINT)
                if interrupts > 1:
                    os._exit(128 + signal.SIGINT)
                for name in sorted({signal.Signals(number).name for number in numbers} & set(self.NAMES)):
                    self._announce(name)

    def _announce(self, name: str) -> None:
        if self.talkative:
            end = {"SIGUSR1": "saving", "SIGINT": "saving and stopping; once more to stop at once"}
            text = f"\n{name}: finishing this step, then {end.get(name, 'saving and stopping')}\n"
            with contextlib.suppress(OSError):  # nobody reads it any more, as after `2>&1 | tee out`
                os.write(sys.__stderr__.fileno(), text.encode())

    @property
    def save_requested(self) -> bool:
        """Whether this rank has been told to save and go on since the last take()."""
        return "SIGUSR1" in self._got

    def request_save(self) -> None:
        """As if this rank had got SIGUSR1."""
        self._got.add("SIGUSR1")

    @property
    def stop_requested(self) -> bool:
        """Whether this rank has been told to stop; the others may not know yet."""
        return self.exit_code is not None or bool(self._got & {"SIGINT", "SIGTERM"})

    def take(self, device: torch.device) -> torch.Tensor:
        """(3,) fp32, one where this rank has got SIGINT, SIGTERM, SIGUSR1 since the last call."""
        got, self._got = self._got, set()
        flags = torch.zeros(len(self.NAMES), device=device)
        for i, name in enumerate(self.NAMES):
            if name in got:
                flags[i] = 1.0  # a copy of the whole from this process would wait for the device
        return flags

    def agree(self, counts: list[float]) -> None:
        """Take note of how many ranks have got each of the three."""
        interrupted, terminated, save = (count > 0 for count in counts)
        if interrupted or terminated:
            self.exit_code = 128 + (signal.SIGINT if interrupted else signal.SIGTERM)
        self.save_now = save


# ---------------------------------------------------------------------------- SICK STEPS


class Health:
    """Counts steps whose loss or gradient is not finite, and notices sudden jumps of the loss.

    A jump is a loss more than SIGMAS standard deviations above its running mean, both with a memory of some
    50 steps, once 50 have been seen. It is reported; nothing is done about it.
    """

    SIGMAS, MEMORY = 6.0, 50

    def __init__(self, state: dict | None = None):
        self.bad_steps = 0  # in all
        self.in_a_row = 0
        self.seen, self.mean, self.variance = 0, 0.0, 0.0
        vars(self).update(state or {})

    def is_sick(self, loss: float, norm: float) -> bool:
        """Whether a step with this loss and gradient norm must not change the weights; counts it."""
        sick = not (math.isfinite(loss) and math.isfinite(norm))
        self.bad_steps += sick
        self.in_a_row = self.in_a_row + 1 if sick else 0
        return sick

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss jumped; it then becomes part of the running mean."""
        jump = loss - self.mean
        spike = self.seen >= self.MEMORY and jump > self.SIGMAS * math.sqrt(self.variance)
        self.seen += 1
        weight = max(1 / self.seen, 1 / self.MEMORY)
        self.mean += weight * jump
        self.variance = (1 - weight) * (self.variance + weight * jump**2)
        return spike

    def state_dict(self) -> dict:
        """All counters, for the checkpoint and the constructor."""
        return dict(vars(self))


def forget_routing(model: nn.Module) -> None:
    """Drop what the routers have counted since the last optimizer step, as if the step had not been tried."""
    for moe in model.moe_layers():
        moe.step_totals.zero_()


def diagnose(model: nn.Module, batch_losses: list[torch.Tensor], loader, beginning: dict) -> str:
    """Which parameters and which samples are not finite, after a backward whose gradients are still there.

    batch_losses: one per micro-step of this rank. beginning: the loader's state when the step began.
    """
    named = list(model.named_parameters())
    bad_values = [name for name, p in named if not p.isfinite().all()]
    bad_gradients = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    lines = [
        f"parameters that are not finite: {shorten(bad_values)}",
        f"parameters whose gradient is not finite: {shorten(bad_gradients)} (of {len(named)})",
    ]
    sick = [i for i, loss in enumerate(batch_losses) if not loss.isfinite()]
    micro_step = sick[0] if sick else 0
    first = beginning["position"] + (micro_step * loader.world_size + loader.rank) * loader.B
    places = ["{} at token {}".format(*loader.locate(sample)) for sample in range(first, first + loader.B)]
    what = f"micro-step {sick[0]} is the first whose loss is not finite" if sick else "all losses are finite"
    lines.append(f"rank {loader.rank}: {what}; batch: {shorten(places)}")
    return "\n".join("  " + line for line in lines)


def shorten(names: list[str], most: int = 6) -> str:
    """The names, or the first few and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


# ---------------------------------------------------------------------------- ERRORS


def next_batch(loader) -> tuple[torch.Tensor, torch.Tensor]:
    """loader.next_batch(); DataError in place of what it raises for bad data."""
    try:
        return loader.next_batch()
    except (ValueError, OSError) as error:
        raise DataError(f"{error}. Mend the data; --resume auto then goes on") from error


def report(error: Exception, config=None) -> int:
    """Tell a person what is wrong in one line on stderr, without a traceback; returns the exit code.

    Errors that all ranks have alike are told by the first rank of each machine. The others wait a moment:
    where the launcher stops them meanwhile, the first one has said it; where not, the error is theirs alone.
    """
    text = " ".join(str(error).split())
    code = BAD_SETTINGS
    if isinstance(error, torch.OutOfMemoryError):
        code = FAILED
        text = (
            f"out of memory with B={config.B}, T={config.T}, n_layer={config.n_layer}: lower --B (the step "
            f"stays the same, in more micro-steps), then --T, then --n_layer or --n_embd. {text}"
        )
    elif isinstance(error, OSError):
        code = BAD_SETTINGS if isinstance(error, MENDABLE) or error.errno == errno.EROFS else FAILED
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(REPORT_DELAY)
    print(f"train_gpt_moe.py: {text}", file=sys.stderr, flush=True)
    return code
