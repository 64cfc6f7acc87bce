"""python -m analysis compare: statistics on made-up runs, effective compute, what is left out, the files."""

import json
import math

import numpy as np
import pytest

from analysis import compare
from analysis.__main__ import main

# P(|T| < t) = 0.95: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, column 0.975.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 100: 1.984}
TOKENS, STEPS = 100, 40  # per step; of a run


def fake_run(folder, final: float, seed: int, steps=STEPS, speed=1.0, change=None, **settings) -> str:
    """A finished run's folder: the loss is final + ln(STEPS / step), evaluated every 4 steps."""
    config = dict(total_batch_size=TOKENS, max_steps=steps, seed=seed, log_dir=str(folder), max_lr=0.01,
                  min_lr=settings.get("max_lr", 0.01) / 10) | settings  # fmt: skip
    rows = []
    for step in range(steps):
        row = dict(step=step, loss=3.0, elapsed_s=(step + 0.5) / speed, tok_per_s=TOKENS * speed)
        evaluated = dict(val_loss=final + math.log(STEPS / max(step, 1)), eval_step=step)
        rows.append(row | dict(max_load=1.5) | (evaluated if step % 4 == 0 else {}))
    rows[-1] |= dict(val_loss=final + math.log(STEPS / steps), val_bpb=2.0, eval_step=steps)
    rows[-1]["elapsed_s"] = steps / speed
    (change or (lambda rows: None))(rows)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": config}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_quantiles_are_those_of_the_published_table():
    assert {n: round(compare.t_quantile(n), 3) for n in T_TABLE} == pytest.approx(T_TABLE, abs=1e-3)


@pytest.mark.parametrize("gap, seeds, word", [
    (0.05, (1, 2, 3, 4), "worse"), (-0.05, (1, 2, 3, 4), "better"), (0.0, (1, 2, 3, 4), "cannot tell"),
    (-0.05, (4, 5, 6, 7), "cannot tell*"), (-0.05, (5,), "cannot tell*"),
])  # fmt: skip
def test_a_planted_difference_is_found_and_no_difference_is_not(tmp_path, gap, seeds, word, rows_of, capsys):
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 9))
    first = [2 + noise[0, seed] for seed in range(1, 5)]
    second = [2 + gap + noise[1, seed] for seed in seeds]
    for seed, final in zip(range(1, 5), first, strict=True):
        fake_run(tmp_path / f"a{seed}", final, seed)
    for seed, final in zip(seeds, second, strict=True):
        fake_run(tmp_path / f"b{seed}", final, seed, max_lr=0.02)
    base, other = rows_of(main, "compare", tmp_path)
    said = capsys.readouterr().out
    assert (base["verdict"], other["verdict"]) == ("baseline", word) and word in said
    assert f"noise of this baseline is {np.std(first, ddof=1):.4f}" in said
    assert float(base["final_mean"]) == pytest.approx(np.mean(first))
    assert "min_lr" not in base and other["max_lr"] == "0.02"
    assert float(other["difference"]) == pytest.approx(np.mean(second) - np.mean(first))
    if "*" not in word:
        half = T_TABLE[3] * np.std(np.subtract(second, first), ddof=1) / 2
        assert float(other["half"]) == pytest.approx(half, rel=1e-3)
    assert all(len(line) <= 110 for line in said.splitlines())


def test_effective_compute_equal_tokens_and_equal_seconds(tmp_path, rows_of):
    """The baseline's loss is 2 + ln(40 / step): it reaches 2 + ln(factor) at 1 / factor of its steps."""
    for seed in (1, 2):
        fake_run(tmp_path / f"a{seed}", 2, seed)
        fake_run(tmp_path / f"b{seed}", 2 + math.log(2.5), seed, max_lr=0.02)
        fake_run(tmp_path / f"c{seed}", 1.9, seed, max_lr=0.03)
        fake_run(tmp_path / f"d{seed}", 9, seed, max_lr=0.04)
        fake_run(tmp_path / f"e{seed}", 2, seed, max_lr=0.05, steps=20, speed=0.5)
    rows = {row["max_lr"]: row for row in rows_of(main, "compare", tmp_path)}
    assert [row["effective_tokens"] for row in rows.values()] == ["1.00", "0.40", "> 1.00", "< 0.10", "0.50"]
    assert rows["0.02"]["effective_seconds"] == pytest.approx("0.41")  # at the end of step 16, of 40.0 s
    assert float(rows["0.05"]["common_tokens"]) == 20 * TOKENS and rows["0.05"]["common_seconds"] == "40.0"
    assert float(rows["0.01"]["at_tokens_mean"]) == pytest.approx(2 + math.log(2))
    assert float(rows["0.01"]["at_seconds_mean"]) == pytest.approx(2)
    begin = dict(steps=1, max_steps=0, change=lambda rows: rows[0].update(eval_step=0))  # a run of 0 steps
    fake_run(tmp_path / "none" / "a", 2, 1, **begin)
    assert rows_of(main, "compare", tmp_path / "none")[0]["effective_tokens"] == "-"


def test_runs_left_out_are_named_and_some_fields_are_no_settings(tmp_path, rows_of, capsys, monkeypatch):
    fake_run(tmp_path / "good", 2, 1, text="t", data_dir="good/data")
    fake_run(tmp_path / "other", 2, 2, text="t", data_dir="other/data", plot=False, document_mask=False)
    fake_run(tmp_path / "twin", 2, 1, text="t", data_dir="twin/data")
    fake_run(tmp_path / "short", 2, 3, change=lambda rows: rows.pop())
    fake_run(tmp_path / "nan", 2, 3, change=lambda rows: rows[-1].update(val_loss=None))
    fake_run(tmp_path / "lost", 2, 3, change=lambda rows: [rows.pop(), rows[-1].update(loss=None)])
    fake_run(tmp_path / "empty", 2, 3, change=lambda rows: rows.clear())
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "output.txt").touch()
    files = "--markdown", tmp_path / "o.md", "--picture", tmp_path / "o.png"
    (row,) = rows_of(main, "compare", tmp_path, *files)
    assert row["seeds"] == "2"
    said = capsys.readouterr().out
    for name, words in dict(twin="same seed", short="--resume auto", nan="diverged", lost="diverged at",
                            empty="no step", failed="output.txt").items():  # fmt: skip
        (line,) = [line for line in said.splitlines() if line.startswith(f"left out: {tmp_path / name}:")]
        assert words in line and line in (tmp_path / "o.md").read_text()
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "good" / "output.txt").touch()  # as the sweep makes it
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "./"]) == 0 and "good" not in capsys.readouterr().out


def test_what_is_refused(tmp_path, rows_of, refused):
    fake_run(tmp_path / "a", 2, 1)
    fake_run(tmp_path / "b", 2, 1, max_lr=0.02)
    fake_run(tmp_path / "c" / "short", 2, 3, change=lambda rows: rows.pop())
    for arguments, words in (
        ((tmp_path / "none",), "none"), ((tmp_path, "--baseline", "max_lr=3"), "max_lr=0.01; max_lr=0.02"),
        ((tmp_path, "--picture", "x.bmp"), ".png"), ((tmp_path / "c",), "unfinished"),
    ):  # fmt: skip
        assert words in refused(main, "compare", *arguments)
    assert rows_of(main, "compare", tmp_path, "--baseline", "max_lr=0.02")[1]["verdict"] == "baseline"
