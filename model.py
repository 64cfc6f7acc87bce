"""GPT language model, dense or with Mixture-of-Experts (MoE) layers, as an ordinary Hugging Face model.

    from model import GPT, GPTConfig, GPTLMHeadModel
    model = GPTLMHeadModel(GPTConfig(num_experts=8, num_experts_per_tok=2))
    logits, loss = model(idx, targets=targets)                       # nanoGPT's call, targets already shifted
    output = model(input_ids=idx, labels=idx)                        # Hugging Face's call, labels unshifted
    model = GPTLMHeadModel.from_pretrained("gpt2")                   # or a folder: GPT-2's, a Llama's, ours
    print(model.generate("Hello, I'm a language model,", max_length=50))

Letters in the trailing comments, here and in every other file:
    B batch    T sequence length    S keys a query can see (cache included)    C n_embd    V vocabulary
    nh query heads    nkv key/value heads    hs head size    N tokens = B * T
    E experts    K experts per token    H hidden size of an expert    R routed rows = N * K

References:
    GPT-2, Radford et al. 2019; its parameter names and numbers are those of Hugging Face's modeling_gpt2.py
    PaLM (FLOPs per token), arXiv 2204.02311 appendix B     RoPE, arXiv 2104.09864     GQA, arXiv 2305.13245
    sliding windows, arXiv 2004.05150     QK norm, arXiv 2010.04245     logit soft-capping, arXiv 2408.00118
"""

import difflib
import inspect
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers.initialization as init  # its functions leave weights alone that were loaded from a file
from huggingface_hub.dataclasses import strict
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.models.auto import modeling_auto

from huggingface.callbacks import MoEUsageLoggingCallback, MoEUsageTensorBoardCallback
from huggingface.convert import FOREIGN, decode_tokens, encode_prompt, fresh_statistics, load_foreign
from huggingface.export_code import export_code
from layers.attention import (
    CausalSelfAttention,
    LayerNorm,
    RMSNorm,
    build_masks,
    build_norm,
    rotary_angles,
    upcast,
)
from layers.experts import Experts
from layers.linear_cross_entropy import linear_cross_entropy
from layers.mlp import ACTIVATIONS, MLP
from mixture_of_experts import (
    BALANCE_LOSSES,
    ROUTER_SCORES,
    ExpertUsage,
    MoE,
    RouterAuxiliary,
    expert_usage,
    update_routers,
)

__all__ = [
    "GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "GPTLMHeadModel", "LayerNorm", "MoE",
    "MoEUsageLoggingCallback", "MoEUsageTensorBoardCallback", "RMSNorm",
]  # fmt: skip

# What transformers calls a cache of keys and values where it hands one over: from 5.24 on "cache", till then
# past_key_values, as the callers of years do.
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"

# Peak dense bf16 FLOP/s by words of the name that torch.cuda.get_device_name() gives; NVIDIA's data sheets,
# without sparsity. The longer name stands first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "A40": 150e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


@strict
class GPTConfig(PreTrainedConfig):
    """Every setting of the architecture. Types are checked at every assignment, the rest in __post_init__.

    Raises ValueError, naming field and value, for combinations that make no sense and for unknown names.
    """

    model_type = "gpt_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads a plain list)
    attribute_map = {  # noqa: RUF012 (names that transformers, lm_eval and PEFT look for)
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
    }

    block_size: int = 1024  # longest sequence
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | int = 0.0
    bias: bool = True  # in linear layers and layer norms
    mlp_hidden_size: int | None = None  # of dense feed-forward layers; None = 4 * n_embd
    # mixture of experts
    use_moe: bool = True
    num_experts: int = 2
    num_experts_per_tok: int = 1
    moe_every: int = 1  # an MoE in every k-th block, counted from the last one
    moe_loss: bool = True
    moe_loss_type: str = "load_balancing"
    moe_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    router_score: str = "softmax"
    norm_topk_prob: bool = True  # for K > 1; with K = 1 the weight is always the probability itself
    router_bias_update_rate: float | int = 0.0  # loss-free balancing when > 0
    num_shared_experts: int = 0
    expert_hidden_size: int | None = None  # None = 4 * n_embd
    # architecture
    position: str = "learned"
    rope_theta: float | int = 10000.0
    n_kv_head: int | None = None  # None = n_head
    sliding_window: int | None = None  # a query sees this many positions, its own included
    global_every: int | None = None  # with a window: every k-th layer sees everything
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"  # the tanh form, as in GPT-2
    qk_norm: bool = False
    logit_softcap: float | int = 0.0
    tie_word_embeddings: bool = True
    init: str = "gpt2"  # zero_proj: projections into the residual stream begin at zero
    # around the model
    encoding: str = "gpt2"  # how text becomes tokens: "bytes" or a name tiktoken knows
    encoding_size: int | None = None  # ids from here up only pad vocab_size and are never generated
    infer_step: int = 250  # kept for configurations of the original training script
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    CHOICES = {  # noqa: RUF012
        "moe_loss_type": BALANCE_LOSSES,
        "router_score": ROUTER_SCORES,
        "position": ("learned", "rope"),
        "norm": ("layernorm", "rmsnorm"),
        "activation": ACTIVATIONS,
        "init": ("gpt2", "zero_proj"),
    }  # fmt: skip

    LEAST = {  # noqa: RUF012
        "block_size": 1, "vocab_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "dropout": 0,
        "mlp_hidden_size": 1, "num_experts": 1, "num_experts_per_tok": 1, "moe_every": 1, "moe_loss_coef": 0,
        "router_z_loss_coef": 0, "router_bias_update_rate": 0, "num_shared_experts": 0,
        "expert_hidden_size": 1,
        "n_kv_head": 1, "sliding_window": 1, "global_every": 1, "logit_softcap": 0, "encoding_size": 1,
    }  # fmt: skip

    def __post_init__(self, **kwargs):
        # Dictionaries that transformers wrote carry its version, and may carry another version's names;
        # names that a person wrote are checked: an ignored typo trains the wrong model.
        if self.transformers_version is None:
            self._reject_unknown_names(kwargs)
        super().__post_init__(**kwargs)
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value}: must be a finite number")
        for name, least in self.LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}: must be below 1")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head != 0:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.position == "rope" and (self.n_embd // self.n_head) % 2 != 0:
            raise ValueError(
                f"position='rope' turns pairs of channels, but n_embd={self.n_embd} / n_head={self.n_head} "
                f"gives heads of an odd size, {self.n_embd // self.n_head}"
            )
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )
        if self.num_experts > 32_767:
            raise ValueError(f"num_experts={self.num_experts}: at most 32767, experts are sorted as int16")
        if self.global_every is not None and self.sliding_window is None:
            raise ValueError(f"global_every={self.global_every} has a meaning only with a sliding_window")
        if self.encoding_size is not None and self.encoding_size > self.vocab_size:
            raise ValueError(f"encoding_size={self.encoding_size} is more than vocab_size={self.vocab_size}")

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As transformers'; the model's calls it. The code goes along, so that the folder loads without this
        project: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)."""
        os.makedirs(save_directory, exist_ok=True)
        export_code(save_directory, Path(__file__))
        self.auto_map = {
            "AutoConfig": "model.GPTConfig", "AutoModel": "model.GPT",
            "AutoModelForCausalLM": "model.GPTLMHeadModel",
        }  # fmt: skip
        super().save_pretrained(save_directory, *args, **kwargs)

    def _reject_unknown_names(self, names: dict[str, Any]) -> None:
        fields = set(self.__dataclass_fields__) | set(self.attribute_map)
        known = fields | set(GenerationConfig._get_default_generation_params()) | {
            "torch_dtype", "num_labels", "name_or_path", "_name_or_path", "_commit_hash", "output_attentions",
            "attn_implementation", "experts_implementation", "auto_map", "model_type", "layer_types",
        }  # fmt: skip
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"GPTConfig has no field {name!r}{hint}")

    @property
    def layer_types(self) -> list[str]:
        """What each layer attends to, in the words transformers' caches and masks understand."""
        if self.sliding_window is None:
            return ["full_attention"] * self.n_layer
        every = self.global_every or self.n_layer + 1
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(self.n_layer)]

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer`, 0 .. n_layer - 1, holds an MoE: the last does, and every k-th before it."""
        return self.use_moe and (self.n_layer - 1 - layer) % self.moe_every == 0


class Block(GradientCheckpointingLayer):
    """Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)), dense or MoE."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_norm(config)
        dense_size = config.mlp_hidden_size or 4 * config.n_embd
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config, dense_size)

    def forward(
        self,
        x: torch.Tensor,  # (B, T, C)
        mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_mask: torch.Tensor | None = None,  # (B, T), tokens that count in the router's statistics
        num_tokens: torch.Tensor | int | None = None,
        past_key_values=None,
        output_attentions: bool = False,
        return_auxiliary: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """x (B, T, C) -> x; with return_auxiliary a tuple: x, attention weights, and the router's report.

        Weights are None unless output_attentions. The report, in training and for an MoE only, is a
        RouterAuxiliary. Whoever asks for it must accumulate() it: activation checkpointing runs this twice
        and must count once. It is unpacked: reentrant checkpointing gives gradients to bare tensors only.
        """
        y = self.attn(self.ln_1(x), mask, rotary, past_key_values, output_attentions)
        y, weight = y if output_attentions else (y, None)
        x = x + y
        if isinstance(self.mlp, MoE):
            y = self.mlp(self.ln_2(x), token_mask, num_tokens, return_auxiliary)
            y, report = y if return_auxiliary else (y, None)
        else:
            y, report = self.mlp(self.ln_2(x)), None
        return (x + y, weight, *(report or ())) if return_auxiliary else x + y


@dataclass
class GPTLMOutput(CausalLMOutputWithCrossAttentions):
    """Hugging Face's output, and in training the parts of the loss: loss = cross_entropy + weighted others.

    cross_entropy, balance_loss and z_loss are 0-dimensional; the latter two are sums over the MoE layers,
    before their coefficients. All three are None in evaluation, where loss is the cross-entropy alone.
    """

    cross_entropy: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None


class GPT(PreTrainedModel, GenerationMixin):
    """The transformer with its (tied) head. `forward` gives hidden states; with a target, logits and loss.

    `config` is a GPTConfig or the plain dictionary of one, as training checkpoints hold it.
    """

    config_class = GPTConfig
    base_model_prefix = ""
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 (accelerate leaves caches where they are)
    _keep_in_fp32_modules_strict = ["mlp.gate", "router_bias"]  # noqa: RUF012 (when loaded with another dtype)
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer then hands us num_items_in_batch and leaves the loss as it is
    _gives_logits = False
    # Rows of logits at a time in the loss, -1 for as many as pay. The outputs have no logits then, except in
    # nanoGPT's pair. 0: all rows at once, and they are in the outputs.
    loss_chunk = 0

    def __init__(self, config: GPTConfig | dict):
        if isinstance(config, dict):
            config = GPTConfig(**config)
        super().__init__(config)
        # By this Trainer counts labels after the shift; else the loss it reports is (T-1)/T of the truth.
        self.loss_type = "ForCausalLM"
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer["ln_f"] = build_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._suppress_padding()
        for name, module in self.named_modules():
            if name.endswith("c_proj"):
                module.into_residual = True  # for _init_weights, which is not told the name
        # DDP would overwrite what a rank has counted with rank 0's; update_routers() adds up all ranks'.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.endswith(MoE.per_rank_buffers)
        ]
        self.post_init()

    def _suppress_padding(self) -> None:
        """Never generate ids that only pad the vocabulary: whoever decoded one would get an error."""
        size, generation = self.config.encoding_size, self.generation_config
        if size is not None and size < self.config.vocab_size and generation.suppress_tokens is None:
            generation.suppress_tokens = list(range(size, self.config.vocab_size))

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation, all of it: N(0, 0.02), projections into the residual stream 0.02/sqrt(2 L).

        With init="zero_proj" the latter begin at zero: every block is the identity at first.
        Called for every module that has parameters or buffers of its own (not for others: transformers skips
        them in code that is not its own). The functions of transformers.initialization leave loaded weights
        alone.
        """
        residual_std = 0.0 if self.config.init == "zero_proj" else 0.02 / math.sqrt(2 * self.config.n_layer)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=residual_std if hasattr(module, "into_residual") else 0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, (LayerNorm, RMSNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Experts):
            init.normal_(module.c_fc, std=0.02)
            init.normal_(module.c_proj, std=residual_std)
            if module.c_fc_bias is not None:
                init.zeros_(module.c_fc_bias)
                init.zeros_(module.c_proj_bias)
        elif isinstance(module, MoE):
            for name, value in module.initial_statistics().items():
                init.copy_(getattr(module, name), value)

    # --- embeddings, sizes ------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, (V, C)."""
        return self.transformer.wte

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        """Replace the token embedding; if embeddings are tied, the head becomes the same matrix."""
        self.transformer.wte = new_embeddings
        if self.config.tie_word_embeddings:
            self.lm_head.weight = new_embeddings.weight
            self.lm_head.out_features = new_embeddings.num_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As transformers', ties kept; where the size changes, every id counts as real text afterwards."""
        old_size = self.config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.vocab_size != old_size:
            self.config.encoding_size = self.generation_config.suppress_tokens = None
        return embeddings

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest sequence, dropping the position embeddings beyond it; ValueError if longer."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: can only be cropped to 1..{self.config.block_size}")
        self.config.block_size = block_size
        if "wpe" in self.transformer:
            self.transformer.wpe.weight = nn.Parameter(
                self.transformer.wpe.weight[:block_size].detach().clone()
            )
            self.transformer.wpe.num_embeddings = block_size

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; non_embedding leaves out look-up tables: positions, and tokens if untied."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding and "wpe" in self.transformer:
            count -= self.transformer.wpe.weight.numel()
        if non_embedding and not self.config.tie_word_embeddings:
            count -= self.transformer.wte.weight.numel()
        return count

    def get_num_active_params(self) -> int:
        """Number of parameters in a token's matrix products: K of E experts, the head, no look-up tables."""
        count = self.get_num_params()
        for moe in self.moe_layers():
            experts = sum(p.numel() for p in moe.experts.parameters())
            count -= experts - experts // moe.experts.c_fc.size(0) * self.config.num_experts_per_tok
        return count

    def flops_per_token(self, length: int | None = None) -> float:
        """FLOPs of forward and backward per token: 6 N + 12 L C T (PaLM appendix B, eq. 2). T is `length`, or
        block_size.

        N counts active parameters; a layer with a window counts the window in place of T. Causality is not
        discounted, as in nanoGPT and llm.c, so figures compare with theirs.
        """
        config, length = self.config, length or self.config.block_size
        window = min(config.sliding_window or length, length)
        spans = [window if kind == "sliding_attention" else length for kind in config.layer_types]
        return 6 * self.get_num_active_params() + 12 * config.n_embd * sum(spans)

    def estimate_mfu(
        self, fwdbwd_per_iter: float, dt: float, peak_flops: float | None = None, length: int | None = None
    ) -> float | None:
        """Model FLOPs utilisation, 0..1: sequences of length (block_size) tokens an iteration, of dt seconds.

        Relative to the device's peak in bf16 (PEAK_FLOPS); None where that is not known (CPU, unlisted GPUs).
        """
        if peak_flops is None and self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            whole = re.compile("|".join(rf"(?<!\w){re.escape(part)}(?!\w)" for part in PEAK_FLOPS))
            found = whole.search(name)  # "L40" is no L4
            peak_flops = PEAK_FLOPS[found[0]] if found else None
        if peak_flops is None:
            return None
        length = length or self.config.block_size
        return self.flops_per_token(length) * length * fwdbwd_per_iter / dt / peak_flops

    # --- experts ----------------------------------------------------------------------------------------

    def moe_layers(self) -> list[MoE]:
        """The MoE layers, first block first; empty for a dense model."""
        return [block.mlp for block in self.transformer.h if isinstance(block.mlp, MoE)]

    def update_routers(self, process_group=None) -> None:
        """Tell the routers that an optimizer step is over: call it before training and after every step.

        Reduces the step's routing statistics over all ranks (one collective), makes them the reference of
        the balance losses and moves the biases of loss-free balancing. See mixture_of_experts.py.
        """
        update_routers(self.moe_layers(), process_group)

    def expert_usage(self, reset: bool = False, reduce: bool = False) -> list[ExpertUsage]:
        """Each MoE layer's counts and loads since its last reset: all ranks' up to the last update_routers(),
        since then this rank's, or with reduce=True all ranks' (a collective). reset: on this rank."""
        usage = expert_usage(self.moe_layers(), reduce=reduce)
        for moe in self.moe_layers() if reset else ():
            moe.reset_usage_counts()
        return usage

    # --- forward ----------------------------------------------------------------------------------------

    def _positions(self, x, padding, past_key_values) -> torch.Tensor:
        """Positions (B or 1, T) of new tokens: after the cached ones, a row's padding not counted.

        A left-padded row then equals the row alone. ValueError past block_size.
        """
        T, past = x.size(1), past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past, int) and past + T > self.config.block_size:  # a static cache's length is a tensor
            raise ValueError(f"{past + T} tokens are longer than block_size={self.config.block_size}")
        if padding is not None:
            return (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        return torch.arange(T, device=x.device)[None] + past

    def _run(
        self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
        output_attentions, output_hidden_states, counted, num_tokens,
    ) -> tuple[BaseModelOutputWithPastAndCrossAttentions, list[RouterAuxiliary]]:  # fmt: skip
        """Embed and run the blocks: the hidden states, and what each router reports of a training forward.

        counted (B, T) or None: the tokens in the routers' losses and statistics; padding never is.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None and self.training and self.is_gradient_checkpointing:
            past_key_values = None  # the second forward of a block would add its keys again
        flexible = self.training and not output_attentions
        masks = build_masks(config, x, attention_mask, position_ids, past_key_values, flexible)
        padding = attention_mask if torch.is_tensor(attention_mask) and attention_mask.dim() == 2 else None
        if padding is not None:
            present = padding[:, -x.size(1) :].bool()  # (B, T)
            counted = present if counted is None else counted & present
        if position_ids is None:
            position_ids = self._positions(x, padding, past_key_values)
        rotary = None
        if config.position == "rope":
            rotary = rotary_angles(position_ids, config.n_embd // config.n_head, config.rope_theta)
        else:
            x = x + self.transformer.wpe(position_ids)
        x = self.transformer.drop(x)

        hidden_states, attentions, reports = [x], [], []
        for block, kind in zip(self.transformer.h, config.layer_types, strict=True):
            x, weight, *report = block(
                x, masks[kind], rotary, counted, num_tokens,
                past_key_values=past_key_values, output_attentions=output_attentions, return_auxiliary=True,
            )  # fmt: skip
            if output_hidden_states:
                hidden_states.append(x)
            attentions.append(weight)
            if report:
                reports.append(RouterAuxiliary(*report))
                block.mlp.accumulate(reports[-1])
        x = self.transformer.ln_f(x)
        hidden_states[-1] = x  # as GPT-2 does, the last one is normalised
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: past_key_values if use_cache else None},
        )
        return output, reports

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,  # (B, S), 0 = padding
        position_ids: torch.LongTensor | None = None,  # (B, T)
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,  # (B, T, C)
        labels: torch.LongTensor | None = None,  # (B, T), unshifted, -100 is ignored
        targets: torch.LongTensor | None = None,  # (B, T), shifted, -1 is ignored
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache=None,  # another name of past_key_values
    ) -> BaseModelOutputWithPastAndCrossAttentions | GPTLMOutput | tuple:
        """GPT: hidden states after the last norm, (B, T, C). GPTLMHeadModel: logits (B, T, V).

        Either gives logits and the loss when there are labels or targets (targets: as nanoGPT's pair, unless
        return_dict=True); in training the loss has the routers' losses in it.
        logits_to_keep: only the last so many positions (0 = all), or a 1-d tensor of them; not with a loss.
        With loss_chunk, a loss comes without logits, whose memory it saves; nanoGPT's pair has them always.
        num_items_in_batch: number of targets in the whole optimizer step, of which this call is a part; the
        loss is then this part's share. Tokens then weigh in the routers' losses as in the cross-entropy
        (those with a target, over the step's number of targets), so that no sum depends on the cut.
        ValueError for a sequence longer than block_size, for labels together with targets, for a cache by
        both its names, and unless exactly one of input_ids and inputs_embeds is given.
        """
        config = self.config
        if cache is not None:
            if past_key_values is not None:
                raise ValueError("give past_key_values or cache, two names of the same, not both")
            past_key_values = cache
        if labels is not None and targets is not None:
            raise ValueError("give labels (unshifted) or targets (shifted), not both")
        as_pair, ignore_index = targets is not None and not return_dict, -1
        if labels is not None:
            targets, ignore_index = F.pad(labels[:, 1:], (0, 1), value=-100), -100
        if targets is not None:
            use_cache, logits_to_keep = False, 0
        elif use_cache is None:
            use_cache = config.use_cache and not self.training
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        in_parts = targets is not None and num_items_in_batch is not None
        output, reports = self._run(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_attentions, output_hidden_states,
            counted=targets != ignore_index if in_parts else None,
            num_tokens=num_items_in_batch if in_parts else None,
        )  # fmt: skip
        if targets is not None or self._gives_logits:
            hidden, logits, losses = output.last_hidden_state, None, {}
            # Only a bare head is what its weight says: an adapter or quantisation would make it another one.
            chunk = self.loss_chunk if type(self.lm_head) is nn.Linear and not as_pair else 0
            if targets is None or not chunk:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                logits = self._logits(hidden[:, kept])  # (B, T or kept, V)
            if targets is not None:
                losses = self._losses(
                    self._cross_entropy(hidden, logits, targets, ignore_index, num_items_in_batch), reports
                )
            if as_pair:
                return logits, losses["loss"]
            output = GPTLMOutput(
                logits=logits,
                hidden_states=output.hidden_states,
                attentions=output.attentions,
                **{CACHE: getattr(output, CACHE)},
                **losses,
            )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> logits (B, T, V), soft-capped if configured (Gemma 2, arXiv 2408.00118)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def _cross_entropy(self, hidden, logits, targets, ignore_index, num_items) -> torch.Tensor:
        """Cross-entropy on targets (B, T) in nats, of logits (B, T, V), or without them of hidden (B, T, C).

        A mean over the targets; with num_items their sum, divided by that number.
        """
        if logits is None:
            return linear_cross_entropy(
                hidden, self.lm_head.weight, targets, ignore_index, num_items,
                self.config.logit_softcap, self.loss_chunk,
            )  # fmt: skip
        loss = F.cross_entropy(
            upcast(logits).view(-1, logits.size(-1)), targets.reshape(-1),
            ignore_index=ignore_index, reduction="mean" if num_items is None else "sum",
        )  # fmt: skip
        return loss if num_items is None else loss / num_items

    def _losses(self, loss: torch.Tensor, reports) -> dict[str, torch.Tensor]:
        """The loss and, in training, the parts it consists of, from the cross-entropy and the routers."""
        losses = {"loss": loss}
        if self.training:
            losses["cross_entropy"] = loss
        if reports:
            balance_loss = torch.stack([report.balance_loss for report in reports]).sum()
            z_loss = torch.stack([report.z_loss for report in reports]).sum()
            loss = loss + self.config.moe_loss_coef * balance_loss + self.config.router_z_loss_coef * z_loss
            losses |= {"loss": loss, "balance_loss": balance_loss, "z_loss": z_loss}
        return losses

    # --- text -------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs
    ) -> dict:
        """As transformers', and a text that outgrows block_size is cropped to its last block_size tokens.

        The cache is dropped then, because every position moves (nanoGPT's way, exact but slower per token).
        """
        for name in ("tokenizer", "assistant_tokenizer"):  # generate()'s, for stop_strings
            kwargs.pop(name, None)
        block_size, cache = self.config.block_size, kwargs.get(CACHE)
        cached = cache.get_seq_length() if cache is not None else 0
        if cached > input_ids.size(1) and cached >= block_size:  # inputs_embeds have no ids
            raise ValueError(
                f"what inputs_embeds begin has reached block_size={block_size} positions, and without token "
                "ids it cannot be cropped; generate fewer tokens"
            )
        if input_ids.size(1) > block_size:
            input_ids = input_ids[:, -block_size:]
            attention_mask = attention_mask[:, -block_size:] if attention_mask is not None else None
            kwargs |= {"use_cache": False, "position_ids": None, "next_sequence_length": None, CACHE: None}
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )

    def _assisted_decoding(self, *args, **kwargs):
        """transformers' for assistant_model and prompt_lookup_num_tokens, which have to keep the cache."""
        length, block_size = kwargs["generation_config"].max_length, self.config.block_size
        if length > block_size:
            raise ValueError(
                f"assisted generation of up to {length} tokens would outgrow block_size={block_size}; lower "
                "max_new_tokens or max_length, or generate without assistance"
            )
        return super()._assisted_decoding(*args, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | str | None = None, *args, **kwargs):
        """transformers' generate(); with a string, the text that continues it, prompt included.

        A string is encoded with config.encoding; max_length and max_new_tokens count tokens, and a list of
        texts comes back if num_return_sequences > 1. Runs in evaluation mode, whatever mode the model is in.
        ValueError for a string that the model's vocabulary or encoding cannot hold.
        """
        modes = [(module, module.training) for module in self.modules()]  # a frozen part may have its own
        self.eval()
        # The same parameters as the class whose forward gives logits, without a compiled forward: the
        # growing sequences of generation would make it compile again and again. (As copy.copy, which fails
        # for the class that FSDP gives the model.)
        # If accelerate has bound this model's own forward, that goes along: it shall give logits meanwhile.
        self._gives_logits, gave = True, self._gives_logits
        model = GPTLMHeadModel.__new__(GPTLMHeadModel)
        model.__setstate__(self.__getstate__())
        try:
            if not isinstance(inputs, str):
                return super(GPT, model).generate(inputs, *args, **kwargs)
            ids = torch.tensor([encode_prompt(inputs, self.config)], device=self.device)  # (1, T)
            end = self.generation_config.eos_token_id
            kwargs = {
                "attention_mask": torch.ones_like(ids),
                "pad_token_id": end[0] if isinstance(end, list) else end,
            } | kwargs
            rows = super(GPT, model).generate(ids, *args, **kwargs)
            texts = [decode_tokens(row, self.config.encoding) for row in rows.tolist()]
            return texts[0] if len(texts) == 1 else texts
        finally:
            self._gives_logits = gave
            for module, was_training in modes:
                module.training = was_training

    # --- training and files -----------------------------------------------------------------------------

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        device_type: str,
        router_lr_mult: float = 1.0,
        expert_lr_mult: float = 1.0,
    ) -> torch.optim.AdamW:
        """AdamW with weight decay by role: matrices and embeddings decay; biases and norms never do.

        (Not by number of dimensions: the stacked biases of the experts have two.) Groups, as far as they are
        not empty: rest, router, experts, each with and without decay. Every group carries "lr_mult", by
        which a schedule multiplies its rate, and "name". Fused where the device has it.
        """
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                role = "router" if ".gate." in name else "experts" if ".experts." in name else "rest"
                decays = not (name.endswith("bias") or ".ln_" in name or "_norm." in name)
                groups.setdefault((role, decays), []).append(parameter)
        lr_mult = {"rest": 1.0, "router": router_lr_mult, "experts": expert_lr_mult}
        param_groups = [
            dict(
                params=params, weight_decay=weight_decay if decays else 0.0, lr=learning_rate * lr_mult[role],
                lr_mult=lr_mult[role], name=role if decays else f"{role} without decay",
            )
            for (role, decays), params in sorted(groups.items())
        ]  # fmt: skip
        fused = device_type in ("cuda", "cpu") and "fused" in inspect.signature(torch.optim.AdamW).parameters
        return torch.optim.AdamW(param_groups, lr=learning_rate, betas=betas, fused=fused)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", or a folder: ours, or of transformers' GPT-2,
        Llama, Qwen3, Qwen3-MoE or Mixtral.

        Settings of GPTConfig may be given too (dropout=0.1). ValueError for one of another architecture, one
        that lacks weights or, naming the field, that this model cannot express.
        """
        found = {}
        if pretrained_model_name_or_path is not None and kwargs.get("config") is None:
            hub = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
            given = {name: kwargs[name] for name in hub if name in kwargs}
            found, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **given)
        kind = found.get("model_type")
        if kind not in (None, GPTConfig.model_type, *FOREIGN):
            raise ValueError(
                f"{pretrained_model_name_or_path}: models of type {kind!r} cannot be read, only "
                f"{GPTConfig.model_type}, {', '.join(FOREIGN)}"
            )
        if kind not in FOREIGN:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded)._suppress_padding()
            return loaded
        wants_info = kwargs.pop("output_loading_info", False)
        ours = {name: kwargs.pop(name) for name in inspect.get_annotations(GPTConfig) if name in kwargs}
        fields, weights, generation_config, info = load_foreign(
            kind, pretrained_model_name_or_path, *args, **kwargs
        )
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(GPTConfig(**fields | ours))
        model.load_state_dict(weights | fresh_statistics(model), assign=True)
        model.tie_weights()
        model.generation_config = generation_config
        model.eval()
        return (model, info) if wants_info else model


class GPTLMHeadModel(GPT):
    """GPT for generation and next-token prediction: `forward` gives logits. Its state dict is a GPT's."""

    _gives_logits = True

    def get_output_embeddings(self) -> nn.Linear:
        """The head, (V, C)."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head; if embeddings are tied, the token embedding becomes the same matrix."""
        self.lm_head = new_embeddings
        if self.config.tie_word_embeddings:
            self.transformer.wte.weight = new_embeddings.weight
            self.transformer.wte.num_embeddings = new_embeddings.weight.size(0)


# By this list Trainer knows that labels want a shift when it smooths them.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GPTConfig.model_type] = GPTLMHeadModel.__name__
