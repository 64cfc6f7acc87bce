"""Measurements. The compared functions take turns (A B A B ...) in one run; times are medians.

    python -m bench moe [--compile 1]     # MoE layer against dense MLP, mask loop, transformers' experts
    python -m bench train --size d12 --nanogpt DIR    # in turns with nanoGPT's model, from a checkout in DIR
    python -m bench --help                # all commands; COMMAND --help: a command's options

docs/measurements.md has results with their commands, and explains the columns."""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import importlib
import math
import sys
from pathlib import Path

STEPS = dict(device="", rounds=15)
LAYERS = STEPS | dict(dtype="float32")
MODELS = LAYERS | dict(compile=0, vocab_size=50304)
COMMANDS = {  # name: (module with its bench_NAME, what it measures, its options with their defaults)
    "moe": ("layer", "a MoE layer, a dense MLP, other MoE layers", LAYERS | dict(compile=0, tokens=0)),
    "gpu": ("gpu", "most of these on one GPU, with the tests that need it", dict(device="cuda", minutes=8.0)),
    "train": ("models", "optimizer steps of whole models, compiled and not, beside nanoGPT's",
        MODELS | dict(size="d12,d12-moe8x2,d24", B=4, T=1024, layout="none", nanogpt="")),
    "attention": ("models", "attention by each fused kernel", LAYERS | dict(size="d12", B=16, T=1024)),
    "ladder": ("ladder", "the optimisation ladder, rung by rung", STEPS | dict(compile=0)),
    "head": ("layer", "the loss head: all logits at once, and in chunks", LAYERS | dict(tokens=0)),
    "hellaswag": ("models", "HellaSwag, plain and ours", LAYERS | dict(size="d12", data="", limit=30)),
    "checkpoint": ("loop", "saving, verifying and loading a checkpoint", STEPS | dict(size="d12")),
    "loop": ("loop", "how much of a step's time the loop takes", MODELS | dict(size="", B=16, T=128)),
    "time_to_loss": ("recipes", "loss against time",
        dict(text="", nanogpt="", nanochat="", size="4x128", seconds=60.0, png="")),
    "moe_pays": ("recipes", "the loss with experts, and dense", dict(text="", steps=500, seeds=3)),
    "scale": ("traffic", "a forecast of a step on up to 1,024 ranks",
        dict(dtype="float32", size="d12-moe8x2", B=16, T=1024, vocab_size=50304, total_batch_size=2**19,
            micro_ms=0.0, update_ms=0.0, nvlink=360.0, network=40.0, gpus=8, latency=10.0,
            ranks="1,2,4,8,16,32,64,128,256,512,1024", layouts="ddp,zero,fsdp,ep"))}  # fmt: skip
HELP = {
    "device": "cuda, cuda:1 or cpu; empty = CUDA if there is one", "dtype": "dtype of matrix products",
    "compile": "1 = with torch.compile; train: 2 = with and without",
    "rounds": "measured calls of each function", "vocab_size": "number of token ids",
    "tokens": "number of tokens; 0 = each size's default",
    "size": "a name in models.py's MODEL_SIZES, train takes several; loop: empty = the demo's; "
        "time_to_loss: 4x128 or 6x256",
    "B": "sequences per micro-step", "T": "tokens per sequence",
    "layout": "fsdp, ep: in a group of one process",
    "nanogpt": "a checkout of nanoGPT to take turns with", "text": "the text file to train on",
    "nanochat": "a checkout of nanochat to take turns with, at five scales of its learning rates",
    "seconds": "of training for each recipe",
    "data": "HellaSwag's questions, or random; empty = downloaded once", "seeds": "runs of each model",
    "minutes": "for all parts together", "total_batch_size": "tokens per step",
    "limit": "questions, taken evenly from the whole file",
    "steps": "optimizer steps of each run",
    "micro_ms": "milliseconds of a micro-step", "update_ms": "milliseconds of the rest of a step",
    "nvlink": "GB/s per GPU within a machine", "network": "GB/s per GPU between machines",
    "gpus": "GPUs per machine, each with a network card", "latency": "microseconds per call and hop",
    "ranks": "numbers of ranks, separated by commas",
    "layouts": "some of ddp, zero, fsdp, ep, fsdp+ep, separated by commas",
    "csv": "write the table to this file as well",
    "png": "draw loss against seconds into this file (.png, .svg or .pdf)"}  # fmt: skip
CHOICES = {"dtype": ("float32", "bfloat16"), "compile": (0, 1, 2), "layout": ("none", "fsdp", "ep")}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command and its options. A bad value ends the process with the usage and exit code 2."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    layout = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for command, (_, purpose, options) in COMMANDS.items():
        one = commands.add_parser(command, help=purpose, description=purpose, **layout)
        for name, value in (options | dict(csv="")).items():
            more = dict(default=value, choices=CHOICES.get(name), help=HELP[name])
            one.add_argument(f"--{name}", type=type(value), **more)
    options = parser.parse_args(arguments)
    defaults = COMMANDS[options.command][2]
    for name, value in vars(options).items():
        default = defaults.get(name)
        if isinstance(value, int | float) and not (value < math.inf and (value > 0 or value == default == 0)):
            least = "at least" if default == 0 else "above"
            parser.error(f"--{name} {value}: must be {least} 0, and finite")
        if name in ("csv", "png") and not Path(value).parent.is_dir():
            parser.error(f"--{name} {value}: there is no such folder")
        if name in ("csv", "png") and value and Path(value).is_dir():
            parser.error(f"--{name} {value}: it is a folder; name a file in it")
        if name == "png" and value and Path(value).suffix not in (".png", ".svg", ".pdf"):
            parser.error(f"--png {value}: the name must end in .png, .svg or .pdf")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark and print its table. Exit codes: 0 done, 1 a part of gpu failed, 2 bad options."""
    options = parse_options(arguments)
    import torch  # after the options, so that --help and mistakes need not wait for it

    from bench.measure import print_table
    from tokens.printable import print_error
    from training.parallel import choose_device, keep_freed_memory

    module = importlib.import_module(f"bench.{COMMANDS[options.command][0]}")
    try:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        options.device = choose_device(getattr(options, "device", "cpu") or default, 0)
        if options.device.type == "cpu":
            keep_freed_memory()  # as training does
        on_cuda, threads = options.device.type == "cuda", f"{torch.get_num_threads()} CPU threads"
        machine = torch.cuda.get_device_name(options.device) if on_cuda else threads
        how = "".join(f", {name} {getattr(options, name)}" for name in ("dtype", "rounds") if name in options)
        print(f"torch {torch.__version__}, {machine}{how}")
        rows = list(getattr(module, f"bench_{options.command}")(options))
        print_table(rows, options.csv)
    except (ValueError, OSError) as error:
        print_error("python -m bench", error)
        return 2
    return int(any(row.get("result", "done") != "done" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
