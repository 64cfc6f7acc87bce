"""What a run measures between its steps: validation loss, a sample, HellaSwag.

All ranks take part. The model runs uncompiled and unwrapped here, so that torch.compile builds no further
graph. `run` is training/setup.py's Run throughout.
"""

from collections.abc import Callable
from typing import Any

import torch

from hellaswag import evaluate as score_hellaswag
from huggingface.text import encode_prompt
from model import GPTLMHeadModel
from training import faults


def evaluate(
    run: Any, step: int, measures: bool, samples: bool, interrupted: Callable[[], bool], terminal: Any
) -> dict | None:
    """val_loss, hella_acc, hella_acc_norm if `measures` and the run has them; a "sample" if `samples`. None
    as soon as interrupted() is true (on all ranks alike), because the run must then save and stop."""
    measured = {}
    with torch.compiler.set_stance("force_eager"):
        if measures and run.val_loader is not None:
            if (loss := validate(run, interrupted)) is None:
                return None
            measured["val_loss"] = loss
            terminal.say(f"step {step}: validation loss {loss:.4f}")
            if run.trains:
                terminal.experts(step, run.model)
        if samples and run.samples:
            try:
                measured["sample"] = sample(run, step)
                indented = measured["sample"].replace("\n", "\n    ")
                terminal.say(f"step {step}: sample\n    {indented}")
            except FloatingPointError as error:  # the run diverges
                terminal.say(f"step {step}: no sample: {error}")
        if measures and run.hellaswag:
            if (accuracies := hellaswag(run, terminal.say, interrupted)) is None:
                return None
            measured |= accuracies
    return measured


def evaluates_at(step: int, config: Any) -> bool:
    """Whether a run measures before this step; it always measures after the last step."""
    return step == config.max_steps or (config.infer_step > 0 and step % config.infer_step == 0)


def samples_at(step: int, config: Any) -> bool:
    """Whether a run samples text before this step, or after the last one."""
    every = config.infer_step if config.sample_every < 0 else config.sample_every
    return every > 0 and (step % every == 0 or step == config.max_steps)


@torch.no_grad()
def validate(run: Any, interrupted: Callable[[], bool]) -> float | None:
    """Mean cross-entropy, nats per token, of every rank's first val_steps batches; None if interrupted()."""
    model, loader, world, steps = run.model, run.val_loader, run.layout.world, run.config.val_steps
    model.eval()
    loader.reset()
    total = torch.zeros((), device=world.device)  # sum of the batches' losses
    for _ in range(steps):
        if interrupted():
            return None
        x, y = faults.next_batch(loader)  # (B, T), (B, T)
        with run.autocast():
            total += model(x, targets=y, return_dict=True).loss
    return world.sum(total).item() / (steps * world.size)


def sample(run: Any, step: int) -> str:
    """Text that continues the prompt; equal on all ranks, and equal whenever this step is repeated."""
    config = run.config
    torch.manual_seed((config.seed + step) % 2**63)
    how = dict(max_new_tokens=config.sample_tokens, do_sample=True, top_k=50)
    together = run.layout.shares_parameters or None  # no rank stops while another needs its part of the model
    with run.autocast():
        return run.model.generate(config.prompt, synced_gpus=together, **how)


def cannot_sample(model: GPTLMHeadModel, config: Any) -> str:
    """The reason why the prompt cannot be encoded; "" if it can."""
    try:
        encode_prompt(config.prompt, model.config)
    except (ValueError, OSError) as error:  # no network, and no earlier download
        return " ".join(str(error).split())
    return ""


def hellaswag(run: Any, say: Callable, interrupted: Callable) -> dict[str, float] | None:
    """Accuracies over all ranks; None if interrupted(); {} if the model gives NaN, or without the questions,
    and then there is no later try."""
    config, world = run.config, run.layout.world
    try:
        result = score_hellaswag(
            run.model, config.hellaswag_data or None, limit=config.hellaswag_limit or None, rank=world.rank,
            world_size=world.size, autocast=None if run.dtype == "float32" else getattr(torch, run.dtype),
            interrupted=interrupted,
        )  # fmt: skip
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
