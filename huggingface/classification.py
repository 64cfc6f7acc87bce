"""A network that classifies texts, as transformers' AutoModelForSequenceClassification builds it."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class Classification(GenericForSequenceClassification):
    """For a class of GPT. transformers' forward takes the hidden state of a text's last token that is not
    config.pad_token_id, and adds no routers' losses. From a folder without `score` it starts at random."""

    base_model_prefix = "transformer"
    _tied_weights_keys = None
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 (folders of language models have one)

    accepts_loss_kwargs = False  # Trainer must not pass the number of tokens

    def __init__(self, config: PreTrainedConfig | dict):
        super(GenericForSequenceClassification, self).__init__(config)
        self.lm_head, self.num_labels = None, self.config.num_labels
        self.loss_type = "ForSequenceClassification"
        self.score = nn.Linear(self.config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @classmethod
    def _from_theirs(cls, kind: str, theirs: PreTrainedModel, settings: dict):
        make = "GPTLMHeadModel.from_pretrained(NAME).save_pretrained(FOLDER)"
        raise ValueError(f"model_type={kind}: a classifier starts from a folder of gpt_moe; make one: {make}")
