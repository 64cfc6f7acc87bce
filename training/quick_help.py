"""--help and mistyped flags of train_gpt_moe.py, answered in well under a second.

    if __name__ == "__main__":
        answer(__file__, sys.argv[1:])

Importing torch takes seconds. So this file imports nothing that needs torch, and reads the settings from the
source text of the script. training/flags.py parses the flags."""

import ast
import difflib
import itertools
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from tokens.printable import print_error

# What users of nanoGPT, nanochat, llm.c and Hugging Face type: our flag, and how it differs.
SYNONYMS = {
    "lr": "max_lr", "lr_decay_iters": "max_steps", "decay_lr": "schedule", "lr_scheduler_type": "schedule",
    "max_iters": "max_steps", "steps": "max_steps", "num_steps": "max_steps",
    "epochs": "max_steps, in steps of total_batch_size tokens",
    "num_train_epochs": "max_steps, in steps of total_batch_size tokens",
    "warmup_ratio": "warmup_steps", "wd": "weight_decay", "max_grad_norm": "grad_clip",
    "gradient_accumulation_steps": "total_batch_size, in tokens: B * T * processes * accumulation",
    "grad_accum_steps": "total_batch_size, in tokens: B * T * processes * accumulation",
    "device_batch_size": "B", "micro_batch_size": "B", "per_device_train_batch_size": "B",
    "seq_len": "T", "max_seq_len": "T", "context_length": "T", "eval_interval": "infer_step",
    "eval_every": "infer_step", "eval_steps": "infer_step", "eval_iters": "val_steps",
    "save_every": "checkpoint_every", "save_steps": "checkpoint_every", "save_interval": "checkpoint_every",
    "save_total_limit": "keep_last", "logging_steps": "log_every", "log_interval": "log_every",
    "bf16": "dtype bfloat16", "fp16": "dtype float16", "out_dir": "log_dir", "dataset": "data_dir",
    "wandb_log": "wandb", "report_to": "wandb or --tensorboard", "num_layers": "n_layer",
    "n_layers": "n_layer", "num_heads": "n_head", "n_heads": "n_head", "hidden_size": "n_embd",
    "d_model": "n_embd",
    "n_experts": "num_experts", "top_k": "num_experts_per_tok", "n_exp": "num_experts",
    "aux_loss_coef": "moe_loss_coef", "router_aux_loss_coef": "moe_loss_coef", "resume_from": "resume",
    "resume_from_checkpoint": "resume", "gradient_checkpointing": "activation_checkpointing block",
}  # fmt: skip


class Flag(NamedTuple):
    """A setting as its line in the dataclass gives it."""

    group: str
    name: str
    aliases: list[str]


def read_flags(script: str | Path) -> list[Flag]:
    """The fields of the script's class TrainConfig, grouped by the comments `# --- GROUP` above them, then
    the fields of llmc/trainer.py's class Flags, from which it inherits."""
    found = []
    for path, first in ((Path(script), "general"), (Path(script).parent / "llmc" / "trainer.py", "llm.c's")):
        text = path.read_text(encoding="utf-8")
        lines, group = text.splitlines(), first
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        (fields,) = (node.body for node in classes if node.name in ("TrainConfig", "Flags"))
        for before, node in itertools.pairwise(fields):
            between = "\n".join(lines[before.end_lineno : node.lineno])
            banner = re.search(r"# --- ([\w, ]+)", between)
            group = banner[1] if banner else group
            if isinstance(node, ast.AnnAssign):
                texts = [argument.value for argument in node.value.args if isinstance(argument, ast.Constant)]
                aliases = [text for text in texts if isinstance(text, str) and text.startswith("--")]
                found.append(Flag(group, node.target.id, aliases))
    return found


def short_help(script: str | Path) -> str:
    """How to use the script, and the names of all flags by group, in about 40 lines."""
    text = Path(script).read_text(encoding="utf-8")
    purpose, examples, *_ = ast.get_docstring(ast.parse(text)).split("\n\n")
    width = min(110, shutil.get_terminal_size().columns)
    groups: dict[str, list[str]] = {}
    for flag in read_flags(script):
        groups.setdefault(flag.group, []).append(f"--{flag.name}")
    lines = [purpose, "", examples.rstrip(), "", "Flags; each is a constant of the same name in the script:"]
    for group, names in groups.items():
        begin = f"  {group}: "
        lines += textwrap.wrap(" ".join(names), width, initial_indent=begin, subsequent_indent="      ",
                               break_on_hyphens=False)  # fmt: skip
    lines += ["", "--help WORD explains the flags that have to do with WORD, --help all explains all."]
    return "\n".join(lines)


def unknown_flag(arguments: list[str], names: set[str]) -> str:
    """What is wrong with the first flag that is none of `names` (without --); "" if all are known."""
    for argument in arguments:
        name = argument[2:].split("=")[0].replace("-", "_")
        if not argument.startswith("--") or {name, name.removeprefix("no_")} & names:
            continue
        if name in SYNONYMS:
            return f"--{name} is called --{SYNONYMS[name]} here"
        near = difflib.get_close_matches(name, names, 1)
        return f"--{name} is no flag; " + (f"did you mean --{near[0]}?" if near else "--help lists all flags")
    return ""


def answer(script: str, arguments: list[str]) -> None:
    """End the process, with the short help if that is asked for, or with an error for an unknown flag."""
    if arguments in (["--help"], ["-h"]):
        print(short_help(script))
        sys.exit(0)
    if "--help" in arguments:  # --help WORD
        return
    flags = read_flags(script)
    names = {flag.name for flag in flags} | {alias[2:] for flag in flags for alias in flag.aliases}
    if wrong := unknown_flag(arguments, names):
        print_error(Path(script).name, wrong)
        sys.exit(2)
