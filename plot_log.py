"""Draw a run's log: losses, HellaSwag, learning rate, gradient norm, speed and the load of every expert.

    python plot_log.py log/                          # writes log/training.png
    python plot_log.py log/ --x tokens --format svg  # also --x time; svg and pdf are for print
    python plot_log.py log/sweep log/moe "log/lr_*"  # several runs, here of a folder, one, and of a pattern

It reads run.json, and metrics.jsonl, or log.txt if that is missing or empty (docs/formats.md). It draws no
panel without data, and skips unreadable lines with a warning, so that it can draw a running or broken run.
training/metrics.py says which number is in which panel. Colours: https://jfly.uni-koeln.de/color/"""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import contextlib
import glob
import io
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from layers.usage import STARVED_BELOW
from tokens.files import write_atomically
from tokens.printable import one_line, print_error, printable
from training.metrics import METRICS, Metric

# Loss of GPT-2 124M on FineWeb-Edu 10B's validation shard; acc_norm of GPT-2 124M and of GPT-3 Small (arXiv
# 2005.14165, appendix H). Source: https://github.com/karpathy/build-nanogpt/blob/master/play.ipynb
GPT2 = {"loss": {"GPT-2 124M on FineWeb-Edu, 3.29": 3.2924},
        "hella_acc_norm": {"GPT-2 124M, 29.4%": 0.294463, "GPT-3 124M, 33.7%": 0.337}}  # fmt: skip
RESULTS = {"val_loss": "validation loss {:.3f}", "val_bpb": "{:.3f} bits per byte",
           "hella_acc_norm": "HellaSwag {:.1%}"}  # fmt: skip
NOT_COMPARED = {"log_dir", "run_name", "config", "resume"}  # settings that do not change the training
LOG_WORDS = {metric.log_word: metric.name for metric in METRICS if metric.log_word}  # of log.txt
EVALUATED = {metric.name for metric in METRICS if metric.evaluated}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")
GREY = "#595959"
HEAT = ("#00263D", "#4F9CC4", "#FAFAF5", "#F0B64A", "#C65A00")  # load 0 (darkest in print too), 0.5 ... 2
STYLE = {"axes.grid": True, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E3E3E3", "axes.titlesize": 11,
         "legend.frameon": False, "text.parse_math": False}  # fmt: skip


@dataclass
class LoggedRun:
    """A run as read from its log, and the style of its curves."""

    name: str
    config: dict = field(default_factory=dict)  # all settings; empty if unknown
    rows: list[dict] = field(default_factory=list)  # one record per step, sorted
    problems: list[str] = field(default_factory=list)
    x: np.ndarray | None = None  # (rows,) place on the horizontal axis, NaN where unknown
    line: dict = field(default_factory=dict)  # colour and line style
    mark: dict = field(default_factory=dict)  # marker

    def column(self, key: str) -> np.ndarray:
        """The values of `key`, (rows,) float64; NaN where a row has no finite number there."""
        return np.array([row[key] if is_finite(row.get(key)) else np.nan for row in self.rows], dtype=float)

    def points(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the rows where both are known, (points,) each."""
        y = self.column(key)
        known = np.isfinite(y) & np.isfinite(self.x)
        return self.x[known], y[known]

    def experts(self) -> tuple[int, int] | None:
        """Experts per layer and per token; None if unknown, and for a dense model."""
        E, K = self.config.get("num_experts"), self.config.get("num_experts_per_tok", 1)
        return (E, K) if self.config.get("use_moe") and is_finite(E) and is_finite(K) and E >= K > 0 else None

    def loads(self) -> tuple[np.ndarray, np.ndarray]:
        """x (records,) and loads in fair shares (records, MoE layers, E), of records shaped like the last."""
        known = [i for i, row in enumerate(self.rows) if "load" in row and np.isfinite(self.x[i])]
        known = [i for i in known if self.rows[i]["load"].shape == self.rows[known[-1]]["load"].shape]
        return self.x[known], np.array([self.rows[i]["load"] for i in known])


def is_finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn: no NaN, no infinity, no bool."""
    return type(value) in (int, float) and abs(value) < 1e300


def parse_line(line: str) -> dict:
    """A line of a log as a step's record; its `load` is expert_load in fair shares."""
    if line[0] != "{":
        step, word, value = line.split()
        return {"step": int(step), LOG_WORDS[word]: float(value)}
    record = json.loads(line)
    record.pop("load", None)  # the name of what is computed below
    if record.get("expert_load"):
        load = np.array(record["expert_load"], dtype=float)  # (MoE layers, E)
        if load.ndim != 2 or not np.isfinite(load).all():
            raise ValueError("expert_load is no table of layers x experts")
        record["load"] = load * load.shape[1]
    return record | {"step": int(record["step"])}


def logs(folder: str) -> list[str]:
    """The logs in a folder; the second is read if the first holds no step."""
    return [path for path in (f"{folder}/metrics.jsonl", f"{folder}/log.txt") if os.path.isfile(path)]


def find_runs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The folders with a log that the arguments name: runs, folders of runs, patterns. Also warnings about
    other folders: a shell replaces log/* by all that is there. FileNotFoundError: no such path, or no run."""
    runs, others = [], {}
    for argument in arguments:
        for path in [argument] if os.path.exists(argument) else sorted(glob.glob(argument)) or [argument]:
            found = [path] if logs(path) else sorted(filter(logs, glob.glob(f"{glob.escape(path)}/*")))
            runs += map(os.path.normpath, found)
            others |= {} if found else {path: f"{path}: no metrics.jsonl and no log.txt in this folder"}
    for path, problem in others.items():
        if not runs or not os.path.exists(path):
            make = f"a run makes them: python train_gpt_moe.py --preset demo --log_dir {shlex.quote(path)}"
            name = "it is a file; name the run's folder"
            raise FileNotFoundError(f"{problem}; {name if os.path.isfile(path) else make}")
    return list(dict.fromkeys(runs)), [others[path] for path in others if os.path.isdir(path)]


def read_run(folder: str) -> LoggedRun:
    """Read the log in `folder`; `problems` says what is wrong in it."""
    run = LoggedRun(printable(os.path.basename(os.path.realpath(folder))))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # missing, damaged
        run.config = dict(json.loads(Path(folder, "run.json").read_bytes())["config"])
    for path in map(Path, logs(folder)):
        rows, bad = {}, []
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = parse_line(line)
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    bad += [number] if line.strip() else []
                    continue
                row = rows.setdefault(record["step"], {})
                row |= record
                if (after := record.get("eval_step")) == record["step"] + 1:  # after the last step
                    measured = {name: row.pop(name) for name in record if name.split("/")[0] in EVALUATED}
                    rows[after] = measured | {"step": after, "elapsed_s": row.get("elapsed_s")}
        if bad:
            run.problems.append(f"{path.name}: {len(bad)} unreadable line(s) skipped, first line {bad[0]}")
        if rows:
            run.rows = [rows[step] for step in sorted(rows)]
            break
        run.problems.append(f"{path.name} holds no step")
    if lost := sum("loss" in row and not is_finite(row["loss"]) for row in run.rows):
        run.problems.append(f"{lost} of {len(run.rows)} steps have no finite loss")
    return run


def set_x(runs: list[LoggedRun], axis: str) -> str:
    """Set every run's `x` (axis: step, tokens or time); return the label of the axis."""
    column, lacking = ("elapsed_s", "elapsed_s") if axis == "time" else ("step", "total_batch_size")
    hours = any(seconds > 9000 for run in runs for seconds in run.column("elapsed_s"))
    for run in runs:
        tokens = size if is_finite(size := run.config.get("total_batch_size")) else np.nan
        run.x = run.column(column) * {"step": 1, "tokens": tokens, "time": 1 / (3600 if hours else 60)}[axis]
        if len(run.x) and np.isnan(run.x).all():
            run.problems.append(f"cannot be drawn over {axis}, as its log has no {lacking}; try --x step")
    time = f"{'hours' if hours else 'minutes'} of training"
    return {"step": "optimizer steps", "tokens": "training tokens", "time": time}[axis]


def short(value: float, _position: object = None) -> str:
    """12000 -> 12k, 2.5e9 -> 2.5B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def draw_references(ax, name: str, runs: list[LoggedRun], compare: bool) -> list[float]:
    """Draw grey lines to compare a metric with; return their heights. compare: also with GPT-2's results."""
    found = {"chance, 25%": 0.25} if name.startswith("hella_acc") else {}  # four endings to choose from
    found |= GPT2.get(name, {}) if compare else {}
    batches = {run.config.get("total_batch_size") for run in runs if name == "noise_scale"}
    found |= {f"batch of {short(tokens)}": tokens for tokens in batches if is_finite(tokens)}
    experts = {run.experts() for run in runs} - {None}
    if name == "max_load":
        found |= {f"ceiling E/K = {E / K:.3g}": E / K for E, K in experts}
    if name == "router_entropy" and len(experts) == 1:  # of several runs the texts would overlap
        found |= {f"ceiling ln E = {math.log(E):.3g}": math.log(E) for E, _ in experts}
    for text, y in found.items():
        ax.axhline(y, color=GREY, linestyle=(0, (6, 3)), linewidth=1, zorder=1)
        x, side = (0.01, "left") if text.startswith("GPT") else (0.99, "right")
        up = "top" if name == "loss" else "bottom"
        ax.text(x, y, text, ha=side, va=up, color=GREY, size=9, transform=ax.get_yaxis_transform())
    return list(found.values())


def draw_smoothed(ax, run: LoggedRun, name: str, label: str | None = None) -> np.ndarray:
    """Draw a metric's values as a light line, and in the run's style their running median over 1/30 of the
    points, fewer at the start, where losses fall fast. A mean would make a spike a plateau. Return it."""
    x, y = run.points(name)
    ax.plot(x, y, color=run.line["color"], alpha=0.3, linewidth=0.6, marker="." if len(y) == 1 else None)
    at = np.unique(np.linspace(0, len(y) - 1, min(len(y), 1000)).astype(int))  # 1,000 medians are enough
    half = np.minimum(at // 6, 1 + len(y) // 60)
    medians = np.array([np.median(y[i - h : i + h + 1]) for i, h in zip(at, half, strict=True)])
    ax.plot(x[at], medians, **run.line, label=label)
    return medians


def draw_loss(fig, cell, runs: list[LoggedRun], metrics: list[Metric], compare: bool):
    """Draw training and validation losses, losses beyond the axis as triangles at its upper edge, and steps
    without a finite loss as crosses at the lower edge."""
    ax, one, inside, spikes = fig.add_subplot(cell), len(runs) == 1, [], []
    edge = {"transform": ax.get_xaxis_transform(), "linestyle": "none"}  # y from 0 to 1
    for run in runs:
        medians = draw_smoothed(ax, run, "loss", label="training (light: every step)" if one else None)
        inside += [*medians[len(medians) // 50 :]]  # the fall of the first steps would flatten the rest
        spikes += [*run.points("loss")[1][len(medians) // 50 :]]
        lost = [run.x[i] for i, row in enumerate(run.rows) if "loss" in row and not is_finite(row["loss"])]
        label = "loss not finite" if lost else None
        ax.plot(lost, [0.03] * len(lost), marker="x", color="black", label=label, **edge)
        sets = {key: None for row in run.rows for key in row if key.startswith("val_loss/")} if one else {}
        for i, key in enumerate(["val_loss", *sets]):
            x, y = run.points(key)
            if not len(y):
                continue
            line = {"color": COLOURS[1 + i % 6] if one else run.line["color"], "linewidth": 1.2, **run.mark}
            line |= {"marker": MARKERS[i % 5], "label": f"validation {key[9:]}".strip()} if one else {}
            line |= {"linestyle": "-" if one and len(y) > 20 else "none", "markevery": 1 + len(y) // 40}
            ax.plot(x, y, **line)
            inside += [*y[y.argmin() :]]
    inside += draw_references(ax, "loss", runs, compare)
    low, high = ax.dataLim.y0, max(inside, default=0)
    if high > low:  # spikes may take a fifth of the axis
        high = max(high, min(max(spikes, default=high), high + 0.25 * (high - low)))
        ax.set_ylim(low - 0.1 * (high - low), high + 0.06 * (high - low))
    for line in [*ax.lines]:
        x, y = np.array(line.get_data(), dtype=float)
        beyond = y > ax.get_ylim()[1]
        beyond[1:] &= ~beyond[:-1]  # one triangle for steps in a row
        label = "beyond the axis" if beyond.any() else None
        ax.plot(x[beyond], 0.97 * beyond[beyond], "^", color=line.get_color(), label=label, **edge)
    handles, labels = ax.get_legend_handles_labels()
    if keys := dict(zip(labels, handles, strict=True)):  # each label once
        ax.legend(keys.values(), keys, loc="upper right", bbox_to_anchor=(1, 0.96))
    ax.set(title="Loss" if one else "Loss: training (lines), validation (markers)", ylabel=metrics[0].label)
    return ax


def draw_stack(fig, cell, runs: list[LoggedRun], metrics: list[Metric], compare: bool):
    """Draw the metrics of a panel above each other over one horizontal axis."""
    axes = []
    for part, metric in zip(cell.subgridspec(len(metrics), 1, hspace=0.04), metrics, strict=True):
        ax = fig.add_subplot(part, sharex=axes[0] if axes else None)
        for run in runs:
            if metric.drawn == "smoothed":
                draw_smoothed(ax, run, metric.name)
            else:
                x, y = run.points(metric.name)
                mark = run.mark | {"markevery": 1 + len(y) // 25} if metric.evaluated else {}
                ax.plot(x, y, **run.line, **mark, drawstyle=metric.drawn)
        lines = draw_references(ax, metric.name, runs, compare)
        low, high = min(metric.axis_low, ax.dataLim.y0), max(ax.dataLim.y1, metric.axis_high, 1e-9)
        room = 0.3 if lines else 0.08  # the highest line may have a text above it
        ax.set_ylim(low, high + room * (high - low))
        ax.locator_params("y", nbins=4, steps=[1, 2, 2.5, 5, 10])
        low = low or ax.dataLim.y0
        if metric.log_scale and high > 5 * low > 0:
            ax.set(yscale="log", ylim=(low / 1.08, high * (high / low) ** room))
            ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            ax.minorticks_off()
        ax.yaxis.set_major_formatter((lambda y, _: f"{100 * y:.3g}%") if metric.percent else short)
        ax.tick_params(labelbottom=metric is metrics[-1])
        ax.set_ylabel(metric.label, fontsize=9)
        axes.append(ax)
    axes[0].set_title(metrics[0].panel)
    return axes[-1]


def draw_loads(fig, cell, runs: list[LoggedRun]):
    """Draw a heat map, layers x experts, of each run's last load, and the loads over time of a single run."""
    from matplotlib.colors import LinearSegmentedColormap

    one, columns = len(runs) == 1, min(len(runs), 3)
    grid = cell.subgridspec(-(-len(runs) // 3), columns + one, width_ratios=[1, 2] if one else None)
    axes = [fig.add_subplot(part) for part, _ in zip(grid, range(len(runs) + one), strict=False)]
    colours = {"cmap": LinearSegmentedColormap.from_list("load", HEAT), "vmin": 0, "vmax": 2}
    for ax, run in zip(axes, runs, strict=False):
        load = run.loads()[1][-1]  # (MoE layers, E)
        image = ax.pcolormesh(load, **colours)
        for (row, column), value in np.ndenumerate(load):
            text = f"{value:.2f}" if len(load) <= 16 and load.shape[1] <= 8 else ""
            words = {"ha": "center", "va": "center", "size": 8, "color": "white" if value < 0.3 else "black"}
            ax.text(column + 0.5, row + 0.5, "x" if value < STARVED_BELOW else text, **words)
        rows, columns = (np.arange(0, size, 1 + size // 13) for size in load.shape)  # labels that fit
        ax.set_yticks(rows + 0.5, rows)
        ax.set_xticks(columns + 0.5, columns)
        step = max(row["step"] for row in run.rows if "load" in row)
        title = f"{'Expert load' if one else run.name} at step {step:,}"
        ax.set(title=title, ylabel="MoE layer", ylim=(len(load), 0), xlabel="expert")
    if one:
        x, loads = runs[0].loads()
        every = 1 + len(x) // 400  # 400 columns show all that can be seen
        x, loads = x[::-every][::-1], loads[::-every][::-1]
        layers, experts = loads.shape[1:]
        table = loads.reshape(len(x), -1).T  # (MoE layers * E, records)
        axes[1].pcolormesh(x, np.arange(len(table)), table, shading="nearest", rasterized=True, **colours)
        axes[1].hlines(np.arange(1, layers) * experts - 0.5, x[0], x[-1], color=GREY, linewidth=0.8)
        shown = np.arange(0, layers, 1 + layers // 16)
        axes[1].set_yticks(shown * experts + (experts - 1) / 2, shown)
        axes[1].set(title="Expert load over time, a row per expert", ylim=(len(table) - 0.5, -0.5))
    fig.colorbar(image, ax=axes, label="fair share = 1, x = starved", extend="max", pad=0.02, aspect=30)
    return axes[1] if one else None


def headlines(runs: list[LoggedRun]) -> list[str]:
    """A line for each run: name, size and last results, as far as they are known. Of several runs the lines
    show what differs between them: settings and results."""
    lines, shared = [], set.intersection(*(set(run.config) for run in runs)) - NOT_COMPARED
    differ = sorted(key for key in shared if len({str(run.config[key]) for run in runs}) > 1)
    if "max_lr" in differ and "min_lr" in differ:
        differ.remove("min_lr")  # it follows max_lr
    for run in runs:
        size = ["n_layer", "n_embd"] + ["num_experts", "num_experts_per_tok"] * bool(run.experts())
        keys = differ[:5] if len(runs) > 1 else [key for key in size if key in run.config]
        words = [run.name, *(f"{key} {printable(run.config[key])[:24]}" for key in keys)]
        words.append(f"step {run.rows[-1]['step']:,}" if run.rows else "no step logged yet")
        words += [text.format(value) for name, text in RESULTS.items() for value in run.points(name)[1][-1:]]
        lines.append(words)
    same = set(lines[0]).intersection(*lines[1:]) if len(runs) > 1 else set()
    return ["  ·  ".join(word for word in words if word not in same) for words in lines]


def save_picture(fig, out: Path) -> None:
    """Save `fig` in the format of `out`'s ending; the file appears whole or not at all."""
    fig.savefig(picture := io.BytesIO(), format=out.suffix[1:])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: file.write(picture.getvalue()))


def plot_runs(arguments: list[str], out: str = "", x: str = "step", form: str = "png") -> str:
    """Draw the runs that `arguments` name into file `out`; return its name. Raises OSError, ValueError."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # pyplot would open windows and keep figures
    from matplotlib.lines import Line2D

    folders, problems = find_runs(arguments)
    runs = [read_run(folder) for folder in folders]
    label, names = set_x(runs, x), [run.name for run in runs]
    for i, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        run.name = run.name if names.count(run.name) == 1 else os.path.normpath(folder)
        run.line = {"color": COLOURS[i % 7], "linestyle": DASHES[i % 4], "linewidth": 1.6}
        run.mark = {"marker": MARKERS[i % 5], "markersize": 4.5, "markerfacecolor": "white"}
        problems += [f"{folder}: {problem}" for problem in run.problems]
    if any(len(run.x) for run in runs) and not any(np.isfinite(run.x).any() for run in runs):
        raise ValueError("; ".join(problems))
    if problems:
        print(f"plot_log.py: warning: {one_line('; '.join(problems))}", file=sys.stderr)
    # A loss can be compared with GPT-2's only if the vocabulary is GPT-2's (50257, perhaps padded).
    compare = all(run.config.get("vocab_size") in range(50257, 51201) for run in runs)
    known = [m for m in METRICS if m.panel and any(len(run.points(m.name)[1]) for run in runs)]
    titles = list(dict.fromkeys(metric.panel for metric in known))
    rows = [titles[:2], *(titles[i : i + 4] for i in range(2, len(titles), 4))]
    routed = [run for run in runs if len(run.loads()[0])]
    heights = [3.0] * len(rows) + [3.0 * -(-len(routed) // 3)] * (len(routed) > 0)
    with rc_context(STYLE):
        fig = Figure(figsize=(12, 0.7 + 0.2 * len(runs) + sum(heights)), layout="constrained", dpi=110)
        cells, over_x = list(fig.add_gridspec(len(heights), 1, height_ratios=heights)), []
        for row, cell in zip(rows, cells, strict=False):
            widths = [1 + (title == "Loss") for title in row] or [1]
            for title, part in zip(row, cell.subgridspec(1, len(widths), width_ratios=widths), strict=False):
                draw = draw_loss if title == "Loss" else draw_stack
                over_x.append(draw(fig, part, runs, [m for m in known if m.panel == title], compare))
        over_x += [draw_loads(fig, cells[-1], routed)] if routed else []
        last = np.nanmax([0.0, *(value for run in runs for value in run.x)])
        for ax in filter(None, over_x):
            ax.set(xlabel=label, xlim=(-0.01 * last, 1.01 * last or 1))
            ax.locator_params("x", nbins=6, steps=[1, 2, 2.5, 5, 10])
            ax.xaxis.set_major_formatter(short)
        if len(runs) == 1:
            title = headlines(runs)[0]
            fig.suptitle(title, x=0.01, ha="left", weight="bold", size=min(12, 1400 / len(title)))
        else:
            texts = zip(runs, headlines(runs), strict=True)
            keys = [Line2D([], [], **run.line, **run.mark, label=text) for run, text in texts]
            fig.legend(handles=keys, loc="outside upper left", handlelength=4)
        beside = Path(folders[0], "training") if len(runs) == 1 else Path(folders[0]).parent / "runs"
        out = out or f"{beside}.{form}"
        save_picture(fig, Path(out))
    return out


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 if a folder has no log or an argument is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="log/", help="runs, folders of runs, patterns")
    parser.add_argument("--x", choices=("step", "tokens", "time"), default="step", help="the horizontal axis")
    parser.add_argument("--out", help="default: training.png in a run's folder, runs.png beside several")
    parser.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="of the default file")
    args = parser.parse_args(arguments)
    try:
        print(printable(plot_runs(args.folders, args.out, args.x, args.format)))
    except (OSError, ValueError) as error:
        print_error("plot_log.py", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
