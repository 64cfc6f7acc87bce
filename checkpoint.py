"""Work with training checkpoints (docs/formats.md): verify, convert between file and folder, export.

python checkpoint.py export log/model_19073.pt my_model                  # a folder for transformers
python checkpoint.py export log/model_19073.pt my_gpt2 --format gpt2     # dense models: a stock GPT-2
python checkpoint.py export log/model_19073.pt my_qwen3 --format qwen3_moe    # more: huggingface/llama.py
python checkpoint.py verify log/model_19073.pt                           # compare all bytes with checksums
python checkpoint.py convert log/model_19073 log/model_19073.pt          # a folder to a file, or back
"""

import argparse
import sys
from pathlib import Path

import torch

from huggingface.export import export_folder
from tokens.files import write_atomically
from training import sharded
from training.checkpoints import load_checkpoint, load_model


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for a bad checkpoint or folder."""
    parser = argparse.ArgumentParser(description="Verify or export training checkpoints.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a Hugging Face folder")
    export.add_argument("checkpoint", help="log/model_XXXXX.pt, or a folder log/model_XXXXX")
    export.add_argument("folder", help="folder to write: new, empty, or an earlier export")
    formats = "gpt_moe (any model); stock: gpt2, llama, qwen3 (dense), mixtral, qwen3_moe (with experts)"
    export.add_argument("--format", default="gpt_moe", help=formats)
    flag = argparse.BooleanOptionalAction
    export.add_argument("--tokenizer", action=flag, default=True, help="add a tokenizer's files")
    verify = commands.add_parser("verify", help="compare every byte with its checksum")
    verify.add_argument("checkpoint")
    convert = commands.add_parser("convert", help="write a checkpoint in the other form")
    convert.add_argument("checkpoint", help="a file log/model_XXXXX.pt, or a folder log/model_XXXXX")
    convert.add_argument("to", help="a name ending with .pt: a single file; any other: a folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            checkpoint = load_checkpoint(options.checkpoint)
            step, val_loss = checkpoint["step"], checkpoint.get("val_loss")
            print(f"{options.checkpoint}: undamaged, step {step}, last validation loss before it {val_loss}")
        elif options.command == "convert":
            checkpoint, to = load_checkpoint(options.checkpoint), Path(options.to)
            if to.exists():
                raise FileExistsError(f"{to} exists already; give another name")
            to.parent.mkdir(parents=True, exist_ok=True)
            if to.suffix == ".pt":
                write_atomically(to, lambda file: torch.save(checkpoint, file))
            else:
                sharded.save(checkpoint, to)
            print(f"wrote {to}")
        else:
            export_folder(load_model(options.checkpoint), options.folder, options.format, options.tokenizer)
            print(f"wrote {options.folder}")
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
