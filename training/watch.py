"""Which rank is lost: the processes of a run watch each other, and end, naming it, instead of waiting for it.

Used by parallel.py (its World keeps the watch). What happens without it when a process dies: gloo's
collectives fail at once but name an address, not a rank; NCCL's may wait until their timeout, and all do when
a machine loses its power or its network. Launchers see the processes of their own machine only.

Reference: the store, https://docs.pytorch.org/docs/stable/distributed.html#torch.distributed.TCPStore
"""

import contextlib
import itertools
import os
import socket
import sys
import threading

import torch.distributed as dist

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without any, after which a rank is lost
SUSPICION = 5.0  # the same once a collective has failed somewhere
GRACE = 10.0  # seconds that a process has to end by itself once a rank is lost
NAMED = 8  # of many lost ranks only so many are named


class Watch:
    """This process's share in the watch.

        watch = Watch(rank, size, store)    # a connection to the store that nobody else uses
        watch.start()
        watch.suspect()                     # after an error of a collective: who is lost, "" if nobody
        watch.stop(leaves=True)             # at the end; the others do not miss whoever takes leave

    One thread counts up a key of the store every BEAT seconds and looks: rank 0 at the counters of all, the
    others at that of rank 0 and at its verdict. A second one notices when the store keeps the first waiting,
    for the machine that has it may be the lost one. Silence is counted in looks, not in seconds, so that a
    process that was suspended does not take the others for lost. Once a rank is lost, the process has GRACE
    seconds, and until a checkpoint that is being written is whole; if it hangs, it is ended with exit code 1.
    """

    def __init__(self, rank: int, size: int, store: dist.Store):
        self.rank, self.store = rank, store
        self.others = list(range(1, size)) if rank == 0 else [0]
        self.beats = dict.fromkeys(self.others, b"")  # last seen
        self.silence = dict.fromkeys(self.others, 0)  # looks since then
        self.suspicious = False
        self.waiting = 0  # beats that the store has not answered
        self.lost = ""
        self.found, self.stopped = threading.Event(), threading.Event()
        store.set(f"place of {rank}", f"process {os.getpid()} on {socket.gethostname()}")
        store.set(f"beat of {rank}", "0")
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._look, self._guard)]

    def start(self) -> None:
        """Begin. All ranks must have made their watches before."""
        place = self.store.get("place of 0").decode()
        self.host = f"rank 0 ({place}) or the launcher beside it"
        for thread in self.threads:
            thread.start()

    def suspect(self) -> str:
        """A collective has failed: a sentence naming the ranks that are lost; "" if all are alive."""
        self.suspicious = True
        self.found.wait(2 * SUSPICION + 3 * BEAT)
        if self.lost and self.rank == 0:
            self.stopped.wait(3 * BEAT)  # the others read the verdict, in a store that may be this process's
        return self.lost

    def stop(self, leaves: bool = False) -> None:
        """End the watch; leaves: tell the others that this rank has ended as it should."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(3 * BEAT)  # a thread inside torch must not see the interpreter go
        if leaves and not self.lost and not self.threads[0].is_alive():
            with contextlib.suppress(dist.DistError):  # the rank with the store may have ended before
                self.store.set(f"beat of {self.rank}", "left")

    def _look(self) -> None:
        try:
            for beat in itertools.count(1):
                if self.stopped.wait(BEAT):
                    return
                lost = self._verdict(beat)
                self.waiting = 0
                if lost:
                    self._found(lost)
                    return
        except dist.DistError:  # the process that had the store is gone
            if not self.stopped.wait(0 if self.suspicious else SUSPICION):
                self._found(self.host)

    def _verdict(self, beat: int) -> str:
        if self.store.check(["lost"]):
            return self.store.get("lost").decode()
        self.store.set(f"beat of {self.rank}", str(beat))
        if self.suspicious:
            self.store.set("suspicion", "")
        patience = SUSPICION if self.store.check(["suspicion"]) else PATIENCE
        for other, now in zip(self.others, self._all("beat of {}", self.others), strict=True):
            heard = now != self.beats[other] or now == b"left"
            self.silence[other] = 0 if heard else self.silence[other] + 1
            self.beats[other] = now
        longest = max(self.silence.values(), default=0)
        if longest * BEAT <= patience:
            return ""
        silent = [other for other in self.others if self.silence[other] >= longest - 2]  # a machine's all
        named = zip(silent, self._all("place of {}", silent[:NAMED]), strict=False)
        more = [f"{len(silent) - NAMED} more"] if len(silent) > NAMED else []
        lost = ", ".join([*(f"rank {other} ({place.decode()})" for other, place in named), *more])
        self.store.set("lost", lost)
        return lost

    def _all(self, name: str, ranks: list[int]) -> list[bytes]:
        return self.store.multi_get([name.format(rank) for rank in ranks]) if ranks else []

    def _found(self, lost: str) -> None:
        verb = "are" if ", " in lost else "is"
        self.lost = f"{lost} {verb} lost: no sign of life any more; what it printed last may say why"
        self.found.set()

    def _guard(self) -> None:
        while not self.found.is_set() and not self.stopped.wait(BEAT):
            self.waiting += 1
            if self.waiting * BEAT > (SUSPICION if self.suspicious else PATIENCE):
                self._found(self.host)
        if self.stopped.wait(GRACE):
            return
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # checkpoint.py's, which gets its file finished
                thread.join(10 * PATIENCE)
        print(f"{self.lost}. Rank {self.rank} would wait for ever and ends", file=sys.stderr, flush=True)
        os._exit(1)
