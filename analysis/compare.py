"""Settings compared over seeds: `python -m analysis compare`. docs/experiments.md explains every column.

Runs whose settings are equal, except the seed and NO_EFFECT, share a row. Intervals are Student's ("The
probable error of a mean", 1908), or Welch's (1947) for two settings without common seeds."""

import argparse
import csv
import functools
import io
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import plot_log
from plot_log import LoggedRun, is_finite
from tokens.files import write_atomically
from tokens.printable import one_line, printable

# Settings that change neither what is learnt nor what is measured.
NO_EFFECT = plot_log.NOT_COMPARED | set(
    """preset checkpoint_every keep_last keep_every keep_best save_retry_s log_every plot plot_every
    tensorboard wandb wandb_project log_norms profile sample_every sample_tokens prompt""".split()
)
# The two tables: {header: cell}, formatted with the row that `summarise` makes.
REACHED = {
    "seeds": "{seeds}", "final loss": "{final_mean:.4f} ± {final_sd:.4f}", "best": "{best_mean:.4f}",
    "bits/byte": "{bpb_mean:.4f}", "tokens/s": "{tok_per_s_mean:,.0f}", "seconds": "{seconds_mean:,.1f}",
    "max load": "{max_load_mean:.2f}", "entropy": "{router_entropy_mean:.3f}",
}  # fmt: skip
AGAINST = {
    "difference, 95%": "{difference:+.4f} ± {half:.4f}", "verdict": "{verdict}",
    "at {common_tokens:,.0f} tokens": "{at_tokens_mean:.4f}",
    "at {common_seconds:.4g} s": "{at_seconds_mean:.4f}", "eff. tokens": "{effective_tokens}",
    "eff. seconds": "{effective_seconds}",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", help="runs, folders of runs, patterns")
    parser.add_argument("--baseline", default="", metavar="NAME=VALUE,...", help="empty = the first row")
    parser.add_argument("--csv", default="", metavar="FILE", help="write all numbers, unrounded")
    parser.add_argument("--markdown", default="", metavar="FILE", help="write what is printed")
    parser.add_argument(
        "--picture", default="", metavar="FILE", help=".png, .svg or .pdf of validation losses"
    )


@dataclass
class Setting:
    """Finished runs that differ in the seed alone."""

    values: dict  # the settings that tell it from the others
    runs: dict[int, dict] = field(default_factory=dict)  # by seed: what `measure` found

    def of(self, name: str) -> np.ndarray:
        """A number of each run, (seeds,)."""
        return np.array([run[name] for run in self.runs.values()], dtype=float)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (points,) at which all seeds were evaluated, seconds and losses there (seeds, points)."""
        runs = list(self.runs.values())
        grid = functools.reduce(np.intersect1d, [run["tokens"] for run in runs])
        points = [np.isin(run["tokens"], grid) for run in runs]
        seconds, losses = (np.array([run[name][at] for run, at in zip(runs, points, strict=True)])
                           for name in ("times", "losses"))  # fmt: skip
        return grid, seconds, losses


# ---------------------------------------------------------------------------- RUNS
def has_ended(run: LoggedRun) -> bool:
    """Whether the log has the evaluation after the last step (--patience may have chosen that step), or, of a
    run without validation, the last step."""
    steps, patience = run.config.get("max_steps"), run.config.get("patience", 0)
    losses = {row["step"]: row["val_loss"] for row in run.rows if is_finite(row.get("val_loss"))}
    if not any("val_loss" in row for row in run.rows):
        return bool(run.rows) and run.rows[-1]["step"] + 1 == steps
    since = sum(step > min(losses, key=losses.get) for step in losses) if losses else 0
    return run.rows[-1]["step"] == steps or 0 < patience <= since


def why_left_out(run: LoggedRun, folder: str) -> str:
    """Why the run cannot be compared, with the command that mends it; "" if it can."""
    if not run.rows:
        return "empty: its log has no step"
    if not is_finite(run.config.get("total_batch_size")):
        return "its settings are unknown: run.json is missing or damaged"
    last = run.rows[-1]
    if not has_ended(run):
        what = "diverged" if "loss" in last and not is_finite(last["loss"]) else "unfinished"
        command = shlex.join(["python", "train_gpt_moe.py", "--log_dir", folder, "--resume", "auto"])
        return f"{what} at step {last['step']} of {run.config.get('max_steps')}; continue with: {command}"
    if not (is_finite(last.get("val_loss")) and is_finite(last.get("elapsed_s"))):
        return "diverged, or without validation: no finite val_loss after its last step in metrics.jsonl"
    return ""


def measure(run: LoggedRun) -> dict:
    """A finished run's results, and its evaluations as arrays: tokens, times (seconds), losses."""
    known = np.isfinite(run.column("val_loss") + run.column("elapsed_s"))
    found = {"tokens": run.column("step")[known] * run.config["total_batch_size"]}
    found |= {"times": run.column("elapsed_s")[known], "losses": run.column("val_loss")[known]}
    found |= {"final": found["losses"][-1], "best": found["losses"].min(), "seconds": found["times"][-1]}
    found |= {"bpb": run.column("val_bpb")[-1], "tok_per_s": np.nanmedian(run.column("tok_per_s"))}
    for name in ("max_load", "router_entropy"):  # they change from step to step: the last tenth's mean
        values = run.column(name)
        values = values[np.isfinite(values)]
        found[name] = values[-max(1, len(values) // 10) :].mean() if len(values) else math.nan
    return found


def group_runs(folders: list[str]) -> tuple[list[Setting], list[str]]:
    """The settings, in the order of their first run, and a line for each run that is left out."""
    groups, left_out = {}, []
    for folder in folders:
        run = plot_log.read_run(folder)
        skipped = NO_EFFECT | {"seed"} | ({"data_dir"} if run.config.get("text") else set())
        values, seed = {k: v for k, v in run.config.items() if k not in skipped}, run.config.get("seed")
        why, group = why_left_out(run, folder), groups.get(repr(values), Setting(values))
        if not why and seed in group.runs:
            why = f"a run that is counted has the same settings and the same seed, {seed}"
        if why:
            left_out.append(f"left out: {folder}: {why}")
            continue
        groups[repr(values)], group.runs[seed] = group, measure(run)
    settings = list(groups.values())
    names = dict.fromkeys(name for setting in settings for name in setting.values)
    differ = [name for name in names if len({repr(setting.values.get(name)) for setting in settings}) > 1]
    if all(s.values.get("min_lr") == float(f"{s.values.get('max_lr', 0) / 10:.12g}") for s in settings):
        differ = [name for name in differ if name != "min_lr"]  # its default, which follows max_lr
    for setting in settings:
        setting.values = {name: setting.values.get(name) for name in differ}
    return settings, left_out


def find_baseline(settings: list[Setting], text: str) -> Setting:
    """The setting with all values of NAME=VALUE,...; the first for "". ValueError unless it is one."""
    named = {",".join(f"{name}={value}" for name, value in s.values.items()): s for s in settings}
    found = [s for words, s in named.items() if set(text.split(",")) <= set(words.split(","))]
    if text and len(found) != 1:
        raise ValueError(f"--baseline {text}: {len(found)} settings fit, not 1; all are: {'; '.join(named)}")
    return found[0] if text else settings[0]


# ---------------------------------------------------------------------------- STATISTICS
def t_quantile(freedom: float, inside: float = 0.95) -> float:
    """The t with P(|T| < t) = inside for Student's T. With t = sqrt(freedom) * tan(angle) the density is
    proportional to cos(angle)**(freedom - 1), from angle 0 to a right angle."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.cumsum(density) - density / 2 - density[0] / 2  # the trapezoidal rule
    return math.sqrt(freedom) * math.tan(np.interp(inside * below[-1], below, angle))


def spread(values: np.ndarray) -> float:
    """The standard deviation of a sample, with n - 1; NaN for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def difference(setting: Setting, baseline: Setting) -> tuple[float, float, int]:
    """Final loss minus the baseline's; half of its 95% interval (NaN: unknown); the number of seeds it is
    paired over, or 0 if less than two are common."""
    common = [seed for seed in setting.runs if seed in baseline.runs]
    pairs = np.array([setting.runs[seed]["final"] - baseline.runs[seed]["final"] for seed in common])
    if (n := len(pairs)) > 1:
        return float(pairs.mean()), t_quantile(n - 1) * spread(pairs) / math.sqrt(n), n
    a, b = setting.of("final"), baseline.of("final")
    variances = np.array([spread(a) ** 2 / len(a), spread(b) ** 2 / len(b)])  # of the two means
    half = math.sqrt(variances.sum())
    if half > 0:
        half *= t_quantile(variances.sum() ** 2 / (variances**2 / [len(a) - 1, len(b) - 1]).sum())
    return float(a.mean() - b.mean()), half, 0


def effective(x: np.ndarray, losses: np.ndarray, target: float) -> str:
    """The factor of x[-1] at which the curve first reaches the target; "> 1.00" and "< ...": beyond its ends.
    The curve is the lowest loss so far, interpolated over log(x)."""
    lowest, x = np.minimum.accumulate(losses)[x > 0], x[x > 0]
    if target < lowest[-1]:
        return "> 1.00"
    first = np.diff(lowest, prepend=np.inf) < 0  # where each loss was reached first
    at = np.interp(target, lowest[first][::-1], np.log(x[first] / x[-1])[::-1])
    return f"{'< ' if target > lowest[0] else ''}{math.exp(at):.2f}"


def summarise(settings: list[Setting], baseline: Setting) -> list[dict]:
    """A row for each setting: its numbers and words by the names of the CSV's columns."""
    runs = [run for setting in settings for run in setting.runs.values()]
    common = {"common_tokens": min(run["tokens"][-1] for run in runs)}
    common |= {"common_seconds": min(run["seconds"] for run in runs)}
    for run in runs:
        run["at_tokens"] = np.interp(common["common_tokens"], run["tokens"], run["losses"])
        run["at_seconds"] = np.interp(common["common_seconds"], run["times"], run["losses"])
    tokens, seconds, losses = baseline.curve()
    rows = []
    for setting in settings:
        row = {**setting.values, "seeds": len(setting.runs)}
        for name in [name for name in runs[0] if np.ndim(runs[0][name]) == 0]:
            row |= {f"{name}_mean": setting.of(name).mean(), f"{name}_sd": spread(setting.of(name))}
        mean, half, pairs = difference(setting, baseline)
        word = "better" if mean + half < 0 else "worse" if mean - half > 0 else "cannot tell"
        word = "baseline" if setting is baseline else word + "*" * (pairs == 0)
        row |= dict(difference=mean, half=half, pairs=pairs, verdict=word, **common)
        row["effective_tokens"] = effective(tokens, losses.mean(0), row["final_mean"])
        row["effective_seconds"] = effective(seconds.mean(0), losses.mean(0), row["final_mean"])
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------- OUTPUT
def make_table(rows: list[dict], names: list[str], columns: dict[str, str]) -> list[list[str]]:
    """The header and the rows as texts: values of the settings `names`, and REACHED or AGAINST."""
    table = [[*names, *(header.format(**rows[0]) for header in columns)]]
    for row in rows:
        cells = [text.format(**row).replace(" ± nan", "") for text in columns.values()]
        table.append([*(printable(row[name]) for name in names), *("-" if "nan" in c else c for c in cells)])
    return table


def draw(settings: list[Setting], out: str) -> None:
    """Draw mean and standard deviation of each setting's validation loss, over tokens and over seconds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plot_log.STYLE):
        fig = Figure(figsize=(12, 4.5 + 0.2 * len(settings)), layout="constrained", dpi=110)
        axes, shown = fig.subplots(1, 2, sharey=True), []
        for i, setting in enumerate(settings):
            tokens, seconds, losses = setting.curve()
            mean, sd = losses.mean(0), losses.std(0, ddof=len(losses) > 1)
            shown += [
                *(mean - sd)[1:],
                *(mean + sd)[1:],
            ]  # the loss before the first step would flatten the rest
            label = "  ·  ".join(printable(f"{name} {value}") for name, value in setting.values.items())
            line = {"color": plot_log.COLOURS[i % 7], "linestyle": plot_log.DASHES[i % 4]}
            for ax, x in zip(axes, (tokens, seconds.mean(0)), strict=True):
                ax.plot(x, mean, **line, label=f"{label or 'all runs'} ({len(losses)} seeds)")
                ax.fill_between(x, mean - sd, mean + sd, color=line["color"], alpha=0.2, linewidth=0)
                ax.xaxis.set_major_formatter(plot_log.short)
        axes[0].set(title="Validation loss: mean ± standard deviation", xlabel="training tokens")
        axes[0].set(ylabel="nats per token", ylim=(min(shown), max(shown)) if shown else None)
        axes[1].set(xlabel="seconds of training")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", handlelength=4)
        plot_log.save_picture(fig, Path(out))


def run(options: argparse.Namespace) -> int:
    """Print the tables and write the files. Raises ValueError, OSError."""
    if options.picture and Path(options.picture).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--picture {options.picture}: its name must end in .png, .svg or .pdf")
    folders, others = plot_log.find_runs(options.runs)
    settings, left_out = group_runs(folders)
    started = {str(file.parent) for name in options.runs for file in Path(name).glob("*/output.txt")}
    others += [f"{folder}: no log; see {folder}/output.txt" for folder in sorted(started - set(folders))]
    lines = [one_line(line) for line in left_out + [f"left out: {problem}" for problem in others]]
    if not settings:
        raise ValueError("; ".join(["no run can be compared", *lines]))
    baseline = find_baseline(settings, options.baseline)
    rows, names = summarise(settings, baseline), list(settings[0].values)
    tables = [make_table(rows, names, REACHED)]
    if len(rows) > 1:
        tables.append(make_table(rows, names, AGAINST))
        sd, n = spread(baseline.of("final")), len(baseline.runs)
        noise = (
            f"{sd:.4f}: the standard deviation of its final loss over {n} seeds"
            if n > 1
            else "unknown: one seed"
        )
        lines.insert(0, f"the noise of this baseline is {noise}")
        if any("*" in row["verdict"] for row in rows):
            lines.insert(1, "* not paired: less than two seeds in common with the baseline")
    blocks, markdown = [], []
    for table in tables:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        blocks += [("  ".join(map(str.ljust, row, widths))).rstrip() for row in table] + [""]
        markdown += [f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(widths), *table[1:])] + [""]
    print("\n".join(blocks + lines).rstrip())
    writer = csv.DictWriter(content := io.StringIO(), rows[0])
    writer.writeheader()
    writer.writerows(rows)
    files = {options.csv: content.getvalue(), options.markdown: "\n".join([*markdown, *lines, ""])}
    for path in filter(None, files):
        write_atomically(path, lambda file, path=path: file.write(files[path].encode()))
    if options.picture:
        draw(settings, options.picture)
    return 0
