"""Settings as the fields of a dataclass (train_gpt_moe.py's TrainConfig): their flags and their limits."""

import argparse
import copy
import dataclasses
import json
import os
import re
import reprlib
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable
from typing import Any

from transformers.hf_argparser import HfArg, HfArgumentParser

from huggingface.configuration import check_setting
from training.quick_help import short_help, unknown_flag

# Bash leaves the ~ in --log_dir=~/run as it is.
PATHS = {*"config text data_dir input_bin input_val_bin log_dir resume init_from hellaswag_data".split()}


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
        """transformers hands all metadata to argparse, and spells only the field's own name with hyphens."""
        field, names = copy.copy(field), field.metadata["aliases"]
        names = [*names, *(name.replace("_", "-") for name in names)]
        field.metadata = {"help": field.metadata["help"], "aliases": names}
        field.type = whole_number if "int" in str(field.type) else field.type
        HfArgumentParser._parse_dataclass_field(parser, field)


def whole_number(text: str) -> int:
    """int(text), which may also be written as 2**19 or 5e5. ValueError."""
    if power := re.fullmatch(r"(\d{1,6})\*\*(\d{1,2})", text):
        return int(power[1]) ** int(power[2])
    is_whole = re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,2}", text) and float(text).is_integer()
    return int(float(text)) if is_whole else int(text)


def parse_flags(
    kind: type, overrides: Callable[[Any], dict], arguments: list[str] | None, script: str
) -> tuple[Any, set[str]]:
    """(an object of the class `kind`, the names of the fields that flags or --config set). overrides(the
    flags' object) returns the values that its preset sets in place of defaults. ValueError, OSError for a bad
    flag or file; SystemExit after an answer to --help."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-h"} & set(arguments):
        words = [word for word in arguments if word not in ("--help", "-h")]
        print(explain(kind, words[0].lstrip("-")) if len(words) == 1 else short_help(script))
        raise SystemExit(0)
    flags = {field: [f"--{field.name}", *field.metadata["aliases"]] for field in dataclasses.fields(kind)}
    names = {field.name for field in flags}
    if wrong := unknown_flag(arguments, {flag[2:] for all_names in flags.values() for flag in all_names}):
        raise ValueError(wrong)
    parser = FlagParser(kind, allow_abbrev=False, add_help=False)
    marker = object()  # the default of all flags; a flag that is given has another value
    parser.set_defaults(**{name: marker for name in names})
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"{unknown[0][:80]!r} is no flag, nor the value of one; --help lists all flags")
    given = {name: value for name, value in vars(values).items() if value is not marker}
    given |= {name: os.path.expanduser(given[name]) for name in PATHS & given.keys()}
    given = read_settings(given["config"], names) | given if given.get("config") else given
    check_limits(kind(), given)
    config = kind(**(overrides(kind(**given)) | given))
    if config.run_name and not re.fullmatch(r"\w[\w.-]*", config.run_name):
        raise ValueError(f"run_name={config.run_name!r}: use letters, digits, and . _ - inside")
    if config.run_name and "log_dir" not in given:
        config.log_dir = f"log/{config.run_name}"
    check_limits(config)
    return config, set(given)


def read_settings(file: str, names: set[str]) -> dict:
    """The settings in a JSON or YAML file, {name: value} or a run.json. ValueError, FileNotFoundError."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"config={file!r}: there is no such file; a run writes log_dir/run.json")
    try:
        with open(file, encoding="utf-8") as text:
            if file.endswith((".yaml", ".yml")):
                import yaml  # transformers needs it, too

                class Loader(yaml.SafeLoader):
                    """YAML 1.1 as PyYAML reads it, and 6e-4 is a number, not a text."""

                number = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
                Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
                settings = yaml.load(text, Loader)
            else:
                settings = json.load(text)
        settings = settings.get("config", settings)
        settings = {name: value for name, value in settings.items() if name not in ("config", "resume")}
    except Exception as error:  # no text, no JSON, not a dictionary, nested too deeply
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"config={file!r}: not a file of settings by name: {reason}") from error
    if unknown := unknown_flag([f"--{name}" for name in settings], names):
        raise ValueError(f"config={file!r}: {unknown[2:]}")
    return settings


def explain(kind: type, word: str) -> str:
    """The flags whose name or explanation has `word` ("all": all flags), each with its default."""
    lines = []
    for field in dataclasses.fields(kind):
        text, aliases = field.metadata["help"], field.metadata["aliases"]
        if word == "all" or word.lower() in " ".join([field.name, text, *aliases]).lower():
            also = f" (also {', '.join(aliases)})" if aliases else ""
            begin = f"--{field.name} {'' if field.default == '' else field.default}"
            width = min(110, shutil.get_terminal_size().columns)
            lines += textwrap.wrap(f"{begin:34}  {text}{also}", width, subsequent_indent=" " * 36)
    return "\n".join(lines) or f"no flag has to do with {word!r}; --help lists all flags"
