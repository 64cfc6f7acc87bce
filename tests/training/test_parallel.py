"""One model, every layout: the same losses and weights in one process, two and four, however they share it.

Run: python -m pytest tests/training/test_parallel.py

The processes of a test are started once and try one layout after another (main, below); four ranks are slow.
"""

import itertools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import finish, flags, metrics, start, start_ranks, wait_for

import train_gpt_moe
from layers.sharding import local
from training import checkpoints as ckpt
from training import muon, parallel
from training.checkpoint_writer import CheckpointWriter
from training.expert_parallel import AllToAll
from training.optimizers import build_optimizer
from training.setup import Run, build_model, check_config, place_model

META = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256}
STEPS, SEQUENCES, T = 5, 8, 16
IDLE = 2  # an expert of the first layer that no token ever chooses

# name: processes, settings, micro-steps
LAYOUTS = {
    "one process": (1, {}, 1),
    "one process, fsdp": (1, dict(parallel="fsdp"), 1),
    "one process, muon": (1, dict(optimizer="muon"), 1),
    "ddp": (2, {}, 1),
    "ddp, accumulation": (2, {}, 2),
    "ddp, zero": (2, dict(zero_stage=1), 1),
    "fsdp": (2, dict(parallel="fsdp"), 1),
    "fsdp, accumulation": (2, dict(parallel="fsdp"), 2),
    "fsdp, checkpointing": (2, dict(parallel="fsdp", activation_checkpointing="block"), 2),
    "experts": (2, dict(ep_size=2), 1),
    "experts, accumulation": (2, dict(ep_size=2, activation_checkpointing="block"), 2),
    "experts, muon": (2, dict(ep_size=2, optimizer="muon"), 1),
    "experts, fsdp": (2, dict(ep_size=2, parallel="fsdp"), 2),
    "four: fsdp": (4, dict(parallel="fsdp"), 1),
    "four: ddp x experts": (4, dict(ep_size=2), 1),
    "four: fsdp x experts": (4, dict(ep_size=2, parallel="fsdp"), 2),
}

RESTORED = ["ddp", "ddp, zero", "fsdp", "experts", "four: fsdp", "four: fsdp x experts"]
# A single file, and folders that two and four processes have written.
SOURCES = ["one process", "fsdp", "experts, fsdp", "four: fsdp", "four: ddp x experts"]
SOURCES += ["four: fsdp x experts"]


def settings(**more) -> train_gpt_moe.TrainConfig:
    return train_gpt_moe.TrainConfig(
        n_layer=2, n_head=4, n_kv_head=2, n_embd=32, position="rope", qk_norm=True, sliding_window=5,
        global_every=2, num_experts=6, num_experts_per_tok=2, num_shared_experts=1,
        expert_hidden_size=24, T=T, B=1, total_batch_size=SEQUENCES * T, router_bias_update_rate=0.01,
        router_z_loss_coef=1e-3, max_lr=3e-3, min_lr=3e-4, warmup_steps=2, max_steps=STEPS, grad_clip=0.5,
        use_compile=False, device="cpu", **more,
    )  # fmt: skip


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def build(world: parallel.World, micro_steps: int, **more) -> tuple:
    """Layout, model and optimizer, as train_gpt_moe.py makes them."""
    config = settings(**more)
    config.B = SEQUENCES // world.size // micro_steps
    assert check_config(config, world) == micro_steps
    layout = parallel.make_layout(world, config.parallel, config.zero_stage, config.ep_size)
    model = place_model(config, build_model(config, set(), META, None), layout, "float32", None)
    model.moe_layers()[0].router_bias[IDLE] = -10.0
    return config, layout, model, parallel.share_optimizer(build_optimizer(config, model), layout)


class Loader:
    """In the place of a DistributedDataLoader: this rank's part of each micro-step's eight sequences."""

    def __init__(self, world: parallel.World, B: int):
        data = torch.randint(257, (STEPS * SEQUENCES, T + 1), generator=torch.Generator().manual_seed(0))
        self.batches = iter(data.split(B)[world.rank :: world.size])

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = next(self.batches)
        return tokens[:, :-1], tokens[:, 1:]

    def load_state_dict(self, state: dict) -> None:
        assert state == {}


def train(world: parallel.World, folder: Path, name: str) -> None:
    """Five steps. Losses, norms, the weights at both ends and a checkpoint go to the layout's folder."""
    _, more, micro_steps = LAYOUTS[name]
    config, layout, model, optimizer = build(world, micro_steps, **more)
    for group in optimizer.param_groups:
        group["eps"] = 1e-4  # else AdamW turns what rounding leaves of a zero gradient into steps
    begin = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    run = Run(config, layout, model, optimizer, Loader(world, config.B), micro_steps)
    model.update_routers()
    records = [train_gpt_moe.train_step(run, step) for step in range(STEPS)]
    losses = [[record[part] for part in ("loss", "balance_loss", "z_loss")] for record in records]
    norms = [record["norm"] for record in records]
    end = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    held = sum(local(p).numel() for p in model.parameters())
    (folder / name).mkdir(exist_ok=True)
    writer = CheckpointWriter(folder / name, say=str, rank=world.rank, savers=layout.savers)
    state = {"model": model.state_dict(), "optimizer": parallel.optimizer_state(optimizer, layout)}
    rest = dict(step=STEPS, config=model.config.to_dict(), loader={}, rng=torch.get_rng_state())
    if world.is_master or layout.saves_together:
        writer.save(state | rest)
    with torch.no_grad():  # the copy has been made
        for parameter in model.parameters():
            local(parameter).zero_()
        for values in getattr(optimizer, "optim", optimizer).state.values():
            for value in values.values():
                local(value).zero_()
    assert writer.wait() is None, writer.error
    result = {"losses": losses, "norms": norms, "begin": begin, "end": end, "held": held}
    if world.is_master:
        torch.save(result, folder / name / "result")


def order_of_work(world: parallel.World) -> list[str]:
    """What happens in one forward and backward of a layer whose two ranks share the experts."""
    events = []

    def noted(name, function):
        return lambda *args, **kwargs: (events.append(name), function(*args, **kwargs))[1]

    _, _, model, _ = build(world, 1, ep_size=2)
    moe, x = model.moe_layers()[0], torch.randn(1, T, 32, requires_grad=True)
    moe.experts.register_forward_pre_hook(lambda *args: events.append("experts"))
    moe.shared.register_forward_pre_hook(lambda *args: events.append("shared"))
    moe.shared.c_proj.weight.register_hook(lambda grad: events.append("shared"))
    moe.experts.c_fc.register_hook(lambda grad: events.append("experts"))
    with mock.patch.multiple(AllToAll, **{n: noted(n, getattr(AllToAll, n)) for n in ("start", "wait")}):
        moe(x).sum().backward()
    return events


def restore(world: parallel.World, path: Path, **more) -> dict:
    """What a checkpoint becomes in this layout: weights, buffers and moments, put together again."""
    _, layout, model, optimizer = build(world, 1, **more)
    ckpt.restore(ckpt.load_checkpoint(path, whole=False), model, optimizer, Loader(world, 1))
    state = {f"model.{name}": whole(tensor) for name, tensor in model.state_dict().items()}
    for number, values in parallel.optimizer_state(optimizer, layout).get("state", {}).items():
        state |= {f"optimizer.{number}.{name}": whole(value) for name, value in values.items()}
    return state


def gloo_threads() -> int:
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def main(arguments: list[str]) -> int:
    """What each process does: the layouts for that many processes, one after the other; or, given more than a
    folder, a training run: then the exit code is the number of gloo's threads once it has left its group."""
    if len(arguments) > 1:
        left, stop = [], parallel.stop
        parallel.stop = lambda world: (stop(world), left.append(gloo_threads()))
        assert train_gpt_moe.main(arguments) == 0
        return left[0]
    world, folder = parallel.start("cpu"), Path(arguments[0])
    muon.has_fast_bf16 = lambda device_type: False  # its rounding would hide what is wrong
    mine = [name for name, (size, *_) in LAYOUTS.items() if size == world.size and name != "one process"]
    for name in mine:
        if not (folder / name).exists():
            world.barrier()
            train(world, folder, name)
    if world.size == 2:
        torch.save(order_of_work(world), folder / f"events of {world.rank}")
    world.barrier()  # rank 0 has given the last folder its name: all sources are there
    present = [source for source in SOURCES if (folder / source).exists()]
    work = itertools.product([name for name in mine if name in RESTORED], present)
    work = [(name, source) for name, source in work if not (folder / name / f"from {source}").exists()]
    world.barrier()
    for name, source in work:
        state = restore(world, ckpt.list_checkpoints(folder / source)[0], **LAYOUTS[name][1])
        if world.is_master:
            torch.save(state, folder / name / f"from {source}")
    parallel.stop()
    return 0


def launch(folder: Path, size: int) -> None:
    """So many processes do what there is to do in the folder."""
    ranks = start_ranks(size, [folder], folder / f"output of {size}", script="test_parallel")
    assert [finish(rank) for rank in ranks] == [0] * size, (folder / f"output of {size}").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the layouts of one and two processes have come to, their checkpoints, and what became of these."""
    folder = tmp_path_factory.mktemp("layouts")
    train(parallel.World(0, 0, 1, torch.device("cpu")), folder, "one process")
    launch(folder, 1)
    launch(folder, 2)
    return folder


@pytest.fixture(scope="module")
def four(folder) -> Path:
    """The same folder with the layouts of four processes."""
    launch(folder, 4)
    launch(folder, 2)  # which restore what four have saved
    return folder


def layouts(*names) -> list:
    """Test parameters; those that need four processes are slow."""
    return [pytest.param(*n, marks=[pytest.mark.slow] * ("four" in str(n))) for n in names]


@pytest.fixture
def place(request, name) -> Path:
    """The folder, with four processes' layouts where the test's parameters name any."""
    return request.getfixturevalue("four" if "four" in request.node.name else "folder")


def result(folder: Path, name: str) -> dict:
    return torch.load(folder / name / "result")


def single(name: str) -> str:
    """What a layout is compared with."""
    return "one process, muon" if "muon" in name else "one process"


@pytest.mark.parametrize("name", layouts(*([name] for name in LAYOUTS if name != single(name))))
def test_layouts_train_the_same_model(place, name):
    """Losses, balance losses, gradient norms (which are clipped), weights, router biases and counts."""
    one, many = result(place, single(name)), result(place, name)
    for key, value in one["begin"].items():
        assert torch.equal(many["begin"][key], value), key
    losses = (torch.tensor(each["losses"]) for each in (many, one))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    rounding = 1e-4 if "muon" in name else 1e-5  # its iterations multiply it
    assert many["norms"] == pytest.approx(one["norms"], rel=rounding) and min(one["norms"]) > 0.5
    for key, value in one["end"].items():
        if value.is_floating_point():
            error = (many["end"][key] - value).norm() / value.norm().clamp_min(1e-3)
            assert error < rounding, f"{key}: {error}"
        else:
            torch.testing.assert_close(many["end"][key], value, rtol=1e-5, atol=20)
    idle = "transformer.h.0.mlp.experts.c_fc"
    assert torch.equal(many["end"][idle][IDLE], one["begin"][idle][IDLE])


@pytest.mark.parametrize("name", layouts(*([name] for name in LAYOUTS)))
def test_a_checkpoint_holds_everything(place, name):
    """Weights and buffers to the bit, though the model went on changing; moments as in one process."""
    path = ckpt.list_checkpoints(place / name)[0]
    assert path.is_dir() == ("fsdp" in name or "experts" in name)
    saved, one = (ckpt.load_checkpoint(ckpt.list_checkpoints(place / n)[0]) for n in (name, single(name)))
    end = result(place, name)["end"]
    assert saved["model"].keys() == end.keys() and saved["config"] == one["config"]
    assert all(torch.equal(saved["model"][key], value) for key, value in end.items())
    for number, values in one["optimizer"]["state"].items():
        found = saved["optimizer"]["state"][number]
        assert found.keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, check_device=False)


@pytest.mark.parametrize(("name", "source"), layouts(*itertools.product(RESTORED, SOURCES)))
def test_any_layout_reads_what_any_layout_has_saved(place, name, source):
    saved = ckpt.load_checkpoint(ckpt.list_checkpoints(place / source)[0])
    restored = torch.load(place / name / f"from {source}")
    numbers = [key for key in restored if key.startswith("optimizer.")]
    assert len(numbers) == sum(len(values) for values in saved["optimizer"]["state"].values())
    for key, value in restored.items():
        kind, _, rest = key.partition(".")
        if kind == "model":
            expected = saved["model"][rest]
        else:
            number, _, rest = rest.partition(".")
            expected = saved["optimizer"]["state"][int(number)][rest]
        assert torch.equal(value, expected), key


def test_shared_experts_work_while_rows_are_under_way(folder):
    forward = ["start", "shared", "wait", "experts", "start", "wait"]
    backward = ["start", "wait", "experts", "start", "shared", "wait"]
    assert torch.load(folder / "events of 0") == forward + backward


@pytest.mark.parametrize("name", layouts(["ddp"], ["four: fsdp"]))
def test_memory_is_divided_up(place, name):
    """Numbers of parameters that rank 0 holds."""
    held = {name: result(place, name)["held"] for name in LAYOUTS if (place / name).exists()}
    all_of_them = held["one process"]
    experts = 2 * 6 * (2 * 24 * 32 + 24 + 32)
    assert held["ddp"] == held["ddp, zero"] == all_of_them
    assert held["experts"] == held.get("four: ddp x experts", held["experts"]) == all_of_them - experts // 2
    assert held["fsdp"] == pytest.approx(all_of_them / 2, rel=0.01)
    if name != "ddp":  # 6 experts on four ranks, 3 on two: a rank has a part of each
        quarter = pytest.approx(all_of_them / 4, rel=0.01)
        assert held["four: fsdp"] == held["four: fsdp x experts"] == quarter


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--parallel fsdp", "parallel=fsdp needs processes: start with torchrun"),
        ("--zero_stage 1", "zero_stage=1 needs processes: start with torchrun"),
        ("--zero_stage 2", "zero_stage=2: choose one of 0, 1"),
        ("--parallel tensor", "parallel='tensor': choose one of ddp, fsdp, none"),
        ("--activation_checkpointing all", "activation_checkpointing='all': choose one of none, block"),
        ("--ep_size 0", "ep_size=0: must be at least 1"),
        ("--ep_size 2", "the number of processes, 1, is not a multiple of ep_size=2"),
        ("--ep_size 2 --parallel none", "ep_size=2 needs several processes, but parallel=none"),
        (
            "--ep_size 2 --zero_stage 1",
            "zero_stage=1 needs the same parameters on all ranks, but with ep_size=2",
        ),
        ("--zero_stage 1 --parallel none", "zero_stage=1 works with --parallel ddp only, but parallel=none"),
        ("--zero_stage 1 --parallel fsdp", "parallel=fsdp, which already shards the optimizer state"),
        ("--parallel fsdp --optimizer muon", "optimizer=muon needs whole matrices, but parallel=fsdp"),
        ("--zero_stage 1 --optimizer muon", "optimizer=muon needs whole states, but zero_stage=1"),
        ("--parallel fsdp --dtype float16", "use --dtype bfloat16"),
        ("--ep_size 2 --use_moe False", "ep_size=2 shares experts among ranks, but use_moe=False"),
        ("--ep_size 2 --num_experts 3", "num_experts=3 is not a multiple of ep_size=2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(flags, message, monkeypatch):
    config, _ = train_gpt_moe.parse_config(["--hellaswag", "False", *flags.split()])
    alone = "processes" in message
    monkeypatch.setattr("training.setup.dist.is_initialized", lambda: not alone)
    size = 1 if alone else 2
    with pytest.raises(ValueError, match=re.escape(message)):
        check_config(config, parallel.World(0, 0, size, torch.device("cpu")))


def test_a_run_goes_on_in_another_layout(data, tmp_path):
    """Two processes with FSDP and shared experts, then one process from their folder in mid-run."""
    more = ["--dropout", "0", "--infer_step", "6", "--sample_every", "6", "--sample_tokens", "4"]
    both = [*flags(data, tmp_path / "two", *more), "--parallel", "fsdp", "--ep_size", "2"]
    ranks = start_ranks(2, both, tmp_path / "output")
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "output").read_text()
    middle = tmp_path / "two" / "model_00006"
    assert (tmp_path / "two" / "latest").read_text() == "model_00012" and middle.is_dir()
    one = [*flags(data, tmp_path / "one", *more), "--resume", str(middle)]
    assert finish(start([*one, "--log_dir", str(tmp_path / "one")], tmp_path / "output")) == 0
    logs = (metrics(tmp_path / name) for name in ("two", "one"))
    first, second = ({record["step"]: record["loss"] for record in log if "loss" in record} for log in logs)
    assert list(first) == list(range(12)) and list(second) == list(range(6, 12))
    assert list(second.values()) == pytest.approx(list(first.values())[6:], rel=1e-5)
    end = tmp_path / "two" / "model_00012"
    inside = sorted(end.iterdir())
    assert train_gpt_moe.main(["--resume", f"{end}/", "--device", "cpu"]) == 0  # as a shell completes it
    assert sorted(end.iterdir()) == inside, "the run took the checkpoint for its log_dir"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list threads so")
def test_no_thread_of_the_process_group_outlives_it(data, tmp_path):
    """One that is about to give a tensor back when the interpreter ends would end the process by SIGABRT."""
    run = flags(data, tmp_path / "log", "--max_steps", "3", "--zero_stage", "1")
    ranks = start_ranks(2, run, tmp_path / "output", script="test_parallel")
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "output").read_text()


def test_a_kill_leaves_whole_folders_and_the_run_goes_on(data, tmp_path):
    """Two processes save at every step, and are killed; one process takes the newest folder and finishes."""
    more = ["--dropout", "0", "--checkpoint_every", "1", "--max_steps", "30"]  # killed before the 30th
    both = flags(data, tmp_path / "log", *more)
    sharing = ["--parallel", "fsdp", "--keep_last", "2"]
    (tmp_path / "log" / ".model_00009.unfinished").mkdir(parents=True)  # of a run that was killed before
    ranks = start_ranks(2, [*both, *sharing], tmp_path / "output")
    wait_for(tmp_path / "log" / "log.txt", 8)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    warnings = []
    path, state = ckpt.load_newest(tmp_path / "log", warnings.append)
    assert path.is_dir() and state["step"] >= 3 and not warnings
    assert 1 <= len(ckpt.list_checkpoints(tmp_path / "log")) <= 3
    assert not (tmp_path / "log" / ".model_00009.unfinished").exists()
    assert finish(start([*both, "--resume", "auto"], tmp_path / "output")) == 0
    assert [record["step"] for record in metrics(tmp_path / "log")] == list(range(31))
