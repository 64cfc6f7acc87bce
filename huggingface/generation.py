"""Generation: transformers' generate(), also for a string, and for texts longer than block_size."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from transformers import GenerationMixin, LogitsProcessor

from huggingface.outputs import CACHE
from huggingface.text import encode_prompt
from layers.attention import without_cudnn
from layers.ngrams import tokens_before
from tokens.encodings import decode_tokens

# The arguments of nanoGPT's generate(), in its order and with its defaults; it always samples.
NANOGPT = {"max_new_tokens": 0, "temperature": 1.0, "top_k": None, "do_sample": True}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without cuDNN's attention. Then each module has its own mode
    again: frozen parts may differ."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), without_cudnn():
            yield
    finally:
        for module in in_training:
            module.training = True


class FiniteLogits(LogitsProcessor):
    """FloatingPointError if the next token's logits (B, V) are not finite; CUDA's sampling would abort."""

    def __call__(self, input_ids, scores):  # noqa: D102
        if not scores.amax(-1).isfinite().all():  # NaN wins the maximum; -inf alone rules a token out
            raise FloatingPointError("the model's logits are NaN or infinite: it has diverged")
        return scores


class GPTGenerationMixin(GenerationMixin):
    """generate() for a model with `config.block_size`, `config.encoding` and `config.encoding_size`."""

    _gives_logits = False  # while it is true, the model's forward returns logits

    def generate(self, inputs: torch.Tensor | str | None = None, *args, **kwargs):
        """transformers' generate(), in evaluation mode; for a string, the prompt and its continuation.
        max_length and max_new_tokens count tokens. With num_return_sequences > 1 it returns a list of texts.
        generate(idx, max_new_tokens, temperature, top_k) samples as nanoGPT does, past any <|endoftext|>.
        ValueError for a string that the vocabulary cannot hold, FloatingPointError for logits not finite."""
        # accelerate may have bound the forward to this model, and it then reads the flag of this model.
        self._gives_logits, gave = True, self._gives_logits
        try:
            with evaluating(self):
                # The copy shares all parameters, but has no compiled forward, which torch would compile again
                # for every length. (copy.copy fails for the class that FSDP gives the model.)
                model = object.__new__(type(self))
                model.__setstate__(self.__getstate__())
                generate = super(GPTGenerationMixin, model).generate
                if args and isinstance(args[0], int):  # transformers has no number in this place
                    model.generation_config = copy.deepcopy(self.generation_config)
                    model.generation_config.eos_token_id = None
                    args, kwargs = (), NANOGPT | dict(zip(NANOGPT, args, strict=False)) | kwargs
                    kwargs["top_k"] = kwargs["top_k"] or 0
                if not isinstance(inputs, str):
                    return generate(inputs, *args, **kwargs)
                ids = torch.tensor([encode_prompt(inputs, self.config)], device=self.device)  # (1, T)
                end = self.generation_config.eos_token_id
                pad = end[0] if isinstance(end, list) else end
                defaults = dict(attention_mask=torch.ones_like(ids), pad_token_id=pad)
                rows = generate(ids, *args, **defaults | kwargs)
            rows = getattr(rows, "sequences", rows)  # return_dict_in_generate wraps them
            texts = [decode_tokens(row, self.config.encoding) for row in rows.tolist()]
            return texts[0] if len(texts) == 1 else texts
        finally:
            self._gives_logits = gave

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        """As transformers', but a text that outgrows block_size is cropped to its last block_size tokens. The
        cache is dropped then, because every position moves. ValueError if it holds tokens whose ids are not
        given: inputs_embeds, or those of an earlier turn."""
        for name in ("tokenizer", "assistant_tokenizer"):  # generate() passes them for stop_strings
            kwargs.pop(name, None)
        block_size, cache = self.config.block_size, kwargs.get(CACHE)
        cached = cache.get_seq_length() if cache is not None else 0
        if input_ids.size(1) > block_size:
            cached, input_ids = 0, input_ids[:, -block_size:]
            attention_mask = attention_mask[:, -block_size:] if attention_mask is not None else None
            kwargs |= {"use_cache": False, "position_ids": None, "next_sequence_length": None, CACHE: None}
        kwargs |= dict(attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        new = inputs["inputs_embeds" if inputs.get("input_ids") is None else "input_ids"].size(1)
        if cached + new > block_size:
            problem = f"{cached + new} tokens are longer than block_size={block_size}"
            raise ValueError(f"{problem}, and cannot be cropped without all their ids; generate fewer tokens")
        order, known = self.config.ngram_order, input_ids.size(1) - new
        if order and inputs.get("input_ids") is not None and known >= min(cached, order - 1):
            before = tokens_before(input_ids, order - 1)
            inputs["previous_ids"] = before[:, -new:]  # without them the model takes those in the cache
        return inputs | {"past_key_values": inputs.get(CACHE)}  # PEFT knows only the older name

    def _prefill(self, input_ids, generation_config, *args, **kwargs):
        """transformers' first forward. A prompt that is cropped is not also cut into chunks."""
        if input_ids.size(1) > self.config.block_size:
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, *args, **kwargs)

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.insert(0, FiniteLogits())
        return processors

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            criterion.max_position_embeddings = None  # no warning beyond block_size, where texts are cropped
        return criteria

    def _assisted_decoding(self, *args, **kwargs):
        """transformers' decoding for assistant_model and prompt_lookup_num_tokens. It must keep the cache."""
        length, block_size = kwargs["generation_config"].max_length, self.config.block_size
        if length > block_size:
            problem = f"assisted generation of up to {length} tokens would outgrow block_size={block_size}"
            raise ValueError(f"{problem}; lower max_new_tokens or max_length, or generate without assistance")
        return super()._assisted_decoding(*args, **kwargs)
