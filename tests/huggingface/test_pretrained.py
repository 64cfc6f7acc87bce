"""Folders of our own format, and embeddings that are replaced or resized."""

import pytest
import torch
from conftest import refuses
from models import ARCHITECTURES, strong, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from huggingface.export import export_folder
from model import GPT, GPTForSequenceClassification, GPTLMHeadModel


def trained(**fields) -> GPTLMHeadModel:
    """A model whose routers have counted one step."""
    model = strong(GPTLMHeadModel(tiny(**fields))).train()
    model.update_routers()
    model(tokens(), targets=tokens())
    model.update_routers()
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_folders_load_what_was_saved(name, tmp_path):
    model, ids = trained(**ARCHITECTURES[name], router_bias_update_rate=0.01), tokens()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for cls in (GPTLMHeadModel, GPT):
        again = cls.from_pretrained(tmp_path)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tie_word_embeddings
    assert torch.allclose(GPTLMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits, atol=1e-5)


def test_half_precision_leaves_the_routing_exact(tmp_path):
    model = trained(router_bias_update_rate=0.01)
    model.save_pretrained(tmp_path)
    half = GPTLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"
    loss = model(tokens(), targets=tokens())[1].item()
    assert half(tokens(), targets=tokens())[1].item() == pytest.approx(loss, rel=0.02)
    for moe in half.moe_layers():  # bf16 would round a small step of the bias away
        assert moe.gate.weight.dtype == moe.router_bias.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    again = GPTLMHeadModel.from_pretrained(tmp_path / "half", attn_implementation="eager")
    assert again.dtype == torch.bfloat16 and torch.equal(again(tokens()).logits, half(tokens()).logits)


def test_a_folder_without_the_statistics_of_routers_gets_fresh_ones(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    refuses("with the settings", GPTLMHeadModel.from_pretrained, tmp_path, tie_word_embeddings=False)
    moe = GPTLMHeadModel.from_pretrained(tmp_path, moe_loss_type="diversity_regularization").moe_layers()[0]
    assert torch.equal(moe.reference_totals, moe.initial_statistics()["reference_totals"])
    weights = load_file(tmp_path / "model.safetensors")
    gone = {name for name, _ in model.named_buffers() if not name.endswith("router_bias")}
    kept = {name: value for name, value in weights.items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = GPTLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] >= gone
    for moe in again.moe_layers():
        for name, value in moe.initial_statistics().items():
            assert torch.equal(getattr(moe, name), value), name
        assert moe.expansion is None
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in kept.items())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_replaced_and_ties_hold(tied):
    model = GPTLMHeadModel(tiny(tie_word_embeddings=tied))
    table = torch.nn.Embedding(97, 64)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table and (model.lm_head.weight is table.weight) == tied
    head = torch.nn.Linear(64, 97, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    model.tie_weights()
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied


@pytest.mark.parametrize("tied, size, multiple, padding, encoding_size", [
    (True, 120, None, range(90, 97), None), (True, 60, None, [], None), (True, 93, 64, range(93, 128), 93),
    (True, None, 64, range(90, 128), 90), (True, 100, 64, [*range(90, 97), *range(100, 128)], None),
    (False, 100, 64, [*range(90, 97), *range(100, 128)], None),
])  # fmt: skip
def test_resizing_the_vocabulary(tied, size, multiple, padding, encoding_size, tmp_path):
    model = strong(GPTLMHeadModel(tiny(tie_word_embeddings=tied, encoding_size=90)))
    ids = tokens(V=60)
    before = model(ids).logits
    assert model.resize_token_embeddings(None).num_embeddings == 97 and model.config.encoding_size == 90
    model.resize_token_embeddings(size, multiple, mean_resizing=False)
    model.save_pretrained(tmp_path)
    V, again = size if multiple is None else 128, GPTLMHeadModel.from_pretrained(tmp_path)
    for config, generation in ((each.config, each.generation_config) for each in (model, again)):
        assert (config.vocab_size, config.encoding_size) == (V, encoding_size)
        assert (generation.suppress_tokens or []) == list(padding)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    after = model(ids).logits
    assert after.shape[-1] == V
    assert torch.allclose(after[..., : min(V, 97)], before[..., : min(V, 97)], atol=1e-6)
    assert model.generate(ids[:1], max_new_tokens=3).shape == (1, 27)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_clients_get_the_network_without_its_head(name):
    """TRL calls base_model and applies the head itself, soft-capped by final_logit_softcapping."""
    model, ids = strong(GPTLMHeadModel(tiny(**ARCHITECTURES[name]))), tokens()
    assert model.base_model is model.get_decoder() is model.transformer
    hidden, head = model.base_model(input_ids=ids, use_cache=False), model.lm_head
    logits, cap = head(hidden.last_hidden_state), model.config.final_logit_softcapping
    logits = cap * torch.tanh(logits / cap) if cap else logits
    assert torch.equal(logits, model(ids, labels=ids).logits) and hidden.keys() == {"last_hidden_state"}


@pytest.mark.parametrize("training, checkpointing", [
    (False, {}), (True, {}), (True, {"use_reentrant": True}), (True, {"use_reentrant": False}),
])  # fmt: skip
@pytest.mark.parametrize("moe_every", [1, 2])
def test_router_logits_give_the_balance_loss_of_transformers(training, checkpointing, moe_every):
    """In a layer K times ours, padding left out; router_aux_loss_coef makes up for K and the layers."""
    model, ids = strong(GPTLMHeadModel(tiny(moe_every=moe_every))).train(training), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    config, mask, layers, K = model.config, torch.ones_like(ids).tril(12), model.moe_layers(), 2
    output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert torch.equal(output.aux_loss, load_balancing_loss_func(output.router_logits, 4, K, mask))
    for layer, logits in zip(layers if training else (), output.router_logits, strict=training):
        theirs, ours = load_balancing_loss_func((logits,), 4, K, mask), layer.get_auxiliary_loss()
        assert torch.allclose(theirs, K * ours, rtol=1e-5) and theirs.requires_grad
    if training and moe_every == 2:
        assert torch.allclose(config.router_aux_loss_coef * output.aux_loss, 0.01 * output.balance_loss)
    assert config.router_aux_loss_coef == pytest.approx(0.01 * len(layers) / K)
    config.moe_loss = False
    config.router_aux_loss_coef = 0.5
    assert config.moe_loss_coef == pytest.approx(0.5 * K / len(layers)) and config.router_aux_loss_coef == 0.5
    dense = GPTLMHeadModel(tiny(use_moe=False))
    assert dense(ids, output_router_logits=True).aux_loss is None
    refuses(r"router_aux_loss_coef=0\.5", setattr, dense.config, "router_aux_loss_coef", 0.5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_from_a_folder_of_a_language_model(tied, tmp_path, own_modules):
    model = strong(GPTLMHeadModel(tiny(tie_word_embeddings=tied, pad_token_id=0)))
    model.save_pretrained(tmp_path / "words")
    how = dict(num_labels=3, trust_remote_code=True)
    new = AutoModelForSequenceClassification.from_pretrained(tmp_path / "words", **how)
    new.resize_token_embeddings(100, mean_resizing=False)
    new.save_pretrained(tmp_path / "classes")
    again, ids = GPTForSequenceClassification.from_pretrained(tmp_path / "classes"), tokens(V=96) + 1
    five = dict(num_labels=5, output_hidden_states=True, output_attentions=True)
    output = GPTForSequenceClassification.from_pretrained(tmp_path / "words", **five)(ids)
    assert output.logits.shape == (3, 5) and len(output.hidden_states) == len(output.attentions) + 1 == 3
    ids[0, 9:] = 0
    hidden = model.transformer(ids).last_hidden_state[[0, 1, 2], [8, 23, 23]]
    assert torch.allclose(again(ids).logits, new.score(hidden), atol=1e-5)
    again(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(part.grad is not None for part in again.parameters())  # there is no head
    export_folder(GPTLMHeadModel(tiny(use_moe=False)), tmp_path / "gpt2", format="gpt2", tokenizer=False)
    refuses("model_type=gpt2: a classifier", GPTForSequenceClassification.from_pretrained, tmp_path / "gpt2")


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_crop_block_size(position, tmp_path):
    model, ids = strong(GPTLMHeadModel(tiny(position=position))), tokens(T=10)
    before = model(ids).logits
    refuses(r"block_size=25: .*1\.\.24", model.crop_block_size, 25)
    model.crop_block_size(10)
    assert torch.equal(model(ids).logits, before) and model.config.block_size == 10
    refuses("longer than block_size=10", model, tokens(T=11))
    model.save_pretrained(tmp_path)
    assert torch.equal(GPTLMHeadModel.from_pretrained(tmp_path)(ids).logits, before)
