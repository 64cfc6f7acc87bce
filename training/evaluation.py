"""What a run measures between its steps: validation loss, a sample, HellaSwag.

All ranks take part. It is done eagerly and through the model itself, so that nothing of the training's graph
is compiled anew. `run` is train_gpt_moe.py's Run.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from fineweb import DistributedDataLoader
from hellaswag import HellaSwagUnavailable
from hellaswag import evaluate as score_hellaswag
from huggingface.convert import encode_prompt
from model import GPTLMHeadModel
from training import faults


def evaluate(
    run: Any,
    step: int,
    measures: bool,
    samples: bool,
    autocast: Callable,
    interrupted: Callable,
    progress: Any,
) -> dict | None:
    """val_loss, hella_acc and hella_acc_norm, as far as there are any, if `measures`; the text of a sample,
    under "sample", if `samples`. Tells them through progress (terminal.py).

    None as soon as interrupted(), which answers all ranks alike: whoever is told to stop shall save.
    """
    measured = {}
    with torch.compiler.set_stance("force_eager"):
        if measures and run.val_loader is not None:
            steps, world = run.config.val_steps, run.layout.world
            loss = validate(run.model, run.val_loader, steps, world, autocast, interrupted)
            if loss is None:
                return None
            measured["val_loss"] = loss
            progress.say(f"step {step}: validation loss {loss:.4f}")
            progress.experts(step, run.model)
        if samples:
            measured["sample"] = sample(run.model, run.config, step, autocast)
            progress.say(f"step {step}: sample: {measured['sample']!r}")
        if measures and run.hellaswag:
            accuracies = hellaswag(run, progress.say, interrupted)
            if accuracies is None:
                return None
            measured |= accuracies
    return measured


def evaluates_at(step: int, config: Any) -> bool:
    """Whether a run measures before this step (after the last one it always does)."""
    return config.infer_step > 0 and step % config.infer_step == 0


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: DistributedDataLoader,
    steps: int,
    world: Any,
    autocast: Callable,
    interrupted: Callable,
) -> float | None:
    """Mean cross-entropy, nats per token, of the first `steps` batches of every rank, always the same.

    None if interrupted(), which answers all ranks alike: whoever is told to stop shall save, not evaluate.
    """
    model.eval()
    loader.reset()
    total = torch.zeros((), device=world.device)  # sum of the batches' losses
    for _ in range(steps):
        if interrupted():
            return None
        x, y = faults.next_batch(loader)  # (B, T), (B, T)
        with autocast():
            total += model(x, targets=y, return_dict=True).loss
    return world.sum(total).item() / (steps * world.size)


def sample(model: GPTLMHeadModel, config: Any, step: int, autocast: Callable) -> str:
    """Text after the prompt; the same on all ranks, and at every run of the same step."""
    torch.manual_seed((config.seed + step) % 2**63)
    how = dict(max_new_tokens=config.sample_tokens, do_sample=True, top_k=50)
    if config.parallel == "fsdp" or config.ep_size > 1:
        how["synced_gpus"] = True  # no rank ends while another needs its part of the model
    with autocast():
        return model.generate(config.prompt, **how)


def cannot_sample(model: GPTLMHeadModel, config: Any) -> str:
    """Why no text can be sampled, where the tokens of the prompt cannot be had; "" if all is well."""
    try:
        encode_prompt(config.prompt, model.config)
    except (ValueError, OSError) as error:  # no network, and no tokens from an earlier time
        return " ".join(str(error).split())
    return ""


def hellaswag(run: Any, say: Callable, interrupted: Callable) -> dict[str, float] | None:
    """Accuracies over all ranks; none, and no second try, where the questions cannot be had.

    None if interrupted(), as in `validate`.
    """
    config, world = run.config, run.layout.world
    try:
        result = score_hellaswag(
            run.model, config.hellaswag_data or None, limit=config.hellaswag_limit or None, rank=world.rank,
            world_size=world.size, autocast=None if run.dtype == "float32" else getattr(torch, run.dtype),
            interrupted=interrupted,
        )  # fmt: skip
    except (HellaSwagUnavailable, ValueError) as error:
        run.hellaswag = False
        say(f"no HellaSwag in this run: {error}")
        return {}
    if result is None:
        return None
    say(f"HellaSwag {result.acc_norm:.4f} per token, {result.acc:.4f} plain, of {result.n:,} questions")
    return {"hella_acc": result.acc, "hella_acc_norm": result.acc_norm}
