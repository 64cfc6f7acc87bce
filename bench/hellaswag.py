"""HellaSwag's questions per second: the plain method against ours.

    python -m bench hellaswag --data FILE

The model is untrained: speed and agreement of the two methods do not depend on its weights.
"""

from functools import partial
from pathlib import Path

import torch

import hellaswag as hs
from bench.measure import alternate
from bench.models import size_of
from model import GPTConfig, GPTLMHeadModel


def bench_hellaswag(options) -> list[dict]:
    """Questions per second. plain: each question alone, four padded rows, all logits."""
    device, fields = options.device, size_of(options.size)
    torch.manual_seed(0)
    model = GPTLMHeadModel(GPTConfig(vocab_size=50304, **fields)).to(device).eval()
    path = Path(options.data) if options.data else hs.download("val")
    every = hs.load_questions(path, None, "completion", "gpt2", 1024, 50304)
    questions = every[:: max(1, len(every) // options.limit)][: options.limit]  # from the whole file

    def score(method):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return method(model, questions)

    methods = {"plain": hs.score_one_by_one, "ours": hs.score_batched}
    runs = {method: partial(score, function) for method, function in methods.items()}
    seconds = alternate(runs, device, options.rounds, warmup=1)
    losses = {method: run() for method, run in runs.items()}
    choices = {method: hs.tally(questions, each).choices for method, each in losses.items()}
    return [
        {
            "method": method, "model": options.size, "questions": len(questions), "s": seconds[method],
            "questions/s": len(questions) / seconds[method], "x plain": seconds["plain"] / seconds[method],
            "same choices": sum(map(int.__eq__, choices[method], choices["plain"])),
            "losses off by": f"{(losses[method] - losses['plain']).abs().max().item():.0e}",
        }
        for method in methods
    ]  # fmt: skip
