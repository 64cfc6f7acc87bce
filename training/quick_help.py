"""--help and mistyped flags of train_gpt_moe.py, answered in well under a second.

    if __name__ == "__main__":
        answer(__file__, sys.argv[1:])

Importing torch takes seconds. So this file imports nothing that needs torch, and reads the settings from the
source text of the script. training/flags.py parses the flags."""

import ast
import difflib
import re
import shutil
import sys
import textwrap
from pathlib import Path

from tokens.printable import print_error

# Our flag, and how it differs: what users of nanoGPT, nanochat, llm.c and Hugging Face type.
OURS = {
    "max_lr": "lr", "schedule": "decay_lr lr_scheduler_type", "warmup_steps": "warmup_ratio",
    "max_steps": "max_iters lr_decay_iters steps num_steps", "weight_decay": "wd",
    "max_steps, in steps of total_batch_size tokens": "epochs num_train_epochs",
    "total_batch_size, in tokens: B * T * processes * accumulation":
        "gradient_accumulation_steps grad_accum_steps",
    "B": "device_batch_size micro_batch_size per_device_train_batch_size", "grad_clip": "max_grad_norm",
    "T": "seq_len max_seq_len context_length", "infer_step": "eval_interval eval_every eval_steps",
    "val_steps": "eval_iters", "checkpoint_every": "save_every save_steps save_interval",
    "keep_last": "save_total_limit", "log_every": "logging_steps log_interval", "dtype bfloat16": "bf16",
    "dtype float16": "fp16", "log_dir": "out_dir", "data_dir": "dataset", "wandb": "wandb_log",
    "wandb or --tensorboard": "report_to", "n_layer": "num_layers n_layers", "n_head": "num_heads n_heads",
    "n_embd": "hidden_size d_model", "num_experts": "n_experts n_exp", "num_experts_per_tok": "top_k",
    "moe_loss_coef": "aux_loss_coef router_aux_loss_coef", "resume": "resume_from resume_from_checkpoint",
    "activation_checkpointing block": "gradient_checkpointing"}  # fmt: skip
SYNONYMS = {theirs: ours for ours, names in OURS.items() for theirs in names.split()}


def read_flags(script: str | Path) -> dict[str, dict[str, list[str]]]:
    """{group: {flag: its aliases}}: the fields of the script's class TrainConfig, a line each, grouped by the
    comments `# --- GROUP` above them, then those of llmc/trainer.py's class Flags, from which it inherits."""
    found: dict[str, dict[str, list[str]]] = {}
    for path, group in ((Path(script), "general"), (Path(script).parent / "llmc" / "trainer.py", "llm.c's")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if banner := re.match(r"    # --- ([\w, ]+)", line):
                group = banner[1]
            elif field := re.match(r"    (\w+): .* = setting\(", line):
                found.setdefault(group, {})[field[1]] = re.findall(r'"(--\w+)"', line)
    return found


def short_help(script: str | Path) -> str:
    """How to use the script, and the names of all flags by group, in about 40 lines."""
    text = Path(script).read_text(encoding="utf-8")
    purpose, examples, *_ = ast.get_docstring(ast.parse(text)).split("\n\n")
    width = min(110, shutil.get_terminal_size().columns)
    lines = [purpose, "", examples.rstrip(), "", "Flags; each is a constant of the same name in the script:"]
    for group, flags in read_flags(script).items():
        begin, names = f"  {group}: ", " ".join(f"--{name}" for name in flags)
        lines += textwrap.wrap(names, width, initial_indent=begin, subsequent_indent="      ",
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
    flags = {name: aliases for group in read_flags(script).values() for name, aliases in group.items()}
    names = flags.keys() | {alias[2:] for aliases in flags.values() for alias in aliases}
    if wrong := unknown_flag(arguments, names):
        print_error(Path(script).name, wrong)
        sys.exit(2)
