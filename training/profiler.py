"""--profile A:B: which operators take the time of the steps A to B - 1. Reference: torch.profiler."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tokens.printable import printable

DEAREST = 10  # operators in the table


def parse(text: str, max_steps: int) -> range:
    """The steps that "A:B" names, none for "". ValueError for another text, or steps that the run lacks."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if text and not (steps and steps.stop <= max_steps):
        problem = f"must be A:B with 0 <= A < B <= max_steps={max_steps}"
        raise ValueError(f"profile={text!r} {problem}, such as 10:13 for the steps 10, 11 and 12")
    return steps


class Profiler:
    """Records the steps that config.profile names on the master, and writes log_dir/profile_A_B.json."""

    def __init__(self, run: Any):
        config, world = run.config, run.layout.world
        self.steps = parse(config.profile, config.max_steps) if world.is_master else range(0)
        self.folder, self.say, self.device = Path(config.log_dir), run.say, world.device
        self.profile: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Around a training step: begins with the first of the steps, and writes the files after the last."""
        if step in self.steps and self.profile is None:
            kinds = {torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA}
            self.profile = torch.profiler.profile(activities=kinds & torch.profiler.supported_activities())
            self.profile.start()
            self.steps = range(step, self.steps.stop)  # a resumed run may begin among them
        yield
        self.end = step + 1
        if self.end not in self.steps:
            self.write()

    def write(self) -> None:
        """Write what was recorded, if anything: also for a run that ends before the last of its steps."""
        if self.profile is None:
            return
        self.profile.stop()
        path = self.folder / f"profile_{self.steps.start}_{self.end}.json"
        by = f"self_{'device' if self.device.type == 'cuda' else 'cpu'}_time_total"
        table = self.profile.key_averages().table(sort_by=by, row_limit=DEAREST, max_name_column_width=40)
        try:
            self.profile.export_chrome_trace(str(path))
            self.say(f"{table}\nprofile         {printable(str(path))} (open it at https://ui.perfetto.dev)")
        except (OSError, RuntimeError) as error:  # a full disk: training goes on
            self.say(f"WARNING: no profile: {error}")
        self.profile, self.steps = None, range(0)
