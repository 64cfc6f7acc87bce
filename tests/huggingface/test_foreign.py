"""GPT-2, Llama, Qwen3, Mixtral and Qwen3-MoE of transformers: their folders load here, ours load there."""

import json

import pytest
import torch
import transformers
from conftest import refuses
from models import gradients, strong, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
from huggingface.export import export_folder
from huggingface.gpt2 import transpose_weights
from huggingface.pretrained import FOREIGN
from model import GPT, GPTConfig, GPTLMHeadModel
from tokens.encodings import encode_text
from train_gpt_moe import PRESETS
from training import checkpoints as ckpt

SIZES = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=97, block_size=24, mlp_hidden_size=40, use_moe=False)
LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2, bias=False)
EXPERTS = dict(use_moe=True, num_experts=4, num_experts_per_tok=2, expert_hidden_size=24)

PRESET = {name: value for name, value in PRESETS["qwen3"].items() if name in GPTConfig.__annotations__}
PRESET = GPTConfig(**PRESET | SIZES).to_dict()

# What is exported exactly: format -> variants of our fields, of which all after the third are slow.
EXACT = {
    "gpt2": [dict(), dict(norm_eps=1e-2, dropout=0.1, mlp_hidden_size=None),
             dict(bias=False, tie_word_embeddings=False, activation="gelu_erf"), dict(n_kv_head=4)],
    "llama": [dict(), dict(n_kv_head=None, tie_word_embeddings=False, mlp_hidden_size=None),
              dict(bias=True, norm_eps=1e-2, rope_theta=50.0, n_kv_head=1)],
    "qwen3": [dict(), PRESET, dict(tie_word_embeddings=False, sliding_window=5),
              dict(sliding_window=5, global_every=2, n_kv_head=None), dict(sliding_window=5, global_every=1)],
    "mixtral": [EXPERTS, EXPERTS | dict(num_experts_per_tok=4, expert_hidden_size=None),
                EXPERTS | dict(sliding_window=5, tie_word_embeddings=False)],
    "qwen3_moe": [EXPERTS, PRESET | EXPERTS | dict(norm_topk_prob=False),
                  EXPERTS | dict(moe_every=2, sliding_window=5, tie_word_embeddings=False),
                  EXPERTS | dict(num_experts_per_tok=1), EXPERTS | dict(moe_every=2, n_layer=4),
                  EXPERTS | dict(moe_every=3, router_z_loss_coef=0.1)],
}  # fmt: skip
CASES = [(kind, fields) for kind, variants in EXACT.items() for fields in variants[:3]]
for kind, variants in EXACT.items():
    CASES += [pytest.param(kind, fields, marks=pytest.mark.slow) for fields in variants[3:]]


def small(kind: str, **fields) -> GPTConfig:
    family = {} if kind == "gpt2" else LLAMA | dict(qk_norm=kind in ("qwen3", "qwen3_moe"))
    return GPTConfig(**SIZES | family | fields)


def stock(kind: str, **fields):
    """A model of transformers with random weights, norms around one."""
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=24, bos_token_id=0,
                 eos_token_id=1, head_dim=8)  # fmt: skip
    if kind == "gpt2":
        sizes = dict(vocab_size=97, n_layer=3, n_head=4, n_embd=32, n_positions=24, eos_token_id=1)
    if kind in ("mixtral", "qwen3_moe"):
        sizes |= dict(num_experts=4, num_experts_per_tok=2)
    if kind == "qwen3_moe":
        sizes |= dict(moe_intermediate_size=24)
    cls = getattr(transformers, FOREIGN[kind])
    return strong(cls(cls.config_class(**sizes | fields)), 0.3)


def assert_equal_models(ours, theirs):
    """Logits, padded batches, and what cached generation writes."""
    ids = tokens(T=24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # not all alike, whatever the weights
    assert (ours(ids).logits - expected).abs().max() < 1e-4
    padded = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    difference = ours(ids, **padded).logits - theirs(ids, **padded).logits
    assert difference[0, 7:].abs().max() < 1e-4
    how = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.generate(tokens(T=5), **how), theirs.generate(tokens(T=5), **how))


@pytest.mark.parametrize("kind, fields, expected", [
    ("gpt2", dict(), dict(use_moe=False, bias=True, dropout=0.1, norm_eps=1e-5, encoding="unknown")),
    ("gpt2", dict(vocab_size=50257), dict(encoding="gpt2")),
    ("gpt2", dict(n_inner=100, layer_norm_epsilon=0.5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
     dict(mlp_hidden_size=100, norm_eps=0.5, dropout=0.0)),
    ("gpt2", dict(tie_word_embeddings=False, activation_function="gelu_pytorch_tanh"),
     dict(tie_word_embeddings=False, activation="gelu")),
    ("gpt2", dict(activation_function="gelu"), dict(activation="gelu_erf")),
    ("llama", dict(), dict(use_moe=False, qk_norm=False, bias=False, n_kv_head=2, norm_eps=1e-6)),
    ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
     dict(bias=True, tie_word_embeddings=True)),
    ("llama", dict(rms_norm_eps=1e-2, num_key_value_heads=4, rope_parameters=dict(rope_theta=5e5)),
     dict(norm_eps=1e-2, n_kv_head=4, rope_theta=5e5)),
    ("qwen3", dict(), dict(use_moe=False, qk_norm=True, sliding_window=None)),
    ("qwen3", dict(use_sliding_window=True, sliding_window=5, max_window_layers=0),
     dict(sliding_window=5, global_every=None)),
    ("mixtral", dict(), dict(num_experts=4, norm_topk_prob=True, rope_theta=1e6, expert_hidden_size=40)),
    ("mixtral", dict(sliding_window=5), dict(sliding_window=5)),
    ("qwen3_moe", dict(), dict(norm_topk_prob=False, qk_norm=True, expert_hidden_size=24, moe_every=1)),
    ("qwen3_moe", dict(num_experts_per_tok=1), dict(num_experts_per_tok=1)),
    ("qwen3_moe", dict(decoder_sparse_step=3, norm_topk_prob=True), dict(moe_every=3, norm_topk_prob=True)),
    ("qwen3_moe", dict(mlp_only_layers=[1], use_sliding_window=True, sliding_window=5),
     dict(moe_every=2, sliding_window=5)),
])  # fmt: skip
def test_their_folders_load(kind, fields, expected, tmp_path):
    theirs = stock(kind, **fields)
    theirs.save_pretrained(tmp_path)
    ours = GPTLMHeadModel.from_pretrained(tmp_path)
    assert not ours.training and ours.config.model_type == "gpt_moe" and ours.config.eos_token_id == 1
    assert {name: getattr(ours.config, name) for name in expected} == expected
    assert_equal_models(ours, theirs)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == theirs.config.tie_word_embeddings
    base = GPT.from_pretrained(tmp_path)
    hidden = theirs.base_model(tokens(T=5)).last_hidden_state
    assert (base(tokens(T=5)).last_hidden_state - hidden).abs().max() < 1e-4
    ours.train()(tokens(), targets=tokens(seed=1))[1].backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    for moe in ours.moe_layers():
        assert moe.get_usage_counts().sum() == 72 * ours.config.num_experts_per_tok


@pytest.mark.parametrize("how", [dict(attn_implementation="sdpa"), dict(output_attentions=True)])
def test_hidden_states_attentions_and_gradients_are_gpt2s(how, tmp_path):
    theirs, ids = stock("gpt2", attn_implementation="eager"), tokens()
    theirs.save_pretrained(tmp_path)
    ours = GPTLMHeadModel.from_pretrained(tmp_path, **how)
    arguments = dict(input_ids=ids, labels=ids, output_hidden_states=True, output_attentions=True)
    a, b = ours(**arguments), theirs(**arguments)
    outputs = ([x.loss, x.logits, *x.hidden_states, *x.attentions] for x in (a, b))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    (a.loss + b.loss).backward()
    grads = transpose_weights({name: p.grad for name, p in theirs.named_parameters()})
    torch.testing.assert_close(gradients(ours), grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("files", ["base model", "hub cache"])
def test_gpt2_folders_of_other_kinds_load(files, tmp_path):
    theirs, name, where = stock("gpt2"), str(tmp_path / "gpt2"), {}
    if files == "base model":
        theirs.transformer.save_pretrained(name)
    else:  # as huggingface_hub lays out what it has downloaded
        theirs.save_pretrained(tmp_path / "models--gpt2" / "snapshots" / ("0" * 40))
        (tmp_path / "models--gpt2" / "refs").mkdir()
        (tmp_path / "models--gpt2" / "refs" / "main").write_text("0" * 40)
        name, where = "gpt2", dict(cache_dir=tmp_path)
    ours = GPTLMHeadModel.from_pretrained(name, **where)
    assert (ours(tokens()).logits - theirs(tokens()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind, fields, words", [
    ("gpt2", dict(activation_function="relu"), "only 'gelu_new'"),
    ("gpt2", dict(scale_attn_weights=False), "only True"), ("gpt2", dict(add_cross_attention=True), ""),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ""),
    ("gpt2", dict(reorder_and_upcast_attn=True), ""), ("gpt2", dict(resid_pdrop=0.2), "and attn_pdrop=0.1"),
    ("llama", dict(attention_bias=True), "mlp_bias=False"), ("llama", dict(head_dim=16), "only 8"),
    ("llama", dict(hidden_act="gelu"), "only 'silu'"), ("llama", dict(attention_dropout=0.1), "only 0"),
    ("llama", dict(rope_parameters=dict(factor=2.0, rope_theta=1e4, rope_type="linear")), "'default'"),
    ("qwen3", dict(layer_types=["full_attention", *["sliding_attention"] * 2], use_sliding_window=True),
     "only full attention in every"), ("qwen3", dict(attention_bias=True), "only False"),
    ("mixtral", dict(num_experts_per_tok=1), "norm_topk_prob=False"),
    ("mixtral", dict(router_jitter_noise=0.1), "only 0"),
    ("qwen3_moe", dict(num_experts_per_tok=1, norm_topk_prob=True), ""),
    ("qwen3_moe", dict(mlp_only_layers=[2]), "decoder_sparse_step=1"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_refused_by_name(kind, fields, words, tmp_path):
    stock(kind, **fields).save_pretrained(tmp_path)
    name, value = next(iter(fields.items()))
    message = refuses(words or name, GPTLMHeadModel.from_pretrained, tmp_path)
    for word in ("GPT-2" if kind == "gpt2" else kind, f"{name}={value!r}"):
        assert word in message


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_settings_and_precision_are_passed_on(kind, tmp_path):
    stock(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    how = dict(output_loading_info=True, attn_implementation="eager")
    settings = dict(dropout=0.25, use_cache=False, encoding="bytes", output_hidden_states=True)
    ours, info = GPTLMHeadModel.from_pretrained(tmp_path, **how, **settings)
    assert ours.dtype == torch.bfloat16 and ours.config._attn_implementation == "eager"
    assert {name: getattr(ours.config, name) for name in settings} == settings
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(moe.gate.weight.dtype == moe.router_bias.dtype == torch.float32 for moe in ours.moe_layers())
    assert ours(tokens(T=5)).logits.isfinite().all()
    refuses("'vocab_size': 5.*size mismatch", GPTLMHeadModel.from_pretrained, tmp_path, vocab_size=5)


def test_a_llama_begins_a_run(tmp_path, caplog):
    """Through load_model, as --init_from does; the text's encoding must be known."""
    stock("llama").save_pretrained(tmp_path)
    fields = small("llama").to_dict() | dict(encoding="bytes")
    refuses("encoding='unknown' in init_from", ckpt.begin_from, str(tmp_path), fields, set(), T=24)
    assert 'write "encoding": "bytes"' in caplog.text
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"encoding": "bytes"}))
    model = ckpt.begin_from(str(tmp_path), fields, {"use_moe"}, T=24)
    loaded = ckpt.load_model(tmp_path)
    assert model.training and torch.equal(model(tokens(T=5)).logits, loaded(tokens(T=5)).logits)


@pytest.mark.parametrize("kind, fields", CASES)
def test_ours_become_stock_models_and_come_back(kind, fields, tmp_path, caplog):
    model = strong(GPTLMHeadModel(small(kind, **fields)), 0.3)
    model.generation_config.eos_token_id, model.generation_config.suppress_tokens = [5, 7], [3, 999]
    export_folder(model, tmp_path / "out", format=kind, tokenizer=False)
    assert not list((tmp_path / "out").glob("*.py"))
    assert all(text.startswith("llama.cpp cannot read") for text in caplog.messages)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == FOREIGN[kind] and not any(info.values())
    assert_equal_models(model, theirs)
    back = GPTLMHeadModel.from_pretrained(tmp_path / "out")
    for generation in (theirs.generation_config, back.generation_config):
        assert generation.eos_token_id == [5, 7] and generation.suppress_tokens == [3]
    state = back.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    kept = ["sliding_window", "global_every", "qk_norm", "norm_eps", "rope_theta", "encoding"]
    kept += ["bias"] * (kind != "gpt2")  # GPT-2 always has biases; absent ones become zeros
    kept += ["moe_every"] * model.config.use_moe
    kept += ["norm_topk_prob"] * (model.config.use_moe and model.config.num_experts_per_tok > 1)
    for name in kept:
        assert getattr(back.config, name) == getattr(model.config, name), name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral", "qwen3_moe"])
def test_readers_of_older_names_find_them(kind, tmp_path):
    """transformers 4 reads other names for the base of RoPE and the number of experts."""
    model = strong(GPTLMHeadModel(small(kind, rope_theta=50.0, **EXACT[kind][0])), 0.3)
    export_folder(model, tmp_path / "out", format=kind, tokenizer=False)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("rope_parameters")["rope_theta"] == config["rope_theta"] == 50.0
    if kind == "qwen3_moe":
        config.pop("num_local_experts", None)
        assert config["num_experts"] == 4
    file.write_text(json.dumps(config))
    assert_equal_models(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("kind, fields", [
    ("gpt2", dict(use_moe=True)), ("gpt2", dict(position="rope")), ("gpt2", dict(n_kv_head=2)),
    ("gpt2", dict(sliding_window=8)), ("gpt2", dict(norm="rmsnorm")), ("gpt2", dict(qk_norm=True)),
    ("gpt2", dict(activation="swiglu")), ("gpt2", dict(logit_softcap=30.0)), ("qwen3_moe", dict(bias=True)),
    ("llama", dict(position="learned")), ("llama", dict(norm="layernorm")), ("llama", dict(use_moe=True)),
    ("llama", dict(activation="relu2")), ("llama", dict(logit_softcap=30.0)), ("llama", dict(qk_norm=True)),
    ("llama", dict(sliding_window=8)), ("llama", dict(ngram_order=2)), ("qwen3", dict(qk_norm=False)),
    ("mixtral", dict(use_moe=False)), ("mixtral", dict(norm_topk_prob=False)),
    ("mixtral", dict(num_experts_per_tok=1)), ("mixtral", dict(global_every=2, sliding_window=8)),
    ("mixtral", dict(moe_every=2)), ("qwen3_moe", dict(num_shared_experts=1)),
    ("qwen3_moe", dict(router_score="sigmoid")),
])  # fmt: skip
def test_what_they_cannot_express_is_refused_by_name(kind, fields, tmp_path):
    experts = EXPERTS if kind in ("mixtral", "qwen3_moe") else {}
    model = GPTLMHeadModel(small(kind, **experts | fields))
    name, value = next(iter(fields.items()))
    words = f"cannot express {name}={value!r}, only .*format='gpt_moe'"
    refuses(words, export_folder, model, tmp_path / "out", format=kind, tokenizer=False)
    assert not list(tmp_path.iterdir())


def test_router_biases_are_refused_and_dropout_is_left_out(tmp_path, caplog):
    fields = EXPERTS | dict(dropout=0.1, router_bias_update_rate=0.001)
    model = strong(GPTLMHeadModel(small("mixtral", **fields)), 0.3)
    export_folder(model, tmp_path / "out", format="mixtral", tokenizer=False)
    assert "dropout=0.1, which acts in training only, is left out" in caplog.text
    model.moe_layers()[1].router_bias[2] = 0.25
    words = r"biases of the routers that router_bias_update_rate=0\.001"
    refuses(words, export_folder, model, tmp_path / "out", format="mixtral", tokenizer=False)


@pytest.mark.parametrize("kind, fields", [("gpt2", {}), ("qwen3_moe", EXPERTS)])
def test_the_command_line_exports_a_checkpoint_with_its_tokenizer(kind, fields, tmp_path, caplog):
    config = small(kind, **fields, encoding="bytes", encoding_size=257, vocab_size=384).to_dict()
    model = strong(GPTLMHeadModel(config), std=0.15)
    ckpt.save_checkpoint({"model": model.state_dict(), "config": config, "step": 7}, tmp_path)
    path, out = str(tmp_path / "model_00007.pt"), str(tmp_path / "out")
    assert checkpoint.main(["export", path, out, "--format", kind]) == 0
    assert "384 rows of the embeddings are cut to the 257 tokens" in caplog.text
    theirs, tokenizer = (x.from_pretrained(tmp_path / "out") for x in (AutoModelForCausalLM, AutoTokenizer))
    assert theirs.config.vocab_size == 257 and theirs.generation_config.eos_token_id == 256
    assert tokenizer("Oh, naïve")["input_ids"] == encode_text("Oh, naïve", "bytes")
    text = theirs.generate(**tokenizer("Oh", return_tensors="pt"), max_new_tokens=9, do_sample=False)[0]
    assert tokenizer.decode(text) == model.generate("Oh", max_new_tokens=9, do_sample=False)
    back = GPTLMHeadModel.from_pretrained(tmp_path / "out")
    assert back.config.encoding == "bytes" and back.generate("Oh", max_new_tokens=9) == tokenizer.decode(text)
