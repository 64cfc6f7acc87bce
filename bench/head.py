"""The loss head, forward and backward.

    python -m bench head

Methods: all logits at once, layers/linear_cross_entropy.py with chunks of several sizes, and torch's own.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.measure import alternate, memory_bytes
from layers.linear_cross_entropy import linear_cross_entropy

HEAD_SIZES = ((2048, 768, 50304), (2048, 384, 8192), (2048, 128, 384))  # tokens, C, V


def head_methods(chunks: tuple[int, ...]) -> dict[str, Callable]:
    """Functions of x (N, C), weight (V, C), targets (N,) that give the mean cross-entropy."""
    methods = {"all logits": lambda x, weight, targets: F.cross_entropy(F.linear(x, weight).float(), targets)}
    for chunk in chunks:
        name = "ours, auto" if chunk == -1 else f"ours, {chunk} rows"
        methods[name] = partial(linear_cross_entropy, chunk=chunk)
    if hasattr(nn, "LinearCrossEntropyOptions"):
        settings = nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        methods["torch's, 512 rows"] = partial(F.linear_cross_entropy, options=settings)
    return methods


def bench_head(options) -> list[dict]:
    """Forward and backward of the loss head, relative to all logits at once."""
    device, rows = options.device, []
    for N, C, V in HEAD_SIZES:
        N = options.tokens or N
        torch.manual_seed(0)
        x = torch.randn(N, C, device=device).requires_grad_()
        weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
        targets = torch.randint(0, V, (N,), device=device)

        def run(method, x=x, weight=weight, targets=targets):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                loss = method(x, weight, targets)
            loss.backward()
            x.grad = weight.grad = None
            return loss.detach()

        runs = {name: partial(run, method) for name, method in head_methods((-1, 128, 512, 1024)).items()}
        seconds = alternate(runs, device, options.rounds, warmup=1)
        peaks = {name: memory_bytes(each, device)[0] for name, each in runs.items()}
        with torch.no_grad():
            exact = F.cross_entropy(x.double() @ weight.double().t(), targets)
        for name, each in runs.items():
            rows.append({
                "tokens,C,V": f"{N},{C},{V}", "head": name, "ms": 1000 * seconds[name],
                "x all": seconds[name] / seconds["all logits"], "peak MiB": peaks[name] / 2**20,
                "memory x all": peaks[name] / peaks["all logits"],
                "loss off by": f"{(each() - exact).abs().item():.0e}",
            })  # fmt: skip
    return rows
