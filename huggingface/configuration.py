"""A transformers configuration that checks its settings, and whose saved folder contains the model's code.

@strict
class GPTConfig(CheckedConfig):
    code = __file__
    n_layer: int = setting(12, least=1)
    norm: str = setting("layernorm", choices=("layernorm", "rmsnorm"))
"""

import copy
import difflib
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from huggingface.export_code import export_code

# Where transformers' Auto classes find ours in a saved folder.
AUTO_MAP = {
    "AutoConfig": "model.GPTConfig", "AutoModel": "model.GPT", "AutoModelForCausalLM": "model.GPTLMHeadModel",
}  # fmt: skip

# Names that transformers or an older dictionary of ours may pass, besides the fields.
OTHER_NAMES = {
    "torch_dtype", "num_labels", "name_or_path", "_name_or_path", "_commit_hash", "output_attentions",
    "attn_implementation", "experts_implementation", "auto_map", "model_type", "layer_types",
}  # fmt: skip

# A numerical limit of a setting: the comparison that must hold, and its words.
LIMITS = {
    "least": (operator.ge, "at least"), "most": (operator.le, "at most"),
    "above": (operator.gt, "above"), "below": (operator.lt, "below"),
}  # fmt: skip


def setting(default: Any, **limits: Any) -> Any:
    """A dataclass field with limits in its metadata: numbers least, most, above, below; a tuple choices."""
    return field(default=default, metadata=limits)


def check_setting(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """ValueError, naming setting and value, for a float that is not finite or a value outside its limits.

    None, which stands for a default that depends on other settings, is always allowed.
    """
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be a finite number")
    for limit, bound in limits.items():
        if limit == "choices" and value not in bound:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, bound))}")
        if limit in LIMITS:
            holds, words = LIMITS[limit]
            if not holds(value, bound):
                raise ValueError(f"{name}={value}: must be {words} {bound}")


def refuse(what: str, config: PreTrainedConfig, only: dict[str, tuple], remedy: str) -> None:
    """ValueError, naming field and value, for a field of `config` with a value that `only` does not list."""
    for name, allowed in only.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{what} {name}={value!r}{remedy.format(allowed[0])}")


class CheckedConfig(PreTrainedConfig):
    """Checks limits and names of settings when it is made, and saves the model's code along with them.

    A subclass sets `code` to the path of the file that defines the model.
    """

    code = ""  # without annotation: no field
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads a plain list)

    def __post_init__(self, **kwargs):
        # A dictionary that transformers wrote carries its version, and may hold names of another version.
        # Names that a person wrote are checked: an ignored typo would train the wrong model.
        if self.transformers_version is None:
            self._reject_unknown_names(kwargs)
        super().__post_init__(**kwargs)
        for item in fields(self):
            check_setting(item.name, getattr(self, item.name), item.metadata)

    def _reject_unknown_names(self, names: dict[str, Any]) -> None:
        ours = set(self.__dataclass_fields__) | set(self.attribute_map)
        for name in names:
            if name not in ours | OTHER_NAMES | set(GenerationConfig._get_default_generation_params()):
                near = difflib.get_close_matches(name, ours, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{type(self).__name__} has no field {name!r}{hint}")

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """transformers' save_pretrained, which the model's own calls, and the model's code.

        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) then needs no other file of ours.
        """
        os.makedirs(save_directory, exist_ok=True)
        export_code(save_directory, Path(self.code))
        saved = copy.copy(self)  # auto_map describes the folder, not the configuration in memory
        saved.auto_map = AUTO_MAP
        super(CheckedConfig, saved).save_pretrained(save_directory, *args, **kwargs)
