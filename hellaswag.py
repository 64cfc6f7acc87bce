"""HellaSwag: how often a language model prefers the true ending of a short text to three false ones.

    python hellaswag.py --model log/model_19073.pt                      # a training checkpoint
    python hellaswag.py --model FOLDER --style harness                  # an exported model
    python hellaswag.py --model gpt2-xl --device cuda --dtype bfloat16  # OpenAI's weights, from Hugging Face
    python hellaswag.py --model gpt2 --data my_val.jsonl --limit 100    # another file, its first questions
    torchrun --nproc_per_node=8 hellaswag.py --model log/model_19073.pt

The model chooses the ending with the highest probability (acc), or the highest per token or character
(acc_norm). If a text is longer than the model's block, its left end is cut off, for each ending separately.
    --style completion   the text as it stands, acc_norm per token, as in github.com/karpathy/build-nanogpt
    --style harness      "activity: context" without WikiHow's [marks], acc_norm per character of the ending,
                         as in github.com/EleutherAI/lm-evaluation-harness 0.4, zero-shot

`score_one_by_one` is the plain method. `score_batched` gets the same numbers faster. A question is ONE row:
its context, then the four endings. A mask hides the endings from each other, and positions restart for each.
Rows of similar length share a batch, and the head computes logits only where a token is scored."""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import functools
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from huggingface.generation import evaluating
from tokens.encodings import encode_text, load_encoding
from tokens.hellaswag_files import HellaSwagUnavailable, download, iterate_examples
from tokens.printable import print_error

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}  # about two thirds of the tokens get logits
Pairs = list[tuple[list[int], list[int]]]  # tokens of a context, tokens of an ending
PackedRow = tuple[int, list[int], Sequence[list[int]]]  # slot of the first ending, context, its endings


def preprocess(text: str) -> str:
    """lm-evaluation-harness's cleaning: WikiHow's [title] ends a sentence, other [marks] vanish."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def tokenize(example: dict, encoding: str, style: str) -> tuple[list[int], list[list[int]], list[int] | None]:
    """Tokens of the context and of the four endings; for the harness style also the endings' characters. A
    question without ctx_a and ctx_b, the parts of ctx, is taken as it is."""
    encode = functools.partial(encode_text, name=encoding)
    if style == "completion":
        return encode(example["ctx"]), [encode(" " + ending) for ending in example["endings"]], None
    if style != "harness":
        raise ValueError(f"style={style!r}: choose completion or harness")
    context = example["ctx"]
    if "ctx_a" in example and "ctx_b" in example:
        context = example["ctx_a"] + " " + example["ctx_b"].capitalize()
    context = preprocess(example["activity_label"] + ": " + context)
    choices = [preprocess(ending) for ending in example["endings"]]
    # An ending's tokens are those of the whole text after the context's. The space between belongs to them.
    start = encode(context.rstrip())
    endings = [encode(context + " " + choice)[len(start) :] for choice in choices]
    return start, endings, [len(choice) for choice in choices]


def pad_rows(rows: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T) of contexts and endings, and mask (B, T), 1 on the endings; zeros pad on the right."""
    tokens = [torch.tensor(context + ending) for context, ending in rows]
    mask = [torch.tensor([0] * len(context) + [1] * len(ending)) for context, ending in rows]
    return pad_sequence(tokens, batch_first=True), pad_sequence(mask, batch_first=True)


def render_example(example: dict, encoding: str = "gpt2", style: str = "completion") -> tuple:
    """A question in build-nanogpt's form: data, tokens (4, T), mask (4, T) with 1 on the endings, label."""
    context, endings, _ = tokenize(example, encoding, style)
    data = {"label": example["label"], "ctx_tokens": context, "ending_tokens": endings}
    return data, *pad_rows([(context, ending) for ending in endings]), example["label"]


class Question(NamedTuple):
    """A question in tokens, cropped for the model."""

    rows: Pairs  # one for each ending
    norms: list[int]  # what acc_norm divides the endings' log-probabilities by
    label: int
    cropped: bool  # some row was longer than the model's block


def build_question(example: dict, encoding: str, style: str, block_size: int) -> Question:
    """Tokenize, and crop rows on the left to block_size + 1 tokens; one token of the context always stays."""
    context, endings, characters = tokenize(example, encoding, style)
    rows = []
    for ending in endings:
        row = (context + ending)[-(block_size + 1) :]
        scored = min(len(ending), len(row) - 1)
        rows.append((row[:-scored], row[-scored:]))
    cropped = len(context) + max(map(len, endings)) > block_size + 1
    norms = characters or [len(ending) for _, ending in rows]
    return Question(rows, norms, example["label"], cropped)


@functools.lru_cache(maxsize=1)  # every evaluation calls it; a new mtime reads the file again
def load_questions(path: Path, limit: int | None, style: str, encoding: str, block_size: int,
                   vocab_size: int, mtime: int = 0) -> tuple[Question, ...]:  # fmt: skip
    """The first `limit` questions (None: all) of a file. Raises ValueError, HellaSwagUnavailable."""
    try:
        ids = 256 if encoding == "bytes" else load_encoding(encoding).n_vocab
    except OSError as error:
        raise HellaSwagUnavailable(f"tiktoken cannot fetch encoding={encoding!r}: {error}") from error
    if ids > vocab_size:
        raise ValueError(f"encoding={encoding!r} has {ids} ids, the model only vocab_size={vocab_size}")
    examples = itertools.islice(iterate_examples(data=path), limit)
    questions = tuple(build_question(example, encoding, style, block_size) for example in examples)
    if not questions:
        raise ValueError(f"{path}: there are no questions in this file")
    return questions


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    for attribute in ("_orig_mod", "module", "_orig_mod"):  # torch.compile may be inside DDP or around it
        model = getattr(model, attribute, model)
    return model


def score_one_by_one(model: torch.nn.Module, questions: Sequence[Question]) -> torch.Tensor:
    """The plain method. Returns every ending's loss, its -log-probability in nats: (n, 4) fp32 on the CPU."""
    model, losses = unwrap(model), []
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for question in questions:
            tokens, mask = (x.to(model.device) for x in pad_rows(question.rows))  # (4, T)
            logits = model(tokens[:, :-1], use_cache=False).logits  # (4, T-1, V)
            loss = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")
            losses.append((loss * mask[:, 1:]).sum(dim=1).cpu())
    return torch.stack(losses)


def row_size(row: PackedRow) -> int:
    """Tokens in the row, without the last of each ending, which predicts nothing."""
    return len(row[1]) + sum(len(ending) - 1 for ending in row[2])


def pack_rows(questions: Sequence[Question], shared: bool) -> list[PackedRow]:
    """A row per question, or per ending if contexts are not shared or were cropped; the longest row first."""
    rows = []
    for number, question in enumerate(questions):
        if shared and not question.cropped:
            rows.append((4 * number, question.rows[0][0], [ending for _, ending in question.rows]))
        else:
            rows += [(4 * number + i, context, [ending]) for i, (context, ending) in enumerate(question.rows)]
    return sorted(rows, key=row_size, reverse=True)


class PackedBatch(NamedTuple):
    """B rows of equal length, and the M tokens whose probabilities are wanted."""

    tokens: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T) in the text: after the context they restart for every ending
    segments: torch.Tensor  # (B, T) 0 = context; 1, 2, ... = endings; -1 = padding
    scored: torch.Tensor  # (M,) which of the B*T positions predicts the token
    targets: torch.Tensor  # (M,) the token
    slots: torch.Tensor  # (M,) the ending that it belongs to, 4 * question + 0..3


def build_batch(rows: Sequence[PackedRow], T: int) -> PackedBatch:
    """Lay out rows of at most T tokens each."""
    layout, scored, targets, slots = [], [], [], []
    for number, (slot, context, endings) in enumerate(rows):
        C = len(context)
        tokens, positions, segments = [*context], [*range(C)], [0] * C
        for i, ending in enumerate(endings):
            inner, first = len(ending) - 1, number * T + len(tokens)
            # The last token of the context predicts the first of the ending.
            scored += [number * T + C - 1, *range(first, first + inner)]
            targets += ending
            slots += [slot + i] * len(ending)
            tokens += ending[:-1]
            positions += range(C, C + inner)
            segments += [i + 1] * inner
        padding = T - len(tokens)
        layout += tokens + [0] * padding + positions + [0] * padding + segments + [-1] * padding
    # numpy reads lists three times faster than torch does.
    layout, *rest = (torch.from_numpy(np.array(x)) for x in (layout, scored, targets, slots))
    return PackedBatch(*layout.view(-1, 3, T).unbind(1), *rest)


def attention_masks(batch: PackedBatch, window: int | None) -> dict[str, torch.Tensor]:
    """Boolean masks (B, 1, T, T), True = may look, for the two kinds of layers. A token sees those before it
    in the context and its ending; a window counts positions of the text. Padding sees itself."""
    T, segments, positions = batch.tokens.size(1), batch.segments, batch.positions
    before = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    visible = before & ((segments[:, None] == 0) | (segments[:, None] == segments[:, :, None]))  # (B, T, T)
    masks = {"full_attention": visible[:, None]}
    if window is not None:
        near = positions[:, :, None] - positions[:, None] < window
        masks["sliding_attention"] = (visible & near)[:, None]
    return masks


def previous_tokens(batch: PackedBatch, number: int) -> torch.Tensor:
    """The `number` tokens before each one in its text, the nearest first: (B, T, number), for n-grams. Before
    an ending comes the context, whose tokens stand where their positions say."""
    tokens, positions, segments = batch.tokens, batch.positions, batch.segments
    place, before = torch.arange(tokens.size(1), device=tokens.device), []
    for distance in range(1, number + 1):
        back = (place - distance).clamp(min=0).expand_as(tokens)  # (B, T)
        inside = segments.gather(1, back) == segments
        back = torch.where(inside, back, (positions - distance).clamp(min=0))
        before.append(tokens.gather(1, back))
    return torch.stack(before, dim=-1)


def scored_logits(model: torch.nn.Module, batch: PackedBatch, shared: bool) -> torch.Tensor:
    """Logits (M, V) of the scored positions. In models of this project the head computes no other logits."""
    if not shared:
        return model(batch.tokens, use_cache=False, return_dict=True).logits.flatten(0, 1)[batch.scored]
    masks = attention_masks(batch, model.config.sliding_window)
    inputs = dict(attention_mask=masks, position_ids=batch.positions, use_cache=False, return_dict=True)
    if order := model.config.ngram_order:
        inputs["previous_ids"] = previous_tokens(batch, order - 1)
    # The head gets (1, M, C) of (B, T, C).
    with model.lm_head.register_forward_pre_hook(lambda _, x: (x[0].flatten(0, 1)[None, batch.scored],)):
        output = model(batch.tokens, **inputs)
        # GPT returns hidden states, GPTLMHeadModel logits.
        return (output.logits if "logits" in output else model._logits(output.last_hidden_state))[0]


def score_batched(model: torch.nn.Module, questions: Sequence[Question], tokens_per_batch: int | None = None,
                  rank: int = 0, world_size: int = 1, device: torch.device | str | None = None,
                  interrupted: Callable[[], bool] = lambda: False,
                  progress: Callable = lambda done, n: None) -> torch.Tensor | None:  # fmt: skip
    """The losses of score_one_by_one; None as soon as interrupted() is true. The top of this file says how.
    All ranks run the same number of forwards, with the same T, because a sharded model needs that."""
    model = unwrap(model)
    device, shared = torch.device(device or model.device), model.config.model_type == "gpt_moe"
    budget = tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])
    rows, losses = pack_rows(questions, shared), torch.zeros(4 * len(questions), device=device)
    num_rows = len(rows)
    with evaluating(model), torch.compiler.set_stance("force_eager"):  # torch would compile for each shape
        while rows:
            progress(len(questions) * (num_rows - len(rows)) // num_rows, len(questions))
            if interrupted():
                return None
            size = row_size(rows[0])
            step = max(16, 2 ** (size - 1).bit_length() // 16)
            # Rounded up, by less than an eighth or 16: few shapes occur. Others' models may not take more.
            T = -(-size // step) * step if shared else size
            group = max(1, budget // T) * world_size  # rows of all ranks
            chunk, rows = rows[:group], rows[group:]
            mine = chunk[rank::world_size]
            batch = PackedBatch(*(x.to(device) for x in build_batch(mine or chunk[:1], T)))
            logits = scored_logits(model, batch, shared).float()
            loss = F.cross_entropy(logits, batch.targets, reduction="none")  # (M,)
            if mine:
                losses.index_add_(0, batch.slots, loss)
    if world_size > 1:
        dist.all_reduce(losses)
    return losses.view(-1, 4).cpu()


@dataclass(frozen=True)
class HellaSwagResult:
    """Accuracies as fractions, their standard errors, and what they were computed from."""

    acc: float  # choice by log-probability
    acc_norm: float  # choice by log-probability per token (completion) or character (harness)
    acc_stderr: float
    acc_norm_stderr: float
    n: int  # questions
    cropped: int  # questions longer than the model's block
    choices: list[int]  # 0..3, question by question
    choices_norm: list[int]
    losses: torch.Tensor  # (n, 4) minus log-probability of every ending, nats, fp32 on the CPU

    def __str__(self) -> str:
        plain = f"acc {self.acc:.4f} ± {self.acc_stderr:.4f}"
        normalised = f"acc_norm {self.acc_norm:.4f} ± {self.acc_norm_stderr:.4f}"
        return f"{plain}, {normalised}, {self.n} questions, {self.cropped} cropped to the model's block"


def tally(questions: Sequence[Question], losses: torch.Tensor) -> HellaSwagResult:
    """Choices (the first of equal scores) and accuracies; standard errors as in lm-evaluation-harness."""
    n, norms = len(questions), torch.tensor([question.norms for question in questions])
    chosen = [score.numpy().argmin(axis=1).tolist() for score in (losses, losses / norms)]
    labels, cropped = [question.label for question in questions], sum(q.cropped for q in questions)
    accuracies = [sum(map(int.__eq__, choices, labels)) / n for choices in chosen]
    errors = [math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan for p in accuracies]
    return HellaSwagResult(*accuracies, *errors, n, cropped, *chosen, losses)


def load_on_all_ranks(load: Callable[[], tuple], rank: int, world_size: int, device: torch.device) -> tuple:
    """Return load(). Rank 0 calls it first, so that only one rank downloads. If one rank fails, all raise."""
    questions, errors = (), []
    for my_turn in (rank == 0, rank != 0):
        try:
            questions = load() if my_turn else questions
        except (OSError, ValueError) as error:
            errors.append(error)
        failed = torch.tensor(float(len(errors)), device=device)
        if world_size > 1:
            dist.all_reduce(failed)
        if failed > 0:
            errors = errors or [HellaSwagUnavailable("another rank could not load the questions")]
            raise errors.pop()  # left in `errors`, it would keep the caller's model in memory
    return questions


def evaluate(model: torch.nn.Module, data: str | Path | None = None, limit: int | None = None,
             style: str = "completion", encoding: str | None = None, tokens_per_batch: int | None = None,
             rank: int = 0, world_size: int = 1, device: torch.device | str | None = None,
             autocast: torch.dtype | None = None,
             interrupted: Callable[[], bool] = lambda: False,
             progress: Callable = lambda done, n: None) -> HellaSwagResult | None:  # fmt: skip
    """Score a model on the first `limit` questions (None: all) of a file (None: the validation split).
    model: ours, also inside DDP, FSDP2 or torch.compile, or another causal language model of Hugging Face.
    encoding: None: config.encoding, or GPT-2's for a GPT-2. world_size: if above 1, all ranks must call this.
    autocast: a dtype to compute in. interrupted: called before every forward, alike on all ranks; True gives
    None. progress: called there with the numbers of questions: scored, all.
    Raises HellaSwagUnavailable, ValueError, and FloatingPointError for NaN."""
    config, device = unwrap(model).config, torch.device(device or unwrap(model).device)
    encoding = encoding or getattr(config, "encoding", "gpt2" if config.model_type == "gpt2" else None)
    if encoding is None:
        raise ValueError(f"model_type={config.model_type!r} does not name its encoding: give encoding=")
    for name, value in (("limit", limit), ("tokens_per_batch", tokens_per_batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if world_size > 1 and not dist.is_initialized():
        raise ValueError(f"world_size={world_size}, but torch.distributed is not initialised: use torchrun")

    def load() -> tuple[Question, ...]:
        path = download("val") if data is None else Path(data)
        mtime = path.stat().st_mtime_ns if path.exists() else 0
        longest = getattr(config, "max_position_embeddings", None) or sys.maxsize  # no limit
        return load_questions(path, limit, style, encoding, longest, config.vocab_size, mtime)

    questions = load_on_all_ranks(load, rank, world_size, device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        more = rank, world_size, device, interrupted, progress
        losses = score_batched(model, questions, tokens_per_batch, *more)
    if losses is not None and losses.isnan().any():
        raise FloatingPointError("the model's probabilities are NaN")
    return None if losses is None else tally(questions, losses)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate the model on the command line. Returns 0, 130 after Ctrl-C, or 2 for a bad setting or file."""
    from training.checkpoints import load_model
    from training.parallel import start, stop

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint, exported folder, or gpt2 ... gpt2-xl")
    parser.add_argument("--data", help="questions, one JSON object per line; default: download them once")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--style", default="completion", choices=["completion", "harness"])
    parser.add_argument("--encoding", help="bytes or a name that tiktoken knows; default: the model's")
    parser.add_argument("--tokens_per_batch", type=int, help="positions in a forward; default: by device")
    parser.add_argument("--device", default="", help="cuda, mps, cpu; empty = the best there is")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args(arguments)
    try:
        world = start(options.device)
        model = load_model(options.model).to(world.device)
        began = time.perf_counter()
        dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
        result = evaluate(model, options.data, options.limit, options.style, options.encoding,
                          options.tokens_per_batch, world.rank, world.size, world.device, dtype)  # fmt: skip
        if world.is_master:
            speed = result.n / (time.perf_counter() - began)
            print(f"HellaSwag ({options.style}): {result}, {speed:.1f} questions per second")
    except (OSError, ValueError, FloatingPointError) as error:
        print_error("hellaswag.py", error)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
