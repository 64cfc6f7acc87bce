"""generate(): caches, beams, padding, block_size, stop strings, and what it leaves behind; prompts as
strings, and the tokenizers of exported folders."""

import copy
import json
from unittest.mock import Mock

import pytest
import torch
from conftest import refuses, shared_file
from models import ARCHITECTURES, byte_model, greedy_by_hand, strong, tiny, tokens
from processes import equal
from transformers import DataCollatorForLanguageModeling, GPT2TokenizerFast

from huggingface.outputs import CACHE
from huggingface.text import build_tokenizer
from model import GPT, GPTLMHeadModel
from tokens.encodings import decode_tokens, encode_text

BLOCK = 12  # block_size of the models that generate ids
PROMPT = "Hello, I'm a language model,"
STRANGE = [
    "", " ", "Hello world", "  two  spaces\n\n\ttabs ", "don't we'll I'd", "naïve 日本語 🙂", "a" * 300,
    "\x00\x7f\xa0\xad", "1234567 ½ x²", "<|endoftex|> <|startoftext|>", "\r\n mixed \r endings\u2028 ",
]  # fmt: skip


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return strong(GPTLMHeadModel(tiny(**{"block_size": BLOCK} | ARCHITECTURES[request.param])))


def test_cached_generation_equals_the_plain_loop_also_beyond_block_size(model, monkeypatch):
    ids, warned = tokens(T=3), Mock()
    monkeypatch.setattr("transformers.generation.stopping_criteria.logger.warning_once", warned)
    expected = greedy_by_hand(model, ids, 15)  # 18 tokens
    assert len(expected[:, 3:].unique()) > 8  # a model that repeats itself would hide faults
    for cache in (dict(use_cache=True), dict(use_cache=False), dict(prefill_chunk_size=2)):
        assert torch.equal(model.generate(ids, max_new_tokens=15, do_sample=False, **cache), expected)
    long = tokens(T=20, seed=1)  # longer than block_size from the start
    for chunk in (None, 5, 15):
        found = model.generate(long, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)
        assert torch.equal(found, greedy_by_hand(model, long, 2))
    assert not warned.called  # texts are cropped on purpose


@pytest.mark.parametrize("how", [dict(num_beams=3), dict(do_sample=True, top_k=20, temperature=0.8)], ids=str)
def test_beams_and_seeded_samples_do_not_depend_on_the_cache(model, how):
    ids, results = tokens(B=2, T=5), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(ids, max_new_tokens=10, use_cache=use_cache, **how))
    assert torch.equal(*results)


def test_a_later_turn_may_give_its_new_tokens_only(model):
    first, then, how = tokens(T=4), tokens(T=2, seed=1), dict(max_new_tokens=3, do_sample=False)
    cache = model(first, use_cache=True)[CACHE]
    whole = torch.cat([first, then], dim=1)
    how |= {"attention_mask": torch.ones_like(whole), CACHE: cache}
    assert torch.equal(model.generate(then, **how)[:, 2:], greedy_by_hand(model, whole, 3)[:, 6:])
    how["attention_mask"] = torch.ones(3, 16)
    refuses("block_size=12", model.generate, tokens(T=8), **how)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_left_padded_batch_equals_its_rows(model, cache):
    rows = [tokens(1, T, seed=T) for T in (2, 5, 7)]
    new = 5 if cache == "static" else 9  # with 9 the longest outgrows block_size
    ids, mask = torch.full((3, 7), 9), torch.zeros(3, 7, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -row.size(1) :], mask[i, -row.size(1) :] = row, 1
    how = dict(max_new_tokens=new, do_sample=False, pad_token_id=9, cache_implementation=cache)
    batch = model.generate(ids, attention_mask=mask, **how)
    for i, row in enumerate(rows):
        assert torch.equal(batch[i, 7:], greedy_by_hand(model, row, new)[0, row.size(1) :])


def test_what_cannot_be_cropped_must_not_outgrow_block_size():
    """Embeddings have no token ids, and assisted generation must keep its cache."""
    model = strong(GPTLMHeadModel(tiny(block_size=BLOCK, **ARCHITECTURES["modern"])))
    ids = tokens(B=1, T=2).repeat(1, 2)
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    embeddings = dict(inputs_embeds=model.get_input_embeddings()(ids), do_sample=False)
    lookup = dict(inputs=ids, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(model.generate(max_new_tokens=8, **embeddings), whole[:, 4:])
    assert torch.equal(model.generate(max_new_tokens=8, **lookup), whole)
    for arguments, message in ((embeddings, "block_size=12"), (lookup, "14 tokens .* block_size=12")):
        refuses(message, model.generate, max_new_tokens=10, **arguments)


def test_stop_strings():
    model = strong(GPTLMHeadModel(tiny(encoding="bytes", vocab_size=257, block_size=64)))
    how = dict(do_sample=False, pad_token_id=0, max_new_tokens=30)
    whole = model.generate("ab", **how)
    stop = next(character for character in whole[6:] if character.isascii() and character.isprintable())
    found = model.generate("ab", stop_strings=[stop], tokenizer=build_tokenizer("bytes", 64), **how)
    assert found == whole[: whole.index(stop, 2) + 1]


def test_a_forward_that_accelerate_has_replaced_still_gives_logits():
    """accelerate binds a model's forward anew, for bf16 or offloaded weights."""
    ids, base = tokens(T=5), strong(GPT(tiny()))
    expected = base.generate(ids, max_new_tokens=3, do_sample=False)
    bound = base.forward
    base.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    for _ in range(2):
        assert torch.equal(base.generate(ids, max_new_tokens=3, do_sample=False), expected)
    assert base(ids).last_hidden_state.shape == (3, 5, 64)


def test_generation_leaves_every_part_of_a_model_in_training_as_it_was():
    """Fine-tuning may keep some parts in evaluation mode. The routers are in the middle of a step."""
    model = strong(GPTLMHeadModel(tiny(encoding="bytes"))).train()
    model.update_routers()
    model(tokens(), targets=tokens(seed=1))
    model.transformer.h[0].eval()
    model.transformer.h[0].mlp.dropout.train()

    def parts() -> list:
        losses = [moe.get_auxiliary_loss() for moe in model.moe_layers()]
        return [[module.training for module in model.modules()], losses, copy.deepcopy(model.state_dict())]

    before = parts()
    model.generate(tokens(T=5), max_new_tokens=2)
    assert equal(parts(), before)
    refuses(r"token 122.*vocab_size=97", model.generate, "z")
    assert equal(parts(), before)  # after an error too


def test_ids_that_only_pad_the_vocabulary_are_never_generated(tmp_path):
    """Not by a new model, not by one from a folder, with or without a generation_config.json."""
    model, ids = strong(GPTLMHeadModel(tiny(encoding_size=60))), tokens(V=60, T=5)
    assert model(ids).logits.argmax(-1).max() >= 60  # padding can win
    model.save_pretrained(tmp_path)
    models = [model, GPTLMHeadModel.from_pretrained(tmp_path)]
    (tmp_path / "generation_config.json").unlink()
    for each in (*models, GPTLMHeadModel.from_pretrained(tmp_path)):
        assert each.generate(ids, max_new_tokens=12, do_sample=True).max() < 60


# ---------------------------------------------------------------------------- text
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
