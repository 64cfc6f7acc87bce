"""Prompts as strings, and the tokenizers of exported folders."""

import json

import pytest
import torch
from conftest import refuses, shared_file
from models import byte_model, greedy_by_hand, strong, tiny
from transformers import DataCollatorForLanguageModeling, GPT2TokenizerFast

from huggingface.text import build_tokenizer
from model import GPT, GPTLMHeadModel
from tokens.encodings import decode_tokens, encode_text

PROMPT = "Hello, I'm a language model,"
STRANGE = [
    "", " ", "Hello world", "  two  spaces\n\n\ttabs ", "don't we'll I'd", "naïve 日本語 🙂", "a" * 300,
    "\x00\x7f\xa0\xad", "1234567 ½ x²", "<|endoftex|> <|startoftext|>", "\r\n mixed \r endings\u2028 ",
]  # fmt: skip


def test_text_in_text_out():
    model = byte_model(block_size=24, bos_token_id=256)
    text = model.generate(PROMPT, max_length=50, do_sample=False)
    ids = greedy_by_hand(model, torch.tensor([list(PROMPT.encode())]), 50 - len(PROMPT))[0].tolist()
    assert text == bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
    assert text.startswith(PROMPT) and text != PROMPT
    both = model.generate(PROMPT, max_new_tokens=5, num_beams=2, num_return_sequences=2, do_sample=False)
    assert len(both) == 2 and both[0] != both[1] and all(text.startswith(PROMPT) for text in both)
    assert isinstance(model.generate("", max_new_tokens=5), str)  # begins a document
    base = GPT(model.config.to_dict())  # from a dictionary, as checkpoints hold it
    base.load_state_dict(model.state_dict())
    assert base.generate(PROMPT, max_length=50, do_sample=False) == text


def test_gpt2_text(gpt2_encoding):
    fields = dict(n_layer=1, n_embd=16, vocab_size=50304, encoding_size=50257, eos_token_id=50256)
    model = strong(GPTLMHeadModel(tiny(**fields)))
    ids = greedy_by_hand(model, torch.tensor([gpt2_encoding.encode_ordinary(PROMPT)]), 9)[0].tolist()
    expected = gpt2_encoding.decode(ids[: ids.index(50256)] if 50256 in ids else ids)
    assert model.generate(PROMPT, max_new_tokens=9, do_sample=False) == expected
    assert decode_tokens([15496, 50256, 50300, 995], "gpt2") == "Hello world"
    generate = GPTLMHeadModel(tiny()).generate
    refuses(r"encoding='gpt2' .*vocab_size=97; set config\.encoding", generate, "Hello there")
    refuses("bos_token_id", generate, "")


@pytest.mark.parametrize("name, end", [("bytes", 256), ("gpt2", 50256)])
def test_the_tokenizer_is_the_encoding(name, end, tmp_path, request):
    if name == "gpt2":
        request.getfixturevalue("gpt2_encoding")
    build_tokenizer(name, 64).save_pretrained(tmp_path)
    tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == end + 1
    assert [tokenizer.convert_tokens_to_ids(t) for t in (tokenizer.eos_token, "<|endoftext|>")] == [end, end]
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (end, "right")
    texts = STRANGE + [shared_file("tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]] * (end > 256)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == encode_text(text, name)
        assert tokenizer.decode(ids) == text == decode_tokens(ids, name)
    a, b = (encode_text(letter, name)[0] for letter in "ab")
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [a, end, b]
    assert tokenizer.decode([a, end, b], skip_special_tokens=True) == "ab" == decode_tokens([a, end, b], name)
    if name == "gpt2":  # the merges, which were found from the ranks, are those of GPT-2's own file
        merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
        files = [path.read_text(encoding="utf-8") for path in shared_file("tiktoken_cache").iterdir()]
        original = next(text for text in files if text.startswith("#version"))
        assert [" ".join(pair) for pair in merges] == original.strip().split("\n")[1:]


def test_accumulated_parts_of_a_padded_batch_give_the_loss_of_the_whole():
    """On the left, padding would predict each text's first token, and shorter parts have less of it."""
    model, rows = byte_model().train(), [dict(input_ids=encode_text(text, "bytes")) for text in STRANGE[1:7]]
    rows = [row for row in rows if len(row["input_ids"]) < 48]
    collate, losses = DataCollatorForLanguageModeling(build_tokenizer("bytes", 48), mlm=False), []
    items = sum(len(row["input_ids"]) - 1 for row in rows)
    for parts in ([rows], [rows[:2], rows[2:3], rows[3:]]):
        batches = [collate(part) for part in parts]
        losses.append(sum(model(**batch, num_items_in_batch=items).cross_entropy for batch in batches).item())
        assert sum((batch["labels"][:, 1:] != -100).sum() for batch in batches) == items
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
