"""Read checkpoints of nanoGPT (ckpt.pt) and of build-nanogpt (model_XXXXX.pt) as checkpoints of ours.

    python sample.py --checkpoint out/ckpt.pt            # so do checkpoint.py, hellaswag.py and --init_from
    python train_gpt_moe.py --resume out/ckpt.pt --data_dir FOLDER       # nanoGPT's: with AdamW's moments

Their weights have our names and shapes. docs/huggingface.md says what a resumed run keeps.
Sources: model.py and train.py of github.com/karpathy/nanoGPT, train_gpt2.py of its build-nanogpt."""

import contextlib
from typing import Any

import torch

from layers.roles import role_of

# Settings of nanoGPT's train.py that have another name here, or the same.
SETTINGS = {
    "learning_rate": "max_lr", "min_lr": "min_lr", "warmup_iters": "warmup_steps", "max_iters": "max_steps",
    "weight_decay": "weight_decay", "beta1": "beta1", "beta2": "beta2", "grad_clip": "grad_clip",
    "batch_size": "B", "block_size": "T", "eval_interval": "infer_step", "eval_iters": "val_steps",
    "dropout": "dropout"}  # fmt: skip


class GPTConfigFields:
    """Stands for build-nanogpt's dataclass, which its checkpoints pickle: the fields, and no code."""


def without_code() -> contextlib.AbstractContextManager:
    """In this block torch.load reads build-nanogpt's GPTConfig as GPTConfigFields, and still runs no code."""
    return torch.serialization.safe_globals([(GPTConfigFields, "__main__.GPTConfig")])


def from_nanogpt(content: Any) -> Any:
    """A checkpoint of ours for the content of one of theirs. Anything else is returned as it is. Raises any
    error for a damaged one; the caller checks all entries of the result."""
    pickled = isinstance(content, dict) and isinstance(content.get("config"), GPTConfigFields)
    if not pickled and not (isinstance(content, dict) and "model_args" in content):
        return content
    weights = {  # torch.compile adds the prefix; without fused attention, attn.bias is the causal mask
        name.removeprefix("_orig_mod."): tensor
        for name, tensor in content["model"].items()
        if not name.endswith(".attn.bias")
    }
    fields = dict(vars(content["config"]) if pickled else content["model_args"], use_moe=False)
    fields["tie_word_embeddings"] = torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"])
    gpt2 = 50257 <= fields["vocab_size"] <= 50304
    fields |= dict(encoding="gpt2" if gpt2 else "nanogpt", encoding_size=50257 if gpt2 else None)
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"), 50256 if gpt2 else None)
    if pickled:
        fields["activation"] = "gelu"
        return {"model": weights, "config": fields, "step": content["step"], "val_loss": content["val_loss"]}
    step, optimizer = content["iter_num"], rename_moments(content.get("optimizer"), weights)
    # In May 2023, nanoGPT changed its optimizer's groups, and then the form of its GELU.
    fields["activation"] = "gelu" if optimizer is None and "optimizer" in content else "gelu_erf"
    ours = {"model": weights, "config": fields, "step": step, "val_loss": float(content["best_val_loss"])}
    if optimizer is not None and "config" in content:
        ours |= dict(optimizer=optimizer, val_loss_step=step, rng=torch.get_rng_state(), elapsed_s=0.0)
        ours |= dict(health=dict(bad_steps=0, in_a_row=0, seen=0, mean=0.0, variance=0.0))
        ours["train_config"], sequences = convert_settings(content["config"])
        ours["loader"] = {"position": step * sequences}  # nanoGPT draws at random: no sample is the next one
    return ours


def rename_moments(optimizer: Any, weights: dict[str, torch.Tensor]) -> dict | None:
    """nanoGPT's optimizer state under the numbers of our parameters; None if its groups are older."""
    names = [name for name in weights if name != "lm_head.weight"]  # tied: the optimizer has it once
    matrices = [name for name in names if weights[name].dim() >= 2]
    others = [name for name in names if weights[name].dim() < 2]
    sizes = [len(matrices), len(others)]
    if optimizer is None or [len(group["params"]) for group in optimizer["param_groups"]] != sizes:
        return None
    state = {name: optimizer["state"].get(number) for number, name in enumerate(matrices + others)}
    names.sort(key=lambda name: role_of(name).decays)  # the order of layers/roles.py's parameter_groups
    numbers = list(range(len(names)))
    groups = [{"params": numbers[: len(others)]}, {"params": numbers[len(others) :]}]
    found = {number: state[name] for number, name in enumerate(names) if state[name] is not None}
    return {"state": found, "param_groups": groups}


def convert_settings(theirs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(settings of our run, sequences per optimizer step) for nanoGPT's settings."""
    settings = {ours: theirs[name] for name, ours in SETTINGS.items()}
    sequences = theirs["gradient_accumulation_steps"] * theirs["batch_size"]  # of all processes
    if not theirs["decay_lr"]:
        settings |= dict(min_lr=settings["max_lr"], warmup_steps=0)
    return settings | dict(total_batch_size=sequences * settings["T"], optimizer="adamw"), sequences
