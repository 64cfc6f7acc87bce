"""Our settings under the names that transformers' clients (TRL, PEFT, vLLM, lm_eval) read."""

from typing import Any


class Resolved:
    """A name of the setting `field`. Where that is None, it is the value which default(config) gives."""

    def __init__(self, field: str, default):
        self.field, self.default = field, default

    def __get__(self, config, owner=None) -> int:
        value = getattr(config, self.field)
        return self.default(config) if value is None else value

    def __set__(self, config, value: int) -> None:
        setattr(config, self.field, value)


class StandardNames:
    """For GPTConfig, which has the fields. Only the fields are saved, and num_key_value_heads for PEFT."""

    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size", "rms_norm_eps": "norm_eps",
        "num_local_experts": "num_experts", "decoder_sparse_step": "moe_every"}  # fmt: skip
    num_key_value_heads = Resolved("n_kv_head", lambda config: config.n_head)
    intermediate_size = Resolved("mlp_hidden_size", lambda config: 4 * config.n_embd)
    moe_intermediate_size = Resolved("expert_hidden_size", lambda config: 4 * config.n_embd)
    resolved = {  # noqa: RUF012
        "num_key_value_heads": "n_kv_head", "intermediate_size": "mlp_hidden_size",
        "moe_intermediate_size": "expert_hidden_size"}  # fmt: skip
    output_router_logits = False  # TRL switches it on

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.n_embd // self.n_head

    @property
    def final_logit_softcapping(self) -> float | None:
        """logit_softcap, for clients that apply the head themselves."""
        return self.logit_softcap or None

    @property
    def router_aux_loss_coef(self) -> float:
        """moe_loss_coef for transformers' balance loss, which TRL computes: K times the mean of the layers',
        where ours is their sum."""
        return self.moe_loss_coef * self._moe_layers() / self.num_experts_per_tok if self.moe_loss else 0.0

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        if value != 0 and not self._moe_layers():
            raise ValueError(f"router_aux_loss_coef={value}: this model has no MoE layers")
        if value != self.router_aux_loss_coef:
            self.moe_loss_coef = value * self.num_experts_per_tok / self._moe_layers()

    def _moe_layers(self) -> int:
        return sum(map(self.is_moe_layer, range(self.n_layer)))

    def to_dict(self) -> dict[str, Any]:
        """All fields. PEFT's prefix tuning looks here for the number of heads if it is not n_head."""
        content = super().to_dict()
        if self.n_kv_head is not None:
            content["num_key_value_heads"] = self.n_kv_head
        return content
