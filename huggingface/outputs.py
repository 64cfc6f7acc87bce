"""What the model's forward takes and returns under transformers."""

from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedConfig, modeling_outputs
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

# transformers' field for the cache of keys and values. From version 5.24 on its name is "cache".
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"


@dataclass
class GPTOutput(modeling_outputs.BaseModelOutputWithPastAndCrossAttentions):
    """transformers' output, router_logits if asked for, one (N, E) for each MoE layer, and in training the
    routers' losses, () each: sums over the MoE layers."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None


@dataclass
class GPTLMOutput(CausalLMOutputWithCrossAttentions):
    """transformers' output, and in training the parts of the loss, () each. balance_loss and z_loss are sums
    over the MoE layers; `loss` adds them times their coefficients. In evaluation the parts are None.
    router_logits as in GPTOutput; with them aux_loss, transformers' balance loss, which is not in `loss`."""

    cross_entropy: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None

    def loss_parts(self) -> torch.Tensor:
        """(3,): cross-entropy, balance loss, z-loss, without gradient; 0 where the model has no such loss."""
        parts = (self.cross_entropy, self.balance_loss, self.z_loss)
        return torch.stack([self.loss.new_zeros(()) if part is None else part.detach() for part in parts])


def lm_output(base: GPTOutput, config: PreTrainedConfig, mask: torch.Tensor | None, **fields) -> GPTLMOutput:
    """The fields, and those of `base`. mask (B, S) as for the model's forward: padding has no aux_loss."""
    for name in (CACHE, "hidden_states", "attentions", "router_logits", "balance_loss", "z_loss"):
        fields[name] = getattr(base, name)
    if base.router_logits is not None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        T, is_padding = base.last_hidden_state.size(1), torch.is_tensor(mask) and mask.dim() == 2
        present = mask[:, -T:] if is_padding else None  # (B, T)
        sizes = config.num_experts, config.num_experts_per_tok
        fields["aux_loss"] = load_balancing_loss_func(base.router_logits, *sizes, present)
    return GPTLMOutput(**fields)


def choose_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The one of two names of an argument that holds something. PEFT passes a prefix under the old name while
    transformers passes its own, still empty cache. ValueError if both hold different keys."""
    if cache is None or cache is past_key_values:
        return past_key_values
    if past_key_values is None or past_key_values.get_seq_length() == 0:
        return cache
    if cache.get_seq_length() > 0:
        raise ValueError("give past_key_values or cache (two names of one argument), not both")
    return past_key_values
