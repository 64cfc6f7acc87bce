"""Flags of a command line from the fields of a dataclass, with named sets of overrides.

    config, given = parse_flags(TrainConfig, presets, sys.argv[1:])

Fields are made with transformers' HfArg(default=..., help=..., aliases=[...]). Used by train_gpt_moe.py.
"""

import argparse
import dataclasses
import difflib
import shutil
from collections.abc import Callable
from typing import Any

from transformers.hf_argparser import HfArgumentParser


class FlagParser(HfArgumentParser):
    """Flags from the fields of a dataclass; ValueError where argparse would print its usage and exit."""

    def error(self, message: str):
        """Called by argparse for a value of a wrong type and the like."""
        raise ValueError(f"{message}; --help says what each flag takes")

    def _get_formatter(self) -> argparse.HelpFormatter:
        width = min(110, shutil.get_terminal_size().columns)
        return argparse.ArgumentDefaultsHelpFormatter(self.prog, max_help_position=32, width=width)


def parse_flags(
    kind: type, overrides: Callable[[Any], dict], arguments: list[str] | None, description: str
) -> tuple[Any, set[str]]:
    """(an object of the dataclass `kind`, the names of those of its fields that a flag gave).

    overrides: what the presets that the flags name put in place of the defaults, given the parsed flags; a
    flag wins over it. arguments: None means the command line's. ValueError for a bad flag.
    """
    parser = FlagParser(kind, allow_abbrev=False, description=description)
    chosen, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise ValueError(f"{unknown[0]!r} is no flag, nor the value of one; {hint}")
    preset = overrides(chosen)
    parser.set_defaults(**preset)
    (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    # A setting was given as a flag if another default would not have changed it.
    marker = object()
    parser.set_defaults(**{field.name: marker for field in dataclasses.fields(kind)})
    flags = {name for name, value in vars(parser.parse_args(arguments)).items() if value is not marker}
    return config, flags
