"""llm.c's files against readers that know only the tables in docs/formats.md (llmc_readers.py)."""

import copy
import re

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import refuses
from llmc_readers import read_model, read_state, read_tokenizer
from models import strong, tokens

from llmc import files as llmc
from model import GPTConfig, GPTLMHeadModel
from tokens import shards
from tokens.encodings import get_encoding

GPT2 = dict(use_moe=False, block_size=12, vocab_size=384, encoding_size=300, n_layer=3, n_head=2, n_embd=16)


def randomised(**fields) -> GPTLMHeadModel:
    """A model in which no two tensors or layers are alike: norms of 1 and biases of 0 would hide swaps."""
    return strong(GPTLMHeadModel(GPTConfig(**(GPT2 | fields))), std=0.3)


@pytest.fixture
def model() -> GPTLMHeadModel:
    return randomised()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(2, 10, 300)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def in_float64(model, x, y, V: int) -> dict[str, np.ndarray]:
    """What a debug state holds: logits of V tokens (B, T, V), loss and, by their names, gradients."""
    model = copy.deepcopy(model).double().eval()
    logits = model(x).logits[..., :V]
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    model.transformer.wte.weight.grad[V:] = 0
    tensors = {name: parameter.grad for name, parameter in model.named_parameters()}
    tensors |= dict(x=x, y=y, logits=logits.detach(), loss=loss.detach())
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_of_the_file_are_the_models_and_round_trips_are_byte_identical(model, tmp_path, dtype):
    """For a reader that knows the table alone, and for read_model. bf16 rounds to nearest, ties to even."""
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x3F808001, 0x3F807FFF, 0x007F8000], np.uint32)
    with torch.no_grad():
        model.transformer.wte.weight.view(-1)[:6] = torch.from_numpy(ties.view(np.float32))
    llmc.write_model(model, tmp_path / "m.bin", dtype)
    if dtype == "bfloat16":
        numbers = np.frombuffer((tmp_path / "m.bin").read_bytes()[1024:], "<u2")
        assert numbers[:6].tolist() == [0x3F80, 0x3F82, 0xBF80, 0x3F81, 0x3F80, 0x0080]
    sizes, tensors = read_model(tmp_path / "m.bin")
    assert sizes == {"P": 12, "V": 300, "L": 3, "nh": 2, "C": 16, "Vp": 384}
    again = llmc.read_model(tmp_path / "m.bin")
    assert not again.training and again.config.vocab_size == 300
    assert again.lm_head.weight is again.transformer.wte.weight
    assert tensors.keys() == dict(model.named_parameters()).keys()
    for name, parameter in again.named_parameters():
        exact = model.get_parameter(name).detach()[: len(parameter)].to(getattr(torch, dtype)).float()
        assert parameter.dtype == torch.float32 and torch.equal(parameter, exact), name
        np.testing.assert_array_equal(tensors[name][: len(parameter)], exact.numpy(), err_msg=name)
        # A view of a stack of layers would save the whole stack.
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel(), name
    assert not tensors["transformer.wte.weight"][300:].any()
    again.save_pretrained(tmp_path / "folder")
    for model in (again, GPTLMHeadModel.from_pretrained(tmp_path / "folder")):
        llmc.write_model(model, tmp_path / "again.bin", dtype)
        assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()


GPT2_ROWS = dict(vocab_size=50304, n_layer=1, n_embd=4)


@pytest.mark.parametrize("fields, V", [
    (dict(expert_hidden_size=32), 300),  # which a dense model does not use
    (GPT2_ROWS | dict(encoding_size=50257), 50257), (GPT2_ROWS | dict(encoding_size=None), 50257),
])  # fmt: skip
def test_state_against_float64_with_padded_vocabularies(fields, V, tmp_path):
    """The rows that pad a vocabulary are written as zeros and take no part in logits, loss, gradients."""
    model, ids = randomised(**fields), tokens(2, 10, V)
    with torch.no_grad():
        model.transformer.wte.weight[V:] = 100.0  # the largest logits by far, if anything used them
    x, y = ids[:, :-1], ids[:, 1:]
    llmc.write_model(model, tmp_path / "m.bin")
    llmc.write_state(model, x, y, tmp_path / "m_debug_state.bin")
    (sizes, tensors), state = read_model(tmp_path / "m.bin"), read_state(tmp_path / "m_debug_state.bin")
    assert (sizes["V"], sizes["Vp"]) == (V, model.config.vocab_size)
    expected = in_float64(model, x, y, V)
    assert state.keys() == expected.keys()
    for name, exact in expected.items():
        error = np.linalg.norm(state[name] - exact) / np.linalg.norm(exact)
        assert error < 1e-4, f"{name}: {error:.1e}"
    for name in ("logits", "loss"):
        np.testing.assert_allclose(state[name], expected[name], atol=1e-4)
    for written in (tensors, state):
        table = written["transformer.wte.weight"]
        assert not table[V:].any() and table[V - 1].any()


@pytest.mark.parametrize("field, value", [
    ("use_moe", True), ("bias", False), ("norm", "rmsnorm"), ("norm_eps", 1e-6), ("activation", "relu2"),
    ("activation", "swiglu"), ("position", "rope"), ("tie_word_embeddings", False), ("n_kv_head", 1),
    ("sliding_window", 4), ("qk_norm", True), ("logit_softcap", 30.0), ("mlp_hidden_size", 32),
    ("ngram_order", 2),
])  # fmt: skip
def test_other_models_are_refused_by_name(tmp_path, batch, field, value):
    model = GPTLMHeadModel(GPTConfig(**(GPT2 | {field: value})))
    for write in (lambda: llmc.write_model(model, tmp_path / "out" / "m.bin"),
                  lambda: llmc.write_state(model, *batch, tmp_path / "out" / "s.bin"),
                  lambda: llmc.write_all(model, *batch, tmp_path / "out")):  # fmt: skip
        refuses(f"cannot express {field}={re.escape(repr(value))}", write)
    assert not (tmp_path / "out").exists()


def test_state_disturbs_nothing_and_nothing_disturbs_it(batch, tmp_path):
    """Same bytes from a model in training with dropout, gradients, autocast, TF32; and all of these stay."""
    plain, busy = randomised().eval(), randomised(dropout=0.5).train()
    llmc.write_state(plain, *batch, tmp_path / "plain.bin")
    for parameter in busy.parameters():
        parameter.grad = torch.ones_like(parameter)
    random_state = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            llmc.write_state(busy, *batch, tmp_path / "busy.bin")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (tmp_path / "busy.bin").read_bytes() == (tmp_path / "plain.bin").read_bytes()
    assert busy.training and torch.equal(random_state, torch.get_rng_state())
    for name, parameter in busy.named_parameters():
        assert parameter.grad.eq(1).all() and parameter.requires_grad, name
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_state_of_a_bf16_model_is_computed_in_fp32(model, batch, tmp_path):
    llmc.write_state(copy.deepcopy(model).bfloat16(), *batch, tmp_path / "held.bin")
    llmc.write_state(model.bfloat16().float(), *batch, tmp_path / "widened.bin")
    assert (tmp_path / "held.bin").read_bytes() == (tmp_path / "widened.bin").read_bytes()


def test_bad_batches_are_refused(model, tmp_path):
    path, ids, long = tmp_path / "s.bin", torch.zeros(2, 9, dtype=torch.long), tokens(1, 13, 300)
    for x, y, message in ((long, long, "T=13.*block_size=12"),
                          (ids, ids - 1, "y has ids from -1 to -1"),
                          (ids + 300, ids, "x has ids from 300 to 300.*0 to 299")):  # fmt: skip
        refuses(message, llmc.write_state, model, x, y, path)
    assert not path.exists()


def test_damaged_models_are_refused_and_filled_padding_is_said(model, tmp_path):
    good = tmp_path / "good.bin"
    llmc.write_model(model, good)
    raw, bad = good.read_bytes(), tmp_path / "bad.bin"

    def field(index: int, value: int) -> bytes:
        return raw[: 4 * index] + value.to_bytes(4, "little", signed=True) + raw[4 * index + 4 :]

    for contents, message in (
        (b"", "empty, 0 bytes"), (raw[:1000], "1,000 bytes long"), (field(0, 7), "no model.*begins with 7"),
        (field(0, 20240327), "no model.*a debug state"), (field(0, 20240520), "no model.*a data shard"),
        (field(1, 2), "version 2 of a model; only 3 and 5"), (field(3, 50257), "no GPT-2 has these sizes"),
        (field(4, -3), "no GPT-2 has these sizes"), (field(5, 3), "no GPT-2 has these sizes"),
        (field(4, 2**31 - 1), "cut short"), (raw[:-1], "cut short"), (raw + b"\0", "too long"),
    ):  # fmt: skip
        bad.write_bytes(contents)
        refuses(rf"bad\.bin: .*{message}", llmc.read_model, bad)
    refuses(r"missing\.bin: no such file", llmc.read_model, tmp_path / "missing.bin", error=FileNotFoundError)
    bad.write_bytes(field(256 + 300 * 16, 0x3F000000))  # the first number behind the 300 tokens' rows
    with pytest.warns(UserWarning, match=r"bad\.bin: its padding of wte is not zero"):
        assert llmc.read_model(bad).config.vocab_size == 300


BYTES = [bytes([i]) for i in range(256)]


def small_encoding(special: dict[str, int], *longer: bytes) -> tiktoken.Encoding:
    ranks = {piece: i for i, piece in enumerate([*BYTES, *longer])}
    return tiktoken.Encoding("small", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)


def test_tokenizer_of_gpt2(gpt2_encoding, tmp_path):
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(llmc.tokenizer_file(gpt2_encoding))
    pieces, eot = read_tokenizer(tmp_path / "gpt2_tokenizer.bin")
    assert (len(pieces), eot, pieces[eot]) == (50257, 50256, b"<|endoftext|>")
    assert b"".join(pieces[i] for i in gpt2_encoding.encode("Grüße, 世界!")).decode() == "Grüße, 世界!"


def test_tokenizers_of_bytes_and_others(model, tmp_path, monkeypatch):
    path, end, longest = tmp_path / "tokenizer.bin", b"<|endoftext|>", b"x" * 255
    path.write_bytes(llmc.tokenizer_file(get_encoding("bytes")))
    assert read_tokenizer(path) == ([*BYTES, end], 256)
    path.write_bytes(llmc.tokenizer_file(small_encoding({"<|endoftext|>": 257}, longest)))
    assert read_tokenizer(path) == ([*BYTES, longest, end], 257)
    for encoding, message in ((small_encoding({"<|endoftext|>": 258}), "token 256 has 0 bytes"),
                              (small_encoding({"<|endoftext|>": 257}, b"x" * 256), "token 256 has 256 bytes"),
                              (small_encoding({"<|end|>": 256}), r"has no <\|endoftext\|>")):  # fmt: skip
        monkeypatch.setattr(llmc, "get_encoding", {model.config.encoding: encoding}.get)
        refuses(message, llmc.write_all, model, None, None, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_command_line(tmp_path, capsys):
    """Checkpoint -> llm.c -> Hugging Face folder -> llm.c, and a state from a shard."""
    model = randomised(vocab_size=384, encoding_size=257, encoding="bytes")
    checkpoint, out = tmp_path / "model_00007.pt", tmp_path / "new" / "llmc"
    torch.save({"model": model.state_dict(), "config": model.config.to_dict(), "step": 7}, checkpoint)
    text = tokens(1, 100, 257).numpy().astype(np.uint16)[0]
    shards.write_shard(tmp_path / "shard.bin", text)
    source = ["--checkpoint", str(checkpoint), "--out", str(out)]
    assert llmc.main(["export", *source]) == 0
    assert {p.name for p in out.iterdir()} == {"gpt2_d3.bin", "gpt2_d3_bf16.bin", "gpt2_tokenizer.bin"}
    data = ["--data", str(tmp_path / "shard.bin"), "--B", "3", "--T", "11"]
    assert llmc.main(["state", *source, *data, "--c_names", "1"]) == 0
    assert (out / "gpt2_124M_debug_state.bin").is_file()
    read = read_state(out / "gpt2_d3_debug_state.bin")
    np.testing.assert_array_equal(read["x"].reshape(-1), text[:33])
    np.testing.assert_array_equal(read["y"].reshape(-1), text[1:34])
    assert "wrote" in capsys.readouterr().out
    folder = tmp_path / "hugging" / "face"
    assert llmc.main(["import", "--model", str(out / "gpt2_d3.bin"), "--out", str(folder)]) == 0
    assert [p.name for p in folder.parent.iterdir()] == ["face"]
    again = ["export", "--checkpoint", str(folder), "--out", str(tmp_path / "again"), "--dtype", "float32"]
    assert llmc.main(again) == 0
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"gpt2_d3.bin", "gpt2_tokenizer.bin"}
    imported = GPTLMHeadModel.from_pretrained(folder).config
    assert (imported.encoding, imported.vocab_size, imported.eos_token_id) == ("bytes", 257, 256)


def test_command_line_says_what_is_wrong(tmp_path, refused):
    dense, moe = tmp_path / "dense.pt", tmp_path / "moe.pt"
    for path in (dense, moe):
        model = randomised(use_moe=path == moe)
        torch.save({"model": model.state_dict(), "config": model.config.to_dict(), "step": 1}, path)
    shard, out = tmp_path / "shard.bin", tmp_path / "out"
    shards.write_shard(shard, np.full(20, 299, dtype=np.uint16))
    state = ["state", "--checkpoint", dense, "--out", out, "--data", shard]
    for arguments, message in (
        (["export", "--checkpoint", moe, "--out", out], "use_moe=True"),
        (["export", "--checkpoint", tmp_path / "missing.pt", "--out", out], "missing.pt"),
        (["state", "--checkpoint", dense, "--out", out, "--data", dense], "dense.pt"),
        ([*state, "--B", 4, "--T", 5], "20 tokens, --B and --T need 21"),
        ([*state, "--B", 0, "--T", 5], "--B 0"), (["import", "--model", shard, "--out", out], "a data shard"),
    ):  # fmt: skip
        error = refused(llmc.main, *arguments)
        assert re.fullmatch(f"python -m llmc: error: .*{re.escape(message)}.*", error), error
    llmc.write_model(randomised(), tmp_path / "m.bin")
    assert "exists already" in refused(llmc.main, "import", "--model", tmp_path / "m.bin", "--out", tmp_path)
