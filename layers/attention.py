"""Attention and what belongs to it: norms, rotary positions, grouped queries, windows, masks.

Letters as in model.py: B batch, T sequence length, S keys a query can see (cache included), C n_embd,
nh query heads, nkv key/value heads, hs head size.

References:
    RMSNorm, arXiv 1910.07467     RoPE, arXiv 2104.09864     grouped queries (GQA), arXiv 2305.13245
    sliding windows, arXiv 2004.05150     QK norm, arXiv 2010.04245
    FlexAttention, https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

import contextlib
import functools
import math
import time
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

# Fused kernels for CUDA by the name of the flag, in the order in which they are tried and stand in for each
# other. "math" is made of ordinary products, takes every shape and mask, and comes last always.
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or as it is if that is wider (float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias (torch's own with bias=False needs a newer name for it)."""

    def __init__(self, ndim: int, bias: bool, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self.eps = eps

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if input.dtype == torch.float32:  # FSDP may have gathered them in bf16
            weight, bias = weight.float(), bias.float() if bias is not None else None
        return F.layer_norm(input, weight.shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, arXiv 1910.07467 eq. 4; statistics in fp32 as Llama does."""

    def __init__(self, ndim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.eps = eps

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(upcast(input), self.weight.shape, eps=self.eps).to(input.dtype) * self.weight


def build_norm(config) -> nn.Module:
    """The norm that config.norm names, over the C channels."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, config.bias, config.norm_eps)


def rotary_angles(
    position_ids: torch.Tensor, head_size: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of RoPE, arXiv 2104.09864 eq. 15; as in Llama, a head's two halves are the pairs.

    position_ids (B or 1, T) -> two fp32 tensors (B or 1, 1, T, hs). Computed at every forward and not
    kept: a buffer that is not saved comes back as garbage from transformers' loading on the meta device.
    """
    channel = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (channel / head_size)  # (hs/2)
    angle = position_ids[:, None, :, None].float() * frequency  # (B, 1, T, hs/2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, hs)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys (B, nh, T, hs) by their positions' angles, in fp32 at least; the dtype stays."""
    wide = upcast(x)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attention_reference(q, k, v, mask=None, dropout=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: softmax(q k^T / sqrt(hs)) v, (B, nh, T, hs), and its weights, (B, nh, T, S).

    q (B, nh, T, hs), k and v (B, nkv, S, hs); mask None (causal), boolean (True = may look) or additive.
    Chosen by attn_implementation="eager", and whenever attention weights are asked for.
    """
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, nh, S, hs)
    score = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))  # (B, nh, T, S)
    if mask is None:
        T, S = score.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask.dtype == torch.bool:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    else:
        score = score + mask
    weight = F.softmax(upcast(score), dim=-1).to(v.dtype)
    return F.dropout(weight, dropout) @ v, weight


@functools.cache  # made when first needed: torch.compile imports the whole compiler
def compiled_flex_attention():
    """flex_attention as a kernel; uncompiled it is O(T^2)."""
    return torch.compile(flex_attention)


def window_block_mask(T: int, window: int, device: torch.device, block: int = 128) -> BlockMask:
    """Which blocks of keys each block of queries has to look at, and within them which keys: O(T) to make.

    Query i sees the keys i - window + 1 .. i. For flex_attention, whose work is then O(T * window).
    """

    def visible(b, h, query, key):
        return (query >= key) & (query - key < window)

    last = torch.arange(math.ceil(T / block), device=device)  # (T/block,): of one's own keys, the last to see
    first = (last * block - window + 1).clamp(min=0) // block
    indices = (first[:, None] + last).clamp(max=len(last) - 1)  # those past the count are not looked at
    count, indices = (last - first + 1).int()[None, None], indices.int()[None, None]
    return BlockMask.from_kv_blocks(count, indices, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(T, T))


def flex_window(config, T: int, device: torch.device) -> BlockMask | None:
    """The mask that lets flex_attention's kernels train windowed layers, or None where they cannot.

    They want a GPU from Ampere on, heads of 16, 32, 64, ... channels, and no dropout. Not for evaluation: its
    code runs uncompiled, and there flex_attention is slower than a mask.
    """
    size = config.n_embd // config.n_head
    new_enough = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    able = new_enough and config.dropout == 0 and size >= 16 and size & (size - 1) == 0
    return window_block_mask(T, config.sliding_window, device) if able else None


def build_masks(
    config, x, attention_mask=None, position_ids=None, past_key_values=None, flexible: bool = False
) -> dict[str, torch.Tensor | BlockMask | None]:
    """Attention masks by kind of layer, for x (B, T, C); None is causal attention, training's fast path.

    attention_mask: 2-d (B, S), 0 = padding; 4-d; or the dictionary that generate() makes for static caches,
    which is the result. position_ids: only those that a caller gave. flexible: windows may be a BlockMask.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    arguments = config, x, attention_mask, past_key_values, position_ids  # their names differ by version
    nothing_special = attention_mask is None and past_key_values is None and position_ids is None
    plain = nothing_special and config._attn_implementation != "eager"
    masks = {}
    for kind in sorted(set(config.layer_types)):
        if kind == "sliding_attention" and not (plain and x.size(1) <= config.sliding_window):
            mask = flex_window(config, x.size(1), x.device) if plain and flexible else None
            masks[kind] = create_sliding_window_causal_mask(*arguments) if mask is None else mask
        else:
            masks[kind] = None if plain else create_causal_mask(*arguments)
    return masks


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_backend(backend: SDPBackend, config, B: int, T: int, device: torch.device, dtype) -> float:
    """Seconds of one layer's causal attention, forward and backward, with one backend; infinite if it cannot.

    The best of three, after two that make kernels ready.
    """
    nh, nkv, hs = config.n_head, config.n_kv_head or config.n_head, config.n_embd // config.n_head
    # As CausalSelfAttention has them: parts of one tensor, with the heads inside.
    packed = torch.randn(B, T, (nh + 2 * nkv) * hs, device=device, dtype=dtype).requires_grad_()
    parts = packed.split([nh * hs, nkv * hs, nkv * hs], dim=2)
    q, k, v = (part.unflatten(2, (-1, hs)).transpose(1, 2) for part in parts)  # (B, nh or nkv, T, hs)
    direction, times = torch.randn(q.shape, device=device, dtype=dtype), []
    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every backend that cannot, the reasons
            for _ in range(5):
                synchronize(device)
                start = time.perf_counter()
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=nkv != nh)
                y.backward(direction, retain_graph=True)
                synchronize(device)
                times.append(time.perf_counter() - start)
    except RuntimeError:  # "No available kernel", or one that fails on this GPU
        return math.inf
    return min(times[2:])


def choose_backend(name: str, config, B: int, T: int, device: torch.device, dtype: torch.dtype) -> str:
    """The name in BACKENDS of the attention that training at (B, T) shall use; "" where there is no choice.

    name: one of them, or "auto" for the fastest, by measurement (some milliseconds, on CUDA only). Elsewhere
    torch knows one fused kernel at most. ValueError for another name.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r}: choose one of auto, {', '.join(BACKENDS)}")
    if device.type != "cuda" or config._attn_implementation == "eager":
        return ""
    if name != "auto":
        return name
    times = {name: time_backend(kernel, config, B, T, device, dtype) for name, kernel in BACKENDS.items()}
    return min(times, key=times.get)


def choose_for_the_first_time(device: torch.device) -> None:
    """Let torch set its own order of backends now: it does at a process's first attention on CUDA, whatever
    order is set by then, and on Hopper and Blackwell puts cuDNN first (priority_order in
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
    q = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(q, q, q)


def prefer_backend(name: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which attention on CUDA uses the backend `name` wherever it can; elsewhere, or for "auto",
    nothing changes.

    Where it cannot (a mask, float64), the others of BACKENDS stand in, in their order.
    """
    if device.type != "cuda" or name not in BACKENDS:
        return contextlib.nullcontext()
    choose_for_the_first_time(device)
    order = [name, *(other for other in BACKENDS if other not in (name, "math")), "math"]
    return sdpa_kernel([BACKENDS[backend] for backend in dict.fromkeys(order)], set_priority=True)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; grouped queries, RoPE, QK norm, windows and cache by configuration."""

    def __init__(self, config, layer: int = 0):
        super().__init__()
        self.config, self.layer = config, layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        # rows of c_attn: all queries, then all keys, then all values (GPT-2's order)
        kv_size = self.n_kv_head * self.head_size
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * kv_size, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: torch.Tensor,  # (B, T, C)
        mask: torch.Tensor | BlockMask | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values=None,
        output_attentions: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, C) -> y of that shape, or with output_attentions y and the weights (B, nh, T, S)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(
            [C, self.n_kv_head * self.head_size, self.n_kv_head * self.head_size], dim=2
        )
        q = q.view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        v = v.view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)  # (B, nkv, S, hs)

        dropout = self.config.dropout if self.training else 0.0
        weight = None
        if output_attentions or self.config._attn_implementation == "eager":
            y, weight = attention_reference(q, k, v, mask, dropout)
        elif isinstance(mask, BlockMask):
            flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
            q, k, v = (t.contiguous() for t in (q, k, v))  # generated code has misread views of one buffer
            y = flex(q, k, v, block_mask=mask, enable_gqa=self.n_kv_head != self.n_head)
        else:
            causal = mask is None
            if T == 1:  # the newest token sees all; a branch, because a compiled `T > 1` is not a bool
                causal = False
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                enable_gqa=self.n_kv_head != self.n_head,
            )  # fmt: skip
        y = y.transpose(1, 2).reshape(B, T, C)
        y = F.dropout(self.c_proj(y), self.config.dropout, self.training)
        return (y, weight) if output_attentions else y
