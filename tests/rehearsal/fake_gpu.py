"""A GPU that is not there: tensors on cuda:0 have no memory, and no kernel runs. Import this before torch.

    with pretend((9, 0)): ...                # new tensors are FakeTensors; torch.cuda reports capability 9.0
It replaces private functions of torch 2.14; another version may need other ones."""
# ruff: noqa: E402

import contextlib
import ctypes.util
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock


def load_driver() -> ctypes.CDLL:
    """fake_gpu.cpp, compiled and loaded as libcuda.so.1. Ends the process where a rehearsal is of no use."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    if not (folder / "lib/libc10_cuda.so").exists() or ctypes.util.find_library("cuda"):
        sys.exit(print("skipped: the rehearsal needs a CUDA build of torch, and a machine without a GPU"))
    ctypes.CDLL(f"{folder}/lib/libc10.so", mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as temporary:
        source, library = Path(__file__).with_suffix(".cpp"), f"{temporary}/libcuda.so.1"
        flags = ["-std=c++20", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{folder}/include"]
        subprocess.run(["c++", *flags, source, "-o", library], check=True)
        return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # its functions win over those of torch


driver = load_driver()

import torch
import torch.nn.functional as F
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder as Folder
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget

driver.install()


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention by the flash kernel; the real one would ask the driver which to take."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) if enable_gqa else t for t in (k, v))
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def deduce_value(folder, node, deduce=Folder._deduce_value):
    """The method of Inductor's that computes constants with real tensors; here on the CPU."""
    kwargs, node.kwargs = node.kwargs, {k: "cpu" if k == "device" else v for k, v in node.kwargs.items()}
    try:
        return deduce(folder, node)
    finally:
        node.kwargs = kwargs


@contextlib.contextmanager
def pretend(capability: tuple[int, int]):
    """In the block torch sees one GPU of this capability, and new tensors are FakeTensors."""
    major, minor = capability
    properties = SimpleNamespace(  # an A100's
        name="fake", major=major, minor=minor, multi_processor_count=108, total_memory=80 * 2**30,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
        warp_size=32, gcnArchName="", shared_memory_per_block=49152, shared_memory_per_block_optin=166912,
        shared_memory_per_multiprocessor=167936, L2_cache_size=40 * 2**20,
    )  # fmt: skip
    answers = dict(is_available=True, device_count=1, current_device=0, get_device_capability=capability,
                   get_device_properties=properties, get_device_name="fake", is_bf16_supported=major >= 8,
                   is_current_stream_capturing=False, get_rng_state=torch.zeros(16, dtype=torch.uint8),
                   synchronize=None, set_rng_state=None,
                   current_stream=SimpleNamespace(cuda_stream=0, device=torch.device("cuda:0")),
                   set_device=None, _exchange_device=0, _maybe_exchange_device=0, _lazy_init=None,
                   get_compute_capability=10 * major + minor)  # fmt: skip
    backend = mock.MagicMock()  # Triton's
    backend.get_current_target.return_value = GPUTarget("cuda", 10 * major + minor, 32)
    backend.get_active_torch_device.return_value = torch.device("cuda:0")
    replaced = [(fake_tensor, "init_gpu_context", lambda *_: None), (Folder, "_deduce_value", deduce_value),
                (fake_tensor.FakeTensorMode, "avoid_device_init", True),
                (triton.runtime.driver, "_active", backend), (F, "scaled_dot_product_attention", attention),
                (torch._C, "_cuda_getCurrentRawStream", lambda *_: 0)]  # fmt: skip
    for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
        names = [name for name in answers if hasattr(owner, name)]
        replaced += [(owner, name, lambda *_, value=answers[name], **__: value) for name in names]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        yield
