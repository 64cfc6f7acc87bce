"""What tells data from other data of the same names and sizes: shards, sources, parts, meta.json."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import refuses
from corpus import content, small_flags, write_source
from processes import flags

import fineweb
import train_gpt_moe
from tokens import shard_writer
from tokens.files import DataError
from tokens.shards import DistributedDataLoader, Shard, read_meta, read_shard, write_shard


def make(source: Path, out: Path, **more) -> list[str]:
    return small_flags(source, out, shard_size=2000, **more)


def build(*arguments, **more) -> int:
    return fineweb.main(make(*arguments, **more))


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_source(tmp_path / "corpus", [f"{name} word " * 1000 for name in "abc"])


@pytest.fixture
def killed(corpus, tmp_path, monkeypatch) -> Path:
    """The folder of a fineweb.py that was killed after three shards: before each it writes meta.json."""
    left = [shard_writer.write_atomically] * 7
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(shard_writer, "write_atomically", lambda *file: left.pop()(*file))
        build(corpus, tmp_path / "out")
    return tmp_path / "out"


def test_shard_that_is_cut_or_fails_while_it_is_open(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(4000, dtype=np.uint16))
    loader, shard = DistributedDataLoader(tmp_path, 1, 100, shuffle=False, prefetch=0), Shard(path)
    assert shard.read(3990, np.empty(10, np.uint16)).tolist() == list(range(3990, 4000))
    loader.next_batch()
    os.truncate(path, 1024 + 2 * 250 + 1)  # one byte of token 250 is left
    loader.next_batch()
    for _ in range(2):  # the position stays
        refuses(r"train_000000\.bin: no token at offset 250: .*shorter", loader.next_batch, error=DataError)
    if Path("/proc/self/mem").exists():
        shard.file = open("/proc/self/mem", "rb", buffering=0)  # reading its first bytes is an error
        words = r"train_000000\.bin: no token at offset 7: Input/output error"
        refuses(words, shard.read, 7, np.empty(2, np.uint16), error=DataError)


@pytest.mark.parametrize("split", ["train", "val"])
def test_resume_refuses_shards_with_another_middle(split, data, straight, tmp_path, refused):
    shutil.copytree(straight, tmp_path / "log")
    path = Path(shutil.copytree(data, tmp_path / "data"), f"{split}_000000.bin")
    tokens = read_shard(path)
    tokens[256:-256] = 7
    write_shard(path, tokens)
    resume = flags(tmp_path / "data", tmp_path / "log", "--resume", "auto")
    assert f"{path} is another shard" in refused(train_gpt_moe.main, *resume)


def test_loader_compares_what_a_checkpoint_has(data):
    train, val = (DistributedDataLoader(f"{data}/{split}_*.bin", B=2, T=8) for split in ("train", "val"))
    train.watch(val)
    state = train.state_dict()
    older = {name: value for name, value in state.items() if name not in ("fingerprints", "validation")}
    train.load_state_dict(older)
    message = r"cannot continue: .*(missing here|_000000.bin) is another shard"
    for wrong in ({"validation": state["validation"] * 2}, {"validation": 3}, {"fingerprints": ""}):
        refuses(message, train.load_state_dict, state | wrong)


def test_verify_compares_every_token_and_the_same_command_mends_them(corpus, tmp_path, capsys, refused):
    out, verify = tmp_path / "out", ["--verify", "--out", str(tmp_path / "out")]
    assert build(corpus, out) == 0 == fineweb.main(verify)
    assert "compared 12 shards, 21,003 tokens" in capsys.readouterr().out
    expected = content(shutil.copytree(out, other := tmp_path / "other"))
    shutil.copy(out / "train_000003.bin", other / "train_000001.bin")  # a run notices that by itself
    refuses(r"train_000001\.bin: its tokens are not those .* --verify", read_meta, other)
    raw = bytearray((out / "train_000001.bin").read_bytes())
    raw[1777] ^= 1
    (out / "train_000001.bin").write_bytes(raw)
    os.truncate(out / "train_000002.bin", 3000)
    (out / "train_000003.bin").unlink()
    shutil.copy(out / "val_000000.bin", out / "train_000099.bin")
    assert fineweb.main(verify) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"train_0000(\d+)", line)[1] for line in lines] == ["01", "02", "03", "99"], lines
    (out / "train_000001.bin").unlink()
    (out / "train_000099.bin").unlink()
    for name in (".train_000002.bin", ".meta.json"):  # left by a kill
        (out / f"{name}.0123456789abcdef.tmp").touch()
    assert build(corpus, out) == 0 and content(out) == expected  # as the messages say
    for lost in ("meta.json", "val_000000.bin"):
        (out / lost).unlink()
    assert "no meta.json" in refused(fineweb.main, *verify)
    assert build(corpus, out) == 0 and content(out) == expected


CHANGES = {
    "replaced": (lambda folder: (folder / "1.txt").write_text("z WORD " * 1000), "file 'corpus/1.txt'"),
    "renamed": (lambda folder: (folder / "1.txt").rename(folder / "3.txt"), "'corpus/3.txt'='missing'"),
    "removed": (lambda folder: (folder / "2.txt").unlink(), "'corpus/2.txt'='missing'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sources_that_changed_after_a_kill_are_refused(change, corpus, killed, refused):
    before = content(killed)
    alter, words = CHANGES[change]
    alter(corpus)
    line = refused(fineweb.main, *make(corpus, killed))
    assert words in line and "another --out, or delete the folder" in line
    assert content(killed) == before


def test_copied_sources_and_older_folders_continue(corpus, killed, tmp_path, capsys):
    older = Path(shutil.copytree(killed, tmp_path / "older"), "meta.json")
    meta = json.loads(older.read_text())
    del meta["settings"]["files"], meta["checksums"]
    older.write_text(json.dumps(meta))
    for path in corpus.iterdir():
        os.utime(path, (1e9, 1e9))
    assert build(corpus, killed) == 0 and "taken for copies" in capsys.readouterr().out
    assert build(corpus, older.parent) == build(corpus, tmp_path / "straight") == 0
    assert (killed / "meta.json").read_bytes() == (tmp_path / "straight" / "meta.json").read_bytes()
    assert fineweb.main(["--verify", "--out", str(older.parent)]) == 0
    assert "3 of them have no checksum" in capsys.readouterr().out


def test_parts_of_other_sources_are_refused(corpus, tmp_path, refused):
    out = tmp_path / "out"
    assert build(corpus, out, num_parts=2, part=0) == 0
    CHANGES["replaced"][0](corpus)
    assert "file 'corpus/1.txt'" in refused(fineweb.main, *make(corpus, out, num_parts=2, part=1))
    assert build(corpus, tmp_path / "apart", num_parts=2, part=1) == 0
    shutil.copytree(tmp_path / "apart", out, dirs_exist_ok=True)
    assert "1.txt" in refused(train_gpt_moe.main, *flags(out, tmp_path / "log"))


def test_a_part_is_rebuilt_by_its_own_command(corpus, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)  # where the command finds the source
    for part in (0, 1):
        assert build(corpus, "out", num_parts=2, part=part) == 0
    path = Path("out", "train_p0001_000000.bin")
    os.truncate(path, 3000)
    (command,) = re.findall("`python fineweb.py (.*)`", refused(fineweb.main, "--verify", "--out", "out"))
    assert "--part=1" in command and fineweb.main([*shlex.split(command), "--workers=1"]) == 0
    assert fineweb.main(["--verify", "--out", "out"]) == 0
    (meta := Path("out", "meta_p0001.json")).write_text(meta.read_text().replace("true", "false"))
    assert "--part=1" in refused(fineweb.main, "--verify", "--out", "out")
    with pytest.warns(UserWarning, match="unfinished.* --part=1"):
        read_meta("out")


FORGED = [dict(shards={"../train_000000.bin": 5}), dict(shards={"a.bin": "5"}), dict(tokens={"train": -1}),
          dict(tokens={"train": True}), dict(checksums={"a": 1}), dict(checksums=[]), dict(source=3),
          dict(places={"3": [{"file": "0"}, 0]}), dict(places={"3": [{}]}), dict(settings=3),
          dict(eot_token=300), dict(settings={"files": ["a"]}), dict(settings={"files": {"a": 1}}),
          dict(vocab_size=10**12)]  # fmt: skip


@pytest.mark.parametrize("entry", FORGED)
def test_forged_meta_json_is_refused_in_one_line(entry, data, tmp_path, refused):
    meta = json.loads(Path(data, "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | entry))
    for command in ("--verify", "--demo"):
        line = refused(fineweb.main, command, "--out", tmp_path)
        assert "meta.json is damaged" in line and "python fineweb.py" in line and len(line) < 700
