"""llm.c's defaults, model names, files and forward-only run, for train_gpt_moe.py.

train_gpt_moe.py accepts the flags of llm.c's train_gpt2.py, and --preset llmc sets its defaults.
docs/huggingface.md lists what differs.

Reference: https://github.com/karpathy/llm.c/blob/master/train_gpt2.py"""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from llmc import files
from tokens.shards import DistributedDataLoader
from training import faults
from training.flags import setting
from training.optimizers import learning_rate
from training.terminal import tell


@dataclass
class Flags:
    """Settings that only llm.c has."""

    inference_only: bool = setting(False, "llm.c's: forward passes only; nothing is trained or saved")
    write_tensors: bool = setting(False, "llm.c's: write its files (llmc/files.py) into log_dir at the start")
    c_names: bool = setting(False, "with write_tensors: also write them under the names its C programs open")


# --model NAME: pretrained weights, or new weights of these sizes. Both are dense unless a flag adds experts.
MODELS = {name: dict(init_from=name) for name in files.LABELS}
SIZES = ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))  # layers, heads, channels
MODELS |= {f"d{L}": dict(n_layer=L, n_head=nh, n_embd=C, block_size=1024) for L, nh, C in SIZES}
PRESET = dict(  # --preset llmc: the defaults of llm.c's train_gpt2.py
    use_moe=False, model="gpt2", B=4, T=64, block_size=1024, vocab_size=-1, total_batch_size=256,
    shuffle=False, overfit_single_batch=True, max_steps=10, max_lr=1e-4, learning_rate_decay_frac=1.0,
    warmup_steps=0, weight_decay=0.0, infer_step=0, sample_every=0, prompt="", hellaswag=False,
    dtype="float32", tensorcores=False, flash=False, use_compile=False, write_tensors=True,
)  # fmt: skip


def writes_files(config: Any, resumes: Any) -> bool:
    """Whether a run with these settings writes llm.c's files: a new run that trains."""
    return config.write_tensors and not resumes and not config.inference_only


def check_flags(config: Any) -> None:
    """ValueError if the flags already show that a run cannot write llm.c's files."""
    if not writes_files(config, resumes=config.resume not in ("", "auto")):
        return
    if config.use_moe and not config.init_from:
        raise ValueError("write_tensors=True: llm.c has no experts, but use_moe=True; give --use_moe False")
    if config.parallel == "fsdp":
        raise ValueError("write_tensors=True needs a whole model, which parallel=fsdp does not keep; use ddp")
    if config.vocab_size == 0:  # only the files pad the vocabulary, so that losses agree with llm.c's
        config.vocab_size = -1


def prepare(run: Any) -> None:
    """Check the run before the log opens. ValueError for a model whose files llm.c could not read, and for
    forward passes that would be logged in place of a run's own steps."""
    run.trains, path, log_dir = not run.config.inference_only, run.resumed_from, run.config.log_dir
    if path and not run.trains and os.path.realpath(path.parent) == os.path.realpath(log_dir):
        mend = f"give another folder, too: --resume {path} --log_dir FOLDER"
        raise ValueError(f"inference_only=True would replace the log of the run in {log_dir}; {mend}")
    if writes_files(run.config, run.resumed):
        try:
            files.sizes_of(run.model.config)
            files.tokenizer_file(files.encoding_of(run.model.config))
        except ValueError as error:
            raise ValueError(f"write_tensors=True: {error}; or give --write_tensors 0") from error


def write_files(run: Any) -> None:
    """On the master: write model, debug state of the first batch, and tokenizer into log_dir."""
    config, model = run.config, run.model
    if not writes_files(config, run.resumed) or not run.layout.world.is_master:
        return
    data = DistributedDataLoader(run.train_loader.files, config.B, config.T, shuffle=False)
    x, y = data.next_batch()  # (B, T), (B, T)
    sized = {name for name, value in MODELS.get(config.model, {}).items() if getattr(config, name) != value}
    label = config.model if config.model and not sized else f"d{model.config.n_layer}"
    for path in files.write_all(model, x, y, config.log_dir, label, config.c_names):
        tell(f"wrote {path}")


def forward_step(run: Any, step: int) -> dict:
    """Replaces train_gpt_moe.train_step: the forward passes of a step, without gradients and update."""
    layout, device, start = run.layout, run.layout.world.device, time.perf_counter()
    run.model.train()
    torch.manual_seed(faults.dropout_seed(run.config.seed, step, layout.world.rank))
    losses = torch.zeros(3, device=device)  # sums of cross-entropy, balance loss, z-loss
    for _ in range(run.accumulation):
        x, y = faults.next_batch(run.train_loader)  # (B, T), (B, T)
        with run.autocast(), torch.no_grad():
            output = run.model(x, targets=y, position_ids=run.positions(x), return_dict=True)
            losses += output.loss_parts()
    faults.discard_routing(run.model)
    sums = layout.world.sum(torch.cat([losses, run.signals.take(device)])).tolist()
    run.signals.agree(sums[3:])
    loss, balance_loss, z_loss = (value / (layout.world.size * run.accumulation) for value in sums[:3])
    record = dict(step=step, loss=loss, balance_loss=balance_loss, z_loss=z_loss, norm=0.0)
    return record | {"lr": learning_rate(step, run.config), "seconds": time.perf_counter() - start}
