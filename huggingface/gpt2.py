"""GPT-2 in and out: the weights and configuration of transformers' GPT2LMHeadModel.

    GPTLMHeadModel.from_pretrained("gpt2")            # or a folder with a GPT2LMHeadModel
    export_folder(model, "my_gpt2", format="gpt2")    # from a dense model with GPT-2's options

Source: names and shapes of transformers, models/gpt2/modeling_gpt2.py.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from huggingface.configuration import refuse


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Our fields for a transformers.GPT2Config; ValueError, naming the field, for what we cannot express."""
    only = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    }  # fmt: skip
    refuse("this GPT-2 has", config, only, "; only {!r} can be loaded")
    if not config.resid_pdrop == config.embd_pdrop == config.attn_pdrop:
        raise ValueError(
            f"this GPT-2 has resid_pdrop={config.resid_pdrop}, embd_pdrop={config.embd_pdrop} and "
            f"attn_pdrop={config.attn_pdrop}; they must be equal to become our one dropout"
        )
    return dict(
        use_moe=False, block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, mlp_hidden_size=config.n_inner,
        dropout=config.resid_pdrop, norm_eps=config.layer_norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        attn_implementation=config._attn_implementation, encoding=getattr(config, "encoding", "gpt2"),
    )  # fmt: skip


def transpose_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's weights as ours, or ours as GPT-2's: its Conv1D keeps matrices as (in, out)."""
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {k: v.t().contiguous() if k.endswith(turned) else v for k, v in state_dict.items()}


def from_gpt2(theirs: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Our fields and weights for a GPT2LMHeadModel; ValueError, naming the field, for what we lack."""
    return config_fields(theirs.config), transpose_weights(theirs.state_dict())


def to_gpt2(model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """A dense GPT-2-style model as transformers' GPT2LMHeadModel, on the CPU, with equal logits.

    vocab_size: rows of the embeddings to keep. Absent biases become zeros. ValueError, naming the field, for
    what GPT-2 cannot express.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    only = {
        "use_moe": (False,), "position": ("learned",), "n_kv_head": (None, config.n_head),
        "sliding_window": (None,), "norm": ("layernorm",), "activation": ("gelu",), "qk_norm": (False,),
        "logit_softcap": (0,),
    }  # fmt: skip
    refuse("GPT-2 cannot express", config, only, ", only {!r}; export with format='gpt_moe'")
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, n_inner=config.mlp_hidden_size,
            resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
            layer_norm_epsilon=config.norm_eps, tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id, encoding=config.encoding,
        )
    ).to(model.dtype)  # fmt: skip
    weights = {name: torch.zeros_like(p) for name, p in theirs.state_dict().items() if name.endswith("bias")}
    weights |= transpose_weights(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocab_size]
    theirs.load_state_dict(weights)
    return theirs.eval()
