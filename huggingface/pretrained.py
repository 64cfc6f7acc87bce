"""What transformers, accelerate and Trainer need from a model besides its forward: embeddings, loading."""

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from huggingface.configuration import show
from huggingface.folders import WEIGHTS, check_loaded, quiet, read_config, read_generation, read_model
from huggingface.gpt2 import from_gpt2
from huggingface.llama import FAMILY, from_llama

# model_type of other architectures that this project reads and writes, and their classes in transformers.
FOREIGN = {"gpt2": "GPT2LMHeadModel"} | {kind: f"{name}ForCausalLM" for kind, name in FAMILY.items()}

# Arguments of from_pretrained that say where files lie.
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}

# Trainer shifts the labels that it smooths only for the models in this list of transformers.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt_moe"] = "GPTLMHeadModel"


def fresh_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of all routers as in a new model, by their names in the state dict."""
    routers = {name: part for name, part in model.named_modules() if hasattr(part, "initial_statistics")}
    return {f"{name}.{k}": v for name, part in routers.items() for k, v in part.initial_statistics().items()}


class GPTPreTrainedModel(PreTrainedModel):
    """Base class of a model with `transformer` (wte and perhaps wpe in it) and an `lm_head`."""

    base_model_prefix = "transformer"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 (accelerate does not move caches)
    _keep_in_fp32_modules_strict = ["mlp.gate", "router_bias"]  # noqa: RUF012 (when loaded with another dtype)
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # makes Trainer pass num_items_in_batch, and not rescale the loss

    def __init__(self, config: PreTrainedConfig | dict):
        super().__init__(self.config_class(**config) if isinstance(config, dict) else config)
        # Makes Trainer count labels after the shift. Otherwise it reports (T-1)/T of the true loss.
        self.loss_type = "ForCausalLM"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """transformers guesses this from the source of the model's file, and its guess is wrong here."""
        return True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args, config: Any = None,
                        output_loading_info: bool = False, **kwargs):  # fmt: skip
        """Load "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", a folder of ours, or a folder of FOREIGN.
        Settings of GPTConfig may be given too (dropout=0.1). Only safetensors files are read (folders.py).
        ValueError for another architecture, for weights that are missing, unexpected or do not fit the
        settings, and for a field (which it names) that this model cannot express."""
        name, ours, load = pretrained_model_name_or_path, cls.config_class, super().from_pretrained
        if name is None:  # the caller gives config and state_dict
            return load(None, *args, config=config, output_loading_info=output_loading_info, **kwargs)
        refused = "variant", "gguf_file", "state_dict", "quantization_config"
        if unread := [key for key in refused if kwargs.get(key)]:
            raise ValueError(f"{name}: {unread[0]} cannot be given; only {WEIGHTS} is read")
        where = {key: kwargs.pop(key) for key in HUB_OPTIONS & kwargs.keys()}
        new_sizes, settings = kwargs.pop("ignore_mismatched_sizes", False), {}
        if isinstance(config, PreTrainedConfig):
            kind = config.model_type
        else:
            # transformers also takes num_labels, output_hidden_states and others; dtype is for the weights.
            named = [key for key in kwargs if hasattr(ours, key) and key not in ("dtype", "torch_dtype")]
            settings = {key: kwargs.pop(key) for key in named}
            config = read_config(config or name, where)
            kind = config.pop("model_type", ours.model_type)
            config |= settings if kind == ours.model_type else {}
        known, source = [ours.model_type, *FOREIGN], cls
        if kind not in known:
            raise ValueError(f"{name}: models of type {show(kind)} cannot be read, only {', '.join(known)}")
        if kind in FOREIGN:
            source = getattr(transformers, FOREIGN[kind])
            load = source.from_pretrained
            if settings.get("output_attentions"):  # sdpa has none
                kwargs.setdefault("attn_implementation", "eager")
        config, weights = read_model(name, where, source, config)
        with quiet():
            how = dict(config=config, state_dict=weights, ignore_mismatched_sizes=True)
            model, info = load(None, *args, **how, output_loading_info=True, **kwargs)
        check_loaded(name, info, new_sizes)
        if (generation := read_generation(name, where)) and "generation_config" not in kwargs:
            model.generation_config = generation
        model = model if source is cls else cls._from_theirs(kind, model, settings)
        model.name_or_path = model.config.name_or_path = str(name)
        model._suppress_padding()
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_theirs(cls, kind: str, theirs: PreTrainedModel, settings: dict[str, Any]):
        """A model of FOREIGN as one of ours. settings: fields of our configuration that replace theirs."""
        fields, weights = from_gpt2(theirs) if kind == "gpt2" else from_llama(theirs)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(cls.config_class(**fields | settings))
        try:
            model.load_state_dict(weights | fresh_statistics(model), assign=True)
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:300]
            raise ValueError(f"{settings} do not fit the weights: {problem}") from error
        model.tie_weights()
        model.generation_config = theirs.generation_config
        return model.eval()

    def _suppress_padding(self) -> None:
        """Never generate ids from encoding_size on: they only pad the vocabulary, and no text has them."""
        size, generation = self.config.encoding_size, self.generation_config
        if size is not None and size < self.config.vocab_size and generation.suppress_tokens is None:
            generation.suppress_tokens = list(range(size, self.config.vocab_size))

    def get_decoder(self) -> nn.Module:
        """The network without its head."""
        return self.transformer

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, (V, C)."""
        return self.transformer.wte

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        """Replace the token embedding (V, C) and, if it is tied, the head."""
        self.transformer.wte = new_embeddings
        if self.config.tie_word_embeddings and self.lm_head is not None:
            self.lm_head.weight = new_embeddings.weight
            self.lm_head.out_features = new_embeddings.num_embeddings

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head and, if it is tied, the token embedding."""
        self.lm_head = new_embeddings
        if self.config.tie_word_embeddings:
            self.transformer.wte.weight = new_embeddings.weight
            self.transformer.wte.num_embeddings = new_embeddings.weight.size(0)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """transformers' method; tied weights stay tied. All ids below a smaller new_num_tokens become tokens,
        and all that a larger one adds. Other ids that only pad the vocabulary are still never generated."""
        config, generation, old_size = self.config, self.generation_config, self.config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        asked, size = new_num_tokens or old_size, config.vocab_size  # size: with pad_to_multiple_of
        if (asked, size) != (old_size, old_size):
            kept = generation.suppress_tokens or [] if asked >= old_size else []
            padding = [*kept, *range(asked, size)]
            generation.suppress_tokens = padding or None
            at_end = padding and padding == list(range(padding[0], size))
            config.encoding_size = padding[0] if at_end else None
        return embeddings

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest sequence, dropping the position embeddings beyond it; ValueError if longer."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: can only be cropped to 1..{self.config.block_size}")
        self.config.block_size = block_size
        if "wpe" in self.transformer:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size
