"""A run's files read back: TensorBoard events, metrics, main.log, the picture drawn meanwhile, wandb; among
files that are not its own; texts that must not reach the terminal as they are."""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import refuses
from PIL import Image
from processes import at_call, flags, read_rows, same_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plot_log
import sample
import train_gpt_moe
from model import GPTLMHeadModel
from tokens.files import write_atomically
from tokens.printable import one_line, printable
from training import checkpoints as ckpt
from training import log
from training.log import RunLog
from training.metrics import METRICS, Metric
from training.parallel import World
from training.profiler import Profiler
from training.terminal import Terminal, tell


def pretend_wandb(monkeypatch) -> Mock:
    """Install a package wandb that remembers all calls; it is its own run, too."""
    wandb = Mock(id="abc123")
    wandb.__spec__ = SimpleNamespace(name="wandb")  # importlib.util.find_spec looks there
    wandb.init.return_value = wandb
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def read_events(folder) -> EventAccumulator:
    everything = dict.fromkeys(("scalars", "histograms", "tensors", "images"), 0)
    return EventAccumulator(str(folder / "tb"), everything).Reload()


def points(events, curve: str) -> dict:
    """{step: value} of a curve."""
    return {event.step: event.value for event in events.Scalars(curve)}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """What is left of a run with everything that can be logged."""
    folder = tmp_path_factory.mktemp("run")
    more = "--sample_every 8 --sample_tokens 8 --tensorboard 1 --plot_every 8 --wandb 1".split()
    more += "--log_norms 1 --profile 2:4".split()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        wandb = pretend_wandb(patch)
        patch.setattr(GPTLMHeadModel, "estimate_mfu", lambda self, *rest, **named: 0.25)
        patch.setattr(Terminal, "say", lambda self, text: tell(f"said: {text}"))  # beside the live line
        assert train_gpt_moe.main(flags(data, folder, *more)) == 0
    read = dict(records=read_rows(folder), events=read_events(folder))
    return SimpleNamespace(folder=folder, wandb=wandb, said=said.getvalue(), **read)


def test_norms_of_the_parts_add_up_to_the_whole_gradient_s(finished):
    for record in finished.records:
        parts = {name: value for name, value in record.items() if name.startswith("norm/")}
        assert set(parts) == {f"norm/{n}" for n in ("experts", "routers", "attention", "norms", "embeddings")}
        assert math.hypot(*parts.values()) == pytest.approx(record["norm"], rel=1e-5)
    found = points(finished.events, "optim/norm/routers")
    assert found[3] == pytest.approx(finished.records[3]["norm/routers"])


def test_a_profile_is_of_the_steps_that_were_asked_for_and_the_picture_is_drawn_during_the_run(finished):
    trace = json.loads((finished.folder / "profile_2_4.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    updates = sum(name.startswith("Optimizer.step#") for name in names)
    assert updates == 2 and any(name == "aten::mm" for name in names)
    assert "said: ----" in finished.said  # the table
    assert "Self CPU" in finished.said and "profile_2_4.json" in finished.said
    with Image.open(finished.folder / "training.png") as image:  # --plot is off: it is not drawn at the end
        assert image.format == "PNG" and image.width >= 1000 and image.height >= 600


def test_a_profile_is_written_if_the_run_ends_among_its_steps(tmp_path):
    config, said = SimpleNamespace(profile="2:9", max_steps=9, log_dir=str(tmp_path)), []
    layout = SimpleNamespace(world=World(0, 0, 1, torch.device("cpu")))
    profiler = Profiler(run := SimpleNamespace(config=config, layout=layout, say=said.append))
    for step in (1, 2, 3):
        with profiler.recording(step):
            torch.ones(8).sum()
    assert not said
    profiler.write()
    profiler.write()  # there is nothing more to write
    assert (tmp_path / "profile_2_4.json").exists() and len(said) == 1
    with (resumed := Profiler(run)).recording(4):
        pass
    resumed.write()
    assert (tmp_path / "profile_4_5.json").exists()


def test_tensorboard_has_the_metrics_as_curves_and_the_samples(finished):
    names = {
        "loss/train": "loss", "loss/val": "val_loss", "moe/balance_loss": "balance_loss",
        "moe/z_loss": "z_loss", "optim/lr": "lr", "optim/norm": "norm", "speed/tok_per_s": "tok_per_s",
        "speed/mfu": "mfu", "moe/max_load": "max_load", "speed/memory_gib": "memory",
        "moe/starved": "starved", "moe/router_entropy": "router_entropy", "loss/val_bpb": "val_bpb",
    }  # fmt: skip
    for curve, name in names.items():
        steps = "eval_step" if name.startswith("val") else "step"
        expected = {record[steps]: record[name] for record in finished.records if name in record}
        assert expected and points(finished.events, curve) == pytest.approx(expected, rel=1e-6), curve
    evaluated = [r for r in finished.records if r.get("eval_step")]
    for name in ("max_load", "starved", "router_entropy", "router_norm", "bias_range", "rerouted"):
        expected = {r["eval_step"]: r[f"{name}_by_layer"][1] for r in evaluated}
        found = points(finished.events, f"moe/{name}/layer_1")
        assert len(expected) == 3 and found == pytest.approx(found | expected), name
    (image, *_) = finished.events.Images("moe/expert_load")
    assert (image.width, image.height) == (16 * 4, 16 * 2)
    assert "settings/text_summary" in finished.events.Tags()["tensors"]
    assert "_hparams_/experiment" in finished.events.summary_metadata
    assert all(0.05 < r["memory"] < 100 and r["mfu"] == 0.25 for r in finished.records if "loss" in r)
    found = finished.events.Tensors("sample/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in found}
    assert list(texts) == [0, 8, 12] and all(text.startswith("    Return") for text in texts.values())


def test_the_last_picture_is_waited_for_and_a_failure_is_told(tmp_path, monkeypatch):
    said = []
    opened = RunLog(tmp_path, None, 0, tensorboard=False, say=said.append)
    opened.step({"step": 0, "loss": float("nan")})
    opened.step({"step": 1, "loss": 5.0})
    assert opened.close()
    assert opened.draw(wait=True) == "" and (tmp_path / "training.png").stat().st_size > 500
    assert said[-1].startswith("plot_log.py: warning: ") and "1 of 2 steps" in said[-1]
    shutil.rmtree(tmp_path)
    assert opened.draw(wait=True).startswith(f"{tmp_path}: no metrics.jsonl and no log.txt")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    assert "No such file" in opened.draw(wait=True) and "No such file" in opened.draw()


MEASURED = {"val_loss": 3.25, "hella_acc": 0.25, "hella_acc_norm": 0.5, "val_new": 1.125}


def test_what_was_measured_between_two_steps(tmp_path, monkeypatch):
    """Lines and pictures before a step; after the last step its row gets more. A new metric has a curve."""
    row = Metric("val_new", "unit", curve="loss/new", evaluated=True, log_word="new")
    monkeypatch.setattr(log, "METRICS", (*METRICS, row))
    opened = RunLog(tmp_path, None, 0, tensorboard=True)
    opened.evaluation(0, {}, expert_load=[[0.5, 0.5]], elapsed_s=0.5)  # nothing was measured
    opened.evaluation(1, {"sample": "Return"})
    opened.evaluation(2, dict(MEASURED), expert_load=[[0.5, 0.5]])
    opened.step({"step": 2, "loss": 3.5})
    opened.evaluation(3, dict(MEASURED), elapsed_s=9.5)
    assert opened.close()
    kinds = {"val": "3.250000", "hella": "0.500000", "new": "1.125000"}
    lines = [f"{step} {word} {value}" for step in (2, 3) for word, value in kinds.items()]
    assert (tmp_path / "log.txt").read_text().splitlines() == [*lines[:3], "2 train 3.500000", *lines[3:]]
    text = "s:2 tel:3.250000\ns:2 eval:0.500000\ns:2 trl:3.500000\ns:3 tel:3.250000\ns:3 eval:0.500000\n"
    assert (tmp_path / "main.log").read_text() == text
    assert read_rows(tmp_path) == [{"step": 2, "loss": 3.5, **MEASURED, "elapsed_s": 9.5}]
    events = read_events(tmp_path)
    assert points(events, "loss/new") == {3: 1.125}
    assert [event.step for event in events.Images("moe/expert_load")] == [2]
    assert [event.step for event in events.Tensors("sample/text_summary")] == [1]


def resumed(folder, step: int, **more) -> RunLog:
    """The log of a run that goes on in this folder from a checkpoint of this step."""
    path = folder / f"model_{step:05d}.pt"
    path.touch()
    return RunLog(folder, path, step, **dict(tensorboard=False) | more)


def test_a_run_that_goes_on_logs_every_step_once(tmp_path):
    """It dies in the middle of a line of step 4 and goes on from step 1; then it ends, and is made longer."""
    first = RunLog(tmp_path, None, 0, tensorboard=True)
    for step in range(4):
        first.step({"step": step, "loss": 3.5})
    assert first.close()
    with open(tmp_path / "main.log", "a") as file:
        file.write("s:4 tr")
    second = resumed(tmp_path, 1, tensorboard=True)
    second.step({"step": 1, "loss": 2.5})
    second.evaluation(2, MEASURED | {"eval_step": 2}, elapsed_s=9.5)
    assert second.close()
    third = resumed(tmp_path, 2, tensorboard=True, evaluates_first=False)
    third.step({"step": 2, "loss": 1.5})
    assert third.close() and third.elapsed_s == 9.5  # with the evaluation, which no checkpoint has
    lines = "0 trl:3.500000|1 trl:2.500000|2 tel:3.250000|2 eval:0.500000|2 trl:1.500000".split("|")
    assert (tmp_path / "main.log").read_text().splitlines() == [f"s:{line}" for line in lines]
    events = read_events(tmp_path)
    assert points(events, "loss/train") == {0: 3.5, 1: 2.5, 2: 1.5}
    for curve, value in {"loss/val": 3.25, "hellaswag/acc_norm": 0.5, "hellaswag/acc": 0.25}.items():
        assert points(events, curve) == {2: value}, curve


def test_wandb_gets_the_same_names(finished):
    wandb = finished.wandb
    fields = wandb.init.call_args.kwargs
    assert (fields["dir"], fields["project"]) == (finished.folder, "gpt-moe")
    assert fields["config"]["max_lr"] == 0.003
    assert (wandb.init.call_count, wandb.finish.call_count) == (1, 1)
    logged = [call.args for call in wandb.log.call_args_list]
    steps = [step for _, step in logged]
    assert steps == sorted(steps)  # wandb drops what comes late
    assert {"loss/train", "moe/expert_load", "sample"} <= {name for values, _ in logged for name in values}


def test_a_resumed_run_is_the_same_in_wandb_which_must_be_there(tmp_path, monkeypatch):
    wandb = pretend_wandb(monkeypatch)
    assert RunLog(tmp_path, None, 0, tensorboard=False, wandb="mine").close()
    assert resumed(tmp_path, 3, wandb="mine").close()
    assert [call.kwargs["id"] for call in wandb.init.call_args_list] == [None, "abc123"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses(r"wandb=.*pip install wandb", RunLog, tmp_path, None, 0, tensorboard=False, wandb="mine")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, broken):
    error = RuntimeError("api_key not configured (no-tty).\ncall wandb.login(key=...)")
    getattr(pretend_wandb(monkeypatch), broken).side_effect = error
    said, records = [], [{"step": step, "loss": 3.5} for step in range(3)]
    opened = RunLog(tmp_path, None, 0, tensorboard=False, wandb="mine", say=said.append)
    for record in records:
        opened.step(record)
    assert opened.close() and read_rows(tmp_path) == records
    (line,) = said
    assert "WARNING" in line and "api_key not configured (no-tty). call wandb.login(key=...)" in line


# ---------------------------------------------------------------------------- FILES AND TEXTS OF OTHERS
@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"), ("a\r\x9bK", r"a\r\x9bK"),
    ("two\nlines\t.", r"two\nlines\t."), ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
    ("\udcff", r"\udcff"), ("naïve 中 👩‍🚀", "naïve 中 👩‍🚀"),
])  # fmt: skip
def test_what_a_terminal_would_obey_is_made_visible(text, shown, capsys):
    assert printable(text) == one_line(ValueError(text)) == shown
    tell(text)
    kept = capsys.readouterr().out
    assert kept == printable(text, keep="\n\t") + "\n" and not set(kept) & set("\x1b\x9b\u202e\udcff")
    assert len(one_line("x" * 10**6)) < 2000


def test_sample_escapes_on_a_terminal_only(straight, tmp_path, monkeypatch, capsys):
    words = ["--prompt", "a\tb\n\x1b[2J", "--num_samples", "1", "--max_new_tokens", "2", "--device", "cpu"]
    for terminal, shown in ((True, "a\tb\n\\x1b[2J"), (False, "a\tb\n\x1b[2J")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        assert sample.main(["--checkpoint", str(straight / "latest"), *words]) == 0
        assert shown in capsys.readouterr().out
    assert sample.main(["--checkpoint", str(tmp_path / "x\n\x1b[2J.pt")]) == 2
    assert r"x\n\x1b[2J.pt" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


def test_files_that_no_run_wrote_stay(tmp_path):
    archive, folder = tmp_path / "archive.pt", tmp_path / "log"
    theirs = {*"model_card.md training.log .notes.tmp .notes.1.tmp model_1.pt model_00001.pt.bak".split()}
    ours = {*"log.txt model_00001.pt training.svg latest profile_2_4.json".split()}
    (folder / "tb").mkdir(parents=True)
    for path in (archive, *(folder / name for name in theirs | ours | {".log.txt.0123456789abcdef.tmp"})):
        path.write_text("kept")
    (folder / "model_00007.pt").symlink_to(archive)
    RunLog(folder, None, 0, tensorboard=False).close()
    (old,) = folder.glob("old_*")
    assert {path.name for path in old.iterdir()} == ours | {"model_00007.pt", "tb"}
    assert archive.read_text() == "kept" and (old / "model_00007.pt").is_symlink()
    assert {path.name for path in folder.iterdir()} == theirs | {*log.LOG_FILES, ".lock", old.name}
    (folder / "best").mkdir()
    refuses("is a folder; move it away: .*best", RunLog, folder, None, 0, False, error=FileExistsError)


def test_a_link_to_a_checkpoint_can_be_resumed(straight, tmp_path):
    log_dir = shutil.copytree(straight, tmp_path / "log")
    (log_dir / "best.pt").symlink_to("model_00006.pt")
    arguments = ["--resume", str(log_dir / "best.pt"), "--max_steps", "6", "--device", "cpu"]
    assert train_gpt_moe.main(arguments) == 0
    assert (log_dir / "latest").read_text() == "model_00006.pt" and (log_dir / "best.pt").is_symlink()


@pytest.mark.parametrize("name", ["log.txt", ".lock"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.with_name("victim")), os.mkfifo])
def test_a_log_file_that_is_a_link_or_a_pipe_is_refused(name, make, tmp_path):
    make(tmp_path / name)
    refuses(f"{name} is a link or no ordinary file", resumed, tmp_path, 3, error=FileExistsError)
    assert not (tmp_path / "victim").exists()


def test_a_temporary_file_is_new_not_guessed_and_in_no_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"'[^']*/no/a'$"):
        write_atomically(tmp_path / "no" / "a", lambda file: file.write(b"x"))
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".a.00.tmp").symlink_to("victim")
    monkeypatch.setattr("secrets.token_hex", lambda size: "00")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_user_may_write_into_the_logs(straight, tmp_path):
    """Notes survive a resume, and odd ones disturb neither it nor plot_log.py."""
    log_dir = shutil.copytree(straight, tmp_path / "log")
    odd = ["[" * 9999, '{"step": 12, "val_loss": ' + "9" * 400 + ', "load": "x"}', '{"step": 1e400}', "{"]
    odd += ['{"run": 3}', '{"run": {"config": {"n_layer": [[]], "use_moe": 1, "num_experts": {}}}}', "note"]
    for name, added in (("metrics.jsonl", odd), ("log.txt", ["7 apples", "12 val many", "note"])):
        (log_dir / name).write_text((log_dir / name).read_text() + "\n".join(added))
    more = ["--max_steps", "12", "--device", "cpu", "--tensorboard", "1"]
    assert train_gpt_moe.main(["--resume", str(log_dir / "model_00012.pt"), *more]) == 0
    assert (log_dir / "log.txt").read_text().startswith((straight / "log.txt").read_text()[:-50])
    assert {"7 apples", "12 val many", "note"} <= {*(log_dir / "log.txt").read_text().splitlines()}
    assert {odd[0], "note"} <= {*(log_dir / "metrics.jsonl").read_text().splitlines()}
    assert 12 in ckpt.validation_losses(log_dir)
    assert plot_log.main([str(log_dir)]) == 0


def test_a_folder_deleted_in_mid_run_loses_no_line(straight, data, tmp_path, monkeypatch, capsys):
    log, gone = tmp_path / "log", tmp_path / "gone"  # rmtree would race with the writer
    at_call(monkeypatch, train_gpt_moe, "train_step", [7], lambda *_: log.rename(gone))
    assert train_gpt_moe.main(flags(data, log)) == 1
    said = capsys.readouterr()
    assert "has lost log.txt, metrics.jsonl, main.log" in said.out and "Traceback" not in said.err
    same_run(straight, log)
