"""A network that classifies texts, as transformers' AutoModelForSequenceClassification builds it."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class Classification(GenericForSequenceClassification):
    """For a class of GPT. transformers' forward takes the hidden state of a text's last token that is not
    config.pad_token_id, and adds no routers' losses. From a folder without `score` it starts at random."""

    base_model_prefix = "transformer"
    _tied_weights_keys = None
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 (folders of language models have one)

    def __init__(self, config: PreTrainedConfig | dict):
        super(GenericForSequenceClassification, self).__init__(config)
        self.lm_head, self.num_labels = None, self.config.num_labels
        self.score = nn.Linear(self.config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @classmethod
    def _from_theirs(cls, kind: str, theirs: PreTrainedModel, settings: dict):
        name = Path(theirs.name_or_path).name
        raise ValueError(f"{name}: a classifier starts from our own format only; save it so first, with "
                         f"GPTLMHeadModel.from_pretrained({name!r}).save_pretrained(FOLDER)")  # fmt: skip
