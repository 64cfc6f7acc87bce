"""Read the folder of a model, or the files of a hub name, without trust in their content.

transformers' from_pretrained follows many names in a folder (pickles, adapters, indexes that leave it), and
makes up random numbers for missing weights. So this file opens config.json, generation_config.json and the
safetensors files, nothing else, and transformers gets their content."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from huggingface.configuration import build_config, construct, show
from tokens.own_tokenizers import read_added

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_BYTES = 50_000_000  # of a JSON file
# Fields of config.json by which transformers would choose other code or files, or make a list of labels.
NOT_OF_A_FOLDER = {
    "attn_implementation", "_attn_implementation", "auto_map", "experts_implementation", "fusion_config",
    "num_labels", "transformers_weights"}  # fmt: skip
# Fields of generation_config.json that are no numbers or token ids. generate() checks them.
OTHER_KINDS = {
    "transformers_version", "cache_implementation", "early_stopping", "num_assistant_tokens_schedule",
    "stop_strings", "bad_words_ids", "sequence_bias", "exponential_decay_length_penalty",
    "watermarking_config"}  # fmt: skip


def find_file(name: str | Path, file: str, where: dict[str, Any]) -> Path | None:
    """The path of a file of the folder or, downloaded, of the hub name; None if missing. OSError: no hub."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where)
    return None if path is None else Path(path)


def parse_int(digits: str) -> int:
    """The number; ValueError for one that cannot be a size or a token."""
    if len(digits) > 15:
        raise ValueError(f"the number {digits[:20]}... is too large")
    return int(digits)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError if it holds anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=parse_int)
        json.dumps(content)  # what is nested too deeply fails here, not where transformers copies it
        if not isinstance(content, dict):
            raise ValueError(f"{show(content)} is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def read_config(name: str | Path, where: dict[str, Any]) -> dict[str, Any]:
    """The fields in config.json. FileNotFoundError, ValueError."""
    path = find_file(name, "config.json", where)
    if path is None:
        raise FileNotFoundError(f"{name}: there is no config.json, so it is no folder of a model")
    found = read_json(path)
    if found.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config: quantised weights cannot be loaded")
    for key in ("model_type", "dtype", "torch_dtype"):
        if not isinstance(found.get(key, ""), str | None):
            raise ValueError(f"{path}: {key} is {show(found[key])}, not a name")
    return {key: value for key, value in found.items() if key not in NOT_OF_A_FOLDER}


def read_generation(name: str | Path, where: dict[str, Any]) -> GenerationConfig | None:
    """The settings of generation_config.json, if there is one. ValueError for values that are none."""
    path = find_file(name, "generation_config.json", where)
    if path is None:
        return None
    found = read_json(path)
    for key in sorted(found.keys() - OTHER_KINDS):
        numbers = found[key] if isinstance(found[key], list) and "token" in key else [found[key]]
        if not all(isinstance(item, bool | int | float | None) for item in numbers):
            raise ValueError(f"{path}: {key} is {show(found[key])}, not a number or token ids")
    return construct(GenerationConfig, found, str(path))


def find_weights(name: str | Path, where: dict[str, Any]) -> list[Path]:
    """The safetensors files. ValueError if there are none, or an index names a file of another folder."""
    if (path := find_file(name, WEIGHTS, where)) is not None:
        return [path]
    if (index := find_file(name, INDEX, where)) is None:
        problem = f"there is no {WEIGHTS} (pickles such as pytorch_model.bin are not read)"
        raise ValueError(f"{problem}; save it again with transformers: model.save_pretrained(FOLDER)")
    names = read_json(index).get("weight_map")
    files = sorted(set(map(str, names.values()))) if isinstance(names, dict) else [show(names)]
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"weight_map in {INDEX} names {show(file)}, no safetensors file of this folder")
    paths = [find_file(name, file, where) for file in files]
    if None in paths:
        raise ValueError(f"{files[paths.index(None)]}, which {INDEX} names, is missing")
    return paths


def read_model(name: str | Path, where: dict[str, Any], model_class: type[PreTrainedModel],
               config: PreTrainedConfig | dict) -> tuple[PreTrainedConfig, dict[str, Any]]:  # fmt: skip
    """The configuration and all weights by name. ValueError if they do not fit: the files' headers are read
    before anything is built, because a short config.json can describe a model that fills all memory."""
    shapes, weights = {}, {}
    try:
        files = find_weights(name, where)
        for path in files:
            with safe_open(path, "pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}
        if isinstance(config, dict):
            config = build_config(model_class.config_class, config, shapes)
        check_size(model_class, config, sum(torch.Size(shape).numel() for shape in shapes.values()))
        for path in files:
            with safe_open(path, "pt") as file:  # clone: another process may cut a file that is mapped
                weights |= {key: file.get_tensor(key).clone() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut off: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    encoding = str(getattr(config, "encoding", ""))
    if encoding.startswith("tokenizer:") and (path := find_file(name, "tokenizer.json", where)) is not None:
        with contextlib.suppress(ValueError):  # of another name: the model takes ids, and no text
            read_added(path, encoding)
    return config, weights


def check_size(model_class: type[PreTrainedModel], config: PreTrainedConfig, held: int) -> None:
    """ValueError if the model has more than twice as many numbers as the files hold (some may be tied)."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # a size that torch cannot count, or that their classes have not checked
        raise ValueError(f"config.json makes no model: {' '.join(str(error).split())[:200]}") from error
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if needed > 2 * held:
        raise ValueError(f"config.json describes {needed:,} numbers, but the files hold {held:,}")


def check_loaded(name: str | Path, info: dict[str, Any], new_sizes: bool) -> None:
    """ValueError, naming them, if weights of a model are missing, unexpected or of another shape.
    info: transformers' report. new_sizes: the caller has asked for ignore_mismatched_sizes."""
    # A new head may be missing. Statistics of routers may be missing (in older folders) or of another loss.
    renewed = "_counts", "_entropy", "_totals"
    unlike = [mismatch for mismatch in info["mismatched_keys"] if not mismatch[0].endswith(renewed)]
    shapes = [f"{key} {list(found)}, not {list(wanted)}" for key, found, wanted in unlike]
    missing = [key for key in info["missing_keys"] if not key.endswith(renewed)]
    missing = [key for key in missing if key.startswith(("transformer.", "model.", "lm_head."))]
    problems = {"lack the weights": missing, "hold weights that the model lacks:": info["unexpected_keys"],
                "hold weights of another shape:": [] if new_sizes else shapes}  # fmt: skip
    for problem, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 9} more" if len(keys) > 9 else ""
            shown = ", ".join(key[:99] for key in sorted(keys)[:9])
            mend = "load it by the class and with the settings that it was saved with, or save it again"
            raise ValueError(f"{name}: the files {problem} {shown}{more}; {mend}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and its report of many lines; check_loaded gives one line."""
    logging = transformers.logging
    with contextlib.ExitStack() as undo:
        undo.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            undo.callback(logging.enable_progress_bar)
        logging.set_verbosity(max(logging.get_verbosity(), logging.ERROR))
        logging.disable_progress_bar()
        yield
