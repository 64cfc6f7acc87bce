"""Compare recipes: loss against seconds, with nanoGPT; experts with a dense model.

    python -m bench time_to_loss --text input.txt --nanogpt ../nanoGPT --nanochat ../nanochat --png loss.png
    python -m bench moe_pays --text input.txt
Both train byte-level models on the CPU, in fp32, without compilation. The contenders take turns; their clocks
count training only. docs/measurements.md describes the data and the recipes."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

from bench.measure import alternate, make_run
from bench.models import Nanochat, NanoGPT
from huggingface.generation import evaluating
from tokens.demo import prepare_demo
from tokens.shards import find_shards, read_shard
from train_gpt_moe import PRESETS, TrainConfig, train_step
from training.optimizers import build_optimizer, learning_rate
from training.setup import build_model

Data = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (windows, T) each
SIZES = {"4x128": dict(n_layer=4, n_head=4, n_embd=128, T=64),
         "6x256": dict(n_layer=6, n_head=4, n_embd=256, T=256)}  # fmt: skip
BATCHES = {"4x128": (12, 24), "6x256": (8, 8)}  # sequences of nanoGPT and of gpt2; of all others
# The CPU recipe in nanoGPT's README, with config/train_shakespeare_char.py
NANOGPT = dict(max_lr=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99)
MODERN = PRESETS["modern"] | dict(max_lr=5e-3, min_lr=5e-4, warmup_steps=20)  # for 128 channels
EXPERTS = dict(use_moe=True, num_experts=8)
FROM_DEMO = "moe_every num_experts_per_tok muon_experts expert_lr_mult".split()
RECIPES = {"gpt2": PRESETS["gpt2"] | NANOGPT, "modern": MODERN | dict(use_moe=False),
           "modern-moe": MODERN | EXPERTS | {name: PRESETS["demo"][name] for name in FROM_DEMO}}  # fmt: skip
# So small that parameters help, and without n-grams, which learn a part of what experts learn. A dense layer
# of 261 has as many parameters as 2 experts of 128, or 4 of 61, and their router.
PAYS = MODERN | SIZES["4x128"] | dict(n_embd=64, T=128, B=12)
PAYS |= dict(ngram_order=0, muon_steps=5, max_lr=1e-2, min_lr=1e-3)
RIVALS = {"dense": PAYS | dict(use_moe=False, mlp_hidden_size=261),
          "8 experts top-2": PAYS | EXPERTS | dict(num_experts_per_tok=2, expert_hidden_size=128),
          "32 experts top-4": PAYS | dict(use_moe=True, num_experts=32, num_experts_per_tok=4,
                                          expert_hidden_size=61)}  # fmt: skip
SEED, WINDOWS, ROUNDS = 1337, 512, 12  # WINDOWS for validation; ROUNDS: evaluations of each contender
SCALES = (1 / 4, 1 / 2, 1, 2, 4)  # of nanochat's learning rates, which are for larger batches


def split_text(path: str) -> Data:
    """Bytes of a text as ids: the first 90%, and the rest. ValueError if it is too short, OSError."""
    text = torch.frombuffer(bytearray(Path(path).read_bytes() or b" "), dtype=torch.uint8)
    if len(text) < 10_000:
        raise ValueError(f"text={path}: {len(text)} bytes are too few to train on; name a longer text")
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def split_demo() -> Data:
    """Token ids of the embedded corpus: training and validation documents, each with id 256 before it."""
    silent, unsaid = io.StringIO(), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silent), unsaid:
        prepare_demo(folder)
        shards = [read_shard(find_shards(folder, split)[0]) for split in ("train", "val")]  # one of each
    return tuple(torch.from_numpy(shard.astype("int16")) for shard in shards)


def draw_windows(data: torch.Tensor, number: int, T: int, generator: torch.Generator) -> Data:
    """Random windows of T ids, and the same windows one id later: (number, T) each."""
    begin = torch.randint(len(data) - T, (number, 1), generator=generator)
    ids = data[begin + torch.arange(T + 1)].long()  # (number, T + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def window_loader(train: torch.Tensor, config: TrainConfig) -> SimpleNamespace:
    """Gives train_step random windows of the training data; the seed decides which."""
    generator = torch.Generator().manual_seed(config.seed)
    return SimpleNamespace(next_batch=partial(draw_windows, train, config.B, config.T, generator))


@dataclass
class Contender:
    """A model in training, its clock, and what was measured."""

    name: str
    model: nn.Module
    config: TrainConfig  # batch and schedule
    train_step: Callable[[int], object]  # one optimizer step, given the step of the schedule
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # mean cross-entropy of inputs and targets
    budget: float | None = None  # seconds of training; None: train for config.max_steps
    seconds: float = 0.0
    last: float = 0.0  # seconds of the last step
    done: int = 0  # steps
    points: list[tuple[int, float, list[float]]] = field(default_factory=list)  # steps, seconds, losses

    def step(self, progress: float = 0.0) -> None:
        """One optimizer step, on the clock. progress: 0..1 of the schedule."""
        begin = time.perf_counter()
        self.train_step(int(progress * self.config.max_steps))
        self.last = time.perf_counter() - begin
        self.seconds, self.done = self.seconds + self.last, self.done + 1


def pair_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of a model whose forward returns logits and loss: nanoGPT's, and ours."""
    return model(x, targets=y)[1]


def validation_loss(one: Contender, windows: Data, batch: int = 128) -> float:
    """Mean cross-entropy of all windows in nats per byte."""
    with evaluating(one.model):
        parts = zip(*(ids.split(batch) for ids in windows), strict=True)
        return sum(one.loss(x, y).item() * len(x) for x, y in parts) / len(windows[0])


def build_ours(name: str, fields: dict, train: torch.Tensor, V: int, steps: int, seed=SEED) -> Contender:
    """A contender with our model and optimizer from settings of TrainConfig."""
    config = TrainConfig(**fields | dict(vocab_size=V, max_steps=steps, seed=seed))
    model = build_model(config, set(), dict(encoding="bytes", vocab_size=V, eot_token=None), None)
    optimizer = build_optimizer(config, model)
    run = make_run(model, window_loader(train, config), config=config, optimizer=optimizer)
    return Contender(name, model, config, partial(train_step, run), partial(pair_loss, model))


def build_theirs(
    folder: str, scale: float | None, size: dict, batch: int, train: torch.Tensor, steps: int
) -> Contender:
    """A contender with model, optimizer and step of nanoGPT (bias=False, as in its train.py), or of nanochat
    with its learning rates times `scale`."""
    config = TrainConfig(**NANOGPT | size | dict(B=batch, max_steps=steps))
    torch.manual_seed(config.seed)
    sizes = {name: size[name] for name in ("n_layer", "n_head", "n_embd")} | dict(vocab_size=256)
    draw, cpu = window_loader(train, config).next_batch, torch.device("cpu")
    if scale is None:
        sizes |= dict(block_size=config.T, bias=False)
        theirs = NanoGPT(folder, cpu, lr=config.max_lr, beta2=config.beta2, **sizes)
        loss = partial(pair_loss, theirs.model)
    else:
        sizes |= dict(n_kv_head=size["n_head"], sequence_len=config.T)
        theirs = Nanochat(folder, cpu, scale, **sizes)
        loss = theirs.model

    def step(number: int) -> None:
        when = (learning_rate(number, config),) if scale is None else (number, steps)
        theirs.step(*draw(), *when)

    return Contender("", theirs.model, config, step, loss)


def race(contenders: list[Contender], validation: list[Data], rounds: int) -> list[list[float]]:
    """Train all. At each of `rounds` turns each trains its part of the steps or seconds, and is evaluated.
    Returns the last losses of each."""
    for turn in range(1, rounds + 1):
        for one in contenders:
            if one.budget is None:
                while one.done < one.config.max_steps * turn // rounds:
                    one.step((one.done + 0.5) / one.config.max_steps)
            else:
                start, until = one.seconds, one.budget * turn / rounds
                while one.seconds + one.last < until:  # there is time for one step
                    one.step((turn - 1 + (one.seconds - start) / (until - start)) / rounds)
            losses = [validation_loss(one, windows) for windows in validation]
            one.points.append((one.done, one.seconds, losses))
    return [one.points[-1][2] for one in contenders]


def bench_time_to_loss(options) -> list[dict]:
    """A row per recipe: the loss that it reaches in the same seconds. All schedules follow the clock."""
    if not options.text:
        raise ValueError("time_to_loss needs a text to train on: give --text FILE")
    if options.size not in SIZES:
        raise ValueError(f"size={options.size!r}: choose one of {', '.join(SIZES)}")
    train, val = split_text(options.text)
    size, (few, many) = SIZES[options.size], BATCHES[options.size]
    windows = draw_windows(val, WINDOWS, size["T"], torch.Generator().manual_seed(0))
    build = {}  # name: makes a contender, given its expected number of steps
    if options.nanogpt:
        build["nanoGPT"] = partial(build_theirs, options.nanogpt, None, size, few, train)
    for scale in SCALES if options.nanochat else ():
        name, folder = f"nanochat, rates x {scale:g}", options.nanochat
        build[name] = partial(build_theirs, folder, scale, size, many, train)
    for name in [n for n in RECIPES if n != "gpt2" or not options.nanogpt]:  # gpt2 is our nanoGPT
        fields = RECIPES[name] | size | dict(B=few, expert_hidden_size=size["n_embd"])
        if name != "gpt2":
            rate = fields["max_lr"] * 128 / size["n_embd"]
            fields |= dict(B=many, max_lr=rate, min_lr=rate / 10)
        build[name] = partial(build_ours, name, fields, train, 256)
    shares = {"modern": (0.15, 1.0), "modern-moe": (0.2, 1.0)}  # the short ones: to reach nanoGPT's loss
    cost = alternate({name: make(steps=15).step for name, make in build.items()}, torch.device("cpu"), 12)
    contenders = []
    for name, make in build.items():
        for share in shares.get(name, (1.0,)):
            seconds = share * options.seconds
            # The warmup of a schedule is a number of steps, so it needs the expected number.
            contenders.append(make(steps=max(1, int(seconds / cost[name]))))
            contenders[-1].name = name if share == 1 else f"{name}, {share} of the time"
            contenders[-1].budget = seconds
    race(contenders, [windows], ROUNDS)
    if options.png:
        draw_losses(contenders, options.png)
    first, (*_, (goal,)) = contenders[0].name, contenders[0].points[-1]
    rows = []
    for one in contenders:
        steps, seconds, (loss,) = one.points[-1]
        rows.append({
            "recipe": one.name, "parameters": f"{sum(p.numel() for p in one.model.parameters()):,}",
            "batch": one.config.B, "steps": steps, "ms/step": 1000 * seconds / max(steps, 1), "s": seconds,
            "loss": f"{loss:.3f}", f"below {first}": f"{goal - loss:.3f}",
            f"s to {goal:.3f}": seconds_to(one, goal)})  # fmt: skip
    return rows


def seconds_to(contender: Contender, goal: float) -> str:
    """Seconds until the loss first reached the goal, interpolated between evaluations; - if it never did."""
    if contender.points[0][2][0] <= goal:
        return f"< {contender.points[0][1]:.1f}"
    for (_, start, (above,)), (_, end, (below,)) in pairwise(contender.points):
        if below <= goal:
            return f"{start + (end - start) * (above - goal) / (above - below):.1f}"
    return "-"


def draw_losses(contenders: list[Contender], path: str) -> None:
    """Draw loss against seconds."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, last = figure.subplots(), contenders[0].points[-1][2][0]
    for one in contenders:
        axes.plot([p[1] for p in one.points], [p[2][0] for p in one.points], marker=".", label=one.name)
    axes.axhline(last, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per byte", ylim=(None, last + 1.2))
    axes.legend()
    figure.savefig(path, dpi=120)


def bench_moe_pays(options) -> list[dict]:
    """A row per model: validation losses on each corpus after equal tokens; how far below dense it is if all
    train anew, in turns, for the seconds that the dense one took. Mean and deviation over seeds."""
    corpora = {"embedded corpus": split_demo()}
    if options.text:
        corpora[Path(options.text).name] = split_text(options.text)
    train = torch.cat([part.short() for part, _ in corpora.values()])
    draw = partial(draw_windows, number=WINDOWS // 2, T=PAYS["T"])
    windows = [draw(val, generator=torch.Generator().manual_seed(0)) for _, val in corpora.values()]
    races, losses, in_time = [], [], []  # (seeds, models, ...): the losses after equal tokens, equal seconds
    for seed in range(SEED, SEED + options.seeds):
        races.append([build_ours(name, RIVALS[name], train, 257, options.steps, seed) for name in RIVALS])
        losses.append(race(races[-1], windows, ROUNDS // 2))
        seconds, again = races[-1][0].seconds, []
        for one in races[-1]:
            steps = max(1, int(options.steps * seconds / one.seconds))
            again.append(build_ours(one.name, RIVALS[one.name], train, 257, steps, seed))
            again[-1].budget = seconds
        in_time.append(race(again, windows, ROUNDS // 2))
    in_time, means, rows = np.mean(in_time, axis=-1), np.mean(losses, axis=-1, keepdims=True), []
    losses = np.append(losses, means, axis=-1)  # (seeds, models, corpora + 1)
    for number, one in enumerate(races[0]):
        tokens = one.config.max_steps * one.config.B * one.config.T
        row = {"model": one.name, "parameters": f"{one.model.get_num_params():,}",
               "active": f"{one.model.get_num_active_params():,}", "steps": one.done, "tokens": f"{tokens:,}",
               "s": sum(pair[number].seconds for pair in races) / len(races)}  # fmt: skip
        for column, corpus in enumerate([*corpora, "mean"]):
            dense, this = losses[:, 0, column], losses[:, number, column]  # (seeds,) each
            row |= {corpus: mean_and_spread(this), f"{corpus}: below dense": mean_and_spread(dense - this)}
        row["mean: below dense in its seconds"] = mean_and_spread(in_time[:, 0] - in_time[:, number])
        rows.append(row)
    return rows


def mean_and_spread(values) -> str:
    """Mean and, of several seeds, standard deviation."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
