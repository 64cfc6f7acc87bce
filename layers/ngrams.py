"""Hashed n-gram embeddings: vectors for a token together with those before it, beside its own embedding.

A table has `rows` vectors for each n = 2 .. order. The n-gram that ends at a token chooses one of them by its
hash, so different n-grams may share a vector. A forward needs no product. A step uses few of the rows, but
a dense gradient has them all: on a CPU sparse gradients cost less.
References: hash n-gram embeddings of the Byte Latent Transformer, arXiv 2412.09871, section 3.2.1;
over-encoding, arXiv 2501.16975; the multiplicative generator of Park and Miller, CACM 31(10), 1988."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIME, MULTIPLIER = 2**31 - 1, 48271  # Park and Miller's; all products fit into int64


def tokens_before(ids: Tensor, number: int) -> Tensor:
    """The `number` tokens before each token, the nearest one first: ids (B, T) -> (B, T, number). Before the
    first token there are zeros."""
    padded = F.pad(ids, (number, 0))  # (B, number + T)
    return torch.stack([padded[:, number - d : padded.size(1) - d] for d in range(1, number + 1)], dim=-1)


def recall(cache, ids: Tensor | None, order: int, previous_ids: Tensor | None) -> Tensor:
    """previous_ids as they are given, or else the tokens before each of ids (B, T), the nearest first, those
    that remember() has kept with the cache among them: (B, T, order - 1). ValueError without ids, or if the
    cache has changed since then, for instance the order of its rows."""
    if ids is None:
        raise ValueError(f"ngram_order={order}: inputs_embeds do not tell the n-grams; give input_ids")
    if previous_ids is not None:
        return previous_ids
    latest = ids.new_zeros(len(ids), order - 1)
    if cache is not None and cache.get_seq_length() > 0:
        keys, latest = getattr(cache, "latest_ids", (None, None))
        if keys is None or keys is not cache.layers[0].keys:
            problem = "this cache does not tell the latest tokens"
            raise ValueError(f"ngram_order={order}: {problem}; give previous_ids (layers/ngrams.py)")
    return tokens_before(torch.cat([latest, ids], dim=1), order - 1)[:, order - 1 :]


def remember(cache, ids: Tensor, previous_ids: Tensor) -> None:
    """Keep the latest tokens with the cache, after its layers have got the keys of ids (B, T)."""
    latest = torch.cat([previous_ids[:, -1].flip(-1), ids[:, -1:]], dim=1)[:, 1:]  # (B, order - 1)
    cache.latest_ids = cache.layers[0].keys, latest  # any other change of a cache makes new keys


class NgramEmbedding(nn.Embedding):
    """The sum of the vectors of the n-grams, n = 2 .. order, that end at each token."""

    def __init__(self, order: int, rows: int, n_embd: int):
        super().__init__((order - 1) * rows, n_embd)
        self.order, self.rows = order, rows

    def use_sparse_gradients(self) -> None:
        """From now on the gradient is a coalesced sparse tensor with the rows that were used, each once."""
        self.sparse = True
        self.weight.register_post_accumulate_grad_hook(_coalesce)

    def forward(self, ids: Tensor, previous_ids: Tensor, position_ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C). previous_ids (B, T, order - 1): the tokens before each one, the nearest
        first. position_ids (B or 1, T) in the text: what lies before its first token does not count."""
        code, rows = ids + 1, []  # (B, T); 0 stands for a place before the text
        for n in range(2, self.order + 1):
            before = torch.where(position_ids >= n - 1, previous_ids[..., n - 2] + 1, 0)  # (B, T)
            code = (code * MULTIPLIER + before) % PRIME
            rows.append(code % self.rows + (n - 2) * self.rows)
        vectors = super().forward(torch.stack(rows, dim=-1))  # (B, T, order - 1, C)
        return vectors.sum(-2)


def _coalesce(parameter: nn.Parameter) -> None:
    parameter.grad = parameter.grad.coalesce()
