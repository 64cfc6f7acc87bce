"""What a run measures for its evaluations only: the routers of each MoE layer, and the gradient noise scale.

The step before an evaluation measures gradients and the use of the experts, and reads them from the device
together with the loss. The evaluation measures the routers. One row of the log gets all of it.

Gradient noise scale, in tokens (McCandlish et al., arXiv 1812.06162, appendix A.1): g_b is the gradient of a
batch of b tokens, G its expectation, S / b the trace of its covariance. Then

    E |g_b|^2 = |G|^2 + S / b        noise scale = S / |G|^2

A small batch (the first micro-step) and a big one (the step) give unbiased estimates of |G|^2 and S. Each is
averaged over evaluations before the division, because the ratio of two noisy numbers is biased.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from layers.usage import STARVED_BELOW
from training.evaluation import evaluates_at
from training.metrics import BY_LAYER
from training.parallel import gradient_norms

MEMORY = 10  # evaluations over which the noise scale is averaged
PROBE = 4096  # tokens at most whose first choice is compared


class StepGradients:
    """Measures the gradients of a step, if an evaluation follows it. `run` is training/setup.py's Run.

    With DDP the gradient of the first micro-step is that of each rank's own B * T tokens, and the squares of
    its norm are averaged over the ranks. FSDP must reduce it first (`reduces`), and then has all ranks'
    tokens. Experts that ranks share have the gradient of these ranks' tokens. Squared norms of parts add up,
    so each part may have its own size of batch."""

    def __init__(self, run: Any, step: int):
        self.run, self.measures = run, evaluates_at(step + 1, run.config)
        self.compares, self.small = self.measures and run.accumulation > 1, None  # squares, (2,)
        self.fsdp = run.layout.parallel == "fsdp"
        ranks = 1 if self.fsdp else run.layout.world.size / np.array([1, run.layout.ep_size])
        self.share = np.ones(2) / (run.accumulation * ranks)  # of the step's tokens, in a small batch

    @property
    def reduces(self) -> bool:
        """Whether the next backward must reduce gradients over the ranks, although it is not the last."""
        return self.fsdp and self.compares and self.small is None

    def parts(self) -> list[list[torch.nn.Parameter]]:
        """The parameters: all but the experts, experts."""
        model = self.run.model
        experts = {id(p): p for moe in model.moe_layers() for p in moe.experts.parameters()}
        return [[p for p in model.parameters() if id(p) not in experts], [*experts.values()]]

    def end_micro_step(self) -> None:
        """After a backward: only the first one of a step is measured."""
        if self.compares and self.small is None:
            layout = self.run.layout
            self.small = gradient_norms(self.parts(), layout).square() / layout.world.size
            self.small[1] /= layout.ep_size**2  # finish_gradients has not divided this gradient

    def norms(self) -> dict[str, torch.Tensor]:
        """After a step's last backward: numbers (1,) for `Diagnostics.step`, the same on all ranks; or {}."""
        if not self.measures:
            return {}
        groups = [[moe.gate.weight] for moe in self.run.model.moe_layers()]
        groups += self.parts() if self.compares else []
        found = [*gradient_norms(groups, self.run.layout).float().split(1)] if groups else []
        found += [*self.run.layout.world.sum(self.small).float().split(1)] if self.compares else []
        return {f"measured {i}": value for i, value in enumerate(found)}


class Diagnostics:
    """What was measured for the next evaluation, and what later evaluations need. state: of a checkpoint."""

    def __init__(self, state: dict[str, torch.Tensor] | None = None):
        state = dict(state or {})
        self.choices = state.pop("choices", None)  # (layers, tokens) int16: first choices, last evaluation
        noise = state.pop("noise", None)
        self.noise = [0.0] * 3 if noise is None else noise.tolist()  # evaluations, means of |G|^2 and of S
        self.newest: dict[str, Any] = {name: value.tolist() for name, value in state.items()}
        self._watched: dict[int, torch.Tensor] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by name, for a checkpoint."""
        numbers = self.newest | {"noise": self.noise}
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        return state if self.choices is None else state | {"choices": self.choices}

    def step(self, gradients: StepGradients, record: dict, usage: np.ndarray, scale: float) -> None:
        """Keep the measurements if an evaluation follows; the record loses `StepGradients.norms`. usage:
        MoE.step_usage of each layer. scale: float16's loss scale."""
        self.newest, run, layers = {}, gradients.run, len(usage)
        values = np.array([record.pop(name) for name in list(record) if name.startswith("measured ")])
        if not gradients.measures or "skipped" in record:
            return
        if layers:
            E, K = usage.shape[1] - 1, run.model.config.num_experts_per_tok
            fair = E * np.array(record["expert_load"])  # (layers, E) in fair shares
            by_layer = dict(max_load=fair.max(1), starved=(fair < STARVED_BELOW).mean(1))
            by_layer |= dict(router_entropy=usage[:, 0], router_norm=values[:layers])
            self.newest = {name + BY_LAYER: value.tolist() for name, value in by_layer.items()}
            self.newest["max_load_ceiling"] = E / K
        if gradients.compares:
            norms, small = values[layers:].reshape(2, 2)
            small = small * (run.accumulation / scale) ** 2  # the loop divides losses by the micro-steps
            self.add_noise(small, norms**2, gradients.share, run.config.total_batch_size)

    def add_noise(self, small: np.ndarray, big: np.ndarray, share: np.ndarray, tokens: int) -> None:
        """Add the squared gradient norms (parts,) of small batches, which have this share of the step's
        tokens, and of the step."""
        square = ((big - share * small) / (1 - share)).sum()
        noise = ((small - big) * share / (1 - share)).sum() * tokens
        seen, *means = self.noise
        weight = max(1 / (seen + 1), 1 / MEMORY)
        moved = [mean + weight * (new - mean) for mean, new in zip(means, (square, noise), strict=True)]
        self.noise = [seen + 1, *map(float, moved)]
        if min(moved) > 0:  # the estimates are noisy themselves
            self.newest["noise_scale"] = float(moved[1] / moved[0])

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Around a validation: note the first choices in its first batch, which is always the same. Those of
        rank 0, the first B sequences, are logged."""
        self._watched = {}

        def note(moe, layer, gate, inputs, logits) -> None:
            if layer not in self._watched:
                routing, _ = moe.route(logits[:PROBE])
                self._watched[layer] = routing.expert[routing.position].view(-1, routing.per_token)[:, 0]

        with contextlib.ExitStack() as hooks:
            for layer, moe in enumerate(model.moe_layers()):
                hooks.enter_context(moe.gate.register_forward_hook(partial(note, moe, layer)))
            yield

    def evaluation(self, model: Any) -> dict:
        """What an evaluation logs. Call it once an evaluation can no longer be interrupted."""
        found, layers = dict(self.newest), model.moe_layers()
        if any(moe.router_bias_update_rate > 0 for moe in layers):
            biases = torch.stack([moe.router_bias for moe in layers])  # (layers, E)
            found["bias_range" + BY_LAYER] = (biases.amax(1) - biases.amin(1)).tolist()
        if self._watched:
            before, self.choices = self.choices, torch.stack([*self._watched.values()]).cpu()
            if before is not None and len(before) == len(layers):
                tokens = min(before.shape[1], self.choices.shape[1])  # a resumed run may have another B
                moved = before[:, :tokens] != self.choices[:, :tokens]
                found["rerouted" + BY_LAYER] = moved.double().mean(1).tolist()
                found["rerouted"] = moved.double().mean().item()
        return found

    def batch_text(self, run: Any) -> str:
        """The step's batch against the noise scale, in words; "" if this run has not measured that."""
        tokens, scale = run.config.total_batch_size, self.newest.get("noise_scale")
        if scale is None or not run.trains:
            return ""
        advice = "a larger batch would still pay" if tokens < scale else "a smaller one would learn as much"
        advice = "about right" if 0.5 <= tokens / scale <= 2 else advice
        size = f"{tokens / scale:.2g} of the gradient noise scale ({float(f'{scale:.2g}'):,.0f})"
        return f"{tokens:,} tokens are {size}: {advice}"
