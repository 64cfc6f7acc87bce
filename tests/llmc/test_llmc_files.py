"""llm.c's files against readers that know only the tables in docs/formats.md (llmc_readers.py).

Run: python -m pytest tests/llmc/test_llmc_files.py
"""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from llmc_readers import TABLE, read_model, read_state, read_tokenizer

from llmc import files as llmc
from model import GPTConfig, GPTLMHeadModel
from tokens import shards
from tokens.encodings import get_encoding

GPT2 = dict(use_moe=False, block_size=12, vocab_size=384, encoding_size=300, n_layer=3, n_head=2, n_embd=16)


def randomised(**fields) -> GPTLMHeadModel:
    """A model in which no two tensors or layers are alike: norms of 1 and biases of 0 would hide swaps."""
    torch.manual_seed(0)
    model = GPTLMHeadModel(GPTConfig(**(GPT2 | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model() -> GPTLMHeadModel:
    return randomised()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 300, (2, 10))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def gpt2_logits(p: dict[str, np.ndarray], sizes: dict[str, int], x: np.ndarray) -> np.ndarray:
    """GPT-2 in float64, from the formulas of llm.c's train_gpt2.c. x (B, T) -> logits (B, T, V)."""

    def norm(h, weight, bias):
        h = h - h.mean(-1, keepdims=True)
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * weight + bias

    (B, T), C, nh = x.shape, sizes["C"], sizes["nh"]
    h = p["wte"][x] + p["wpe"][:T]  # (B, T, C)
    for i in range(sizes["L"]):
        qkv = norm(h, p["ln1w"][i], p["ln1b"][i]) @ p["qkvw"][i].T + p["qkvb"][i]  # (B, T, 3C)
        q, k, v = (qkv[..., j * C : (j + 1) * C].reshape(B, T, nh, -1).swapaxes(1, 2) for j in range(3))
        score = q @ k.swapaxes(-1, -2) / np.sqrt(C // nh) + np.triu(np.full((T, T), -np.inf), 1)
        weight = np.exp(score - score.max(-1, keepdims=True))
        y = (weight / weight.sum(-1, keepdims=True)) @ v  # (B, nh, T, hs)
        h = h + y.swapaxes(1, 2).reshape(B, T, C) @ p["attprojw"][i].T + p["attprojb"][i]
        f = norm(h, p["ln2w"][i], p["ln2b"][i]) @ p["fcw"][i].T + p["fcb"][i]  # (B, T, 4C)
        f = 0.5 * f * (1 + np.tanh(np.sqrt(2 / np.pi) * (f + 0.044715 * f**3)))
        h = h + f @ p["fcprojw"][i].T + p["fcprojb"][i]
    return norm(h, p["lnfw"], p["lnfb"]) @ p["wte"][: sizes["V"]].T


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16, rounded to the nearest, ties to even, by integer arithmetic."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_recomputed_from_the_file(model, batch, tmp_path, dtype):
    """GPT-2 written out, with the tensors of the file, has the model's logits; so has llmc's read_model."""
    x, _ = batch
    llmc.write_model(model, tmp_path / "m.bin", dtype)
    sizes, tensors = read_model(tmp_path / "m.bin")
    assert sizes == {"P": 12, "V": 300, "L": 3, "nh": 2, "C": 16, "Vp": 384}
    assert not tensors["wte"][300:].any()
    ours = llmc.read_model(tmp_path / "m.bin")
    assert not ours.training and ours.dtype == torch.float32 and ours.config.vocab_size == 300
    assert ours.lm_head.weight is ours.transformer.wte.weight
    for name, parameter in ours.named_parameters():  # else saving a part saves the whole stack
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel(), name
    expected = gpt2_logits(tensors, sizes, x.numpy())
    with torch.no_grad():
        assert np.abs(ours(x).logits.numpy() - expected).max() < 1e-4
        if dtype == "float32":
            assert np.abs(model.eval()(x).logits[..., :300].numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trips_are_byte_identical(model, tmp_path, dtype):
    """File -> model -> file, and file -> model -> Hugging Face folder -> model -> file."""
    llmc.write_model(model, tmp_path / "first.bin", dtype)
    read = llmc.read_model(tmp_path / "first.bin")
    llmc.write_model(read, tmp_path / "second.bin", dtype)
    read.save_pretrained(tmp_path / "folder")
    llmc.write_model(GPTLMHeadModel.from_pretrained(tmp_path / "folder"), tmp_path / "third.bin", dtype)
    first = (tmp_path / "first.bin").read_bytes()
    assert (tmp_path / "second.bin").read_bytes() == first
    assert (tmp_path / "third.bin").read_bytes() == first


def test_bf16_rounds_to_the_nearest_even_everywhere(tmp_path):
    """Exact ties, their neighbours, and random values, in every tensor, norms included."""
    tie = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x3F808001, 0x3F807FFF, 0x007F8000], np.uint32)
    model = randomised()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[: len(tie)] = torch.from_numpy(tie.view(np.float32))
    llmc.write_model(model, tmp_path / "32.bin", "float32")
    llmc.write_model(model, tmp_path / "16.bin", "bfloat16")
    exact = np.frombuffer((tmp_path / "32.bin").read_bytes()[1024:], "<f4")
    rounded = np.frombuffer((tmp_path / "16.bin").read_bytes()[1024:], "<u2")
    assert rounded[:6].tolist() == [0x3F80, 0x3F82, 0xBF80, 0x3F81, 0x3F80, 0x0080]
    np.testing.assert_array_equal(rounded, bf16_bits(exact))


@pytest.mark.parametrize("encoding_size", [50257, None])
def test_gpt2_held_with_50304_rows(tmp_path, encoding_size):
    """The 47 rows that pad GPT-2's vocabulary are written as zeros and take no part in logits and loss."""
    model = randomised(vocab_size=50304, encoding_size=encoding_size, n_layer=1, n_embd=4, block_size=4)
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 100.0  # the largest logits by far, if anything used them
    x, y = torch.tensor([[1, 50256, 3]]), torch.tensor([[50256, 3, 4]])
    llmc.write_model(model, tmp_path / "m.bin")
    llmc.write_state(model, x, y, tmp_path / "m_debug_state.bin")
    sizes, tensors = read_model(tmp_path / "m.bin")
    assert (sizes["V"], sizes["Vp"]) == (50257, 50304)
    assert not tensors["wte"][50257:].any() and tensors["wte"][50256].any()
    state = read_state(tmp_path / "m_debug_state.bin")
    logits = gpt2_logits(tensors, sizes, x.numpy())
    np.testing.assert_allclose(state["logits"], logits, atol=1e-4)
    expected = F.cross_entropy(torch.from_numpy(logits).view(-1, 50257), y.view(-1))
    assert abs(state["loss"] - expected.item()) < 1e-5
    assert not state["wte"][50257:].any() and state["wte"][50256].any()


OTHERS = [
    ("use_moe", True), ("bias", False), ("norm", "rmsnorm"), ("norm_eps", 1e-6), ("activation", "relu2"),
    ("activation", "swiglu"), ("position", "rope"), ("tie_word_embeddings", False), ("n_kv_head", 1),
    ("sliding_window", 4), ("qk_norm", True), ("logit_softcap", 30.0), ("mlp_hidden_size", 32),
    ("expert_hidden_size", 32),
]  # fmt: skip


@pytest.mark.parametrize("field, value", OTHERS)
def test_other_models_are_refused_by_name(tmp_path, batch, field, value):
    model = GPTLMHeadModel(GPTConfig(**(GPT2 | {field: value})))
    for write in (
        lambda: llmc.write_model(model, tmp_path / "out" / "m.bin"),
        lambda: llmc.write_state(model, *batch, tmp_path / "out" / "s.bin"),
        lambda: llmc.write_all(model, *batch, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=f"cannot express {field}={re.escape(repr(value))}"):
            write()
    assert not (tmp_path / "out").exists()


def test_a_dtype_llmc_lacks(model, tmp_path):
    with pytest.raises(ValueError, match=r"dtype='float16'.*float32 or bfloat16"):
        llmc.write_model(model, tmp_path / "m.bin", "float16")


# --- debug states -------------------------------------------------------------------------------------------


def test_state_against_float64(model, batch, tmp_path):
    """Logits and loss, and each gradient of each layer, against autograd on a copy in float64."""
    x, y = batch
    llmc.write_model(model, tmp_path / "gpt2_d3.bin")
    llmc.write_state(model, x, y, tmp_path / "gpt2_d3_debug_state.bin")
    sizes, tensors = read_model(tmp_path / "gpt2_d3.bin")
    state = read_state(tmp_path / "gpt2_d3_debug_state.bin")
    np.testing.assert_array_equal(state["x"], x)
    np.testing.assert_array_equal(state["y"], y)
    np.testing.assert_allclose(state["logits"], gpt2_logits(tensors, sizes, x.numpy()), atol=1e-4)

    double = copy.deepcopy(model).double().eval()
    loss = F.cross_entropy(double(x).logits[..., :300].reshape(-1, 300), y.reshape(-1))
    loss.backward()
    assert abs(state["loss"] - loss.item()) < 1e-5
    gradients = {name: p.grad.numpy() for name, p in double.named_parameters()}
    gradients["transformer.wte.weight"][300:] = 0
    compared = 0
    for name, _, _, ours in TABLE:
        for i in range(3 if "{i}" in ours else 1):
            written = state[name][i] if "{i}" in ours else state[name]
            exact = gradients[ours.format(i=i)]
            error = np.linalg.norm(written - exact) / np.linalg.norm(exact)
            assert error < 1e-4, f"{name}, layer {i}: {error:.1e}"
            compared += 1
    assert compared == 12 * 3 + 4 == len(gradients)


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
    path, ids = tmp_path / "s.bin", torch.zeros(2, 9, dtype=torch.long)
    for x, y, message in (
        (ids, ids[:, 1:], r"x \(2, 9\) and y \(2, 8\)"),
        (ids[0], ids[0], r"must be \(B, T\)"),
        (ids.new_zeros(1, 13), ids.new_zeros(1, 13), "T=13 is longer than the model's block_size=12"),
        (ids + 300, ids, "x has ids from 300 to 300.*0 to 299"),
        (ids, ids - 1, "y has ids from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            llmc.write_state(model, x, y, path)
    assert not path.exists()


# --- damaged files ------------------------------------------------------------------------------------------


def test_damaged_models_are_refused_by_name(model, tmp_path):
    good = tmp_path / "good.bin"
    llmc.write_model(model, good)
    raw, bad = good.read_bytes(), tmp_path / "bad.bin"

    def field(index: int, value: int) -> bytes:
        return raw[: 4 * index] + value.to_bytes(4, "little", signed=True) + raw[4 * index + 4 :]

    for contents, message in (
        (b"", "empty, 0 bytes"),
        (raw[:1000], "1,000 bytes long"),
        (field(0, 20240327), "no model.*but a debug state"),
        (field(0, 20240520), "no model.*but a data shard"),
        (field(0, 7), "no model.*begins with 7"),
        (field(1, 2), "version 2 of a model; only 3 and 5"),
        (field(3, 50257), "no GPT-2 has these sizes"),
        (field(4, -3), "no GPT-2 has these sizes"),
        (field(5, 3), "no GPT-2 has these sizes"),
        (field(4, 2**31 - 1), "cut short"),
        (raw[:-1], "cut short"),
        (raw + b"\0", "too long"),
    ):
        bad.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"bad\.bin: .*{message}"):
            llmc.read_model(bad)
    with pytest.raises(FileNotFoundError, match=r"missing\.bin: no such file"):
        llmc.read_model(tmp_path / "missing.bin")


def test_padding_that_is_not_zero_is_said(model, tmp_path):
    path = tmp_path / "m.bin"
    llmc.write_model(model, path)
    raw = bytearray(path.read_bytes())
    raw[1024 + 4 * 300 * 16 + 3] = 0x3F
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match=r"m\.bin: its padding of wte is not zero"):
        assert llmc.read_model(path).config.vocab_size == 300


def test_a_write_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "m.bin"
    llmc.write_model(model, path)
    before = path.read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(llmc, "write_tensors", fails)
    with pytest.raises(OSError, match="disk full"):
        llmc.write_model(randomised(n_layer=1), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# --- tokenizers and data ------------------------------------------------------------------------------------


def small_encoding(special: dict[str, int], ranks: dict[bytes, int] | None = None) -> tiktoken.Encoding:
    ranks = ranks or {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("small", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)


def check_tokenizer(encoding: tiktoken.Encoding, path: Path) -> None:
    """Every byte of a tokenizer file."""
    llmc.write_tokenizer(encoding, path)
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    assert read_tokenizer(path) == (tokens, encoding.eot_token)


def test_tokenizer_of_gpt2(gpt2_encoding, tmp_path):
    check_tokenizer(gpt2_encoding, tmp_path / "gpt2_tokenizer.bin")
    tokens, eot = read_tokenizer(tmp_path / "gpt2_tokenizer.bin")
    assert (len(tokens), eot, tokens[eot]) == (50257, 50256, b"<|endoftext|>")
    assert b"".join(tokens[i] for i in gpt2_encoding.encode("Grüße, 世界!")).decode() == "Grüße, 世界!"


def test_tokenizer_of_bytes_and_others(tmp_path):
    check_tokenizer(get_encoding("bytes"), tmp_path / "bytes.bin")
    long = {bytes([i]): i for i in range(256)} | {b"x" * 255: 256}
    check_tokenizer(small_encoding({"<|endoftext|>": 257}, long), tmp_path / "long.bin")
    too_long = {bytes([i]): i for i in range(256)} | {b"x" * 256: 256}
    for encoding, message in (
        (small_encoding({"<|endoftext|>": 258}), "token 256 has 0 bytes"),
        (small_encoding({"<|endoftext|>": 257}, too_long), "token 256 has 256 bytes"),
        (small_encoding({"<|end|>": 256}), r"has no <\|endoftext\|>"),
    ):
        with pytest.raises(ValueError, match=message):
            llmc.write_tokenizer(encoding, tmp_path / "refused.bin")
    assert not (tmp_path / "refused.bin").exists()


# --- sets of files, command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, c_names, labels",
    [("d24", True, ["d24", "124M"]), ("gpt2", True, ["124M"]), ("gpt2-xl", False, ["1558M"])],
)
def test_names_of_the_files(batch, tmp_path, names, c_names, labels):
    """What `--write_tensors 1` leaves behind, and with c_names the same bytes under the C programs' names."""
    model = randomised(vocab_size=257, encoding_size=None, encoding="bytes")
    x, y = (ids % 257 for ids in batch)
    written = llmc.write_all(model, x, y, tmp_path, names=names, c_names=c_names)
    patterns = ("gpt2_{}.bin", "gpt2_{}_bf16.bin", "gpt2_{}_debug_state.bin")
    expected = {p.format(label) for p in patterns for label in labels} | {"gpt2_tokenizer.bin"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written} == expected
    for pattern in patterns:
        assert len({(tmp_path / pattern.format(label)).read_bytes() for label in labels}) == 1
    assert llmc.read_sizes(tmp_path / patterns[0].format(labels[0]))[1] == 3
    assert llmc.read_sizes(tmp_path / patterns[1].format(labels[0]))[1] == 5
    assert len(read_state(tmp_path / patterns[2].format(labels[0]))) == 20


def test_command_line(tmp_path, capsys):
    """Checkpoint -> llm.c -> Hugging Face folder -> llm.c, and a state from a shard, by commands alone."""
    model = randomised(vocab_size=384, encoding_size=257, encoding="bytes")
    checkpoint, out = tmp_path / "model_00007.pt", tmp_path / "new" / "llmc"
    torch.save({"model": model.state_dict(), "config": model.config.to_dict(), "step": 7}, checkpoint)
    tokens = np.random.default_rng(0).integers(0, 257, 100).astype(np.uint16)
    shards.write_shard(tmp_path / "shard.bin", tokens)

    source = ["--checkpoint", str(checkpoint), "--out", str(out)]
    assert llmc.main(["export", *source]) == 0
    assert {p.name for p in out.iterdir()} == {"gpt2_d3.bin", "gpt2_d3_bf16.bin", "gpt2_tokenizer.bin"}
    data = ["--data", str(tmp_path / "shard.bin"), "--B", "3", "--T", "11"]
    assert llmc.main(["state", *source, *data, "--c_names", "1"]) == 0
    assert (out / "gpt2_124M_debug_state.bin").is_file()
    read = read_state(out / "gpt2_d3_debug_state.bin")
    np.testing.assert_array_equal(read["x"].reshape(-1), tokens[:33])
    np.testing.assert_array_equal(read["y"].reshape(-1), tokens[1:34])
    assert "wrote" in capsys.readouterr().out

    folder = tmp_path / "hugging" / "face"
    assert llmc.main(["import", "--model", str(out / "gpt2_d3.bin"), "--out", str(folder)]) == 0
    again = ["export", "--checkpoint", str(folder), "--out", str(tmp_path / "again"), "--dtype", "float32"]
    assert llmc.main(again) == 0
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"gpt2_d3.bin", "gpt2_tokenizer.bin"}
    assert (tmp_path / "again" / "gpt2_d3.bin").read_bytes() == (out / "gpt2_d3.bin").read_bytes()
    assert [p.name for p in folder.parent.iterdir()] == ["face"]
    imported = GPTLMHeadModel.from_pretrained(folder).config
    assert (imported.encoding, imported.vocab_size, imported.eos_token_id) == ("bytes", 257, 256)


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    """Exit code 2 and one line that names the culprit, whatever was given."""
    dense, moe = tmp_path / "dense.pt", tmp_path / "moe.pt"
    for path, use_moe in ((dense, False), (moe, True)):
        model = GPTLMHeadModel(GPTConfig(**(GPT2 | {"use_moe": use_moe})))
        torch.save({"model": model.state_dict(), "config": model.config.to_dict(), "step": 1}, path)
    shard, out = tmp_path / "shard.bin", tmp_path / "out"
    shards.write_shard(shard, np.full(20, 299, dtype=np.uint16))
    state = ["state", "--checkpoint", dense, "--out", out, "--data", shard]
    for arguments, message in (
        (["export", "--checkpoint", moe, "--out", out], "use_moe=True"),
        (["export", "--checkpoint", tmp_path / "missing.pt", "--out", out], "missing.pt"),
        (["state", "--checkpoint", dense, "--out", out, "--data", dense], "dense.pt"),
        ([*state, "--B", 4, "--T", 5], "20 tokens, --B and --T need 21"),
        ([*state, "--B", 0, "--T", 5], "--B 0"),
        ([*state, "--B", 1, "--T", 13], "T=13 is longer"),
        (["import", "--model", shard, "--out", out], "a data shard"),
        (["import", "--model", tmp_path / "missing.bin", "--out", out], "missing.bin: no such file"),
    ):
        assert llmc.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("llmc: ") and error.count("\n") == 1 and message in error, error
    llmc.write_model(randomised(), tmp_path / "m.bin")
    assert llmc.main(["import", "--model", str(tmp_path / "m.bin"), "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        llmc.main(["export", "--checkpoint", str(dense), "--out", str(out), "--dtype", "float16"])
    assert stopped.value.code == 2
