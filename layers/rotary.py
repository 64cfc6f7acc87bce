"""Rotary positions (RoPE, arXiv 2104.09864): plain, and in one function with QK norm (arXiv 2010.04245), for
CPUs. Letters: model.py, and J = nh + nkv heads of queries and keys."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.attention import upcast


def rotary_angles(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, arXiv 2104.09864 eq. 15; as in Llama, a head's two halves are the pairs.
    position_ids (B or 1, T) -> two fp32 tensors (B or 1, 1, T, hs). Every forward computes them: a buffer
    outside the state dict would hold garbage after transformers has loaded a model on the meta device."""
    channel = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (channel / head_size)  # (hs/2)
    angle = position_ids[:, None, :, None].float() * frequency  # (B, 1, T, hs/2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, hs)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (B, nh, T, hs) by their positions' angles, in fp32 at least; the dtype stays."""
    wide = upcast(x)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def add_turned(out: Tensor, x: Tensor, table: Tensor, sign: int = 1) -> None:
    """out += sign * [-second half of x, first half of x] * table, in place."""
    half = x.size(-1) // 2
    out[..., :half].addcmul_(x[..., half:], table[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], table[..., half:], value=sign)


def can_norm_and_rotate(packed: Tensor) -> bool:
    """Whether NormAndRotate takes these projections: fp32 or float64, on a CPU, uncompiled."""
    plain = packed.device.type == "cpu" and packed.dtype in (torch.float32, torch.float64)
    return plain and not torch.compiler.is_compiling()


class NormAndRotate(torch.autograd.Function):
    """packed (B, T, (J + nkv) * hs), what c_attn returns -> q (B, nh, T, hs), k and v (B, nkv, T, hs).

    q and k are rotate(rms_norm(part) * weight). This function reads and writes memory about half as often as
    the operators one by one. The norm's scale is one number per head and token, so it may come last."""

    @staticmethod
    def forward(ctx, packed, q_weight, k_weight, cos, sin, eps, num_heads):
        B, T, _ = packed.shape
        hs = q_weight.numel()
        heads = packed.view(B, T, -1, hs)
        J = (heads.size(2) + num_heads) // 2
        x, v = heads[:, :, :J], heads[:, :, J:].transpose(1, 2)
        weight = torch.cat([q_weight.expand(num_heads, hs), k_weight.expand(J - num_heads, hs)])  # (J, hs)
        # With a table for all heads torch's inner loops run over J * hs numbers, not over hs.
        cos, sin = (t.transpose(1, 2).expand(-1, -1, J, -1) for t in (cos, sin))  # (B or 1, T, J, hs)
        cos, sin = cos.contiguous(), sin.contiguous()
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(hs).add_(eps).rsqrt_()
        y = x * (cos * weight)
        add_turned(y, x, sin * weight.roll(hs // 2, -1))
        y = y.mul_(scale).transpose(1, 2)  # (B, J, T, hs)
        ctx.save_for_backward(packed, scale, weight, cos, sin)
        ctx.num_heads = num_heads
        return y[:, :num_heads], y[:, num_heads:], v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        packed, scale, weight, cos, sin = ctx.saved_tensors
        nh, (J, hs) = ctx.num_heads, weight.shape
        grad = torch.empty_like(packed).view(*packed.shape[:2], -1, hs)  # (B, T, J + nkv, hs)
        x, d = packed.view(grad.shape)[:, :, :J], grad[:, :, :J]
        grad[:, :, J:] = grad_v.transpose(1, 2)
        for part, g in ((slice(0, nh), grad_q), (slice(nh, J), grad_k)):  # the inverse rotation
            g = g.transpose(1, 2)  # (B, T, nh or nkv, hs)
            torch.mul(g, cos[:, :, part], out=d[:, :, part])
            add_turned(d[:, :, part], g, sin[:, :, part], sign=-1)
        d *= scale
        product = d * x
        grad_weight = product.sum((0, 1))  # (J, hs)
        mean = (product * weight).mean(-1, keepdim=True).mul_(scale).mul_(scale)
        d.mul_(weight).addcmul_(x, mean, value=-1)  # the gradient of rms_norm
        return grad.view_as(packed), grad_weight[:nh].sum(0), grad_weight[nh:].sum(0), None, None, None, None
