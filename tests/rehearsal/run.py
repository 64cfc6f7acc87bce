"""Training steps on a GPU that is not there: what can be known of the GPU path without a GPU.

Run: python tests/rehearsal/run.py [VARIANT ...]     (30 seconds a row; they print their kernels, too)

It needs torch's CUDA build, a C++ compiler and no GPU. train_step runs on fake tensors, with compiled blocks
from capability 8.0 on; a wrong device or dtype ends it. Triton compiles our kernels. In the table:
    graphs, kernels    that torch.compile makes; kernels in a block's code, forward and backward
    host reads         in an optimizer step: the host waits for the device
    bytes/logit, GB    of the loss head with its products, and of a micro-step: kernels read their inputs and
                       write their outputs once, at least
    MFU                at most: products run at the card's peak, then the rest runs at its bandwidth"""
# ruff: noqa: I001

import contextlib
import os
import re
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fake_gpu import pretend  # before torch
import torch
from torch._inductor.graph import GraphLowering
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from bench.measure import RandomBatch, make_run
from bench.models import MODEL_SIZES
from layers import experts, grouped_product
from layers import linear_cross_entropy as head
from model import GPTConfig, GPTLMHeadModel
from train_gpt_moe import TrainConfig, train_step
from training import parallel
from training.optimizers import build_optimizer

B, T, V = 16, 1024, 50304
CARDS = {(9, 0): (989e12, 3.35e12), (8, 0): (312e12, 2.0e12), (7, 5): None}  # H100 SXM, A100: FLOP/s, bytes/s
VARIANTS = {  # settings that differ from the size d12-moe8x2
    "dense": dict(use_moe=False), "MoE 8x2": {}, "float16": dict(dtype="float16"),
    "MoE 64x8": dict(num_experts=64, num_experts_per_tok=8, expert_hidden_size=384),
    "float32": dict(dtype="float32"), "checkpointing": dict(activation_checkpointing="block"),
    "Muon": dict(optimizer="muon"), "windows": dict(sliding_window=256, global_every=4, position="rope"),
    "documents": dict(
        document_mask=True, bos_token_id=0, sliding_window=256, global_every=4, position="rope"),
    "everything": dict(
        moe_loss_type="diversity_regularization", router_score="sigmoid", router_bias_update_rate=1e-3,
        router_z_loss_coef=1e-3, num_shared_experts=1, activation="swiglu", position="rope", qk_norm=True,
        norm="rmsnorm", n_kv_head=4, logit_softcap=30.0, dropout=0.1),
}  # fmt: skip
PRODUCT = re.compile("mm|attention|product|weight_gradient|Template")  # kernels that do the counted FLOPs
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "device"}
LOOKUPS = {"embedding", "index_select", "gather", "index"}  # they do not read their whole first argument
OURS = (head.chunked, experts.expert_mlp, experts.expert_mlp_backward, grouped_product.grouped_product,
        grouped_product.weight_gradient)  # fmt: skip
INSIDES = {operator._opoverload: operator._init_fn for operator in OURS}
CALL = r"^ +(?:\w+ = )?(?:(triton_\w+)\.run|(?:extern_kernels|aten|torch\.ops\.\w+)\.(\w+)[\w.]*)\("


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size(tree) -> int:
    """Bytes of the tensors; an expanded one has those of its memory."""
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors(tree))


class Recorder(TorchDispatchMode):
    """Adds up the bytes of a step by kernel, and counts the host's reads."""

    supports_higher_order_operators = True
    is_infra_mode = classmethod(lambda cls: True)  # torch.compile does nothing under other modes

    def begin(self, rows: int) -> None:
        """A new step. rows: of the routing."""
        self.rows, self.host_reads, self.in_blocks, self.of_head = rows, 0, 0, 0
        self.moved, self.micro_step = Counter(), None

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(operator, HigherOrderOperator):  # torch.compile traces
            return operator(*args, **kwargs)
        if operator in INSIDES:  # several kernels
            before = self.moved.total()
            with self, torch.no_grad():
                result = INSIDES[operator](*args, **kwargs)
            self.of_head += (self.moved.total() - before) * (operator is head.chunked._opoverload)
            return result
        name, inputs = operator.overloadpacket.__name__, tensors((args, kwargs))
        if name == "_local_scalar_dense" and isinstance(inputs[0], FakeTensor):
            self.host_reads += inputs[0].is_cuda
            return 1.0  # finite losses, no idle expert; the signals do not matter to train_step
        result = operator(*args, **kwargs)
        fresh = [t for t in tensors(result) if not any(t is other for other in inputs)]
        if any(t.is_cuda for t in (*inputs, *fresh)) and not operator.is_view and name not in NO_KERNEL:
            self.host_reads += name == "nonzero" or any(t.device.type == "cpu" for t in fresh)
            arguments = zip(operator._schema.arguments, args, strict=False)
            written = [value for argument, value in arguments if argument.is_write]
            read = (inputs[1:], fresh) if name in LOOKUPS else inputs
            self.moved[name] += size((read, written, fresh))
        return result

    def launch(self, kernel, *args, grid, warmup, run=JITFunction.run, **kwargs) -> None:
        """Triton compiles the kernel for the GPU. Limit: shared memory of the smallest cards."""
        made = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        assert made.metadata.shared <= 101376, kernel.fn.__name__
        passes = 3 if kernel is head.loss_kernel else 1  # it reads the logits twice and writes them
        self.moved[kernel.fn.__name__] += passes * size(args)

    def sizes(self, ends: torch.Tensor) -> list[int]:
        """All experts have as many rows."""
        self.host_reads += 1
        return [self.rows // len(ends)] * len(ends)

    def tolist(self, tensor: FakeTensor, tolist=FakeTensor.tolist) -> list:
        """One read; FakeTensor's method reads one number after the other."""
        before, values = self.host_reads, tolist(tensor)
        self.host_reads = before + tensor.is_cuda
        return values

    def finish(self, *args, finish_gradients=parallel.finish_gradients) -> None:
        self.micro_step = self.moved.copy()  # the last backward is over
        finish_gradients(*args)

    def compiled(self, graph: GraphLowering) -> mock.Mock:
        """Inductor writes its code, but instead of that the graph runs."""
        code = graph.codegen()[0].value
        names = ["".join(found) for found in re.findall(CALL, code[code.index("def call(") :], re.M)]
        moved = Counter()
        for node in graph.scheduler.nodes:
            name = getattr(node.node, "python_kernel_name", None) or type(node.node).__name__
            moved[name] += node.get_read_write_buffers_sizes()
        self.graphs.append(names)

        def call(arguments):
            before, result = self.moved.copy(), graph.module(*arguments)
            self.moved, self.in_blocks = before + moved, self.in_blocks + len(names)
            return result

        return mock.Mock(call=call, __file__="")


def rehearse(variant: str, capability: tuple[int, int]) -> tuple[list, Recorder]:
    """A row of the table, and the recorder of the variant's second step; the first one compiles."""
    fields = MODEL_SIZES["d12-moe8x2"] | dict(block_size=T, vocab_size=V) | VARIANTS[variant]
    settings = {name: fields.pop(name) for name in list(fields) if name not in GPTConfig.__annotations__}
    config = TrainConfig(max_lr=1e-4, min_lr=1e-4, warmup_steps=0, **settings)
    dtype = config.dtype.replace("auto", "bfloat16" if capability >= (8, 0) else "float16")
    torch._dynamo.reset()
    recorder, mfu, card = Recorder(), "", CARDS[capability] if dtype != "float32" else None
    recorder.graphs = []
    replaced = [(GraphLowering, "_compile_to_module", recorder.compiled), (experts, "_sizes", recorder.sizes),
                (JITFunction, "run", recorder.launch), (parallel, "finish_gradients", recorder.finish),
                (FakeTensor, "tolist", recorder.tolist)]  # fmt: skip
    with pretend(capability), contextlib.ExitStack() as stack:
        with torch.device("cuda:0"):
            model = GPTLMHeadModel(GPTConfig(**fields))
        model.loss_chunk = -1
        if config.activation_checkpointing == "block":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        made = dict(config=config, dtype=dtype, optimizer=build_optimizer(config, model))
        run = make_run(model, RandomBatch(model, B, T), **made)
        if capability >= (8, 0):
            parallel.compile_blocks(model, run.layout)
        stack.enter_context(recorder)
        for owner, name, method in replaced:  # by a function: it gets the object as its first argument
            function = lambda *args, method=method, **kwargs: method(*args, **kwargs)  # noqa: E731
            stack.enter_context(mock.patch.object(owner, name, function))
        for step in range(2):
            recorder.begin(B * T * model.config.num_experts_per_tok)
            train_step(run, step)
    if card:
        products = model.flops_per_token(T) * B * T / card[0]
        rest = sum(moved for name, moved in recorder.micro_step.items() if not PRODUCT.search(name)) / card[1]
        mfu = f"{products / (products + rest):.0%}"
    kernels = round(recorder.in_blocks / model.config.n_layer)
    moved = f"{recorder.of_head / (B * T * V):.1f}", f"{recorder.micro_step.total() / 1e9:.1f}"
    counted = len(recorder.graphs), kernels, recorder.host_reads
    return [variant, "{}.{}".format(*capability), dtype, *counted, *moved, mfu], recorder


if __name__ == "__main__":
    names = ["variant", "capability", "dtype", "graphs", "kernels", "host reads", "bytes/logit", "GB", "MFU"]
    print("Computed, not measured.\n\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for variant in sys.argv[1:] or VARIANTS:
        for capability in CARDS:
            row, recorder = rehearse(variant, capability)
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            if sys.argv[1:]:
                print(*recorder.graphs, "bytes", *recorder.micro_step.most_common(12), sep="\n")
