"""How the ranks of a run find each other, and the check that all of them have the same settings and data.

Reference: the variables that torchrun sets, https://docs.pytorch.org/docs/stable/elastic/run.html"""

import contextlib
import functools
import os
import re
import reprlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch.distributed as dist

from training.heartbeat import Heartbeat, shorten

TIMEOUT = timedelta(minutes=10)  # of collectives, and of the wait for all ranks at the start
WAIT_MESSAGE_S = 10.0  # seconds between two lines that say for which ranks the start waits
MOST_RANKS = 65_536  # faults.dropout_seed's


def read_environment() -> tuple[int, int, int, str, int] | None:
    """(rank, local rank, ranks, rank 0's address, port); None: one process. ValueError names a variable."""
    most = MOST_RANKS - 1
    limits = dict(RANK=(0, most), LOCAL_RANK=(0, most), WORLD_SIZE=(1, MOST_RANKS), MASTER_PORT=(1, 65535))
    names = [*limits, "MASTER_ADDR"]
    given, missing = [n for n in names if n in os.environ], [n for n in names if n not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return None
    if missing:
        raise ValueError(f"{', '.join(given)} set, but not {', '.join(missing)}; set all of them, or none")
    *texts, address = (os.environ[name] for name in names)
    for (name, (least, most)), text in zip(limits.items(), texts, strict=True):
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:  # int() takes 1_0 and more
            given = f"{name}={reprlib.repr(text)} in the environment"
            raise ValueError(f"{given}: must be a whole number from {least} to {most}")
    rank, local_rank, size, port = map(int, texts)
    if rank >= size:
        raise ValueError(f"RANK={rank} must lie in 0..WORLD_SIZE-1={size - 1}")
    try:
        socket.getaddrinfo(address, port)  # TCPStore would try an unknown address for minutes
    except (OSError, UnicodeError) as error:
        problem = f"MASTER_ADDR={reprlib.repr(address)} in the environment is not known here ({error})"
        raise ValueError(f"{problem}; give the name or the IP address of rank 0's machine") from error
    return rank, local_rank, size, address, port


@contextlib.contextmanager
def telling(waits: Callable[[], str]) -> Iterator[None]:
    """Print waits(), which says for whom the block waits, every WAIT_MESSAGE_S seconds until it ends."""
    begin, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(WAIT_MESSAGE_S):
            text = f"{waits()} ({time.monotonic() - begin:.0f} s so far)"
            print(f"train_gpt_moe.py: {text}", file=sys.stderr, flush=True)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def name_ranks(ranks: Iterable[int]) -> str:
    """The first ranks, and how many more there are."""
    ranks = sorted(ranks)
    return f"rank{'s' * (len(ranks) > 1)} {shorten(ranks)}"


def wait_for_ranks(size: int, what: str, has_come: Callable[[int], bool]) -> None:
    """On rank 0: wait for has_come(rank) of all others; ValueError after TIMEOUT. what: {} for the ranks."""
    missing, end = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    with telling(lambda: f"rank 0 waits for {what.format(name_ranks(missing))}"):
        while missing := {rank for rank in missing if not has_come(rank)}:
            if time.monotonic() > end:
                problem = "did not start, or stopped; start as many processes"
                raise ValueError(f"{name_ranks(missing)} of WORLD_SIZE={size} {problem}")
            time.sleep(0.01)


def check_own_gpu(store: dist.Store, rank: int, size: int, gpu: str) -> None:
    """ValueError, naming the ranks, if another rank uses this rank's GPU. gpu: its machine and its UUID."""
    store.set(f"gpu of {rank}", gpu)
    gpus = [store.get(f"gpu of {other}").decode() for other in range(size)]  # waits for the others
    if gpus.count(gpu) > 1:
        time.sleep(2 * (rank == 0))  # as in World.check_equal
        sharing = name_ranks({other for other in range(size) if gpus[other] == gpu})
        raise ValueError(f"{sharing} use one GPU ({gpu}); omit --device, and start one process per GPU")


def differences(values: list[dict]) -> Iterator[str]:
    """For each entry that differs between the ranks' dictionaries: its value on rank 0, and on others."""
    for name in dict.fromkeys(name for entries in values for name in entries):
        texts = [entries.get(name, "nothing") for entries in values]
        unlike = [rank for rank, text in enumerate(texts) if text != texts[0]]
        if unlike:
            yield f"{name}={texts[0]:.80} on rank 0, but {texts[unlike[0]]:.80} on {name_ranks(unlike)}"


def rendezvous(rank: int, size: int, address: str, port: int) -> tuple[dist.Store, Heartbeat]:
    """The store at address:port, under a prefix that only the processes of this start know, and a Heartbeat.
    torchrun --max-restarts keeps its store, which holds addresses of dead processes. A process that reads one
    hangs (https://github.com/pytorch/pytorch/issues/135712). Each rank therefore announces a random token,
    rank 0 answers each with a new prefix, and continues when every rank has acknowledged that prefix.
    ValueError if the store cannot be reached, or a rank does not start within TIMEOUT."""
    launcher_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    token = prefix = uuid.uuid4().hex
    connect = functools.partial(dist.TCPStore, address, port, size, timeout=TIMEOUT, wait_for_workers=False)
    where = f"MASTER_ADDR={address}, MASTER_PORT={port}"
    try:
        with telling(lambda: f"rank {rank} waits for rank 0 at {where}"):
            store = connect(is_master=rank == 0 and not launcher_has_it)
            if rank > 0:
                store.set(f"token of {rank}", token)
                prefix = store.get(f"prefix for {token}").decode()  # waits for rank 0
        # The heartbeat needs a second connection: the main thread may be waiting in the first one.
        beats = dist.PrefixStore(f"heartbeat {prefix}", connect(is_master=False))
        heartbeat = Heartbeat(rank, size, beats, launcher_has_it)
        if rank > 0:
            store.set(f"{prefix} acknowledged by {rank}", "")
    except dist.DistError as error:
        ask = f"is it the same everywhere, free on rank 0's machine, and open? {str(error).splitlines()[0]}"
        raise ValueError(f"rank {rank} cannot reach rank 0 at {where}; {ask}") from error

    def has_acknowledged(other: int) -> bool:
        if store.check([f"token of {other}"]):
            store.set(f"prefix for {store.get(f'token of {other}').decode()}", prefix)
        return store.check([f"{prefix} acknowledged by {other}"])

    if rank == 0:
        wait_for_ranks(size, f"{{}} of WORLD_SIZE={size}", has_acknowledged)
    return dist.PrefixStore(prefix, store), heartbeat
