"""torch.export, ONNX, torchao and llama.cpp with models that have experts.

    LLAMA_CPP=llama.cpp python -m pytest -m slow tests/huggingface/test_converters.py    # a checkout

The slow tests skip where the other program is not installed: pip install onnxruntime onnxscript torchao
llama-cpp-python gguf"""

import os
import subprocess
import sys

import pytest
import torch
from models import ARCHITECTURES, strong, tiny, tokens
from test_foreign import EXPERTS, small

from huggingface.export import export_folder
from model import GPTLMHeadModel

MODERN = ARCHITECTURES["modern"]
LOADS = """
import sys, torch
program = torch.export.load("program.pt2").module()
logits = program(torch.load("ids.pt"), use_cache=False, return_dict=False)[0]
assert not {"model", "layers", "huggingface", "transformers"} & sys.modules.keys()
torch.save(logits, "logits.pt")
"""


def exported_how(T: int = 24) -> dict:
    """Arguments for torch.export and torch.onnx: any number of texts of any length, plain tensors."""
    sizes = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("T", min=2, max=T)}
    plain = dict(use_cache=False, return_dict=False)
    return dict(kwargs=plain, dynamic_shapes=dict(input_ids=sizes, **dict.fromkeys(plain)))


@pytest.mark.slow
def test_an_exported_program_runs_where_our_code_is_missing(tmp_path):
    model, ids = strong(GPTLMHeadModel(tiny(**MODERN))), tokens(B=2, T=7, seed=3)
    program = torch.export.export(model, (tokens(),), **exported_how())
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(ids, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-P", "-I", "-c", LOADS], cwd=tmp_path, check=True)
    assert (torch.load(tmp_path / "logits.pt") - model(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind, fields, words", [
    ("qwen3_moe", EXPERTS | dict(moe_every=2), "moe_every=2"), ("qwen3_moe", EXPERTS, ""),
    ("gpt2", dict(), "mlp_hidden_size=40"), ("gpt2", dict(mlp_hidden_size=None), ""),
    ("llama", dict(encoding="bytes", vocab_size=384, encoding_size=257), "encoding='bytes'"),
])  # fmt: skip
def test_export_warns_of_folders_that_llama_cpp_refuses(kind, fields, words, tmp_path, caplog):
    model = GPTLMHeadModel(small(kind, **fields))
    export_folder(model, tmp_path / "out", format=kind, tokenizer="encoding" in fields)
    lines = [text for text in caplog.messages if "llama.cpp" in text]
    assert [words in line for line in lines] == [True] * bool(words)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [dict(), MODERN])
def test_onnx_runs_experts(fields, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime onnxscript")
    pytest.importorskip("onnxscript", reason="pip install onnxruntime onnxscript")
    model, path = strong(GPTLMHeadModel(tiny(**fields))), tmp_path / "model.onnx"
    torch.onnx.export(model, (tokens(),), path, dynamo=True, verbose=False, **exported_how())
    session = runtime.InferenceSession(path)
    for ids in (tokens(), tokens(B=2, T=7)):
        logits = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
        assert (torch.from_numpy(logits) - model(ids).logits).abs().max() < 1e-4


@pytest.mark.slow
def test_torchao_quantises_experts_and_leaves_the_router(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model, ids, int8 = strong(GPTLMHeadModel(tiny()), 0.05), tokens(), torchao.Int8WeightOnlyConfig()
    linear = lambda part, name: isinstance(part, torch.nn.Linear) and "gate" not in name  # noqa: E731
    torchao.quantize_(model, int8, filter_fn=linear)
    config = torchao.FqnToConfig({r"re:.*experts\.c_(fc|proj)": int8})
    torchao.quantize_(model, config, filter_fn=None)
    layers = [layer.experts for layer in model.moe_layers()]
    assert all(hasattr(part.c_fc, "qdata") and hasattr(part.c_proj, "qdata") for part in layers)
    assert all(type(layer.gate.weight) is torch.nn.Parameter for layer in model.moe_layers())
    found = model(ids).logits
    for part in layers:
        part.c_fc, part.c_proj = (torch.nn.Parameter(p.dequantize()) for p in (part.c_fc, part.c_proj))
    assert (found - model(ids).logits).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "mixtral", "qwen3_moe"])
def test_llama_cpp_computes_the_same_logits(kind, tmp_path):
    llama = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python gguf")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp, which has the converter")
    wide = dict(vocab_size=50304, encoding_size=50257, n_embd=64, block_size=64, mlp_hidden_size=256)
    fields = dict(use_moe=False) if kind in ("gpt2", "llama", "qwen3") else EXPERTS
    model = strong(GPTLMHeadModel(small(kind, **wide | fields | dict(expert_hidden_size=64))), 0.1)
    export_folder(model, tmp_path / "hf", format=kind)
    script = [sys.executable, f"{os.environ['LLAMA_CPP']}/convert_hf_to_gguf.py", "hf", "--outtype", "f32"]
    subprocess.run([*script, "--outfile", "out.gguf"], cwd=tmp_path, check=True)
    path = str(tmp_path / "out.gguf")
    reader = llama.Llama(path, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)  # fp32 cache
    ids = tokens(B=1, T=24, V=50257)
    reader.eval(ids[0].tolist())
    found, expected = torch.tensor(reader.scores[:24]), model(ids).logits[0, :, :50257]
    reader.close()
    assert (found - expected).abs().max() < 5e-3 and torch.equal(found.argmax(-1), expected.argmax(-1))
