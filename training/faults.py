"""What a run does when something fails: signals, steps that are not finite, errors, exit codes.

    SIGTERM, SIGINT, SIGHUP     finish the step, save, exit with 128 + the signal's number; a second SIGINT
    SIGQUIT, SIGXCPU            ends at once
    SIGUSR1                     save after this step and continue
    loss or gradient not finite all ranks skip the step's update; too many such steps in a row end the run
    only the scaled gradient    float16: all ranks skip the update, and GradScaler halves its scale
    lost rank, bad data, no memory    rank 0 saves the last finished step if it holds the whole model and sees
                                the error (one process, or DDP on gloo); exit; --resume auto continues

docs/many_gpus.md says which signals torchrun passes on."""

import contextlib
import errno
import gc
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from layers.sharding import local
from tokens.files import DataError
from tokens.printable import one_line
from training.heartbeat import shorten

REPORT_DELAY = 3.0  # seconds that other ranks wait, so that only rank 0 prints an error that all ranks raise
OK, FAILED, BAD_SETTINGS = 0, 1, 2  # exit codes; after a signal the code is 128 + its number
# OSErrors about a path that a setting names. Other OSErrors, such as a full disk, are failures.
BAD_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
BAD_ERRNO = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


# ---------------------------------------------------------------------------- SIGNALS
class Signals:
    """Signals as requests that the loop reads once a step, so that all ranks act at the same step.

        with signals:
            flags = all_reduce(signals.take(device))     # what this rank has received since the last take()
            signals.agree(flags.tolist())                # what any rank has received: exit_code, save_now

    Python runs no signal handler while it waits in a collective, but the C part of the handler writes the
    signal's number to a socket at once (signal.set_wakeup_fd). A thread reads the socket, so that a second
    SIGINT always ends the process."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1")  # all but the last end the run

    def __init__(self, talkative: bool = False):
        self.talkative = talkative
        self.exit_code: int | None = None  # of the signal that ends the run
        self.save_now = False  # whether any rank has been told to save
        self._received: set[str] = set()
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for name in self.NAMES:
            number = getattr(signal, name, None)  # Windows lacks some
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._handlers_before[number] = signal.signal(number, self._receive)
        reader, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._wakeup.close()  # the thread then reads the end of the stream and returns

    def _receive(self, number: int, frame) -> None:
        self._received.add(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def _listen(self, wakeup: socket.socket) -> None:
        end = {"SIGUSR1": "saving", "SIGINT": "saving and stopping; interrupt again to stop at once"}
        interrupts = 0
        with wakeup:
            while numbers := wakeup.recv(64):
                interrupts += numbers.count(signal.SIGINT)
                if interrupts > 1:
                    os._exit(128 + signal.SIGINT)
                names = {signal.Signals(number).name for number in numbers} & set(self.NAMES)
                for name in sorted(names) if self.talkative else ():
                    text = f"\n{name}: finishing this step, then {end.get(name, 'saving and stopping')}\n"
                    with contextlib.suppress(OSError):  # stderr's reader has ended, as in `2>&1 | tee out`
                        os.write(sys.__stderr__.fileno(), text.encode())

    def request_save(self) -> None:
        """Act as if this rank had received SIGUSR1."""
        self._received.add("SIGUSR1")

    @property
    def save_requested(self) -> bool:  # since the last take(), on this rank
        return "SIGUSR1" in self._received

    @property
    def stop_requested(self) -> bool:  # on this rank; the other ranks may not know yet
        return self.stops or bool(self._received - {"SIGUSR1"})

    @property
    def stops(self) -> bool:  # whether the run ends because of a signal; the same on all ranks
        return self.exit_code is not None

    def take(self, device: torch.device) -> torch.Tensor:
        """(6,) fp32: 1 where this rank has received the signal of NAMES since the last call."""
        received, self._received = self._received, set()
        flags = torch.zeros(len(self.NAMES), device=device)
        for name in received:
            flags[self.NAMES.index(name)] = 1.0  # copying a tensor from the host would wait for the device
        return flags

    def agree(self, counts: list[float]) -> None:
        """Set exit_code and save_now. counts: how many ranks have received each signal of NAMES."""
        *stops, self.save_now = (count > 0 for count in counts)
        if any(stops):
            self.exit_code = 128 + getattr(signal, self.NAMES[stops.index(True)])


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Switch Python's garbage collector off in the block: all ranks would wait for the rank that collects."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


# ---------------------------------------------------------------------------- BAD STEPS
class Health:
    """Counts steps whose loss or gradient is not finite. Reports jumps: a loss more than SIGMAS standard
    deviations above its running mean over about MEMORY steps, but not in the first MEMORY steps."""

    SIGMAS, MEMORY = 6.0, 50

    def __init__(self, state: dict | None = None):
        self.bad_steps, self.in_a_row = 0, 0  # in the whole run; since the last good step
        self.scale_steps = 0  # in the whole run
        self.seen, self.mean, self.variance = 0, 0.0, 0.0
        vars(self).update(state or {})

    def skips(self, loss: float, norm: float, scale: float = 1.0) -> str:
        """Why a step with this loss and gradient norm must not change the weights: "bad", "scale", or "".
        "scale" is no bad step: GradScaler begins with a scale of 65,536, and halves it until float16 can hold
        the gradients of loss * scale."""
        if math.isfinite(loss) and not math.isfinite(norm) and scale > 1:
            self.scale_steps += 1
            return "scale"
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.bad_steps += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
        return "bad" * bad

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss jumped. Adds the loss to the running mean."""
        jump = loss - self.mean
        spike = self.seen >= self.MEMORY and jump > self.SIGMAS * math.sqrt(self.variance)
        self.seen += 1
        weight = max(1 / self.seen, 1 / self.MEMORY)
        self.mean += weight * jump
        self.variance = (1 - weight) * (self.variance + weight * jump**2)
        return spike


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The random seed of a step. Dropout depends on this seed alone, so it is the same after a resume."""
    return ((seed * 1_000_003 + step) * 65_536 + rank) % 2**63


def discard_routing(model: nn.Module) -> None:
    """Set to zero what the routers have counted since the last optimizer step, as if this step never ran."""
    for moe in model.moe_layers():
        moe.step_totals.zero_()


def diagnose(model: nn.Module, micro_losses: list[torch.Tensor], loader: Any) -> str:
    """Names what is not finite after a bad step. micro_losses: this rank's, of the loader's last batches."""
    named = list(model.named_parameters())
    values = [name for name, p in named if not p.isfinite().all()]
    gradients = [name for name, p in named if p.grad is not None and not local(p.grad).isfinite().all()]
    bad = [i for i, loss in enumerate(micro_losses) if not loss.isfinite()]
    begin = loader.position - len(micro_losses) * loader.world_size * loader.B  # samples before the step
    first = begin + ((bad[0] if bad else 0) * loader.world_size + loader.rank) * loader.B
    places = ["{} at token {}".format(*loader.locate(sample)) for sample in range(first, first + loader.B)]
    what = f"micro-step {bad[0]} is the first whose loss is not finite" if bad else "all losses are finite"
    first = f"  parameters that are not finite: {shorten(values)}\n"
    first += f"  parameters whose gradient is not finite: {shorten(gradients)} (of {len(named)})\n"
    return f"{first}  rank {loader.rank}: {what}; batch: {shorten(places)}"


# ---------------------------------------------------------------------------- ERRORS
def next_batch(loader) -> tuple[torch.Tensor, torch.Tensor]:
    """loader.next_batch(); its errors for bad data become DataError."""
    try:
        return loader.next_batch()
    except (ValueError, OSError) as error:
        raise DataError(f"{error}. Repair the data") from error


def is_compile_error(error: Exception) -> bool:
    """Whether torch.compile has failed."""
    return any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__)  # a slow import


def compile_reason(error: Exception) -> str:
    """The line of torch.compile's long message that says most: the compiler's error, or the first line."""
    first, *others = str(error).strip().splitlines() or [repr(error)]
    return f"torch.compile fails: {next((line for line in others if 'error:' in line), first)[:300]}"


def report(error: Exception, config=None) -> int:
    """Print an error in one line on stderr; returns the exit code. All but a machine's first rank wait first:
    the launcher usually stops them before they print the same error. config: given if memory ran out."""
    text, code = one_line(error), BAD_SETTINGS
    if config is not None:
        code = FAILED
        names = "B T n_layer n_embd num_experts num_shared_experts expert_hidden_size mlp_hidden_size"
        names += " vocab_size block_size"
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names.split())
        mend = "lower --B (same step, in more micro-steps), then --T, then --n_layer or --n_embd"
        text = f"out of memory with {sizes}: {mend}. {text}"
    elif isinstance(error, RuntimeError):  # is_compile_error
        code, text = FAILED, f"{compile_reason(error)}; continue without it: --use_compile False"
    elif isinstance(error, OSError) and not isinstance(error, BAD_PATH) and error.errno not in BAD_ERRNO:
        code = FAILED
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun prints the text below its own traceback
        content = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": int(time.time())}}
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": content}))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(REPORT_DELAY)
    print(f"train_gpt_moe.py: error: {text}", file=sys.stderr, flush=True)
    return code
