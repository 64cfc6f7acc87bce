"""One model, every layout: the same losses and weights in one process, two and four, however they share it.

The processes of a test are started once and try one layout after another (main, below); four ranks are slow.
"""

import contextlib
import copy
import functools
import itertools
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import slow
from models import tiny
from processes import finish, flags, metrics, run_ranks, start_ranks, wait_for
from torch.utils._python_dispatch import TorchDispatchMode
from wire import Volume

import train_gpt_moe
from bench.measure import RandomBatch, make_run
from layers.roles import role_of
from layers.sharding import local
from model import GPTLMHeadModel
from training import checkpoints as ckpt
from training import faults, muon, parallel
from training.checkpoint_writer import CheckpointWriter
from training.optimizers import build_optimizer
from training.setup import Run, build_model, check_config, place_model

META = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256}
STEPS, SEQUENCES, T = 3, 8, 16
IDLE = 2  # an expert of the first layer that no token ever chooses

# Four ranks cut 50 rows (gate and up) unevenly, and experts along their last dimension.
MUON = dict(optimizer="muon", moe_loss_type="diversity_regularization", activation="swiglu")
MUON |= dict(expert_hidden_size=25, adagrad_ngrams=True)
# name: processes, settings, micro-steps
LAYOUTS = {"one process": (1, {}, 1), "one process, muon": (1, MUON, 1), "ddp, muon": (2, MUON, 1),
           "ddp, zero, muon": (2, MUON | dict(zero_stage=1), 1),
           "fsdp, muon": (2, MUON | dict(parallel="fsdp"), 1), "ddp": (2, {}, 2),
           "ddp, zero": (2, dict(zero_stage=1), 1),
           "fsdp": (2, dict(parallel="fsdp", activation_checkpointing="block"), 2),
           "experts": (2, dict(ep_size=2, activation_checkpointing="block"), 2),
           "experts, muon": (2, MUON | dict(ep_size=2), 1),
           "experts, fsdp": (2, dict(ep_size=2, parallel="fsdp"), 2),
           "slow one: fsdp": (1, dict(parallel="fsdp"), 1), "slow four: fsdp": (4, dict(parallel="fsdp"), 1),
           "slow four: ddp x experts": (4, dict(ep_size=2), 1),
           "slow four: fsdp x experts": (4, dict(ep_size=2, parallel="fsdp"), 2),
           "slow one: fsdp, muon": (1, MUON | dict(parallel="fsdp"), 1), "slow four: ddp, muon": (4, MUON, 1),
           "slow four: fsdp, muon": (4, MUON | dict(parallel="fsdp"), 1),
           "slow four: fsdp x experts, muon": (4, MUON | dict(ep_size=2, parallel="fsdp"), 1)}  # fmt: skip
EACH = [*slow(*(name for name in LAYOUTS if "slow" in name)), *(n for n in LAYOUTS if "slow" not in n)]
ALONE = ("one process", "one process, muon")  # these need no process group; others are compared with them

# Layouts, and the checkpoints that they read: a single file, and folders of two and of four processes.
RESTORED = "ddp/ddp, zero/fsdp/experts/slow four: fsdp/slow four: fsdp x experts".split("/")
RESTORED += [f"{name}, muon" for name in RESTORED]
SOURCES = ["one process", "fsdp", "experts, fsdp", *(name for name in LAYOUTS if "four" in name)]
SOURCES += ["one process, muon", "ddp, zero, muon", "fsdp, muon"]
ALL_PAIRS = [(a, b) for a, b in itertools.product(RESTORED, SOURCES) if ("muon" in a) == ("muon" in b)]
EVERYDAY_PAIRS = [("ddp", "experts, fsdp"), ("ddp, zero", "fsdp"), ("fsdp", "one process"),
                  ("experts", "fsdp"), ("ddp, zero, muon", "fsdp, muon"), ("fsdp, muon", "ddp, zero, muon"),
                  ("experts, muon", "fsdp, muon")]  # fmt: skip


def settings(**more) -> train_gpt_moe.TrainConfig:
    return train_gpt_moe.TrainConfig(
        n_layer=2, n_head=4, n_kv_head=2, n_embd=32, position="rope", qk_norm=True, sliding_window=5,
        global_every=2, num_experts=6, num_experts_per_tok=2, num_shared_experts=1,
        ngram_order=3, ngram_rows=40, T=T, B=1, total_batch_size=SEQUENCES * T, router_bias_update_rate=0.01,
        router_z_loss_coef=1e-3, max_lr=3e-3, min_lr=3e-4, warmup_steps=2, max_steps=STEPS, grad_clip=0.5,
        use_compile=False, device="cpu", **(dict(expert_hidden_size=24) | more),
    )  # fmt: skip


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors, put together from the ranks' parts."""
    full = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in tensors.items()}
    return {key: tensor.detach().clone() for key, tensor in full.items()}


def build(world: parallel.World, micro_steps: int, **more) -> tuple:
    """Layout, model and optimizer, as train_gpt_moe.py makes them."""
    config = settings(**more)
    config.B = SEQUENCES // world.size // micro_steps
    assert check_config(config, world) == micro_steps
    layout = parallel.make_layout(world, config.parallel, config.zero_stage, config.ep_size)
    model = place_model(config, build_model(config, set(), META, None), layout, "float32", None)
    model.moe_layers()[0].router_bias[IDLE] = -10.0
    return config, layout, model, parallel.share_optimizer(build_optimizer(config, model), layout)


def sequences() -> torch.Tensor:
    """The data, (steps * sequences, T + 1)."""
    return torch.randint(257, (STEPS * SEQUENCES, T + 1), generator=torch.Generator().manual_seed(0))


def gradients_of_sequences(model) -> list[torch.Tensor]:
    """The gradient of each sequence of the last step, (sequences, numbers): all but the experts, experts."""
    rows = []
    for tokens in sequences()[-SEQUENCES:, None]:
        model(tokens[..., :-1], targets=tokens[..., 1:], return_dict=True).loss.backward()
        grads = [(name, p.grad.to_dense().flatten()) for name, p in model.named_parameters()]
        parts = [[grad for n, grad in grads if (".experts." in n) == experts] for experts in (0, 1)]
        rows.append([torch.cat(part) for part in parts])
        model.zero_grad()
    faults.discard_routing(model)
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def loader(world: parallel.World, B: int) -> mock.Mock:
    """In the place of a DistributedDataLoader: this rank's part of each micro-step's eight sequences."""
    mine = sequences().split(B)[world.rank :: world.size]
    return mock.Mock(next_batch=mock.Mock(side_effect=[(tokens[:, :-1], tokens[:, 1:]) for tokens in mine]))


def train(world: parallel.World, folder: Path, name: str) -> None:
    """Train some steps. Losses, norms, weights at both ends and a checkpoint go to the layout's folder."""
    _, more, micro_steps = LAYOUTS[name]
    config, layout, model, optimizer = build(world, micro_steps, **more)
    for group in optimizer.param_groups:
        group["eps"] = 1e-4  # else AdamW turns what rounding leaves of a zero gradient into steps
    begin = whole(model.state_dict())
    run = Run(config, layout, model, optimizer, loader(world, config.B), micro_steps)
    model.update_routers()
    with Volume() as volume:
        records = [train_gpt_moe.train_step(run, step) for step in range(STEPS - 1)]
        sequences = gradients_of_sequences(model) if name in ALONE else None
        records.append(train_gpt_moe.train_step(run, STEPS - 1))  # an evaluation would follow
    result = {key: [record[key] for record in records] for key in ("loss", "balance_loss", "z_loss", "norm")}
    result |= dict(diagnostics=run.diagnostics.state_dict(), sequences=sequences, sent=dict(volume.sent))
    result |= dict(begin=begin, end=whole(model.state_dict()))
    (folder / name).mkdir(exist_ok=True)
    writer = CheckpointWriter(folder / name, say=str, rank=world.rank, savers=layout.savers)
    state = {"model": model.state_dict(), "optimizer": parallel.optimizer_state(optimizer, layout)}
    rest = dict(step=STEPS, config=model.config.to_dict(), loader={"position": 0}, rng=torch.get_rng_state())
    if world.is_master or layout.saves_together:
        writer.save(state | rest)
    moments = getattr(optimizer, "optim", optimizer).state.values()
    for tensor in [*model.parameters(), *(value for values in moments for value in values.values())]:
        local(tensor.detach()).zero_()  # the writer has its copy
    assert writer.wait() is None, writer.error
    if world.is_master:
        torch.save(result, folder / name / "result")


def restore(world: parallel.World, path: Path, **more) -> dict:
    """What a checkpoint becomes in this layout: weights, buffers and moments, put together again."""
    _, layout, model, optimizer = build(world, 1, **more)
    ckpt.restore(ckpt.load_checkpoint(path, whole=False), model, optimizer, data := loader(world, 1))
    data.reset.assert_called_once_with(0)
    moments = parallel.optimizer_state(optimizer, layout).get("state", {})
    return {"model": whole(model.state_dict())} | {number: whole(moments[number]) for number in moments}


def checkpoint(folder: Path, name: str) -> Path:
    return ckpt.list_checkpoints(folder / name)[0]


def threads() -> list[str]:
    """The names of this process's threads. A thread that ends meanwhile has none."""
    found = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(path.read_text())
    return found


def main(arguments: list[str]) -> int:
    """What each process does: given a folder, the layouts for that many processes, one after the other; given
    flags, a training run, whose exit code is the number of gloo's threads once it has left its group."""
    if len(arguments) > 1:
        before, left, stop = [], [], parallel.stop
        parallel.stop = lambda world: (before.extend(threads()), stop(world), left.extend(threads()))
        assert train_gpt_moe.main(arguments) == 0 and left and any("gloo" in name for name in before)
        return sum("gloo" in name for name in left)
    world, folder = parallel.start("cpu"), Path(arguments[0])
    muon.has_fast_bf16 = lambda device_type: False  # its rounding would hide what is wrong
    mine = [name for name, (size, *_) in LAYOUTS.items() if size == world.size and name not in ALONE]
    for name in mine:
        if not (folder / name).exists():
            world.barrier()
            train(world, folder, name)
    world.barrier()  # rank 0 has given the last folder its name
    pairs = ALL_PAIRS if any(folder.glob("slow four*")) else EVERYDAY_PAIRS
    todo = [(a, b) for a, b in pairs if a in mine and not (folder / a / f"from {b}").exists()]
    world.barrier()
    for name, source in todo:
        state = restore(world, checkpoint(folder, source), **LAYOUTS[name][1])
        if world.is_master:
            torch.save(state, folder / name / f"from {source}")
    parallel.stop()
    return 0


@pytest.fixture(scope="module")
def everyday(tmp_path_factory) -> Path:
    """What the layouts of one and two processes have come to, their checkpoints, and what became of these."""
    folder = tmp_path_factory.mktemp("layouts")
    with mock.patch.object(muon, "has_fast_bf16", lambda device_type: False):
        for name in ALONE:
            train(parallel.World(0, 0, 1, torch.device("cpu")), folder, name)
    run_ranks(2, [folder], folder / "output", script="test_parallel")
    return folder


@pytest.fixture(scope="module")
def everything(everyday) -> Path:
    """The same folder with the slow layouts, and all pairs of a layout and a checkpoint that it reads."""
    for size in (1, 4, 2):  # the last ones read what four ranks have saved
        run_ranks(size, [everyday], everyday / "output", script="test_parallel")
    return everyday


@pytest.fixture
def folder(request) -> Path:
    """The folder, with the slow layouts for slow tests."""
    return request.getfixturevalue("everything" if request.node.get_closest_marker("slow") else "everyday")


@functools.cache
def result(folder: Path, name: str) -> dict:
    return torch.load(folder / name / "result")


@functools.cache
def saved_state(folder: Path, name: str) -> dict:
    return ckpt.load_checkpoint(checkpoint(folder, name))


@pytest.mark.parametrize("name", [name for name in EACH if name not in ALONE])
def test_layouts_train_the_same_model(folder, name):
    """Losses, balance losses, gradient norms (which are clipped), weights, router biases and counts."""
    one, many = result(folder, ALONE["muon" in name]), result(folder, name)
    torch.testing.assert_close(many["begin"], one["begin"], rtol=0, atol=0)
    for key in ("loss", "balance_loss", "z_loss"):
        assert many[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-5) and min(one["norm"]) > 0.5
    for key, value in one["end"].items():
        if value.is_floating_point():
            error = (many["end"][key] - value).norm() / value.norm().clamp_min(1e-3)
            assert error < 1e-5, f"{key}: {error}"
        else:
            exact = "counts" in key  # of routed rows; the others are sums of rounded numbers
            torch.testing.assert_close(many["end"][key], value, rtol=1e-5, atol=0 if exact else 20)
    idle = "transformer.h.0.mlp.experts.c_fc"
    assert torch.equal(many["end"][idle][IDLE], one["begin"][idle][IDLE])


@pytest.mark.parametrize("name", EACH)
def test_layouts_measure_the_same_routers_and_noise(folder, name):
    """The noise is that of arXiv 1812.06162, appendix A.1, computed from the gradients of sequences."""
    one, found = result(folder, ALONE["muon" in name]), dict(result(folder, name)["diagnostics"])
    size, more, micro_steps = LAYOUTS[name]
    together, expected = SEQUENCES // micro_steps, [0.0, 0.0]  # sequences in a micro-step of all ranks
    for ranks, gradients in zip((1, more.get("ep_size", 1)), one["sequences"], strict=True):
        b = together if more.get("parallel") == "fsdp" else together // size * ranks
        small = sum(rows.mean(0).square().sum() for rows in gradients[:together].split(b)) / (together // b)
        small, big = small.item(), gradients.mean(0).square().sum().item()
        if b < SEQUENCES:
            expected[0] += (SEQUENCES * big - b * small) / (SEQUENCES - b)
            expected[1] += T * (small - big) / (1 / b - 1 / SEQUENCES)
    measured = micro_steps > 1
    assert found.pop("noise").tolist() == pytest.approx([1, *expected] if measured else [0, 0, 0], rel=1e-3)
    assert ("noise_scale" in found) == (measured and min(expected) > 0)
    found.pop("noise_scale", None)
    assert {"router_norm_by_layer", "router_entropy_by_layer", "max_load_by_layer"} <= found.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, one["diagnostics"][key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", EACH)
def test_a_checkpoint_holds_everything(folder, name):
    """Weights and buffers to the bit, though the model went on changing; moments as in one process."""
    assert checkpoint(folder, name).is_dir() == ("fsdp" in name or "experts" in name)
    saved, one = (saved_state(folder, n) for n in (name, ALONE["muon" in name]))
    torch.testing.assert_close(saved["model"], result(folder, name)["end"], rtol=0, atol=0)
    assert saved["config"] == one["config"]
    found, expected = saved["optimizer"]["state"], one["optimizer"]["state"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pair", [*EVERYDAY_PAIRS, *slow(*sorted({*ALL_PAIRS} - {*EVERYDAY_PAIRS}))], ids=str)
def test_any_layout_reads_what_any_layout_has_saved(folder, pair):
    name, source = pair
    saved = saved_state(folder, source)
    expected = {"model": saved["model"]} | saved["optimizer"]["state"]
    torch.testing.assert_close(torch.load(folder / name / f"from {source}"), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "kind", "experts", "share"), [
    ("ddp, muon", "all_gather", True, 1 / 2), ("experts, muon", "all_gather", False, 1 / 2),
    ("fsdp, muon", "all_to_all", False, 2 / 2 / 2),  # six experts are whole where they are
    ("ddp, zero, muon", "all_gather", False, 0), ("ddp, zero, muon", "all_to_all", False, 0),
])  # fmt: skip
def test_muon_sends_what_its_docstring_says(everyday, name, kind, experts, share):
    found, matrices = result(everyday, name), 0
    for key, tensor in found["end"].items():
        counts = role_of(key).is_matrix and (experts or ".experts." not in key)
        matrices += tensor.numel() if counts and tensor.dim() > 1 else 0
    assert found["sent"].get(kind, 0) == STEPS * 4 * matrices * share


REFUSED = {  # flags: words of the message
    "--parallel fsdp": "parallel=fsdp needs processes.*torchrun", "--ep_size 0": "ep_size=0",
    "--zero_stage 1": "zero_stage=1 needs processes.*torchrun", "--zero_stage 2": "zero_stage=2",
    "--ep_size 2": "processes, 1, .*ep_size=2", "--parallel tensor": "parallel='tensor'",
    "--activation_checkpointing all": "activation_checkpointing='all'",
    "--ep_size 2 --parallel none": "ep_size=2 .*parallel=none",
    "--ep_size 2 --zero_stage 1": "zero_stage=1 .*ep_size=2",
    "--zero_stage 1 --parallel none": "zero_stage=1 .*parallel=none",
    "--zero_stage 1 --parallel fsdp": "zero_stage=1 .*parallel=fsdp",
    "--parallel fsdp --dtype float16": "float16 .*--dtype bfloat16",
    "--ep_size 2 --use_moe False": "ep_size=2 .*use_moe=False",
    "--ep_size 2 --num_experts 3": "num_experts=3 .*ep_size=2",
    "--B 4 --T 8 --total_batch_size 90": r"total_batch_size=90 .* 4 \* 8 \* 2 = 64; .*_size 64",
}  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), REFUSED.items())
def test_what_makes_no_sense_is_refused_by_name(flags, message, monkeypatch):
    size = 1 if "processes" in message else 2
    monkeypatch.setattr("training.setup.dist.is_initialized", lambda: size > 1)
    with pytest.raises(ValueError, match=message):
        config, _ = train_gpt_moe.parse_config(["--hellaswag", "False", *flags.split()])
        check_config(config, parallel.World(0, 0, size, torch.device("cpu")))


def test_matrices_are_cast_once_a_step_and_nothing_else_changes():
    """bf16, three micro-steps: to the bit the losses, norms and weights of casts in every micro-step."""
    start, found = GPTLMHeadModel(tiny()), []
    shapes = [p.shape for name, p in start.named_parameters() if role_of(name).is_matrix]

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
                self.count += args[0].shape in shapes
            return operator(*args, **kwargs or {})

    for cast_once in (parallel.cast_once, lambda *_: contextlib.nullcontext()):
        torch.manual_seed(0)
        model, casts = copy.deepcopy(start), Casts()
        run = make_run(model, RandomBatch(model, 2, 8), dtype="bfloat16", accumulation=3)
        with mock.patch.object(parallel, "cast_once", cast_once), casts:
            records = [train_gpt_moe.train_step(run, step) for step in range(2)]
        found.append((casts.count, [(r["loss"], r["norm"]) for r in records], model.state_dict()))
    (count, numbers, weights), (_, plain_numbers, plain_weights) = found
    assert count == 2 * len(shapes) and numbers == plain_numbers
    assert list(weights) == list(start.state_dict())
    assert all(torch.equal(weight, plain_weights[name]) for name, weight in weights.items())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list threads so")
def test_no_thread_of_the_process_group_outlives_it(data, tmp_path):
    """One that is about to give a tensor back when the interpreter ends would end the process by SIGABRT."""
    run = flags(data, tmp_path / "log", "--max_steps", "3", "--zero_stage", "1")
    run_ranks(2, run, tmp_path / "output", script="test_parallel")


def test_a_kill_leaves_whole_folders_and_the_run_goes_on(data, tmp_path):
    """Two processes save at every step, and are killed; one process takes the newest folder and goes on."""
    log_dir, warnings = tmp_path / "log", []
    common = flags(data, log_dir, "--dropout", "0", "--checkpoint_every", "1")
    (log_dir / ".model_00009.unfinished").mkdir(parents=True)  # of a run that was killed before
    endless = [*common, "--max_steps", 500, "--parallel", "fsdp", "--keep_last", "2"]
    ranks = start_ranks(2, endless, tmp_path / "output")
    wait_for(log_dir / "log.txt", 7)
    for rank in ranks:
        rank.kill()
    assert [finish(rank) for rank in ranks] == [-signal.SIGKILL] * 2
    path, state = ckpt.load_newest(log_dir, warnings.append)
    assert path.is_dir() and state["step"] >= 3 and not warnings
    assert 1 <= len(ckpt.list_checkpoints(log_dir)) <= 3
    assert not (log_dir / ".model_00009.unfinished").exists()
    last = state["step"] + 2
    assert train_gpt_moe.main([*common, "--resume", "auto", "--max_steps", str(last)]) == 0
    assert [record["step"] for record in metrics(log_dir)] == list(range(last))
