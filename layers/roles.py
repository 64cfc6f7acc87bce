"""The role of each parameter, from its name: optimizers and the memory estimate (preflight) use it.

role_of("transformer.h.0.mlp.experts.c_fc_bias") is the experts' role, without weight decay."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor


class Role(NamedTuple):
    """One row of ROLES. A parameter has the first role whose pattern is found in its name."""

    pattern: str
    part: str  # the part of the model under which preflight counts the parameter
    lr_group: str  # "router", "experts" or "rest": the learning-rate multiple that applies
    decays: bool  # whether weight decay applies; it never does to biases
    is_matrix: bool  # whether Muon may update it instead of AdamW; Muon never updates biases


ROLES = (
    #    pattern            part          lr_group   decays  is_matrix
    Role(r"\.ln_|_norm\.", "norms",      "rest",    False,  False),
    Role(r"\.gate\.",      "routers",    "router",  True,   False),
    Role(r"\.experts\.",   "experts",    "experts", True,   True),
    Role(r"\.shared\.",    "experts",    "rest",    True,   True),  # the shared expert: a dense MLP
    Role(r"\.attn\.",      "attention",  "rest",    True,   True),
    Role(r"\.mlp\.",       "dense MLP",  "rest",    True,   True),
    Role(r"^lm_head",      "head",       "rest",    True,   False),
    Role(r"\.ngrams\.",    "embeddings", "rest",    False,  False),
    Role(r"",              "embeddings", "rest",    True,   False))  # fmt: skip


def role_of(name: str) -> Role:
    """The role of a parameter of GPT with this name; a bias has its layer's role, but does not decay."""
    role = next(role for role in ROLES if re.search(role.pattern, name))
    return role._replace(decays=False, is_matrix=False) if name.endswith("bias") else role


def parameter_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float,
                     learning_rate: float, router_lr_mult: float, expert_lr_mult: float,
                     details: Callable | None = None) -> list[dict]:  # fmt: skip
    """An optimizer's parameter groups: the trainable parameters that share all settings, in a fixed order,
    which numbers them in saved optimizer states. A schedule multiplies its rate by a group's "lr_mult".
    details(name, parameter, role) -> (end of the group's name, further settings) splits the groups."""
    lr_mults = {"router": router_lr_mult, "experts": expert_lr_mult, "rest": 1.0}
    groups: dict[tuple, dict] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            role = role_of(name)
            ending, settings = details(name, parameter, role) if details else ("", {})
            mult, decay = lr_mults[role.lr_group], weight_decay if role.decays else 0.0
            title = role.lr_group + ending + ("" if role.decays else " without decay")
            new = dict(params=[], weight_decay=decay, lr=learning_rate * mult, lr_mult=mult, name=title)
            group = groups.setdefault((role.lr_group, role.decays, ending), new | settings)
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
