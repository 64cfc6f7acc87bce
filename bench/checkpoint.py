"""What a checkpoint costs.

    python -m bench checkpoint --size d12

Parts: the pause of training, writing in the background, verifying, loading.
"""

import tempfile
import time
from collections import defaultdict
from statistics import median

import torch

from bench.models import size_of
from model import GPTConfig, GPTLMHeadModel
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import load_checkpoint, verify_checkpoint


def bench_checkpoint(options) -> list[dict]:
    """Milliseconds of each part, for a model of --size with AdamW's moments."""
    model = GPTLMHeadModel(GPTConfig(**size_of(options.size))).to(options.device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), model.device.type)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    state = {
        "model": model.state_dict(), "config": model.config.to_dict(), "optimizer": optimizer.state_dict()
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may be in memory
        writer = CheckpointWriter(folder, keep_last=1, say=lambda line: None)
        seconds: dict[str, list[float]] = defaultdict(list)
        for step in range(options.rounds + 1):
            pause = writer.save(state | {"step": step})
            if error := writer.wait():
                raise error
            seconds["pause of training" if step else "first pause"].append(pause)
            seconds["writing and reading back, in the background"].append(writer.seconds)
            for part, read in (("verifying", verify_checkpoint), ("verifying and loading", load_checkpoint)):
                begin = time.perf_counter()
                read(writer.path)
                seconds[part].append(time.perf_counter() - begin)
        gigabytes = writer.path.stat().st_size / 1e9
    times = {part: 1e3 * median(taken) for part, taken in seconds.items()}
    return [{"part": p, "GB": gigabytes, "ms": ms, "ms per GB": ms / gigabytes} for p, ms in times.items()]
