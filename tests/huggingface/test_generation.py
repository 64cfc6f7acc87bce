"""generate(): caches, beams, padding, block_size, stop strings, and what it leaves behind."""

import copy
from unittest.mock import Mock

import pytest
import torch
from conftest import refuses
from models import ARCHITECTURES, greedy_by_hand, strong, tiny, tokens
from processes import equal

from huggingface.outputs import CACHE
from huggingface.text import build_tokenizer
from model import GPT, GPTLMHeadModel

BLOCK = 12  # block_size of these models


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
