"""What the experts of a checkpoint have learnt: a page, pictures and JSON.

For every MoE layer it counts which experts the router chooses for the tokens of a text. Then it measures the
loss without each expert, with random experts, and with the router of the run's start.

Sources: OLMoE (arXiv 2409.02060, section 5): saturation, co-activation, specialisation by domain and token.
FLAME-MoE (arXiv 2505.20225): the same in the course of training. ST-MoE (arXiv 2202.08906): low precision.
Letters: N tokens, E experts, K experts per token, T tokens of a window."""

import argparse
import contextlib
import glob
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

NOISE = 0.01  # of a router's input, relative to its rms
SEED = 0  # of the noise and of random experts
BUCKETS = 8  # parts of a window, for the lift by position
SHAPE = "use_moe num_experts num_experts_per_tok moe_every n_layer n_embd vocab_size block_size".split()
TOP, MIN_COUNT = 8, 20  # tokens listed for an expert; rarer ones are left out, because chance would list them


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="a checkpoint with experts, log/latest, or an exported folder")
    text = "text files or folders of shards; several are compared (default: the run's validation data)"
    parser.add_argument("--data", nargs="+", default=[], metavar="[NAME=]PATH", help=text)
    parser.add_argument("--before", default="", help="an earlier checkpoint; empty = the run's first one")
    parser.add_argument("--out", default="", help="folder to write; empty = routing/ beside the checkpoint")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens whose routing is counted")
    parser.add_argument("--drop_tokens", type=int, default=16384, help="tokens for the losses; 0 = no losses")
    parser.add_argument("--B", type=int, default=8, help="windows at a time")
    parser.add_argument("--device", default="", help="cuda, mps, cpu; empty = the best there is")


@contextlib.contextmanager
def patched(layers: list, hook: Callable | None = None, route: Callable | None = None) -> Iterator[None]:
    """Within the block, hook(layer, x, logits) sees the input (N, C) and the logits (N, E) of each router and
    may return other logits; route(layer, logits) replaces MoE.route. Afterwards the layers are as before."""
    with contextlib.ExitStack() as undo:
        for layer in layers:
            if hook is not None:
                look = lambda gate, args, logits, layer=layer: hook(layer, args[0], logits)  # noqa: E731
                undo.enter_context(layer.gate.register_forward_hook(look))
            if route is not None:
                layer.route = partial(route, layer)
                undo.callback(delattr, layer, "route")  # the method of the class is visible again
        yield


def choices(layer, logits) -> tuple:
    """Experts and weights of each token, (N, K), best expert first, and the probabilities (N, E)."""
    routing, probs = type(layer).route(layer, logits)
    rows = routing.expert.long(), routing.weight
    return *(row[routing.position].view(-1, routing.per_token) for row in rows), probs


def without(expert: int) -> Callable:
    """A route for `patched` that never uses this expert: the K best of the others replace it."""

    def route(layer, logits):
        bias, column = layer.router_bias, logits.new_tensor([expert]).long()
        layer.router_bias = bias.index_fill(0, column, -math.inf)  # it could choose a score of 0
        try:
            return type(layer).route(layer, logits.index_fill(1, column, -math.inf))
        finally:
            layer.router_bias = bias

    return route


def at_random() -> Callable:
    """A route for `patched` with K random experts per token, all equally likely, and the router's weights."""
    import torch

    from layers.experts import dispatch

    chance = torch.Generator().manual_seed(SEED)

    def route(layer, logits):
        expert, weight, probs = choices(layer, logits)
        order = torch.rand(probs.shape, generator=chance).argsort(1).to(expert.device)  # (N, E)
        return dispatch(order[:, : expert.shape[1]], weight, layer.num_experts), probs

    return route


def agreement(chosen, other) -> float:
    """The share of the chosen experts (N, K) that are also in `other` (N, K), in any order."""
    return (chosen[:, :, None] == other[:, None, :]).any(2).mean(dtype=float).item()


def lift(chosen: np.ndarray, label: np.ndarray, E: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each expert with each label, (E, labels), and their lift P(label | expert) / P(label), NaN
    where an expert or a label has no rows. chosen (N, K); label (N,), the token's, from 0."""
    occurs = np.bincount(label)
    cells = (chosen.astype(np.int64) * len(occurs) + label[:, None]).ravel()
    counts = np.bincount(cells, minlength=E * len(occurs)).reshape(E, -1)
    with np.errstate(invalid="ignore"):
        return counts, counts / counts.sum(1, keepdims=True) / (occurs / len(label))


def coactivation(chosen: np.ndarray, E: int) -> np.ndarray:
    """(E, E) tokens that choose both experts, over the number that the loads let expect; NaN on the diagonal.
    The expected numbers are proportional to n_i n_j and have the sum of the observed ones."""
    used = np.zeros((len(chosen), E), dtype=np.float32)
    np.put_along_axis(used, chosen.astype(np.int64), 1, axis=1)
    pairs, rows = (used.T @ used).astype(float), used.sum(0, dtype=float)
    expected = np.outer(rows, rows)
    np.fill_diagonal(pairs, 0)
    np.fill_diagonal(expected, 0)
    with np.errstate(invalid="ignore"):
        return pairs / expected * (expected.sum() / pairs.sum())


def mean_loss(model, parts: dict[str, np.ndarray], T: int, B: int) -> float:
    """The loss of all parts together, nats per token."""
    from analysis.evaluate import measure

    losses = [measure(model, ids, T, B, "float32") for ids in parts.values()]
    return float(np.average(losses, weights=[len(ids) - 1 for ids in parts.values()]))


def record(model, parts: dict[str, np.ndarray], T: int, B: int) -> tuple[float, list[dict[str, Any]]]:
    """The loss, and per MoE layer: chosen (N, K); mass (E,), means of the experts' weights; entropy of the
    router's probabilities, nats, mean over tokens; stays_bf16 and stays_noise, the shares of choices that
    stay when the router's input is rounded to bf16, or gets NOISE of its rms as noise."""
    import torch

    layers, chance = model.moe_layers(), torch.Generator().manual_seed(SEED)
    sums = ("mass", "entropy", "stays_bf16", "stays_noise")
    found = {layer: {"chosen": [], **dict.fromkeys(sums, 0.0)} for layer in layers}

    def look(layer, x, logits):
        into, (expert, weight, probs) = found[layer], choices(layer, logits)
        noise = torch.randn(x.shape, generator=chance).to(x.device)
        noisy = x.float() + NOISE * x.float().square().mean(1, keepdim=True).sqrt() * noise
        chosen = expert.short().cpu().numpy()
        for name, other in (("stays_bf16", x.bfloat16()), ("stays_noise", noisy)):
            moved = choices(layer, layer.gate.forward(other))[0]  # forward: without this hook
            into[name] += agreement(chosen, moved.cpu().numpy()) * len(x)
        into["entropy"] -= torch.special.xlogy(probs, probs).sum().item()
        into["mass"] += np.bincount(chosen.ravel(), weight.flatten().cpu(), layer.num_experts)
        into["chosen"].append(chosen)

    with patched(layers, look):
        loss = mean_loss(model, parts, T, B)
    for into in found.values():
        into["chosen"] = np.concatenate(into["chosen"])
        into |= {name: into[name] / len(into["chosen"]) for name in sums}
    return loss, list(found.values())


def describe(seen: dict, parts: dict[str, np.ndarray], T: int, E: int, encoding: str) -> dict:
    """One layer in routing.json, from what `record` has of it."""
    chosen, mass = seen.pop("chosen"), seen.pop("mass")
    token = np.concatenate([ids[:-1] for ids in parts.values()]).astype(np.int64)  # (N,)
    source = np.repeat(np.arange(len(parts)), [len(ids) - 1 for ids in parts.values()])
    position = np.arange(len(token)) % T * BUCKETS // T  # every part has whole windows
    counts, lifts = lift(chosen, token, E)
    occurs, load, top = np.bincount(token), counts.sum(1) / chosen.size, []
    for count, lifted in zip(counts, lifts, strict=True):
        known = np.flatnonzero((occurs >= MIN_COUNT) & (count > 0))
        best = sorted(known.tolist(), key=lambda t: (-lifted[t], -count[t], t))[:TOP]
        top.append([{"id": t, "text": token_name(t, encoding), "lift": float(lifted[t]),
                     "rows": int(count[t]), "share": float(count[t] / occurs[t])} for t in best])  # fmt: skip
    entropy = -float((load[load > 0] * np.log(load[load > 0])).sum())
    return seen | {
        "load": load.tolist(), "gate_mass": (mass / mass.sum()).tolist(), "max_load": float(load.max()) * E,
        "load_entropy": entropy, "effective_experts": math.exp(entropy), "top_tokens": top,
        "position_lift": lift(chosen, position, E)[1].tolist(),
        "source_lift": lift(chosen, source, E)[1].tolist(),
        "coactivation": coactivation(chosen, E).tolist() if chosen.shape[1] > 1 else None,
    }  # fmt: skip


def add_losses(found: dict, model, start, parts: dict[str, np.ndarray], T: int, B: int) -> None:
    """Add losses, nats per token, with the routing changed in one layer or in all: `random`; `start_router`
    with router and bias of the model `start`, if it is not None; in one layer also `dropped` (E,)."""
    layers = model.moe_layers()
    twin = dict(zip(layers, start.moe_layers(), strict=True)) if start else {}

    def loss(some: list, hook: Callable | None = None, route: Callable | None = None) -> float:
        with patched(some, hook, route):
            return mean_loss(model, parts, T, B)

    every = found["changed"] = {"tokens": sum(len(ids) - 1 for ids in parts.values()), "loss": loss([])}
    cases = [(into, [layer]) for into, layer in zip(found["layers"], layers, strict=True)]
    for into, some in [*cases, (every, layers)]:
        into["random"] = loss(some, route=at_random())
        if twin:
            theirs = lambda layer, x, logits: twin[layer].gate.forward(x)  # noqa: E731
            into["start_router"] = loss(some, theirs, lambda layer, logits: twin[layer].route(logits))
    for into, some in cases:
        into["dropped"] = [loss(some, route=without(expert)) for expert in range(found["num_experts"])]


def token_name(token: int, encoding: str) -> str:
    """A token's text as it can be shown: escapes for control characters, ␣ for spaces."""
    from tokens.encodings import load_encoding
    from tokens.printable import printable

    try:
        raw = load_encoding(encoding).decode_single_token_bytes(token)
    except (KeyError, ValueError):  # the vocabulary is padded, or has no text
        return f"token {token}"
    return printable(raw.decode("utf-8", "backslashreplace")).replace(" ", "␣")


def find_data(words: list[str], settings: dict, model) -> dict[str, np.ndarray]:
    """Token ids by source. Without words: the validation data of the run, or else the demo corpus."""
    from analysis.evaluate import read_for
    from tokens.demo import demo_documents
    from tokens.encodings import encode_pieces
    from tokens.mixtures import parse_mixture

    if not words:
        pattern, folders = (str(settings.get(name) or "") for name in ("input_val_bin", "data_dir"))
        places = [pattern] if pattern else parse_mixture(folders)
        words = [place for place in places if os.path.exists(place) or glob.glob(place)]
    named = [("", word) if os.path.exists(word) else word.rpartition("=")[::2] for word in words]
    parts = {name or place: read_for(model, place) for name, place in named}
    if len(parts) < len(words):
        raise ValueError(f"--data {' '.join(words)}: two have one name; give each its own, as NAME=PATH")
    if not parts and model.config.encoding == "bytes":
        parts["demo corpus"] = encode_pieces([(True, text) for text in demo_documents()], "bytes")
    if not parts:
        raise ValueError("the run's validation data is not there; name a text or shards with --data PATH")
    return parts


def find_earlier(before: str, path: Path, settings: dict, resumed_at, model) -> list[tuple[str, Any]]:
    """[(name, model) before, (name, model) at the start]. `before`, or else the first checkpoint in the run's
    folder; the start is made again from the run's seed, unless the run began from other weights or was
    resumed (its settings then do not tell). If one is missing, the other stands for it, or ("", None)."""
    import torch

    from training.checkpoints import list_checkpoints, load_model

    found, listed = {}, list_checkpoints(path.parent)  # newest first
    if before or path in listed[:-1]:
        before = before or str(listed[-1])
        found[before] = earlier = load_model(before).to(model.device)
        if unlike := [name for name in SHAPE if getattr(model.config, name) != getattr(earlier.config, name)]:
            problem = f"--before {before} has another {', '.join(unlike)}"
            raise ValueError(f"{problem}; give a checkpoint of this run")
    if resumed_at == 0 and type(settings.get("seed")) is int and not settings.get("init_from"):
        with torch.random.fork_rng():
            torch.manual_seed(settings["seed"])
            start = type(model)(model.config).eval().to(model.device)
        found[f"the start, seed {settings['seed']}"] = start
    both = list(found.items()) or [("", None)]
    return [both[0], both[-1]]


def analyse(options: argparse.Namespace, path: Path, model) -> dict:
    """Everything in routing.json. Raises ValueError, OSError, FloatingPointError."""
    from tokens.encodings import get_encoding
    from training.log import read_record

    config, file = model.config, path.parent / "run.json"
    run = read_record(file.read_bytes()) if file.is_file() else {}
    settings = run["config"] if isinstance(run.get("config"), dict) else {}
    parts = find_data(options.data, settings, model)
    earlier = find_earlier(options.before, path, settings, run.get("first_step"), model)
    (before_name, before), (start_name, start) = earlier
    T = min(config.block_size, *(len(ids) - 1 for ids in parts.values()))
    encoding = config.encoding
    try:
        get_encoding(encoding)
    except ValueError:  # it has no text, or its files cannot be fetched: the page shows ids
        encoding = "none"

    def cut(tokens: int) -> dict[str, np.ndarray]:  # whole windows, and one more token to predict
        share = max(1, tokens // len(parts) // T)
        return {name: ids[: min(share, (len(ids) - 1) // T) * T + 1] for name, ids in parts.items()}

    used, E = cut(options.tokens), config.num_experts
    loss, seen = record(model, used, T, options.B)
    if not math.isfinite(loss):
        raise FloatingPointError(f"{options.model} gives a loss of {loss}: it has diverged")
    for now, then in zip(seen, record(before, used, T, options.B)[1] if before else [], strict=False):
        now["saturation"] = agreement(now["chosen"], then["chosen"])
    found = {
        "checkpoint": str(path), "before": before_name, "start": start_name, "loss": loss, "T": T,
        "data": {name: len(ids) - 1 for name, ids in used.items()},
        "num_experts": E, "num_experts_per_tok": config.num_experts_per_tok,
        "layers": [describe(one, used, T, E, encoding) for one in seen],
    }  # fmt: skip
    if options.drop_tokens and E > 1:
        add_losses(found, model, start, cut(options.drop_tokens), T, options.B)
    return found


def run(options: argparse.Namespace) -> int:
    """Measure, write the files, print a table. Raises ValueError, OSError, FloatingPointError."""
    from analysis.routing_page import pictures, render, summary
    from tokens.files import write_atomically
    from tokens.printable import printable
    from training.checkpoints import follow_latest, load_model
    from training.log import json_safe
    from training.parallel import choose_device

    for name, least in dict(tokens=1, drop_tokens=0, B=1).items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least {least}")
    path, model = follow_latest(options.model), load_model(options.model)
    if not model.moe_layers():
        raise ValueError(f"{options.model} is a dense model (use_moe=False): it has no experts")
    found = json_safe(analyse(options, path, model.to(choose_device(options.device, 0))))
    images = pictures(found)
    out = Path(options.out) if options.out else (path.parent if path.exists() else Path()) / "routing"
    out.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.png": picture for name, picture in images.items()}
    files["routing.json"] = json.dumps(found, indent=1, allow_nan=False).encode()
    files["routing.html"] = render(found, images).encode()
    for name, content in files.items():
        write_atomically(out / name, lambda file, content=content: file.write(content))
    print(summary(found).to_string())
    print(f"page  {printable(out / 'routing.html')}")
    return 0
