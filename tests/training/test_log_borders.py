"""A run's folder among files that are not its own; texts that must not reach the terminal as they are.

Run: python -m pytest tests/training/test_log_borders.py
"""

import os
import shutil
import threading

import pytest
from models import tiny
from processes import flags, full_disk, losses, same_run

import plot_log
import sample
import train_gpt_moe
from model import GPTLMHeadModel
from tokens.files import write_atomically
from tokens.printable import one_line, printable
from training import checkpoints as ckpt
from training import log as run_log
from training.log import RunLog
from training.terminal import tell


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"), ("a\r\x9bK", r"a\r\x9bK"),
        ("two\nlines\t.", r"two\nlines\t."),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("\udcff", r"\udcff"), ("naïve 中 👩‍🚀", "naïve 中 👩‍🚀"),
    ],
)  # fmt: skip
def test_what_a_terminal_would_obey_is_made_visible(text, shown, capsys):
    assert printable(text) == one_line(ValueError(text)) == shown
    tell(text)
    kept = capsys.readouterr().out
    assert kept == printable(text, keep="\n\t") + "\n" and not set(kept) & set("\x1b\x9b\u202e\udcff")
    assert len(one_line("x" * 10**6)) < 2000


def test_sample_escapes_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    ckpt.save_checkpoint({"model": (m := GPTLMHeadModel(tiny(vocab_size=257, encoding="bytes"))).state_dict(),
                          "config": m.config.to_dict(), "step": 0}, tmp_path)  # fmt: skip
    for terminal, shown in ((True, "a\tb\n\\x1b[2J"), (False, "a\tb\n\x1b[2J")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        assert sample.main(["--checkpoint", str(tmp_path / "latest"), "--prompt", "a\tb\n\x1b[2J"]) == 0
        assert shown in capsys.readouterr().out
    assert sample.main(["--checkpoint", str(tmp_path / "x\n\x1b[2J.pt")]) == 2
    assert r"x\n\x1b[2J.pt" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


def test_files_that_no_run_wrote_stay(tmp_path):
    archive, folder = tmp_path / "archive.pt", tmp_path / "log"
    theirs = {*"model_card.md training.log .notes.tmp .notes.1.tmp model_1.pt model_00001.pt.bak".split()}
    ours = {*"log.txt model_00001.pt training.svg latest".split()}
    (folder / "tb").mkdir(parents=True)
    for path in (archive, *(folder / name for name in theirs | ours | {".log.txt.0123456789abcdef.tmp"})):
        path.write_text("kept")
    (folder / "model_00007.pt").symlink_to(archive)
    RunLog(folder, None, 0, tensorboard=False).close()
    (old,) = folder.glob("old_*")
    assert {path.name for path in old.iterdir()} == ours | {"model_00007.pt", "tb"}
    assert archive.read_text() == "kept" and (old / "model_00007.pt").is_symlink()
    assert {path.name for path in folder.iterdir()} == theirs | {*run_log.LOG_FILES, ".lock", old.name}


def test_a_link_to_a_checkpoint_can_be_resumed(straight, tmp_path):
    log_dir = tmp_path / "log"
    shutil.copytree(straight, log_dir)
    (log_dir / "best.pt").symlink_to("model_00006.pt")
    arguments = ["--resume", str(log_dir / "best.pt"), "--max_steps", "6", "--device", "cpu"]
    assert train_gpt_moe.main(arguments) == 0
    assert (log_dir / "latest").read_text() == "model_00006.pt" and (log_dir / "best.pt").is_symlink()
    assert ckpt.load_checkpoint(log_dir / "latest")["step"] == 6


@pytest.mark.parametrize("name", ["log.txt", ".lock"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.with_name("victim")), os.mkfifo])
def test_a_log_file_that_is_a_link_or_a_pipe_is_refused(name, make, tmp_path):
    (tmp_path / "model_00003.pt").touch()
    make(tmp_path / name)
    with pytest.raises(FileExistsError, match=rf"{name} is a link or no ordinary file|{name}: cannot write"):
        RunLog(tmp_path, tmp_path / "model_00003.pt", 3, tensorboard=False)
    assert not (tmp_path / "victim").exists()


def test_a_folder_where_a_run_writes_a_file_is_refused(tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(FileExistsError, match=r"is a folder; move it away: .*latest"):
        RunLog(tmp_path, None, 0, tensorboard=False)


def test_a_circle_of_links_is_moved_aside(tmp_path):
    (tmp_path / "model_00004.pt").symlink_to("model_00004.pt")
    (tmp_path / "model_00003.pt").touch()
    RunLog(tmp_path, tmp_path / "model_00003.pt", 3, tensorboard=False).close()
    assert [path.name for path in ckpt.list_checkpoints(tmp_path)] == ["model_00003.pt"]


def test_a_temporary_file_is_new_and_not_guessed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".a.00.tmp").symlink_to("victim")
    monkeypatch.setattr("secrets.token_hex", lambda size: "00")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_user_may_write_into_the_logs(straight, tmp_path):
    """Notes survive a resume, and odd ones disturb neither it nor plot_log.py."""
    log_dir = tmp_path / "log"
    shutil.copytree(straight, log_dir)
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
    step = train_gpt_moe.train_step
    remove = lambda run, n: (n == 7 and shutil.rmtree(tmp_path / "log"), step(run, n))[1]  # noqa: E731
    monkeypatch.setattr(train_gpt_moe, "train_step", remove)
    assert train_gpt_moe.main(flags(data, tmp_path / "log")) == 1
    said = capsys.readouterr()
    assert "has lost log.txt, metrics.jsonl, main.log" in said.out and "Traceback" not in said.err
    same_run(straight, tmp_path / "log")


def test_tensorboard_on_a_full_disk_prints_one_warning(tmp_path, capfd, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # in place of pytest's
    log, said = RunLog(tmp_path, None, 0, tensorboard=True), []
    log.say = said.append
    with full_disk(2000):
        for _ in range(50):
            log._tensorboard("add_text", "sample", "x" * 1000, 0)
        log._tensorboard("flush")
    log.close()
    assert len(said) == 1 and "no more TensorBoard" in said[0] and "Trace" not in capfd.readouterr().err


def test_a_diverging_run_skips_its_sample_and_is_diagnosed(data, tmp_path, capsys):
    more = ["--max_lr", 1e20, "--min_lr", 1, "--infer_step", 5, "--sample_every", -1, "--sample_tokens", 2]
    assert train_gpt_moe.main(flags(data, tmp_path, *more, "--max_steps", 40)) == 1
    said = capsys.readouterr()
    assert "step 5: no sample: the model's logits are NaN" in said.out
    assert "steps in a row without a finite loss" in said.err and "Traceback" not in said.err
    assert losses(tmp_path, "val")[1] != losses(tmp_path, "val")[1]  # NaN
