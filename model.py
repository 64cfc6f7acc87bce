"""GPT language model, dense or with Mixture-of-Experts (MoE) layers, as an ordinary Hugging Face model.

    from model import GPT, GPTConfig, GPTLMHeadModel
    model = GPTLMHeadModel(GPTConfig(num_experts=8, num_experts_per_tok=2))
    logits, loss = model(idx, targets=targets)                       # nanoGPT's call, targets already shifted
    output = model(input_ids=idx, labels=idx)                        # Hugging Face's call, labels unshifted
    model = GPTLMHeadModel.from_pretrained("gpt2")                   # or a folder: GPT-2's, a Llama's, ours
    print(model.generate("Hello, I'm a language model,", max_length=50))

huggingface/ has what else transformers expects of a model: generate, from_pretrained, saved folders.

Letters in the trailing comments, here and in every other file:
    B batch    T sequence length    S keys a query can see (cache included)    C n_embd    V vocabulary
    nh query heads    nkv key/value heads    hs head size    N tokens = B * T
    E experts    K experts per token    H hidden size of an expert    R routed rows = N * K

References:
    GPT-2, Radford et al. 2019; its parameter names and numbers are those of Hugging Face's modeling_gpt2.py
    RMSNorm, arXiv 1910.07467     RoPE, arXiv 2104.09864     grouped queries (GQA), arXiv 2305.13245
    sliding windows, arXiv 2004.05150     QK norm, arXiv 2010.04245     logit soft-capping, arXiv 2408.00118
    FLOPs per token, PaLM, arXiv 2204.02311 appendix B
"""

import math
import re

import torch
import torch.nn.functional as F
import transformers.initialization as init  # its functions do not change weights loaded from a file
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from huggingface.callbacks import MoEUsageLoggingCallback, MoEUsageTensorBoardCallback  # noqa: F401
from huggingface.classification import Classification
from huggingface.configuration import CheckedConfig, setting
from huggingface.generation import GPTGenerationMixin
from huggingface.outputs import CACHE, GPTLMOutput, GPTOutput, choose_cache, lm_output
from huggingface.pretrained import GPTPreTrainedModel
from huggingface.standard_names import StandardNames
from layers.experts import Experts
from layers.linear_cross_entropy import linear_cross_entropy
from layers.mlp import ACTIVATIONS, MLP
from layers.ngrams import NgramEmbedding, recall, remember
from layers.roles import parameter_groups
from layers.rotary import NormAndRotate, can_norm_and_rotate, rotary_angles, rotate

from layers.attention import (  # isort: skip
    BlockMask, attention_reference, build_masks, fused_attention, positions_in_documents, upcast
)  # fmt: skip
from mixture_of_experts import (  # isort: skip
    BALANCE_LOSSES, ROUTER_SCORES, ExpertUsage, MoE, RouterAuxiliary, expert_usage, update_routers
)  # fmt: skip

# Peak dense bf16 FLOP/s from NVIDIA's data sheets, without sparsity. A key is a part of the name from
# torch.cuda.get_device_name(). The longer key must come first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "A40": 150e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}  # fmt: skip


@strict
class GPTConfig(StandardNames, CheckedConfig):
    """Every setting of the architecture. Types are checked at every assignment, limits at construction.
    Raises ValueError, naming field and value, for impossible combinations and for unknown names."""

    model_type = "gpt_moe"
    code = __file__  # save_pretrained copies this file and those that it imports

    block_size: int = setting(1024, least=1)  # longest sequence
    vocab_size: int = setting(50257, least=1)
    n_layer: int = setting(12, least=1)
    n_head: int = setting(12, least=1)
    n_embd: int = setting(768, least=1)
    dropout: float | int = setting(0.0, least=0, below=1)
    bias: bool = True  # in linear layers and layer norms
    mlp_hidden_size: int | None = setting(None, least=1)  # of dense feed-forward layers; None = 4 * n_embd
    # mixture of experts
    use_moe: bool = True
    num_experts: int = setting(2, least=1, most=32_767)  # experts are sorted as int16
    num_experts_per_tok: int = setting(1, least=1)
    moe_every: int = setting(1, least=1)  # an MoE in every k-th block, counted from the last one
    moe_loss: bool = True
    moe_loss_type: str = setting("load_balancing", choices=BALANCE_LOSSES)
    moe_loss_coef: float | int = setting(0.01, least=0)
    router_z_loss_coef: float | int = setting(0.0, least=0)
    router_score: str = setting("softmax", choices=ROUTER_SCORES)
    norm_topk_prob: bool = True  # for K > 1; with K = 1 the weight is always the probability itself
    router_bias_update_rate: float | int = setting(0.0, least=0)  # loss-free balancing when > 0
    num_shared_experts: int = setting(0, least=0)
    expert_hidden_size: int | None = setting(None, least=1)  # None = 4 * n_embd
    # architecture
    position: str = setting("learned", choices=("learned", "rope"))
    rope_theta: float | int = setting(10000.0, above=0)
    n_kv_head: int | None = setting(None, least=1)  # None = n_head
    sliding_window: int | None = setting(None, least=1)  # positions that a query sees, including its own
    global_every: int | None = setting(None, least=1)  # with a window: every k-th layer sees everything
    norm: str = setting("layernorm", choices=("layernorm", "rmsnorm"))
    norm_eps: float = setting(1e-5, above=0)
    activation: str = setting("gelu", choices=ACTIVATIONS)  # gelu: GPT-2's tanh form; gelu_erf: exact
    qk_norm: bool = False
    logit_softcap: float | int = setting(0.0, least=0)
    tie_word_embeddings: bool = True
    init: str = setting("gpt2", choices=("gpt2", "zero_proj"))  # zero_proj: blocks begin as the identity
    ngram_order: int = setting(0, least=0, most=16)  # longest n-gram with an embedding, 2 or more; 0 = none
    ngram_rows: int = setting(8192, least=1, most=2**24)  # vectors for each n = 2 .. ngram_order
    # around the model
    encoding: str = "gpt2"  # how text becomes tokens: a name of tokens/encodings.py
    encoding_size: int | None = setting(None, least=1)  # ids from here on are padding, never generated
    infer_step: int = 250  # kept for configurations of the original training script
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        C, nh, K, E = self.n_embd, self.n_head, self.num_experts_per_tok, self.num_experts
        if C % nh != 0:
            raise ValueError(f"n_embd={C} does not divide into n_head={nh} heads")
        if self.n_kv_head is not None and nh % self.n_kv_head != 0:
            raise ValueError(f"n_head={nh} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.ngram_order == 1:
            raise ValueError("ngram_order=1 is the token's own embedding; use 2 or more, or 0 for none")
        if self.position == "rope" and C // nh % 2 != 0:
            raise ValueError(f"position='rope': n_embd={C} / n_head={nh} gives heads of odd size, {C // nh}")
        if self.use_moe and K > E:
            raise ValueError(f"num_experts_per_tok={K} is more than num_experts={E}")
        if self.use_moe and self.moe_every > self.n_layer:
            wrong = f"moe_every={self.moe_every} is more than n_layer={self.n_layer}"
            raise ValueError(f"{wrong}; use --moe_every 1")
        if self.global_every is not None and self.sliding_window is None:
            raise ValueError(f"global_every={self.global_every} has a meaning only with a sliding_window")
        if self.encoding_size is not None and self.encoding_size > self.vocab_size:
            raise ValueError(f"encoding_size={self.encoding_size} is more than vocab_size={self.vocab_size}")

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer's attention, in the words of transformers' caches and masks."""
        if self.sliding_window is None:
            return ["full_attention"] * self.n_layer
        every = self.global_every or self.n_layer + 1
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(self.n_layer)]

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer`, 0 .. n_layer - 1, holds an MoE: the last does, and every k-th before it."""
        return self.use_moe and (self.n_layer - 1 - layer) % self.moe_every == 0


class LayerNorm(nn.LayerNorm):
    """Layer normalisation. transformers.Trainer does not decay a nn.LayerNorm, and so none of our norms."""

    def __init__(self, ndim: int, bias: bool, eps: float = 1e-5):
        super().__init__(ndim, eps, bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        weight, bias = self.weight, self.bias
        if input.dtype == torch.float32:  # FSDP may have gathered the parameters in bf16
            weight, bias = weight.float(), bias.float() if bias is not None else None
        return F.layer_norm(input, weight.shape, weight, bias, self.eps)


class RMSNorm(nn.LayerNorm):
    """Root-mean-square normalisation, arXiv 1910.07467 eq. 4; computed in fp32, as in Llama."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.rms_norm(upcast(input), self.weight.shape, eps=self.eps).to(input.dtype) * self.weight


def build_norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    """The norm that config.norm names, over the C channels."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps, bias=False)
    return LayerNorm(config.n_embd, config.bias, config.norm_eps)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; grouped queries, RoPE, QK norm, windows and cache by configuration."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.config, self.layer, self.head_size = config, layer, config.head_dim
        # rows of c_attn: all queries, then all keys, then all values (GPT-2's order)
        self.kv_size = config.num_key_value_heads * self.head_size
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * self.kv_size, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps, bias=False) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps, bias=False) if config.qk_norm else None

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None = None,
                rotary: tuple[Tensor, Tensor] | None = None, past_key_values=None,
                output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """x (B, T, C) -> y of that shape, or with output_attentions y and the weights (B, nh, T, S)."""
        B, T, C = x.shape
        q, k, v = self.queries_keys_values(self.c_attn(x), rotary)  # (B, nh, T, hs), twice (B, nkv, T, hs)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)  # (B, nkv, S, hs)
        dropout = self.config.dropout if self.training else 0.0
        if output_attentions or self.config._attn_implementation == "eager":
            y, weight = attention_reference(q, k, v, mask, dropout)  # (B, nh, T, hs), (B, nh, T, S)
        else:
            y, weight = fused_attention(q, k, v, mask, dropout), None
        y = F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.config.dropout, self.training)
        return (y, weight) if output_attentions else y

    def queries_keys_values(self, packed: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """c_attn's output (B, T, (nh + 2*nkv) * hs) -> q (B, nh, T, hs), k, v (B, nkv, T, hs); q and k are
        normalised and rotated, if the configuration says so."""
        q_norm, k_norm, C = self.q_norm, self.k_norm, self.config.n_embd
        if q_norm is not None and rotary is not None and can_norm_and_rotate(packed):
            weights = q_norm.weight, k_norm.weight
            return NormAndRotate.apply(packed, *weights, *rotary, q_norm.eps, self.config.n_head)
        parts = packed.split([C, self.kv_size, self.kv_size], dim=2)
        q, k, v = (part.unflatten(2, (-1, self.head_size)).transpose(1, 2) for part in parts)
        if q_norm is not None:
            q, k = q_norm(q).to(v.dtype), k_norm(k).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v


class Block(GradientCheckpointingLayer):
    """Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)), dense or MoE."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_norm(config)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None = None,
                rotary: tuple[Tensor, Tensor] | None = None, token_mask: Tensor | None = None,
                num_tokens: Tensor | int | None = None, past_key_values=None, output_attentions: bool = False,
                output_router_logits: bool = False, return_auxiliary: bool = False,
    ) -> Tensor | tuple[Tensor | None, ...]:  # fmt: skip
        """x (B, T, C) -> x; with return_auxiliary a tuple: x, attention weights or None, the router's logits
        (N, E) or None (only output_router_logits computes them, again), the router's report.
        token_mask (B, T), num_tokens: as in MoE. Only an MoE in training has a report. It is the fields of a
        RouterAuxiliary one by one, because reentrant checkpointing gives gradients to plain tensors only. The
        caller must accumulate() it, because checkpointing runs this forward twice."""
        y = self.attn(self.ln_1(x), mask, rotary, past_key_values, output_attentions)
        y, weight = y if output_attentions else (y, None)
        x = x + y
        h, logits, report = self.ln_2(x), None, None
        if isinstance(self.mlp, MoE):
            y = self.mlp(h, token_mask, num_tokens, return_auxiliary)
            y, report = y if return_auxiliary else (y, None)
            logits = self.mlp.gate(h.flatten(0, 1)) if output_router_logits else None
        else:
            y = self.mlp(h)
        return (x + y, weight, logits, *(report or ())) if return_auxiliary else x + y


class Transformer(nn.ModuleDict):
    """The network without its head, which transformers' clients call by themselves as `model.base_model`."""

    def __init__(self, config: GPTConfig):
        super().__init__(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        self.config = config
        if config.position == "learned":
            self["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.ngram_order:
            self["ngrams"] = NgramEmbedding(config.ngram_order, config.ngram_rows, config.n_embd)
        self["drop"] = nn.Dropout(config.dropout)
        self["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self["ln_f"] = build_norm(config)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, output_router_logits: bool | None = None, cache=None,
        counted: Tensor | None = None, num_tokens: Tensor | int | None = None,
        cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, seq_idx=None,
        previous_ids: Tensor | None = None,
    ) -> GPTOutput:  # fmt: skip
        """Hidden states (B, T, C) after the last norm; arguments and ValueErrors as for GPT.forward.
        counted (B, T) or None: tokens that count in the routers' losses and usage; padding never does.
        num_tokens: the divisor of the routers' losses, as in MoE."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        past_key_values = choose_cache(past_key_values, cache)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T = x.size(1)
        if self.training and any(block.gradient_checkpointing for block in self.h):
            past_key_values, use_cache = None, False  # a block's second forward would add its keys again
        if position_ids is None and cu_seq_lens_q is not None:
            first = torch.isin(torch.arange(T, device=x.device), cu_seq_lens_q)  # (T,)
            position_ids = positions_in_documents(first[None])
        flexible = self.training and not output_attentions
        masks = build_masks(config, x, attention_mask, position_ids, past_key_values, flexible)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        padding = attention_mask if torch.is_tensor(attention_mask) and attention_mask.dim() == 2 else None
        if padding is not None:
            present = padding[:, -T:].bool()  # (B, T)
            counted = present if counted is None else counted & present
        if position_ids is None:
            position_ids = self.positions(x, padding, past_key_values)
        if config.position == "rope":
            rotary = rotary_angles(position_ids, config.head_dim, config.rope_theta)
        else:
            rotary, x = None, x + self.wpe(position_ids)
        if config.ngram_order:
            previous_ids = recall(past_key_values, input_ids, config.ngram_order, previous_ids)
            x = x + self.ngrams(input_ids, previous_ids, position_ids)
        x = self.drop(x)

        hidden_states, attentions, router_logits, reports = [x], [], [], []
        kw = dict(past_key_values=past_key_values, output_attentions=output_attentions,
                  output_router_logits=output_router_logits, return_auxiliary=True)  # fmt: skip
        for block, kind in zip(self.h, config.layer_types, strict=True):
            x, weight, logits, *report = block(x, masks[kind], rotary, counted, num_tokens, **kw)
            if output_hidden_states:
                hidden_states.append(x)
            attentions.append(weight)
            if logits is not None:
                router_logits.append(logits)
            if report:
                reports.append(RouterAuxiliary(*report))
                block.mlp.accumulate(reports[-1])
        if config.ngram_order and past_key_values is not None:
            remember(past_key_values, input_ids, previous_ids)
        x = self.ln_f(x)
        hidden_states[-1] = x  # the last one is normalised, as in GPT-2
        losses = {name: torch.stack([getattr(report, name) for report in reports]).sum()
                  for name in ("balance_loss", "z_loss") if reports}  # fmt: skip
        return GPTOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) or None,
            **{CACHE: past_key_values if use_cache else None}, **losses,
        )  # fmt: skip

    def positions(self, x: Tensor, padding: Tensor | None, past_key_values) -> Tensor:
        """Position of each token, (1, T) or (B, T), after the keys in the cache. padding (B, S): 0 = padding,
        which gets no position: a left-padded row equals the row alone. ValueError beyond block_size."""
        T, longest = x.size(1), self.config.block_size
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past, int) and past + T > longest:  # a static cache's length is a tensor
            raise ValueError(f"{past + T} tokens are longer than block_size={longest}")
        if padding is not None:
            return (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T)
        return torch.arange(T, device=x.device)[None] + past  # (1, T)


class GPT(GPTPreTrainedModel, GPTGenerationMixin):
    """The transformer with its (tied) head. `forward` returns hidden states; with targets, logits and loss.
    `config` is a GPTConfig, or a plain dictionary of its fields, as in training checkpoints."""

    config_class = GPTConfig
    # How many rows of logits the loss computes at a time, to save memory; -1: automatic, 0: all at once.
    # Except with 0, and in nanoGPT's pair, outputs with a loss have no logits.
    loss_chunk = 0

    def __init__(self, config: GPTConfig | dict):
        super().__init__(config)
        config = self.config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, module in self.named_modules():
            if name.endswith("c_proj"):
                module.into_residual = True  # _init_weights does not know the name
        # DDP would overwrite each rank's counts with rank 0's; update_routers() adds up the counts.
        ignored = [name for name, _ in self.named_buffers() if name.endswith("step_totals")]
        self._ddp_params_and_buffers_to_ignore = ignored
        self._suppress_padding()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation: N(0, 0.02), projections into the residual stream N(0, 0.02 / sqrt(2 L)), or
        zero with init="zero_proj". transformers calls it for every module with parameters or buffers."""
        residual_std = 0.0 if self.config.init == "zero_proj" else 0.02 / math.sqrt(2 * self.config.n_layer)
        if isinstance(module, NgramEmbedding):
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=residual_std if hasattr(module, "into_residual") else 0.02)
        elif isinstance(module, (LayerNorm, RMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, Experts):
            init.normal_(module.c_fc, std=0.02)
            init.normal_(module.c_proj, std=residual_std)
        elif isinstance(module, MoE):
            for name, value in module.initial_statistics().items():
                init.copy_(getattr(module, name), value)
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                init.zeros_(parameter)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; non_embedding leaves out tables: positions, n-grams, untied tokens."""
        count = sum(p.numel() for p in self.parameters())
        tables = ("wpe", "ngrams") if self.config.tie_word_embeddings else ("wpe", "ngrams", "wte")
        for name in tables if non_embedding else ():
            count -= self.transformer[name].weight.numel() if name in self.transformer else 0
        return count

    def get_num_active_params(self) -> int:
        """Number of parameters in a token's matrix products: K of E experts, the head, no look-up tables."""
        count = self.get_num_params()
        for moe in self.moe_layers():
            experts = sum(p.numel() for p in moe.experts.parameters())
            count -= experts - experts // moe.experts.c_fc.size(0) * self.config.num_experts_per_tok
        return count

    def flops_per_token(self, length: int | None = None) -> float:
        """FLOPs of forward and backward per token: 6 N + 12 L C T (PaLM appendix B, eq. 2), N: active
        parameters, T: `length` or block_size, or a layer's window. Masked positions count, as in nanoGPT."""
        config, length = self.config, length or self.config.block_size
        window = min(config.sliding_window or length, length)
        spans = [window if kind == "sliding_attention" else length for kind in config.layer_types]
        return 6 * self.get_num_active_params() + 12 * config.n_embd * sum(spans)

    def estimate_mfu(
        self, fwdbwd_per_iter: float, dt: float, peak_flops: float | None = None, length: int | None = None
    ) -> float | None:
        """Model FLOPs utilisation, 0..1, of fwdbwd_per_iter sequences of `length` (block_size) in dt seconds,
        relative to the device's bf16 peak (PEAK_FLOPS); None if the peak is unknown (CPU, other GPUs)."""
        if peak_flops is None and self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
            known = (flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device))
            peak_flops = next(known, None)
        if peak_flops is None:
            return None
        length = length or self.config.block_size
        return self.flops_per_token(length) * length * fwdbwd_per_iter / dt / peak_flops

    def moe_layers(self) -> list[MoE]:
        """The MoE layers, first block first; empty for a dense model."""
        return [block.mlp for block in self.transformer.h if isinstance(block.mlp, MoE)]

    def update_routers(self) -> None:
        """Tell the routers that an optimizer step is over; call it before training, too. One collective."""
        update_routers(self.moe_layers())

    def expert_usage(self, reset: bool = False, reduce: bool = False) -> list[ExpertUsage]:
        """Each MoE layer's counts and loads since its last reset, of all ranks. Counts after the last
        update_routers() are of this rank only, unless reduce=True (a collective). reset: set them to 0."""
        usage = expert_usage(self.moe_layers(), reduce=reduce)
        for moe in self.moe_layers() if reset else ():
            moe.reset_usage_counts()
        return usage

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, S), 0 = padding
        position_ids: torch.LongTensor | None = None,  # (B, T)
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,  # (B, T, C)
        labels: torch.LongTensor | None = None,  # (B, T), unshifted, -100 is ignored
        targets: torch.LongTensor | None = None,  # (B, T), shifted, -1 is ignored
        use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0, num_items_in_batch: Tensor | int | None = None,
        cache=None,  # another name of past_key_values
        cu_seq_lens_q: Tensor | None = None,  # (texts + 1,), 0 and the ends of the texts in a packed row
        cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None, max_length_k: int | None = None,
        seq_idx: Tensor | None = None,  # TRL sends these, too; they say the same
        previous_ids: Tensor | None = None,  # (B, T, ngram_order - 1), as in NgramEmbedding
    ) -> GPTOutput | GPTLMOutput | tuple:  # fmt: skip
        """GPT: hidden states after the last norm, (B, T, C). GPTLMHeadModel: logits (B, T, V).
        With labels or targets both return logits and the loss (with targets as nanoGPT's pair, unless
        return_dict=True). In training the loss includes the routers' losses.
        position_ids that restart, or cu_seq_lens_q, part a row into texts: no token sees another text.
        logits_to_keep: number of last positions (0 = all), or a 1-d tensor of positions; ignored with a loss.
        num_items_in_batch: number of targets in the whole optimizer step, of which this call is a part. The
        losses are then this part's share, the routers' of tokens with a target: their sum over the parts does
        not depend on how the step is cut. ValueError for wrong arguments, and for more than block_size tokens
        without position_ids."""
        config = self.config
        if labels is not None and targets is not None:
            raise ValueError("give labels (unshifted) or targets (shifted), not both")
        as_pair, ignore_index = targets is not None and not return_dict, -1
        if labels is not None:
            targets, ignore_index = F.pad(labels[:, 1:], (0, 1), value=-100), -100
        if targets is not None:
            use_cache, logits_to_keep = False, 0
        in_parts = targets is not None and num_items_in_batch is not None
        part = (targets != ignore_index, num_items_in_batch) if in_parts else (None, None)
        output = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_attentions, output_hidden_states, output_router_logits, cache, *part, cu_seq_lens_q,
            previous_ids=previous_ids)  # fmt: skip
        if targets is not None or self._gives_logits:
            hidden, logits, losses = output.last_hidden_state, None, {}
            # An adapter or quantisation may have replaced the head. linear_cross_entropy needs an nn.Linear.
            chunk = self.loss_chunk if type(self.lm_head) is nn.Linear and not as_pair else 0
            if targets is None or not chunk:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                logits = self._logits(hidden[:, kept])  # (B, T or kept, V)
            if targets is not None:
                losses = self._losses(hidden, logits, targets, ignore_index, num_items_in_batch, output)
            if as_pair:
                return logits, losses["loss"]
            output = lm_output(output, config, attention_mask, logits=logits, **losses)
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _logits(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V), soft-capped if configured (Gemma 2, arXiv 2408.00118)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def _losses(self, hidden, logits, targets, ignore_index, num_items, output) -> dict[str, Tensor]:
        """The loss on targets (B, T) and, in training, its parts. Cross-entropy, nats, from logits (B, T, V)
        or, if they are None, hidden (B, T, C): the mean over the targets, or their sum / num_items."""
        config = self.config
        if logits is None:
            head, cap = self.lm_head.weight, config.logit_softcap
            loss = linear_cross_entropy(hidden, head, targets, ignore_index, num_items, cap, self.loss_chunk)
        else:
            how = dict(ignore_index=ignore_index, reduction="mean" if num_items is None else "sum")
            loss = F.cross_entropy(upcast(logits).flatten(0, -2), targets.flatten(), **how)
            loss = loss if num_items is None else loss / num_items
        losses = {"loss": loss, "cross_entropy": loss} if self.training else {"loss": loss}
        if output.balance_loss is not None:
            balance, z = config.moe_loss_coef * output.balance_loss, config.router_z_loss_coef * output.z_loss
            losses["loss"] = loss + balance + z
        return losses

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str, router_lr_mult: float = 1.0,
                             expert_lr_mult: float = 1.0) -> torch.optim.AdamW:  # fmt: skip
        """Fused AdamW with weight decay for matrices and embeddings, as layers/roles.py says."""
        rates = learning_rate, router_lr_mult, expert_lr_mult
        groups = parameter_groups(self.named_parameters(), weight_decay, *rates)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))


class GPTLMHeadModel(GPT):
    """GPT for generation and next-token prediction: `forward` returns logits. Same state dict as GPT."""

    _gives_logits = True


class GPTForSequenceClassification(Classification, GPT):
    """GPT with a linear layer `score` in place of its head: one row of logits for each text."""
