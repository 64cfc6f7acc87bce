"""Train over all combinations of settings, some runs at a time.

    python -m analysis sweep --jobs 2 --seed 1,2,3 --max_lr 1e-2,2e-2 -- --preset demo --text my_text.txt

A flag before `--` takes values separated by commas. Flags behind `--` go to every run as they are. The name
of a run's folder tells what differs: log/sweep/max_lr=0.01-s1. docs/experiments.md has more."""

import argparse
import dataclasses
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from analysis.compare import NO_EFFECT, has_ended
from plot_log import read_run
from tokens.printable import one_line

SCRIPT = Path(__file__).parents[1] / "train_gpt_moe.py"
PYTHON = [sys.executable]  # what "python" stands for in a command


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options. It also takes every flag of train_gpt_moe.py, with a list of values."""
    parser.epilog = "Every flag of train_gpt_moe.py takes a comma list. Behind -- stand flags of all runs."
    parser.add_argument("--log_dir", default="log/sweep", help="the runs' folders are made in it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of all runs; start none")
    parser.add_argument("--array", type=int, metavar="N", help="print the command of run N, from 0")


@dataclass
class Job:
    """A run of the sweep."""

    folder: str
    command: list[str]  # as a user would type it
    config: object  # TrainConfig
    given: set[str]  # the settings that flags have set
    state: str = "started"  # or "finished", "continued": what an earlier sweep left
    process: subprocess.Popen | None = None
    begin: int = 0  # where the process's part of output.txt begins


# ---------------------------------------------------------------------------- PLAN
def read_swept(words: list[str], common: list[str]) -> dict[str, list[str]]:
    """{setting: its values} of --NAME VALUE,VALUE in their order. ValueError: no such flag, no value, a flag
    that is also among the common ones, or that the sweep sets."""
    from train_gpt_moe import TrainConfig
    from training.flags import unknown_flag

    names = {f"--{field.name}": field.name for field in dataclasses.fields(TrainConfig)}
    names |= {a: field.name for field in dataclasses.fields(TrainConfig) for a in field.metadata["aliases"]}
    words = [part for word in words for part in word.split("=", word.startswith("--"))]
    used = {names.get(word.split("=")[0]): word for word in common}
    if wrong := unknown_flag([*words, *common], {name[2:] for name in names}):
        raise ValueError(wrong)
    swept = {}
    for flag, values in itertools.zip_longest(words[::2], words[1::2], fillvalue="--"):
        if flag not in names or values.startswith("--"):
            raise ValueError(f"{flag}: before -- write --NAME VALUE,VALUE,...; other flags stand behind --")
        if names[flag] in (*swept, *used):
            raise ValueError(f"{flag} is given twice; give it once, before or behind --")
        swept[names[flag]] = [value.strip() for value in values.split(",")]
    if own := {"log_dir", "run_name", "resume"} & (swept.keys() | used.keys()):
        raise ValueError(f"--{min(own)}: the sweep sets it for each run; its own --log_dir stands before --")
    return swept


def plan(options: argparse.Namespace) -> list[Job]:
    """All runs in the order of the flags, the last one fastest. ValueError: a bad flag or value."""
    from train_gpt_moe import parse_config

    swept, jobs = read_swept(options.flags, options.common), {}
    many = [name for name, values in swept.items() if len(values) > 1 and name != "seed"]
    for values in itertools.product(*swept.values()):
        flags = [word for name, value in zip(swept, values, strict=True) for word in (f"--{name}", value)]
        config, given = parse_config([*options.common, *flags])
        label = ",".join(f"{name}={getattr(config, name)}" for name in many) + "-" * bool(many)
        folder = os.path.join(options.log_dir, re.sub(r"[^\w.,=+-]", "_", label) + f"s{config.seed}")
        if folder in jobs or len(os.path.basename(folder)) > 200:
            raise ValueError(f"{shlex.join(flags)}: {folder} is another run's folder, or too long a name")
        command = ["python", os.path.relpath(SCRIPT), *options.common, *flags]
        command += ["--log_dir", folder, "--resume", "auto"]
        jobs[folder] = Job(folder, command, config, given)
    return list(jobs.values())


def look_for_earlier(job: Job) -> None:
    """Set the job's state. ValueError if its folder has a run with other settings."""
    import torch

    from training.checkpoints import DERIVED, LAYOUT_SETTINGS, list_checkpoints, step_of
    from training.parallel import World
    from training.setup import check_config

    run, checkpoints = read_run(job.folder), list_checkpoints(job.folder)
    if not (has_ended(run) or checkpoints):
        return  # it saved nothing
    check_config(job.config, World(0, 0, 1, torch.device("cpu")), job.given, say=str)  # fills in min_lr, ...
    unlike = NO_EFFECT | {*LAYOUT_SETTINGS, "device", "vocab_size", "attention_backend"}
    unlike |= {"data_dir"} if job.config.text else set()  # in run.json the run's own copy
    names = job.given if job.config.init_from else vars(job.config).keys()  # init_from sets the architecture
    for name in sorted(names & run.config.keys() - unlike):
        now, before = getattr(job.config, name), run.config[name]
        if now != before and now not in DERIVED.get(name, ()):
            mend = f"give another --log_dir, or delete that run: rm -r {shlex.quote(job.folder)}"
            raise ValueError(f"{job.folder} has a run with {name}={before!r}, not {now!r}; {mend}")
    # The last checkpoint is written while the last evaluation runs. No checkpoint: somebody has deleted them.
    saved = not checkpoints or not run.rows or step_of(checkpoints[0]) >= run.rows[-1]["step"]
    job.state = "finished" if has_ended(run) and saved else "continued"


# ---------------------------------------------------------------------------- RUN
def start(job: Job, slot: int, jobs: int) -> None:
    """Start the job's process with its share of cores, and a GPU of its own. slot: from 0 to jobs - 1."""
    import torch

    own = dict(os.environ)
    if jobs > 1:
        own.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // jobs)))
    gpus = own.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if len(gpus := gpus.split(",")) > 1:
        own["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    os.makedirs(job.folder, exist_ok=True)
    with open(f"{job.folder}/output.txt", "ab") as output:
        job.begin = output.tell()
        # A session of its own: Ctrl-C must not reach the run twice, as the second one ends it unsaved.
        how = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=own, start_new_session=True)
        job.process = subprocess.Popen(PYTHON + job.command[1:], **how)


def describe(job: Job) -> str:
    """How the run ended: its result, or the last line of its output that names an error."""
    if job.process is None or job.process.returncode == 0:
        rows = read_run(job.folder).rows
        losses = [f"validation loss {row['val_loss']:.4f}, " for row in rows if row.get("val_loss")]
        steps = rows[-1]["step"] + ("loss" in rows[-1])  # a step's row has its number, from 0
        return f"{''.join(losses[-1:])}{steps} steps, {rows[-1].get('elapsed_s') or 0:.1f} s"
    path = Path(job.folder, "output.txt")
    lines = path.read_bytes()[job.begin :].decode(errors="replace").split("\n")
    lines = [line for line in lines if "error" in line.lower()] or [line for line in lines if line.strip()]
    return one_line(f"{lines[-1] if lines else f'exit code {job.process.returncode}'} ({path})")


def run_jobs(jobs: list[Job], options: argparse.Namespace) -> tuple[list[Job], int]:
    """Run the jobs, --jobs at a time, with a line for each start and end. A signal goes to the runs, which
    save and end. Returns the jobs that failed, and the signal or 0."""
    waiting, running, failed, signals, sent = list(jobs), {}, [], [], 0

    def say(job: Job, word: str, text: str = "") -> None:
        print(f"[{jobs.index(job) + 1:2}/{len(jobs)}] {word:9} {job.folder}{text}", flush=True)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    handlers = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
    while running or (waiting and not signals):
        free = [slot for slot in range(options.jobs) if slot not in running]
        if free and waiting and not signals:
            job = waiting.pop(0)
            say(job, job.state, f": {describe(job)}, before" if job.state == "finished" else "")
            if job.state != "finished":
                start(job, free[0], options.jobs)
                running[free[0]] = job
            continue
        for job in running.values() if len(signals) > sent else ():
            job.process.send_signal(signal.SIGTERM) if len(signals) == 1 else job.process.kill()
        sent = len(signals)
        for slot in [slot for slot, job in running.items() if job.process.poll() is not None]:
            job = running.pop(slot)
            if signals and job.process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM, -9):
                say(job, "stopped")
                continue
            failed += [job] if job.process.returncode else []
            say(job, "failed" if job.process.returncode else "finished", f": {describe(job)}")
        time.sleep(0.05)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return failed, signals[0] if signals else 0


def run(options: argparse.Namespace) -> int:
    """Run the sweep, or print its commands. Raises ValueError, OSError before the first start. Exit codes: 0
    all runs are finished, 1 some failed, 128 + n stopped by signal n."""
    from tokens.demo import prepare_demo

    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: must be at least 1")
    jobs, number = plan(options), options.array
    if number is not None and not 0 <= number < len(jobs):
        raise ValueError(f"--array {number}: the sweep has runs 0 to {len(jobs) - 1}")
    if options.dry_run or number is not None:
        printed = jobs if number is None else jobs[number : number + 1]
        print("\n".join(shlex.join(job.command) for job in printed))
        return 0
    for job in jobs:
        look_for_earlier(job)
    configs = [job.config for job in jobs if not job.config.text]
    if any((config.preset, config.data_dir) == ("demo", "demo_data") for config in configs):
        prepare_demo()  # once, and not by several runs at a time
    failed, number = run_jobs(jobs, options)
    for job in failed:
        print(f"failed: {job.folder}: {describe(job)}")
    if number or failed:
        again = shlex.join(["python", "-m", "analysis", *options.words])
        print(f"{'continue with' if number else 'when that is mended, run the rest with'}: {again}")
    if not number and len(failed) < len(jobs):
        print(f"compare with: {shlex.join(['python', '-m', 'analysis', 'compare', options.log_dir])}")
    return 128 + number if number else int(bool(failed))
