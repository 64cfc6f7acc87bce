"""Encodings of bytes and of tiktoken, tokenizers of one's own, ids without text, nanoGPT's characters."""

import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import requests
import tiktoken
from conftest import ROOT, refuses, slow
from corpus import DOCUMENTS, build, content, small_flags, stream_of, write_source
from models import Malice, tiny
from processes import finish, flags, made_up_text, start, write_data
from test_fineweb import crash_and_resume
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import fineweb
import train_gpt_moe
from model import GPTLMHeadModel
from tokens import encodings
from tokens.identity import fineweb_command
from tokens.own_tokenizers import EOT, KNOWN, add_tokenizer, read_tokenizer
from tokens.shards import DistributedDataLoader, read_meta, read_shard, write_shard
from training.checkpoints import load_model, save_checkpoint


def test_bytes_encoding_is_utf8_and_needs_no_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = encodings.get_encoding("bytes")
    text = "naïve 😀\n\n\ttab<|endoftext|>" + "long line " * 200
    assert encodings.encode(encoding, text).tolist() == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # exported folders may lie where it is not installed
    ids = encodings.encode_text(text, "bytes")
    assert ids == list(text.encode()) and encodings.decode_tokens([*ids, 256], "bytes") == text


OFFLINE = Mock(side_effect=requests.exceptions.ConnectionError("no route"))
SMALL = tiktoken.Encoding("small", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})
WITHOUT_END = Mock(return_value=SMALL)


@pytest.mark.parametrize(("name", "fetch", "words"), [
    ("gtp2", WITHOUT_END, "encoding='gtp2'.*'gpt2'"),
    ("p50k_base", OFFLINE, "'p50k_base'.*TIKTOKEN_CACHE_DIR.*--encoding bytes"),
    ("cl100k_base", WITHOUT_END, r"'cl100k_base' has no <\|endoftext\|>.*gpt2"),
])  # fmt: skip
def test_an_encoding_that_cannot_be_used_is_named_with_the_way_out(name, fetch, words, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", fetch)
    refuses(words, encodings.get_encoding, name)
    refuses(r"encoding='unknown'.*config\.json", encodings.decode_tokens, [1], "unknown")


def test_ids_that_a_vocabulary_does_not_use_have_no_text(monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    gaps = tiktoken.Encoding("gaps", pat_str=".", mergeable_ranks=ranks, special_tokens={EOT: 300})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gaps)
    assert encodings.decode_tokens([97, 299, 300, 400, 98], "cl100k_base") == "ab"


# ---------------------------------------------------------------------------- TOKENIZERS
TEXTS = ["a man a plan", "ünïcode 😀\n\n  <|endoftext|> tail", "a man plan" * 30] * 9


def byte_level(size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens, with <|endoftext|> first and words last."""
    names = [EOT, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġm", "an"]
    names += [f"unused{i}" for i in range(size - len(names) - 3)] + ["Ġa", "Ġman", "pl"]
    merges = [("Ġ", "a"), ("Ġ", "m"), ("a", "n"), ("Ġm", "an"), ("p", "l")]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """What shards must hold: the ids of tokenizers itself, after each document's end token."""
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id(EOT)
    return [i for text in texts if text.strip() for i in [end, *tokenizer.encode(text).ids]]


@pytest.mark.slow
def test_a_large_vocabulary_goes_through_uint32_shards_to_a_folder_and_back(tmp_path, capsys):
    source, tokenizer, out = write_source(tmp_path / "a.jsonl", TEXTS), byte_level(100_000), tmp_path / "out"
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    meta = build(source, out, encoding=None, tokenizer=str(tmp_path / "tokenizer.json"), workers=2)
    head = np.fromfile(out / "val_000000.bin", "<i4", 3).tolist()
    assert stream_of(out) == ids_of(tokenizer, TEXTS) and head == [20240801, 7, 100]
    assert DistributedDataLoader(out, 8, 32, vocab_size=100_000).next_batch()[0].max() > 1 << 16
    KNOWN.clear()
    (out / "tokenizer.json").write_text("{}")
    refuses(r"tokenizer\.json: .*`python fineweb.py .*--tokenizer=", read_meta, out)
    encoding = read_tokenizer(str(tmp_path), None)
    sizes = encodings.token_bytes(encoding.name)
    assert sizes[stream_of(out)].sum() == len("".join(TEXTS).encode()) and encoding.name == meta["encoding"]

    fields = dict(vocab_size=100_096, encoding_size=100_000, eos_token_id=0, n_embd=8)
    model = GPTLMHeadModel(config := tiny(encoding=encoding.name, **fields)).eval()
    saved = dict(model=model.state_dict(), config=config.to_dict(), step=1, tokenizer=encoding.text)
    paths = save_checkpoint(saved, tmp_path), tmp_path / "b", tmp_path / "c.pt", tmp_path / "folder"
    for how, first, second in zip(("convert", "convert", "export"), paths, paths[1:], strict=False):
        KNOWN.clear()
        assert checkpoint.main([how, str(first), str(second)]) == 0, capsys.readouterr().err
    theirs, how = AutoTokenizer.from_pretrained(paths[-1]), dict(max_new_tokens=4, do_sample=False)
    assert theirs(TEXTS[0]).input_ids == tokenizer.encode(TEXTS[0]).ids and theirs.eos_token == EOT
    text = model.generate(TEXTS[0], **how)
    KNOWN.clear()
    remote = AutoModelForCausalLM.from_pretrained(paths[-1], trust_remote_code=True)
    theirs.save_pretrained(paths[-1])  # as a Trainer does
    assert load_model(paths[-1]).generate(TEXTS[0], **how) == remote.generate(TEXTS[0], **how) == text
    assert text.startswith(TEXTS[0]) and len(text) > len(TEXTS[0])


@pytest.mark.slow
def test_a_trained_tokenizer_is_the_same_again_after_any_kill(tmp_path, monkeypatch):
    texts = [*DOCUMENTS, *made_up_text()[:60_000].split(" the ")]
    source = write_source(tmp_path / "a.jsonl", texts)
    make = lambda out: build(source, out, encoding=None, train_tokenizer=600, shard_size=9000)  # noqa: E731
    make(whole := tmp_path / "whole")
    tokenizer = Tokenizer.from_file(str(whole / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 600 and stream_of(whole) == ids_of(tokenizer, texts)
    crash_and_resume(tmp_path / "crashed", make, content(whole), range(1, 6))
    settings = small_flags(source, tmp_path / "killed", train_tokenizer=600, shard_size=9000)
    run = [sys.executable, ROOT / "fineweb.py", *settings, "--encoding="]
    for seconds in (0.8, 1.6):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.kill()
        process.wait()
    subprocess.run(run, check=True, capture_output=True)
    assert content(tmp_path / "killed") == content(whole)
    monkeypatch.setattr(fineweb, "train_bpe", lambda *_: pytest.fail("a complete folder is trained again"))
    make(whole)


@pytest.mark.parametrize(("name", "text", "flag", "words"), [
    ("t.json", "{}", {}, "tokenizer='.*t.json' cannot be read"),
    ("t.json", "", {}, 'has no <.* --end_token "'),
    ("t.json", "", dict(train_tokenizer=300), "tokenizer='.*train_tokenizer: give one"),
    ("t.model", "spm", {}, "sentencepiece.*pip install"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_used_is_named_with_the_way_out(tmp_path, name, text, flag, words):
    if name == "t.model" and __import__("importlib").util.find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    known, source = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")), write_source(tmp_path / "a.jsonl")
    (tmp_path / name).write_text(text or known.to_str())
    flags = dict(encoding=None, tokenizer=str(tmp_path / name), val_tokens=4)
    refuses(words, build, source, tmp_path / "out", **flags, **flag)
    for wrong in (flags | dict(tokenizer=no) for no in (str(tmp_path / "none"), "none")):
        refuses("tokenizer='.*none': no such file.* gpt2", build, source, tmp_path / "out", **wrong)
    if not (text or flag):
        assert build(source, tmp_path / "out", **flags, end_token="</s>")["eot_token"] == 1
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
        assert build(source, tmp_path / "out", **flags)["encoding"].endswith(":1")  # complete already


def test_the_bytes_of_sentencepieces_tokens_are_those_of_the_text():
    vocabulary = {"<0xC3>": 0, "<0xA9>": 1, "▁": 2, "h": 3, "i": 4, "▁h": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "h")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    name = add_tokenizer(tokenizer.to_str()).name
    ids = encodings.encode_text("hi hé", name)
    assert ids == [3, 4, 5, 0, 1] and encodings.token_bytes(name)[ids].tolist() == [1, 1, 2, 1, 1]
    assert encodings.decode_tokens(ids, name) == "hi hé"


@pytest.mark.slow
def test_nanogpts_characters_are_text_and_its_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = made_up_text()[:40_000]
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    table = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    Path("meta.pkl").write_bytes(pickle.dumps(table))
    ids = np.array([stoi[c] for c in text], "<u2")
    ids[:-8000].tofile("train.bin")
    ids[-8000:].tofile("val.bin")
    assert encodings.decode_tokens(ids[:99].tolist(), read_meta(".")["encoding"]) == text[:99]
    code = finish(start(flags(".", "log", "--sample_every", 4, "--prompt", "a", "--max_steps", 4), "out.txt"))
    said = Path("out.txt").read_text()
    assert code == 0 and "sample\n    a" in said and "bits per byte" in said, said
    evil = Malice("executed")
    for wrong in (evil, table | {"stoi": evil}, table | {"vocab_size": 7}, 7):
        Path("meta.pkl").write_bytes(pickle.dumps(wrong))
        refuses(r"meta\.pkl: .*`python fineweb.py --source=input.txt .*--out", read_meta, ".")
    assert not Path("executed").exists()


@pytest.mark.parametrize("has_meta", [True, *slow(False)])
def test_ids_without_text_train_and_offer_no_text(tmp_path, has_meta, capsys, refused):
    write_data(data := tmp_path / "data")
    for path in data.glob("*.bin"):
        write_shard(path, read_shard(path) % 65)
    meta = json.loads((data / "meta.json").read_text()) | dict(encoding="none", vocab_size=65, eot_token=None)
    (data / "meta.json").write_text(json.dumps(meta)) if has_meta else (data / "meta.json").unlink()
    more = [] if has_meta else ["--vocab_size", 65]
    for steps in ([*more, "--max_steps", 4], ["--max_steps", 8, "--resume", "auto"]):
        assert train_gpt_moe.main(flags(data, tmp_path / "log", "--sample_every", 4, *steps)) == 0
    said = "".join(capsys.readouterr())
    assert "no samples in this run: encoding='none'" in said
    assert not re.search("sample.py|[0-9] bits per", said)
    for wrong in (["--align", "documents"], ["--document_mask", "True"]):
        line = refused(train_gpt_moe.main, *flags(data, tmp_path / "no", *more, *wrong))
        assert wrong[0].strip("-") in line
    assert checkpoint.main(["export", str(tmp_path / "log" / "latest"), str(tmp_path / "folder")]) == 0
    refuses("encoding='none'", load_model(tmp_path / "folder").generate, "text")


def test_sources_follow_each_other_each_with_its_field(tmp_path, capsys):
    first, second = write_source(tmp_path / "1" / "a.jsonl"), tmp_path / "2" / "a.jsonl"
    second.parent.mkdir()
    second.write_text("".join(json.dumps({"body": f"text {i} " * 9}) + "\n" for i in range(20)))
    both = [f"--source={first}", f"--source={second}", "--text_field=text", "--text_field=body"]
    both += ["--encoding=bytes", "--val_tokens=100", "--shard_size=500", "--workers=1"]
    out = tmp_path / "out"
    assert fineweb.main([*both, f"--out={out}"]) == 0
    for source, name in ((first, "text"), (second, "body")):
        build(source, tmp_path / name, text_field=name)
    assert stream_of(out) == stream_of(tmp_path / "text") + stream_of(tmp_path / "body")
    assert read_meta(out)["documents"] == 27 and len(read_meta(out)["settings"]["files"]) == 2
    assert "--text_field=text --text_field=body" in fineweb_command(str(out))
    assert fineweb.main([*both, "--text_field=third", "--out=x"]) == 2
    assert "text_field is given 3 times" in capsys.readouterr().err
