"""Write folders for transformers, with a tokenizer, in our format or as a stock architecture.

    export_folder(model, "my_model")                  # for AutoModelForCausalLM, pipeline() and lm_eval
    export_folder(model, "my_gpt2", format="gpt2")    # a stock GPT2LMHeadModel, from a dense GPT-2

docs/huggingface.md lists the formats. export.json in a folder lists the files that were written. A folder
that holds anything else is never replaced."""

import contextlib
import copy
import itertools
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from huggingface.gpt2 import to_gpt2
from huggingface.llama import FAMILY, to_llama
from huggingface.pretrained import FOREIGN, fresh_statistics
from huggingface.text import build_tokenizer

logger = logging.getLogger(__name__)
MANIFEST = "export.json"


def export_folder(model: PreTrainedModel, folder: str | Path, format: str = "gpt_moe", tokenizer: bool = True,
                  max_shard_size: str = "5GB") -> None:  # fmt: skip
    """Write a folder that transformers can load. After an error no part of it remains.
    model: a GPT or GPTLMHeadModel. format: "gpt_moe" or a name in FOREIGN. tokenizer: add the files of the
    model's encoding, and use its <|endoftext|> as end of text unless the configuration names another token.
    ValueError if the format cannot express the model, FileExistsError if the folder holds other files."""
    folder = Path(os.path.realpath(folder))
    if format not in ("gpt_moe", *FOREIGN):
        raise ValueError(f"format={format!r}: choose one of gpt_moe, {', '.join(FOREIGN)}")
    refuse_other_files(folder)
    model = copy.copy(model)  # the copy shares the weights, but gets another configuration
    model.config, model.generation_config = copy.deepcopy((model.config, model.generation_config))
    encoding, rows = model.config.encoding, model.config.vocab_size
    words = build_tokenizer(encoding, model.config.block_size) if tokenizer and encoding != "none" else None
    if words is not None:
        if len(words) > rows:
            problem = f"encoding={encoding!r} has {len(words)} tokens, but vocab_size={rows}"
            raise ValueError(f"{problem}; name the right encoding, or export with --no-tokenizer")
        names = ("bos", "eos") + ("pad",) * (format == "gpt_moe")  # Llama does not train the pad token
        for config, name in itertools.product((model.config, model.generation_config), names):
            if getattr(config, f"{name}_token_id") is None:
                setattr(config, f"{name}_token_id", words.eos_token_id)
    weights = None
    for problem in unreadable(model.config, format, words is not None):
        logger.warning(f"llama.cpp cannot read this folder: {problem}; transformers can")
    if format in FOREIGN:  # without rows of the embeddings that only pad the vocabulary
        size, generation = model.config.encoding_size or rows, model.generation_config
        model = to_gpt2(model, size) if format == "gpt2" else to_llama(model, format, size)
        model.generation_config = generation
        generation.suppress_tokens = [i for i in generation.suppress_tokens or () if i < size] or None
        if size < rows:
            logger.warning(f"the {rows} rows of the embeddings are cut to the {size} tokens of {encoding!r}")
    else:  # without the routers' statistics of training, but with their biases
        fresh = fresh_statistics(model)
        weights = model.state_dict() | {key: fresh[key] for key in fresh if not key.endswith("router_bias")}

    with new_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=weights, max_shard_size=max_shard_size)
        if format in FAMILY:  # transformers 4 and others look for these names, and take defaults without them
            path = temporary / "config.json"
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings["rope_theta"] = model.config.rope_parameters["rope_theta"]
            if format == "qwen3_moe":
                settings["num_experts"] = model.config.num_experts
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if words is not None:
            words.save_pretrained(temporary)
        manifest = {"format": format, "files": sorted([MANIFEST, *os.listdir(temporary)])}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def unreadable(config: PreTrainedConfig, format: str, has_tokenizer: bool) -> list[str]:
    """What llama.cpp and its converter cannot read in a folder of a stock format. It was tried (docs)."""
    problems = {
        f"mlp_hidden_size={config.mlp_hidden_size}, its gpt2 has 4 * n_embd":
            format == "gpt2" and config.mlp_hidden_size not in (None, 4 * config.n_embd),
        f"moe_every={config.moe_every}, its qwen3_moe has experts in every layer (vLLM serves it)":
            format == "qwen3_moe" and config.moe_every > 1,
        f"encoding={config.encoding!r}, it does not know this tokenizer":
            format in FOREIGN and has_tokenizer and config.encoding != "gpt2",
    }  # fmt: skip
    return [problem for problem, applies in problems.items() if applies]


def refuse_other_files(folder: Path) -> None:
    """FileExistsError unless `folder` does not exist, is empty, or holds only files of an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    found = set(os.listdir(folder)) if folder.exists() else set()
    try:
        known = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError):
        known = set()
    if found - known:
        other = repr(min(found - known))
        raise FileExistsError(f"{folder} holds {other}, which is not from an export; name an empty folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder for the block, renamed to `folder` at its end. After an error the old one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    old = folder.with_name(f"{new.name}.old")
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
