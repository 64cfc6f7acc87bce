"""The picture of a run: what is read from logs good and bad, what is drawn, and how the file is written.

Run: python -m pytest tests/test_plot_log.py
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import plot_log
from tokens import files
from training.metrics import METRICS, Metric

ROOT = Path(__file__).resolve().parents[1]


def fake_log(
    folder: Path, steps: int, experts: int = 8, vocab: int | None = 50304, seed: int = 0, hella: bool = True
) -> Path:
    """A metrics.jsonl like a real run's; expert 2 of layer 1 starves half-way. No experts: a dense model."""
    rng, layers, elapsed, batch = np.random.default_rng(seed), 4, 0.0, 524288
    config = {"total_batch_size": batch, "vocab_size": vocab, "n_layer": layers, "n_embd": 768}
    config |= {"use_moe": experts > 0, "num_experts": experts, "num_experts_per_tok": 2}
    vocab = vocab or 50304
    taste = rng.normal(0, 0.8, (layers, experts))
    lines = [{"run": {"config": config, "git": "0123abc", "versions": {"torch": "2.13.0"}}}]
    for step in range(steps + 1):
        done = step / steps
        falls = 0.6 * math.exp(-done * 100) + 0.4 * (1 + done * 300) ** -0.55
        loss = 3.05 + (math.log(vocab) - 3.05) * falls
        row = {"step": step}
        if step < steps:  # the last visit only evaluates
            ms = (9000 if step == 0 else 480) * (1 + abs(rng.normal(0, 0.01)))
            elapsed += ms / 1000
            row |= {"loss": loss + rng.normal(0, 0.03), "lr": 3e-4 * (1 + math.cos(math.pi * done))}
            row |= {"norm": 0.3 + 2.5 * math.exp(-done * 40) + abs(rng.normal(0, 0.04)), "ms": ms}
            row |= {"tok_per_s": batch / ms * 1000, "mfu": 0.42 * 480 / ms}
        row["elapsed_s"] = elapsed
        if step % max(1, steps // 20) == 0:
            row["val_loss"] = loss + 0.01
            if hella:
                row["hella_acc_norm"] = 0.25 + 0.07 * (1 - math.exp(-3 * done)) + rng.normal(0, 0.002)
                row["hella_acc"] = row["hella_acc_norm"] - 0.012
            if experts:
                logits = taste * math.exp(-4 * done) + rng.normal(0, 0.05, taste.shape)
                logits[1, 2] -= 8 * (done > 0.5)
                share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
                row |= {"expert_load": share.tolist(), "max_load": float(share.max() * experts)}
                row |= {"balance_loss": 1.01, "z_loss": 0.02}
        lines.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """draw(folders, x="step") -> {panel title up to a colon: axes} and the figure, without writing a file."""
    figures = []
    monkeypatch.setattr(plot_log, "save_picture", lambda fig, out: figures.append(fig))

    def draw(*folders, x="step"):
        plot_log.plot_runs([str(folder) for folder in folders], "unused.png", x)
        return {ax.get_title(loc="left").split(":")[0]: ax for ax in figures[-1].axes}, figures[-1]

    return draw


def lines_of(ax) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def texts_of(ax) -> str:
    return " | ".join(text.get_text() for text in ax.texts)


# -------------------------------------------------------------------------------------------------- THE FILE


def test_png_of_a_long_run_is_readable_and_small(tmp_path):
    from PIL import Image

    folder = fake_log(tmp_path / "log", steps=5000)
    out = plot_log.plot_runs([str(folder)], str(folder / "training.png"))
    assert out == str(folder / "training.png")
    with Image.open(out) as image:
        assert image.width == 1320 and 900 < image.height < 1300
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert Path(out).stat().st_size < 200_000
    luminance = pixels @ [0.299, 0.587, 0.114]
    assert (luminance > 250).mean() > 0.5 and (luminance < 60).any()  # dark ink on a white page
    assert (abs(pixels - [0, 0x72, 0xB2]).max(-1) < 12).sum() > 1000  # the run's blue line is there


@pytest.mark.parametrize(("form", "magic"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_vector_formats(tmp_path, form, magic):
    folder = fake_log(tmp_path / "log", steps=300)
    out = Path(plot_log.plot_runs([str(folder)], str(tmp_path / "new" / f"a.{form}"), x="time"))
    assert out.read_bytes().startswith(magic) and out.stat().st_size > 10_000


def test_a_failing_write_leaves_the_old_picture_and_no_litter(tmp_path, monkeypatch):
    folder = fake_log(tmp_path / "log", steps=20)
    out = folder / "training.png"
    out.write_bytes(b"old")

    def break_off(path, write):
        def write_half(file):
            write(file)
            assert out.read_bytes() == b"old"  # not touched while the new one is being written
            raise OSError("disk full")

        files.write_atomically(path, write_half)

    monkeypatch.setattr(plot_log, "write_atomically", break_off)
    with pytest.raises(OSError, match="disk full"):
        plot_log.plot_runs([str(folder)], str(out))
    assert out.read_bytes() == b"old" and sorted(os.listdir(folder)) == ["metrics.jsonl", "training.png"]


def test_command_line(tmp_path):
    import matplotlib.font_manager  # noqa: F401 - a slow machine's first process tells that it makes a cache

    fake_log(tmp_path / "log", steps=20)

    def call(*arguments):
        command = [sys.executable, str(ROOT / "plot_log.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = call("log/", "--format", "svg", "--x", "tokens")
    assert (done.returncode, done.stdout, done.stderr) == (0, "log/training.svg\n", "")
    assert (tmp_path / "log" / "training.svg").stat().st_size > 10_000
    (tmp_path / "empty").mkdir()
    failed = call("log/", "empty")
    assert failed.returncode == 2 and not (tmp_path / "log" / "training.png").exists()
    assert "empty: no metrics.jsonl" in failed.stderr and "--log_dir empty" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_wrong_arguments(tmp_path):
    folder = str(fake_log(tmp_path / "log", steps=5))
    with pytest.raises(ValueError, match=r"'a\.jpg'.*\.png, \.svg or \.pdf"):
        plot_log.plot_runs([folder], "a.jpg")
    with pytest.raises(ValueError, match="x='epochs'"):
        plot_log.plot_runs([folder], "a.png", x="epochs")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no metrics\.jsonl"):
        plot_log.plot_runs([folder, str(tmp_path / "nowhere")], "a.png")


def test_import_is_light_and_keeps_out_of_the_way(tmp_path):
    """A training script can import it: matplotlib when drawing, pyplot and ours never."""
    folder = fake_log(tmp_path / "log", steps=5)
    code = (
        "import sys, plot_log; assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
        f"plot_log.plot_runs([{str(folder)!r}], {str(folder / 'a.png')!r})\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules and 'model' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------- WHAT IS DRAWN


def test_all_panels_of_a_moe_run(tmp_path, drawn):
    axes, fig = drawn(fake_log(tmp_path / "moe", steps=400))
    titles = ["Loss", "HellaSwag", "Learning rate and gradient norm", "Throughput", "Expert balance"]
    titles.append("Expert load at step 400")
    titles.append("Expert load over time, a row per expert")
    assert [title for title in axes if title] == titles
    labels = {ax.get_ylabel() for ax in fig.axes}
    expected = "learning rate", "gradient norm", "tokens/s", "MFU", "max / mean load", "starved experts"
    assert set(expected) <= labels
    for text in ("moe", "8 experts, 2 active", "step 400", "HellaSwag 3"):
        assert text in fig.get_suptitle()


def test_curves_are_the_logs_numbers(tmp_path, drawn):
    folder = fake_log(tmp_path / "log", steps=400)
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")][1:]
    axes, _ = drawn(folder)
    raw = axes["Loss"].lines[0].get_xydata()
    np.testing.assert_array_equal(raw, [(row["step"], row["loss"]) for row in rows if "loss" in row])
    validation = lines_of(axes["Loss"])["validation"]
    expected = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    np.testing.assert_array_equal(validation, expected)
    assert len(validation) == 21 and validation[-1, 0] == 400
    hella = axes["HellaSwag"].lines[0].get_xydata()
    expected = [row["hella_acc_norm"] for row in rows if "hella_acc_norm" in row]
    np.testing.assert_array_equal(hella[:, 1], expected)
    low, high = axes["Loss"].get_ylim()
    assert low < raw[:, 1].min() and validation[1:, 1].max() < high < 10  # the first steps' fall is cut


def test_a_row_of_the_table_is_a_curve(tmp_path, drawn, monkeypatch):
    """One row shows another number of the record: in a panel of its own, or in one that is there."""
    rows = [Metric("ms", "ms per step", panel="Time")]
    rows += [Metric("z_loss", "router z-loss", panel="Expert balance")]
    monkeypatch.setattr(plot_log, "METRICS", (*METRICS, *rows))
    axes, fig = drawn(fake_log(tmp_path / "log", steps=40))
    assert len(axes["Time"].lines[0].get_xdata()) == 40
    assert "router z-loss" in [ax.get_ylabel() for ax in fig.axes]


@pytest.mark.parametrize("x", ["tokens", "time"])
def test_other_axes(tmp_path, drawn, x):
    folder = fake_log(tmp_path / "log", steps=400)
    axes, _ = drawn(folder, x=x)
    curve, loss = axes["Loss"].lines[0].get_xydata(), axes["Loss"]
    if x == "tokens":
        np.testing.assert_array_equal(curve[:, 0], np.arange(400) * 524288)
        assert loss.get_xlabel() == "training tokens"
        assert loss.xaxis.get_major_formatter()(2.5e9, 0) == "2.5B"
    else:
        seconds = [json.loads(line).get("elapsed_s") for line in open(folder / "metrics.jsonl")][1:401]
        np.testing.assert_allclose(curve[:, 0], np.array(seconds) / 60)
        assert loss.get_xlabel() == "minutes of training"


def test_smoothing_against_a_plain_loop():
    y = np.random.default_rng(0).normal(size=700)
    got = plot_log.smooth(y)
    for i in range(700):
        half = min(i // 6, 1 + 700 // 60)
        assert got[i] == pytest.approx(y[i - half : i + half + 1].mean(), abs=1e-12)
    assert plot_log.smooth(np.array([])).shape == (0,) and plot_log.smooth(np.array([2.0])) == [2.0]


@pytest.mark.parametrize(
    ("vocab", "drawn_there"), [(50257, True), (50304, True), (257, False), (100352, False)]
)
def test_reference_lines_only_over_gpt2s_vocabulary(tmp_path, drawn, vocab, drawn_there):
    axes, _ = drawn(fake_log(tmp_path / "log", steps=40, vocab=vocab))
    assert ("GPT-2 124M on FineWeb-Edu, 3.29" in texts_of(axes["Loss"])) is drawn_there
    heights = {float(line.get_ydata()[0]) for line in axes["HellaSwag"].lines if len(line.get_ydata()) == 2}
    assert heights == ({0.25, 0.294463, 0.337} if drawn_there else {0.25})
    low, high = axes["Loss"].get_ylim()
    assert not drawn_there or low < 3.2924 < high


def test_validation_loss_that_rises_and_a_reference_above_all_losses_are_in_view(tmp_path, drawn):
    rows = [{"step": i, "loss": 3 - i / 100, "val_loss": 2.5 + abs(i - 50) / 100} for i in range(100)]
    for vocab, top in ((257, 2.99), (50257, 3.2924)):
        lines = [{"run": {"config": {"vocab_size": vocab}}}, *rows, {"step": 100, "val_loss": 2.99}]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert drawn(tmp_path)[0]["Loss"].get_ylim()[1] > top
    rows = [row | {"loss": row["loss"] - 1} for row in rows]
    lines = [*rows, {"step": 100, "val_loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert drawn(tmp_path)[0]["Loss"].get_ylim()[1] > 4.0


def test_reference_lines_need_a_known_vocabulary_in_every_run(tmp_path, drawn):
    gpt2, bytes_ = fake_log(tmp_path / "a", steps=40), fake_log(tmp_path / "b", steps=40, vocab=257)
    assert "GPT-2" not in texts_of(drawn(gpt2, bytes_)[0]["Loss"])
    unknown = fake_log(tmp_path / "c", steps=40, vocab=None)
    assert "GPT-2" not in texts_of(drawn(unknown)[0]["Loss"])


def test_starved_experts_are_marked(tmp_path, drawn):
    axes, fig = drawn(fake_log(tmp_path / "log", steps=400))
    now = axes["Expert load at step 400"]
    for cross in now.lines:
        assert cross.get_xydata().tolist() == [[2.5, 1.5]]  # expert 2 of layer 1, middle of its cell
    assert "starved" in now.get_xlabel() and len(texts_of(now).split(" | ")) == 32
    history = axes["Expert load over time, a row per expert"]
    assert [line.get_ydata() for line in history.lines] == [[1 * 8 + 2]]
    starved = next(ax for ax in fig.axes if ax.get_ylabel() == "starved experts").lines[0].get_ydata()
    assert starved[-1] == 1 / 32 and starved[len(starved) // 2 - 2] == 0  # this log has expert_load alone


def test_every_panel_has_room(tmp_path, drawn):
    """Whether experts are starved or not, and with any number of runs: the layout gives no panel a sliver."""
    healthy = fake_log(tmp_path / "healthy", steps=20)
    lines = (healthy / "metrics.jsonl").read_text().splitlines()
    (healthy / "metrics.jsonl").write_text("\n".join(lines[:9]))
    for folders in ([healthy], [fake_log(tmp_path / "starved", steps=20)], [healthy, tmp_path / "starved"]):
        axes, fig = drawn(*folders)
        fig.draw_without_rendering()
        for ax in axes.values():
            box = ax.get_position()
            assert (box.width > 0.2 and box.height > 0.08) or ax.get_label() == "<colorbar>", ax
            assert box.x0 > 0.02 and box.x1 <= 1 and box.y0 > 0.02 and box.y1 < 0.98


def test_loads_are_drawn_in_fair_shares(tmp_path, drawn):
    folder = fake_log(tmp_path / "log", steps=40)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    axes, fig = drawn(folder)
    mesh = axes["Expert load at step 40"].collections[0]
    np.testing.assert_allclose(mesh.get_array().reshape(4, 8), np.array(last["expert_load"]) * 8)
    curve = next(ax for ax in fig.axes if ax.get_ylabel() == "max / mean load").lines[0].get_ydata()
    assert curve[-1] == pytest.approx(last["max_load"])


def test_a_load_at_every_step_is_thinned_to_the_end(tmp_path, drawn):
    lines = [{"step": step, "expert_load": [[0.5, 0.5]]} for step in range(1234)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mesh = drawn(tmp_path)[0]["Expert load over time, a row per expert"].collections[0]
    corners = mesh.get_coordinates()  # (2 + 1, columns + 1, 2)
    assert 200 < corners.shape[1] <= 402 and corners[0, -2:, 0].mean() == 1233  # the last record's column


def test_panels_without_data_are_left_out(tmp_path, drawn):
    axes, _ = drawn(fake_log(tmp_path / "log", steps=40, experts=0, hella=False))
    assert list(axes) == ["Loss", "Learning rate and gradient norm", "", "Throughput"]
    for line in [{"step": 0, "loss": 5.0}, {"step": 1, "loss": 4.0}]:
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    assert list(drawn(tmp_path)[0]) == ["Loss"]


def test_several_runs_have_their_own_line_styles_and_heat_maps(tmp_path, drawn):
    folders = [fake_log(tmp_path / name, steps=60, seed=i) for i, name in enumerate(("a", "_b", "c$d$"))]
    folders.append(fake_log(tmp_path / "dense", steps=60, experts=0))
    axes, fig = drawn(*folders)
    names = [text.get_text().split("·")[0].strip() for text in fig.legends[0].texts]
    assert names == ["a", "_b", r"c\$d\$", "dense"]
    maps = [title for title in axes if title.endswith("at step 60")]
    assert maps == [f"{name} at step 60" for name in names[:3]]
    looks = [(line.get_color(), line.get_linestyle()) for line in axes["HellaSwag"].lines[:8:2]]
    assert len({colour for colour, _ in looks}) == len({style for _, style in looks}) == 4
    keys = drawn(*folders * 5)[1].legends[0].legend_handles
    assert len({(key.get_color(), key.get_linestyle(), key.get_marker()) for key in keys}) == 20


def test_runs_of_one_name_are_told_apart(tmp_path, drawn):
    _, fig = drawn(fake_log(tmp_path / "x" / "log", steps=20), fake_log(tmp_path / "y" / "log", steps=20))
    first, second = (text.get_text() for text in fig.legends[0].texts)
    assert "x/log" in first and "y/log" in second


# ---------------------------------------------------------------------------------------------- BROKEN LOGS


def one_warning(capsys) -> str:
    """What was said on stderr, which must be one line."""
    said = capsys.readouterr().err
    assert said.startswith("plot_log: warning: ") and said.count("\n") == 1, said
    return said


def test_garbage_and_a_cut_last_line(tmp_path, drawn, capsys):
    folder = fake_log(tmp_path / "log", steps=100)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[10] = "\x00\x00 not json"
    lines[20] = '{"loss": 3.0}'
    lines[30] = '{"step": 29, "loss": 3.0, "expert_load": [[0.5, 0.5], [1.0]]}'
    lines[40:43] = ["17", '{"run": 3}', '{"step": Infinity}']
    lines[-1] = lines[-1][: len(lines[-1]) // 2]
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    axes, _ = drawn(folder)
    warning = one_warning(capsys)
    assert str(folder) in warning and "7 unreadable line(s) skipped (line 11, 21, 31, 41, 42, ...)" in warning
    assert len(axes["Loss"].lines[0].get_xdata()) == 100 - 6  # line 1 is the run's, the cut line had no loss


def test_steps_without_a_finite_loss(tmp_path, drawn, capsys):
    folder = fake_log(tmp_path / "log", steps=100)
    text = (folder / "metrics.jsonl").read_text().splitlines()
    for step in (60, 61, 99):
        row = json.loads(text[1 + step])
        text[1 + step] = json.dumps(row | {"loss": {60: math.nan, 61: math.inf, 99: None}[step]})
    (folder / "metrics.jsonl").write_text("\n".join(text))
    axes, _ = drawn(folder)
    assert "3 of 101 steps have no finite loss" in one_warning(capsys)
    assert lines_of(axes["Loss"])["loss not finite"][:, 0].tolist() == [60, 61, 99]
    assert len(axes["Loss"].lines[0].get_xdata()) == 97 and all(np.isfinite(axes["Loss"].get_ylim()))


@pytest.mark.parametrize("content", ["", "\n\n", "nonsense\n"])
def test_nothing_logged_yet(tmp_path, capsys, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    out = plot_log.plot_runs([str(tmp_path)], str(tmp_path / "training.png"))
    assert "metrics.jsonl holds no step" in one_warning(capsys) and Path(out).stat().st_size > 500


def test_a_single_step_and_rows_of_oddities_can_be_drawn(tmp_path, capsys):
    oddities = [
        [{"step": 0, "loss": 10.9, "norm": 0.0, "tok_per_s": 0.0, "mfu": 0.0, "lr": 0.0, "elapsed_s": 0.0}],
        [{"step": 5}, {"step": 6, "loss": "high", "val_loss": True, "lr": None, "expert_load": None}],
        [{"run": {"config": {"vocab_size": "50257", "total_batch_size": "many"}}}, {"step": 0, "loss": 1}],
        [{"step": 0, "expert_load": [[0.1, 0.9]]}, {"step": 1, "expert_load": [[0.2, 0.3, 0.5]]}],
        [{"step": 3, "loss": 10**400, "norm": 1e308, "hella_acc": 0.25}],
    ]
    for i, rows in enumerate(oddities):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert Path(plot_log.plot_runs([str(folder)], str(folder / "a.png"))).stat().st_size > 500
    together = plot_log.plot_runs([str(tmp_path / str(i)) for i in range(5)], str(tmp_path / "all.png"))
    assert Path(together).stat().st_size > 5000


def test_log_txt_alone_and_behind_an_empty_metrics_file(tmp_path, drawn, capsys):
    text = "0 val 10.9500\n0 hella 0.2463\n0 train 10.952377\n1 train 9.5\n\n2 tr"
    (tmp_path / "log.txt").write_text(text)
    axes, _ = drawn(tmp_path)
    assert "log.txt: 1 unreadable line(s) skipped (line 6)" in one_warning(capsys)
    assert list(axes) == ["Loss", "HellaSwag"] and axes["HellaSwag"].get_ylabel() == "accuracy"
    assert axes["Loss"].lines[0].get_xydata().tolist() == [[0, 10.952377], [1, 9.5]]
    (tmp_path / "metrics.jsonl").write_text("")
    assert list(drawn(tmp_path)[0]) == ["Loss", "HellaSwag"]
    assert "metrics.jsonl holds no step" in one_warning(capsys)


def test_a_run_that_cannot_be_placed_is_named(tmp_path, drawn, capsys):
    (tmp_path / "log.txt").write_text("0 train 5.0\n1 train 4.0\n")
    axes, _ = drawn(tmp_path, fake_log(tmp_path / "other", steps=20), x="tokens")
    assert "over tokens, as its log has no total_batch_size; try --x step" in one_warning(capsys)
    assert len(axes["Loss"].lines[0].get_xdata()) == 0 and len(axes["Loss"].lines[2].get_xdata()) == 20
    before = (tmp_path / "training.png").read_bytes() if (tmp_path / "training.png").exists() else b"old"
    (tmp_path / "training.png").write_bytes(before)
    with pytest.raises(ValueError, match="has no elapsed_s; try --x step"):  # not an empty picture
        plot_log.plot_runs([str(tmp_path)], str(tmp_path / "training.png"), "time")
    assert (tmp_path / "training.png").read_bytes() == before


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    rows = [{"step": step, "loss": 1.0, "val_loss": 9.0} for step in range(10)]
    first = [{"run": {"config": {"vocab_size": 257}}}, *rows]
    again = [{"run": {"config": {"vocab_size": 259}}}, *({"step": s, "loss": 2.0} for s in (6, 7))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, first + again)))
    run = plot_log.read_run(str(tmp_path))
    assert [row["step"] for row in run.rows] == list(range(8)) and run.config["vocab_size"] == 259
    assert run.rows[6] == {"step": 6, "loss": 2.0, "val_loss": 9.0}  # evaluated before the stop
    assert run.rows[7] == {"step": 7, "loss": 2.0} and not run.problems
