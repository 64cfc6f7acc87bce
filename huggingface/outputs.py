"""What the model's forward returns under transformers."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

# The field in which transformers hands over a cache of keys and values: "cache" from version 5.24 on.
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"


@dataclass
class GPTLMOutput(CausalLMOutputWithCrossAttentions):
    """transformers' output, and in training the parts of the loss: loss = cross_entropy + weighted others.

    cross_entropy, balance_loss and z_loss are 0-dimensional. The latter two are sums over the MoE layers,
    before their coefficients. All three are None in evaluation, where loss is the cross-entropy alone.
    """

    cross_entropy: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None

    def loss_parts(self) -> torch.Tensor:
        """(3,): cross-entropy, balance loss, z-loss, without gradient; 0 where the model has no such loss."""
        parts = (self.cross_entropy, self.balance_loss, self.z_loss)
        return torch.stack([self.loss.new_zeros(()) if part is None else part.detach() for part in parts])
