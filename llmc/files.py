"""llm.c's binary files, both ways: models, debug states, tokenizers. (Data shards are fineweb.py's.)

    python llmc.py export --checkpoint log/model_19073.pt --out llmc                   # for llm.c's trainers
    python llmc.py state --checkpoint log/model_19073.pt --data shard.bin --B 4 --T 64 --out llmc
    python llmc.py import --model model_00001000.bin --out my_model                    # from llm.c's trainers

export writes gpt2_dL.bin (fp32), gpt2_dL_bf16.bin and gpt2_tokenizer.bin, L being the number of layers; state
writes gpt2_dL_debug_state.bin, to be kept beside gpt2_dL.bin; --c_names 1 adds copies named as llm.c's
programs want them, gpt2_124M.bin, gpt2_124M_bf16.bin, gpt2_124M_debug_state.bin. import makes a folder that
GPTLMHeadModel.from_pretrained and --init_from take. Exit codes: 0 done, 2 something given is wrong.

train_gpt_moe.py takes the flags of llm.c's train_gpt2.py, and with --preset llmc its defaults. On purpose
    --warmup_iters of --num_iterations or more, --learning_rate_decay_frac above 1, --zero_stage 2, 3 (and 1
        without torchrun) are refused;
    --grad_clip 0 means no clipping, not gradients of 0;
    --val_loss_every 0 evaluates at the end; the loss is the mean of all ranks', not the first one's;
    --output_dir is log if none is given; --write_tensors writes there, and with --inference_only nothing;
    --dtype holds on a CPU, too; samples take one of 50 tokens, not 40; new weights are of a seed of our own.

llm.c trains GPT-2 and nothing else, so only a dense model of that shape can be written: a model with another
feature is refused by the name of that feature. Numbers are little-endian. Every file begins with 256 int32
(1024 bytes), those not named here being zero:

    byte    model                     debug state     tokenizer
    0       20240326                  20240327        20240328
    4       3 = fp32, 5 = bf16        2               2
    8       P, longest sequence       B               number of tokens
    12      V, vocabulary             T               id of <|endoftext|>
    16      L, layers
    20      nh, heads
    24      C, channels
    28      Vp, V rounded up to a multiple of 128

Tensors of a model, each for all layers together. A number takes s = 4 (fp32) or 2 (bf16) bytes, and a tensor
begins at byte 1024 + s * first, with D = (Vp + P) * C, a = L * C, b = L * C * C:

    tensor    shape       first               ours
    wte       (Vp, C)     0                   transformer.wte.weight, then Vp - V rows of zeros; also the head
    wpe       (P, C)      Vp * C              transformer.wpe.weight
    ln1w      (L, C)      D                   transformer.h.{i}.ln_1.weight
    ln1b      (L, C)      D + a               transformer.h.{i}.ln_1.bias
    qkvw      (L, 3C, C)  D + 2*a             transformer.h.{i}.attn.c_attn.weight, rows all q, all k, all v
    qkvb      (L, 3C)     D + 2*a + 3*b       transformer.h.{i}.attn.c_attn.bias
    attprojw  (L, C, C)   D + 5*a + 3*b       transformer.h.{i}.attn.c_proj.weight
    attprojb  (L, C)      D + 5*a + 4*b       transformer.h.{i}.attn.c_proj.bias
    ln2w      (L, C)      D + 6*a + 4*b       transformer.h.{i}.ln_2.weight
    ln2b      (L, C)      D + 7*a + 4*b       transformer.h.{i}.ln_2.bias
    fcw       (L, 4C, C)  D + 8*a + 4*b       transformer.h.{i}.mlp.c_fc.weight
    fcb       (L, 4C)     D + 8*a + 8*b       transformer.h.{i}.mlp.c_fc.bias
    fcprojw   (L, C, 4C)  D + 12*a + 8*b      transformer.h.{i}.mlp.c_proj.weight
    fcprojb   (L, C)      D + 12*a + 12*b     transformer.h.{i}.mlp.c_proj.bias
    lnfw      (C)         D + 13*a + 12*b     transformer.ln_f.weight
    lnfb      (C)         D + 13*a + 12*b + C transformer.ln_f.bias

A debug state, against which a trainer can check itself; V and the gradients' sizes are its model file's:

    field     shape       type   first byte
    x         (B, T)      int32  1024
    y         (B, T)      int32  1024 + 4*B*T
    logits    (B, T, V)   fp32   1024 + 8*B*T
    loss      ()          fp32   1024 + 8*B*T + 4*B*T*V
    gradients as tensors  fp32   1028 + 8*B*T + 4*B*T*V

A tokenizer, from byte 1024 on: for each id in turn one byte, the length, and then the token's bytes.

References: llm.c, github.com/karpathy/llm.c: train_gpt2.py writes these files, train_gpt2.c and train_gpt2.cu
read and write models, test_gpt2.c reads debug states, llmc/tokenizer.h reads tokenizers.
"""

import argparse
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tiktoken
import torch

from model import GPT, GPTConfig, GPTLMHeadModel
from tokens.encodings import get_encoding
from tokens.files import write_atomically
from tokens.shards import read_shard
from training.checkpoints import load_model

HEADER_BYTES = 1024
# kind of file: magic number, versions that are read
KINDS = {"model": (20240326, (3, 5)), "debug state": (20240327, (2,)), "tokenizer": (20240328, (2,))}
# version of a model: its type in torch, and in numpy, which has no bf16 and sees integers there
TYPES = {3: (torch.float32, "<f4"), 5: (torch.bfloat16, "<i2")}
VERSIONS = {"float32": 3, "bfloat16": 5}
FILES = {
    "float32": "gpt2_{}.bin",
    "bfloat16": "gpt2_{}_bf16.bin",
    "state": "gpt2_{}_debug_state.bin",
    "tokenizer": "gpt2_tokenizer.bin",
}
LABELS = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}

TENSORS = {  # llm.c's name: ours and the shape, in the order of the file
    "wte": ("transformer.wte.weight", "Vp C"),
    "wpe": ("transformer.wpe.weight", "P C"),
    "ln1w": ("transformer.h.{i}.ln_1.weight", "L C"),
    "ln1b": ("transformer.h.{i}.ln_1.bias", "L C"),
    "qkvw": ("transformer.h.{i}.attn.c_attn.weight", "L 3C C"),
    "qkvb": ("transformer.h.{i}.attn.c_attn.bias", "L 3C"),
    "attprojw": ("transformer.h.{i}.attn.c_proj.weight", "L C C"),
    "attprojb": ("transformer.h.{i}.attn.c_proj.bias", "L C"),
    "ln2w": ("transformer.h.{i}.ln_2.weight", "L C"),
    "ln2b": ("transformer.h.{i}.ln_2.bias", "L C"),
    "fcw": ("transformer.h.{i}.mlp.c_fc.weight", "L 4C C"),
    "fcb": ("transformer.h.{i}.mlp.c_fc.bias", "L 4C"),
    "fcprojw": ("transformer.h.{i}.mlp.c_proj.weight", "L C 4C"),
    "fcprojb": ("transformer.h.{i}.mlp.c_proj.bias", "L C"),
    "lnfw": ("transformer.ln_f.weight", "C"),
    "lnfb": ("transformer.ln_f.bias", "C"),
}

# -----------------------------------------------------------------------------
# Which models can be written, and what their sizes are


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

    def num_stored(self) -> int:
        """How many numbers the tensors have, padding included."""
        return sum(math.prod(shape) for shape in self.shapes().values())


def padded(vocabulary: int) -> int:
    """The next multiple of 128."""
    return -(-vocabulary // 128) * 128


def sizes_of(config: GPTConfig) -> Sizes:
    """Sizes of a model to be written; ValueError, naming the field, if llm.c has no such model.

    Rows of the embedding that only pad it do not count: those from encoding_size on, or, where that is not
    set, those beyond GPT-2's 50,257 in a vocabulary of 50,304.
    """
    wanted = {
        "use_moe": (False,), "bias": (True,), "norm": ("layernorm",), "norm_eps": (1e-5,),
        "activation": ("gelu",), "position": ("learned",), "tie_word_embeddings": (True,),
        "qk_norm": (False,), "logit_softcap": (0,), "sliding_window": (None,),
        "n_kv_head": (config.n_head, None), "mlp_hidden_size": (4 * config.n_embd, None),
    }  # fmt: skip
    if config.mlp_hidden_size is None:  # then this field is the size of dense layers too
        wanted["expert_hidden_size"] = (4 * config.n_embd, None)
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: llm.c has GPT-2 only, where it is {values[0]!r}; "
                "keep this model as a Hugging Face folder (python checkpoint.py export)"
            )
    V = config.encoding_size or config.vocab_size
    if config.encoding_size is None and config.encoding == "gpt2" and V == padded(50257):
        V = 50257
    return Sizes(config.block_size, V, config.n_layer, config.n_head, config.n_embd, padded(V))


def check_writable(config: GPTConfig) -> None:
    """ValueError, for a run with write_tensors, unless its model and its tokenizer can be written."""
    try:
        sizes_of(config)
        encoding_of(config)
    except ValueError as error:
        raise ValueError(f"write_tensors=True: {error}; or give --write_tensors 0") from error


def encoding_of(config: GPTConfig) -> tiktoken.Encoding:
    """The encoding that a model's tokenizer is written from; ValueError if it is unknown or cannot be had."""
    try:
        return get_encoding(config.encoding)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise ValueError(  # get_encoding's names a flag of fineweb.py
            f"no tokenizer can be written: tiktoken cannot fetch the files of encoding={config.encoding!r} "
            f"({type(error.__cause__).__name__}); without network let TIKTOKEN_CACHE_DIR name a folder where "
            "tiktoken has put them before"
        ) from error


def dense_model(sizes: Sizes, state: dict[str, torch.Tensor]) -> GPTLMHeadModel:
    """The GPT-2 of these sizes around these very tensors (no copies), in evaluation mode.

    `state` has our names. No random numbers are drawn, so nobody's random state moves.
    """
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


# -----------------------------------------------------------------------------
# Bytes


def our_names(name: str, layers: int) -> list[str]:
    """Our parameters that make up one of llm.c's tensors: one for each layer, or a single one."""
    ours = TENSORS[name][0]
    return [ours.format(i=i) for i in range(layers)] if "{i}" in ours else [ours]


def header(kind: str, version: int, *fields: int) -> bytes:
    """The 1024 bytes at the beginning of a file."""
    numbers = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    numbers[: 2 + len(fields)] = (KINDS[kind][0], version, *fields)
    return numbers.tobytes()


def read_header(path: Path, kind: str) -> list[int]:
    """The 256 numbers at the beginning of a file; ValueError unless it is of this kind."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `python llmc.py export` and llm.c's train_gpt2.py make some"
        )
    numbers = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4).tolist()
    magic, versions = KINDS[kind]
    if len(numbers) < HEADER_BYTES // 4 or numbers[0] != magic:
        known = {number: f"a {name}" for name, (number, _) in KINDS.items()} | {20240520: "a data shard"}
        found = known.get(numbers[0], f"begins with {numbers[0]}") if numbers else "empty"
        raise ValueError(
            f"{path}: no {kind} of llm.c (which begins with {magic} and 1020 more bytes), but {found}, "
            f"{path.stat().st_size:,} bytes long; give a {kind}"
        )
    if numbers[1] not in versions:
        raise ValueError(
            f"{path}: version {numbers[1]} of a {kind}; only {' and '.join(map(str, versions))} can be read; "
            "write it again with the current llm.c"
        )
    return numbers


def check_length(path: Path, promised: int) -> None:
    """ValueError unless the file has as many bytes as the sizes in its header promise."""
    length = path.stat().st_size
    if length != promised:
        problem = "cut short" if length < promised else "too long"
        raise ValueError(
            f"{path}: {problem}: {length:,} bytes, but its header's sizes make {promised:,}; get it again"
        )


def write_tensors(file: BinaryIO, sizes: Sizes, state: dict[str, torch.Tensor], version: int) -> None:
    """Write all tensors of the table; `state` has our names. bf16 rounds to the nearest, ties to even."""
    dtype, stored = TYPES[version]
    for name in TENSORS:
        for ours in our_names(name, sizes.L):
            tensor = state[ours].detach().to("cpu", dtype)
            if name == "wte":
                padding = tensor.new_zeros(sizes.Vp - sizes.V, sizes.C)
                tensor = torch.cat([tensor[: sizes.V], padding])  # (Vp, C)
            bits = tensor.contiguous().view(torch.int16 if version == 5 else torch.float32)
            file.write(bits.numpy().astype(stored, copy=False))


def take(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The next numbers of a file."""
    return np.fromfile(file, dtype=dtype, count=math.prod(shape)).reshape(shape)


# -----------------------------------------------------------------------------
# Models


def write_model(model: GPT, path: str | Path, dtype: str = "float32") -> None:
    """Write the weights for llm.c, as "float32" (version 3) or "bfloat16" (version 5).

    ValueError, naming the field, for a model that is not GPT-2's shape; OSError if it cannot be written.
    """
    if dtype not in VERSIONS:
        raise ValueError(f"dtype={dtype!r}: llm.c's models are {' or '.join(VERSIONS)}")
    sizes, state = sizes_of(model.config), model.state_dict()

    def write(file: BinaryIO) -> None:
        file.write(header("model", VERSIONS[dtype], *sizes))
        write_tensors(file, sizes, state, VERSIONS[dtype])

    write_atomically(Path(path), write)


def read_sizes(path: str | Path) -> tuple[Sizes, int]:
    """Sizes and version of a model file. FileNotFoundError; ValueError if it is none or is damaged."""
    path = Path(path)
    numbers = read_header(path, "model")
    sizes, version = Sizes(*numbers[2:8]), numbers[1]
    if min(sizes) < 1 or sizes.C % sizes.nh != 0 or sizes.Vp != padded(sizes.V):
        raise ValueError(f"{path}: damaged, no GPT-2 has these sizes: {sizes}; get it again")
    check_length(path, HEADER_BYTES + np.dtype(TYPES[version][1]).itemsize * sizes.num_stored())
    return sizes, version


def read_model(path: str | Path) -> GPTLMHeadModel:
    """The model in a file of llm.c, in fp32 (which holds bf16 exactly), in evaluation mode, on the CPU.

    It has V rows of embeddings, not Vp: llm.c never lets the others take part. FileNotFoundError;
    ValueError, naming the file, if it is no model or is damaged.
    """
    path, state = Path(path), {}
    sizes, version = read_sizes(path)
    dtype, stored = TYPES[version]
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        for name, shape in sizes.shapes().items():
            tensor = torch.from_numpy(take(file, stored, shape)).view(dtype)
            if name == "wte":
                if tensor[sizes.V :].any():
                    warnings.warn(f"{path}: its padding of wte is not zero; dropped", stacklevel=2)
                tensor = tensor[: sizes.V]
            names = our_names(name, sizes.L)
            parts = tensor if "L" in TENSORS[name][1].split() else [tensor]
            for ours, part in zip(names, parts, strict=True):
                state[ours] = part.to(torch.float32, copy=True)  # its own memory, not a view
    return dense_model(sizes, state)


# -----------------------------------------------------------------------------
# Debug states


def write_state(model: GPT, x: torch.Tensor, y: torch.Tensor, path: str | Path) -> None:
    """Write inputs x (B, T), targets y (B, T) and what follows from them: logits, mean loss, gradients.

    Computed here in fp32 throughout, on the model's device, without dropout; gradients are neither clipped
    nor scaled. Nothing of the model changes: not its mode, not its .grad, not the random state. ValueError
    for a model that is not GPT-2's shape, and for ids or a T that it does not have.
    """
    sizes = sizes_of(model.config)
    if x.dim() != 2 or x.shape != y.shape or x.numel() == 0:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)}: both must be (B, T)")
    if x.size(1) > sizes.P:
        raise ValueError(f"T={x.size(1)} is longer than the model's block_size={sizes.P}; take a shorter T")
    for name, ids in (("x", x), ("y", y)):
        if ids.min() < 0 or ids.max() >= sizes.V:
            raise ValueError(
                f"{name} has ids from {ids.min()} to {ids.max()}, but this model's are 0 to {sizes.V - 1}; "
                "take data of its own encoding"
            )
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: sizes.V]
    reference = dense_model(sizes, state)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32 in what others compare with
    try:
        with torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
            logits, loss = reference(x.to(model.device).long(), targets=y.to(model.device).long())
            names, parameters = zip(*reference.named_parameters(), strict=True)
            gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    finally:
        torch.set_float32_matmul_precision(precision)

    def write(file: BinaryIO) -> None:
        file.write(header("debug state", 2, *x.shape))
        for tensor, dtype in ((x, "<i4"), (y, "<i4"), (logits, "<f4"), (loss, "<f4")):
            file.write(np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=dtype))
        write_tensors(file, sizes, gradients, version=3)

    write_atomically(Path(path), write)


def read_state(path: str | Path, model_path: str | Path | None = None) -> dict[str, np.ndarray]:
    """x, y (B, T), logits (B, T, V), loss (), and the gradients under llm.c's names and shapes (see above).

    The file does not say how large its model is: that is read from the model file it belongs to, by default
    the one beside it, gpt2_124M.bin for gpt2_124M_debug_state.bin. FileNotFoundError; ValueError, naming
    the file, if one of the two is not what it should be or they do not belong together.
    """
    path = Path(path)
    B, T = read_header(path, "debug state")[2:4]
    model_path = Path(model_path or path.with_name(path.name.replace("_debug_state", "")))
    if model_path == path or not model_path.is_file():
        raise FileNotFoundError(f"{path}: its model, {model_path}, is not there; give model_path")
    sizes, _ = read_sizes(model_path)
    check_length(path, HEADER_BYTES + 4 * (2 * B * T + B * T * sizes.V + 1 + sizes.num_stored()))
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        state = {"x": take(file, "<i4", (B, T)), "y": take(file, "<i4", (B, T))}
        state |= {"logits": take(file, "<f4", (B, T, sizes.V)), "loss": take(file, "<f4", ())}
        return state | {name: take(file, "<f4", shape) for name, shape in sizes.shapes().items()}


# -----------------------------------------------------------------------------
# Tokenizers


class Tokenizer(NamedTuple):
    """What a tokenizer file holds: enough to turn ids into text, not text into ids."""

    tokens: list[bytes]
    eot_token: int


def write_tokenizer(encoding: tiktoken.Encoding, path: str | Path) -> None:
    """Write every token's bytes. ValueError for an encoding with unused ids or without <|endoftext|>."""
    if "<|endoftext|>" not in encoding.special_tokens_set:
        raise ValueError(f"encoding {encoding.name!r} has no <|endoftext|>; use gpt2")
    parts = [header("tokenizer", 2, encoding.n_vocab, encoding.eot_token)]
    for token in range(encoding.n_vocab):
        try:
            text = encoding.decode_single_token_bytes(token)
        except KeyError:
            text = b""
        if not 1 <= len(text) <= 255:
            raise ValueError(
                f"encoding {encoding.name!r}: token {token} has {len(text)} bytes, but llm.c's tokens have "
                "1 to 255, and no id is left out; use gpt2"
            )
        parts.append(bytes([len(text)]) + text)
    write_atomically(Path(path), lambda file: file.write(b"".join(parts)))


def read_tokenizer(path: str | Path) -> Tokenizer:
    """All tokens of a tokenizer file. FileNotFoundError; ValueError if it is none or is damaged."""
    path = Path(path)
    count, eot_token = read_header(path, "tokenizer")[2:4]
    contents, position, tokens = path.read_bytes(), HEADER_BYTES, []
    while len(tokens) < count and position < len(contents):
        start, position = position + 1, position + 1 + contents[position]
        tokens.append(contents[start:position])
    if len(tokens) != count or position != len(contents) or not 0 <= eot_token < count:
        raise ValueError(
            f"{path}: damaged: {len(contents):,} bytes that do not make the header's {count} tokens with "
            f"{eot_token} as end of text; get it again"
        )
    return Tokenizer(tokens, eot_token)


# -----------------------------------------------------------------------------
# Sets of files


def write_all(
    model: GPT,
    x: torch.Tensor | None,
    y: torch.Tensor | None,
    folder: str | Path,
    names: str = "d12",
    c_names: bool = False,
    parts: tuple[str, ...] = tuple(FILES),
) -> list[Path]:
    """What llm.c's train_gpt2.py writes before its first step, or some `parts` (keys of FILES) of it.

    names is a model's, "d12", "gpt2-medium", ..., and makes the files' (gpt2_d12.bin, gpt2_355M.bin).
    c_names adds copies under 124M's. x and y, (B, T), are the state's. Returns the paths; errors as above.
    """
    sizes_of(model.config)  # all that can be refused is, before anything is written
    encoding = encoding_of(model.config) if "tokenizer" in parts else None
    writers = {
        "float32": lambda path: write_model(model, path, "float32"),
        "bfloat16": lambda path: write_model(model, path, "bfloat16"),
        "state": lambda path: write_state(model, x, y, path),
        "tokenizer": lambda path: write_tokenizer(encoding, path),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    labels, written = [LABELS.get(names, names)] + ["124M"] * c_names, []
    for part in parts:
        first, *copies = dict.fromkeys(Path(folder, FILES[part].format(label)) for label in labels)
        writers[part](first)
        for copy in copies:
            with open(first, "rb") as source:
                write_atomically(copy, lambda file, source=source: shutil.copyfileobj(source, file))
        written += [first, *copies]
    return written


def save_folder(model: GPTLMHeadModel, folder: Path) -> None:
    """model.save_pretrained into a folder that must not exist, and appears whole or not at all."""
    if folder.exists():
        raise ValueError(f"--out {folder}: it exists already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run(options: argparse.Namespace) -> list[Path]:
    """Do what the command line asks for; the paths written."""
    if options.command == "import":
        save_folder(read_model(options.model), options.out)
        return [options.out]
    x = y = None
    if options.command == "state":
        N = options.B * options.T
        if min(options.B, options.T) < 1:
            raise ValueError(f"--B {options.B} --T {options.T}: both must be at least 1")
        tokens = torch.from_numpy(read_shard(options.data)[: N + 1].astype(np.int64))
        if len(tokens) <= N:
            raise ValueError(f"{options.data}: {len(tokens)} tokens, --B and --T need {N + 1}; lower them")
        x, y = tokens[:-1].view(options.B, options.T), tokens[1:].view(options.B, options.T)
        parts = ("state",)
    else:
        parts = (options.dtype, "tokenizer") if options.dtype else ("float32", "bfloat16", "tokenizer")
    model = load_model(options.checkpoint)
    return write_all(model, x, y, options.out, f"d{model.config.n_layer}", bool(options.c_names), parts)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="llm.c's binary files, both ways.", allow_abbrev=False)
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
    reading = commands.add_parser("import", help="make a Hugging Face folder of a model of llm.c's")
    reading.add_argument("--model", required=True, help="a model file of llm.c, fp32 or bf16")
    reading.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist yet")
    try:
        for path in run(parser.parse_args(arguments)):
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(f"llmc.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
