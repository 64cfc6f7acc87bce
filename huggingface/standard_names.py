"""Our settings under the names that transformers' clients (TRL, PEFT, vLLM, lm_eval) read."""

from collections.abc import Callable
from typing import Any


def resolved(field: str, default: Callable[[Any], int]) -> property:
    """A name of the setting `field`. Where that is None, it is the value which default(config) gives."""

    def get(config) -> int:
        value = getattr(config, field)
        return default(config) if value is None else value

    return property(get, lambda config, value: setattr(config, field, value))


class StandardNames:
    """For GPTConfig, which has the fields. Only the fields are saved, and num_key_value_heads for PEFT."""

    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size", "rms_norm_eps": "norm_eps",
        "num_local_experts": "num_experts", "decoder_sparse_step": "moe_every"}  # fmt: skip
    num_key_value_heads = resolved("n_kv_head", lambda config: config.n_head)
    intermediate_size = resolved("mlp_hidden_size", lambda config: 4 * config.n_embd)
    moe_intermediate_size = resolved("expert_hidden_size", lambda config: 4 * config.n_embd)
    head_dim = property(lambda config: config.n_embd // config.n_head)
    final_logit_softcapping = property(lambda config: config.logit_softcap or None)
    moe_layers = property(lambda config: sum(map(config.is_moe_layer, range(config.n_layer))))
    output_router_logits = False  # TRL switches it on

    @property
    def router_aux_loss_coef(self) -> float:
        """moe_loss_coef for transformers' balance loss, which TRL computes: K times the mean of the layers',
        where ours is their sum."""
        return self.moe_loss_coef * self.moe_layers / self.num_experts_per_tok if self.moe_loss else 0.0

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        if value != 0 and not self.moe_layers:
            raise ValueError(f"router_aux_loss_coef={value}: this model has no MoE layers")
        if value != self.router_aux_loss_coef:
            self.moe_loss = True  # otherwise the coefficient has no effect
            self.moe_loss_coef = value * self.num_experts_per_tok / self.moe_layers

    def to_dict(self) -> dict[str, Any]:
        """All fields. PEFT's prefix tuning looks here for the number of heads if it is not n_head."""
        content = super().to_dict()
        if self.n_kv_head is not None:
            content["num_key_value_heads"] = self.n_kv_head
        return content
