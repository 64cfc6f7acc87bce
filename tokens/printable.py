"""Show texts of others on a terminal: file names, values, messages, samples. They must not control it."""

import re
import sys

# Control characters (ESC begins the terminal's commands), line separators, marks that change the direction of
# text, and lone surrogates, which no terminal can print.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    r"""The text with visible escapes, such as \x1b, in place of unsafe characters, except those in `keep`."""
    return UNSAFE.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), str(text))


def one_line(error: object) -> str:
    """The message of an error as one printable line; the middle of a very long one is left out."""
    text = printable(str(error).strip())
    return text if len(text) <= 550 else f"{text[:400]} ... {text[-140:]}"


def print_error(script: str, error: object) -> None:
    """Print an error on stderr in one line, as argparse does: SCRIPT: error: MESSAGE."""
    print(f"{script}: error: {one_line(error)}", file=sys.stderr, flush=True)
