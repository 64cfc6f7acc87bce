"""Tokenizers of one's own, ids without text, nanoGPT's characters, several sources.

Run: python -m pytest tests/tokens/test_tokenizers.py"""

import json
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import DOCUMENTS, build, content, stream_of, write_source
from models import tiny
from processes import finish, flags, made_up_text, start, write_data
from test_fineweb import command, crash_and_resume
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import fineweb
from analysis.evaluate import measure, read_for
from model import GPTLMHeadModel
from tokens import encodings, sources, tokenizer_sources
from tokens.shards import DistributedDataLoader, Shard, read_meta, write_shard
from tokens.tokenizer_json import EOT, KNOWN
from training.checkpoints import load_model, save_checkpoint

EACH = ["a man a plan", "ünïcode 😀\n\n  <|endoftext|> tail", "a man plan" * 30]


def bytes_of(text: str) -> str:
    """A text in the characters of a byte-level vocabulary."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def byte_level(size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens whose last ids are words of the text."""
    alphabet, words = sorted(pre_tokenizers.ByteLevel.alphabet()), [bytes_of(w) for w in (" a", " man", "pl")]
    merges = [(words[0][0], "a"), (words[0][0], "m"), ("a", "n"), (words[0][0] + "m", "an"), ("p", "l")]
    names = [EOT, *alphabet, words[0][0] + "m", "an"]
    names += [f"unused{i}" for i in range(size - len(names) - len(words))] + words
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """What shards must hold: tokenizers' own ids of the documents, each after its end token."""
    tokenizer.encode_special_tokens = True
    end = [tokenizer.token_to_id(EOT)]
    return [i for text in texts if text.strip() for i in end + tokenizer.encode(text).ids]


def test_a_large_vocabulary_goes_through_uint32_shards_to_a_folder_and_back(tmp_path, capsys):
    source, out, tokenizer = (
        write_source(tmp_path / "a.jsonl", EACH * 9),
        tmp_path / "out",
        byte_level(100_000),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for workers in (1, 2):  # a worker process does not share the memory of this one
        flag = dict(encoding=None, tokenizer=str(tmp_path / "tokenizer.json"), workers=workers)
        meta = build(source, tmp_path / f"out{workers}", **flag)
    out = tmp_path / "out2"
    assert content(tmp_path / "out1") == content(out) and stream_of(out) == ids_of(tokenizer, EACH * 9)
    raw = (out / "val_000000.bin").read_bytes()
    assert np.frombuffer(raw, "<i4", 3).tolist() == [20240801, 7, 100] and len(raw) == 1024 + 400
    x, y = DistributedDataLoader(out, 2, 8, vocab_size=100_000).next_batch()
    assert x.max() > 1 << 16 and torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*`python fineweb.py .*--tokenizer="):
        (out / "tokenizer.json").write_text("{}")
        KNOWN.clear()
        read_meta(out)
    encoding = tokenizer_sources.read_tokenizer(str(tmp_path), None)
    assert encoding.name == meta["encoding"] and meta["vocab_size"] == 100_000
    sizes = encodings.token_bytes(encoding.name)
    assert sizes[stream_of(out)].sum() == sum(len(text.encode()) for text in EACH * 9) and sizes[0] == 0

    config = tiny(vocab_size=100_096, encoding=encoding.name, encoding_size=100_000, eos_token_id=0, n_embd=8)
    saved = save_checkpoint({"model": (model := GPTLMHeadModel(config)).state_dict(), "config": config.to_dict(),
                             "step": 1, "tokenizer": encoding.text}, tmp_path)  # fmt: skip
    steps = [
        ["convert", saved, tmp_path / "model_00002"],
        ["convert", tmp_path / "model_00002", tmp_path / "b.pt"],
    ]
    for step in [*steps, ["export", tmp_path / "b.pt", tmp_path / "folder"]]:
        KNOWN.clear()
        assert checkpoint.main([*map(str, step)]) == 0, capsys.readouterr().err
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs(EACH[0]).input_ids == tokenizer.encode(EACH[0]).ids and theirs.eos_token == EOT
    how = dict(max_new_tokens=4, do_sample=False)
    text = model.eval().generate(EACH[0], **how)
    KNOWN.clear()
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert text.startswith(EACH[0]) and remote.generate(EACH[0], **how) == text
    theirs.save_pretrained(tmp_path / "folder")  # as a Trainer does
    assert load_model(tmp_path / "folder").generate(EACH[0], **how) == text
    assert "bits_per_byte" in measure(model, read_for(model, str(tmp_path / "a.jsonl")), 8, 2, "float32")


def test_a_trained_tokenizer_is_the_same_again_after_any_kill(tmp_path, monkeypatch):
    source = write_source(
        tmp_path / "a.jsonl", texts := [*DOCUMENTS, *made_up_text()[:60_000].split(" the ")]
    )
    make = lambda out: build(source, out, encoding=None, train_tokenizer=600, shard_size=9000)  # noqa: E731
    make(tmp_path / "whole")
    tokenizer = Tokenizer.from_file(str(tmp_path / "whole" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 600 and stream_of(tmp_path / "whole") == ids_of(tokenizer, texts)
    crash_and_resume(tmp_path / "crashed", make, content(tmp_path / "whole"), range(1, 6))
    run = [*command(source, tmp_path / "killed", train_tokenizer=600, shard_size=9000), "--encoding="]
    for delay in (0.8, 1.6, None):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if delay:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        process.wait(300)
    assert process.returncode == 0 and content(tmp_path / "killed") == content(tmp_path / "whole")
    monkeypatch.setattr(fineweb, "train_bpe", lambda *_: pytest.fail("a complete folder is trained again"))
    make(tmp_path / "whole")


@pytest.mark.parametrize(("change", "flag", "words"), [
    (dict(content="{}"), {}, r"tokenizer='.*' *: it is no tokenizer\.json"),
    (dict(end="</s>"), {}, rf'has no {EOT[:2]}.*--end_token "'),
    (dict(), dict(train_tokenizer=300), "tokenizer='.*train_tokenizer: give one"),
    (dict(name="t.model"), {}, "sentencepiece.*pip install"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_used_is_named_with_the_way_out(tmp_path, change, flag, words):
    tokenizer, path = (
        Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")),
        tmp_path / change.get("name", "t.json"),
    )
    path.write_text(change.get("content") or tokenizer.to_str())
    source = write_source(tmp_path / "a.jsonl")
    make = lambda **more: build(
        source, tmp_path / "out", encoding=None, tokenizer=str(path), val_tokens=4, **more
    )  # noqa: E731
    with pytest.raises(ValueError, match=words):
        make(**flag)
    if "end" in change:
        assert make(end_token="</s>")["eot_token"] == 1
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
        assert make()["encoding"].endswith(":1")  # complete already


def test_sentencepieces_bytes_are_those_of_the_text():
    tokenizer = Tokenizer(models.BPE({"<0xC3>": 0, "<0xA9>": 1, "▁": 2, "h": 3, "i": 4, "▁h": 5}, [("▁", "h")],
                                     byte_fallback=True))  # fmt: skip
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    encoding = tokenizer_sources.add_tokenizer(tokenizer.to_str())
    ids = encodings.encode_text("hi hé", encoding.name)
    assert ids == [3, 4, 5, 0, 1] and encodings.token_bytes(encoding.name)[ids].tolist() == [1, 1, 2, 1, 1]
    assert encodings.decode_tokens(ids, encoding.name) == "hi hé"


class Evil:
    """Would write a file when a pickle is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nanogpts_characters_are_text_and_its_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = made_up_text()[:40_000]
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    table = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    Path("meta.pkl").write_bytes(pickle.dumps(table))
    ids = np.array([stoi[c] for c in text], "<u2")
    for name, part in {"train": ids[:-8000], "val": ids[-8000:]}.items():
        part.tofile(f"{name}.bin")
    assert encodings.decode_tokens(ids[:99].tolist(), read_meta(".")["encoding"]) == text[:99]
    run = start(flags(".", "log", "--sample_every", 4, "--prompt", "a", "--vocab_size", -1), "out.txt")
    assert finish(run) == 0, Path("out.txt").read_text()
    said = Path("out.txt").read_text()
    assert "sample\n    a" in said and "bits per byte" in said
    for wrong in (Evil(), table | {"stoi": Evil()}, table | {"vocab_size": 7}, b"\x80\x04garbage"):
        Path("meta.pkl").write_bytes(wrong if isinstance(wrong, bytes) else pickle.dumps(wrong))
        with pytest.raises(ValueError, match=r"meta\.pkl .*`python fineweb.py --source=input.txt .*--out"):
            read_meta(".")
    assert not Path("executed").exists()


@pytest.mark.parametrize("meta", [{"encoding": "none", "vocab_size": 65}, None])
def test_ids_without_text_train_and_offer_no_text(tmp_path, meta):
    data = tmp_path / "data"
    write_data(data)
    for path in data.glob("*.bin"):
        write_shard(path, Shard(path).read(0, np.empty(len(Shard(path)), "<u2")) % 65)
    (data / "meta.json").write_text(json.dumps(meta)) if meta else (data / "meta.json").unlink()
    arguments = flags(data, tmp_path / "log", "--sample_every", 4, *([] if meta else ["--vocab_size", 65]))
    for more in (["--max_steps", 8], ["--resume", "auto"]):
        assert finish(start([*arguments, *more], tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert (
        "no samples in this run: encoding='none'" in said
        and "sample.py" not in said
        and not re.search(r"\d bits per byte", said)
    )
    assert checkpoint.main(["export", str(tmp_path / "log" / "latest"), str(tmp_path / "folder")]) == 0
    with pytest.raises(ValueError, match="encoding='none'"):
        load_model(tmp_path / "folder").generate("text")


def test_sources_follow_each_other_each_with_its_field(tmp_path, monkeypatch, capsys):
    first, second = write_source(tmp_path / "1" / "a.jsonl", DOCUMENTS), tmp_path / "2" / "a.jsonl"
    second.parent.mkdir()
    second.write_text("".join(json.dumps({"body": f"text {i} " * 9}) + "\n" for i in range(20)))
    monkeypatch.setattr(sources, "TASK_CHARS", 200)
    both = [f"--source={first}", f"--source={second}", "--text_field=text", "--text_field=body"]
    more = ["--encoding=bytes", "--val_tokens=100", "--shard_size=500", "--workers=1"]
    make = lambda out: fineweb.main([*both, *more, f"--out={out}"])  # noqa: E731
    assert make(tmp_path / "out") == 0
    parts = [
        build(s, tmp_path / f, text_field=f) and stream_of(tmp_path / f)
        for s, f in ((first, "text"), (second, "body"))
    ]
    assert stream_of(tmp_path / "out") == sum(parts, [])
    meta = read_meta(tmp_path / "out")
    assert (meta["source"], meta["documents"]) == ("a.jsonl, a.jsonl", 27) and len(
        meta["settings"]["files"]
    ) == 2
    crash_and_resume(tmp_path / "crashed", make, content(tmp_path / "out"), (3, 6, 9))
    assert fineweb.main([*both, "--text_field=third", *more, "--out=x"]) == 2
    assert "text_field is given 3 times" in capsys.readouterr().err
