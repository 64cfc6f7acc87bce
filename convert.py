"""Weights and configurations of other architectures, as ours and back. Plain functions on dictionaries.

Source of GPT-2's names and shapes: transformers, models/gpt2/modeling_gpt2.py.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig


def gpt2_config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Our fields for a transformers.GPT2Config; ValueError, naming the field, for what we cannot express."""
    only = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    }
    for name, allowed in only.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"this GPT-2 has {name}={getattr(config, name)!r}; only {allowed[0]!r} can be loaded"
            )
    if not config.resid_pdrop == config.embd_pdrop == config.attn_pdrop:
        raise ValueError(
            f"this GPT-2 has resid_pdrop={config.resid_pdrop}, embd_pdrop={config.embd_pdrop} and "
            f"attn_pdrop={config.attn_pdrop}; they must be equal to become our one dropout"
        )
    return dict(
        use_moe=False, block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, mlp_hidden_size=config.n_inner,
        dropout=config.resid_pdrop,
        norm_eps=config.layer_norm_epsilon, tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
    )  # fmt: skip


def transpose_gpt2_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's GPT-2 weights as ours, or ours as theirs: their Conv1D keeps matrices as (in, out)."""
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {k: v.t().contiguous() if k.endswith(turned) else v for k, v in state_dict.items()}
