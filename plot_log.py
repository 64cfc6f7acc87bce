"""Draw a run's log: losses, HellaSwag, learning rate, gradient norm, speed and the load of every expert.

    python plot_log.py log/                          # writes log/training.png
    python plot_log.py log/ --x tokens --format svg  # also --x time; svg and pdf are for print
    python plot_log.py dense/ moe/ --out both.png    # several runs over each other

It reads metrics.jsonl, or log.txt if metrics.jsonl is missing or empty (docs/formats.md). It draws no panel
without data, and skips unreadable lines with a warning, so that it can also draw a running or broken run.
training/metrics.py says which number is in which panel. Colours: https://jfly.uni-koeln.de/color/"""

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from layers.usage import STARVED_BELOW
from tokens.files import write_atomically
from tokens.printable import one_line, printable
from training.metrics import METRICS, Metric

# Loss of GPT-2 124M on FineWeb-Edu 10B's validation shard; acc_norm of GPT-2 124M and of GPT-3 Small (arXiv
# 2005.14165, appendix H). Source: https://github.com/karpathy/build-nanogpt/blob/master/play.ipynb
GPT2_VAL_LOSS, GPT2_HELLASWAG, GPT3_HELLASWAG = 3.2924, 0.294463, 0.337
CHANCE = 0.25  # HellaSwag has four endings to choose from
LOG_WORDS = {metric.log_word: metric.name for metric in METRICS if metric.log_word}  # of log.txt
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")
GREY = "#595959"
HEAT = ("#00263D", "#4F9CC4", "#FAFAF5", "#F0B64A", "#C65A00")  # load 0 (darkest in print too), 0.5 ... 2
STYLE = {"axes.grid": True, "grid.linewidth": 0.6, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.axisbelow": True,
         "font.size": 10, "axes.titlesize": 11, "grid.color": "#E3E3E3", "legend.frameon": False}  # fmt: skip


@dataclass
class LoggedRun:
    """A run as read from its log, and the style of its curves."""

    name: str
    config: dict = field(default_factory=dict)  # all settings; empty if read from log.txt
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

    def loads(self) -> tuple[np.ndarray, np.ndarray]:
        """x (records,) and loads in fair shares (records, MoE layers, E), of records shaped like the last."""
        known = [i for i, row in enumerate(self.rows) if "load" in row and np.isfinite(self.x[i])]
        known = [i for i in known if self.rows[i]["load"].shape == self.rows[known[-1]]["load"].shape]
        return self.x[known], np.array([self.rows[i]["load"] for i in known])


def is_finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn: no NaN, no infinity, no bool."""
    return type(value) in (int, float) and abs(value) < 1e300


def parse_line(line: str) -> dict:
    """A line of metrics.jsonl or log.txt as {"run": config} or as a step's record. expert_load (shares)
    gives `load` (in fair shares) and, if they are not logged, `max_load` and `starved`."""
    if line[0] != "{":
        step, word, value = line.split()
        return {"step": int(step), LOG_WORDS[word]: float(value)}
    record = json.loads(line)
    record.pop("load", None)  # the name of what is computed below
    if "run" in record:
        return {"run": dict(record["run"].get("config", {}))}
    if record.get("expert_load"):
        load = np.array(record["expert_load"], dtype=float)  # (MoE layers, E)
        if load.ndim != 2 or not np.isfinite(load).all():
            raise ValueError("expert_load is no table of layers x experts")
        load *= load.shape[1]
        starved = float((load < STARVED_BELOW).mean())
        record = {"max_load": float(load.max()), "starved": starved} | record | {"load": load}
    return record | {"step": int(record["step"])}


def read_run(folder: str) -> LoggedRun:
    """Read the log in `folder`; `problems` says what is wrong in it. Raises FileNotFoundError if none."""
    run = LoggedRun(printable(Path(folder).resolve().name))
    found = [path for path in (Path(folder, "metrics.jsonl"), Path(folder, "log.txt")) if path.is_file()]
    if not found:
        make = f"a run makes them: python train_gpt_moe.py --preset demo --log_dir {folder}"
        raise FileNotFoundError(f"{folder}: no metrics.jsonl and no log.txt in this folder; {make}")
    for path in found:
        rows, bad, restarted = {}, [], False
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = parse_line(line)
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    bad += [str(number)] if line.strip() else []
                    continue
                if "run" in record:
                    run.config, restarted = record["run"], True
                    continue
                if restarted:  # a resumed run replaces the records from its first step on
                    rows = {step: row for step, row in rows.items() if step <= record["step"]}
                    restarted = False
                rows.setdefault(record["step"], {}).update(record)
        if bad:
            which = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
            run.problems.append(f"{path.name}: {len(bad)} unreadable line(s) skipped (line {which})")
        if rows:
            run.rows = [rows[step] for step in sorted(rows)]
            break
        run.problems.append(f"{path.name} holds no step")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        run.config = dict(json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))["config"])
    if lost := sum("loss" in row and not is_finite(row["loss"]) for row in run.rows):
        run.problems.append(f"{lost} of {len(run.rows)} steps have no finite loss")
    return run


def set_x(runs: list[LoggedRun], axis: str) -> str:
    """Set every run's `x` (axis: step, tokens or time); return the label of the axis."""
    for run in runs:
        run.x = run.column("elapsed_s" if axis == "time" else "step")
        if axis == "tokens":
            size = run.config.get("total_batch_size")
            run.x = run.x * (size if is_finite(size) else np.nan)
        if len(run.x) and np.isnan(run.x).all():
            lacking = "elapsed_s" if axis == "time" else "total_batch_size"
            run.problems.append(f"cannot be drawn over {axis}, as its log has no {lacking}; try --x step")
    if axis != "time":
        return {"step": "optimizer steps", "tokens": "training tokens"}[axis]
    longest = np.nanmax([0.0, *(x for run in runs for x in run.x)])
    units = (("seconds", 1), ("minutes", 60), ("hours", 3600))
    unit, seconds = units[sum(longest > limit for limit in (150, 9000))]
    for run in runs:
        run.x = run.x / seconds
    return f"{unit} of training"


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean over 1/30 of the points, (n,) -> (n,); over fewer at the start, where losses fall fast."""
    i, n = np.arange(len(y)), len(y)
    half = np.minimum(i // 6, 1 + n // 60)
    end = np.minimum(i + half + 1, n)
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[end] - total[i - half]) / (end - i + half)


def short(value: float, _position: object = None) -> str:
    """12000 -> 12k, 2.5e9 -> 2.5B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def load_colours() -> dict:
    """Colours of a load: dark blue for no rows, white for a fair share, orange for twice as much or more."""
    from matplotlib.colors import LinearSegmentedColormap

    return {"cmap": LinearSegmentedColormap.from_list("load", HEAT), "vmin": 0, "vmax": 2}


def draw_reference(ax, y: float, text: str, x: float = 0, va: str = "bottom") -> None:
    """Draw a grey line at `y` to compare with; `text` stands at its left (x = 0) or right end (x = 1)."""
    ax.axhline(y, color=GREY, linestyle=(0, (6, 3)), linewidth=1, zorder=1)
    words = {"color": GREY, "fontsize": 9, "ha": "right" if x else "left", "va": va, "zorder": 5}
    words["bbox"] = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5}
    shift = (4 - 8 * x, -3 if va == "top" else 2)  # points
    ax.annotate(text, (x, y), shift, ("axes fraction", "data"), "offset points", **words)


def draw_smoothed(ax, run: LoggedRun, name: str, **more: str) -> None:
    """Draw a metric's values as a light line, and their smoothed curve in the run's colour and line style."""
    x, y = run.points(name)
    ax.plot(x, y, color=run.line["color"], alpha=0.3, linewidth=0.6, marker="." if len(y) == 1 else None)
    ax.plot(x, smooth(y), **run.line, **more)


def draw_loss(fig, cell, runs: list[LoggedRun], metrics: list[Metric], compare: bool) -> list:
    """Draw training loss (lines), validation loss (markers) and steps without a finite loss (crosses)."""
    ax, one, top = fig.add_subplot(cell), len(runs) == 1, []
    for run in runs:
        draw_smoothed(ax, run, "loss", label="training (light: every step)")
        y = run.points("loss")[1]
        top += [*smooth(y)[len(y) // 50 :]]
        lost = [run.x[i] for i, row in enumerate(run.rows) if "loss" in row and not is_finite(row["loss"])]
        if lost:
            low_edge = {"transform": ax.get_xaxis_transform(), "label": "loss not finite"}
            ax.plot(lost, [0.03] * len(lost), "x", color="black", **low_edge)
        x, y = run.points("val_loss")
        if len(y):
            line = {"color": COLOURS[1], "linewidth": 1.2} if one else run.line | {"linestyle": "none"}
            ax.plot(x, y, **line, **run.mark, markevery=1 + len(y) // 40, label="validation")
            top += [*y[y.argmin() :]]
    if compare:
        draw_reference(ax, GPT2_VAL_LOSS, f"GPT-2 124M on FineWeb-Edu, {GPT2_VAL_LOSS:.2f}", va="top")
        top.append(GPT2_VAL_LOSS)
    low, high = ax.dataLim.y0, max(top, default=0)
    if high > low:  # cut off the fall of the first steps from ln(vocabulary); it would flatten the rest
        ax.set_ylim(low - 0.1 * (high - low), high + 0.06 * (high - low))
    if one:
        ax.legend(loc="upper right")
    ax.set(title="Loss" if one else "Loss: training (lines), validation (markers)", ylabel=metrics[0].label)
    return [ax]


def draw_hellaswag(fig, cell, runs: list[LoggedRun], metrics: list[Metric], compare: bool) -> list:
    """Draw HellaSwag accuracy: length-normalised (markers) and plain (dotted)."""
    ax = fig.add_subplot(cell)
    for run in runs:
        x, y = run.points("hella_acc_norm")
        ax.plot(x, y, **run.line, **run.mark, markevery=1 + len(y) // 25)
        ax.plot(*run.points("hella_acc"), color=run.line["color"], linestyle=":", linewidth=1.2)
    draw_reference(ax, CHANCE, "chance, 25%", x=1)
    if compare:
        draw_reference(ax, GPT2_HELLASWAG, f"GPT-2 124M, {GPT2_HELLASWAG:.1%}")
        draw_reference(ax, GPT3_HELLASWAG, f"GPT-3 124M, {GPT3_HELLASWAG:.1%}")
    ax.margins(y=0.1)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set(title="HellaSwag", ylabel="acc_norm (dotted: acc)" if len(metrics) > 1 else metrics[0].label)
    return [ax]


def draw_stack(fig, cell, runs: list[LoggedRun], metrics: list[Metric], compare: bool) -> list:
    """Draw the metrics of a panel above each other over one horizontal axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes = []
    for part, metric in zip(cell.subgridspec(len(metrics), 1, hspace=0.04), metrics, strict=True):
        ax = fig.add_subplot(part, sharex=axes[0] if axes else None)
        for run in runs:
            if metric.drawn == "smoothed":
                draw_smoothed(ax, run, metric.name)
            else:
                ax.plot(*run.points(metric.name), **run.line, drawstyle=metric.drawn)
        if metric.log_scale and ax.dataLim.y0 > 0:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(metric.axis_low, 1.08 * max(ax.dataLim.y1, 1e-9, metric.axis_high))
            ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter((lambda y, _: f"{100 * y:.3g}%") if metric.percent else short)
        ax.tick_params(labelbottom=metric is metrics[-1])
        ax.set_ylabel(metric.label, fontsize=9)
        axes.append(ax)
    axes[0].set_title(metrics[0].panel)
    return axes


def draw_load(fig, cell, run: LoggedRun, title: str) -> list:
    """Draw a heat map, layers x experts, of the last known load; starved experts are crossed out."""
    ax, load = fig.add_subplot(cell), run.loads()[1][-1]  # (MoE layers, E)
    image = ax.pcolormesh(load, **load_colours())
    layer, expert = np.nonzero(load < STARVED_BELOW)
    for colour, width in (("black", 4), ("white", 1.8)):  # visible on dark and on light cells
        ax.plot(expert + 0.5, layer + 0.5, "x", color=colour, markersize=6 + width / 2, markeredgewidth=width)
    if load.shape[0] <= 16 and load.shape[1] <= 8:
        for (row, column), value in np.ndenumerate(load):
            words = {"ha": "center", "va": "center", "size": 8, "color": "white" if value < 0.3 else "black"}
            ax.text(column + 0.5, row + 0.5, f"{value:.2f}" if value >= STARVED_BELOW else "", **words)
    rows, columns = (np.arange(0, size, 1 + size // 13) for size in load.shape)  # labels that fit
    ax.set_yticks(rows + 0.5, rows)
    ax.set_xticks(columns + 0.5, columns)
    step = max(row["step"] for row in run.rows if "load" in row)
    ax.set(title=f"{title} at step {step:,}", ylabel="MoE layer", ylim=(len(load), 0))
    ax.set_xlabel("expert" + (f" (cross: starved, under {STARVED_BELOW:.0%} of fair)" if len(expert) else ""))
    more = "max" if load.max() > 2 else "neither"
    fig.colorbar(image, ax=ax, label="fair share = 1", extend=more, pad=0.02)
    return []


def draw_load_history(fig, cell, run: LoggedRun, title: str) -> list:
    """Draw a heat map of all loads over x, one row per expert; experts starved at the end get a cross."""
    ax, (x, loads) = fig.add_subplot(cell), run.loads()
    every = 1 + len(x) // 400  # 400 columns show all that can be seen
    x, loads = x[::-every][::-1], loads[::-every][::-1]
    layers, experts = loads.shape[1:]
    table = loads.reshape(len(x), -1).T  # (MoE layers * E, records)
    ax.pcolormesh(x, np.arange(len(table)), table, shading="nearest", rasterized=True, **load_colours())
    ax.hlines(np.arange(1, layers) * experts - 0.5, x[0], x[-1], color=GREY, linewidth=0.8)
    for row in np.flatnonzero(table[:, -1] < STARVED_BELOW):
        ax.plot(1.012, row, "kx", transform=ax.get_yaxis_transform(), clip_on=False)
    shown = np.arange(0, layers, 1 + layers // 16)
    ax.set_yticks(shown * experts + (experts - 1) / 2, shown)
    ax.set(title=f"{title} over time, a row per expert", ylabel="MoE layer", ylim=(len(table) - 0.5, -0.5))
    ax.grid(False)
    return [ax]


def panels(runs: list[LoggedRun], compare: bool) -> list[list[tuple[int, Callable]]]:
    """The panels for which there is data, in rows of (width in thirds, draw(fig, cell) -> axes over x)."""
    known = [m for m in METRICS if m.panel and any(len(run.points(m.name)[1]) for run in runs)]
    chosen: list[tuple[int, Callable]] = []
    for title in dict.fromkeys(metric.panel for metric in known):
        metrics = [metric for metric in known if metric.panel == title]
        draw = {"Loss": draw_loss, "HellaSwag": draw_hellaswag}.get(title, draw_stack)
        width = 2 if title == "Loss" else 1
        chosen.append((width, partial(draw, runs=runs, metrics=metrics, compare=compare)))
    routed = {run.name if len(runs) > 1 else "Expert load": run for run in runs if len(run.loads()[0])}
    chosen += [(1, partial(draw_load, run=run, title=title)) for title, run in routed.items()]
    for title, run in routed.items():
        if len(routed) == 1 and len(run.loads()[0]) > 1:
            chosen.append((2, partial(draw_load_history, run=run, title=title)))
    rows = []
    for width, draw in chosen:
        if not rows or sum(w for w, _ in rows[-1]) + width > 3:
            rows.append([])
        rows[-1].append((width, draw))
    return rows


def headline(run: LoggedRun) -> str:
    """A run's name, size and last results, as far as they are known."""
    c, words = run.config, [run.name]
    if is_finite(c.get("n_layer")) and is_finite(c.get("n_embd")):
        words.append(f"{c['n_layer']} layers of width {c['n_embd']}")
    active = c.get("num_experts_per_tok", 1)
    if c.get("use_moe") and is_finite(c.get("num_experts")) and is_finite(active):
        words.append(f"{c['num_experts']} experts, {active} active")
    words.append(f"step {run.rows[-1]['step']:,}" if run.rows else "no step logged yet")
    words += [f"validation loss {value:.3f}" for value in run.points("val_loss")[1][-1:]]
    words += [f"HellaSwag {value:.1%}" for value in run.points("hella_acc_norm")[1][-1:]]
    return "  ·  ".join(words)


def save_picture(fig, out: Path) -> None:
    """Save `fig` in the format of `out`'s ending; the file appears whole or not at all."""
    picture = io.BytesIO()
    fig.savefig(picture, format=out.suffix[1:])
    if out.suffix == ".png":  # 256 colours are enough and take a third of the bytes
        from PIL import Image  # a dependency of matplotlib

        small = Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(picture := io.BytesIO(), "png", optimize=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: file.write(picture.getvalue()))


def plot_runs(folders: list[str], out: str, x: str = "step") -> str:
    """Draw the logs in `folders` over each other into the file `out`. Raises OSError, ValueError."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # pyplot would open windows and keep figures
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if Path(out).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out={out!r}: the name must end in .png, .svg or .pdf")
    if x not in ("step", "tokens", "time"):
        raise ValueError(f"x={x!r}: must be step, tokens or time")
    runs = [read_run(folder) for folder in folders]
    label, names, problems = set_x(runs, x), [run.name for run in runs], []
    for i, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        name = run.name if names.count(run.name) == 1 else os.path.normpath(folder)
        run.name = name.replace("$", r"\$")  # matplotlib reads a plain $ as a formula
        run.line = {"color": COLOURS[i % 7], "linestyle": DASHES[i % 4], "linewidth": 1.6}
        run.mark = {"marker": MARKERS[i % 5], "markersize": 4.5, "markerfacecolor": "white"}
        problems += [f"{folder}: {problem}" for problem in run.problems]
    if any(len(run.x) for run in runs) and not any(np.isfinite(run.x).any() for run in runs):
        raise ValueError("; ".join(problems))
    if problems:
        print(f"plot_log: warning: {one_line('; '.join(problems))}", file=sys.stderr)
    # A loss can be compared with GPT-2's only if the vocabulary is GPT-2's (50257, perhaps padded).
    sizes = [run.config.get("vocab_size") for run in runs]
    grid = panels(runs, compare=all(is_finite(size) and 50257 <= size <= 51200 for size in sizes))
    with rc_context(STYLE):
        fig = Figure(figsize=(12, 0.7 + 0.2 * len(runs) + 3 * len(grid)), layout="constrained", dpi=110)
        cells, over_x = fig.add_gridspec(max(1, len(grid)), 1), []
        for row, cell in zip(grid, cells, strict=False):
            parts = cell.subgridspec(1, len(row), width_ratios=[width for width, _ in row])
            over_x += [draw(fig, part) for part, (_, draw) in zip(parts, row, strict=True)]
        last = np.nanmax([0.0, *(value for run in runs for value in run.x)])
        for axes in filter(None, over_x):
            axes[-1].set(xlabel=label, xlim=(0, 1.01 * last or 1))
            axes[-1].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes[-1].xaxis.set_major_formatter(short)
        if len(runs) == 1:
            fig.suptitle(headline(runs[0]), x=0.01, ha="left", weight="bold")
        else:
            keys = [Line2D([], [], **run.line, **run.mark, label=headline(run)) for run in runs]
            fig.legend(handles=keys, loc="outside upper left", handlelength=4)
        save_picture(fig, Path(out))
    return out


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 if a folder has no log or an argument is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="log/", help="folders of runs")
    parser.add_argument("--x", choices=("step", "tokens", "time"), default="step", help="the horizontal axis")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", help="file to write (default: training.png in the first folder)")
    target.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="format of training.*")
    args = parser.parse_args(arguments)
    out = args.out or str(Path(args.folders[0], f"training.{args.format}"))
    try:
        print(printable(plot_runs(args.folders, out, args.x)))
    except (OSError, ValueError) as error:
        print(f"plot_log: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
