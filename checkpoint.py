"""Work with training checkpoints (docs/formats.md): verify, list, average, convert, export.

python checkpoint.py export log/model_19073.pt my_model                  # a folder for transformers
python checkpoint.py export log/model_19073.pt my_gpt2 --format gpt2     # a stock GPT-2; more: --help
python checkpoint.py verify log/model_19073.pt                           # compare all bytes with checksums
python checkpoint.py list log                                            # step, date, size, validation loss
python checkpoint.py average log averaged.pt --last 5                    # the mean of the newest weights
python checkpoint.py convert log/model_19073 log/model_19073.pt          # a folder to a file, or back"""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import sys
import time
from pathlib import Path

import torch

from huggingface.export import export_folder
from tokens.files import write_atomically
from tokens.printable import print_error, printable
from training import checkpoints as ckpt
from training import sharded


def print_list(folder: Path) -> None:
    """A line per checkpoint of a run: step, date, size, the validation loss of that step in log.txt, in nats
    per token and in bits per byte. FileNotFoundError if there is none."""
    losses = [ckpt.validation_losses(folder, word) for word in ("val", "val_bpb")]
    if not (found := ckpt.list_checkpoints(folder)):
        raise FileNotFoundError(f"{folder}: no checkpoint; `ls -d log*/model_* log/*/model_*` finds some")
    print(f"{'step':>8}  {'saved':16}  {'MB':>9}  {'val loss':>8}  {'bits/byte':>9}  checkpoint")
    for path in found:
        files = [file.stat() for file in (path, *path.glob("*")) if file.is_file()]
        changed = max((file.st_mtime for file in files), default=0)  # a pipe or a device has no files
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
        size, step = sum(file.st_size for file in files) / 1e6, ckpt.step_of(path)
        val_loss, bits = (f"{known[step]:.4f}" if step in known else "-" for known in losses)
        print(f"{step:8}  {date}  {size:9,.1f}  {val_loss:>8}  {bits:>9}  {printable(path)}")


def average(folder: Path, last: int) -> dict:
    """The mean of the weights of a run's newest checkpoints, as a checkpoint without an optimizer. While the
    learning rate is constant it is nearly as good as the weights after a decay (LAWA, arXiv 2209.14981).
    ValueError if there are fewer than `last` checkpoints, or two of them are of different models."""
    found = ckpt.list_checkpoints(folder)
    if len(found) < 2:
        mend = "save more of them with --checkpoint_every"
        raise ValueError(f"{folder}: a mean needs 2 checkpoints or more, but there are {len(found)}; {mend}")
    if not 2 <= last <= len(found):
        raise ValueError(f"last={last}: {folder} has {len(found)} checkpoints; give --last 2 to {len(found)}")
    paths = found[:last]
    newest = ckpt.load_checkpoint(paths[0])
    mean, config = newest["model"], newest["config"]
    for number, path in enumerate(paths[1:], 2):
        older = ckpt.load_checkpoint(path)
        unlike = [n for n, v in older["config"].items() if v != config.get(n) and n not in ckpt.MAY_CHANGE]
        if unlike:
            what = f"{path} has {unlike[0]}={older['config'][unlike[0]]!r}, {paths[0]} {config[unlike[0]]!r}"
            raise ValueError(f"{what}; lower --last, so that all checkpoints are of one model")
        for name, value in older["model"].items():
            if value.is_floating_point():
                mean[name] = mean[name].lerp(value, 1 / number)
    if config["tie_word_embeddings"]:
        mean["lm_head.weight"] = mean["transformer.wte.weight"]
    return {name: newest[name] for name in ("model", "config", "step", "tokenizer") if name in newest}


def write_checkpoint(checkpoint: dict, to: Path) -> None:
    """Write a file if the name ends with .pt, otherwise a folder. FileExistsError."""
    if to.exists():
        raise FileExistsError(f"{to} exists already; give another name")
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".pt":
        write_atomically(to, lambda file: torch.save(checkpoint, file))
    else:
        sharded.save(checkpoint, to)
    print(f"wrote {printable(to)}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for a bad checkpoint or folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a Hugging Face folder")
    export.add_argument("checkpoint", help="log/model_XXXXX.pt, or a folder log/model_XXXXX")
    export.add_argument("folder", help="folder to write: new, empty, or an earlier export")
    formats = "gpt_moe (any model); stock: gpt2, llama, qwen3 (dense), mixtral, qwen3_moe (with experts)"
    export.add_argument("--format", default="gpt_moe", help=formats)
    export.add_argument("--tokenizer", action=argparse.BooleanOptionalAction, default=True,
                        help="add a tokenizer's files")  # fmt: skip
    commands.add_parser("verify", help="compare every byte with its checksum").add_argument("checkpoint")
    listing = commands.add_parser("list", help="show the checkpoints of a run, newest first")
    listing.add_argument("folder", help="log_dir of the run")
    convert = commands.add_parser("convert", help="write a checkpoint in the other form")
    convert.add_argument("checkpoint", help="a file log/model_XXXXX.pt, or a folder log/model_XXXXX")
    convert.add_argument("to", help="a name ending with .pt: a single file; any other: a folder")
    mean = commands.add_parser("average", help="write the mean of a run's newest weights, as a checkpoint")
    mean.add_argument("folder", help="log_dir of the run")
    mean.add_argument("to", help="a name ending with .pt: a single file; any other: a folder")
    mean.add_argument("--last", type=int, default=5, help="so many checkpoints; default: 5")
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            checkpoint = ckpt.load_checkpoint(options.checkpoint)
            step, val_loss, measured = (checkpoint.get(k) for k in ("step", "val_loss", "val_loss_step"))
            text = f"{options.checkpoint}: undamaged, step {step}, last validation loss before it {val_loss}"
            print(printable(text) + (f" (at step {measured})" if measured is not None else ""))
        elif options.command == "list":
            print_list(Path(options.folder))
        elif options.command == "convert":
            write_checkpoint(ckpt.load_checkpoint(options.checkpoint), Path(options.to))
        elif options.command == "average":
            write_checkpoint(average(Path(options.folder), options.last), Path(options.to))
        else:
            model = ckpt.load_model(options.checkpoint)
            export_folder(model, options.folder, options.format, options.tokenizer)
            print(f"wrote {printable(options.folder)}")
    except (ValueError, OSError) as error:
        print_error("checkpoint.py", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
