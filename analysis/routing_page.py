"""The page and the pictures of `python -m analysis routing`, from the numbers in routing.json.

The page is one file without scripts and without anything from the network: the pictures are data URIs, and
every text is escaped.
"""

import base64
import io
import math
from html import escape

import numpy as np

from tokens.printable import printable

STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 0 1rem 3rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #8883 }
code { background: #8883; padding: 0 .25rem; white-space: pre } summary { cursor: pointer; font-weight: 600 }
td span { white-space: nowrap; margin-right: .7rem } img { max-width: 100%; background: white }"""

# Of each picture or table: its title, and how to read it.
SECTIONS = {
    "load": ("Load", """Load is an expert's share of all assignments, and gate mass its share of the routing
        weights, in fair shares: 1 is an equal share, 0 an idle expert. More mass than load: the router is
        sure of its tokens."""),
    "tokens": ("Tokens", """A token's lift says how much more often this expert computes it than the
        expert's load explains: P(token | expert) / P(token), at most {most:.3g} for an expert with a fair
        load. Below, each token is followed by its lift and the share of its occurrences that this expert
        computes; ␣ is a space. Rare tokens are left out."""),
    "position": ("Position", """The number is the lift of a part of the window of {T} tokens, from its first
        part to its last: near 1, the expert does not care where a token stands. Tokens of the first part
        have little context."""),
    "source": ("Source", """The number is the lift of a source of text: at 2 its tokens come to this expert
        twice as often as the expert's load explains, at 1 the expert does not tell the sources apart."""),
    "coactivation": ("Pairs", """The number says how often two experts compute the same token, relative to
        what their loads explain: above 1 they work together, below 1 they do each other's work and seldom
        meet."""),
    "drops": ("What each expert is worth", """The number is what the loss gains, in nats per token, when
        only the routing changes: one expert is left out and the next best get its tokens, experts are
        random, or the router is that of {start}. 0 means no harm, and the unchanged loss on these {few:,}
        tokens is {base:.4f}."""),
    "sure": ("How sure the routers are", """Effective experts, exp(entropy of the loads), is {num_experts}
        if all loads are equal; the router's entropy is {top:.2f} nats if it prefers no expert, 0 if it is
        certain. Stays: the share of choices that survive when the router's input is rounded to bf16, or
        gets 1% of noise, and that {before} makes too (chance alone gives {chance:.0%})."""),
}  # fmt: skip


def heat_maps(panels: dict, label: str, x: str, y: str = "expert", centre: float = 1, texts=None) -> bytes:
    """A PNG with a heat map of each panel, {title: table (rows, columns)}; `centre` is white, None grey.
    texts: what to write into the cells of each panel, instead of the values."""
    from matplotlib import colormaps, rc_context
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure  # pyplot would open windows and keep figures

    values = np.array(list(panels.values()), dtype=float)  # (panels, rows, columns)
    far = np.nanmax(
        abs(values - centre), initial=centre or 1e-9
    )  # lifts from 0 to 2 at least: chance is pale
    norm = TwoSlopeNorm(centre, 0 if centre else -far, centre + far)
    colours = {"cmap": colormaps["PuOr_r"].with_extremes(bad="#BBBBBB"), "norm": norm, "aspect": "auto"}
    count, rows, columns = values.shape
    written = columns <= 16  # more columns have no room for texts
    size = min(2.5 + (0.7 if written else 0.2) * columns, 30), min(1 + count * (0.8 + 0.28 * rows), 60)
    with rc_context({"text.parse_math": False}):
        figure = Figure(size, dpi=80, layout="constrained")
        axes = figure.subplots(count, squeeze=False)[:, 0]
        for number, (ax, title) in enumerate(zip(axes, panels, strict=True)):
            image = ax.imshow(values[number], **colours)
            for (row, column), value in np.ndenumerate(values[number]) if written else ():
                text = texts[number][row][column] if texts else f"{value:.2f}" if value == value else ""
                colour = "white" if abs(norm(value) - 0.5) > 0.35 else "black"
                ax.text(column, row, text, ha="center", va="center", size=8, color=colour)
            ax.set(xlabel=x, ylabel=y, title=title)
            ax.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label=label)
        figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()


def pictures(found: dict) -> dict[str, bytes]:
    """PNGs by file name, of what was measured."""
    layers, E = found["layers"], found["num_experts"]

    def of_layers(name: str, label: str, x: str) -> bytes:
        return heat_maps({f"MoE layer {n}": one[name] for n, one in enumerate(layers)}, label, x)

    shares = {k.replace("_", " "): np.array([one[k] for one in layers]) * E for k in ("load", "gate_mass")}
    made = {"load": heat_maps(shares, "1 = fair share", "expert", "MoE layer")}
    tops = [[(top + [{}] * 8)[:8] for top in one["top_tokens"]] for one in layers]
    lifts = {f"MoE layer {n}": [[t.get("lift") for t in top] for top in rows] for n, rows in enumerate(tops)}
    plain = lambda text: text.replace("␣", "_").encode("ascii", "backslashreplace")[:10].decode()  # noqa: E731
    texts = [[[plain(t.get("text", "")) for t in top] for top in rows] for rows in tops]
    made["tokens"] = heat_maps(lifts, "lift", "rank of the token", texts=texts)
    made["position"] = of_layers("position_lift", "lift", "part of the window")
    if len(found["data"]) > 1:
        made["source"] = of_layers("source_lift", "lift", f"source: {', '.join(found['data'])}")
    if layers[0]["coactivation"]:
        made["coactivation"] = of_layers("coactivation", "observed / expected", "expert")
    if costs := dropped(found):
        made["drops"] = heat_maps({"": costs}, "added loss, nats", "expert left out", "MoE layer", centre=0)
    return {f"{name}.png": picture for name, picture in made.items()}


def dropped(found: dict) -> list[list[float]]:
    """What the loss gains without each expert, nats, (MoE layers, E); [] if that was not measured."""
    base = found.get("changed", {}).get("loss")
    return [[loss - base for loss in one["dropped"]] for one in found["layers"] if "dropped" in one]


def summary(found: dict) -> list[list[str]]:
    """A table, heads first: how even and how sure each layer's routing is."""
    names = {"stays_bf16": "stays in bf16", "stays_noise": "under noise", "saturation": "since before"}
    names = {name: text for name, text in names.items() if name in found["layers"][0]}
    rows = [["MoE layer", "max load", "effective experts", "entropy", *names.values()]]
    for n, one in enumerate(found["layers"]):
        numbers = max(one["load"]) * len(one["load"]), one["effective_experts"], one["entropy"]
        rows.append([str(n), *map("{:.2f}".format, numbers), *(f"{one[name]:.1%}" for name in names)])
    return rows


def safe(text: str) -> str:
    """HTML that shows any text, with escapes for control characters."""
    return escape(printable(text))


def grid(rows: list[list[str]]) -> str:
    """An HTML table of cells that are HTML; the first row has the heads."""
    text = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows[1:])
    return f'<div class="wide"><table><tr><th>{"</th><th>".join(rows[0])}</th></tr>{text}</table></div>'


def tables(found: dict) -> dict[str, str]:
    """HTML tables by section: the tokens of each expert, losses with changed routing, the summary."""
    token, folded = "<span><code>{}</code> {:.1f}x, {:.0%}</span>".format, ""
    for n, one in enumerate(found["layers"]):
        rows = [["expert", "its most typical tokens"]]
        for e, top in enumerate(one["top_tokens"]):
            rows.append([str(e), " ".join(token(safe(t["text"]), t["lift"], t["share"]) for t in top)])
        folded += f"<details{' open' * (n == 0)}><summary>MoE layer {n}</summary>{grid(rows)}</details>"
    made = {"tokens": folded, "sure": grid(summary(found))}
    if costs := dropped(found):
        every, heads = found["changed"], {"random": "random experts", "start_router": "router of the start"}
        heads = {name: head for name, head in heads.items() if name in every}
        rows = [["MoE layer", "cheapest expert", "dearest expert", *heads.values()]]
        for n, (one, row) in enumerate(zip([*found["layers"], every], [*costs, []], strict=True)):
            changes = (f"{one[name] - every['loss']:+.4f}" for name in heads)
            ends = (f"{row.index(end)}: {end:+.4f}" for end in (min(row), max(row))) if row else ("", "")
            rows.append([str(n) if row else "all together", *ends, *changes])
        made["drops"] = grid(rows)
    return made


def headlines(found: dict) -> list[str]:
    """The facts to know first, as sentences."""
    facts, costs = [], dropped(found)
    best = [(top[0]["lift"], n, e, top[0]["text"]) for n, one in enumerate(found["layers"])
            for e, top in enumerate(one["top_tokens"]) if top]  # fmt: skip
    if best:
        lift, n, e, text = max(best)
        times = f"{lift:.1f} times as often as its load explains"
        facts.append(f"The clearest specialist is expert {e} of layer {n}: it computes “{text}” {times}.")
    if costs:
        n, e = np.unravel_index(np.argmax(costs), np.shape(costs))
        facts.append(
            f"The hardest to replace is expert {e} of layer {n}: {costs[n][e]:+.4f} nats without it."
        )
        loss, random = found["changed"]["loss"], found["changed"]["random"]
        facts.append(
            f"Random experts in all layers raise the loss from {loss:.3f} to {random:.3f} nats per token."
        )
    return facts


def render(found: dict, images: dict[str, bytes]) -> str:
    """The page, with the pictures in it."""
    data = ", ".join(f"{count:,} tokens of {name}" for name, count in found["data"].items())
    layers, html = found["layers"], tables(found)
    E, K = found["num_experts"], found["num_experts_per_tok"]
    text = f"Measured on {data}; a token visits {K} of {E} experts in each of the {len(layers)} MoE layers."
    page = f"<h1>What the experts learnt: {safe(found['checkpoint'])}</h1><p>{safe(text)} "
    page += f"The loss is {found['loss']:.4f} nats per token.</p>"
    page += f"<ul>{''.join(f'<li>{safe(fact)}</li>' for fact in headlines(found))}</ul>"
    changed = found.get("changed", {"tokens": 0, "loss": 0.0})
    words = dict(most=E / K, top=math.log(E), chance=K / E, few=changed["tokens"], base=changed["loss"])
    words |= found | {"before": found["before"] or "an earlier checkpoint"}
    for name, (title, text) in SECTIONS.items():
        if f"{name}.png" in images or name in html:
            page += f"<h2>{title}</h2><p>{safe(' '.join(text.format(**words).split()))}</p>"
        if f"{name}.png" in images:
            code = base64.b64encode(images[f"{name}.png"]).decode()
            page += f'<div class="wide"><img alt="{title}" src="data:image/png;base64,{code}"></div>'
        page += html.get(name, "")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>What the experts learnt</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body>{page}</body></html>"
    )
