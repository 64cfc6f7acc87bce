"""Every setting of the model's architecture, and which of them go together.

    from model import GPTConfig
    config = GPTConfig(n_layer=6, num_experts=8, num_experts_per_tok=2)
    config = GPTConfig(**json.load(open("my_model/config.json")))

References: https://huggingface.co/docs/transformers/main_classes/configuration
"""

import difflib
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig


@strict
class GPTConfig(PreTrainedConfig):
    """Every setting of the architecture. Types are checked at every assignment, the rest in __post_init__.

    Raises ValueError, naming field and value, for combinations that make no sense and for unknown names.
    """

    model_type = "gpt_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads a plain list)
    attribute_map = {  # noqa: RUF012 (names that transformers, lm_eval and PEFT look for)
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
    }

    block_size: int = 1024  # longest sequence
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | int = 0.0
    bias: bool = True  # in linear layers and layer norms
    mlp_hidden_size: int | None = None  # of dense feed-forward layers; None = 4 * n_embd
    # mixture of experts
    use_moe: bool = True
    num_experts: int = 2
    num_experts_per_tok: int = 1
    moe_every: int = 1  # an MoE in every k-th block, counted from the last one
    moe_loss: bool = True
    moe_loss_type: str = "load_balancing"
    moe_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    router_score: str = "softmax"
    norm_topk_prob: bool = True  # for K > 1; with K = 1 the weight is always the probability itself
    router_bias_update_rate: float | int = 0.0  # loss-free balancing when > 0
    num_shared_experts: int = 0
    expert_hidden_size: int | None = None  # None = 4 * n_embd
    # architecture
    position: str = "learned"
    rope_theta: float | int = 10000.0
    n_kv_head: int | None = None  # None = n_head
    sliding_window: int | None = None  # a query sees this many positions, its own included
    global_every: int | None = None  # with a window: every k-th layer sees everything
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"  # the tanh form, as in GPT-2
    qk_norm: bool = False
    logit_softcap: float | int = 0.0
    tie_word_embeddings: bool = True
    init: str = "gpt2"  # zero_proj: projections into the residual stream begin at zero
    # around the model
    encoding: str = "gpt2"  # how text becomes tokens: "bytes" or a name tiktoken knows
    encoding_size: int | None = None  # ids from here up only pad vocab_size and are never generated
    infer_step: int = 250  # kept for configurations of the original training script
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    CHOICES = {  # noqa: RUF012
        "moe_loss_type": (
            "load_balancing", "variance_penalty", "entropy_regularization", "diversity_regularization"
        ),
        "router_score": ("softmax", "sigmoid"),
        "position": ("learned", "rope"),
        "norm": ("layernorm", "rmsnorm"),
        "activation": ("gelu", "relu2", "swiglu"),
        "init": ("gpt2", "zero_proj"),
    }  # fmt: skip

    LEAST = {  # noqa: RUF012
        "block_size": 1, "vocab_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "dropout": 0,
        "mlp_hidden_size": 1, "num_experts": 1, "num_experts_per_tok": 1, "moe_every": 1, "moe_loss_coef": 0,
        "router_z_loss_coef": 0, "router_bias_update_rate": 0, "num_shared_experts": 0,
        "expert_hidden_size": 1,
        "n_kv_head": 1, "sliding_window": 1, "global_every": 1, "logit_softcap": 0, "encoding_size": 1,
    }  # fmt: skip

    def __post_init__(self, **kwargs):
        # Dictionaries that transformers wrote carry its version, and may carry another version's names;
        # names that a person wrote are checked: an ignored typo trains the wrong model.
        if self.transformers_version is None:
            self._reject_unknown_names(kwargs)
        super().__post_init__(**kwargs)
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value}: must be a finite number")
        for name, least in self.LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}: must be below 1")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head != 0:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.position == "rope" and (self.n_embd // self.n_head) % 2 != 0:
            raise ValueError(
                f"position='rope' turns pairs of channels, but n_embd={self.n_embd} / n_head={self.n_head} "
                f"gives heads of an odd size, {self.n_embd // self.n_head}"
            )
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )
        if self.num_experts > 32_767:
            raise ValueError(f"num_experts={self.num_experts}: at most 32767, experts are sorted as int16")
        if self.global_every is not None and self.sliding_window is None:
            raise ValueError(f"global_every={self.global_every} has a meaning only with a sliding_window")
        if self.encoding_size is not None and self.encoding_size > self.vocab_size:
            raise ValueError(f"encoding_size={self.encoding_size} is more than vocab_size={self.vocab_size}")

    def _reject_unknown_names(self, names: dict[str, Any]) -> None:
        fields = set(self.__dataclass_fields__) | set(self.attribute_map)
        known = fields | set(GenerationConfig._get_default_generation_params()) | {
            "torch_dtype", "num_labels", "name_or_path", "_name_or_path", "_commit_hash", "output_attentions",
            "attn_implementation", "experts_implementation", "auto_map", "model_type", "layer_types",
        }  # fmt: skip
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"GPTConfig has no field {name!r}{hint}")

    @property
    def layer_types(self) -> list[str]:
        """What each layer attends to, in the words transformers' caches and masks understand."""
        if self.sliding_window is None:
            return ["full_attention"] * self.n_layer
        every = self.global_every or self.n_layer + 1
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(self.n_layer)]

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer`, 0 .. n_layer - 1, holds an MoE: the last does, and every k-th before it."""
        return self.use_moe and (self.n_layer - 1 - layer) % self.moe_every == 0


# What save_pretrained() writes beside a folder's config.json: the file of this class.
GPTConfig.register_for_auto_class()
