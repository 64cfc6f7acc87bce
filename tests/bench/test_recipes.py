"""recipes.py: the data, one step of training, the race, the tables of time_to_loss and moe_pays."""

import sys
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from models import NANOCHAT, NANOGPT, tiny, tokens

from bench import __main__ as bench
from bench import recipes
from bench.models import Nanochat
from model import GPTLMHeadModel

TINY = dict(n_layer=1, n_head=2, n_embd=16, T=16, B=4)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, again and again.\n" * 400)
    return str(path)


@pytest.fixture
def small(monkeypatch):
    """The real recipes at a size that takes no time. Every step takes a second by the recipes' clock."""
    seconds = count(0.0)
    monkeypatch.setattr(recipes, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(recipes, "WINDOWS", 32)
    monkeypatch.setattr(recipes, "ROUNDS", 4)
    monkeypatch.setattr(recipes, "PAYS", recipes.PAYS | TINY)
    monkeypatch.setitem(recipes.RECIPES, "modern-moe", recipes.RECIPES["modern-moe"] | dict(moe_every=1))
    for name in ("SIZES", "RIVALS"):
        monkeypatch.setattr(recipes, name, {k: v | TINY for k, v in getattr(recipes, name).items()})


def test_texts_are_split_and_windows_drawn(text, tmp_path):
    train, val = recipes.split_text(text)
    whole = open(text, "rb").read()
    assert bytes(torch.cat([train, val]).tolist()) == whole and len(val) == len(whole) - len(whole) * 9 // 10
    x, y = recipes.draw_windows(train, 300, 16, torch.Generator().manual_seed(3))
    assert x.shape == y.shape == (300, 16) and x.is_contiguous() and torch.equal(x[:, 1:], y[:, :-1])
    assert all(bytes([*a, b[-1]]) in whole for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert len({tuple(row) for row in x.tolist()}) > 50
    assert torch.equal(x, recipes.draw_windows(train, 300, 16, torch.Generator().manual_seed(3))[0])
    last = recipes.draw_windows(torch.arange(18), 200, 16, torch.Generator())[1]
    assert set(last[:, -1].tolist()) == {16, 17}  # the first window and the last, and none beyond
    (tmp_path / "short.txt").write_text("short")
    refuses(r"short\.txt: 5 bytes are too few", recipes.split_text, str(tmp_path / "short.txt"))


def test_evaluation_is_the_mean_over_all_windows():
    model, (x, y) = GPTLMHeadModel(tiny(use_moe=False)), (tokens(13, 24), tokens(13, 24, seed=1))
    with torch.no_grad():
        logits = model.eval().double()(x).logits
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    one = recipes.Contender("", model.float().train(), None, None, partial(recipes.pair_loss, model))
    found = recipes.validation_loss(one, (x, y), batch=5)
    assert found == pytest.approx(expected, rel=1e-5) and model.training


def test_time_to_loss(text, small, rows_of, tmp_path, capsys):
    for name, source in (("nanoGPT/model.py", NANOGPT), ("nanochat/nanochat/gpt.py", NANOCHAT)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(source)
    command, png = ["time_to_loss", "--text", text], tmp_path / "loss.png"
    others = ["--nanogpt", tmp_path / "nanoGPT", "--nanochat", tmp_path / "nanochat"]
    rows = rows_of(bench.main, *command, "--seconds", 20, "--png", png, *others)
    parts = {"modern": "0.15", "modern-moe": "0.2"}
    names = [f"nanochat, rates x {scale:g}" for scale in recipes.SCALES]
    names += [name for one, part in parts.items() for name in (f"{one}, {part} of the time", one)]
    assert [row["recipe"] for row in rows] == ["nanoGPT", *names] and rows[0]["below nanoGPT"] == "0.000"
    # A step that would pass the seconds that are given is not begun.
    assert [int(row["steps"]) for row in rows] == [19] * 6 + [2, 19, 3, 19]
    assert png.stat().st_size > 10_000 and "number of parameters" not in capsys.readouterr().out
    # without nanoGPT our own is the baseline
    assert bench.main([*command, "--seconds", "4"]) == 0
    assert "| gpt2 | " in capsys.readouterr().out.splitlines()[4]
    assert bench.main(["time_to_loss"]) == 2 and "give --text FILE" in capsys.readouterr().err
    assert bench.main([*command, "--size", "huge"]) == 2 and "4x128, 6x256" in capsys.readouterr().err
    for flag, file in (("--nanogpt", "model.py"), ("--nanochat", "nanochat/gpt.py")):
        assert bench.main([*command, flag, str(tmp_path)]) == 2
        assert f"has no {file}; git clone" in capsys.readouterr().err


def test_nanochat_follows_its_schedules(tmp_path):
    """Rates rise in 40 steps, and fall to a twentieth in the last 65%. Momentum and decay are Muon's."""
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "gpt.py").write_text(NANOCHAT)
    sys.modules.pop("nanochat.gpt", None), sys.modules.pop("nanochat", None)
    nanochat = Nanochat(str(tmp_path), torch.device("cpu"), 0.5, vocab_size=97, n_head=2, n_kv_head=2)
    for step in (0, 39, 200, 350, 1000):
        nanochat.step(tokens(2, 8), tokens(2, 8, seed=1), step, 1000)
    seen = sys.modules["nanochat.gpt"].SEEN
    assert [group["initial_lr"] for group in seen[0]] == [0.004, 0.15, 0.01, 0.25, 0.01]
    shares = [groups[1]["lr"] / 0.15 for groups in seen]
    assert shares == pytest.approx([1 / 40, 1, 1, 1, 0.05])
    momenta = [groups[-1]["momentum"] for groups in seen]
    assert momenta == pytest.approx([0.85, 0.85 + 0.12 * 39 / 400, 0.91, 0.955, 0.9])
    assert [seen[step][-1]["weight_decay"] for step in (0, -1)] == pytest.approx([0.28, 0])
    assert seen[0][0]["momentum"] == 0


def test_the_rivals_have_equal_active_parameters(text):
    train, _ = recipes.split_text(text)
    rivals = recipes.RIVALS.items()
    dense, *experts = (recipes.build_ours(name, fields, train, 257, 1).model for name, fields in rivals)
    for model in experts:
        assert model.get_num_active_params() == pytest.approx(dense.get_num_active_params(), rel=0.002)
        assert len(model.moe_layers()) == 4 and not dense.moe_layers()


def test_moe_pays(text, small, short_demo, rows_of):
    dense, experts, fine = rows_of(bench.main, "moe_pays", "--text", text, "--steps", 8, "--seeds", 2)
    assert [row["model"] for row in (dense, experts, fine)] == list(recipes.RIVALS)
    assert dense["tokens"] == experts["tokens"] == "512" and dense["mean: below dense"] == "0.000 ± 0.000"
    for row in (dense, experts, fine):
        parts = [float(row[name].split(" ± ")[0]) for name in ("embedded corpus", "input.txt", "mean")]
        assert parts[2] == pytest.approx((parts[0] + parts[1]) / 2, abs=2e-3) and parts[2] < 6
    in_time = [float(row["mean: below dense in its seconds"].split()[0]) for row in (dense, experts, fine)]
    assert recipes.mean_and_spread([2]) == "2.000"  # the deviation of one seed is unknown
    assert in_time[0] == 0 and abs(in_time[1] - float(experts["mean: below dense"].split()[0])) < 0.5
    difference = float(dense["mean"].split()[0]) - float(experts["mean"].split()[0])
    assert float(experts["mean: below dense"].split()[0]) == pytest.approx(difference, abs=2e-3)
