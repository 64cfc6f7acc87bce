"""A transformers configuration that checks its settings, and whose saved folder contains the model's code."""

import copy
import difflib
import math
import operator
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from huggingface.export_code import export_code

# Where transformers' Auto classes find our classes in a saved folder.
AUTO_MAP = {"AutoConfig": "model.GPTConfig", "AutoModel": "model.GPT",
            "AutoModelForCausalLM": "model.GPTLMHeadModel",
            "AutoModelForSequenceClassification": "model.GPTForSequenceClassification"}  # fmt: skip
# Names that transformers or our older versions may pass, in addition to the fields.
OTHER_NAMES = {
    "torch_dtype", "num_labels", "name_or_path", "_name_or_path", "_commit_hash", "output_attentions",
    "attn_implementation", "experts_implementation", "auto_map", "model_type", "layer_types",
    "output_router_logits", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"}  # fmt: skip
# Fields that have the same name in the configurations of other architectures.
SHARED_FIELDS = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
# Names of the number of layers, and in weights the number of a layer and the token embedding.
DEPTHS, LAYER = {"n_layer", "num_hidden_layers"}, re.compile(r"(?:^|\.)(?:h|layers)\.(\d+)\.")
EMBEDDINGS = ("wte.weight", "embed_tokens.weight")
# A numerical limit of a setting: the comparison that must hold, and its words.
LIMITS = {"least": (operator.ge, "at least"), "most": (operator.le, "at most"),
          "above": (operator.gt, "above"), "below": (operator.lt, "below")}  # fmt: skip


def setting(default: Any, **limits: Any) -> Any:
    """A dataclass field with limits in its metadata: numbers least, most, above, below; a tuple choices."""
    return field(default=default, metadata=limits)


def check_setting(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """ValueError, naming setting and value, for a float that is not finite or a value outside its limits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be a finite number")
    for limit, bound in limits.items() if value is not None else ():  # None: other settings decide
        if limit == "choices" and value not in bound:
            known = ", ".join(str(choice) or "''" for choice in bound)
            raise ValueError(f"{name}={value!r}: choose one of {known}")
        if limit in LIMITS and not LIMITS[limit][0](value, bound):
            raise ValueError(f"{name}={value}: must be {LIMITS[limit][1]} {bound}")


def show(value: Any) -> str:
    """repr(value) of bounded length."""
    try:
        return reprlib.repr(value)[:120]
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"a very large {type(value).__name__}"


def construct(settings_class: type, fields: dict[str, Any], where: str = "config") -> Any:
    """settings_class(**fields). Whatever is wrong with fields from a file gives a ValueError of one line."""
    for name in fields:
        if callable(getattr(settings_class, name, None)):  # transformers would replace the method
            raise ValueError(f"{where}: {name} is no setting")
    try:
        return settings_class(**fields)
    except Exception as error:  # strict types raise their own kinds of errors, which are no ValueError
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{where}: {reason[:200]}") from error


def build_config(
    config_class: type[PreTrainedConfig], fields: dict[str, Any], shapes: Mapping[str, Sequence[int]]
) -> PreTrainedConfig:
    """The configuration with these fields. ValueError if weights of these names and shapes have another
    number of layers or another embedding. A list of a billion layers or tokens would take all memory."""
    layers = len({match[1] for name in shapes if (match := LAYER.search(name))})
    for name in DEPTHS & fields.keys():
        value = fields[name]
        if type(value) is not int or value != layers:
            raise ValueError(f"config: {name} is {show(value)}, but there are weights of {layers} layers")
    config = construct(config_class, fields)
    tables = [list(shape) for name, shape in shapes.items() if name.endswith(EMBEDDINGS)]
    expected = [config.vocab_size, config.hidden_size]
    if expected not in tables:
        raise ValueError(f"config: no embedding of shape {expected} is among the weights, but {tables[:1]}")
    return config


def refuse(what: str, config: PreTrainedConfig, only: dict[str, tuple], remedy: str) -> None:
    """ValueError, naming field and value, for a field of `config` with a value that `only` does not list."""
    for name, allowed in only.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{what} {name}={value!r}{remedy.format(allowed[0])}")


class CheckedConfig(PreTrainedConfig):
    """Checks limits and names of settings when it is made. save_pretrained also saves the model's code."""

    code = ""  # path of the file that defines the model; without annotation: no field
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_logits", "aux_loss"]  # noqa: RUF012

    def __post_init__(self, **kwargs):
        ours = set(self.__dataclass_fields__) | set(self.attribute_map)
        known = ours | OTHER_NAMES | set(GenerationConfig._get_default_generation_params())
        # A dictionary that transformers wrote carries its version, and may hold other names.
        if self.transformers_version is None and (unknown := kwargs.keys() - known):
            name = min(unknown)
            hint = "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(name, ours, n=1))
            raise ValueError(f"{type(self).__name__} has no field {name!r}{hint}")
        heads, same = self.n_kv_head, kwargs.get("num_key_value_heads")
        if None not in (heads, same) and heads != same:
            raise ValueError(f"n_kv_head={heads} and num_key_value_heads={same} must be equal")
        super().__post_init__(**kwargs)
        if self._attn_implementation is None:  # a model would set it, but masks can be built without a model
            self._attn_implementation = "eager" if self.output_attentions else "sdpa"  # sdpa has no weights
        for item in fields(self):
            check_setting(item.name, getattr(self, item.name), item.metadata)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """transformers' save_pretrained, then export_code. The model's save_pretrained calls it."""
        os.makedirs(save_directory, exist_ok=True)
        export_code(save_directory, Path(self.code))
        saved = copy.copy(self)  # auto_map describes the folder, not the configuration in memory
        saved.auto_map = AUTO_MAP
        super(CheckedConfig, saved).save_pretrained(save_directory, *args, **kwargs)
