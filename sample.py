"""Continue a prompt with a trained model. The text appears while the model writes it.

python sample.py --checkpoint log/model_00500.pt --prompt "Hello, I'm a language model," --num_samples 3
python sample.py --model gpt2 --prompt FILE:essay.txt --stop "The End"     # a hub name or an exported folder
python sample.py --checkpoint log/latest --temperature 0                   # the newest checkpoint; 0 = greedy
python sample.py --checkpoint log/latest --interactive                     # each line you type is a prompt"""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator

import torch

from tokens.encodings import decode_tokens
from tokens.printable import print_error, printable
from tokens.sources import read_plain
from training.checkpoints import load_model
from training.parallel import choose_device


class Printer:
    """A `streamer` and a stopping criterion for transformers' generate(): prints the text of a prompt and of
    the tokens that follow, and ends before the text `stop`, if the continuation has it."""

    def __init__(self, encoding: str, stop: str):
        self.encoding, self.stop = encoding, stop
        self.ids: list[int] = []
        self.prompt_length = self.shown = 0  # characters
        self.stopped = False

    def put(self, ids: torch.Tensor) -> None:
        """Take the prompt's tokens first, then one new token at a time."""
        is_prompt = not self.ids
        self.ids += ids.flatten().tolist()
        text = decode_tokens(self.ids, self.encoding)
        if is_prompt:
            self.prompt_length = len(text)
        place = text.find(self.stop, self.prompt_length) if self.stop else -1
        self.stopped = place >= 0
        # The last characters wait: they may be the beginning of `stop`, or of a character of several bytes.
        waits = max(len(self.stop), 4 if text.endswith("\ufffd") else 0)
        self._show(text[:place] if self.stopped else text[: max(self.prompt_length, len(text) - waits)])

    def end(self) -> None:
        """Print what waited."""
        if not self.stopped:
            self._show(decode_tokens(self.ids, self.encoding))
        print(flush=True)

    def _show(self, text: str) -> None:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        print(printable(new, keep="\n\t") if sys.stdout.isatty() else new, end="", flush=True)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Whether each text (B,) is complete."""
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)


# Flags that are numbers: type, default, least and most value, help.
NUMBERS = {
    "num_samples": (int, None, 1, math.inf, "of each prompt; if not given 3, or 1 with --interactive"),
    "max_new_tokens": (int, 100, 1, math.inf, "tokens after the prompt at most"),
    "temperature": (float, 0.8, 0, 1e6, "0 = always the likeliest token"),
    "top_k": (int, 50, 0, math.inf, "sample among so many tokens; 0 = all"),
    "top_p": (float, 1.0, 0, 1, "sample among the likeliest tokens that together have this probability"),
    "min_p": (float, 0.0, 0, 1, "sample among tokens with this share of the likeliest token's probability"),
    "repetition_penalty": (float, 1.0, 1e-6, 1e6, "above 1: tokens that occurred become less likely"),
    "seed": (int, 1, -(2**63), 2**63 - 1, "of the random numbers"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options. Ends the process with code 2 and a message for a value outside its limits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", dest="source", help="log/model_XXXXX.pt; log/latest is the newest")
    source.add_argument("--model", dest="source", help="gpt2 ... gpt2-xl, or a folder for transformers")
    parser.add_argument("--prompt", default="Hello, I'm a language model,", help='"" = none, FILE:x = a file')
    parser.add_argument("--interactive", action="store_true", help="read prompts, a line each, until Ctrl-D")
    for name, (kind, default, *_, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--stop", default="", help="end a sample before this text")
    parser.add_argument("--device", default="", help="cuda, mps, cpu; empty = the best there is")
    options = parser.parse_args(arguments)
    for name, (_, _, least, most, _) in NUMBERS.items():
        if (value := getattr(options, name)) is not None and not least <= value <= most:
            parser.error(f"--{name} {value}: must be at least {least} and at most {most}")
    return options


def prompts(options: argparse.Namespace) -> Iterator[str]:
    """The prompt, or the lines that the user types."""
    if not options.interactive:
        prompt = options.prompt
        if prompt.startswith("FILE:"):
            pieces = read_plain(prompt.removeprefix("FILE:"))
            prompt = "".join(text for _, text in pieces).replace("\r\n", "\n")
        yield prompt
    while options.interactive:
        try:
            yield input("prompt> ")
        except EOFError:  # Ctrl-D, or the end of a file
            return print()


def main(arguments: list[str] | None = None) -> int:
    """Print the samples. Returns 0, 130 after Ctrl-C, or 2 for a bad setting or model."""
    options = parse(arguments)
    with contextlib.suppress(AttributeError, OSError):  # sys.stdout may be another kind of object
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal cannot print
    how = dict(do_sample=options.temperature > 0, repetition_penalty=options.repetition_penalty)
    how |= dict(num_beams=1, num_return_sequences=1, stop_strings=None)  # whatever the model's folder says
    if how["do_sample"]:
        how |= {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    count = options.num_samples or (1 if options.interactive else 3)
    try:
        model = load_model(options.source).to(choose_device(options.device, 0))
        end = model.config.eos_token_id
        if model.config.bos_token_id is None and isinstance(end, int):  # as in older checkpoints
            model.config.bos_token_id = end  # a text without a prompt starts from it
        torch.manual_seed(options.seed)
        for prompt, number in ((p, n) for p in prompts(options) for n in range(1, count + 1)):
            if count > 1 or not options.interactive:
                print(f"--- sample {number}")
            printer = Printer(model.config.encoding, options.stop)
            how |= dict(streamer=printer, stopping_criteria=[printer], max_new_tokens=options.max_new_tokens)
            model.generate(prompt, **how)
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except BrokenPipeError:  # as in `sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:  # transformers raises all of them
        is_no_utf8 = isinstance(error, UnicodeEncodeError)  # only a prompt is encoded here
        print_error("sample.py", "the prompt must be text in UTF-8" if is_no_utf8 else error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
