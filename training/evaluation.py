"""What a run measures between its steps: validation loss, a sample, HellaSwag.

All ranks take part. The model runs uncompiled and unwrapped here, so that torch.compile builds no further
graph. `run` is training/setup.py's Run throughout.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hellaswag import evaluate as score_hellaswag
from huggingface.text import encode_prompt
from layers.attention import without_cudnn
from model import GPTLMHeadModel
from tokens.encodings import token_bytes
from tokens.mixtures import parse_named, source_names
from tokens.shards import DistributedDataLoader, find_shards
from training import faults


def validation_sets(config: Any, weights: Mapping[str, Any], arguments: dict) -> dict:
    """{name: (loader, its share in val_loss)} of the data's validation shards (weights: of its folders; a
    single folder has the name "") and of --val, whose first set is the main one if the data has none.
    arguments: for the loaders. FileNotFoundError if without --val a folder has no validation shards."""
    found = {"": (config.input_val_bin, 1)} if config.input_val_bin else {}  # {name: (shards, weight)}
    named, weights = parse_named(config.val), {} if found else weights
    names = source_names(list(weights)) if len(weights) > 1 else [""] * len(weights)
    for name, (folder, weight) in zip(names, weights.items(), strict=True):
        try:
            found[name] = find_shards(folder, "val"), weight
        except FileNotFoundError:
            if not named:
                raise
    for name, folder in named.items():
        if name in found:
            raise ValueError(f"val={config.val!r}: {name!r} is a source's name; choose another one")
        found[name] = find_shards(folder, "val"), 0 if found else 1
    # A fixed seed shuffles validation: its batches come from the whole shard, and are equal in every run.
    arguments = arguments | dict(seed=0, shuffle=config.shuffle or config.val_steps == 0, shift=False)
    total = sum(weight for _, weight in found.values())
    return {k: (DistributedDataLoader(v, **arguments), float(w / total)) for k, (v, w) in found.items()}


def evaluate(run: Any, step: int, measures: bool, samples: bool, interrupted: Callable[[], bool],
             terminal: Any) -> dict | None:  # fmt: skip
    """val_loss, val_bpb, hella_acc, hella_acc_norm, diagnostics if `measures` and the run has them, and
    "eval_step"; a "sample" if `samples`. `terminal` shows them. None as soon as interrupted() is true (on all
    ranks alike), because the run must then save and stop."""
    if not (measures or samples):
        return {}
    measured: dict[str, Any] | None = {}
    with torch.compiler.set_stance("force_eager"), without_cudnn(), terminal.during("evaluating"):
        if measures and run.val_sets:
            with run.diagnostics.watching(run.model):
                measured = validate(run, interrupted)
            if measured is None:
                return None
            terminal.evaluation(step, measured)
        if measures and run.trains:
            terminal.experts(step, run.model)
        if samples and run.samples:
            try:
                measured["sample"] = sample(run, step)
                indented = measured["sample"].replace("\n", "\n    ")
                terminal.say(f"step {step}: sample\n    {indented}")
            except FloatingPointError as error:  # the run diverges
                terminal.say(f"step {step}: no sample: {error}")
        if measures and run.hellaswag:
            if (accuracies := hellaswag(run, terminal, interrupted)) is None:
                return None
            measured |= accuracies
        if measures and run.trains:
            measured |= run.diagnostics.evaluation(run.model)
    return measured | ({"eval_step": step} if measured.keys() - {"sample"} else {})


def evaluates_at(step: int, config: Any) -> bool:
    """Whether a run measures before this step; it always measures after the last step."""
    return step == config.max_steps or (config.infer_step > 0 and step % config.infer_step == 0)


def samples_at(step: int, config: Any) -> bool:
    """Whether a run samples text before this step, or after the last one."""
    every = config.infer_step if config.sample_every < 0 else config.sample_every
    return every > 0 and (step % every == 0 or step == config.max_steps)


@torch.no_grad()
def validate(run: Any, interrupted: Callable[[], bool]) -> dict[str, float] | None:
    """val_loss and val_bpb, and val_loss/NAME and val_bpb/NAME of every named set; None if interrupted().

    val_loss: sum of the targets' cross-entropies / number of targets, in nats per token; of a mixture it is
    the mean over the sources by their weights.
    val_bpb: sum of the targets' cross-entropies / (ln 2 * bytes of text that the targets stand for), in bits
    per byte. <|endoftext|> stands for 0 bytes, but its cross-entropy counts: models must also predict the end
    of a text (nanochat's loss_eval.py leaves it out). There is none without run.token_bytes.
    """
    means = {"": np.zeros(2)}  # nats and bytes per token, of the main set and by the names of the others
    for name, (loader, share) in run.val_sets.items():
        if (mean := measure(run, loader, interrupted)) is None:
            return None
        means[""] += share * np.array(mean) if share else 0  # 0 * NaN would be NaN
        means |= {f"/{name}": mean} if name else {}
    measured = {f"val_loss{name}": float(nats) for name, (nats, _) in means.items()}
    bits = {name: nats / (math.log(2) * text) for name, (nats, text) in means.items() if text}
    return measured | {f"val_bpb{name}": float(value) for name, value in bits.items()}


def measure(run: Any, loader: Any, interrupted: Callable[[], bool]) -> tuple[float, float] | None:
    """Nats and bytes of text per target, over all ranks' first val_steps batches, or with val_steps=0 over
    every window once; None if interrupted(). Bytes are 0 without run.token_bytes."""
    model, world = run.model, run.layout.world
    model.eval()
    loader.reset()
    samples = run.config.val_steps * loader.B * loader.world_size or loader.samples_per_epoch
    exact = torch.float32 if world.device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.zeros((), device=world.device, dtype=exact)  # sum of the batches' losses
    text = torch.zeros((), device=world.device, dtype=torch.long)  # bytes
    while loader.position < samples:
        if interrupted():
            return None
        rows = max(0, min(loader.B, samples - loader.position - loader.rank * loader.B))
        x, y = faults.next_batch(loader)  # (B, T), (B, T)
        y[rows:] = -1  # of the next epoch: the loss ignores them
        with run.autocast():
            loss = model(x, targets=y, position_ids=run.positions(x), return_dict=True).loss
        if rows:  # without any target the loss is NaN
            total += loss * (rows / loader.B)
        if run.token_bytes is not None:
            text += run.token_bytes[y[:rows]].sum()
    batches = samples / loader.B
    return world.sum(total).item() / batches, world.sum(text).item() / (batches * y.numel())


def table_of_bytes(meta: dict, layout: Any) -> torch.Tensor | None:
    """Bytes by token id, (vocabulary,), of data with this meta.json; None if a rank does not know them."""
    table = torch.zeros(0)
    with contextlib.suppress(ValueError, OSError):  # no such name; no network, and no earlier download
        table = torch.from_numpy(token_bytes(meta["encoding"])).to(layout.world.device)
    return None if layout.any(len(table) < meta["vocab_size"]) else table


def sample(run: Any, step: int) -> str:
    """Text that continues the prompt; equal on all ranks, and equal whenever this step is repeated."""
    config = run.config
    torch.manual_seed((config.seed + step) % 2**63)
    how = dict(max_new_tokens=config.sample_tokens, do_sample=True, top_k=50)
    together = run.layout.shares_parameters or None  # no rank stops while another needs its part of the model
    with run.autocast():
        return run.model.generate(config.prompt, synced_gpus=together, **how)


def can_sample(config: Any, model: GPTLMHeadModel, layout: Any, say: Callable[[str], None]) -> bool:
    """Whether samples are wanted and all ranks can encode the prompt; prints the reason if one cannot."""
    if config.sample_every == 0:
        return False
    problem = ""
    try:
        encode_prompt(config.prompt, model.config)
    except (ValueError, OSError) as error:  # no network, and no earlier download
        problem = " ".join(str(error).split())
    if fails := layout.any(bool(problem)):
        say(f"no samples in this run: {problem or 'another process cannot encode the prompt'}")
    return not fails


def hellaswag(run: Any, terminal: Any, interrupted: Callable) -> dict[str, float] | None:
    """Accuracies over all ranks; None if interrupted(); {} if the model gives NaN, or without the questions,
    and then there is no later try."""
    config, world, say = run.config, run.layout.world, terminal.say
    how = dict(limit=config.hellaswag_limit or None, rank=world.rank, world_size=world.size)
    how |= dict(autocast=None if run.dtype == "float32" else getattr(torch, run.dtype))
    how |= dict(progress=lambda done, n: terminal.show(f"HellaSwag {done:,}/{n:,}"), interrupted=interrupted)
    try:
        result = score_hellaswag(run.model, config.hellaswag_data or None, **how)
    except FloatingPointError as error:
        say(f"no HellaSwag at this step: {error}")
        return {}
    except (OSError, ValueError) as error:  # HellaSwagUnavailable, a name that is too long, bad questions
        run.hellaswag = False
        say(f"no HellaSwag in this run: {error}")
        return {}
    if result is None:
        return None
    say(f"HellaSwag {result.acc_norm:.4f} per token, {result.acc:.4f} plain, of {result.n:,} questions")
    return {"hella_acc": result.acc, "hella_acc_norm": result.acc_norm}
