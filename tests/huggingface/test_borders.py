"""Folders of models that nobody has saved so: refused in one line, before anything large is built."""

import json
import math
import shutil

import pytest
import torch
from models import strong, tiny
from safetensors.torch import load_file, save_file

import sample
from huggingface.export import export_folder
from model import GPTConfig, GPTLMHeadModel, build_masks
from training.checkpoints import load_model

DENSE = dict(use_moe=False, position="rope", norm="rmsnorm", activation="swiglu", bias=False)
DEEP = "[" * 10**5 + "]" * 10**5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of ours, and the same as a stock Llama."""
    root = tmp_path_factory.mktemp("saved")
    export_folder(strong(GPTLMHeadModel(tiny())), root / "ours", tokenizer=False)
    export_folder(strong(GPTLMHeadModel(tiny(**DENSE))), root / "llama", format="llama", tokenizer=False)
    return root


@pytest.fixture(params=["ours", "llama"])
def folder(saved, request, tmp_path):
    """A copy of each, to be damaged."""
    return shutil.copytree(saved / request.param, tmp_path / request.param)


def refuses(folder, word) -> None:
    """load_model, which all commands use, must raise a ValueError of one short line with this word."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    line = str(error.value)
    assert str(folder) in line and word in line and len(line) < 600 and "\n" not in line, line


def rewrite(file, change) -> None:
    """Save the weights again, after change(weights)."""
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", ["x", -5, [], {}, 1e30, 10**8, 2**70])
def test_settings_of_other_kinds_and_sizes(folder, value):
    text = (folder / "config.json").read_text()
    config, ours = json.loads(text), folder.name == "ours"
    names = ["vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"]
    names += ["n_layer", "num_experts", "expert_hidden_size"] if ours else ["intermediate_size"]
    for name in names:
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        refuses(folder, "config")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    refuses(folder, "'qwen2' cannot be read, only gpt_moe, gpt2, llama")


FORGED = [DEEP, "[]", "{", "\0", '{"to_dict": 5}', '{"model_type": {}}', '{"eos_token_id": {"a": "b"}}']


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", FORGED)
def test_other_json(folder, file, text):
    (folder / file).write_text(text)
    refuses(folder, "")


@pytest.mark.parametrize("change, words", [
    (lambda weights, norm: weights.pop(norm), "lack the weights {}"),
    (lambda weights, norm: weights.update(extra=torch.ones(2)), "lacks: extra"),
    (lambda weights, norm: weights.update({norm: weights[norm][:-1]}), "another shape: {}"),
    (lambda weights, norm: weights[norm].fill_(math.nan), "transformer.ln_f"),
])  # fmt: skip
def test_other_weights(folder, change, words):
    norm = "transformer.ln_f.weight" if folder.name == "ours" else "model.norm.weight"
    rewrite(folder / "model.safetensors", lambda weights: change(weights, norm))
    refuses(folder, words.format(norm))


def test_files_that_are_cut_empty_pickled_or_elsewhere(folder):
    file, outside = folder / "model.safetensors", folder.parent / "outside.safetensors"
    content = file.read_bytes()
    for damaged in (b"", content[:7], content[:999], content[:-1], content + b"x"):
        file.write_bytes(damaged)
        refuses(folder, "damaged or cut off")
    file.unlink()
    outside.write_bytes(content)
    torch.save(load_file(outside), folder / "pytorch_model.bin")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../llama"}')
    refuses(folder, "pytorch_model.bin")
    elsewhere = "../outside.safetensors", str(outside)
    for other in (*elsewhere, "pytorch_model.bin", "gone.safetensors", 5, "", None):
        index = {"weight_map": {"lm_head.weight": other} if other is not None else [1]}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refuses(folder, "")


@pytest.mark.parametrize("values", [{"num_beams": 10**12}, {"num_beams": 2, "top_k": -5}])
def test_generation_settings_that_fail_while_sampling(saved, tmp_path, refused, values):
    folder = shutil.copytree(saved / "ours", tmp_path / "ours")
    (folder / "generation_config.json").write_text(json.dumps(values))
    refused(sample.main, "--model", folder, "--device=cpu", "--top_k=0", "--max_new_tokens=2")


def test_masks_in_an_old_gpt2_file_are_allowed(tmp_path):
    export_folder(GPTLMHeadModel(tiny(use_moe=False)), tmp_path / "gpt2", format="gpt2", tokenizer=False)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24) for i in (0, 1)}
    rewrite(tmp_path / "gpt2" / "model.safetensors", lambda weights: weights.update(masks))
    assert load_model(tmp_path / "gpt2").name_or_path == str(tmp_path / "gpt2")


@pytest.mark.parametrize("how", [dict(do_sample=False), dict(do_sample=True, top_k=5), dict(num_beams=2)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_not_sampled(how, value):
    model = GPTLMHeadModel(tiny(encoding_size=90)).eval()
    ids = torch.arange(4)[None]
    assert model.generate(ids, max_new_tokens=2, **how).shape == (1, 6)  # padding's -inf is no fault
    model.lm_head.weight.data[5] = value
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        model.generate(ids, max_new_tokens=2, **how)


def test_settings_alone_decide():
    """Masks do not depend on a model that was built from the configuration before."""
    fields = dict(sliding_window=3, global_every=2)
    fresh, x = build_masks(tiny(**fields), torch.zeros(1, 8, 64)), torch.zeros(1, 8, 64)
    used = build_masks(GPTLMHeadModel(tiny(**fields)).config, x)
    assert torch.equal(fresh["sliding_attention"], used["sliding_attention"]) and fresh.keys() == used.keys()
    assert GPTConfig(n_layer=2, moe_every=3, use_moe=False).moe_every == 3
