"""Initial weights for FSDP, one tensor at a time, so that no process ever holds a whole model.

The model's constructor runs once on fake tensors, which have a shape but no memory. A Recorder notes every
operator that writes to a tensor, and the state of the random number generator before it. To make a tensor,
its operators run again from these states, so the order of the modules does not matter."""

from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from huggingface.pretrained import fresh_statistics
from model import GPTConfig, GPTLMHeadModel

aten = torch.ops.aten
# These operators overwrite a whole tensor, so earlier writes need not run again.
OVERWRITING = (aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar)


class Recorder(TorchDispatchMode):
    """Records writes to fake tensors, and draws their random numbers. RuntimeError: not repeatable."""

    def __init__(self):
        super().__init__()
        self.writes: dict[int, list[tuple]] = {}  # by storage: generator state before, operator, arguments

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, draws = kwargs or {}, torch.Tag.nondeterministic_seeded in func.tags
        if func._schema.is_mutable:
            tensor, *others = args
            storage = tensor.untyped_storage()
            if not tensor.is_contiguous() or tensor.nbytes != storage.nbytes():
                raise RuntimeError(f"{func} writes to a part of a tensor; initialise whole tensors")
            past = [] if func in OVERWRITING else self.writes.get(storage._cdata, [])
            # The tensor is in the list, so that no other tensor gets its storage's address.
            self.writes[storage._cdata] = [*past, (torch.get_rng_state(), func, others, kwargs, tensor)]
            if draws:  # advances the generator as on the CPU
                with unset_fake_temporarily():
                    func(torch.empty(tensor.shape, dtype=tensor.dtype), *others, **kwargs)
        elif draws:
            raise RuntimeError(f"{func} draws random numbers for a new tensor; draw them in place instead")
        return func(*args, **kwargs)

    def repeat(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter or buffer called `name` with its values, on the CPU. RuntimeError if it has none."""
        writes = self.writes.get(tensor.untyped_storage()._cdata, [])
        if not writes or any(torch.is_tensor(argument) for write in writes for argument in write[2]):
            raise RuntimeError(f"{name}: no initialisation of it has been recorded that could be repeated")
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        for state, func, args, kwargs, _ in writes:
            torch.set_rng_state(state)
            func(made, *args, **kwargs)
        return made


def initial_weights(config: GPTConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of all parameters and buffers, equal bit for bit to GPTLMHeadModel(config)'s
    after torch.manual_seed(seed). At the end the generator is where that constructor would leave it."""
    torch.manual_seed(seed)
    with FakeTensorMode(), Recorder() as recorder:
        model = GPTLMHeadModel(config)
    end, statistics = torch.get_rng_state(), fresh_statistics(model)  # computed, not drawn
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, statistics[name] if name in statistics else recorder.repeat(name, tensor)
    torch.set_rng_state(end)
