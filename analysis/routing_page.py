"""The page and the pictures of `python -m analysis routing`, from the numbers in routing.json.

The page is one file without scripts and without anything from the network: the pictures are data URIs, and
every text is escaped.
"""

import base64
import io
import math
from html import escape

import numpy as np
import pandas as pd  # datasets needs it, too

from tokens.printable import printable

STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 0 1rem 3rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #8883; white-space: nowrap }
summary { cursor: pointer; font-weight: 600 } img { max-width: 100%; background: white }"""

# The parts of the page: a title, how to read the part, and of a picture the labels of colours and columns.
SECTIONS = {
    "sure": ("How even and how sure the routers are", """Max load is the load of the fullest expert in fair
        shares. Effective experts, exp(entropy of the loads), is {num_experts} if all loads are equal; the
        router's entropy is {top:.2f} nats if it prefers no expert, 0 if it is certain. Stays: the share of
        choices that survive when the router's input is rounded to bf16, or gets 1% of noise, and that
        {before} makes too (chance alone gives {chance:.0%}). The last columns are what the loss gains, in
        nats per token, when experts are random, or the router is that of {start}."""),
    "tokens": ("Tokens", """Each token that is typical of an expert is followed by its lift and by the share
        of its occurrences that this expert computes; ␣ is a space. Lift says how much more often the expert
        computes the token than the expert's load explains: P(token | expert) / P(token), at most {most:.3g}
        for an expert with a fair load. Rare tokens are left out."""),
    "load": ("Load", """Load is an expert's share of all assignments, and gate mass its share of the routing
        weights, in fair shares: 1 is an equal share, 0 an idle expert. More mass than load: the router is
        sure of its tokens.""", "1 = fair share", "expert"),
    "position": ("Position", """The number is the lift of a part of the window of {T} tokens, from its first
        part to its last: near 1, a token's place makes no difference. Tokens of the first part
        have little context.""", "lift", "part of the window"),
    "source": ("Source", """The number is the lift of a source of text: at 2 its tokens come to this expert
        twice as often as the expert's load explains, at 1 the expert does not tell the sources apart.""",
        "lift", "source: {sources}"),
    "coactivation": ("Pairs", """The number says how often two experts compute the same token, relative to
        what their loads explain: above 1 more often, below 1 less often.""",
        "observed / expected", "expert"),
    "drops": ("What each expert is worth", """The number is what the loss gains, in nats per token, when one
        expert is left out and the next best get its tokens. 0 means no harm; the unchanged loss on these
        {few:,} tokens is {base:.4f}.""", "added loss, nats", "expert left out"),
}  # fmt: skip
# The first table's columns: a layer's number, its format.
COLUMNS = {
    "max load": ("max_load", "{:.2f}"), "effective experts": ("effective_experts", "{:.2f}"),
    "entropy": ("entropy", "{:.2f}"), "stays in bf16": ("stays_bf16", "{:.1%}"),
    "under noise": ("stays_noise", "{:.1%}"), "since before": ("saturation", "{:.1%}"),
    "random experts": ("random", "{:+.4f}"), "start's router": ("start_router", "{:+.4f}"),
}  # fmt: skip


def summary(found: dict) -> pd.DataFrame:
    """COLUMNS of each MoE layer, as texts, as far as they were measured."""
    rows, changed = {}, found.get("changed", {})
    for layer, one in [*enumerate(found["layers"]), ("all", changed)]:
        known = one | {k: one[k] - changed["loss"] for k in ("random", "start_router") if k in one}
        rows[layer] = {k: text.format(known[name]) for k, (name, text) in COLUMNS.items() if name in known}
    return pd.DataFrame.from_dict(rows, "index").rename_axis(columns="MoE layer").dropna(how="all").fillna("")


def token_tables(found: dict) -> str:
    """The typical tokens of each expert, as HTML."""
    page = ""
    for n, one in enumerate(found["layers"]):
        cells = [[f"{t['text']} {t['lift']:.1f}x {t['share']:.0%}" for t in top] for top in one["top_tokens"]]
        table = pd.DataFrame(cells).rename_axis("expert").fillna("").to_html(border=0, header=False)
        page += f"<details{' open' * (n == 0)}><summary>MoE layer {n}</summary>{table}</details>"
    return page


def heat_maps(panels: dict, label: str, x: str, y: str = "expert", centre: float = 1) -> bytes:
    """A PNG with a heat map of each panel, {title: table (rows, columns)}; `centre` is white, None grey."""
    from matplotlib import colormaps, rc_context
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure  # pyplot would open windows and keep figures

    values = np.array(list(panels.values()), dtype=float)  # (panels, rows, columns)
    far = np.nanmax(abs(values - centre), initial=centre or 1e-9)  # lifts: 0 to 2 at least, so chance is pale
    norm = TwoSlopeNorm(centre, 0 if centre else -far, centre + far)
    colours = {"cmap": colormaps["PuOr_r"].with_extremes(bad="#BBBBBB"), "norm": norm, "aspect": "auto"}
    count, rows, columns = values.shape
    written = columns <= 16  # more columns have no room for numbers
    size = min(2.5 + (0.7 if written else 0.2) * columns, 30), min(1 + count * (0.8 + 0.28 * rows), 60)
    with rc_context({"text.parse_math": False}):
        figure = Figure(size, dpi=80, layout="constrained")
        axes = figure.subplots(count, squeeze=False)[:, 0]
        for ax, title, table in zip(axes, panels, values, strict=True):
            image = ax.imshow(table, **colours)
            for (row, column), value in np.ndenumerate(table) if written else ():
                colour = "white" if abs(norm(value) - 0.5) > 0.35 else "black"
                text = f"{value:.2f}".replace("nan", "")
                ax.text(column, row, text, ha="center", va="center", size=8, color=colour)
            ax.set(xlabel=x, ylabel=y, title=title)
            ax.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label=label)
        figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()


def pictures(found: dict) -> dict[str, bytes]:
    """PNGs by the names of SECTIONS, of what was measured."""
    layers, base = found["layers"], found.get("changed", {}).get("loss")
    names = dict(position="position_lift", coactivation="coactivation")
    names |= dict(source="source_lift") if len(found["data"]) > 1 else {}
    panels = {section: {f"MoE layer {n}": one[name] for n, one in enumerate(layers)}
              for section, name in names.items() if layers[0][name]}  # fmt: skip
    load = {name: np.array([one[name] for one in layers]) for name in ("load", "gate_mass")}
    panels["load"] = {name.replace("_", " "): table * table.shape[1] for name, table in load.items()}
    if base is not None:
        panels["drops"] = {"": [np.array(one["dropped"]) - base for one in layers]}
    made = {}
    for section, tables in panels.items():
        label, x = SECTIONS[section][2:]
        y = dict(y="MoE layer") if section in ("load", "drops") else {}
        x = x.format(sources=", ".join(found["data"]))
        made[section] = heat_maps(tables, label, x, **y, centre=0 if section == "drops" else 1)
    return made


def render(found: dict, images: dict[str, bytes]) -> str:
    """The page, with the pictures in it."""
    data = ", ".join(f"{count:,} tokens of {name}" for name, count in found["data"].items())
    E, K, changed = found["num_experts"], found["num_experts_per_tok"], found.get("changed", {})
    layers = len(found["layers"])
    text = f"Measured on {data}; a token visits {K} of {E} experts in each of the {layers} MoE layers. "
    text += f"The loss is {found['loss']:.4f} nats per token."
    page = f"<h1>What the experts learnt: {escape(printable(found['checkpoint']))}</h1>"
    page += f"<p>{escape(printable(text))}</p>"
    words = found | dict(most=E / K, top=math.log(E), chance=K / E)
    words |= dict(few=changed.get("tokens"), base=changed.get("loss"))
    words["before"] = found["before"] or "an earlier checkpoint"
    words["start"] = found["start"] or "the start of the run"
    html = {"sure": summary(found).to_html(border=0), "tokens": token_tables(found)}
    for name, picture in images.items():
        code = base64.b64encode(picture).decode()
        html[name] = f'<img alt="{SECTIONS[name][0]}" src="data:image/png;base64,{code}">'
    for name, (title, text, *_) in SECTIONS.items():
        if name in html:
            text = escape(printable(" ".join(text.format(**words).split())))
            page += f'<h2>{title}</h2><p>{text}</p><div class="wide">{html[name]}</div>'
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>What the experts learnt</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body>{page}</body></html>"
    )
