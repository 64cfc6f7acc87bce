"""Folders of our own format, and embeddings that are replaced or resized.

Run: python -m pytest tests/huggingface/test_pretrained.py"""

import pytest
import torch
from models import ARCHITECTURES, strong, tiny, tokens
from safetensors.torch import load_file, save_file

from model import GPT, GPTLMHeadModel


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
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    names = [name for shard in shards for name in load_file(shard)]
    assert len(shards) > 2 and len(names) == len(set(names))
    tied = model.config.tie_word_embeddings
    assert set(model.state_dict()) - set(names) == ({"lm_head.weight"} if tied else set())
    for cls in (GPTLMHeadModel, GPT):
        again = cls.from_pretrained(tmp_path)
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert (again.lm_head.weight is again.transformer.wte.weight) == tied
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
    weights = load_file(tmp_path / "model.safetensors")
    gone = {name for name, _ in model.named_buffers() if not name.endswith("router_bias")}
    kept = {name: value for name, value in weights.items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = GPTLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] >= gone
    for moe in again.moe_layers():
        for name, value in moe.initial_statistics().items():
            assert torch.equal(getattr(moe, name), value), name
        assert not moe.step_managed
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in kept.items())


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"'qwen2' .*only gpt_moe, gpt2, llama"):
        GPTLMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [GPT, GPTLMHeadModel])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_replaced_and_ties_hold(cls, tied):
    model = cls(tiny(tie_word_embeddings=tied))
    table = torch.nn.Embedding(97, 64)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    assert (model.lm_head.weight is table.weight) == tied
    head = torch.nn.Linear(64, 97, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    model.tie_weights()
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied
    names = [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in names) != tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [120, 60])
def test_resizing_the_vocabulary(tied, size):
    model = strong(GPTLMHeadModel(tiny(tie_word_embeddings=tied, encoding_size=90)))
    ids = tokens(V=60)
    before = model(ids).logits
    assert model.resize_token_embeddings(None).num_embeddings == 97 and model.config.encoding_size == 90
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size and model.config.encoding_size is None
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    after = model(ids).logits
    assert after.shape[-1] == size
    assert torch.allclose(after[..., : min(size, 97)], before[..., : min(size, 97)], atol=1e-6)
    assert model.generate(ids[:1], max_new_tokens=3).shape == (1, 27)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_crop_block_size(position, tmp_path):
    model, ids = strong(GPTLMHeadModel(tiny(position=position))), tokens(T=10)
    before = model(ids).logits
    with pytest.raises(ValueError, match=r"block_size=25: .*1\.\.24"):
        model.crop_block_size(25)
    model.crop_block_size(10)
    assert torch.equal(model(ids).logits, before) and model.config.block_size == 10
    with pytest.raises(ValueError, match="longer than block_size=10"):
        model(tokens(T=11))
    model.save_pretrained(tmp_path)
    assert torch.equal(GPTLMHeadModel.from_pretrained(tmp_path)(ids).logits, before)
