"""Read and write GPT-2: weights and configuration of transformers' GPT2LMHeadModel.

    GPTLMHeadModel.from_pretrained("gpt2")            # or a folder with a GPT2LMHeadModel
    export_folder(model, "my_gpt2", format="gpt2")    # from a dense model with GPT-2's options

Source: names and shapes of transformers, models/gpt2/modeling_gpt2.py."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from huggingface.configuration import SHARED_FIELDS, refuse
from huggingface.llama import named_encoding

# Our fields, and theirs.
FIELDS = {name: name for name in (*SHARED_FIELDS, "n_layer", "n_head", "n_embd")} | {
    "block_size": "n_positions", "mlp_hidden_size": "n_inner", "dropout": "resid_pdrop",
    "norm_eps": "layer_norm_epsilon"}  # fmt: skip
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}  # theirs, and ours


def from_gpt2(theirs: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Our fields and weights for a GPT2LMHeadModel. ValueError names a field that we cannot express."""
    config = theirs.config
    only = {"activation_function": tuple(ACTIVATIONS), "scale_attn_weights": (True,)}
    others = "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"
    refuse("this GPT-2 has", config, only | dict.fromkeys(others, (False,)), "; only {!r} can be loaded")
    if not config.resid_pdrop == config.embd_pdrop == config.attn_pdrop:
        others = f"embd_pdrop={config.embd_pdrop} and attn_pdrop={config.attn_pdrop}"
        raise ValueError(f"this GPT-2 has resid_pdrop={config.resid_pdrop}, {others}; they must be equal")
    fields = {ours: getattr(config, theirs) for ours, theirs in FIELDS.items()}
    fields |= {"use_moe": False, "encoding": named_encoding(config),
               "activation": ACTIVATIONS[config.activation_function],
               "attn_implementation": config._attn_implementation}  # fmt: skip
    return fields, transpose_weights(theirs.state_dict())


def gpt2_features(config: PreTrainedConfig) -> dict[str, tuple]:
    """Our fields that are fixed in GPT-2, each with the values that mean GPT-2's."""
    return {"use_moe": (False,), "position": ("learned",), "n_kv_head": (config.n_head, None),
            "sliding_window": (None,), "norm": ("layernorm",), "activation": ("gelu",), "qk_norm": (False,),
            "logit_softcap": (0,), "ngram_order": (0,)}  # fmt: skip


def transpose_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's weights as ours, or ours as GPT-2's: its Conv1D keeps matrices as (in, out)."""
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {k: v.t().contiguous() if k.endswith(turned) else v for k, v in state_dict.items()}


def to_gpt2(model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """A dense GPT-2-style model as transformers' GPT2LMHeadModel, on the CPU, with equal logits.
    vocab_size: rows of the embeddings to keep. Absent biases become 0. ValueError for what GPT-2 lacks."""
    config, remedy = model.config, ", only {!r}; export with format='gpt_moe'"
    features = gpt2_features(config) | {"activation": ("gelu", "gelu_erf")}
    refuse("GPT-2 cannot express", config, features, remedy)
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields |= dict(vocab_size=vocab_size, encoding=config.encoding, n_ctx=config.block_size)  # for llama.cpp
    fields["activation_function"] = "gelu_new" if config.activation == "gelu" else "gelu"
    fields |= dict(embd_pdrop=config.dropout, attn_pdrop=config.dropout)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).to(model.dtype)
    weights = {name: torch.zeros_like(p) for name, p in theirs.state_dict().items() if name.endswith("bias")}
    weights |= transpose_weights(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocab_size]
    theirs.load_state_dict(weights)
    return theirs.eval()
