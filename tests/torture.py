"""Kill training and tokenising at random moments, for minutes, on a disk that fills up; nothing may be lost.

    python tests/torture.py --minutes 10               # as root, on Linux: on a small tmpfs of its own
    python tests/torture.py --minutes 10 --seed 3 --folder /mnt/small  # a small disk of yours
    python tests/torture.py --minutes 10 --layout fsdp # checkpoints in parts; or zero, ep, fsdp+ep

Two processes train a small model with --resume auto; a third tokenises. At random moments one of them or all
get SIGKILL, SIGTERM, SIGINT or SIGHUP, or a ballast file takes nearly all the room of the disk for a while,
or a checkpoint on the disk gets a flipped bit or loses its end, or the training shard loses its end while a
run reads it, which may kill no rank by SIGBUS. Whenever training has stopped:
    - log/latest names a checkpoint that is there
    - the newest good checkpoint is not older than any good one seen before
    - every good checkpoint is to the bit that of an undisturbed run at its step
    - log.txt has every line of the steps before the newest checkpoint once, equal to the undisturbed run's
Whenever tokenising has stopped: every shard is to the byte that of an undisturbed job. A finished run is
compared with the undisturbed one (losses, weights, moments, routers, position), and the next one begins.
Runs that break a rule, hang, or cannot go on are lost; bytes that are missing or wrong are lost bytes.
Not collected by pytest. Exit code 0 if nothing was lost."""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from processes import equal, flags, made_up_text, metrics, start, start_ranks, write_data

from training import checkpoints as ckpt

STEPS, SIZE = 40, 24 << 20  # of a run; bytes of the tmpfs
LAYOUTS = {"ddp": [], "zero": ["--zero_stage", 1], "fsdp": ["--parallel", "fsdp"], "ep": ["--ep_size", 2],
           "fsdp+ep": ["--parallel", "fsdp", "--ep_size", 2]}  # fmt: skip
TIMELESS = ("step", "loader", "health", "val_loss", "model", "optimizer", "rng")  # parts of a checkpoint


def size_of(checkpoint: Path) -> int:
    """Bytes of a checkpoint, file or folder."""
    return sum(path.stat().st_size for path in (checkpoint, *checkpoint.glob("*")) if path.is_file())


class Torture:
    """One session: the folders, the undisturbed results, the faults so far, what was lost."""

    def __init__(self, folder: Path, plain: Path, seed: int, layout: str):
        self.chance, self.folder, self.layout = random.Random(seed), folder, layout
        self.plain = plain  # a folder on the ordinary disk
        self.data = write_data(self.plain / "bytes")
        self.source = self.plain / "text.txt"
        self.source.write_text(made_up_text())
        self.faults: collections.Counter = collections.Counter()
        self.lost: list[str] = []
        self.bytes_lost = self.runs = self.jobs = self.checkpoints = 0
        self.seen = 0  # step of the newest good checkpoint of this run
        self.harmed: set[str] = set()  # checkpoints that were damaged on purpose
        self.shard = Path(self.data, "train_000000.bin")
        self.tokens = self.shard.read_bytes()

    def training(self, log_dir: Path, *more) -> list[str]:
        more = [*LAYOUTS[self.layout], "--save_retry_s", 0.5, *more]
        return flags(self.data, log_dir, "--max_steps", STEPS, "--B", 2, "--infer_step", 15, *more)

    def tokenising(self, out: Path) -> list[str]:
        sizes = "--encoding bytes --shard_size 30000 --val_tokens 20000 --workers".split()
        return ["--source", str(self.source), "--out", str(out), *sizes, self.chance.choice([1, 2])]

    def prepare(self) -> None:
        """Run both undisturbed, with a checkpoint of every step."""
        log_dir, out = self.plain / "log", self.plain / "out"
        self.wait(start_ranks(2, self.training(log_dir, "--checkpoint_every", 1), self.plain / "out.txt"))
        found = ckpt.list_checkpoints(log_dir)
        self.states = {ckpt.step_of(path): ckpt.load_checkpoint(path) for path in found}
        self.lines = (log_dir / "log.txt").read_bytes().splitlines(True)
        self.metrics = metrics(log_dir)
        self.wait([start(self.tokenising(out), self.plain / "out.txt", script="fineweb")])
        self.shards = {path.name: path.read_bytes() for path in out.glob("*.bin")}
        if len(self.states) != STEPS or len(self.shards) < 5:
            raise RuntimeError(f"the undisturbed runs failed:\n{(self.plain / 'out.txt').read_text()}")

    def run_for(self, processes: list, seconds: float) -> None:
        """Let the processes run so long, or until they end, in the presence of other faults."""
        end, full_until, ballast = time.monotonic() + seconds, 0.0, self.folder / "ballast"
        while time.monotonic() < end and any(process.is_alive() for process in processes):
            if full_until == 0 and self.chance.random() < 0.02:
                self.faults["full disk"] += 1
                room = self.chance.choice([0, 5_000, 300_000, 900_000])  # a checkpoint needs more
                with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                    while (free := shutil.disk_usage(self.folder).free - room) > 0:
                        file.write(bytes(min(free, 1 << 20)))
                full_until = time.monotonic() + self.chance.uniform(0.2, 1.5)
            elif 0 < full_until < time.monotonic():
                ballast.unlink()
                full_until = float("inf")  # once is enough
            time.sleep(0.02)
        ballast.unlink(missing_ok=True)

    def harm_a_checkpoint(self, log_dir: Path) -> None:
        """Flip a bit of the newest checkpoint, or cut off its end."""
        found = [path for path in ckpt.list_checkpoints(log_dir) if path.name not in self.harmed]
        if len(found) < 2:
            return  # the last one is not touched: without any, a run rightly starts afresh
        files = [path for path in (found[0], *found[0].glob("*")) if path.is_file() and path.stat().st_size]
        victim = self.chance.choice(sorted(files))
        content = bytearray(victim.read_bytes())
        kind, at = self.chance.choice(["flipped bit", "cut file"]), self.chance.randrange(len(content))
        if kind == "flipped bit":
            content[at] ^= 1 << self.chance.randrange(8)
        else:
            del content[at:]
        self.faults[kind] += 1
        victim.write_bytes(content)
        self.harmed.add(found[0].name)
        self.seen = ckpt.step_of(found[1])

    def stop(self, processes: list) -> None:
        kinds = ["SIGKILL of one", "SIGKILL of one", "SIGKILL of all", "SIGTERM", "SIGINT", "SIGHUP"]
        kind, alive = self.chance.choice(kinds), [process for process in processes if process.is_alive()]
        self.faults[kind] += bool(alive)
        for process in alive if kind.endswith("all") else self.chance.sample(alive, k=min(1, len(alive))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, getattr(signal, kind.split()[0]))

    def wait(self, processes: list) -> list[int]:
        """The exit codes. As under torchrun, once one has failed the others get SIGTERM, then SIGKILL."""
        begin, told = time.monotonic(), 0.0
        while any(process.is_alive() for process in processes):
            time.sleep(0.02)
            if not told and any(process.exitcode for process in processes):
                told = time.monotonic()
                for process in processes:
                    process.terminate()
            if told and time.monotonic() > told + 30:
                for process in processes:
                    process.kill()
            elif time.monotonic() > begin + 300:
                self.lose("a run hangs")
                told = 1.0
        return [process.exitcode for process in processes]

    def lose(self, what: str, count: int = 0) -> None:
        self.lost.append(what)
        self.bytes_lost += count
        print("LOST:", what, flush=True)

    def check_training(self, log_dir: Path) -> None:
        latest = log_dir / "latest"
        if latest.exists() and not (log_dir / latest.read_text()).exists():
            self.lose(f"latest names {latest.read_text()}, which is not there")
        good = 0
        for path in ckpt.list_checkpoints(log_dir):
            try:
                state = ckpt.load_checkpoint(path)
            except ckpt.CheckpointError as error:
                if path.name not in self.harmed:
                    self.lose(f"a damaged checkpoint has its name: {error}", size_of(path))
                continue
            good = max(good, ckpt.step_of(path))
            self.checkpoints += 1
            truth = self.states[state["step"]]
            if wrong := [name for name in TIMELESS if not equal(state[name], truth[name])]:
                self.lose(f"{path}: {', '.join(wrong)} unlike the undisturbed run's", size_of(path))
        if good < self.seen:
            self.lose(f"the newest good checkpoint is of step {good}, but there was one of step {self.seen}")
        self.seen = good
        if good:
            logs = self.lines, (log_dir / "log.txt").read_bytes().splitlines(True)
            wanted, found = ([line for line in log if int(line.split()[0]) < good] for log in logs)
            if wanted != found:
                missing = set(wanted) - set(found)
                self.lose(f"log.txt before step {good}: {len(missing)} lines missing", sum(map(len, missing)))

    def train(self) -> None:
        """Start or resume the run, disturb it, check what it leaves; compare it if it has come to its end."""
        log_dir, output = self.folder / "log", self.plain / "torture.txt"
        output.write_text("")
        command = self.training(log_dir, "--resume", "auto", "--keep_last", 2, "--checkpoint_every", 4)
        ranks = start_ranks(2, command, output)
        self.run_for(ranks, self.chance.choice([0.3, 1, 2, 4, 8]) * self.chance.random())
        if cut := self.chance.random() < 0.15:
            self.faults["cut shard"] += 1
            os.truncate(self.shard, self.chance.randrange(len(self.tokens)))  # while the ranks read it
            self.run_for(ranks, 2)
        self.stop(ranks)
        codes = self.wait(ranks)
        self.check_training(log_dir)
        if cut:
            self.shard.write_bytes(self.tokens)
        if -signal.SIGBUS in codes:
            self.lose("a cut shard kills a rank by SIGBUS, and nothing is saved")
        if 2 in codes and not cut:
            self.lose(f"the run cannot go on: {output.read_text()[-2000:]}")
        elif codes != [0, 0]:
            if self.chance.random() < 0.15:
                self.harm_a_checkpoint(log_dir)
            return
        self.runs += 1
        lines = (log_dir / "log.txt").read_bytes().splitlines(True)
        if self.lines != lines or self.metrics != metrics(log_dir) or self.seen != STEPS:
            self.lose("a finished run differs from the undisturbed run")
        shutil.rmtree(log_dir)
        self.seen, self.harmed = 0, set()

    def tokenise(self) -> None:
        """Start or resume the job, disturb it, check what it leaves; compare it if it has come to its end."""
        out, output = self.folder / "tokens", self.plain / "torture.txt"
        output.write_text("")
        job = start(self.tokenising(out), output, script="fineweb")
        self.run_for([job], 10 * self.chance.random())
        self.stop([job])
        (code,) = self.wait([job])
        for path in out.glob("*.bin"):
            if path.read_bytes() != self.shards.get(path.name):
                self.lose(f"{path.name} differs from the undisturbed job's", path.stat().st_size)
        if code == 2:
            self.lose(f"the job cannot go on: {output.read_text()[-2000:]}")
        elif code != 0:
            return
        self.jobs += 1
        if {path.name for path in out.glob("*.bin")} != set(self.shards):
            self.lose("a finished job lacks shards", sum(map(len, self.shards.values())))
        shutil.rmtree(out)

    def report(self, minutes: float) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return f"""{minutes:.1f} minutes, {self.layout} on 2 ranks
faults injected  {sum(self.faults.values())} ({kinds})
finished         {self.runs} training runs of {STEPS} steps, {self.jobs} tokenising jobs
compared         {self.checkpoints} checkpoints, to the bit
lost             {len(self.lost)} runs, {self.bytes_lost} bytes"""


@contextlib.contextmanager
def small_disk(folder: str):
    """A folder for the runs, on a disk of its own that can be filled up."""
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as stack:
        if not folder:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", path], check=True)
            stack.callback(subprocess.run, ["umount", "-l", path], check=True)
        yield Path(folder or path)


def main() -> int:
    """Torture for so many minutes; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=LAYOUTS, default="ddp", help="how the two ranks train")
    parser.add_argument("--folder", default="", help="a small file system of yours, in place of a tmpfs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as plain, small_disk(options.folder) as folder:
        torture = Torture(folder, Path(plain), options.seed, options.layout)
        torture.prepare()
        begin = time.monotonic()
        while time.monotonic() < begin + 60 * options.minutes:
            torture.chance.choice([torture.train, torture.train, torture.tokenise])()
        print(torture.report((time.monotonic() - begin) / 60), flush=True)
    return 1 if torture.lost else 0


if __name__ == "__main__":
    sys.exit(main())
