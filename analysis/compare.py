"""Compare settings over seeds: means, differences, intervals. docs/experiments.md explains every column.

Runs whose settings are equal, except the seed and NO_EFFECT, share a row. Intervals are Student's ("The
probable error of a mean", 1908). Tables pass from function to function: `settings`, a row each with the
values that differ; `runs`, by setting and seed; in its column "curve" a run's evaluations, by tokens."""

import argparse
import dataclasses
import math
import shlex
from pathlib import Path

import numpy as np
import pandas as pd  # datasets needs it, too

import plot_log
from plot_log import LoggedRun, is_finite
from tokens.files import write_atomically
from tokens.printable import one_line, printable

# Settings that change neither what is learnt nor what is measured.
NO_EFFECT = plot_log.NOT_COMPARED | set(
    """preset checkpoint_every keep_last keep_every keep_best save_retry_s log_every plot plot_every
    tensorboard wandb wandb_project log_norms profile sample_every sample_tokens prompt""".split()
)
# The two tables that are printed: {header: cell}, formatted with a row of `summarise`.
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
    parser.add_argument("--picture", default="", metavar="FILE", help="draw the losses: .png, .svg or .pdf")


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
    if not run.rows or not is_finite(run.config.get("total_batch_size")):
        return "run.json is missing or damaged" if run.rows else "empty: its log has no step"
    last = run.rows[-1]
    if not has_ended(run):
        what = "diverged" if "loss" in last and not is_finite(last["loss"]) else "unfinished"
        command = shlex.join(["python", "train_gpt_moe.py", "--log_dir", folder, "--resume", "auto"])
        return f"{what} at step {last['step']} of {run.config.get('max_steps')}; continue with: {command}"
    if not (is_finite(last.get("val_loss")) and is_finite(last.get("elapsed_s"))):
        return "diverged, or without validation: no finite val_loss after its last step in metrics.jsonl"
    return ""


def measure(run: LoggedRun) -> dict:
    """A finished run's results, and its "curve": loss and seconds of its evaluations, by tokens."""
    names = "step val_loss elapsed_s val_bpb tok_per_s max_load router_entropy".split()
    log = pd.DataFrame({name: run.column(name) for name in names})
    log = log.rename(columns={"val_loss": "loss", "elapsed_s": "seconds"})
    curve = log[["loss", "seconds"]].set_axis(log["step"] * run.config["total_batch_size"]).dropna()
    found = {"curve": curve, "final": curve["loss"].iloc[-1], "best": curve["loss"].min()}
    found |= {"bpb": log["val_bpb"].iloc[-1], "tok_per_s": log["tok_per_s"].median()}
    found["seconds"] = curve["seconds"].iloc[-1]
    for name in ("max_load", "router_entropy"):  # they change from step to step: the last tenth's mean
        values = log[name].dropna()
        found[name] = values.tail(max(1, len(values) // 10)).mean()
    return found


def group_runs(folders: list[str]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """settings and runs (top of this file), and a line for each run that is left out."""
    from train_gpt_moe import TrainConfig

    groups, runs, left_out = {}, {}, []
    # A run of an older version lacks the newer settings.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for folder in folders:
        run = plot_log.read_run(folder)
        skipped = NO_EFFECT | {"seed"} | ({"data_dir"} if run.config.get("text") else set())
        values = {name: value for name, value in (defaults | run.config).items() if name not in skipped}
        values |= {} if values.get("moe_loss", True) else {"moe_loss_type": "-"}  # it has no effect
        key = repr(values), run.config.get("seed")
        why = why_left_out(run, folder)
        if not why and key in runs:
            why = f"a run that is counted has the same settings and the same seed, {key[1]}"
        if why:
            left_out.append(f"left out: {folder}: {why}")
        else:
            groups[key[0]], runs[key] = values, measure(run)
    if not runs:
        raise ValueError("; ".join(["no run can be compared", *left_out]))
    settings = pd.DataFrame(list(groups.values()), index=list(groups), dtype=object)
    rates = [settings[name].astype(float) for name in ("max_lr", "min_lr") if name in settings]
    if len(rates) == 2 and np.allclose(rates[0], 10 * rates[1]):
        settings = settings.drop(columns="min_lr")  # its default, which follows max_lr
    differ = [name for name in settings if settings[name].map(repr).nunique() > 1]
    return settings[differ], pd.DataFrame(list(runs.values()), pd.MultiIndex.from_tuples(runs)), left_out


def find_baseline(settings: pd.DataFrame, text: str) -> str:
    """The setting with all values of NAME=VALUE,...; the first for "". ValueError unless it is one."""
    words = settings.apply(lambda row: ",".join(f"{name}={value}" for name, value in row.items()), axis=1)
    found = [key for key, named in words.items() if set(text.split(",")) <= set(named.split(","))]
    if text and len(found) != 1:
        raise ValueError(f"--baseline {text}: {len(found)} settings fit, not 1; all are: {'; '.join(words)}")
    return found[0] if text else settings.index[0]


# ---------------------------------------------------------------------------- STATISTICS
def t_quantile(freedom: float) -> float:
    """The t with P(|T| < t) = 0.95 for Student's T. With t = sqrt(freedom) * tan(angle) the density is
    proportional to cos(angle)**(freedom - 1), from angle 0 to a right angle."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.cumsum(density) - density / 2 - density[0] / 2  # the trapezoidal rule
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * below[-1], below, angle))


def difference(final: pd.Series, baseline: pd.Series) -> tuple[float, float]:
    """The mean over the common seeds of a final loss minus the baseline's, both by seed, and half of its 95%
    interval, NaN with less than two common seeds."""
    pairs = (final - baseline).dropna()
    if (n := len(pairs)) < 2:
        return final.mean() - baseline.mean(), math.nan
    return pairs.mean(), t_quantile(n - 1) * pairs.std() / math.sqrt(n)


def effective(x: np.ndarray, losses: np.ndarray, target: float) -> str:
    """The factor of x[-1] at which the curve first reaches the target; "> 1.00" and "< ...": beyond its ends.
    The curve is the lowest loss so far, interpolated over log(x)."""
    if x[-1] <= 0:
        return "-"  # a run of 0 steps
    lowest, x = np.minimum.accumulate(losses)[x > 0], x[x > 0]
    if target < lowest[-1] and not math.isclose(target, lowest[-1]):
        return "> 1.00"
    first = np.diff(lowest, prepend=np.inf) < 0  # where each loss was reached first
    at = np.interp(target, lowest[first][::-1], np.log(x[first] / x[-1])[::-1])
    return f"{'< ' if target > lowest[0] else ''}{math.exp(at):.2f}"


def mean_curve(curves: pd.Series) -> pd.DataFrame:
    """Means over the seeds, and the standard deviation "sd" of the loss, at the tokens that all have."""
    points = pd.concat(list(curves)).groupby(level=0)
    return points.mean().assign(sd=points["loss"].std().fillna(0))[points.size() == len(curves)]


def summarise(settings: pd.DataFrame, runs: pd.DataFrame, baseline: str) -> list[dict]:
    """A row for each setting: its numbers and words by the names of the CSV's columns."""
    tokens, seconds = min(curve.index[-1] for curve in runs["curve"]), runs["seconds"].min()
    runs = runs.assign(
        at_tokens=[np.interp(tokens, curve.index, curve["loss"]) for curve in runs["curve"]],
        at_seconds=[np.interp(seconds, curve["seconds"], curve["loss"]) for curve in runs["curve"]],
    )
    base, rows = mean_curve(runs.loc[baseline, "curve"]), []
    for key, values in settings.iterrows():
        some = runs.loc[key]
        row = {**values, "seeds": len(some), **some.mean(numeric_only=True).add_suffix("_mean")}
        row |= dict(some.std(numeric_only=True).add_suffix("_sd"))
        mean, half = difference(some["final"], runs.loc[baseline, "final"])
        word = "better" if mean + half < 0 else "worse" if mean - half > 0 else "cannot tell"
        word = "baseline" if key == baseline else word + "*" * math.isnan(half)
        row |= dict(difference=mean, half=half, verdict=word)
        row |= dict(common_tokens=tokens, common_seconds=seconds)
        for name, x in (("tokens", base.index), ("seconds", base["seconds"])):
            row[f"effective_{name}"] = effective(x.to_numpy(), base["loss"].to_numpy(), row["final_mean"])
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


def draw(settings: pd.DataFrame, runs: pd.DataFrame, out: str) -> None:
    """Draw mean and standard deviation of each setting's validation loss, over tokens and over seconds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plot_log.STYLE):
        fig = Figure(figsize=(12, 4.5 + 0.2 * len(settings)), layout="constrained", dpi=110)
        axes, shown = fig.subplots(1, 2, sharey=True), []
        for i, (key, values) in enumerate(settings.iterrows()):
            curve = mean_curve(runs.loc[key, "curve"])
            low, high = curve["loss"] - curve["sd"], curve["loss"] + curve["sd"]
            shown += [*low[1:], *high[1:]]  # the loss before the first step would flatten the rest
            label = "  ·  ".join(printable(f"{name} {value}") for name, value in values.items())
            label = f"{label or 'all runs'} ({len(runs.loc[key])} seeds)"
            line = {"color": plot_log.COLOURS[i % 7], "linestyle": plot_log.DASHES[i % 4], "label": label}
            for ax, x in zip(axes, (curve.index, curve["seconds"]), strict=True):
                ax.plot(x, curve["loss"], **line)
                ax.fill_between(x, low, high, color=line["color"], alpha=0.2, linewidth=0)
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
    settings, runs, left_out = group_runs(folders)
    started = {file.parent for name in options.runs for file in Path(name).glob("*/output.txt")}
    others += [f"{path}: no log; see {path}/output.txt" for path in sorted(started - set(map(Path, folders)))]
    lines = [one_line(line) for line in left_out + [f"left out: {problem}" for problem in others]]
    baseline = find_baseline(settings, options.baseline)
    rows = summarise(settings, runs, baseline)
    if len(rows) > 1:
        final = runs.loc[baseline, "final"]
        noise = f"{final.std():.4f}: the standard deviation of its final loss over {len(final)} seeds"
        stars = ["* no interval: less than two seeds in common with the baseline"]
        lines = stars * any("*" in row["verdict"] for row in rows) + lines
        lines.insert(0, f"the noise of this baseline is {noise if len(final) > 1 else 'unknown: one seed'}")
    blocks, markdown = [], []
    for columns in (REACHED, AGAINST)[: len(rows)]:
        table = make_table(rows, list(settings), columns)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        blocks += [("  ".join(map(str.ljust, row, widths))).rstrip() for row in table] + [""]
        markdown += [f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(widths), *table[1:])] + [""]
    print("\n".join(blocks + lines).rstrip())
    files = {options.csv: pd.DataFrame(rows).to_csv(index=False)}
    files[options.markdown] = "\n".join([*markdown, *lines, ""])
    for path in filter(None, files):
        write_atomically(path, lambda file, path=path: file.write(files[path].encode()))
    if options.picture:
        draw(settings, runs, options.picture)
    return 0
