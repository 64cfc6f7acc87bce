"""Hashed n-gram embeddings around caches. test_model_options.py has their values and padding,
test_documents.py has texts in a row.

Run: python -m pytest tests/layers/test_ngrams.py"""

import pytest
import torch
from conftest import refuses
from models import strong, tiny, tokens

from layers.roles import role_of
from model import GPTLMHeadModel

NGRAMS = dict(ngram_order=3, ngram_rows=64)


@pytest.fixture
def model() -> GPTLMHeadModel:
    return strong(GPTLMHeadModel(tiny(**NGRAMS)))


@torch.no_grad()
def test_a_forward_without_the_ids_before_is_refused_by_name(model):
    """Embeddings have no ids. After a change of the cache they must be given."""
    refuses("ngram_order=3: inputs_embeds", model, inputs_embeds=torch.randn(1, 2, model.config.n_embd))
    ids = tokens(2, 12)
    whole, cache = model(ids).logits, model(ids, use_cache=True).past_key_values
    for change in (lambda: cache.reorder_cache(torch.tensor([1, 0])), lambda: cache.crop(-4)):
        change()
        refuses("ngram_order=3.*previous_ids", model, ids[:, :1], past_key_values=cache)
    previous = torch.stack([ids[:, 7:8], ids[:, 6:7]], dim=-1).flip(0)  # the rows were exchanged
    logits = model(ids[:, 8:9].flip(0), past_key_values=cache, previous_ids=previous).logits
    torch.testing.assert_close(logits.flip(0)[:, 0], whole[:, 8], atol=1e-5, rtol=1e-5)


def test_a_new_model_starts_as_the_one_without_and_learns_the_tables():
    with_tables, ids = GPTLMHeadModel(tiny(**NGRAMS)).train(), tokens(2, 12)
    plain = GPTLMHeadModel(tiny())
    missing = plain.load_state_dict(with_tables.state_dict(), strict=False)
    assert missing.unexpected_keys == ["transformer.ngrams.weight"] and not missing.missing_keys
    torch.testing.assert_close(with_tables(ids).logits, plain(ids).logits)
    with_tables(ids, targets=ids)[1].backward()
    touched = with_tables.transformer.ngrams.weight.grad.any(-1).view(2, 64)
    assert (touched.sum(-1) > 5).all()
    role = role_of("transformer.ngrams.weight")
    assert role.part == "embeddings" and not role.decays and not role.is_matrix
    assert with_tables.get_num_params() == plain.get_num_params()
    assert with_tables.flops_per_token() == plain.flops_per_token()


def test_assisted_generation_equals_plain_generation(model):
    ids = tokens(1, 3).repeat(1, 2)
    how = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **how), model.generate(ids, **how))
