"""What tells data from other data of the same names and sizes: shards, sources, parts, meta.json.

Run: python -m pytest tests/tokens/test_identity.py
"""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from processes import flags

import fineweb
import train_gpt_moe
from tokens import shard_writer
from tokens.files import DataError
from tokens.identity import load_metas
from tokens.shards import DistributedDataLoader, Shard, read_shard, write_shard


def command(source: Path, out: Path, *more) -> int:
    """Exit code of fineweb.py on small texts."""
    words = ["--source", source, "--out", out, "--encoding=bytes", "--workers=1", "--shard_size=2000"]
    return fineweb.main([*map(str, words), "--val_tokens=100", *more])


def error_line(capsys) -> str:
    """The only line on stderr, without tqdm's bars."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "train_gpt"))]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "corpus").mkdir()
    for name in "abc":
        (tmp_path / "corpus" / f"{name}.txt").write_text(f"{name} word " * 1000)
    return tmp_path / "corpus"


@pytest.fixture
def killed(corpus, tmp_path, monkeypatch) -> Path:
    """The folder of a fineweb.py that was killed after three shards."""
    writes = itertools.count()
    with monkeypatch.context() as patch:
        kill = lambda *shard: write_shard(*shard) if next(writes) < 3 else 1 / 0  # noqa: E731
        patch.setattr(shard_writer, "write_shard", kill)
        with pytest.raises(ZeroDivisionError):
            command(corpus, tmp_path / "out")
    return tmp_path / "out"


# ---------------------------------------------------------------------------- SHARDS


def edit(path: Path, first: int, end: int) -> None:
    """Replace tokens first to end - 1 of a shard in place."""
    with open(path, "r+b") as file:
        file.seek(1024 + 2 * first)
        file.write(bytes(2 * (end - first)))


def test_shard_that_is_cut_while_it_is_open(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(4000, dtype=np.uint16))
    loader = DistributedDataLoader(tmp_path, B=1, T=100, shuffle=False, prefetch=0)
    loader.next_batch()
    os.truncate(path, 1024 + 2 * 250 + 1)  # token 250 has one of its bytes
    loader.next_batch()
    for _ in range(2):  # the position stays
        with pytest.raises(DataError, match=r"train_000000\.bin: no token at offset 250: .*shorter"):
            loader.next_batch()
    write_shard(path, np.arange(4000, dtype=np.uint16))
    shard = Shard(path)
    assert shard.read(3990, 4000).tolist() == list(range(3990, 4000))
    shard.file.close()
    shard.file = open("/proc/self/mem", "rb", buffering=0)  # whose first bytes no process can read
    with pytest.raises(DataError, match=r"train_000000\.bin: no token at offset 7: Input/output error"):
        shard.read(7, 9)


@pytest.mark.parametrize("split", ["train", "val"])
def test_run_survives_a_shard_that_is_cut(split, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data, tmp_path / "data")
    step = train_gpt_moe.train_step

    def cut_after_step_2(run, number):
        if number == 2:
            os.truncate(tmp_path / "data" / f"{split}_000000.bin", 2000)
        return step(run, number)

    monkeypatch.setattr(train_gpt_moe, "train_step", cut_after_step_2)
    assert train_gpt_moe.main(flags(tmp_path / "data", tmp_path / "log")) == 2
    line = error_line(capsys)
    assert f"{split}_000000.bin: no token at offset" in line and "--resume auto" in line
    assert [path.name for path in (tmp_path / "log").glob("model_*")]
    shutil.copy(Path(data, f"{split}_000000.bin"), tmp_path / "data")
    assert train_gpt_moe.main(flags(tmp_path / "data", tmp_path / "log", "--resume", "auto")) == 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_resume_refuses_shards_with_another_middle(split, data, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "log")
    shutil.copytree(data, tmp_path / "data")
    changed = tmp_path / "data" / f"{split}_000000.bin"
    edit(changed, 256, len(read_shard(changed)) - 256)
    assert train_gpt_moe.main(flags(tmp_path / "data", tmp_path / "log", "--resume", "auto")) == 2
    assert f"{changed} is another shard" in error_line(capsys)


def test_loader_compares_what_a_checkpoint_has(data):
    train, val = (DistributedDataLoader(f"{data}/{split}_*.bin", B=2, T=8) for split in ("train", "val"))
    train.watch(val)
    state = train.state_dict()
    train.load_state_dict(
        {k: v for k, v in state.items() if k not in ("fingerprints", "validation")}
    )  # older
    train.load_state_dict(state | {"sha256": "of other tokens, but the fingerprints say more"})
    for wrong in ({"validation": state["validation"] * 2}, {"validation": 3}, {"fingerprints": ""}):
        with pytest.raises(
            ValueError, match="cannot continue: .*(missing here|_000000.bin) is another shard"
        ):
            train.load_state_dict(state | wrong)


def test_verify_compares_every_token(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(corpus, out) == 0
    verify = ["--verify", "--out", str(out)]
    assert fineweb.main(verify) == 0
    assert re.search(r"compared \d+ shards, 24,003 tokens", capsys.readouterr().out)
    edit(out / "train_000001.bin", 777, 778)
    os.truncate(out / "train_000002.bin", 3000)
    (out / "train_000003.bin").unlink()
    shutil.copy(out / "val_000000.bin", out / "train_000099.bin")
    assert fineweb.main(verify) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"train_00\d+", line)[0][-2:] for line in lines] == ["01", "02", "03", "99"], lines
    for name in ("train_000001.bin", "train_000099.bin"):
        (out / name).unlink()
    assert command(corpus, out) == 0 == fineweb.main(verify)  # as the messages say
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "checksums"}))
    assert fineweb.main(verify) == 0 and "have no checksum" in capsys.readouterr().out
    (out / "meta.json").unlink()
    assert fineweb.main(verify) == 2 and "no meta.json" in error_line(capsys)


# ---------------------------------------------------------------------------- SOURCES


def rewrite(corpus: Path) -> None:
    (corpus / "b.txt").write_text("z WORD " * 1000)


CHANGES = {
    "replaced": (rewrite, "source file 'corpus/b.txt'"),
    "renamed": (lambda corpus: (corpus / "b.txt").rename(corpus / "d.txt"), "'corpus/d.txt'='missing'"),
    "swapped": (
        lambda corpus: os.replace(shutil.copy(corpus / "a.txt", corpus / "x"), corpus / "b.txt"),
        "b.txt",
    ),
    "removed": (lambda corpus: (corpus / "c.txt").unlink(), "'corpus/c.txt'='missing'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sources_that_changed_after_a_kill_are_refused(change, corpus, killed, capsys):
    before = {path: path.read_bytes() for path in killed.iterdir()}
    alter, words = CHANGES[change]
    alter(corpus)
    assert command(corpus, killed) == 2
    line = error_line(capsys)
    assert words in line and "another --out, or delete the folder" in line
    assert {path: path.read_bytes() for path in killed.iterdir()} == before


def test_copied_sources_and_older_folders_continue(corpus, killed, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    copied = Path(shutil.copytree(corpus, tmp_path / "elsewhere" / "corpus", copy_function=shutil.copyfile))
    os.utime(copied / "a.txt", (1e9, 1e9))
    meta = json.loads((killed / "meta.json").read_text())
    del meta["settings"]["files"], meta["checksums"]
    older = Path(shutil.copytree(killed, tmp_path / "older"))
    (older / "meta.json").write_text(json.dumps(meta))
    assert command(copied, killed) == 0 and "taken for copies" in capsys.readouterr().out
    assert command(corpus, older) == command(corpus, tmp_path / "straight") == 0
    checksums = [json.loads((folder / "meta.json").read_text())["checksums"] for folder in
                 (killed, tmp_path / "straight", older)]  # fmt: skip
    assert checksums[0] == checksums[1] and checksums[2].items() < checksums[1].items()
    assert fineweb.main(["--verify", "--out", str(killed)]) == 0


def test_parts_of_other_sources_or_settings_are_refused(corpus, tmp_path, capsys, monkeypatch):
    out, parts = tmp_path / "out", ["--num_parts=2"]
    assert command(corpus, out, *parts, "--part=0") == 0
    rewrite(corpus)
    assert command(corpus, out, *parts, "--part=1") == 2
    assert "source file 'corpus/b.txt'" in error_line(capsys)
    apart = tmp_path / "apart"  # part 1 begins while no other part is there, as on another machine
    assert command(corpus, apart, *parts, "--part=1") == 0
    for path in apart.iterdir():
        shutil.copy(path, out)
    for read in (lambda: load_metas(str(out)), lambda: fineweb.main(["--verify", "--out", str(out)]) / 0):
        with pytest.raises((ValueError, ZeroDivisionError)):
            read()
    assert "b.txt" in error_line(capsys)
    flush = shard_writer.ShardWriter._flush  # part 0 appears in the middle of part 1's work

    def flush_when_part_0_appears(writer, following):
        if writer.n == 1:
            shutil.copy(out / "meta_p0000.json", writer.folder)
        flush(writer, following)

    monkeypatch.setattr(shard_writer.ShardWriter, "_flush", flush_when_part_0_appears)
    assert command(corpus, tmp_path / "together", *parts, "--part=1") == 2
    assert not json.loads((tmp_path / "together" / "meta_p0001.json").read_text())["complete"]


FORGED = {
    "name of a file": {"shards": {"../train_000000.bin": 5}}, "count": {"shards": {"train_000000.bin": "5"}},
    "negative": {"tokens": {"train": -1}}, "truth": {"tokens": {"train": True}}, "checksum": {"checksums": {"a": 1}},
    "checksums": {"checksums": []}, "place": {"places": {"3": [{"file": "0"}, 0]}}, "skip": {"places": {"3": [{}]}},
    "settings": {"settings": 3}, "files": {"settings": {"files": ["a"]}}, "file": {"settings": {"files": {"a": 1}}},
    "source": {"source": 3}, "vocabulary": {"vocab_size": 10**12}, "eot": {"eot_token": 300},
}  # fmt: skip


@pytest.mark.parametrize("entry", FORGED)
def test_forged_meta_json_is_refused_in_one_line(entry, data, tmp_path, capsys):
    meta = json.loads(Path(data, "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | FORGED[entry]))
    for arguments in (["--verify"], ["--demo"]):
        assert fineweb.main([*arguments, "--out", str(tmp_path)]) == 2
        line = error_line(capsys)
        assert "meta.json is damaged" in line and "python fineweb.py" in line and len(line) < 700
