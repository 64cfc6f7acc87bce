"""What a run measures between its steps: validation losses, in nats per token and bits per byte; routers and
gradient noise, against the same numbers computed directly."""

import math
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import note_reads, slow
from models import chosen, tiny
from processes import flags, losses, metrics
from test_log import points, read_events

import train_gpt_moe
from bench.measure import make_run
from model import GPTLMHeadModel
from tokens.encodings import encode_pieces, get_encoding, token_bytes
from tokens.shards import DistributedDataLoader, write_shard
from training import checkpoints as ckpt
from training import diagnostics, parallel
from training.diagnostics import Diagnostics
from training.evaluation import evaluate, measure, table_of_bytes

STEPS, T = 3, 16
TEXTS = [(True, f"Säure {i} → naïve 中 words, of one or of many bytes.\n") for i in range(40)]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_bits_per_byte_are_counted_by_hand(name, tmp_path, request):
    """By decoding every target. (test_train_gpt_moe.py has two ranks.)"""
    if name == "gpt2":
        request.getfixturevalue("gpt2_encoding")
    encoding, shard = get_encoding(name), tmp_path / "val_000000.bin"
    write_shard(shard, encode_pieces(TEXTS, name))
    model = GPTLMHeadModel(tiny(vocab_size=encoding.n_vocab, block_size=T)).eval()
    loader, seen = DistributedDataLoader(str(shard), B=4, T=T, seed=0), []
    run = make_run(model, loader, val_sets={"": (loader, 1.0)}, trains=False)
    run.token_bytes = table_of_bytes({"encoding": name, "vocab_size": encoding.n_vocab}, run.layout)
    run.config.val_steps = STEPS
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    found = evaluate(run, 0, True, False, lambda: False, mock.MagicMock())
    assert seen == [False] * STEPS and found.pop("eval_step") == 0
    nats, text, targets, ends = 0.0, b"", 0, 0
    loader.reset()
    for _ in range(STEPS):
        x, y = loader.next_batch()
        nats += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        ordinary = [token for token in y.flatten().tolist() if token != encoding.eot_token]
        text, targets = text + encoding.decode_bytes(ordinary), targets + y.numel()
        ends += y.numel() - len(ordinary)
    assert ends > 0
    expected = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / len(text)}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_the_whole_set_is_every_window_once_on_any_number_of_ranks(size, tmp_path):
    """49 windows: the last batch is short, and of three ranks two have none of it."""
    write_shard(tmp_path / "val_000000.bin", tokens := encode_pieces(TEXTS, "bytes")[: 49 * T + 5])
    model = GPTLMHeadModel(tiny(vocab_size=257, block_size=T)).eval()
    windows = torch.from_numpy(tokens[: 49 * T + 1].astype(int))
    x, y = windows[:-1].view(49, T), windows[1:].view(49, T)
    nats, parts = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item(), []
    run = make_run(model, None, token_bytes=torch.arange(257))
    run.config.val_steps = 0
    for rank in range(size):
        loader = DistributedDataLoader(str(tmp_path / "*"), B=4, T=T, rank=rank, world_size=size, seed=0)
        parts.append(measure(run, loader, lambda: False))
    assert torch.tensor(parts).sum(0).tolist() == pytest.approx([nats, y.double().mean().item()], rel=1e-6)


def test_a_mixture_with_several_validation_sets(data, tmp_path, monkeypatch, capsys, refused):
    """A run, its log, and its resume with other weights; `blind` has no validation shards."""
    monkeypatch.chdir(tmp_path)
    for name in ("web", "code", "blind"):
        shutil.copytree(data, name)
    write_shard("code/val_000000.bin", encode_pieces(TEXTS, "bytes"))
    (tmp_path / "blind" / "val_000000.bin").unlink()
    more = "--max_steps 4 --infer_step 2 --tensorboard 1 --val".split()
    assert train_gpt_moe.main(flags("web:0.7,code:0.3", "log", *more, "c2=code,all=web")) == 0
    said, last = capsys.readouterr().out, metrics("log")[-1]
    web, code = last["val_loss/web"], last["val_loss/code"]
    assert (last["val_loss/all"], last["val_loss/c2"]) == (web, code) and web != code
    assert last["val_bpb/web"] == pytest.approx(web / math.log(2))  # every token is a byte
    assert losses(tmp_path / "log", "val")[-1] == pytest.approx(0.7 * web + 0.3 * code, abs=1e-6)
    assert len(losses(tmp_path / "log", "val")) == 3  # of the steps 0, 2 and 4
    for curve, step, name in (("loss/val/c2", 4, "val_loss/c2"), ("data/epoch/web", 3, "epoch/web")):
        assert points(read_events(tmp_path / "log"), curve)[step] == pytest.approx(last[name])
    assert last["epoch/web"] == pytest.approx(23 / 9 * last["epoch/code"])
    words = "code 9 samples = 0.", "web 23 samples = 0.", "validation loss of c2 ", "epochs          code 0."
    assert all(text in said for text in words), said
    resume = "--resume auto --log_dir log --device cpu --max_steps 5 --data_dir".split()
    assert train_gpt_moe.main([*resume, "web:1,code:1"]) == 0
    assert "data_dir was 'web:0.7,code:0.3' and is 'web:1,code:1' from step 4 on" in capsys.readouterr().out
    assert metrics("log")[4]["epoch/code"] == pytest.approx(13 / 9 * last["epoch/code"])
    said = refused(train_gpt_moe.main, *resume, "web:1,code:1,blind:1")
    assert "sources='code, web', but here sources='blind, code, web'" in said
    said = refused(train_gpt_moe.main, *flags("web:1,code:1", "new", "--val", "web=code"))
    assert "val='web=code': 'web' is a source's name" in said
    # Without validation shards of the data, the first of --val is the main set.
    assert train_gpt_moe.main(flags("blind", "new", *more, "a=code,b=web")) == 0
    row = metrics("new")[-1]
    assert row["val_loss"] == row["val_loss/a"] != row["val_loss/b"]


def test_bytes_of_tokens_and_encodings_that_nobody_knows(gpt2_encoding):
    sizes = token_bytes("gpt2")
    assert sizes[gpt2_encoding.eot_token] == 0 and sizes[:256].tolist() == [1] * 256
    assert sizes.sum() == sum(map(len, gpt2_encoding.token_byte_values()))
    assert token_bytes("bytes").tolist() == [1] * 256 + [0]
    layout = SimpleNamespace(world=SimpleNamespace(device="cpu"), any=bool)
    for encoding, size in (("klingon", 300), ("bytes", 258)):  # no such name; ids that it does not have
        assert table_of_bytes({"encoding": encoding, "vocab_size": size}, layout) is None


# ---------------------------------------------------------------------------- routers and gradient noise
FROZEN = "--max_lr 0 --min_lr 0 --router_bias_update_rate 0".split()


def test_the_estimate_converges_to_the_noise_scale(monkeypatch):
    """Linear regression at w = 0: the gradient of an example is -x * y. Eight ranks draw 4 of them each."""
    monkeypatch.setattr(diagnostics, "MEMORY", 10**9)
    chance, found = np.random.default_rng(0), Diagnostics()
    x = chance.normal(size=(5000, 6))
    gradients = -x * (x @ np.ones(6) + chance.normal(size=5000))[:, None]  # (examples, numbers)
    mean, trace = gradients.mean(0), gradients.var(0).sum()
    for _ in range(3000):
        drawn = gradients[chance.integers(5000, size=(8, 4))].mean(1)  # (ranks, numbers)
        small, big = np.square(drawn).sum(1).mean(), np.square(drawn.mean(0)).sum()
        found.add_noise(np.array([small]), np.array([big]), np.array([1 / 8]), 8 * 4)
    assert found.newest["noise_scale"] == pytest.approx(trace / (mean @ mean), rel=0.03)
    assert Diagnostics(found.state_dict()).noise == found.noise


def train(dtype: str, reads: list) -> list[float]:
    """Four steps, of which 1 and 3 stand before an evaluation. Returns the state of the noise scale."""
    model, norms, counts = GPTLMHeadModel(tiny()), [], []
    batches = SimpleNamespace(next_batch=lambda: torch.randint(97, (2, 4, 24)))
    settings = dict(max_lr=1e-4, warmup_steps=0, min_lr=1e-4, grad_clip=1e-6)
    config = train_gpt_moe.TrainConfig(infer_step=2, **settings)
    run = make_run(model, batches, accumulation=4, config=config, dtype=dtype)

    def note(*_) -> None:
        norms[:] = [moe.gate.weight.grad.norm() for moe in model.moe_layers()]

    for step in range(4):
        reads.clear()
        with mock.patch.object(parallel, "clip_gradients", note):
            record = train_gpt_moe.train_step(run, step)
        counts.append(len(reads))
        assert not [name for name in record if "measured" in name]
        assert bool(run.diagnostics.newest) == (step in (1, 3))
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert counts == counts[:1] * 4 and counts[0] > 0
    assert run.diagnostics.newest["router_norm_by_layer"] == pytest.approx([*map(float, norms)], rel=1e-5)
    return run.diagnostics.noise


def test_a_measurement_reads_no_more_and_knows_float16s_loss_scale(monkeypatch):
    exact = train("float32", reads := note_reads(monkeypatch))
    torch.manual_seed(0)
    assert train("float16", reads) == pytest.approx(exact, rel=0.02) and exact[2] > 0.1


@pytest.mark.parametrize("frozen", [False, *slow(True)])
def test_what_a_run_logs_is_what_its_checkpoints_have(frozen, data, tmp_path):
    more = ["--checkpoint_every", 4, "--log_norms", 1, *(FROZEN if frozen else [])]
    assert train_gpt_moe.main(flags(data, tmp_path, *more)) == 0
    rows, before = metrics(tmp_path), None
    x, _ = DistributedDataLoader(f"{data}/val_*.bin", B=4, T=32, seed=0).next_batch()
    for step in (4, 8, 12):
        (row,) = (row for row in rows if row.get("eval_step") == step)
        model, choices, last = ckpt.load_model(tmp_path / f"model_{step:05d}.pt"), [], rows[step - 1]
        layers = model.moe_layers()

        def note(gate, inputs, logits, choices=choices, layers=layers) -> None:
            choices.append(chosen(layers[len(choices)], logits)[0][:, 0])

        for moe in layers:
            moe.gate.register_forward_hook(note)
        model(x)
        load = 4 * np.array(last["expert_load"])
        assert row["max_load_by_layer"] == load.max(1).tolist() and row["max_load_ceiling"] == 4 / 2
        assert row["starved_by_layer"] == (load < 0.1).mean(1).tolist()
        assert np.mean(row["router_entropy_by_layer"]) == pytest.approx(last["router_entropy"])
        assert np.hypot(*row["router_norm_by_layer"]) == pytest.approx(last["norm/routers"], rel=1e-5)
        spread = [np.ptp(moe.router_bias.numpy()) for moe in layers]
        assert row.get("bias_range_by_layer", [0, 0]) == pytest.approx(spread) and any(spread) != frozen
        if before:
            moved = [(a != b).double().mean().item() for a, b in zip(before, choices, strict=True)]
            assert row["rerouted_by_layer"] == moved and row["rerouted"] == pytest.approx(np.mean(moved))
            assert any(moved) != frozen
        before = choices


@pytest.mark.parametrize(("newest", "words"), [
    ({}, ""), ({"noise_scale": 400.0}, "2.5 of the gradient noise scale (400): a smaller"),
    ({"noise_scale": 1234.0}, "about right"),
    ({"noise_scale": 3456.0}, "0.29 of the gradient noise scale (3,500): a larger"),
])  # fmt: skip
def test_the_summary_compares_the_batch_with_the_noise_scale(newest, words):
    found, config = Diagnostics(), SimpleNamespace(total_batch_size=1000)
    found.newest = newest  # with --inference_only: the checkpoint's
    text, other = (found.batch_text(SimpleNamespace(config=config, trains=x)) for x in (True, False))
    assert words in text and bool(words) == bool(text) and not other
