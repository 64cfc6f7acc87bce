"""The script that makes shards: settings, crashes, signals, worker processes, a dataset of the Hub."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, refuses
from corpus import DOCUMENTS, TOKENS, build, content, small_flags, stream_of, write_source
from processes import full_disk

import fineweb
from tokens import sources


class Crash(BaseException):
    """Stands for the end of the process."""


def crash_and_resume(out: Path, make, expected: dict[str, bytes], moments) -> None:
    """Crash at the n-th renaming of a file, n from `moments`, and go on: before it, after it, and with the
    newest shard damaged besides."""
    rename = os.replace
    for moment, how in itertools.product(moments, ("before", "after", "damaged")):

        def replace(source, target, count=itertools.count(1), moment=moment, how=how):  # noqa: B008
            now = next(count) == moment
            if not now or how != "before":
                rename(source, target)
            if now:
                raise Crash

        shutil.rmtree(out, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)  # a crash of the process, not of the machine
            with patch.context() as inner, pytest.raises(Crash):
                inner.setattr(os, "replace", replace)
                make(out)
            if how == "damaged":
                for path in sorted(out.glob("*.bin"), key=os.path.getmtime)[-1:]:
                    os.truncate(path, os.path.getsize(path) - 2)
            make(out)
        assert content(out) == expected, (moment, how)


def test_crash_at_every_step_loses_nothing(tmp_path, monkeypatch):
    """Reading goes on within a .jsonl.gz, .txt and .parquet file, and within a piece."""
    write_source(tmp_path / "in" / "a.jsonl.gz")
    (tmp_path / "in" / "b.txt").write_bytes(b"some text \xff goes on " * 20)
    write_source(tmp_path / "in" / "c.parquet")
    monkeypatch.setattr(sources, "TASK_CHARS", 20)
    tasks, encode = [], fineweb.encode_pieces
    monkeypatch.setattr(fineweb, "encode_pieces", lambda *task: tasks.append(task) or encode(*task))

    def make(out):
        build(tmp_path / "in", out, shard_size=170, val_tokens=40, errors="replace")

    make(tmp_path / "out")
    expected, whole = content(tmp_path / "out"), len(tasks)
    renamings = 2 * (len(expected) - 1)
    assert renamings > 14 and whole > 20 and json.loads(expected["meta.json"])["replaced"] == 20
    crash_and_resume(tmp_path / "crashed", make, expected, range(1, renamings + 1))
    tasks.clear()
    crash_and_resume(tmp_path / "crashed", make, expected, [renamings - 2])
    assert len(tasks) < 3.7 * whole  # three times all but the end, and three times only the end


def test_hub_dataset(tmp_path, monkeypatch):
    """A dataset of three files of 50 documents, without network."""
    import datasets

    rows = [[f"file {f} row {i} " * 3 if i % 10 else "" for i in range(50)] for f in range(3)]
    files = [str(write_source(tmp_path / f"{f}.parquet", rows[f])) for f in range(3)]
    load = datasets.load_dataset

    def load_dataset(name, subset, split, revision, streaming):
        assert (name, subset, split, revision, streaming) == ("owner/name", None, "train", None, True)
        return load("parquet", data_files=files, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "TASK_CHARS", 200)
    make = lambda out: build("owner/name", out, shard_size=1000)  # noqa: E731
    meta = make(tmp_path / "whole")
    assert (meta["documents"], meta["empty"]) == (150, 15)
    for parts in (2, 4):  # by files; more parts than files: by documents
        for part in range(parts):
            build("owner/name", tmp_path / f"{parts}", num_parts=parts, part=part, shard_size=1000)
        assert sorted(stream_of(tmp_path / f"{parts}")) == sorted(stream_of(tmp_path / "whole"))
    crash_and_resume(tmp_path / "crashed", make, content(tmp_path / "whole"), [3, 6])
    mixed = lambda out: build(["owner/name", files[0], "owner/name"], out, shard_size=1000)  # noqa: E731
    mixed(tmp_path / "mixed")
    build(files[0], tmp_path / "file")
    expected = [token for name in ("whole", "file", "whole") for token in stream_of(tmp_path / name)]
    assert stream_of(tmp_path / "mixed") == expected
    crash_and_resume(tmp_path / "crashed", mixed, content(tmp_path / "mixed"), [6, 12, 18, 24])
    refuses("owner/name: .*'body'.*'text', 'id'", build, "owner/name", tmp_path / "other", text_field="body")


def test_workers_do_not_change_the_output(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TASK_CHARS", 2000)
    write_source(tmp_path / "in" / "a.jsonl", DOCUMENTS * 5)
    (tmp_path / "in" / "b.txt").write_text("".join(f"{i} words and a line\n" for i in range(5000)))
    for workers in (1, 2):
        build(tmp_path / "in", tmp_path / str(workers), workers=workers, shard_size=20_000)
    assert content(tmp_path / "1") == content(tmp_path / "2") and len(content(tmp_path / "1")) == 8


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A source of a gigabyte that takes no room: whoever is to be stopped later is still at it."""
    folder = tmp_path_factory.mktemp("endless")
    (folder / "text").write_text("many words and a line\n" * 500_000)
    (folder / "in").mkdir()
    for i in range(100):
        (folder / "in" / f"{i:02d}.txt").symlink_to(folder / "text")
    return folder / "in"


@pytest.mark.parametrize("name, workers", [("SIGTERM", 1), ("SIGTERM", 2), ("SIGINT", 2)])
def test_a_signal_ends_it_at_once(endless, tmp_path, name, workers, request):
    flags = small_flags(endless, tmp_path, shard_size=200_000, workers=workers)
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, ROOT / "fineweb.py", *flags], **pipes, start_new_session=True)
    request.addfinalizer(process.kill)
    while process.poll() is None and not list(tmp_path.glob("*.bin")):
        time.sleep(0.002)
    os.killpg(process.pid, number := getattr(signal, name))
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    assert not list(tmp_path.glob(".*.tmp"))


WRONG = {"--shard_size 0": "shard_size=0 .* 1", "--shard_size 2147483648": "shard_size=2147483648 .*below",
         "--val_tokens=-1": "val_tokens=-1", "--limit_docs 0": "limit_docs=0", "--workers=-1": "workers=-1",
         "--num_parts 0": "num_parts=0", "--num_parts 2 --part 2": "part=2 .* 1", "": "out is missing.*--out",
         "--out out --encoding nonsense": "encoding='nonsense'", "--out a.txt": r"a\.txt is no folder",
         "--out=": "out is missing", "--out out --end_token <E>": "end_token='<E>' needs --tokenizer",
         "--demo --out out": "demo: .*not --source", "--out out --source ~/no.txt": "='/.*no.txt' is no file",
         "--out out --source .": r"source='\.' .*\.jsonl",
         "--shard_sise 5": "--shard_sise", "--workers two": "--workers: invalid int"}  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_settings_are_named(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "a.doc" if "--source ." in arguments else "a.txt"
    (tmp_path / source).write_text("hello")
    with pytest.raises(SystemExit, match="2"):  # argparse itself exits
        sys.exit(fineweb.main(["--source", source, "--encoding", "bytes", *arguments.split()]))
    assert re.search(f"error: .*{WRONG[arguments]}", capsys.readouterr().err)


def test_full_disk_is_reported_and_gone_on_from(tmp_path, capsys):
    source = write_source(tmp_path / "a.jsonl", DOCUMENTS * 40)
    make = small_flags(source, tmp_path / "out", shard_size=3000)
    with full_disk(4000):
        assert fineweb.main(make) == 1
    assert f"shard with: python fineweb.py {make[0]}" in capsys.readouterr().err
    assert sorted(content(tmp_path / "out")) == ["meta.json", "val_000000.bin"]
    assert fineweb.main(make) == 0 and stream_of(tmp_path / "out") == TOKENS * 40


@pytest.mark.parametrize(("cause", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_signals_that_come_while_tqdm_takes_its_lock(monkeypatch, cause, code):
    error = RuntimeError("cannot release un-acquired lock")
    error.__context__ = cause
    monkeypatch.setattr(fineweb, "build", mock.Mock(side_effect=error))
    assert fineweb.main([]) == code
    error.__context__ = None  # no signal
    refuses("lock", fineweb.main, [], error=RuntimeError)


def test_it_starts_without_torch():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
