"""The chunked loss head against F.cross_entropy of all logits in float64; its memory; the model with it."""

import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import refuses
from devices import TRITON_DEVICE
from models import strong, tiny, tokens

from bench.measure import memory_bytes
from layers import linear_cross_entropy as linear_cross_entropy_file
from layers.linear_cross_entropy import linear_cross_entropy, rows_per_chunk
from model import GPTLMHeadModel

N, C, V = 33, 16, 57


def inputs(dtype=torch.float32, ignore_index=-100):
    """x (N, C), weight (V, C), targets (N,), a quarter of them ignored."""
    x, weight = torch.randn(N, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    targets = torch.randint(0, V, (N,))
    targets[::4] = ignore_index
    return (2 * x).requires_grad_(), weight.requires_grad_(), targets


def plain(x, weight, targets, ignore_index=-100, num_items=None, softcap=0.0):
    logits = x @ weight.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    how = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets,
                           ignore_index=ignore_index, reduction=how)  # fmt: skip
    return loss if num_items is None else loss / num_items


def value_and_gradients(function, x, weight, *arguments, factor=1.0):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(x, weight, *arguments)
    (factor * loss).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("chunk", [-1, 1, 5, 11, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(9)], ids=["mean", "int", "tensor"])
def test_value_and_gradients_are_those_of_all_logits_in_float64(num_items, softcap, chunk):
    """Also of logits so large or small that a careless softmax would overflow or vanish."""
    dtypes = {torch.float32: 1e-5, torch.float64: 1e-12}
    for ignore_index, dtype, scale in itertools.product((-1, -100), dtypes, (1.0, 1e-4, 30.0, 3000.0)):
        x, weight, targets = inputs(dtype, ignore_index)
        x, rest = scale * x, (targets, ignore_index, num_items, softcap)
        ours = value_and_gradients(linear_cross_entropy, x, weight, *rest, chunk, factor=0.3)
        truth = value_and_gradients(plain, x.double(), weight.double(), *rest, factor=0.3)
        for a, b in zip(ours, truth, strict=True):
            assert a.dtype == dtype
            assert (a - b).abs().max() <= dtypes[dtype] * b.abs().max().clamp(min=1)


@pytest.mark.skipif(linear_cross_entropy_file.triton is None, reason="needs `pip install triton`")
@pytest.mark.parametrize("dtype, close, softcap", [
    (torch.float32, 1e-5, 3.0), (torch.bfloat16, 1e-2, 0.0),
    pytest.param(torch.float32, 1e-5, 0.0, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, 1e-2, 3.0, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_kernel_for_gpus_equals_the_plain_operators(dtype, close, softcap, monkeypatch):
    """Triton's interpreter runs it, or a GPU, with blocks that end within a row."""
    monkeypatch.setattr(linear_cross_entropy_file, "BLOCK", 32)
    x, weight, targets = (tensor.to(TRITON_DEVICE) for tensor in inputs(dtype))
    x, targets = x[:13], targets[:13]  # the interpreter takes its time for every row
    rest, found = (targets, -100, None, softcap), []
    for kernel in (True, False):
        monkeypatch.setattr(linear_cross_entropy_file, "has_kernel", lambda device_type, it=kernel: it)
        found.append(value_and_gradients(linear_cross_entropy, x, weight, *rest, 8))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= close * b.abs().max()
    monkeypatch.setattr(linear_cross_entropy_file, "has_kernel", lambda device_type: True)
    with torch.no_grad():  # without gradients
        assert (linear_cross_entropy(x, weight, *rest) - found[0][0]).abs() < close * found[0][0]
    targets[1] = V
    assert linear_cross_entropy(x, weight, *rest).isnan()


def test_where_all_targets_are_ignored_it_is_as_plain():
    x, weight, targets = inputs()
    targets[:] = -100
    for num_items in (None, 5):
        stock = value_and_gradients(plain, x, weight, targets, -100, num_items)
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                ours = value_and_gradients(linear_cross_entropy, x, weight, targets, -100, num_items)
            torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True)
    nothing = linear_cross_entropy(x[:0], weight, targets[:0], num_items=1)
    nothing.backward()
    assert nothing == 0 and weight.grad.eq(0).all()


def test_a_target_outside_the_vocabulary_and_a_second_backward_are_errors():
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets)
    (2 * loss).backward(retain_graph=True)
    refuses("modified by an inplace operation", loss.backward, error=RuntimeError)
    for wrong in (-1, V):
        targets[5] = wrong
        refuses("out of bounds", linear_cross_entropy, x, weight, targets, error=(IndexError, RuntimeError))


def test_autocast_loses_no_more_than_the_plain_head_does():
    x, weight, targets = inputs()
    truth = value_and_gradients(plain, x.double(), weight.double(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(linear_cross_entropy, x, weight, targets, -100, None, 0.0, 5)
        stock = value_and_gradients(plain, x, weight, targets)
    for a, b, true in zip(ours, stock, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - true).norm() <= 1.2 * (b - true).norm() + 1e-6
        assert (a - true).norm() <= 0.02 * true.norm()
    assert torch.equal(ours[0], stock[0])  # the same rounded logits
    low = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets)
    assert low.dtype == torch.float32 and (low - truth[0]).abs() < 0.02 * truth[0]


def test_float16_gradients_outlive_a_small_scale():
    """Divided by a step's tokens, float16's gradients would vanish before a GradScaler multiplies them."""
    x, weight, targets = inputs()
    rest = (targets, -100, 2**24)
    truth = value_and_gradients(plain, x.double(), weight.double(), *rest, factor=2.0**24)
    with torch.autocast("cpu", torch.float16):
        ours = value_and_gradients(linear_cross_entropy, x.half(), weight, *rest, factor=2.0**24)
    for a, true in zip(ours, truth, strict=True):
        assert (a - true).norm() <= 0.005 * true.norm()


def test_the_operator_keeps_its_promises_to_the_compiler():
    x, weight, targets = inputs()
    for with_grad, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        arguments = (x, weight, targets, torch.tensor(0.1), -100, 3.0, 7, dtype, with_grad)
        checks = ["test_schema", "test_faketensor"] + ["test_aot_dispatch_dynamic"] * with_grad
        torch.library.opcheck(torch.ops.gpt_moe.linear_cross_entropy.default, arguments, test_utils=checks)


def test_rows_per_chunk():
    assert rows_per_chunk(2048, 50304, -1, "cpu") == 512  # 667 fit: four chunks, as even as can be
    assert rows_per_chunk(2048, 50304, 1000, "cpu") == 683
    assert rows_per_chunk(3, 10**9, -1, "cpu") == 1 and rows_per_chunk(0, 10, -1, "cpu") == 0
    assert rows_per_chunk(16384, 50304, -1, "cuda") == 19 * 128  # of 2,668 that fit
    assert rows_per_chunk(16384, 50304, -1, "triton") == 16384


def test_memory_is_that_of_a_chunk():
    x, weight = torch.randn(1024, 32).requires_grad_(), torch.randn(4096, 32).requires_grad_()
    targets, cpu = torch.randint(0, 4096, (1024,)), torch.device("cpu")
    whole, _ = memory_bytes(lambda: plain(x, weight, targets).backward(), cpu)
    chunked, _ = memory_bytes(lambda: linear_cross_entropy(x, weight, targets, chunk=64).backward(), cpu)
    logits = 4 * 1024 * 4096
    assert whole > 2 * logits and chunked < 0.2 * logits  # 1/16 of the logits, and the gradients


def loss_and_gradients(model, **arguments):
    model.zero_grad()
    output = model(return_dict=True, **arguments)
    (2 * output.loss).backward()
    return output.logits, [output.loss, output.cross_entropy, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("fields", [
    dict(use_moe=False), dict(use_moe=False, tie_word_embeddings=False, logit_softcap=5.0),
    dict(router_z_loss_coef=0.01), dict(logit_softcap=5.0, norm="rmsnorm"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["targets", "labels", "parts"])
def test_the_models_loss_and_gradients_do_not_change(fields, kind):
    model, ids = strong(GPTLMHeadModel(tiny(**fields)), std=0.1).train(), tokens()
    arguments = dict(input_ids=ids, labels=ids.masked_fill(ids % 5 == 0, -100))
    if kind != "labels":
        arguments = dict(input_ids=ids, targets=ids.roll(-1, 1).masked_fill(ids % 5 == 0, -1))
    if kind == "parts":
        arguments["num_items_in_batch"] = torch.tensor(100)
    logits, expected = loss_and_gradients(model, **arguments)
    assert logits is not None  # chunks are off unless they are asked for
    for chunk in (-1, 10):
        model.loss_chunk = chunk
        logits, found = loss_and_gradients(model, **arguments)
        assert logits is None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_which_calls_have_logits():
    model, ids = GPTLMHeadModel(tiny(use_moe=False)).train(), tokens()
    model.loss_chunk = -1
    logits, loss = model(ids, targets=ids)  # nanoGPT's pair
    assert logits.shape == (3, 24, 97) and loss.requires_grad
    assert model(ids).logits.shape == (3, 24, 97)
    with torch.no_grad():
        output = model.eval()(ids, targets=ids, return_dict=True)
    assert output.logits is None and output.loss == pytest.approx(loss.item(), abs=1e-5)
    assert model(ids, labels=ids, return_dict=False)[0].dim() == 0
    assert "loss_chunk" not in model.config.to_dict()


def test_another_head_than_a_linear_layer_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, ids = GPTLMHeadModel(tiny(use_moe=False, tie_word_embeddings=False)).train(), tokens()
    model.lm_head = Doubled(64, 97, bias=False)
    expected = model(ids, labels=ids).loss
    model.loss_chunk = 8
    assert model(ids, labels=ids).loss == expected


def test_with_activation_checkpointing_and_whole_model_compiled():
    model, ids = strong(GPTLMHeadModel(tiny(n_layer=1, use_moe=False)), std=0.1).train(), tokens()
    _, expected = loss_and_gradients(model, input_ids=ids, targets=ids)
    model.loss_chunk = 10
    model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    _, found = loss_and_gradients(model, input_ids=ids, targets=ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
