"""What the model's forward returns under transformers."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

# transformers' field for the cache of keys and values. From version 5.24 on its name is "cache".
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"


@dataclass
class GPTLMOutput(CausalLMOutputWithCrossAttentions):
    """transformers' output, and in training the parts of the loss, () each. balance_loss and z_loss are sums
    over the MoE layers; `loss` adds them times their coefficients. In evaluation the parts are None."""

    cross_entropy: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None

    def loss_parts(self) -> torch.Tensor:
        """(3,): cross-entropy, balance loss, z-loss, without gradient; 0 where the model has no such loss."""
        parts = (self.cross_entropy, self.balance_loss, self.z_loss)
        return torch.stack([self.loss.new_zeros(()) if part is None else part.detach() for part in parts])
