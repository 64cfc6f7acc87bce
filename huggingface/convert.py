"""Models, text and tokenizers in the forms of others, and back.

    export_folder(model, "my_model")                  # for AutoModelForCausalLM, pipeline() and lm_eval
    export_folder(model, "my_gpt2", format="gpt2")    # a stock GPT2LMHeadModel, from dense GPT-2-style models
    export_folder(model, "my_llama", format="llama")  # and stock Llama, Qwen3, Mixtral: convert_llama.py

A folder of format gpt_moe holds weights (safetensors), configuration, tokenizer and copies of the code files,
so that it loads with trust_remote_code=True where this project is not installed. export.json in it lists the
files that were written: a folder that holds anything else is never replaced.

Sources: GPT-2's names and shapes, transformers, models/gpt2/modeling_gpt2.py; byte pair encoding, arXiv
1508.07909; GPT-2's characters for bytes, github.com/openai/gpt-2, src/encoder.py.
"""

import copy
import importlib
import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from huggingface.llama import FAMILY, from_llama_weights, llama_config_fields, older_names, refuse, to_llama

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
MANIFEST = "export.json"
FOREIGN = ("gpt2", *FAMILY)  # the model_type of folders that are not ours but can be read and written

# -----------------------------------------------------------------------------
# Text


def encode_text(text: str, encoding: str) -> list[int]:
    """Token ids of plain text; special tokens in it are treated as text. fineweb.py has the encodings."""
    if encoding == "bytes":
        return list(text.encode("utf-8"))
    return tiktoken_encoding(encoding).encode_ordinary(text)


def tiktoken_encoding(name: str):
    """tiktoken's encoding of that name. ValueError for a name it does not have; OSError without its files.

    Loaded by name, because transformers wants all that the files of an exported folder import, though bytes
    and the folder's own tokenizer do without.
    """
    tiktoken = importlib.import_module("tiktoken")
    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"encoding={name!r}: how this model's text becomes tokens is not known; set encoding in its "
            f"config.json: bytes, {', '.join(tiktoken.list_encoding_names())}"
        )
    return tiktoken.get_encoding(name)


def decode_tokens(ids: list[int], encoding: str) -> str:
    """Text of token ids; bytes that are no UTF-8 become U+FFFD, special and unknown tokens are left out."""
    if encoding == "bytes":
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
    encoder = tiktoken_encoding(encoding)
    special = {encoder.encode_single_token(token) for token in encoder.special_tokens_set}
    return encoder.decode([i for i in ids if i < encoder.n_vocab and i not in special])


def encode_prompt(text: str, config: PreTrainedConfig) -> list[int]:
    """Token ids of a prompt for a model of this configuration; an empty one begins a document.

    ValueError for an empty prompt without config.bos_token_id, and for tokens the vocabulary does not have.
    """
    ids = encode_text(text, config.encoding)
    if not ids and config.bos_token_id is None:
        raise ValueError("an empty prompt needs a bos_token_id in the config to start from")
    ids = ids or [config.bos_token_id]
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"encoding={config.encoding!r} gives token {max(ids)}, but vocab_size={config.vocab_size}; "
            "set config.encoding to the one that the model was trained with"
        )
    return ids


def build_tokenizer(encoding: str, block_size: int) -> PreTrainedTokenizerBase:
    """transformers' tokenizer with the ids of `encoding`: "bytes", "gpt2" or its other name, "r50k_base".

    Unlike encode_text it reads <|endoftext|> in a text as the token, as GPT-2's own does. ValueError for
    other encodings: GPT2Tokenizer splits text into words in GPT-2's way only.
    """
    from transformers import GPT2TokenizerFast

    if encoding == "bytes":
        ranks, end = {bytes([i]): i for i in range(256)}, 256
    elif encoding in ("gpt2", "r50k_base"):
        encoder = tiktoken_encoding(encoding)
        end = encoder.eot_token
        ranks = {encoder.decode_single_token_bytes(i): i for i in range(encoder.n_vocab) if i != end}
    else:
        raise ValueError(
            f"encoding={encoding!r}: tokenizer files can be written for bytes, gpt2 and r50k_base only; "
            "export with --no-tokenizer (tokenizer=False)"
        )
    shown = byte_characters()
    vocab = {"".join(shown[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [tuple("".join(shown[byte] for byte in part) for part in pair) for pair in find_merges(ranks)]
    return GPT2TokenizerFast(
        vocab=vocab | {END_OF_TEXT: end}, merges=merges, model_max_length=block_size, padding_side="left"
    )


def byte_characters() -> list[str]:
    """The character for each byte in GPT-2's vocabulary: itself where printable, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    codes = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]


def find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that byte pair encoding merges, in order, from its tokens and their ranks.

    A token's pair is what merging its bytes by all lower ranks leaves of it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            merged = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = merged.index(min(merged))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# -----------------------------------------------------------------------------
# GPT-2


def gpt2_config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Our fields for a transformers.GPT2Config; ValueError, naming the field, for what we cannot express."""
    only = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    }
    refuse("this GPT-2 has", config, only, "; only {!r} can be loaded")
    if not config.resid_pdrop == config.embd_pdrop == config.attn_pdrop:
        raise ValueError(
            f"this GPT-2 has resid_pdrop={config.resid_pdrop}, embd_pdrop={config.embd_pdrop} and "
            f"attn_pdrop={config.attn_pdrop}; they must be equal to become our one dropout"
        )
    return dict(
        use_moe=False, block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, mlp_hidden_size=config.n_inner,
        dropout=config.resid_pdrop,
        norm_eps=config.layer_norm_epsilon, tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        attn_implementation=config._attn_implementation, encoding=getattr(config, "encoding", "gpt2"),
    )  # fmt: skip


def transpose_gpt2_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's GPT-2 weights as ours, or ours as theirs: their Conv1D keeps matrices as (in, out)."""
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {k: v.t().contiguous() if k.endswith(turned) else v for k, v in state_dict.items()}


def to_gpt2(model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """A dense GPT-2-style model as transformers' GPT2LMHeadModel, on the CPU, with equal logits.

    vocab_size: rows of the embeddings to keep. Absent biases become zeros. ValueError, naming the field, for
    what GPT-2 cannot express.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    only = {
        "use_moe": (False,), "position": ("learned",), "n_kv_head": (None, config.n_head),
        "sliding_window": (None,), "norm": ("layernorm",), "activation": ("gelu",), "qk_norm": (False,),
        "logit_softcap": (0,),
    }  # fmt: skip
    refuse("GPT-2 cannot express", config, only, ", only {!r}; export with format='gpt_moe'")
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, n_inner=config.mlp_hidden_size,
            resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
            layer_norm_epsilon=config.norm_eps, tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id, encoding=config.encoding,
        )
    ).to(model.dtype)  # fmt: skip
    weights = {name: torch.zeros_like(p) for name, p in theirs.state_dict().items() if name.endswith("bias")}
    weights |= transpose_gpt2_weights(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocab_size]
    theirs.load_state_dict(weights)
    return theirs.eval()


# -----------------------------------------------------------------------------
# Folders


def load_foreign(
    kind: str, name: str | Path, *args, **kwargs
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Any, dict]:
    """Our fields, our weights, generation config and loading information of a model of another architecture.

    kind: one of FOREIGN; name: folder or hub name; further arguments are those of transformers'
    from_pretrained. ValueError for missing weights and, naming the field, for a configuration that we cannot
    express.
    """
    import transformers

    stock = "GPT2LMHeadModel" if kind == "gpt2" else f"{FAMILY[kind]}ForCausalLM"
    source, info = getattr(transformers, stock).from_pretrained(
        name, *args, output_loading_info=True, **kwargs
    )
    if info["missing_keys"]:
        raise ValueError(f"{name}: the files lack the weights {', '.join(sorted(info['missing_keys']))}")
    if kind == "gpt2":
        fields, weights = gpt2_config_fields(source.config), transpose_gpt2_weights(source.state_dict())
    else:
        fields = llama_config_fields(source.config)
        weights = from_llama_weights(source.state_dict(), fields["n_layer"])
    return fields, weights, source.generation_config, info


def to_foreign(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model as the architecture of FOREIGN that `kind` names, without rows that only pad the vocabulary
    (from config.encoding_size up). ValueError, naming the field, for what it cannot express."""
    config = model.config
    vocab_size = config.encoding_size or config.vocab_size
    theirs = to_gpt2(model, vocab_size) if kind == "gpt2" else to_llama(model, kind, vocab_size)
    if vocab_size < config.vocab_size:
        logger.warning(
            f"the {config.vocab_size} rows of the embeddings are cut to the {vocab_size} tokens of the "
            f"encoding {config.encoding!r}: the others only padded them"
        )
    return theirs


def export_folder(
    model: PreTrainedModel,
    folder: str | Path,
    format: str = "gpt_moe",
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
) -> None:
    """Write a folder that transformers loads; it appears complete or not at all.

    model: a GPT or GPTLMHeadModel. format: "gpt_moe", or for a model of transformers' own "gpt2", "llama",
    "qwen3", "mixtral" or "qwen3_moe". tokenizer: add the files of the model's encoding, and make its
    <|endoftext|> the token that ends a text unless the configuration names one. ValueError for what the
    format cannot express, FileExistsError for a folder with other things.
    """
    folder = Path(folder).resolve()
    if format not in ("gpt_moe", *FOREIGN):
        raise ValueError(f"format={format!r}: choose one of gpt_moe, {', '.join(FOREIGN)}")
    refuse_foreign(folder)
    model = copy.copy(model)  # the same weights; the configuration becomes the folder's own
    model.config, model.generation_config = copy.deepcopy((model.config, model.generation_config))
    words = build_tokenizer(model.config.encoding, model.config.block_size) if tokenizer else None
    if words is not None:
        if len(words) > model.config.vocab_size:
            raise ValueError(
                f"encoding={model.config.encoding!r} has {len(words)} tokens, but vocab_size="
                f"{model.config.vocab_size}; name the right encoding, or export with --no-tokenizer "
                "(tokenizer=False)"
            )
        for config, name in itertools.product((model.config, model.generation_config), ("bos", "eos")):
            if getattr(config, f"{name}_token_id") is None:
                setattr(config, f"{name}_token_id", words.eos_token_id)
    weights = forget_usage(model) if format == "gpt_moe" else None
    model = to_foreign(model, format) if format in FOREIGN else model

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        model.save_pretrained(temporary, state_dict=weights, max_shard_size=max_shard_size)
        if format in FAMILY:
            path = temporary / "config.json"
            settings = json.loads(path.read_text(encoding="utf-8")) | older_names(model.config)
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if words is not None:
            words.save_pretrained(temporary)
        manifest = {"format": format, "files": sorted([MANIFEST, *os.listdir(temporary)])}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def forget_usage(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict, the routers' statistics of training (not their biases) as in a new model."""
    fresh = fresh_statistics(model)
    return model.state_dict() | {key: fresh[key] for key in fresh if not key.endswith("router_bias")}


def fresh_statistics(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers of all routers as in a new model."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if hasattr(module, "initial_statistics")
        for key, value in module.initial_statistics().items()
    }


def refuse_foreign(folder: Path) -> None:
    """FileExistsError if there is something at `folder` that is neither empty nor an export of ours alone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    found = set(os.listdir(folder))
    try:
        known = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError):
        known = set()
    if found - known:
        raise FileExistsError(
            f"{folder} holds {sorted(found - known)[0]!r}, which no export of ours wrote; nothing was "
            "changed. Name a new or empty folder"
        )


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`. What was there is removed afterwards, and put back if the renaming fails."""
    old = folder.with_name(f"{new.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
