"""The model as a citizen of transformers: generation, folders in and out, tokenizers, lm_eval.

Run: python -m pytest tests/huggingface/test_huggingface.py
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shared_file
from models import strong, tiny, tokens
from processes import flags
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, StaticCache

from huggingface import export
from huggingface.export import export_folder
from huggingface.export_code import export_code
from huggingface.text import build_tokenizer, byte_characters, find_merges
from model import GPT, GPTConfig, GPTLMHeadModel
from tokens.encodings import decode_tokens, encode_text, get_encoding
from training.checkpoints import load_model

ARCHITECTURES = {
    "learned, MoE": dict(),
    "dense": dict(use_moe=False),
    "rope, grouped": dict(position="rope", n_kv_head=2),
    "window, global": dict(sliding_window=6, global_every=2, position="rope", n_kv_head=1),
    "modern": dict(
        position="rope", n_kv_head=2, norm="rmsnorm", activation="swiglu", qk_norm=True, logit_softcap=15.0,
        bias=False, tie_word_embeddings=False, num_shared_experts=1, router_score="sigmoid",
    ),
    "eager": dict(attn_implementation="eager", sliding_window=6),
}  # fmt: skip


def greedy_by_hand(model, ids, new):
    """nanoGPT's loop: the whole text, cropped to block_size, through the model for every token."""
    with torch.no_grad():
        for _ in range(new):
            logits = model(ids[:, -model.config.block_size :], use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


# -----------------------------------------------------------------------------
# Generation


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return strong(GPTLMHeadModel(tiny(**ARCHITECTURES[request.param])))


def test_cached_generation_equals_the_plain_loop_also_beyond_block_size(model):
    ids = tokens(T=5)
    expected = greedy_by_hand(model, ids, 30)  # 35 tokens, block_size is 24
    assert len(expected[:, 5:].unique()) > 8  # no stuck loop that any fault would repeat as well
    for cache in (dict(use_cache=True), dict(use_cache=False)):
        assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, **cache), expected)
    base = GPT(model.config).eval()
    base.load_state_dict(model.state_dict())
    assert torch.equal(base.generate(ids, max_new_tokens=30, do_sample=False), expected)
    long = tokens(T=40, seed=1)  # a prompt that is too long from the start
    four = model.generate(long, max_new_tokens=4, do_sample=False)
    assert torch.equal(four, greedy_by_hand(model, long, 4))


def test_static_cache(model):
    ids = tokens(T=5)
    expected = greedy_by_hand(model, ids, 16)
    found = model.generate(ids, max_new_tokens=16, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        logits = [model(piece, past_key_values=cache).logits for piece in expected.split(7, dim=1)]
        assert torch.allclose(torch.cat(logits, 1), model(expected).logits, atol=1e-4)


def test_beams_and_seeded_samples_do_not_depend_on_the_cache(model):
    ids = tokens(B=2, T=5)
    for how in (dict(num_beams=3, do_sample=False), dict(do_sample=True, top_k=20, temperature=0.8)):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(model.generate(ids, max_new_tokens=25, use_cache=use_cache, **how))
        assert torch.equal(*results)
        assert not torch.equal(results[0], greedy_by_hand(model, ids, 25))


@pytest.mark.parametrize("cache", [dict(), dict(use_cache=False), dict(cache_implementation="static")])
def test_a_left_padded_batch_equals_its_rows(model, cache):
    rows = [tokens(1, T, seed=T) for T in (3, 7, 12)]
    new = 10 if "cache_implementation" in cache else 20  # 20: the longest outgrows block_size
    ids, mask = torch.full((3, 12), 9), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -row.size(1) :], mask[i, -row.size(1) :] = row, 1
    how = dict(max_new_tokens=new, do_sample=False, pad_token_id=9, **cache)
    batch = model.generate(ids, attention_mask=mask, **how)
    for i, row in enumerate(rows):
        alone = greedy_by_hand(model, row, new)
        assert torch.equal(batch[i, 12:], alone[0, row.size(1) :])


def test_what_cannot_be_cropped_must_not_outgrow_block_size(model):
    """Embeddings have no ids to begin anew with, and assisted generation has to keep its cache."""
    ids = tokens(B=1, T=4).repeat(1, 2)
    embeddings = model.get_input_embeddings()(ids)
    whole = model.generate(ids, max_new_tokens=16, do_sample=False)
    found = model.generate(inputs_embeds=embeddings, max_new_tokens=16, do_sample=False)
    assert torch.equal(found, whole[:, 8:])
    with pytest.raises(ValueError, match="reached block_size=24 positions"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=20, do_sample=False)
    lookup = dict(do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(model.generate(ids, max_new_tokens=16, **lookup), whole)
    with pytest.raises(ValueError, match="up to 28 tokens would outgrow block_size=24"):
        model.generate(ids, max_new_tokens=20, **lookup)


def test_stop_strings():
    model = strong(GPTLMHeadModel(tiny(encoding="bytes", vocab_size=257, block_size=64)))
    how = dict(do_sample=False, pad_token_id=0)
    whole = model.generate("ab", max_new_tokens=30, **how)
    stop = next(character for character in whole[6:] if character.isascii() and character.isprintable())
    how |= dict(stop_strings=[stop], tokenizer=build_tokenizer("bytes", 64))
    found = model.generate("ab", max_new_tokens=30, **how)
    assert found == whole[: whole.index(stop, 2) + 1]


def test_a_forward_bound_from_outside_is_no_obstacle():
    """accelerate binds a model's forward anew, for bf16 or offloaded weights."""
    ids, base = tokens(T=5), strong(GPT(tiny()))
    expected = base.generate(ids, max_new_tokens=6, do_sample=False)
    bound = base.forward
    base.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    for _ in range(2):
        assert torch.equal(base.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert base(ids).last_hidden_state.shape == (3, 5, 64)


def test_generation_leaves_no_trace_in_training():
    losses = []
    for generates in (True, False):
        model = strong(GPTLMHeadModel(tiny())).train()
        model.update_routers()
        for seed in range(2):
            _, loss = model(tokens(T=24, seed=seed), targets=tokens(T=24, seed=seed + 1))
            if generates:
                model.generate(tokens(T=5), max_new_tokens=3, do_sample=False)
                assert model.training
        model.update_routers()
        losses.append((loss.item(), torch.stack([moe.get_usage_counts() for moe in model.moe_layers()])))
    assert losses[0][0] == losses[1][0] and torch.equal(losses[0][1], losses[1][1])


def test_generation_leaves_every_part_in_its_mode():
    """Parts that a fine-tuning has frozen in evaluation mode, or that sample with dropout on."""
    model = strong(GPTLMHeadModel(tiny(encoding="bytes"))).train()
    model.transformer.h[0].eval()
    model.transformer.h[0].mlp.dropout.train()
    modes = {name: module.training for name, module in model.named_modules()}
    model.generate(tokens(T=5), max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(ValueError, match="gives token 122, but vocab_size=97"):  # and after an error
        model.generate("z")
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.eval().generate(tokens(T=5), max_new_tokens=2)
    assert not any(module.training for module in model.modules())


def test_ids_that_only_pad_the_vocabulary_are_never_generated(tmp_path):
    model = strong(GPTLMHeadModel(tiny(encoding_size=60)))
    ids = tokens(V=60, T=5)
    assert greedy_by_hand(model, ids, 18).max() >= 60
    torch.manual_seed(0)
    assert model.generate(ids, max_new_tokens=30, do_sample=True).max() < 60
    model.save_pretrained(tmp_path)
    again = GPTLMHeadModel.from_pretrained(tmp_path)
    assert again.generate(ids, max_new_tokens=18, num_beams=2, do_sample=False).max() < 60


# -----------------------------------------------------------------------------
# Text


def test_text_in_text_out():
    config = tiny(vocab_size=384, encoding="bytes", encoding_size=257, bos_token_id=256)
    model = strong(GPTLMHeadModel(config))
    prompt = "Hello, I'm a language model,"
    text = model.generate(prompt, max_length=50, do_sample=False)
    ids = greedy_by_hand_suppressed(model, list(prompt.encode()), 50)
    assert text == bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
    assert text.startswith(prompt) and model.generate(prompt, max_length=50, do_sample=False) == text
    both = model.generate(prompt, max_new_tokens=5, num_beams=2, num_return_sequences=2, do_sample=False)
    assert len(both) == 2 and both[0] != both[1] and all(text.startswith(prompt) for text in both)
    assert isinstance(model.generate("", max_new_tokens=5), str)  # begins a document
    dictionary_model = GPT(model.config.to_dict())
    dictionary_model.load_state_dict(model.state_dict())
    assert dictionary_model.generate(prompt, max_length=50, do_sample=False) == text


def greedy_by_hand_suppressed(model, ids, length):
    with torch.no_grad():
        while len(ids) < length:
            cropped = torch.tensor([ids[-model.config.block_size :]])
            ids = [*ids, model(cropped).logits[0, -1, : model.config.encoding_size].argmax().item()]
    return ids


def test_text_that_cannot_be_encoded_is_refused(gpt2_encoding):
    with pytest.raises(ValueError, match=r"encoding='gpt2' gives token \d+, but vocab_size=97; set config"):
        GPTLMHeadModel(tiny()).generate("Hello there")
    with pytest.raises(ValueError, match="empty prompt needs a bos_token_id"):
        GPTLMHeadModel(tiny()).generate("")


def test_gpt2_text(gpt2_encoding):
    config = tiny(n_layer=1, vocab_size=50304, encoding_size=50257, n_embd=16, eos_token_id=50256)
    model = strong(GPTLMHeadModel(config))
    text = model.generate("Hello, I'm a language model,", max_length=20, do_sample=False)
    ids = gpt2_encoding.encode_ordinary("Hello, I'm a language model,")
    expected = greedy_by_hand_suppressed(model, ids, 20)
    assert text == gpt2_encoding.decode(expected[: expected.index(50256)] if 50256 in expected else expected)
    assert decode_tokens([15496, 50256, 50300, 995], "gpt2") == "Hello world"


STRANGE = [
    "", " ", "Hello world", "  two  spaces\n\n\ttabs ", "don't we'll I'd", "naïve 日本語 🙂", "a" * 300,
    "\x00\x7f\xa0\xad", "1234567 ½ x²", "<|endoftex|> <|startoftext|>", "\r\n mixed \r endings\u2028 ",
]  # fmt: skip


def test_byte_tokenizer_is_the_byte_encoding(tmp_path):
    build_tokenizer("bytes", 64).save_pretrained(tmp_path)
    tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == 257
    assert [tokenizer.convert_tokens_to_ids(t) for t in (tokenizer.bos_token, "<|endoftext|>")] == [256, 256]
    for text in STRANGE:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode("utf-8")) == encode_text(text, "bytes")
        assert tokenizer.decode(ids) == text == decode_tokens(ids, "bytes")
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [97, 256, 98]
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"
    assert decode_tokens([97, 256, 98], "bytes") == "ab"
    assert get_encoding("bytes").encode_ordinary(STRANGE[5]) == tokenizer(STRANGE[5])["input_ids"]


def test_gpt2_tokenizer_is_tiktokens(gpt2_encoding, tmp_path):
    build_tokenizer("gpt2", 1024).save_pretrained(tmp_path)
    tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256
    for text in [*STRANGE, shared_file("tinyshakespeare.txt").read_text(encoding="utf-8")[:50_000]]:
        ids = tokenizer(text)["input_ids"]
        assert ids == gpt2_encoding.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    # the merges found from the ranks are those of GPT-2's own file
    ranks = {gpt2_encoding.decode_single_token_bytes(i): i for i in range(50256)}
    shown = byte_characters()
    found = [" ".join("".join(shown[b] for b in part) for part in pair) for pair in find_merges(ranks)]
    files = [path.read_text(encoding="utf-8") for path in shared_file("tiktoken_cache").iterdir()]
    original = next(text for text in files if text.startswith("#version"))
    assert found == original.strip().split("\n")[1:]


def test_other_encodings_have_no_tokenizer_files():
    with pytest.raises(ValueError, match=r"encoding='cl100k_base': .*for bytes, gpt2"):
        build_tokenizer("cl100k_base", 64)


# -----------------------------------------------------------------------------
# In: GPT-2's folders, and ours


def stock_gpt2(seed=0, **fields) -> GPT2LMHeadModel:
    config = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=97, n_positions=24)
    config |= dict(bos_token_id=0, eos_token_id=1)
    return strong(GPT2LMHeadModel(GPT2Config(**config | fields)), seed=seed)


@pytest.mark.parametrize("files", ["safetensors", "sharded safetensors", "bin", "base model", "hub cache"])
def test_gpt2_folders_load(files, tmp_path):
    theirs = stock_gpt2()
    folder, name, where = tmp_path / "gpt2", str(tmp_path / "gpt2"), {}
    if files == "sharded safetensors":
        theirs.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    elif files == "bin":
        theirs.config.save_pretrained(folder)
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    elif files == "base model":
        theirs.transformer.save_pretrained(folder)
    elif files == "hub cache":  # as huggingface_hub lays out what it has downloaded
        theirs.save_pretrained(tmp_path / "models--gpt2" / "snapshots" / ("0" * 40))
        (tmp_path / "models--gpt2" / "refs").mkdir()
        (tmp_path / "models--gpt2" / "refs" / "main").write_text("0" * 40)
        name, where = "gpt2", dict(cache_dir=tmp_path)
    else:
        theirs.save_pretrained(folder)
    ours, ids = GPTLMHeadModel.from_pretrained(name, **where), tokens(T=24)
    assert not ours.training and ours.config.model_type == "gpt_moe" and ours.config.eos_token_id == 1
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5
        base = GPT.from_pretrained(name, **where)
        stock = theirs.transformer(ids).last_hidden_state
        assert (base(ids).last_hidden_state - stock).abs().max() < 1e-5
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert all(p.device.type == "cpu" and p.requires_grad for p in ours.parameters())
    greedy = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(tokens(T=5), **greedy), theirs.generate(tokens(T=5), **greedy))


@pytest.mark.parametrize(
    "fields",
    [
        dict(tie_word_embeddings=False), dict(n_inner=100), dict(layer_norm_epsilon=0.5),
        dict(activation_function="gelu_pytorch_tanh"), dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    ],
)  # fmt: skip
def test_flags_of_gpt2_that_change_the_numbers_are_honoured(fields, tmp_path):
    theirs = stock_gpt2(**fields)
    theirs.save_pretrained(tmp_path)
    ours, ids = GPTLMHeadModel.from_pretrained(tmp_path), tokens(T=24)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5
    assert ours.config.dropout == theirs.config.resid_pdrop


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(activation_function="gelu"), "activation_function='gelu'; only 'gelu_new' can be loaded"),
        (dict(activation_function="relu"), "activation_function='relu'"),
        (dict(scale_attn_weights=False), "scale_attn_weights=False; only True can be loaded"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"),
        (dict(add_cross_attention=True), "add_cross_attention=True"),
        (dict(resid_pdrop=0.2), "resid_pdrop=0.2, embd_pdrop=0.1 and attn_pdrop=0.1; they must be equal"),
    ],
)
def test_flags_of_gpt2_that_cannot_be_honoured_are_refused(fields, message, tmp_path):
    stock_gpt2(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        GPTLMHeadModel.from_pretrained(tmp_path)


def test_a_gpt2_folder_with_weights_missing_is_refused(tmp_path):
    stock_gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.1.mlp.c_fc.weight"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack the weights transformer\.h\.1\.mlp\.c_fc\.weight"):
        GPTLMHeadModel.from_pretrained(tmp_path)


def test_precision_and_loading_information_are_passed_on(tmp_path):
    stock_gpt2().save_pretrained(tmp_path / "theirs")
    strong(GPTLMHeadModel(tiny())).save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        how = dict(dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True)
        model, info = GPTLMHeadModel.from_pretrained(tmp_path / folder, **how)
        assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model(tokens(T=5)).logits.isfinite().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_folders_load_what_was_saved(name, tmp_path):
    model = strong(GPTLMHeadModel(tiny(**ARCHITECTURES[name], router_bias_update_rate=0.01)))
    model.train()
    model.update_routers()
    model(tokens(T=24), targets=tokens(T=24))
    model.update_routers()
    model.eval()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    names = [name for shard in shards for name in load_file(shard)]
    assert len(names) == len(set(names))
    tied = model.config.tie_word_embeddings
    assert set(model.state_dict()) - set(names) == ({"lm_head.weight"} if tied else set())
    ids = tokens(T=24)
    for cls in (GPTLMHeadModel, GPT):
        again = cls.from_pretrained(tmp_path)
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert (again.lm_head.weight is again.transformer.wte.weight) == tied
    assert torch.allclose(GPTLMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits, atol=1e-5)
    half = GPTLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(ids).logits.isfinite().all()
    for moe in half.moe_layers():  # routing stays exact, and a small step of the bias is not rounded away
        assert moe.gate.weight.dtype == moe.router_bias.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    again = GPTLMHeadModel.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16 and torch.equal(again(ids).logits, half(ids).logits)


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="models of type 'qwen2' cannot be read, only gpt_moe, gpt2, llama"):
        GPTLMHeadModel.from_pretrained(tmp_path)


def test_settings_beside_the_name_of_a_stock_folder(tmp_path):
    stock_gpt2().save_pretrained(tmp_path)
    loaded = GPTLMHeadModel.from_pretrained(tmp_path, dropout=0.25, use_cache=False, encoding="bytes")
    config = loaded.config
    assert (config.dropout, config.use_cache, config.encoding) == (0.25, False, "bytes")


def test_padding_is_not_generated_without_a_generation_config_either(tmp_path):
    GPTLMHeadModel(tiny(encoding_size=90)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded, info = GPTLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.generation_config.suppress_tokens == list(range(90, 97)) and not info["missing_keys"]


def test_a_folder_without_some_buffers_and_weights_gets_fresh_ones(tmp_path):
    model = strong(GPTLMHeadModel(tiny())).train()
    model.update_routers()
    model(tokens(T=24), targets=tokens(T=24))
    model.update_routers()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    buffers = {name for name, _ in model.named_buffers()}
    kept = {name: value for name, value in weights.items() if name not in buffers}
    del kept["transformer.h.1.attn.c_proj.weight"], kept["transformer.h.0.mlp.experts.c_fc_bias"]
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = GPTLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] >= buffers | {"transformer.h.1.attn.c_proj.weight"}
    for moe in again.moe_layers():
        for name, value in moe.initial_statistics().items():
            assert torch.equal(getattr(moe, name), value), name
        assert not moe.step_managed
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in kept.items())
    fresh = state["transformer.h.1.attn.c_proj.weight"]
    assert fresh.std().item() == pytest.approx(0.02 / 2, rel=0.1)  # 0.02 / sqrt(2 * n_layer)
    assert state["transformer.h.0.mlp.experts.c_fc_bias"].count_nonzero() == 0


# -----------------------------------------------------------------------------
# Out: export_folder

ELSEWHERE = """
import json, sys, torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
found = {}
*folders, saved, bare = sys.argv[1:]
for folder in folders:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer("Hello, I'm", return_tensors="pt")
    generator = pipeline("text-generation", folder, trust_remote_code=True)
    text = generator("Hello, I'm", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    generator.tokenizer.pad_token_id = config.eos_token_id
    batch = generator(["Hello, I'm", "Oh"], max_new_tokens=8, do_sample=False, batch_size=2)
    with torch.no_grad():
        logits = model(**prompt).logits[0].tolist()
        hidden = base(**prompt).last_hidden_state[0].tolist()
    found[folder] = dict(
        logits=logits, hidden=hidden, text=text, batch=[row[0]["generated_text"] for row in batch],
        names=[type(x).__name__ for x in (config, model, base)], home=type(model).__module__.split(".")[0],
        string=model.generate("Hello, I'm", max_new_tokens=8, do_sample=False),
    )
model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
model.save_pretrained(saved + " again")
again = AutoModelForCausalLM.from_pretrained(saved + " again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(torch.arange(20)[None]).logits, model(torch.arange(20)[None]).logits)
config = AutoConfig.from_pretrained(bare, trust_remote_code=True)  # config.save_pretrained() alone
fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
config.save_pretrained(bare + " again")
config = AutoConfig.from_pretrained(bare + " again", trust_remote_code=True)
again = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert again.load_state_dict(fresh.state_dict()) and fresh.num_parameters() == again.num_parameters()
with torch.no_grad():
    assert torch.equal(again(torch.arange(20)[None]).logits, fresh(torch.arange(20)[None]).logits)
print("RESULT" + json.dumps(found))
"""


def run_elsewhere(code, arguments, cwd, program=sys.executable, timeout=900) -> str:
    """Output of Python code in a process that has this project neither on its path nor as its folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [program, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def byte_model(**fields) -> GPTLMHeadModel:
    fields = dict(vocab_size=384, block_size=48, encoding="bytes", encoding_size=257) | fields
    return strong(GPTLMHeadModel(tiny(**fields)), std=0.15)


def test_folders_work_where_the_project_is_not_installed(tmp_path, gpt2_encoding):
    bpe_config = tiny(n_layer=1, n_embd=16, vocab_size=50304, encoding_size=50257)
    models = {str(tmp_path / "bytes"): byte_model(**ARCHITECTURES["window, global"])}
    models[str(tmp_path / "bpe")] = strong(GPT(bpe_config))
    for folder, model in models.items():
        export_folder(model, folder)
    saved = byte_model(num_shared_experts=1)
    saved.save_pretrained(tmp_path / "saved")  # without export_folder
    saved.config.save_pretrained(tmp_path / "config")
    folders = [*models, tmp_path / "saved", tmp_path / "config"]
    found = json.loads(run_elsewhere(ELSEWHERE, folders, tmp_path).split("RESULT")[1])
    for folder, model in models.items():
        there = found[folder]
        assert there["names"] == ["GPTConfig", "GPTLMHeadModel", "GPT"]
        assert there["home"] == "transformers_modules"
        base = GPT(model.config).eval()
        base.load_state_dict(model.state_dict())
        ids = torch.tensor([encode_text("Hello, I'm", model.config.encoding)])
        with torch.no_grad():
            assert torch.allclose(torch.tensor(there["logits"]), model(ids, targets=ids)[0][0], atol=1e-5)
            assert torch.allclose(torch.tensor(there["hidden"]), base(ids).last_hidden_state[0], atol=1e-5)
        prompts, greedy = ("Hello, I'm", "Oh"), dict(max_new_tokens=8, do_sample=False)
        expected = [model.generate(prompt, **greedy) for prompt in prompts]
        assert there["text"] == there["string"] == expected[0] != prompts[0]
        assert there["batch"] == expected
    again = GPTLMHeadModel.from_pretrained(tmp_path / "saved again")
    assert torch.equal(again(tokens(V=257, T=5)).logits, saved(tokens(V=257, T=5)).logits)


def test_code_is_exported_flat_and_again(tmp_path):
    files = {
        "start.py": '"""\nfrom other.b import y\n"""\nfrom os.path import join\nfrom layers.a import x\n',
        "layers/a.py": "def f():\n    from other.b import (\n        y,\n    )\n\n\nx = f\n",
        "other/b.py": "from start import nothing\ny = 1\n",
    }
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    for folder, start in (("one", tmp_path), ("two", tmp_path / "one")):
        (tmp_path / folder).mkdir()
        export_code(tmp_path / folder, start / "start.py")
        copies = {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}
        assert copies == {
            "start.py": files["start.py"].replace("\nfrom layers.a", "\nfrom .a"),  # the docstring stays
            "a.py": files["layers/a.py"].replace("other.b", ".b"),
            "b.py": files["other/b.py"].replace("start", ".start"),
        }
    (tmp_path / "other" / "a.py").write_text("")
    (tmp_path / "other" / "b.py").write_text("from other.a import nothing\n")
    (tmp_path / "three").mkdir()
    with pytest.raises(ValueError, match=r"a flat folder cannot hold two a\.py"):
        export_code(tmp_path / "three", tmp_path / "start.py")
    assert not list((tmp_path / "three").iterdir())


BEFORE_THE_REDESIGN = "83a183f"
BEFORE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import checkpoint, train_gpt_moe
out, *flags = sys.argv[2:]
assert train_gpt_moe.main(flags) == 0
assert checkpoint.main(["export", out + "/log/model_00003.pt", out + "/folder"]) == 0
model = checkpoint.load_model(out + "/log/model_00003.pt").eval()
with torch.no_grad():
    torch.save(model(torch.arange(30)[None]).logits, out + "/logits.pt")
"""


@pytest.mark.slow
def test_checkpoints_and_folders_of_before_the_redesign_load(data, tmp_path):
    archive = ["git", "archive", "-o", str(tmp_path / "before.tar"), BEFORE_THE_REDESIGN]
    if subprocess.run(archive, cwd=ROOT, capture_output=True).returncode != 0:
        pytest.skip(f"git has no revision {BEFORE_THE_REDESIGN} here")
    shutil.unpack_archive(tmp_path / "before.tar", tmp_path / "before")
    shape = ["--max_steps", 3, "--num_experts", 4, "--num_shared_experts", 1, "--qk_norm", "True"]
    arguments = flags(data, tmp_path / "log", *shape)
    run_elsewhere(BEFORE, [tmp_path / "before", tmp_path, *arguments], tmp_path)
    exported = GPTLMHeadModel.from_pretrained(tmp_path / "folder")
    for model in (load_model(tmp_path / "log" / "model_00003.pt"), exported):
        assert model.config.num_experts == 4
        with torch.no_grad():
            logits = model.eval()(torch.arange(30)[None]).logits
        assert torch.equal(logits, torch.load(tmp_path / "logits.pt"))


def test_a_folders_code_beside_ours_has_operators_of_its_own(tmp_path, own_modules):
    """torch would replace operators of the same name, and ours would call freed memory."""
    ours = byte_model().train()
    export_folder(ours, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
    package = type(theirs).__module__.removesuffix(".model")
    for name, operator in (("experts", "expert_mlp"), ("linear_cross_entropy", "chunked")):
        places = (f"layers.{name}", f"{package}.{name}")
        mine, other = (getattr(sys.modules[place], operator) for place in places)
        assert mine._opoverload.name() != other._opoverload.name()
    ids, losses = tokens(V=256, T=5), []
    for model in (ours, theirs, ours):
        model.loss_chunk = 2
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1]) and losses[0] == losses[2]


def test_an_export_says_how_its_texts_end_and_forgets_usage(tmp_path):
    model = byte_model().train()
    model.update_routers()
    model(tokens(T=24), targets=tokens(T=24))
    model.update_routers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_folder(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == generation["eos_token_id"] == 256
    assert model.config.eos_token_id is None and "auto_map" not in model.config.to_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = GPTLMHeadModel.from_pretrained(tmp_path / "out")
    assert all(moe.get_usage_counts().sum() == 0 for moe in again.moe_layers())
    assert torch.equal(again.eval()(tokens(T=5)).logits, model.eval()(tokens(T=5)).logits)
    export_folder(model, tmp_path / "bare", tokenizer=False, max_shard_size="100KB")
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    assert (tmp_path / "bare" / "model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["eos_token_id"] is None


def test_only_an_export_is_ever_replaced(tmp_path, monkeypatch):
    model, folder = byte_model(), tmp_path / "deep" / "out"
    export_folder(model, folder)
    assert json.loads((folder / "export.json").read_text())["files"] == sorted(os.listdir(folder))
    other = byte_model(n_head=2)
    export_folder(other, folder)
    assert GPTConfig.from_pretrained(folder).n_head == 2
    assert os.listdir(folder.parent) == ["out"]  # nothing temporary stays

    with monkeypatch.context() as patch:  # a disk that fills up at the last file
        full = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))  # noqa: E731
        patch.setattr(export.json, "dumps", full)
        with pytest.raises(OSError, match="No space left"):
            export_folder(model, folder)
    with monkeypatch.context() as patch:  # a rename that fails
        rename = Path.rename

        def fail_once(path, target):
            if path.name.endswith(".tmp"):
                raise OSError(5, "Input/output error")
            return rename(path, target)

        patch.setattr(Path, "rename", fail_once)
        with pytest.raises(OSError, match="Input/output error"):
            export_folder(model, folder)
    assert GPTConfig.from_pretrained(folder).n_head == 2 and os.listdir(folder.parent) == ["out"]

    (folder / "my notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"holds 'my notes\.txt', which is not from an export"):
        export_folder(model, folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds 'config\.json'"):
        export_folder(model, tmp_path / "thesis")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        export_folder(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_folder(model, tmp_path / "empty")


@pytest.mark.parametrize("fields", [{}, dict(bias=False), dict(tie_word_embeddings=False), dict(n_kv_head=4)])
def test_dense_models_become_stock_gpt2(fields, tmp_path, caplog):
    model = byte_model(use_moe=False, mlp_hidden_size=100, norm_eps=1e-4, dropout=0.1, **fields)
    export_folder(model, tmp_path / "out", format="gpt2")
    assert "384 rows of the embeddings are cut to the 257 tokens of the encoding 'bytes'" in caplog.text
    assert not list((tmp_path / "out").glob("*.py"))
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.vocab_size == 257 and theirs.config.eos_token_id == 256
    ids = tokens(T=48, V=257)
    with torch.no_grad():
        expected = model(ids).logits[..., :257]
        assert (theirs(ids).logits - expected).abs().max() < 1e-5
        back = GPTLMHeadModel.from_pretrained(tmp_path / "out")
        assert (back(ids).logits - expected).abs().max() < 1e-5
    tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path / "out")
    ids = theirs.generate(**tokenizer("Oh", return_tensors="pt"), max_new_tokens=9, do_sample=False)
    assert tokenizer.decode(ids[0]) == model.generate("Oh", max_new_tokens=9, do_sample=False)


def test_a_vocabulary_without_padding_is_exported_whole(tmp_path, caplog):
    model = strong(GPTLMHeadModel(tiny(use_moe=False)))
    export_folder(model, tmp_path, format="gpt2", tokenizer=False)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not caplog.text
    assert (theirs(tokens(T=5)).logits - model(tokens(T=5)).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_moe=True), dict(position="rope"), dict(n_kv_head=2), dict(sliding_window=8),
        dict(norm="rmsnorm"), dict(activation="relu2"), dict(activation="swiglu"), dict(qk_norm=True),
        dict(logit_softcap=30.0),
    ],
)  # fmt: skip
def test_what_gpt2_cannot_express_is_refused_by_name(fields, tmp_path):
    model = GPTLMHeadModel(tiny(vocab_size=384, encoding="bytes", **{"use_moe": False} | fields))
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"GPT-2 cannot express {name}={value!r}"):
        export_folder(model, tmp_path / "out", format="gpt2")
    assert os.listdir(tmp_path) == []


def test_bad_exports_are_refused(tmp_path, gpt2_encoding):
    model = GPTLMHeadModel(tiny())
    with pytest.raises(ValueError, match="format='onnx': choose one of gpt_moe, gpt2"):
        export_folder(model, tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="encoding='gpt2' has 50257 tokens, but vocab_size=97"):
        export_folder(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# lm-evaluation-harness

TASK = """
task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function hellaswag_docs.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
DOCS = """
from lm_eval.tasks.hellaswag.utils import preprocess

def process_docs(dataset):
    def make(doc):
        return {
            "query": preprocess(doc["activity_label"] + ": " + doc["ctx"]),
            "choices": [preprocess(ending) for ending in doc["endings"]],
        }
    return dataset.map(make)
"""


def test_lm_eval_agrees_with_hellaswag_py(tmp_path):
    """Set LM_EVAL_PYTHON to the Python of an environment with lm_eval, if it is not installed in this one."""
    python = os.environ.get("LM_EVAL_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (pip install lm_eval, or set LM_EVAL_PYTHON)")
    hellaswag = pytest.importorskip("hellaswag")
    questions = shared_file("hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions) + "\n")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "hellaswag_local.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    (tmp_path / "task" / "hellaswag_docs.py").write_text(DOCS)
    model = byte_model(block_size=512)
    export_folder(model, tmp_path / "exported")
    command = [
        python, "-m", "lm_eval", "--model", "hf", "--tasks", "hellaswag_local", "--limit", "20",
        "--model_args", f"pretrained={tmp_path / 'exported'},trust_remote_code=True", "--device", "cpu",
        "--batch_size", "8", "--include_path", tmp_path / "task", "--output_path", tmp_path / "results",
        "--log_samples",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    how = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    done = subprocess.run([*map(str, command)], **how)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())
    theirs = results["results"]["hellaswag_local"]
    samples = next((tmp_path / "results").rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, samples), key=lambda sample: sample["doc_id"])
    for n in range(1, 21):  # question by question
        ours = hellaswag.evaluate(model, data=tmp_path / "questions.jsonl", limit=n, style="harness")
        for name in ("acc", "acc_norm"):
            assert getattr(ours, name) * n == pytest.approx(sum(sample[name] for sample in samples[:n]))
    assert (ours.n, ours.acc, ours.acc_norm) == (20, theirs["acc,none"], theirs["acc_norm,none"])
    assert ours.acc_stderr == pytest.approx(theirs["acc_stderr,none"])
