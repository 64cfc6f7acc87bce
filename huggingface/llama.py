"""Read and write models of the Llama family: RoPE, RMSNorm and SwiGLU, dense or with experts.

    export_folder(model, "my_llama", format="llama")          # or qwen3, mixtral, qwen3_moe
    GPTLMHeadModel.from_pretrained("my_llama")                # reads any of them

docs/huggingface.md says what a model must have for each format, and what an export drops.
Mixtral always divides a token's K weights by their sum; Qwen3 does so if norm_topk_prob. With K = 1 our model
never does: the weight would be 1, and the router would get no gradient.
Sources: transformers' modeling_llama.py, modeling_qwen3.py, modeling_mixtral.py and modeling_qwen3_moe.py."""

import logging
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from huggingface.configuration import SHARED_FIELDS, refuse

logger = logging.getLogger(__name__)
# Our formats (transformers' model_type), and the first part of transformers' class names.
FAMILY = {"llama": "Llama", "qwen3": "Qwen3", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}
FIELDS = {name: name for name in SHARED_FIELDS} | {  # our fields, and theirs
    "n_embd": "hidden_size", "mlp_hidden_size": "intermediate_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "norm_eps": "rms_norm_eps",
    "block_size": "max_position_embeddings"}  # fmt: skip
# Our weights, and their weights that each of ours stacks by rows. INSIDE lists those of a block:
# transformer.h.{i} and model.layers.{i}. A name without "experts" in it is followed by .weight or .bias.
OUTSIDE = {"transformer.wte.weight": "model.embed_tokens.weight",
           "transformer.ln_f.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"}  # fmt: skip
INSIDE = {"ln_1": ("input_layernorm",), "ln_2": ("post_attention_layernorm",),
          "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
          "attn.q_norm": ("self_attn.q_norm",), "attn.k_norm": ("self_attn.k_norm",),
          "attn.c_proj": ("self_attn.o_proj",), "mlp.gate": ("mlp.gate",),
          "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"), "mlp.c_proj": ("mlp.down_proj",),
          "mlp.experts.c_fc": ("mlp.experts.gate_up_proj",),
          "mlp.experts.c_proj": ("mlp.experts.down_proj",)}  # fmt: skip


def stacked_names(layers: int) -> dict[str, tuple[str, ...]]:
    """Each of our weights in a model of so many layers -> the names of their weights that it stacks."""
    names = {ours: (theirs,) for ours, theirs in OUTSIDE.items()}
    for layer in range(layers):
        for ours, theirs in INSIDE.items():
            for end in ("",) if "experts" in ours else (".weight", ".bias"):
                parts = tuple(f"model.layers.{layer}.{part}{end}" for part in theirs)
                names[f"transformer.h.{layer}.{ours}{end}"] = parts
    return names


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Our fields for a configuration of FAMILY. ValueError names a field that we cannot express."""
    kind, this = config.model_type, f"this {config.model_type} has"
    head_size = config.hidden_size // config.num_attention_heads
    only = {
        "hidden_act": ("silu", "swish"), "head_dim": (head_size, None), "attention_dropout": (0, None),
        "pretraining_tp": (1, None), "router_jitter_noise": (0,), "quantization_config": (None,)}  # fmt: skip
    if kind != "llama":
        only["attention_bias"] = (False,)
    refuse(this, config, only, "; only {!r} can be loaded")
    rope = {"partial_rotary_factor": 1.0} | config.rope_parameters
    theta = rope.pop("rope_theta")
    if rope != {"partial_rotary_factor": 1.0, "rope_type": "default"}:
        given = f"{this} rope_parameters={config.rope_parameters}"
        raise ValueError(f"{given}; only rope_type='default' can be loaded")
    fields = {ours: getattr(config, theirs) for ours, theirs in FIELDS.items()} | dict(
        use_moe=False, position="rope", rope_theta=theta, norm="rmsnorm", activation="swiglu", bias=False,
        qk_norm=kind in ("qwen3", "qwen3_moe"), attn_implementation=config._attn_implementation,
        encoding=named_encoding(config))  # fmt: skip
    if kind == "llama":
        fields["bias"] = config.mlp_bias
        if config.attention_bias != config.mlp_bias:
            biases = f"attention_bias={config.attention_bias} and mlp_bias={config.mlp_bias}"
            raise ValueError(f"{this} {biases}; they must be equal")
    return fields | window_fields(config) | expert_fields(config)


def named_encoding(config: PreTrainedConfig) -> str:
    """The encoding that our exports write into config.json, or "gpt2" if the vocabulary has GPT-2's size."""
    encoding = getattr(config, "encoding", "gpt2" if 50257 <= config.vocab_size <= 50304 else None)
    if encoding is None:
        remedy = 'for text, write "encoding": "bytes", or a name that tiktoken knows, into its config.json'
        logger.warning(f"this {config.model_type} does not say how text becomes tokens; {remedy}")
    return encoding or "unknown"


def period(marked: list[bool], start: int) -> int | None:
    """The k such that layer i is marked exactly if i - start is a multiple of k; None if there is none."""
    n = len(marked)
    fitting = (k for k in range(1, n + 1) if marked == [(i - start) % k == 0 for i in range(n)])
    return next(fitting, None)


def window_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Our sliding_window and global_every; ValueError if our fields cannot give windows to these layers."""
    window = getattr(config, "sliding_window", None)
    if window is None or config.model_type == "llama":
        return {}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    every = period([kind == "full_attention" for kind in kinds], start=-1)
    if every is None and "full_attention" in kinds:
        only = "only full attention in every k-th layer, counted from the first, can be loaded"
        raise ValueError(f"this {config.model_type} has layer_types={kinds}; {only}")
    return dict(sliding_window=window, global_every=every)


def expert_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Our fields of the experts; ValueError, naming the field, for a routing that we cannot express."""
    kind, layers = config.model_type, config.num_hidden_layers
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    normed = kind == "mixtral" or config.norm_topk_prob
    if normed and config.num_experts_per_tok == 1:
        given = f"this {kind} has num_experts_per_tok=1 and divides its weight by itself"
        raise ValueError(f"{given}; only norm_topk_prob=False can be loaded then")
    fields = dict(use_moe=True, router_score="softmax", norm_topk_prob=normed, num_experts=config.num_experts,
                  num_experts_per_tok=config.num_experts_per_tok)  # fmt: skip
    if kind == "mixtral":
        return fields | dict(expert_hidden_size=config.intermediate_size)
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    every = period([i not in dense and (i + 1) % step == 0 for i in range(layers)], start=layers - 1)
    if every is None:
        only = "only experts in every k-th layer, counted from the last, can be loaded"
        raise ValueError(f"this {kind} has decoder_sparse_step={step} and mlp_only_layers={dense}; {only}")
    return fields | dict(expert_hidden_size=config.moe_intermediate_size, moe_every=every)


def from_llama(theirs: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Our fields and weights for a model of FAMILY. ValueError names a field that we cannot express."""
    fields, weights, ours = config_fields(theirs.config), theirs.state_dict(), {}
    for name, parts in stacked_names(fields["n_layer"]).items():
        if parts[0] in weights:
            tensors = [weights[part] for part in parts]
            ours[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            if name.endswith("mlp.gate.weight"):
                ours[name] = ours[name].float()  # routers compute, and are kept, in fp32
    return fields, ours


def to_llama(model: PreTrainedModel, kind: str, vocab_size: int) -> PreTrainedModel:
    """A model as the architecture of FAMILY that `kind` names, on the CPU, with equal logits.
    vocab_size: rows of the embeddings to keep. ValueError, naming the field, for what it cannot express."""
    refuse_inexpressible(model, kind)
    stock = getattr(transformers, f"{FAMILY[kind]}ForCausalLM")
    theirs = stock(stock.config_class(**llama_arguments(model.config, kind, vocab_size))).to(model.dtype)
    rows = {name: len(tensor) for name, tensor in theirs.state_dict().items()}
    names, weights = stacked_names(model.config.n_layer), {}
    for name, tensor in model.state_dict().items():
        if name in names:  # routers' statistics are not
            tensor = tensor[:vocab_size] if name in ("transformer.wte.weight", "lm_head.weight") else tensor
            weights |= zip(names[name], tensor.split([rows[part] for part in names[name]]), strict=True)
    theirs.load_state_dict(weights)
    return theirs.eval()


def refuse_inexpressible(model: PreTrainedModel, kind: str) -> None:
    """ValueError, naming the field, for a model that is not of this kind."""
    config, experts = model.config, kind in ("mixtral", "qwen3_moe")
    only = {"position": ("rope",), "norm": ("rmsnorm",), "activation": ("swiglu",), "ngram_order": (0,),
            "logit_softcap": (0,), "use_moe": (experts,), "qk_norm": (kind.startswith("qwen3"),)}  # fmt: skip
    only |= {"sliding_window": (None,)} if kind == "llama" else {"bias": (False,)}
    if experts:
        only |= {"global_every": (None,), "router_score": ("softmax",), "num_shared_experts": (0,)}
    if kind == "mixtral":
        only |= {"moe_every": (1,), "norm_topk_prob": (True,)}
        only["num_experts_per_tok"] = tuple(range(2, config.num_experts + 1)) or (2,)
    this, mend = f"{FAMILY[kind]} cannot express", "export with format='gpt_moe'"
    refuse(this, config, only, ", only {!r}; " + mend)
    if any(layer.router_bias.any() for layer in model.moe_layers()):
        rate = f"router_bias_update_rate={config.router_bias_update_rate!r}"
        raise ValueError(f"{this} the biases of the routers that {rate} has made; {mend}")
    if config.dropout > 0:
        logger.warning(f"dropout={config.dropout}, which acts in training only, is left out")


def llama_arguments(config: PreTrainedConfig, kind: str, vocab_size: int) -> dict[str, Any]:
    """Arguments of their configuration. from_llama reads `encoding` back."""
    names = *FIELDS.values(), "head_dim", "encoding"  # GPTConfig knows all of them
    rope = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    arguments = {name: getattr(config, name) for name in names}
    arguments |= dict(vocab_size=vocab_size, rope_parameters=rope)
    if kind == "llama":
        return arguments | dict(attention_bias=config.bias, mlp_bias=config.bias)
    arguments["sliding_window"] = config.sliding_window
    windowed = config.sliding_window is not None
    if kind == "qwen3":
        return arguments | dict(use_sliding_window=windowed, layer_types=config.layer_types)
    arguments |= dict(num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok)
    if kind == "mixtral":
        return arguments | dict(intermediate_size=config.moe_intermediate_size)
    step, dense_layers = config.moe_every, []
    if config.n_layer % step != 0:  # Qwen3 counts from the first layer, and would choose other layers
        step, dense_layers = 1, [i for i in range(config.n_layer) if not config.is_moe_layer(i)]
    normed = config.norm_topk_prob and config.num_experts_per_tok > 1
    return arguments | dict(
        use_sliding_window=windowed, moe_intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=normed, decoder_sparse_step=step, mlp_only_layers=dense_layers)  # fmt: skip
