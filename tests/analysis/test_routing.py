"""python -m analysis routing: its numbers against counts in plain Python, the page, and what it refuses."""

import itertools
import json
import math
import re
import shutil
import subprocess
from html import escape
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from models import byte_model, chosen, tokens
from processes import flags

import train_gpt_moe
from analysis import routing
from analysis.__main__ import main
from tokens.encodings import get_encoding
from tokens.shards import write_shard

T, E, K = 48, 4, 2
TEXTS = {"one": "Überall ist Text. " * 14, "<b>two</b>": "if x < 3: <i>\x07\x07\n" * 14}
IDS = {name: [256, *text.encode()][: 4 * T + 1] for name, text in TEXTS.items()}
CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def measured(out, *arguments) -> dict:
    """routing.json of this command."""
    assert main(["routing", *map(str, arguments), "--device=cpu", f"--out={out}"]) == 0
    return json.loads((out / "routing.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, what is in its routing.json): a model on two texts, its earlier checkpoint is the same."""
    folder = tmp_path_factory.mktemp("routing")
    saved = byte_model()
    saved.config.output_router_logits = True  # as TRL saves it
    saved.save_pretrained(folder / "model")
    byte_model(use_moe=False).save_pretrained(folder / "dense")
    byte_model(num_experts=3).save_pretrained(folder / "other")
    data = []
    for number, (name, text) in enumerate(TEXTS.items()):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        data.append(f"{name}={folder}/{number}.txt")
    model, count = folder / "model", len(IDS) * 4 * T
    more = ["--before", model, "--tokens", count, "--drop_tokens", count]
    return folder, measured(folder / "out", model, "--data", *data, *more)


def forward(hook=None) -> tuple[float, list]:
    """The loss on IDS by hand, and the inputs (N, C) of each router. hook(layer number, logits) -> logits."""
    model, inputs, total = byte_model(), [[], []], 0.0
    for n, moe in enumerate(model.moe_layers()):
        moe.gate.register_forward_hook(lambda gate, args, out, n=n: inputs[n].append(args[0]))
        moe.gate.register_forward_hook(lambda gate, args, out, n=n: hook(n, out) if hook else out)
    with torch.no_grad():
        for ids in IDS.values():
            x = torch.tensor(ids)
            logits = model(x[:-1].view(-1, T)).logits.double()
            total += F.cross_entropy(logits.flatten(0, 1), x[1:], reduction="sum").item()
    return total / sum(len(ids) - 1 for ids in IDS.values()), [torch.cat(parts) for parts in inputs]


def best(layer: int, x) -> tuple[list, list]:
    """Of each token the K best experts, and the logits, as lists."""
    logits = (x.float() @ byte_model().moe_layers()[layer].gate.weight.T).tolist()
    return [sorted(range(E), key=lambda e: -row[e])[:K] for row in logits], logits


def test_counts_are_those_of_plain_python(made):
    loss, inputs = forward()
    assert made[1]["loss"] == pytest.approx(loss, abs=1e-5)
    labels = {"token": [i for ids in IDS.values() for i in ids[:-1]],
              "source_lift": [n for n, ids in enumerate(IDS.values()) for _ in ids[:-1]]}  # fmt: skip
    N = len(labels["token"])
    labels["position_lift"] = [n % T * 8 // T for n in range(N)]
    chance = torch.Generator().manual_seed(routing.SEED)
    noise = [[torch.randn(4 * T, x.shape[1], generator=chance) for x in inputs] for _ in IDS]
    for n, (found, x) in enumerate(zip(made[1]["layers"], inputs, strict=True)):
        taken, logits = best(n, x)
        rows = [sum(e in row for row in taken) for e in range(E)]
        assert found["load"] == pytest.approx([count / (N * K) for count in rows])
        probs = [[math.exp(value) for value in row] for row in logits]
        pairs = [*zip(taken, probs, strict=True)]
        mass = [sum(p[e] / sum(p[i] for i in row) for row, p in pairs if e in row) / N for e in range(E)]
        assert found["gate_mass"] == pytest.approx(mass, abs=1e-5)
        entropy = -sum(q / sum(p) * math.log(q / sum(p)) for p in probs for q in p) / N
        spread = -sum(load * math.log(load) for load in found["load"])
        values = [found[name] for name in ("entropy", "load_entropy", "effective_experts")]
        assert values == pytest.approx([entropy, spread, math.exp(spread)], abs=1e-5)

        def lift(e, name, value, taken=taken, rows=rows):
            both = sum(e in row and label == value for row, label in zip(taken, labels[name], strict=True))
            return both / rows[e] / (labels[name].count(value) / N)

        for e in range(E):
            for name in ("position_lift", "source_lift"):
                expected = [lift(e, name, value) for value in range(len(set(labels[name])))]
                assert found[name][e] == pytest.approx(expected)
            frequent = [t for t in set(labels["token"]) if labels["token"].count(t) >= routing.MIN_COUNT]
            expected = sorted((lift(e, "token", t) for t in frequent), reverse=True)[: routing.TOP]
            listed = found["top_tokens"][e]
            assert [t["lift"] for t in listed] == pytest.approx([value for value in expected if value])
            assert all(t["lift"] == pytest.approx(lift(e, "token", t["id"])) for t in listed)
            assert all(t["share"] == t["rows"] / labels["token"].count(t["id"]) for t in listed)

        pairs = itertools.permutations(range(E), 2)
        both = {(i, j): sum(i in row and j in row for row in taken) for i, j in pairs}
        scale = sum(both.values()) / sum(rows[i] * rows[j] for i, j in both)
        for (i, j), count in both.items():
            assert found["coactivation"][i][j] == pytest.approx(count / (rows[i] * rows[j] * scale))
        noisy = x + 0.01 * x.square().mean(1, keepdim=True).sqrt() * torch.cat([part[n] for part in noise])
        for name, other in (("stays_bf16", x.bfloat16()), ("stays_noise", noisy)):
            stay = sum(len({*a} & {*b}) for a, b in zip(taken, best(n, other)[0], strict=True))
            assert found[name] == pytest.approx(stay / (N * K))
        assert found["saturation"] == 1.0


def test_losses_are_those_of_a_forward_with_masked_logits(made):
    every = made[1]["changed"]
    for n, found in enumerate(made[1]["layers"]):
        masks = [torch.arange(E) == e for e in range(E)]
        hooks = [lambda at, out, m=m, n=n: out.masked_fill(m, -math.inf) if at == n else out for m in masks]
        expected = [forward(hook)[0] for hook in hooks]
        assert found["dropped"] == pytest.approx(expected, abs=1e-5) and min(expected) != every["loss"]
        assert found["start_router"] == every["start_router"] == every["loss"] != found["random"]


def test_random_experts_and_one_that_is_left_out_despite_its_bias():
    layer, logits = byte_model().moe_layers()[0], torch.randn(400, E)
    weights = chosen(layer, logits)[1]
    with routing.patched([layer], route=routing.at_random()):
        experts, same, _ = chosen(layer, logits)
    assert torch.equal(weights, same) and all(len(set(row)) == K for row in experts.tolist())
    assert (torch.bincount(experts.flatten(), minlength=E) - 200).abs().max() < 50
    layer.router_bias[2] = 5.0
    assert (chosen(layer, logits)[0] == 2).any(1).all()
    with routing.patched([layer], route=routing.without(2)):
        assert not (chosen(layer, logits)[0] == 2).any() and layer.router_bias[2] == 5.0


def test_the_layers_are_as_before_also_after_an_error():
    model, x = byte_model(), tokens(2, T)
    before = model(x).logits
    layers, failing = model.moe_layers(), lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError), routing.patched(layers, failing, routing.at_random()):
        model(x)
    ids = {"": x.flatten().numpy()}
    routing.record(model, ids, T, 2)
    routing.add_losses({"layers": [{}, {}], "num_experts": E}, model, byte_model(), ids, T, 2)
    assert torch.equal(model(x).logits, before)
    assert not any(layer.gate._forward_hooks or "route" in vars(layer) for layer in layers)


@pytest.mark.parametrize("encoding", ["none", "gpt2"])
def test_ids_without_text_have_numbers_for_names(encoding, tmp_path, monkeypatch):
    """Without network there is no text of GPT-2's ids."""
    monkeypatch.setattr("tiktoken.get_encoding", Mock(side_effect=ConnectionError("no route")))
    get_encoding.cache_clear()
    byte_model(encoding=encoding).save_pretrained(tmp_path / "model")
    (tmp_path / "ids").mkdir()
    write_shard(tmp_path / "ids" / "val_000000.bin", np.arange(2 * T + 1, dtype=np.uint16) % 3)
    words = "--data", tmp_path / "ids", "--tokens", 2 * T, "--drop_tokens", T
    found = measured(tmp_path, tmp_path / "model", *words)["layers"][0]["top_tokens"]
    assert {top["text"] for each in found for top in each} == {"token 0", "token 1", "token 2"}
    assert "the router is that of the start of the run." in (tmp_path / "routing.html").read_text()


def test_the_validation_data_of_a_run_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "val_000000.bin", np.arange(9, dtype=np.uint16))
    model, pattern = byte_model(encoding="none"), "b/val_*.bin"
    for settings, found in (
        (dict(data_dir="a"), ["a"]), (dict(data_dir="a:0.7,b:0.3"), ["a", "b"]),
        (dict(data_dir="a", input_val_bin=pattern), [pattern]),
    ):  # fmt: skip
        assert list(routing.find_data([], settings, model)) == found
    refuses("--data PATH", routing.find_data, [], dict(data_dir="a", input_val_bin="c/*.bin"), model)


@pytest.mark.slow
def test_a_run_that_learns_nothing_agrees_with_its_start(data, tmp_path):
    """Its data and its start, made from the seed, are found by themselves."""
    still = "--max_lr 0 --min_lr 0 --router_bias_update_rate 0 --max_steps 1 --warmup_steps 0".split()
    assert train_gpt_moe.main(flags(data, tmp_path / "log", *still)) == 0
    latest = str(tmp_path / "log" / "latest")
    assert main(["routing", latest, "--tokens=512", "--drop_tokens=256", "--device=cpu"]) == 0
    found = json.loads((tmp_path / "log" / "routing" / "routing.json").read_text())
    assert found["data"] == {data: 512} and "seed" in found["start"] and found["start"] == found["before"]
    assert [layer["saturation"] for layer in found["layers"]] == [1.0, 1.0]
    assert found["changed"]["start_router"] == found["changed"]["loss"]


def test_the_page_has_every_text_escaped_and_needs_no_network(made):
    page = (made[0] / "out" / "routing.html").read_text()
    assert "&lt;b&gt;two&lt;/b&gt;" in page
    tops = [top for layer in made[1]["layers"] for each in layer["top_tokens"] for top in each]
    cells = {f"<td>{escape(top['text'])} {top['lift']:.1f}x {top['share']:.0%}</td>" for top in tops}
    assert all(cell in page for cell in cells) and {cell[:8] for cell in cells} >= {r"<td>\x07", "<td>&lt;"}
    assert not re.search(r"<b>|<i>|<script|https?:|[\x00-\x08\x0b-\x1f]|url\(|@import|<p>[^<]*\\n", page)
    pictures = {path.stem for path in (made[0] / "out").glob("*.png")}
    assert pictures == {"load", "position", "source", "coactivation", "drops"}
    assert page.count("data:image/png;base64,") == len(pictures)


@pytest.mark.skipif(CHROME is None, reason="needs chromium or google-chrome")
def test_a_browser_opens_the_page_without_errors(made, tmp_path):
    off = "gpu quic background-networking component-update sync".split()
    words = [CHROME, "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr", "--dump-dom",
             *(f"--disable-{name}" for name in off), f"--user-data-dir={tmp_path}"]  # fmt: skip
    page = (made[0] / "out" / "routing.html").as_uri()
    done = subprocess.run([*words, page], capture_output=True, text=True, timeout=300)
    assert "how sure the routers are" in done.stdout and "CONSOLE" not in done.stderr, done.stderr


def test_what_is_refused(made, refused, tmp_path):
    model, text = made[0] / "model", f"{made[0]}/0.txt"
    for arguments, words in (
        ((made[0] / "dense",), "use_moe=False"), ((model, "--tokens=0"), "--tokens 0"),
        ((model, "--data", text, "--before", made[0] / "other"), "num_experts;"),
        ((model, "--data", text, text), "NAME=PATH"),
        ((model, "--data", f"x={tmp_path}/none"), "none"), ((tmp_path / "none.pt",), "none.pt"),
    ):  # fmt: skip
        assert words in refused(main, "routing", *arguments)
