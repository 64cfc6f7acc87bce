"""Encodings: bytes, tiktoken's, and those that cannot be used.

Run: python -m pytest tests/tokens/test_encodings.py"""

import sys

import pytest
import requests
import tiktoken
from conftest import refuses

from tokens import encodings


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


def offline(name):
    raise requests.exceptions.ConnectionError("no route")


def without_end(name):
    return tiktoken.Encoding("small", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})


@pytest.mark.parametrize(("name", "fetch", "words"), [
    ("gtp2", without_end, "encoding='gtp2'.*'gpt2'"),
    ("p50k_base", offline, "'p50k_base'.*TIKTOKEN_CACHE_DIR.*--encoding bytes"),
    ("cl100k_base", without_end, r"'cl100k_base' has no <\|endoftext\|>.*gpt2"),
])  # fmt: skip
def test_an_encoding_that_cannot_be_used_is_named_with_the_way_out(name, fetch, words, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", fetch)
    refuses(words, encodings.get_encoding, name)
    refuses(r"encoding='unknown'.*config\.json", encodings.decode_tokens, [1], "unknown")
