"""Attention of queries, keys and values: a plain version, fused kernels, masks, the choice of the kernel.
FlexAttention: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html; letters: model.py."""

import contextlib
import functools
import math
import time
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

# Fused kernels for CUDA by the name of the flag, in the order in which torch tries them. "math", ordinary
# products for every shape and mask, always comes last.
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or unchanged if its dtype is wider (float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_reference(q, k, v, mask=None, dropout=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by plain products: softmax(q k^T / sqrt(hs)) v, (B, nh, T, hs), and weights (B, nh, T, S).
    q (B, nh, T, hs), k and v (B, nkv, S, hs); mask None (causal), boolean (True = may look) or additive."""
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


def fused_attention(q, k, v, mask: torch.Tensor | BlockMask | None, dropout: float) -> torch.Tensor:
    """attention_reference's first result by torch's fused kernels; mask may also be a BlockMask."""
    grouped = k.size(1) != q.size(1)
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        q, k, v = (t.contiguous() for t in (q, k, v))  # compiled code has misread views of one buffer
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    causal = mask is None
    if q.size(2) == 1:  # one query sees all keys; an `if`, because a compiled `T > 1` is not a bool
        causal = False
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)


@functools.cache  # a function, because torch.compile imports the whole compiler
def compiled_flex_attention():
    """flex_attention as a kernel; uncompiled it is O(T^2)."""
    return torch.compile(flex_attention)


def positions_in_documents(begins: torch.Tensor) -> torch.Tensor:
    """Position of each token in its document, (B, T); begins (B, T): whether it is a document's first one."""
    place = torch.arange(begins.size(1), device=begins.device)
    return place - torch.where(begins, place, 0).cummax(1).values


def document_mask(starts: torch.Tensor, window: int) -> torch.Tensor:
    """True where a query sees a key of its document, in a window that ends with itself: (B, 1, T, T)."""
    key = torch.arange(starts.size(1), device=starts.device)
    query = key[:, None]
    return ((key <= query) & (query - key < window) & (key >= starts[..., None]))[:, None]


def flex_block_mask(
    T: int, window: int, device: torch.device, starts: torch.Tensor | None = None, block: int = 128
) -> BlockMask:
    """For flex_attention: query i sees the keys i - window + 1 .. i, of its document only if `starts` (B, T)
    says where that begins. O(T) to build, O(T * window) to use."""

    def visible(b, h, query, key):
        seen = (query >= key) & (query - key < window)
        return seen if starts is None else seen & (key >= starts[b, query])

    last = torch.arange(math.ceil(T / block), device=device)  # (T/block,): a query block's last key block
    first = (last * block - window + 1).clamp(min=0)[None]  # (1, T/block): first key of its first query
    first = (first if starts is None else torch.maximum(first, starts[:, ::block])) // block  # (1 or B, ..)
    indices = (first[..., None] + last).clamp(max=len(last) - 1)  # torch ignores those past the count
    count, indices = (last - first + 1).int()[:, None], indices.int()[:, None]
    return BlockMask.from_kv_blocks(count, indices, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(T, T))


def has_flex_attention(config, device: torch.device) -> bool:
    """Whether flex_attention's kernels can train this model: they need an Ampere or newer GPU, heads of 16,
    32, 64, ... channels, and no dropout."""
    size = config.n_embd // config.n_head
    new_enough = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return new_enough and config.dropout == 0 and size >= 16 and size & (size - 1) == 0


def build_masks(
    config, x, attention_mask=None, position_ids=None, past_key_values=None, flexible: bool = False
) -> dict[str, torch.Tensor | BlockMask | None]:
    """Attention masks by kind of layer, for x (B, T, C); None is causal attention, training's fast path.
    attention_mask: 2-d (B, S), 0 = padding; 4-d; or generate()'s dictionary for static caches, which is
    returned unchanged. position_ids: the caller's (B or 1, T), or None. Without padding and cache, a position
    that does not go on begins another document. flexible: in training, where a mask may be a BlockMask."""
    if isinstance(attention_mask, dict):
        return attention_mask
    arguments = config, x, attention_mask, past_key_values, position_ids  # names differ between versions
    eager, T, starts, masks = config._attn_implementation == "eager", x.size(1), None, {}
    alone = attention_mask is None and past_key_values is None
    if alone and position_ids is not None:
        begins = position_ids.diff(prepend=position_ids[:, :1]).expand(x.size(0), -1) != 1
        starts = torch.arange(T, device=x.device) - positions_in_documents(begins)  # (B, T)
        if not flexible and not starts.any():  # in training the kind of the mask must not depend on the batch
            starts = None
    flexible = flexible and alone and not eager and has_flex_attention(config, x.device)
    for kind in dict.fromkeys(config.layer_types):
        window = T if kind == "full_attention" else min(T, config.sliding_window)
        if alone and not eager and starts is None and window == T:
            masks[kind] = None
        elif flexible:
            masks[kind] = flex_block_mask(T, window, x.device, starts)
        elif starts is not None:
            masks[kind] = document_mask(starts, window)
        else:
            create = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
            masks[kind] = create(*arguments)
    return masks


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_backend(backend: SDPBackend, config, B: int, T: int, device: torch.device, dtype) -> float:
    """Seconds of one layer's causal attention, forward and backward, best of three; inf if it cannot run."""
    nh, nkv, hs = config.n_head, config.n_kv_head or config.n_head, config.n_embd // config.n_head
    # As in CausalSelfAttention: parts of one tensor, with the heads inside.
    packed = torch.randn(B, T, (nh + 2 * nkv) * hs, device=device, dtype=dtype).requires_grad_()
    parts = packed.split([nh * hs, nkv * hs, nkv * hs], dim=2)
    q, k, v = (part.unflatten(2, (-1, hs)).transpose(1, 2) for part in parts)  # (B, nh or nkv, T, hs)
    direction, times = torch.randn(q.shape, device=device, dtype=dtype), []
    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns why a backend cannot run
            for _ in range(5):  # two are for warm-up
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
    """The name in BACKENDS of the attention to train with at (B, T); "" without CUDA or with eager attention.
    name: "auto" for the fastest as measured here, or one of them; if it cannot run, the next one that can
    (see prefer_backend). ValueError for another name."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r}: choose one of auto, {', '.join(BACKENDS)}")
    if device.type != "cuda" or config._attn_implementation == "eager":
        return ""
    shape = config, B, T, device, dtype
    if name != "auto":
        able = (n for n in dict.fromkeys([name, *BACKENDS]) if time_backend(BACKENDS[n], *shape) < math.inf)
        return next(able, name)
    times = {name: time_backend(kernel, *shape) for name, kernel in BACKENDS.items()}
    return min(times, key=times.get)


def choose_for_the_first_time(device: torch.device) -> None:
    """Let torch set its order of backends now. A process's first attention on CUDA overwrites any order, and
    puts cuDNN first on Hopper and Blackwell (priority_order in sdp_utils.cpp)."""
    q = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.float16)  # every GPU has it
    F.scaled_dot_product_attention(q, q, q)


def prefer_backend(name: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which attention on CUDA uses the backend `name`. Where it cannot (a mask, float64), torch
    tries the other BACKENDS in order. On a CPU, and for "auto", nothing changes."""
    if device.type != "cuda" or name not in BACKENDS:
        return contextlib.nullcontext()
    choose_for_the_first_time(device)
    return sdpa_kernel([BACKENDS[n] for n in dict.fromkeys([name, *BACKENDS])], set_priority=True)


@contextlib.contextmanager
def without_cudnn():
    """A context without cuDNN's attention, which makes a new plan for every shape."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
