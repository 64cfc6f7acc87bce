"""Settings as the fields of a dataclass (train_gpt_moe.py's TrainConfig): their flags and their limits."""

import argparse
import copy
import dataclasses
import difflib
import re
import reprlib
import shutil
import typing
from collections.abc import Callable
from typing import Any

from transformers.hf_argparser import HfArg, HfArgumentParser

from huggingface.configuration import check_setting


def setting(default: Any, help: str, *aliases: str, **limits: Any) -> Any:
    """A field of a settings dataclass. Its flag is --NAME, or one of `aliases`. limits: least, most, above,
    below, choices; huggingface.configuration.check_setting checks them."""
    if "choices" in limits:
        limits["choices"] = tuple(limits["choices"])
        help += f": {', '.join(map(str, limits['choices']))}"
    return HfArg(default=default, help=help, aliases=list(aliases), metadata={"limits": limits})


def check_limits(config: Any, values: dict | None = None) -> None:
    """ValueError, naming field and value, for a value that is not of its field's type or outside its limits.
    values: check these, if given, in place of the values of config."""
    values = vars(config) if values is None else values
    for field in [field for field in dataclasses.fields(config) if field.name in values]:
        name, value = field.name, values[field.name]
        kinds = typing.get_args(field.type) or (field.type,)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}={reprlib.repr(value)}: must be of type {expected}")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):  # argv's bytes that are no UTF-8
            raise ValueError(f"{name}={reprlib.repr(value)}: must be text in UTF-8")
        if type(value) is int and abs(value) >= field.metadata["limits"].get("below", 2**60):
            raise ValueError(f"{name}={reprlib.repr(value)}: it is too large")
        check_setting(name, value, field.metadata["limits"])


class FlagParser(HfArgumentParser):
    """Flags from the fields of a dataclass; ValueError where argparse would print its usage and exit."""

    def error(self, message: str):
        """argparse calls this for a value of a wrong type and the like."""
        raise ValueError(f"{message}; --help says what each flag takes")

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """transformers hands all metadata to argparse, which does not know limits."""
        field = copy.copy(field)
        field.metadata = {name: value for name, value in field.metadata.items() if name != "limits"}
        HfArgumentParser._parse_dataclass_field(parser, field)

    def _get_formatter(self) -> argparse.HelpFormatter:
        width = min(110, shutil.get_terminal_size().columns)
        return argparse.ArgumentDefaultsHelpFormatter(self.prog, max_help_position=32, width=width)


def parse_flags(
    kind: type, overrides: Callable[[Any], dict], arguments: list[str] | None, description: str
) -> tuple[Any, set[str]]:
    """(an object of the class `kind`, the names of the fields that flags set). overrides(the flags' object)
    returns the values that its preset sets in place of defaults. ValueError for a bad flag."""
    parser = FlagParser(kind, allow_abbrev=False, description=description)
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise ValueError(f"{unknown[0]!r} is no flag, nor the value of one; {hint}")
    marker = object()  # the default of all flags; a flag that is given has another value
    parser.set_defaults(**{field.name: marker for field in dataclasses.fields(kind)})
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not marker}
    config = kind(**(overrides(kind(**given)) | given))
    check_limits(config)
    return config, set(given)
