"""The picture of a run: what is read from logs good and bad, and what is drawn."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, refuses
from processes import full_disk, metrics

import plot_log

BATCH = 524288  # tokens of a step


def write_log(folder: Path, records: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


def fake_log(folder: Path, steps: int, experts: int = 8, vocab: int | None = 50304) -> Path:
    """A log like a real run's; expert 2 of layer 1 starves half-way. No experts: a dense model."""
    rng, lr, records = np.random.default_rng(0), 1e-3 if experts else 2e-3, []
    config = dict(total_batch_size=BATCH, vocab_size=vocab, log_dir=folder.name, max_lr=lr, min_lr=lr / 10)
    config |= dict(use_moe=experts > 0, num_experts=experts, num_experts_per_tok=2)
    for step in range(steps + 1):
        done, record = step / steps, {"step": step, "elapsed_s": 0.5 * step}
        loss = 3.05 + 4.7 * math.exp(-100 * done) + 3.1 * (1 + 300 * done) ** -0.55
        if step < steps:  # the last visit only evaluates
            record |= dict(loss=loss + rng.normal(0, 0.03), lr=1 - done, norm=1, tok_per_s=1e6, mfu=0.42)
        if step % max(1, steps // 20) == 0:
            record |= dict(val_loss=loss + 0.01, hella_acc=0.24, hella_acc_norm=0.25 + 0.07 * done)
            if experts:
                share = np.exp(rng.normal(0, 0.8 - 0.7 * done, (4, experts)))
                share[1, 2] *= 1e-3 if done > 0.5 else 1
                share /= share.sum(1, keepdims=True)
                record |= dict(expert_load=share.tolist(), max_load=share.max() * experts, router_entropy=1)
                record |= dict(starved=(share < 0.1 / experts).mean(), balance_loss=4, z_loss=0.02)
        records.append(record)
    write_log(folder, records)
    (folder / "run.json").write_text(json.dumps({"config": config}))
    return folder


def draw(*folders, x="step"):
    """{panel title up to a colon: axes}, and the figure; writes no file."""
    with mock.patch.object(plot_log, "save_picture") as save:
        plot_log.plot_runs([str(folder) for folder in folders], x=x)
    fig, _path = save.call_args.args
    return {ax.get_title(loc="left").split(":")[0]: ax for ax in fig.axes}, fig


@pytest.fixture
def moe(tmp_path) -> Path:
    return fake_log(tmp_path / "moe", steps=400)


def points(ax, label: str = "") -> np.ndarray:
    """x and y (n, 2) of the line with this label, by default of the first."""
    return next(line for line in ax.lines if str(line.get_label()).startswith(label)).get_xydata()


def by_label(fig, label: str):
    return next(ax for ax in fig.axes if ax.get_ylabel() == label)


def test_the_losses_of_named_validation_sets_are_drawn(tmp_path):
    rows = [dict(step=i, loss=3.0 - i, val_loss=3.1 - i, **{"val_loss/web": 3.2 - i}) for i in range(3)]
    axes, _ = draw(write_log(tmp_path, rows))
    assert points(axes["Loss"], "validation web")[:, 1].tolist() == [3.2, 2.2, pytest.approx(1.2)]
    assert points(axes["Loss"], "validation")[0, 1] == 3.1


def test_command_line_draws_without_pyplot_and_torch(tmp_path):
    """A training script can import plot_log, which loads matplotlib only when it draws."""
    import matplotlib.font_manager  # noqa: F401 - a slow machine's first process tells that it makes a cache

    fake_log(tmp_path / "log", steps=5)
    code = """
import sys, plot_log
assert not {"matplotlib", "torch"} & set(sys.modules)
code = plot_log.main(["log/", "--format", "svg", "--x", "tokens"])
assert "matplotlib" in sys.modules and not {"matplotlib.pyplot", "torch", "model"} & set(sys.modules)
sys.exit(code)"""
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "log/training.svg\n", "")
    picture = (tmp_path / "log" / "training.svg").read_bytes()
    assert picture.startswith(b"<?xml") and len(picture) > 10_000


def test_a_folder_without_a_log_and_wrong_arguments(moe, tmp_path, refused):
    """test_printed.py runs the command that the error names."""
    (tmp_path / "none").mkdir()
    for given in ([tmp_path / "none"], [moe, tmp_path / "nowhere"], [moe, tmp_path / "no*match"]):
        assert f"{given[-1]}: no metrics.jsonl" in refused(plot_log.main, *given)
    assert len(os.listdir(moe)) == 2
    assert "it is a file; name the run's folder" in refused(plot_log.main, __file__)


def test_a_folder_of_runs_and_patterns_are_arguments(tmp_path, capsys):
    runs = [str(write_log(tmp_path / name, [{"step": 0, "loss": 3.0}])) for name in ("lr_1", "lr_2", "x")]
    (tmp_path / "data").mkdir()  # a shell expands a pattern to everything
    (tmp_path / "runs.png").touch()
    every, pattern = sorted(str(path) for path in tmp_path.iterdir()), f"{tmp_path}/lr_*"
    cases = ([str(tmp_path)], runs), ([pattern], runs[:2]), (every, runs), ([runs[1], pattern], runs[1::-1])
    cases = *cases, ([runs[0], f"{runs[0]}/"], runs[:1])
    for given, found in cases:
        assert plot_log.find_runs(given)[0] == found, given
    assert plot_log.main(every) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/runs.png"


def test_panels_with_data_are_drawn_and_others_left_out(moe, tmp_path):
    axes, fig = draw(moe)
    assert list(axes) == ["Loss", "HellaSwag", "", "Optimizer", "Throughput", "Expert balance", "Router",
                          "Expert load at step 400", "Expert load over time, a row per expert"]  # fmt: skip
    labels = {"learning rate", "gradient norm", "tokens/s", "MFU", "max / mean load", "starved experts"}
    labels |= {"acc_norm", "acc", "entropy", "balance loss", "z-loss"}
    assert labels <= {ax.get_ylabel() for ax in fig.axes}
    for text in ("moe", "num_experts 8", "step 400", "HellaSwag 3"):
        assert text in fig.get_suptitle()
    axes, _ = draw(fake_log(tmp_path, steps=40, experts=0))
    assert list(axes) == ["Loss", "HellaSwag", "", "Optimizer", "Throughput"]
    write_log(tmp_path, [{"step": 0, "loss": 5.0}, {"step": 1, "loss": 4.0}])
    assert list(draw(tmp_path)[0]) == ["Loss"]


def test_curves_are_the_logs_numbers(moe):
    axes, fig = draw(moe)
    rows, loss = metrics(moe), axes["Loss"]
    for line, name in ((points(loss), "loss"), (points(loss, "validation"), "val_loss"),
                       (points(axes["HellaSwag"]), "hella_acc_norm"),
                       (points(by_label(fig, "max / mean load")), "max_load")):  # fmt: skip
        expected = [(row["step"], row[name]) for row in rows if name in row]
        np.testing.assert_array_equal(line, expected, err_msg=name)
    low, high = loss.get_ylim()
    assert low < points(loss)[:, 1].min()
    assert points(loss, "validation")[1:, 1].max() < high < 10  # the fall of the first steps is cut off


def test_loads_are_drawn_in_fair_shares_and_starved_experts_are_marked(moe):
    axes, fig = draw(moe)
    now = axes["Expert load at step 400"]
    shares = np.array(metrics(moe)[-1]["expert_load"])
    np.testing.assert_allclose(now.collections[0].get_array().reshape(4, 8), shares * 8)
    crosses = [text.get_position() for text in now.texts if text.get_text() == "x"]
    assert crosses == [(2.5, 1.5)] and len(now.texts) == 32  # expert 2 of layer 1, middle of its cell
    assert len([ax for ax in fig.axes if ax.get_label() == "<colorbar>"]) == 1
    starved = points(by_label(fig, "starved experts"))[:, 1]
    assert starved[-1] == 1 / 32 and starved[len(starved) // 2 - 2] == 0


def test_other_axes(moe):
    cases = dict(tokens=(BATCH, "training tokens"), time=(0.5 / 60, "minutes of training"))
    for x, (per_step, label) in cases.items():
        loss = draw(moe, x=x)[0]["Loss"]
        np.testing.assert_allclose(points(loss)[:, 0], np.arange(400) * per_step, err_msg=x)
        assert loss.get_xlabel() == label and loss.xaxis.get_major_formatter()(2.5e9, 0) == "2.5B"


def test_smoothing_against_a_plain_loop(tmp_path):
    y = np.random.default_rng(0).normal(size=700)
    half = [min(i // 6, 1 + 700 // 60) for i in range(700)]
    medians = [np.median(y[i - half[i] : i + half[i] + 1]) for i in range(700)]
    write_log(tmp_path, [{"step": step, "loss": loss} for step, loss in enumerate(y)])
    line = points(draw(tmp_path)[0]["Loss"], "training (light")
    np.testing.assert_array_equal(line, list(enumerate(medians)))


def test_a_spike_is_no_plateau_and_is_marked_and_few_validation_losses_are_markers(tmp_path):
    losses = [3.5 - step / 1000 for step in range(300)]
    losses[200:202] = 11.3, 7.9
    for every, style in ((100, "None"), (10, "-")):
        rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
        rows += [{"step": step, "val_loss": 3.4} for step in range(0, 300, every)]
        loss = draw(write_log(tmp_path, rows))[0]["Loss"]
        assert 3.5 < loss.get_ylim()[1] < 3.7 and points(loss, "training")[:, 1].max() <= 3.5
        assert points(loss, "beyond the axis")[:, 0].tolist() == [200] and len(points(loss)) == 300
        assert next(line for line in loss.lines if line.get_label() == "validation").get_linestyle() == style


def test_the_ceilings_of_the_largest_load_and_of_the_entropy(moe, tmp_path):
    few = fake_log(tmp_path / "few", steps=40, experts=4)
    (few / "run.json").write_text(json.dumps({"config": {"use_moe": True, "num_experts": 16}}))
    both = [moe, few]
    cases = ([moe], "entropy", ["2.08"]), (both, "max / mean load", ["16", "4"]), (both, "entropy", [])
    for folders, label, values in cases:
        ax = by_label(draw(*folders)[1], label)
        assert sorted(text.get_text().split(" = ")[1] for text in ax.texts) == values
        assert all(ax.get_ylim()[1] > float(value) for value in values)
    even = write_log(tmp_path / "even", [dict(step=0, max_load=1.0)])  # every token visits every expert
    assert by_label(draw(even)[1], "max / mean load").get_ylim()[0] == 1
    (few / "run.json").write_text('{"config": [')  # damaged
    assert plot_log.read_run(str(few)).config == {}


@pytest.mark.parametrize("vocabularies, compared", [
    ([50257], True), ([50304], True), ([257], False), ([100352], False), ([None], False),
    ([50304, 257], False),
])  # fmt: skip
def test_gpt2s_results_are_drawn_only_beside_its_vocabulary(tmp_path, vocabularies, compared):
    axes, _ = draw(*(fake_log(tmp_path / str(V), steps=40, experts=0, vocab=V) for V in vocabularies))
    assert [text.get_text()[:20] for text in axes["Loss"].texts] == ["GPT-2 124M on FineWe"] * compared
    heights = {float(line.get_ydata()[0]) for line in axes["HellaSwag"].lines if len(line.get_ydata()) == 2}
    assert heights == ({0.25, 0.294463, 0.337} if compared else {0.25})


def test_several_runs_have_their_own_names_line_styles_and_heat_maps(tmp_path):
    folders = [fake_log(tmp_path / name, steps=20) for name in ("a", "_b", "x/c$d$", "y/c$d$")]
    folders.append(fake_log(tmp_path / "dense", steps=20, experts=0))
    axes, fig = draw(*folders)
    names = [text.get_text().split("·")[0].strip() for text in fig.legends[0].texts]
    twins = [str(tmp_path / folder / "c$d$") for folder in "xy"]  # told apart by their paths
    assert names == ["a", "_b", *twins, "dense"]
    what_differs = "dense  ·  max_lr 0.002  ·  num_experts 0  ·  use_moe False"  # no result differs
    assert fig.legends[0].texts[-1].get_text() == what_differs
    maps = [title for title in axes if title.endswith("at step 20")]
    assert maps == [f"{name} at step 20" for name in names[:4]]
    looks = [(line.get_color(), line.get_linestyle()) for line in axes["HellaSwag"].lines[:4]]
    assert len({colour for colour, _ in looks}) == len({style for _, style in looks}) == 4


def one_warning(capsys) -> str:
    said = capsys.readouterr().err
    assert said.startswith("plot_log.py: warning: ") and said.count("\n") == 1, said
    return said


def test_garbage_and_a_cut_last_line(tmp_path, capsys):
    folder = fake_log(tmp_path / "log", steps=100)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[10], lines[20] = "\x00\x00 not json", '{"loss": 3.0}'
    lines[30] = '{"step": 29, "loss": 3.0, "expert_load": [[0.5, 0.5], [1.0]]}'
    lines[40:43] = ["17", '{"run": 3}', '{"step": Infinity}']
    lines[-1] = lines[-1][: len(lines[-1]) // 2]
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    axes, _ = draw(folder)
    warning = one_warning(capsys)
    assert str(folder) in warning and "7 unreadable line(s) skipped, first line 11" in warning
    assert len(points(axes["Loss"])) == 100 - 6  # the cut line had no loss


def test_steps_without_a_finite_loss(tmp_path, capsys):
    losses = [3.0] * 100
    losses[60], losses[61], losses[99] = math.nan, math.inf, None
    write_log(tmp_path, [{"step": step, "loss": loss} for step, loss in enumerate(losses)])
    loss = draw(tmp_path)[0]["Loss"]
    assert "3 of 100 steps have no finite loss" in one_warning(capsys)
    assert points(loss, "loss not finite")[:, 0].tolist() == [60, 61, 99]
    assert len(points(loss)) == 97 and all(np.isfinite(loss.get_ylim()))


def test_nothing_logged_yet(tmp_path, capsys):
    for content, form, magic in (("", "png", b"\x89PNG"), ("\n", "svg", b"<?xml"), ("?\n", "pdf", b"%PDF")):
        (tmp_path / "metrics.jsonl").write_text(content)
        out = plot_log.plot_runs([str(tmp_path)], str(tmp_path / f"training.{form}"))
        assert "metrics.jsonl holds no step" in one_warning(capsys)
        assert Path(out).read_bytes().startswith(magic)
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        plot_log.plot_runs([str(tmp_path)], out)
    assert len(os.listdir(tmp_path)) == 4 and Path(out).read_bytes().endswith(b"%%EOF\n")  # the old one stays


def test_log_txt_alone_and_behind_an_empty_metrics_file(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("0 val 10.9500\n0 hella 0.2463\n0 train 10.952377\n1 train 9.5\n\n2 tr")
    axes, _ = draw(tmp_path)
    assert "log.txt: 1 unreadable line(s) skipped, first line 6" in one_warning(capsys)
    assert list(axes) == ["Loss", "HellaSwag"] and axes["HellaSwag"].get_ylabel() == "acc_norm"
    assert points(axes["Loss"]).tolist() == [[0, 10.952377], [1, 9.5]]
    (tmp_path / "metrics.jsonl").write_text("")
    assert list(draw(tmp_path)[0]) == ["Loss", "HellaSwag"]
    assert "metrics.jsonl holds no step" in one_warning(capsys)


def test_a_run_that_cannot_be_placed_is_named(moe, tmp_path, capsys):
    (tmp_path / "log.txt").write_text("0 train 5.0\n1 train 4.0\n")
    axes, _ = draw(tmp_path, moe, x="tokens")
    warning = one_warning(capsys)
    assert "over tokens" in warning and "total_batch_size" in warning and "--x step" in warning
    assert len(points(axes["Loss"])) == 0 and len(axes["Loss"].lines[3].get_xdata()) == 400
    refuses(r"elapsed_s.*--x step", draw, tmp_path, x="time")  # not an empty picture
