"""Continue a prompt with a trained model.

python sample.py --checkpoint log/model_00500.pt --prompt "Hello, I'm a language model," --num_samples 3
python sample.py --model gpt2 --prompt "The answer is"            # a hub name or an exported folder
python sample.py --checkpoint log/latest --temperature 0          # the newest checkpoint; 0 = greedy
"""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import contextlib
import os
import sys

import torch

from model import GPTLMHeadModel
from tokens.printable import print_error, printable
from training.checkpoints import load_model
from training.parallel import choose_device


def load(source: str) -> GPTLMHeadModel:
    """The model of that name, with a token to start from without a prompt. FileNotFoundError if missing."""
    model = load_model(source)
    end = model.config.eos_token_id
    if model.config.bos_token_id is None and isinstance(end, int):  # as in older checkpoints
        model.config.bos_token_id = end
    return model


def main(arguments: list[str] | None = None) -> int:
    """Print the samples. Returns 0, or 2 for a model that cannot be loaded or a bad setting."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="log/model_XXXXX.pt, or log/latest for the newest in log")
    source.add_argument("--model", help="gpt2 ... gpt2-xl, or a folder that transformers can load")
    parser.add_argument("--prompt", default="Hello, I'm a language model,", help='"" = no prompt')
    parser.add_argument("--num_samples", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="sample among so many tokens; 0 = all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="", help="cuda, mps, cpu; empty = the best there is")
    options = parser.parse_args(arguments)
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(options, name) >= least:
            parser.error(f"--{name} {getattr(options, name)}: must be at least {least}")
    with contextlib.suppress(AttributeError, OSError):  # sys.stdout may be another kind of object
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal cannot print
    how = dict(do_sample=False)
    if options.temperature > 0:
        how = dict(do_sample=True, temperature=options.temperature, top_k=options.top_k)
    try:
        model = load(options.checkpoint or options.model).to(choose_device(options.device, 0))
        torch.manual_seed(options.seed)
        for number in range(1, options.num_samples + 1):
            print(f"--- sample {number}")
            text = model.generate(options.prompt, max_new_tokens=options.max_new_tokens, **how)
            print(printable(text, keep="\n\t") if sys.stdout.isatty() else text, flush=True)
    except BrokenPipeError:  # as in `sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:  # transformers raises all of them
        print_error("sample.py", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
