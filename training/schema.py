"""What a checkpoint may hold. check_checkpoint() looks at all that was read, before anything uses it.

docs/formats.md says what each entry means. Tensors may lie on the meta device, without values."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from huggingface.configuration import OTHER_NAMES, build_config, show
from model import GPTConfig, GPTLMHeadModel
from tokens.own_tokenizers import add_tokenizer

DEEPEST, MOST_ENTRIES = 8, 1_000_000  # of nested containers. A file of few bytes can describe 2^40 entries
HEALTH = {"bad_steps", "in_a_row", "seen", "mean", "variance"}  # faults.Health; scale_steps is newer
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # torch's
RANDOM_STATE = (torch.uint8, torch.get_rng_state().shape)


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on (True is not)."""
    return type(value) is int and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    """Whether it is a finite number (True is not)."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def is_tensor(value: Any) -> bool:
    """Whether it is an ordinary tensor, whose storage holds as many elements as its shape says."""
    if not torch.is_tensor(value) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.is_meta or value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def are_named(kind: Callable, names: set[str] | None = None) -> Callable:
    """A kind: dictionaries with these names (None: any) whose values are all of `kind`."""

    def check(value: Any) -> bool:
        fits = isinstance(value, dict) and all(type(key) is str for key in value)
        return fits and names in (None, value.keys()) and all(map(kind, value.values()))

    return check


def is_optimizer(value: Any) -> bool:
    """Whether it is {"param_groups": [{"params": numbers from 0 on}], "state": {number: {name: tensor}}}."""
    groups, state = map(value.get, ("param_groups", "state")) if isinstance(value, dict) else (None, None)
    if not isinstance(groups, list) or not isinstance(state, dict):
        return False
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return False
    numbers = [number for group in groups for number in group["params"]]
    counts = all(map(is_count, [*numbers, *state])) and sorted(numbers) == list(range(len(numbers)))
    return counts and state.keys() <= set(numbers) and all(map(are_named(is_tensor), state.values()))


def is_diagnostics(value: Any) -> bool:
    """Whether it is what diagnostics.Diagnostics.state_dict() returns."""
    kinds = {"choices": (torch.int16, (2,)), "noise": (torch.float64, (1,))}  # and numbers of dimensions
    if not are_named(is_tensor)(value) or value.get("noise", torch.zeros(3)).shape[:1] != (3,):
        return False
    others = (torch.float64, (0, 1))
    pairs = [(tensor, *kinds.get(name, others)) for name, tensor in value.items()]
    return all(tensor.dtype == dtype and tensor.dim() in sizes for tensor, dtype, sizes in pairs)


are_settings = are_named(lambda value: value is None or type(value) in (bool, int, float, str))
# name: (kind of the value, its words). The first three are in every checkpoint, the others in those of a run.
ENTRIES = {
    "model": (are_named(is_tensor), "tensors by name"),
    "config": (are_named(lambda value: True), "settings by name"),
    "step": (is_count, "a number of steps"),
    "val_loss": (lambda value: value is None or type(value) is float or is_number(value), "a number or None"),
    "val_loss_step": (lambda value: value is None or is_count(value), "a number of steps or None"),
    "optimizer": (is_optimizer, "an optimizer's state"),
    "loader": (lambda v: are_settings(v) and is_count(v.get("position")), "a data loader's state"),
    "rng": (lambda v: is_tensor(v) and (v.dtype, v.shape) == RANDOM_STATE, "torch's random state"),
    "train_config": (are_settings, "settings by name"),
    "elapsed_s": (lambda value: is_number(value) and value >= 0, "a number of seconds"),
    "health": (
        lambda v: are_named(is_number)(v) and HEALTH <= v.keys() <= HEALTH | {"scale_steps"},
        f"numbers named {', '.join(sorted(HEALTH))}",
    ),
    "diagnostics": (is_diagnostics, "a run's diagnostics"),
    "scaler": (lambda value: value == {} or are_named(is_number, SCALER)(value), "a GradScaler's state"),
    "tokenizer": (lambda value: type(value) is str, "a tokenizer.json"),
    "world_size": (lambda value: is_count(value) and value > 0, "a number of processes"),
}


def check_checkpoint(content: Any) -> dict:
    """The checkpoint, with all fields of GPTConfig in its config. ValueError names an entry that is wrong."""
    check_nesting(content)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {show(content)}, not a checkpoint's dictionary")
    if missing := [name for name in ("model", "config", "step") if name not in content]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name, (is_kind, words) in ENTRIES.items():
        if name in content and not is_kind(content[name]):
            raise ValueError(f"{name} is {show(content[name])}, not {words}")
    found, weights, names = content["config"], content["model"], set(inspect.get_annotations(GPTConfig))
    if unknown := found.keys() - names - OTHER_NAMES - GPTConfig().to_dict().keys():
        raise ValueError(f"config has an unknown field {show(min(unknown))}; a newer version may know it")
    fields = {name: found[name] for name in names & found.keys()}
    config = build_config(GPTConfig, fields, {name: tensor.shape for name, tensor in weights.items()})
    check_weights(config, weights)
    if "tokenizer" in content:
        add_tokenizer(content["tokenizer"], config.encoding)
    known = {name: content[name] for name in (*ENTRIES, "format") if name in content}
    return known | {"config": config.to_dict()}


def check_nesting(content: Any) -> None:
    """ValueError for containers that are nested too deeply, or have too many entries to look at."""
    left, parts = MOST_ENTRIES, [(content, 0)]
    while parts:
        part, depth = parts.pop()
        inner = list(part.values()) if isinstance(part, dict) else part
        if not isinstance(inner, list | tuple | set | frozenset):
            continue
        left -= len(inner)
        if left < 0 or depth == DEEPEST:
            raise ValueError(f"it is nested {DEEPEST} deep or more, or has over {MOST_ENTRIES:,} entries")
        parts += [(value, depth + 1) for value in inner]


def check_weights(config: GPTConfig, weights: dict[str, torch.Tensor]) -> None:
    """ValueError, naming the first, for a weight that is missing, unknown, or of another shape."""
    try:
        with torch.device("meta"):
            expected = GPTLMHeadModel(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # a size that torch cannot count
        raise ValueError(f"config makes no model: {str(error).splitlines()[0]}") from error
    if unlike := sorted(expected.keys() ^ weights.keys()):
        problem = "is missing" if unlike[0] in expected else "is no weight of such a model"
        raise ValueError(f"model: {unlike[0][:99]} {problem}")
    for name, tensor in expected.items():
        found = weights[name]
        if (found.shape, found.is_floating_point()) != (tensor.shape, tensor.is_floating_point()):
            problem = f"{found.dtype} of shape {list(found.shape)}, not of shape {list(tensor.shape)}"
            raise ValueError(f"model: {name} is {problem} as config says")
