"""Training checkpoints: save, check, find, load; upcycling; export to Hugging Face folders.

    python checkpoint.py export log/model_19073.pt my_model                  # a folder for transformers
    python checkpoint.py export log/model_19073.pt my_gpt2 --format gpt2     # dense models: a stock GPT-2
    python checkpoint.py verify log/model_19073.pt

A checkpoint log/model_XXXXX.pt is a dictionary that torch.load reads under its safe default
(weights_only=True):
    model         state dict of GPT / GPTLMHeadModel (they are the same), tensors on the CPU
    config        GPTConfig.to_dict(): GPT(checkpoint["config"]) accepts it
    step          number of optimizer steps done
    val_loss      last validation loss, nats per token, or None
    optimizer     its state dict; loader: position in the data; rng: torch's state; train_config: all settings
    elapsed_s     seconds trained so far;  format: 1
Files appear by atomic rename only, so a killed run never leaves half a checkpoint under a checkpoint's name.
The file is a zip archive, and the CRC-32 in it for every tensor is checked before anything is loaded:
torch.load alone does not look at it. log/latest holds the name of the newest one.

References: Sparse Upcycling, arXiv 2212.05055.
"""

import argparse
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

from mixture_of_experts import MoE
from model import GPTConfig, GPTLMHeadModel

FORMAT = 1
NAME = re.compile(r"model_(\d{5,})\.pt")


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, is damaged, or was made by a newer version."""


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable (POSIX wants the folder fsynced; elsewhere this does nothing)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, write) -> None:
    """write(file) to a temporary file beside `path`, fsync, rename. What was at `path` stays until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def save_checkpoint(checkpoint: dict, folder: str | Path) -> Path:
    """Write folder/model_XXXXX.pt, XXXXX the step, and point folder/latest at it. OSError if it cannot."""
    path = Path(folder) / f"model_{checkpoint['step']:05d}.pt"
    write_atomically(path, lambda file: torch.save({**checkpoint, "format": FORMAT}, file))
    write_atomically(path.with_name("latest"), lambda file: file.write(path.name.encode()))
    return path


def verify_checkpoint(path: str | Path) -> None:
    """Read all of a checkpoint and compare it with its checksums. CheckpointError, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; `ls {path.parent}/model_*.pt` shows those there are"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint, or cut off: {error}. Use an earlier one") from error
    except Exception as error:  # zlib.error, struct.error ...: whatever a damaged archive provokes
        raise CheckpointError(f"{path}: damaged: {error}. Use an earlier one") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path}: checksum of {damaged!r} is wrong: the file is damaged. Use an earlier one"
        )


def load_checkpoint(path: str | Path) -> dict:
    """The verified dictionary, tensors on the CPU. CheckpointError says what is wrong; FileNotFoundError."""
    verify_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        message = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: torch.load cannot read it safely: {message}") from error
    if not isinstance(checkpoint, dict) or not {"model", "config", "step"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of train_gpt_moe.py: it lacks model, config or step")
    if checkpoint.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{path}: made by a newer version: its format is {checkpoint['format']}, this one reads {FORMAT}"
        )
    return checkpoint


def list_checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints in the folder, newest (most steps) first; they may be damaged."""
    found = [(int(m[1]), p) for p in Path(folder).glob("model_*.pt") if (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_checkpoint(folder: str | Path, warn=print) -> Path | None:
    """The newest undamaged checkpoint in the folder, or None; warn(message) for each damaged one."""
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
            return path
        except (CheckpointError, OSError) as error:
            warn(f"skipping {error}")
    return None


def model_from_checkpoint(checkpoint: dict) -> GPTLMHeadModel:
    """The model of a loaded checkpoint, in evaluation mode on the CPU."""
    model = GPTLMHeadModel(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def load_model(source: str | Path) -> GPTLMHeadModel:
    """A model from a checkpoint file, a folder (ours or Hugging Face's GPT-2) or a hub name such as "gpt2".

    Evaluation mode, CPU. CheckpointError, FileNotFoundError; what transformers raises for a bad folder or
    name.
    """
    if str(source).endswith((".pt", ".pth", ".bin")) or os.path.isfile(source):
        return model_from_checkpoint(load_checkpoint(source))
    return GPTLMHeadModel.from_pretrained(str(source)).eval()


@torch.no_grad()
def upcycle(dense: GPTLMHeadModel, config: GPTConfig) -> GPTLMHeadModel:
    """A dense model as a Mixture-of-Experts: every expert a copy of the MLP, logits unchanged at first
    (1e-5).

    Sparse Upcycling, arXiv 2212.05055. A router of almost zero weights chooses experts at random directions
    of the input while every score is equal to about 1e-6; where the weights of the chosen K do not sum to 1
    (K = 1, or norm_topk_prob=False), the copies are scaled by the inverse of that sum. What breaks the
    symmetry: each expert sees other tokens, so their gradients differ from the first step on.
    ValueError for a model that is no dense one, or an expert size that is not the MLP's.
    """
    if dense.config.use_moe:
        raise ValueError(
            "init_from: the model has experts already (use_moe=True); only dense ones are upcycled"
        )
    model = GPTLMHeadModel(config)
    source, target = dense.state_dict(), model.state_dict()
    E, K = config.num_experts, config.num_experts_per_tok
    if K > 1 and config.norm_topk_prob:
        scale = 1.0
    else:  # the inverse of the sum of K equal scores: 1/E each for softmax, 1/2 each for sigmoid
        scale = (E if config.router_score == "softmax" else 2) / K
    if config.num_shared_experts > 0:
        raise ValueError(
            f"num_shared_experts={config.num_shared_experts}: a shared expert would add to the dense output; "
            "upcycle with 0"
        )
    for layer, block in enumerate(model.transformer.h):
        if not isinstance(block.mlp, MoE):
            continue
        prefix = f"transformer.h.{layer}.mlp."
        for name in ("c_fc", "c_proj"):
            for suffix, stacked in (("weight", ""), ("bias", "_bias")):
                tensor = source.pop(f"{prefix}{name}.{suffix}", None)
                if tensor is None:
                    continue
                experts = target[f"{prefix}experts.{name}{stacked}"]
                if experts.shape[1:] != tensor.shape:
                    raise ValueError(
                        f"expert_hidden_size={config.expert_hidden_size}: experts {tuple(experts.shape[1:])} "
                        f"cannot copy an MLP {tuple(tensor.shape)}; leave it unset"
                    )
                experts.copy_(tensor * (scale if name == "c_proj" else 1.0))  # (E, ...) from (...)
        target[f"{prefix}gate.weight"].mul_(1e-7 / 0.02)
    missing = [name for name in source if name not in target or source[name].shape != target[name].shape]
    if missing:
        raise ValueError(
            f"init_from: {missing[0]} does not fit the new model; keep the dense model's architecture"
        )
    for name, tensor in source.items():
        target[name].copy_(tensor)
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Verify or export training checkpoints.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a Hugging Face folder")
    export.add_argument("checkpoint", help="log/model_XXXXX.pt, or a folder of ours")
    export.add_argument("folder", help="where to; it must not exist yet")
    export.add_argument("--format", default="gpt_moe", help="gpt_moe (any model) or gpt2 (dense GPT-2 only)")
    verify = commands.add_parser("verify", help="compare every byte with its checksum")
    verify.add_argument("checkpoint")
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            checkpoint = load_checkpoint(options.checkpoint)
            step, val_loss = checkpoint["step"], checkpoint.get("val_loss")
            print(f"{options.checkpoint}: undamaged, step {step}, validation loss {val_loss}")
        else:
            from convert import export_folder

            export_folder(load_model(options.checkpoint), options.folder, format=options.format)
            print(f"wrote {options.folder}")
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
