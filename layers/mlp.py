"""The dense feed-forward network, and the table of its activations.

    mlp = MLP(config)                        # config: a GPTConfig, or any object with its fields
    y = mlp(x)                               # (..., C) -> (..., C)

Only the table `ACTIVATIONS` defines activations: a new one needs one new row.
References: GELU, arXiv 1606.08415; squared ReLU (Primer), 2109.08668; SwiGLU, 2002.05202."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class Activation(NamedTuple):
    """The non-linearity between the projections c_fc and c_proj. c_proj reads H hidden values.
    parts is 1, or 2 for a gated activation: c_fc then holds two matrices of H rows, first gate, then up."""

    parts: int  # h has parts * H channels
    forward: Callable  # h (..., parts*H) -> (..., H), differentiable
    forward_into: Callable  # out (..., H), h -> out, filled with the same values; without gradient
    backward: Callable  # gradient (..., H) of the result, h -> gradient (..., parts*H) of h


def gated(act: Callable, act_backward: Callable) -> Activation:
    """act(gate) * up. act_backward: gradient of act's result, gate -> gradient of gate."""

    def forward(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return act(gate) * up

    def forward_into(out: Tensor, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return torch.mul(act(gate), up, out=out)

    def backward(grad: Tensor, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return torch.cat((act_backward(grad * up, gate), grad * act(gate)), dim=-1)

    return Activation(2, forward, forward_into, backward)


def relu_squared(h: Tensor) -> Tensor:
    """max(h, 0)^2, as a product. square() is a power, and autocast on CUDA computes powers in fp32."""
    h = F.relu(h)
    return h * h


ACTIVATIONS = {
    "gelu": Activation(  # the tanh form, as in GPT-2
        parts=1, forward=lambda h: F.gelu(h, approximate="tanh"),
        forward_into=lambda out, h: aten.gelu.out(h, approximate="tanh", out=out),
        backward=lambda grad, h: aten.gelu_backward(grad, h, approximate="tanh")),
    "gelu_erf": Activation(  # the exact form, as in nanoGPT
        parts=1, forward=F.gelu, forward_into=lambda out, h: aten.gelu.out(h, out=out),
        backward=aten.gelu_backward),
    "relu2": Activation(
        parts=1, forward=relu_squared, forward_into=lambda out, h: torch.square(F.relu(h), out=out),
        backward=lambda grad, h: 2 * grad * F.relu(h)),
    "swiglu": gated(F.silu, aten.silu_backward),
}  # fmt: skip


def get_activation(name: str) -> Activation:
    """The row of this name. ValueError if there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """Dense feed-forward network of a block, and the shared experts of `MoE`. hidden_size None: 4C."""

    def __init__(self, config, hidden_size: int | None = None):
        super().__init__()
        hidden = hidden_size or 4 * config.n_embd  # H
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, get_activation(self.activation).parts * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = get_activation(self.activation).forward(self.c_fc(x))  # (..., H)
        return self.dropout(self.c_proj(h))  # (..., C)
