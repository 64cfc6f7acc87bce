"""Read and write llm.c's binary files: models, debug states, tokenizers. (fineweb.py writes data shards.)

docs/huggingface.md has the commands, docs/formats.md the names of the files, their headers and the offset of
each tensor. import makes a folder that GPTLMHeadModel.from_pretrained and --init_from take.
Reference: github.com/karpathy/llm.c: train_gpt2.py writes these files, train_gpt2.c and .cu read and write
models, test_gpt2.c reads debug states, llmc/tokenizer.h reads tokenizers."""

import argparse
import contextlib
import math
import shlex
import shutil
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tiktoken
import torch

from huggingface.configuration import refuse
from huggingface.export import new_folder
from huggingface.gpt2 import gpt2_features
from model import GPT, GPTConfig, GPTLMHeadModel
from tokens.encodings import get_encoding
from tokens.files import write_atomically
from tokens.printable import print_error, printable
from tokens.shards import read_shard
from training.checkpoints import load_model

HEADER_BYTES = 1024
KINDS = {"model": 20240326, "debug state": 20240327, "tokenizer": 20240328}  # magic numbers
# version of a model: its type in torch, and in numpy, which has no bf16 and sees integers there
TYPES = {3: (torch.float32, "<f4"), 5: (torch.bfloat16, "<i2")}
VERSIONS = {"float32": 3, "bfloat16": 5}
FILES = {"float32": "gpt2_{}.bin", "bfloat16": "gpt2_{}_bf16.bin"}
FILES |= {"state": "gpt2_{}_debug_state.bin", "tokenizer": "gpt2_tokenizer.bin"}
LABELS = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}

TENSORS = {  # llm.c's name: ours (after "transformer.", layer i in h.{i}) and the shape, in the file's order
    "wte": ("wte.weight", "Vp C"), "wpe": ("wpe.weight", "P C"),
    "ln1w": ("h.{i}.ln_1.weight", "L C"), "ln1b": ("h.{i}.ln_1.bias", "L C"),
    "qkvw": ("h.{i}.attn.c_attn.weight", "L 3C C"), "qkvb": ("h.{i}.attn.c_attn.bias", "L 3C"),
    "attprojw": ("h.{i}.attn.c_proj.weight", "L C C"), "attprojb": ("h.{i}.attn.c_proj.bias", "L C"),
    "ln2w": ("h.{i}.ln_2.weight", "L C"), "ln2b": ("h.{i}.ln_2.bias", "L C"),
    "fcw": ("h.{i}.mlp.c_fc.weight", "L 4C C"), "fcb": ("h.{i}.mlp.c_fc.bias", "L 4C"),
    "fcprojw": ("h.{i}.mlp.c_proj.weight", "L C 4C"), "fcprojb": ("h.{i}.mlp.c_proj.bias", "L C"),
    "lnfw": ("ln_f.weight", "C"), "lnfb": ("ln_f.bias", "C"),
}  # fmt: skip


# ---------------------------------------------------------------------------- SIZES
class Sizes(NamedTuple):
    """The sizes of a model, in the order of the header."""

    P: int  # longest sequence
    V: int  # vocabulary
    L: int  # layers
    nh: int  # heads
    C: int  # channels
    Vp: int  # vocabulary, rounded up to a multiple of 128

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by llm.c's name."""
        letters = self._asdict() | {"3C": 3 * self.C, "4C": 4 * self.C}
        return {name: tuple(letters[s] for s in shape.split()) for name, (_, shape) in TENSORS.items()}


def padded(vocabulary: int) -> int:
    """The next multiple of 128."""
    return -(-vocabulary // 128) * 128


def sizes_of(config: GPTConfig) -> Sizes:
    """Sizes of a model to be written; ValueError, naming the field, if llm.c has no such model. V excludes
    rows that only pad the embedding: those from encoding_size on, or from 50,257 on in GPT-2's 50,304."""
    only = gpt2_features(config) | {"bias": (True,), "norm_eps": (1e-5,), "tie_word_embeddings": (True,)}
    only["mlp_hidden_size"] = (4 * config.n_embd, None)
    remedy = ", only {!r}; keep this model as a Hugging Face folder (python checkpoint.py export)"
    refuse("llm.c's GPT-2 cannot express", config, only, remedy)
    V = config.encoding_size or config.vocab_size
    if config.encoding_size is None and config.encoding == "gpt2" and V == padded(50257):
        V = 50257
    return Sizes(config.block_size, V, config.n_layer, config.n_head, config.n_embd, padded(V))


def encoding_of(config: GPTConfig) -> tiktoken.Encoding:
    """The encoding from which a model's tokenizer is written; ValueError if it is unknown or missing."""
    try:
        return get_encoding(config.encoding)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        problem = str(error).removesuffix(", or use --encoding bytes")  # a flag of fineweb.py
        raise ValueError(f"no tokenizer can be written: {problem}") from error


def dense_model(sizes: Sizes, state: dict[str, torch.Tensor]) -> GPTLMHeadModel:
    """A GPT-2 of these sizes with the tensors of `state`, in evaluation mode. Draws no random numbers."""
    eot = sizes.V - 1 if sizes.V in (257, 50257) else None  # the last token of both encodings
    config = GPTConfig(
        use_moe=False, block_size=sizes.P, vocab_size=sizes.V, n_layer=sizes.L, n_head=sizes.nh,
        n_embd=sizes.C, encoding="bytes" if sizes.V == 257 else "gpt2", bos_token_id=eot, eos_token_id=eot,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPTLMHeadModel(config)
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]}, assign=True)
    model.tie_weights()
    return model.eval()


# ---------------------------------------------------------------------------- READ AND WRITE
def our_names(name: str, layers: int) -> list[str]:
    """The names of our parameters that form one of llm.c's tensors: one per layer, or a single one."""
    ours = f"transformer.{TENSORS[name][0]}"
    return [ours.format(i=i) for i in range(layers)] if "{i}" in ours else [ours]


def header(kind: str, version: int, *fields: int) -> bytes:
    """The 1024 bytes at the beginning of a file."""
    numbers = np.array((KINDS[kind], version, *fields), dtype="<i4")
    return numbers.tobytes().ljust(HEADER_BYTES, b"\0")


def write_tensors(file: BinaryIO, sizes: Sizes, state: dict[str, torch.Tensor], version: int) -> None:
    """Write all tensors of the table; `state` has our names. bf16 rounds to the nearest, ties to even."""
    dtype, stored = TYPES[version]
    for name in TENSORS:
        for ours in our_names(name, sizes.L):
            tensor = state[ours].detach().to("cpu", dtype)
            if name == "wte":
                tensor = torch.nn.functional.pad(tensor[: sizes.V], (0, 0, 0, sizes.Vp - sizes.V))  # (Vp, C)
            bits = tensor.contiguous().view(torch.int16 if version == 5 else torch.float32)
            file.write(bits.numpy().astype(stored, copy=False))


def write_model(model: GPT, path: str | Path, dtype: str = "float32") -> None:
    """Write the weights for llm.c, as "float32" or "bfloat16". ValueError, naming the field, as sizes_of."""
    sizes, state = sizes_of(model.config), model.state_dict()

    def write(file: BinaryIO) -> None:
        file.write(header("model", VERSIONS[dtype], *sizes))
        write_tensors(file, sizes, state, VERSIONS[dtype])

    write_atomically(Path(path), write)


def read_sizes(path: Path) -> tuple[Sizes, int]:
    """Sizes and version of a model file. FileNotFoundError; ValueError if it is none or is damaged."""
    if not path.is_file():
        export = f"python -m llmc export --checkpoint log/latest --out {shlex.quote(str(path.parent))}"
        raise FileNotFoundError(f"{path}: no such file; make one with: {export}")
    numbers, length = np.fromfile(path, "<i4", HEADER_BYTES // 4).tolist(), path.stat().st_size
    if length < HEADER_BYTES or numbers[0] != KINDS["model"]:
        known = {number: f"a {name}" for name, number in KINDS.items()} | {20240520: "a data shard"}
        found = known.get(numbers[0], f"begins with {numbers[0]}") if numbers else "empty"
        problem = f"no model of llm.c (magic {KINDS['model']}), but {found}, {length:,} bytes long"
        raise ValueError(f"{path}: {problem}; give a model")
    version, sizes = numbers[1], Sizes(*numbers[2:8])
    if version not in TYPES:
        raise ValueError(f"{path}: version {version} of a model; only 3 and 5 can be read; get a new one")
    if min(sizes) < 1 or sizes.C % sizes.nh != 0 or sizes.Vp != padded(sizes.V):
        raise ValueError(f"{path}: damaged, no GPT-2 has these sizes: {sizes}; get it again")
    stored = sum(map(math.prod, sizes.shapes().values()))
    promised = HEADER_BYTES + TYPES[version][0].itemsize * stored
    if length != promised:
        problem = "cut short" if length < promised else "too long"
        raise ValueError(f"{path}: {problem}: {length:,} bytes, its header says {promised:,}; get it again")
    return sizes, version


def read_model(path: Path) -> GPTLMHeadModel:
    """The model in a file of llm.c, in fp32, in evaluation mode, on the CPU. Errors as read_sizes."""
    sizes, version = read_sizes(path)
    (dtype, stored), state = TYPES[version], {}
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        for name, shape in sizes.shapes().items():
            numbers = np.fromfile(file, dtype=stored, count=math.prod(shape)).reshape(shape)
            tensor = torch.from_numpy(numbers).view(dtype)
            if name == "wte":
                if tensor[sizes.V :].any():
                    warnings.warn(f"{printable(path)}: its padding of wte is not zero; dropped", stacklevel=2)
                tensor = tensor[: sizes.V]
            parts = tensor if "L" in TENSORS[name][1].split() else [tensor]
            for ours, part in zip(our_names(name, sizes.L), parts, strict=True):
                state[ours] = part.to(torch.float32, copy=True)  # a copy, not a view
    return dense_model(sizes, state)


def write_state(model: GPT, x: torch.Tensor, y: torch.Tensor, path: str | Path) -> None:
    """Write inputs x (B, T), targets y (B, T), and the logits, mean loss and gradients that they give, in
    fp32, without dropout; the model stays as it is. ValueError as sizes_of; for ids or a T it cannot take."""
    sizes = sizes_of(model.config)
    if x.size(1) > sizes.P:
        raise ValueError(f"T={x.size(1)} is longer than the model's block_size={sizes.P}; take a shorter T")
    for name, ids in (("x", x), ("y", y)):
        if ids.min() < 0 or ids.max() >= sizes.V:
            found = f"{name} has ids from {ids.min()} to {ids.max()}"
            raise ValueError(f"{found}, the model only 0 to {sizes.V - 1}; take data of its encoding")
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: sizes.V]
    reference = dense_model(sizes, state)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32: others compare with these numbers
    try:
        with torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
            logits, loss = reference(x.to(model.device).long(), targets=y.to(model.device).long())
            loss.backward()
    finally:
        torch.set_float32_matmul_precision(precision)

    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}

    def write(file: BinaryIO) -> None:
        file.write(header("debug state", 2, *x.shape))
        for tensor, dtype in ((x, "<i4"), (y, "<i4"), (logits, "<f4"), (loss, "<f4")):
            file.write(np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=dtype))
        write_tensors(file, sizes, gradients, version=3)

    write_atomically(Path(path), write)


def tokenizer_file(encoding: tiktoken.Encoding) -> bytes:
    """A tokenizer file's content. ValueError for an encoding with unused ids or without <|endoftext|>."""
    if "<|endoftext|>" not in encoding.special_tokens_set:
        raise ValueError(f"encoding {encoding.name!r} has no <|endoftext|>; use gpt2")
    parts = [header("tokenizer", 2, encoding.n_vocab, encoding.eot_token)]
    for token in range(encoding.n_vocab):
        text = b""
        with contextlib.suppress(KeyError):
            text = encoding.decode_single_token_bytes(token)
        if not 1 <= len(text) <= 255:
            size = f"token {token} has {len(text)} bytes, not 1 to 255"
            raise ValueError(f"encoding {encoding.name!r}: {size}; use gpt2")
        parts.append(bytes([len(text)]) + text)
    return b"".join(parts)


# ---------------------------------------------------------------------------- COMMANDS
def write_all(model: GPT, x: torch.Tensor | None, y: torch.Tensor | None, folder: str | Path,
              names: str = "d12", c_names: bool = False,
              parts: tuple[str, ...] = tuple(FILES)) -> list[Path]:  # fmt: skip
    """Write what llm.c's train_gpt2.py writes at its start, or some `parts` (keys of FILES) of it; returns
    the paths. names: such as "d12" (gpt2_d12.bin), "gpt2-medium" (gpt2_355M.bin); c_names adds copies with
    124M's names. x, y (B, T): for the debug state. ValueError, before anything is written, if
    llm.c cannot have the model or its encoding."""
    sizes_of(model.config)
    tokenizer = tokenizer_file(encoding_of(model.config)) if "tokenizer" in parts else b""
    Path(folder).mkdir(parents=True, exist_ok=True)
    labels, written = [LABELS.get(names, names)] + ["124M"] * c_names, []
    for part in parts:
        first, *copies = dict.fromkeys(Path(folder, FILES[part].format(label)) for label in labels)
        if part == "state":
            write_state(model, x, y, first)
        elif part == "tokenizer":
            write_atomically(first, lambda file: file.write(tokenizer))
        else:
            write_model(model, first, part)
        for copy in copies:
            with open(first, "rb") as source:
                write_atomically(copy, lambda file, source=source: shutil.copyfileobj(source, file))
        written += [first, *copies]
    return written


def run(options: argparse.Namespace) -> list[Path]:
    """Run the command; returns the paths that it wrote."""
    if options.command == "import":
        model = read_model(options.model)
        if options.out.exists():
            raise ValueError(f"--out {options.out}: it exists already; name a new folder")
        with new_folder(options.out) as temporary:
            model.save_pretrained(temporary)
        return [options.out]
    x = y = None
    if options.command == "state":
        B, T, need, parts = options.B, options.T, options.B * options.T + 1, ("state",)
        if min(B, T) < 1:
            raise ValueError(f"--B {B} --T {T}: both must be at least 1")
        tokens = torch.from_numpy(read_shard(options.data)[:need].astype(np.int64))
        if len(tokens) < need:
            raise ValueError(f"{options.data}: {len(tokens)} tokens, --B and --T need {need}; lower them")
        x, y = tokens[:-1].view(B, T), tokens[1:].view(B, T)
    else:
        parts = (options.dtype, "tokenizer") if options.dtype else ("float32", "bfloat16", "tokenizer")
    model = load_model(options.checkpoint)
    return write_all(model, x, y, options.out, f"d{model.config.n_layer}", bool(options.c_names), parts)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m llmc", allow_abbrev=False, description=__doc__.split(". ")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a model and its tokenizer for llm.c")
    export.add_argument("--dtype", choices=VERSIONS, help="only this one (default: both)")
    state = commands.add_parser("state", help="write logits, loss and gradients for llm.c to check itself")
    state.add_argument("--data", required=True, help="a data shard; its first B * T + 1 tokens are used")
    state.add_argument("--B", type=int, default=4, help="sequences (default: 4)")
    state.add_argument("--T", type=int, default=64, help="tokens in each (default: 64)")
    for command in (export, state):
        command.add_argument("--checkpoint", required=True, help="log/model_XXXXX.pt, or a model's folder")
        command.add_argument("--out", type=Path, required=True, help="folder to write into")
        command.add_argument("--c_names", type=int, choices=(0, 1), default=0, help="1 = also gpt2_124M...")
    reading = commands.add_parser("import", help="convert a model file of llm.c to a Hugging Face folder")
    reading.add_argument("--model", type=Path, required=True, help="a model file of llm.c, fp32 or bf16")
    reading.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist yet")
    try:
        for path in run(parser.parse_args(arguments)):
            print(f"wrote {printable(path)}")
    except (ValueError, OSError) as error:
        print_error("python -m llmc", error)
        return 2
    return 0
