"""llm.c's train_gpt2.py, flag by flag: losses of an independent loop, its files, its log, what it prints."""

import contextlib
import functools
import itertools
import re
from pathlib import Path
from unittest.mock import Mock

import llmc_readers
import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import refuses, shared_file
from processes import flags as own_flags
from transformers import GPT2Config, GPT2LMHeadModel

import sample
import train_gpt_moe
from llmc import files as llmc
from tokens.shards import write_shard
from train_gpt_moe import TrainConfig, parse_config
from training import checkpoints as ckpt
from training.setup import build_model

B, T, STEPS, RATE = 2, 16, 4, 1e-3
META = {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A small GPT-2 in a folder, as `gpt2` would be from the hub; weights that are not all alike."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=50257)
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    for name, parameter in model.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * (0.2 if "wte" in name else 1)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "tiny_val.bin"
    write_shard(path, np.random.default_rng(0).integers(0, 50257, 4000, dtype=np.uint16))
    return str(path)


@pytest.fixture(scope="module")
def val_shards(tmp_path_factory) -> list[Path]:
    """Two, of three and a half batches each, and folders that a pattern has to find."""
    folder, chance = tmp_path_factory.mktemp("val"), np.random.default_rng(1)
    paths = [folder / part / "tiny_val.bin" for part in ("a1", "a2")]
    for path in paths:
        path.parent.mkdir()
        write_shard(path, chance.integers(0, 50257, 7 * B * T // 2 + 1, dtype=np.uint16))
    return paths


def run(gpt2: str, shard: str, folder: Path, *flags) -> int:
    """The exit code of train_gpt_moe.py with llm.c's flags and defaults."""
    common = "--preset llmc --block_size 64 --device cpu --tensorboard 0 --plot 0".split()
    common += ["--init_from", gpt2, "--input_bin", shard, "--output_dir", folder]
    common += ["--batch_size", B, "--sequence_length", T]
    common += ["--total_batch_size", 2 * B * T, "--num_iterations", STEPS, "--learning_rate", RATE]
    common += ["--weight_decay", 0.1, "--learning_rate_decay_frac", 0.5, "--write_tensors", 0]
    return train_gpt_moe.main([str(flag) for flag in (*common, *flags)])


@pytest.fixture(scope="module")
def finished(gpt2, shard, tmp_path_factory) -> Path:
    """The log folder of a run with llm.c's files, evaluations and a sample; beside it `printed`."""
    shared_file("tiktoken_cache")
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--write_tensors", 1, "--c_names", 1, "--sample_every", STEPS]
    flags += ["--input_val_bin", shard, "--val_loss_every", 2, "--val_max_steps", 2]
    with open(folder / "printed", "w") as file, contextlib.redirect_stdout(file):
        assert run(gpt2, shard, folder / "log", *flags) == 0
    return folder / "log"


def read(path: str | Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16)[512:].astype(np.int64))


def loss_at(model, tokens: torch.Tensor, position: int) -> torch.Tensor:
    """The loss of a batch of B x T tokens from this position on, of a model of transformers."""
    window = tokens[position : position + B * T + 1]
    return F.cross_entropy(model(window[:-1].view(B, T)).logits.view(B * T, -1), window[1:])


@functools.cache
def reference(gpt2: str, shard: str, single_batch: bool) -> list[float]:
    """Losses of llm.c's loop, written with transformers' GPT-2 and torch's AdamW; two micro-steps a step."""
    model = GPT2LMHeadModel.from_pretrained(gpt2).train()
    matrices, rest = ([p for p in model.parameters() if (p.dim() >= 2) is many] for many in (True, False))
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=RATE / 2)
    tokens, found = read(shard), []
    for step in range(STEPS):
        begin = 0 if single_batch else 2 * B * T * step
        losses = [loss_at(model, tokens, begin) / 2, loss_at(model, tokens, begin + B * T) / 2]
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        found.append(sum(losses).item())
    return found


def logged(folder, kind: str) -> list[float]:
    found = re.findall(rf"^s:\d+ {kind}:(\S+)$", (folder / "main.log").read_text(), re.MULTILINE)
    return [float(number) for number in found]


def test_losses_are_those_of_its_loop(gpt2, shard, tmp_path, finished):
    assert logged(finished, "trl") == pytest.approx(reference(gpt2, shard, True), rel=1e-4)
    assert run(gpt2, shard, tmp_path, "--overfit_single_batch", 0, "--flash", 0) == 0
    assert logged(tmp_path, "trl") == pytest.approx(reference(gpt2, shard, False), rel=1e-4)


def test_float16_trains_as_float32_does(gpt2, shard, tmp_path):
    assert run(gpt2, shard, tmp_path, "--dtype", "float16") == 0
    assert logged(tmp_path, "trl") == pytest.approx(reference(gpt2, shard, True), rel=5e-3)
    assert ckpt.load_checkpoint(tmp_path / "latest")["scaler"]["scale"] == 2.0**16  # no step was skipped


def test_inference_only_changes_and_saves_nothing(gpt2, shard, tmp_path):
    flags = ["--inference_only", 1, "--overfit_single_batch", 1, "--write_tensors", 1]
    assert run(gpt2, shard, tmp_path, *flags) == 0
    first, *others = logged(tmp_path, "trl")
    assert first == pytest.approx(reference(gpt2, shard, True)[0], rel=1e-5)
    assert others == [first] * (STEPS - 1)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*.bin"))
    assert run(gpt2, shard, tmp_path) == 0
    assert run(gpt2, shard, tmp_path, "--inference_only", 1, "--resume", "auto") == 2
    assert logged(tmp_path, "trl")[-1] < first  # the trained run's log is still there


def test_validation_is_of_its_batches(gpt2, shard, val_shards, tmp_path):
    """The first ones of the files, from one to the next; at every evaluation, and after a resume, too."""
    pattern = str(val_shards[0].parents[1] / "a*" / "tiny_*.bin")
    flags = ["--learning_rate", 0, "--val_loss_every", 2, "--val_max_steps", 5, "--input_val_bin", pattern]
    assert run(gpt2, shard, tmp_path, *flags) == 0
    assert run(gpt2, shard, tmp_path, *flags, "--num_iterations", STEPS + 2, "--resume", "auto") == 0
    model, (first, second) = GPT2LMHeadModel.from_pretrained(gpt2).eval(), map(read, val_shards)
    batches = [(first, 0), (first, 1), (first, 2), (second, 0), (second, 1)]
    with torch.no_grad():
        expected = np.mean([loss_at(model, tokens, B * T * number).item() for tokens, number in batches])
    assert logged(tmp_path, "tel") == pytest.approx([expected] * 4, rel=1e-5)


@pytest.mark.parametrize("preset", ["--preset llmc", "--shuffle 0 --overfit_single_batch 1 --hellaswag 0"])
def test_new_models_begin_at_the_loss_of_their_state(preset, shard, tmp_path, gpt2_encoding):
    """llm.c's logits are of 50,257 tokens; only its files pad them."""
    small = "--model d12 --n_layer 1 --n_head 2 --n_embd 16 --block_size 64 --num_iterations 1 --compile 0"
    small += " --device cpu --plot 0 --tensorboard 0 --sample_every 0 --write_tensors"
    flags = [*preset.split(), *small.split(), "1", "--batch_size", B, "--sequence_length", T]
    flags += ["--total_batch_size", B * T, "--input_bin", shard, "--output_dir", tmp_path]
    assert train_gpt_moe.main([str(flag) for flag in flags]) == 0
    state = llmc_readers.read_state(tmp_path / "gpt2_d1_debug_state.bin")
    assert logged(tmp_path, "trl") == pytest.approx([float(state["loss"])], abs=2e-6)
    config, given = parse_config([*preset.split(), *small.split(), "0"])
    size = build_model(config, given, META, None).config.vocab_size
    assert size == (50257 if "llmc" in preset else 50304)  # the fast number where nobody compares


def test_samples_begin_with_the_end_of_text(finished, tmp_path, capsys):
    """llm.c's prompt is that token alone. An empty prompt of ours is the same, for older checkpoints too."""
    assert (finished.parent / "printed").read_text().count(": sample\n") == 2
    sizes = dict(use_moe=False, n_layer=1, n_head=2, n_embd=16, T=64)
    model = build_model(TrainConfig(**sizes), set(), META, None)
    assert model.config.bos_token_id == model.config.eos_token_id == 50256
    texts = []
    for path, bos_token_id in ((tmp_path / f"{n}.pt", n) for n in (50256, None, 0)):  # 0: another's model
        config = model.config.to_dict() | {"bos_token_id": bos_token_id}
        torch.save({"model": model.state_dict(), "config": config, "step": 1}, path)
        loaded = build_model(TrainConfig(init_from=str(path), T=64), set(), META, None)
        assert loaded.config.bos_token_id == 50256  # from the data, whose documents begin with it
        flags = ["--prompt", "", "--num_samples", "1", "--max_new_tokens", "8", "--device", "cpu"]
        assert sample.main(["--checkpoint", str(path), *flags]) == 0
        texts.append(capsys.readouterr().out.split("--- sample 1\n")[1])
    assert len(texts[0]) > 8 and texts[0] == texts[1]


def test_without_tiktokens_files_nothing_is_written(gpt2, shard, tmp_path, monkeypatch, capsys):
    (tmp_path / "log.txt").touch()  # of an earlier run, which is not moved aside
    model = build_model(TrainConfig(init_from=gpt2, use_moe=False, T=T), set(), META, None)
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=ConnectionError("no route")))
    llmc.get_encoding.cache_clear()
    assert run(gpt2, shard, tmp_path, "--write_tensors", 1) == 2
    *_, error = capsys.readouterr().err.splitlines()
    words = ("write_tensors=True", "no tokenizer", "TIKTOKEN_CACHE_DIR", "--write_tensors 0")
    assert all(word in error for word in words) and "--encoding" not in error
    refuses("no tokenizer can be written", llmc.write_all, model, None, None, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_run_that_finds_nothing_to_resume_writes_the_files_and_a_resumed_one_does_not(data, tmp_path):
    more = "--use_moe 0 --ngram_order 0 --write_tensors 1 --resume auto --max_steps".split()
    for steps in (3, 4):
        assert train_gpt_moe.main(own_flags(data, tmp_path, *more, steps)) == 0
        written = [path.name for path in tmp_path.glob("gpt2_*.bin")]
        assert len(written) == (4 if steps == 3 else 0), written
        for name in written:
            (tmp_path / name).unlink()


def test_files_and_what_is_printed(gpt2, shard, finished):
    kinds = itertools.product(("d2", "124M"), ("", "_bf16", "_debug_state"))
    expected = {f"gpt2_{size}{kind}.bin" for size, kind in kinds} | {"gpt2_tokenizer.bin"}
    assert {path.name for path in finished.glob("*.bin")} == expected
    # The state: the first batch of the file, and the loss of it that transformers' GPT-2 has.
    state = llmc_readers.read_state(finished / "gpt2_d2_debug_state.bin")
    tokens, theirs = read(shard), GPT2LMHeadModel.from_pretrained(gpt2)
    assert (state["x"].reshape(-1) == tokens[: B * T].numpy()).all()
    assert float(state["loss"]) == pytest.approx(loss_at(theirs, tokens, 0).item(), rel=1e-5)
    # The weights are those that the run began with.
    written = llmc.read_model(finished / "gpt2_d2.bin").transformer.h[1].attn.c_proj.weight
    assert torch.equal(written, theirs.transformer.h[1].attn.c_proj.weight.t())
    text = (finished.parent / "printed").read_text()
    assert re.search(r"^final 3 iters avg: \d+\.\d{3}ms$", text, re.MULTILINE)  # as llm.c, not the first
    assert re.search(r"^peak memory consumption: [1-9]\d* MiB$", text, re.MULTILINE)
    assert len(logged(finished, "tel")) == 3 and len(logged(finished, "trl")) == STEPS
    assert ckpt.load_checkpoint(finished / "latest")["step"] == STEPS


def test_models_by_name():
    config, given = parse_config("--model d24 --T 256".split())
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (24, 16, 1024, 1024)
    assert not config.use_moe and given == {"model", "T"}
    config, _ = parse_config("--model d12 --use_moe 1 --num_experts 8".split())
    assert config.use_moe and config.num_experts == 8
    config, _ = parse_config(["--model", "gpt2-xl"])
    assert config.init_from == "gpt2-xl" and not config.use_moe
    refuses(r"model='d13'.*gpt2, .*d48", parse_config, ["--model", "d13"])


def test_its_flags_and_defaults_are_all_known(capsys):
    defaults = dict(input_bin="x.bin", input_val_bin="", output_dir="log", model="gpt2", batch_size=4,
                    sequence_length=64, total_batch_size=256, num_iterations=10, inference_only=0,
                    learning_rate=1e-4, warmup_iters=0, learning_rate_decay_frac=1.0, weight_decay=0.0,
                    grad_clip=1.0, val_loss_every=0, val_max_steps=20, sample_every=0, overfit_single_batch=1,
                    tensorcores=0, device="", compile=0, flash=0, dtype="float32", zero_stage=0,
                    write_tensors=1)  # fmt: skip
    typed, _ = parse_config([f"--{name}={value}" for name, value in defaults.items()])
    preset, _ = parse_config(["--preset", "llmc", "--input_bin", "x.bin"])
    different = {name for name, value in vars(typed).items() if value != getattr(preset, name)}
    other = "preset model block_size vocab_size shuffle prompt hellaswag init_from".split()
    assert different <= set(other)
    with pytest.raises(SystemExit):
        parse_config(["--help", "all"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in defaults)
