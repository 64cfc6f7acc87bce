"""Heartbeats: if a rank is lost, the other ranks notice it, print its name and end instead of waiting.

docs/many_gpus.md, "When a rank is lost", lists what gloo and NCCL notice. If torchrun is killed, its
processes live on. They notice it here; the run saves and ends as after SIGTERM.
Reference: the store, https://docs.pytorch.org/docs/stable/distributed.html#torch.distributed.TCPStore"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

import torch.distributed as dist

from tokens.printable import print_error, printable

INTERVAL = 1.0  # seconds between two heartbeats of a rank
HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which a rank is lost
TIMEOUT_AFTER_ERROR = 5.0  # seconds without a heartbeat, once a collective has failed
EXIT_TIMEOUT = 10.0  # seconds that a process has to end by itself once a rank is lost


def shorten(names: Sequence[object], most: int = 8) -> str:
    """The names, or the first few and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more if names else "none"


class Heartbeat:
    """This rank's heartbeat, and its check of other ranks' heartbeats.
    One thread increases a counter in the store every INTERVAL seconds. On rank 0 it also reads the counters
    of all ranks and writes the names of lost ranks. On other ranks it reads these names and rank 0's counter.
    A second thread notices when the store does not answer, and ends the process if it has not ended within
    EXIT_TIMEOUT seconds of a loss. Timeouts count checks, not seconds, so that a suspended process does not
    report others as lost. launcher_has_store: the store ends with torchrun, not with rank 0."""

    def __init__(self, rank: int, size: int, store: dist.Store, launcher_has_store: bool = False):
        self.rank, self.store, self.launcher_has_store = rank, store, launcher_has_store
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun's process
        self.others = list(range(1, size)) if rank == 0 else [0]
        self.last_seen = dict.fromkeys(self.others, b"")  # the last counter that was read
        self.missed = dict.fromkeys(self.others, 0)  # checks since it changed
        self.unanswered = 0  # intervals that the store has not answered
        self.error_seen, self.lost = False, ""  # lost: a sentence that names the lost ranks
        self.found, self.stopped = threading.Event(), threading.Event()
        store.set(f"process {rank}", f"process {os.getpid()} on {socket.gethostname()}")
        store.set(f"heartbeat {rank}", "0")
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._guard)]

    def start(self) -> None:
        """Start the threads, after all ranks have made their Heartbeat."""
        self.store_host = f"rank 0 ({self.store.get('process 0').decode()}) or the launcher beside it"
        for thread in self.threads:
            thread.start()

    def lost_after_error(self) -> str:
        """After a collective has failed: a sentence that names the lost ranks, or "". Takes some seconds."""
        self.error_seen = True
        self.found.wait(2 * TIMEOUT_AFTER_ERROR + 3 * INTERVAL)
        if self.lost and self.rank == 0:
            self.stopped.wait(3 * INTERVAL)  # so that others read it: the store may end with rank 0
        return self.lost

    def stop(self, finished: bool = False) -> None:
        """Stop the threads. finished: tell the other ranks that this rank has ended without an error."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(3 * INTERVAL)  # the interpreter must not end while a thread is inside torch
        if finished and not self.lost and not self.threads[0].is_alive():
            with contextlib.suppress(dist.DistError):  # the rank with the store may have ended before
                self.store.set(f"heartbeat {self.rank}", "finished")

    def _beat(self) -> None:
        counter = itertools.count(1)
        try:
            while not self.stopped.wait(INTERVAL):
                if self.launcher not in (None, os.getppid()):
                    self._end_without_launcher()
                lost = self._beat_and_check(next(counter))
                self.unanswered = 0
                if lost:
                    return self._report(lost)
        except dist.DistError:  # the process with the store has ended
            if self.stopped.wait(0 if self.error_seen else TIMEOUT_AFTER_ERROR):
                return
            if self.launcher_has_store and not self.error_seen:
                self._end_without_launcher()  # _guard ends this process if that takes over HEARTBEAT_TIMEOUT
            else:
                self._report(self.store_host)

    def _beat_and_check(self, count: int) -> str:
        if self.store.check(["lost"]):
            return self.store.get("lost").decode()
        self.store.set(f"heartbeat {self.rank}", str(count))
        if self.error_seen:
            self.store.set("error", "")
        timeout = TIMEOUT_AFTER_ERROR if self.store.check(["error"]) else HEARTBEAT_TIMEOUT
        keys = [f"heartbeat {other}" for other in self.others]
        counters = self.store.multi_get(keys) if keys else []
        for other, counter in zip(self.others, counters, strict=True):
            alive = counter != self.last_seen[other] or counter == b"finished"
            self.missed[other] = 0 if alive else self.missed[other] + 1
            self.last_seen[other] = counter
        most = max(self.missed.values(), default=0)
        if most * INTERVAL <= timeout:
            return ""
        silent = [other for other in self.others if self.missed[other] >= most - 2]  # within two checks
        processes = self.store.multi_get([f"process {other}" for other in silent])
        names = [f"rank {other} ({name.decode()})" for other, name in zip(silent, processes, strict=True)]
        self.store.set("lost", shorten(names))
        return shorten(names)

    def _end_without_launcher(self) -> None:
        """Act as if torchrun had sent SIGTERM: the ranks are connected, so they can agree, save and end."""
        if self.launcher is None or signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            return  # it is done, or the run does not train: it may have saved and be about to end
        self.launcher = None
        text = "torchrun was killed; the run saves and ends, as after SIGTERM"
        with contextlib.suppress(OSError):
            print(f"train_gpt_moe.py: rank {self.rank}: {text}", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGTERM)

    def _report(self, lost: str) -> None:
        verb = "are" if ", " in lost else "is"
        self.lost = f"{lost} {verb} lost: it sends no heartbeat; its last output may say why"
        self.found.set()

    def _guard(self) -> None:
        while not self.found.is_set() and not self.stopped.wait(INTERVAL):
            self.unanswered += 1
            if self.unanswered * INTERVAL > (TIMEOUT_AFTER_ERROR if self.error_seen else HEARTBEAT_TIMEOUT):
                self._report(self.store_host)
        if self.stopped.wait(EXIT_TIMEOUT):
            return
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # checkpoint_writer.py's
                thread.join(10 * HEARTBEAT_TIMEOUT)
        print_error("train_gpt_moe.py", f"{self.lost}. Rank {self.rank} ends instead of waiting")
        os._exit(1)
