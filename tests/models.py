"""Small models and texts that many tests share."""

import random

import torch
import torch.nn.functional as F

from layers.experts import Experts
from layers.mlp import ACTIVATIONS
from mixture_of_experts import MoE
from model import GPTConfig, GPTLMHeadModel

ENGINES = ("loop", "all", "grouped_mm")  # of layers/experts.py

WORDS = "a man is seen sitting on the roof he pulls up shingles and then throws them down to café".split()

# What a checkout of nanoGPT offers, as far as the benchmarks use it; a bigram model.
NANOGPT = """
import torch, torch.nn.functional as F

class GPTConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        print("number of parameters: few")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""

# The same for nanochat/gpt.py. It notes in group "seen" the settings of each step.
NANOCHAT = """
import torch, torch.nn.functional as F
from types import SimpleNamespace

GPTConfig = SimpleNamespace
SEEN = []

class Noting(torch.optim.SGD):
    def step(self):
        SEEN.append([dict(group, params=None) for group in self.param_groups])
        super().step()

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.window_pattern == "L" and config.n_kv_head == config.n_head
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def init_weights(self):
        print("weights")

    def setup_optimizer(self, unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr):
        rates = unembedding_lr, embedding_lr, matrix_lr, scalar_lr
        groups = [dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=rate, kind="adamw") for rate in rates]
        groups += [dict(params=self.table.parameters(), lr=matrix_lr, kind="muon", weight_decay=weight_decay)]
        return Noting([group | dict(initial_lr=group["lr"]) for group in groups])

    def forward(self, idx, targets):
        return F.cross_entropy(self.table(idx).flatten(0, 1), targets.flatten())
"""


def tiny(**fields) -> GPTConfig:
    """Two layers of four experts, a text of 24 tokens out of 97."""
    sizes = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=97, block_size=24)
    return GPTConfig(**sizes | dict(num_experts=4, num_experts_per_tok=2) | fields)


def dense_model(**fields) -> GPTLMHeadModel:
    """A small dense model, to make one with experts from."""
    torch.manual_seed(5)
    return GPTLMHeadModel(tiny(use_moe=False, **fields)).eval()


def moe_layer(seed: int = 0, std: float = 0.5, **fields) -> MoE:
    """An MoE layer of 8 channels in training, with weights so large that every difference shows."""
    return strong(MoE(tiny(**dict(n_embd=8) | fields)), std, seed).train()


def gradients(module) -> dict[str, torch.Tensor]:
    """Copies of the gradients by the parameters' names."""
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def experts_by_hand(experts: Experts, x, expert, weight):
    """The experts' output for x (N, C) as a loop over tokens; expert and weight (N, K) as for dispatch."""
    names, y = ("c_fc", "c_fc_bias", "c_proj", "c_proj_bias"), []
    for row, chosen, factors in zip(x, expert.tolist(), weight, strict=True):
        answers = []
        for e in chosen:
            stacked = (getattr(experts, name) for name in names)
            c_fc, fc_bias, c_proj, proj_bias = (None if p is None else p[e] for p in stacked)
            h = ACTIVATIONS[experts.activation].forward(F.linear(row, c_fc, fc_bias))
            answers.append(F.linear(h, c_proj, proj_bias))
        y.append(sum(factor * answer for factor, answer in zip(factors, answers, strict=True)))
    return torch.stack(y)


def moe_by_hand(moe: MoE, x):
    """The routed experts' output for x (N, C)."""
    logits = x @ moe.gate.weight.t()
    scores = logits.softmax(1) if moe.router_score == "softmax" else logits.sigmoid()
    weight, expert = scores.topk(moe.num_experts_per_tok)
    if weight.size(1) > 1 and moe.norm_topk_prob:
        weight = weight / weight.sum(1, keepdim=True)
    return experts_by_hand(moe.experts, x, expert, weight)


def sure_layer(**fields) -> MoE:
    """A layer of 4 channels and 4 experts that sends the unit vector e to expert e, with probability 1."""
    layer = moe_layer(n_embd=4, **fields)
    with torch.no_grad():
        layer.gate.weight.copy_(100 * torch.eye(4))
    return layer


def chosen(layer: MoE, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts and weights of every token (N, K), best expert first, and the probabilities (N, E)."""
    routing, probs = layer.route(logits)
    rows = routing.expert, routing.weight
    return *(row[routing.position].view(-1, routing.per_token) for row in rows), probs


def strong(model, std=0.2, seed=0):
    """The model with weights so large that no non-linearity looks linear, norms around one; in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_norm = ("ln_" in name or "norm" in name) and name.endswith("weight")
            parameter.copy_(noise + 1 if is_norm else noise)
    return model.eval()


def tokens(B=3, T=24, V=97, seed=0):
    """Random token numbers (B, T) below V."""
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


WTE = "transformer.wte.weight"


def small_checkpoint(step: int = 3, V: int = 5, C: int = 7, **more) -> dict:
    """The checkpoint of a very small model, with WTE of shape (V, C). Its numbers depend on the step."""
    sizes = dict(n_layer=1, n_head=1, n_embd=C, vocab_size=V, block_size=4, mlp_hidden_size=1)
    config = GPTConfig(**sizes, use_moe=False, bias=False, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(step)
        weights, moment = dict(GPTLMHeadModel(config).state_dict()), torch.randn(V, C)
    moments = {"step": torch.tensor(2.0), "exp_avg": moment}
    optimizer = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
    return {"model": weights, "config": config.to_dict(), "step": step, "optimizer": optimizer, **more}


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def make_examples(n: int, seed: int = 0, longest: int = 9) -> list[dict]:
    """Questions of random words, of very different lengths, with ctx_a and ctx_b."""
    rng = random.Random(seed)

    def text(length):
        return " ".join(rng.choices(WORDS, k=length))

    return [
        dict(
            ctx=f"{(a := text(rng.randint(1, longest)))} {(b := text(2))}", ctx_a=a, ctx_b=b,
            activity_label="Roofing", label=rng.randrange(4),
            endings=[text(rng.randint(1, longest)) for _ in range(4)],
        )
        for _ in range(n)
    ]  # fmt: skip


# One model for each part that generation and saved folders must get right.
ARCHITECTURES = {
    "learned, MoE": dict(),
    "dense": dict(use_moe=False),
    "rope, grouped": dict(position="rope", n_kv_head=2),
    "window, global": dict(sliding_window=6, global_every=2, position="rope", n_kv_head=1),
    "modern": dict(
        position="rope", n_kv_head=2, norm="rmsnorm", activation="swiglu", qk_norm=True, logit_softcap=15.0,
        bias=False, tie_word_embeddings=False, num_shared_experts=1, router_score="sigmoid",
    ),
    "n-grams": dict(ngram_order=4, ngram_rows=50, position="rope"),
    "eager": dict(attn_implementation="eager", sliding_window=6),
}  # fmt: skip


def byte_model(**fields) -> GPTLMHeadModel:
    """A model of bytes and <|endoftext|>, its vocabulary padded to 384."""
    fields = dict(vocab_size=384, block_size=48, encoding="bytes", encoding_size=257) | fields
    return strong(GPTLMHeadModel(tiny(**fields)), std=0.15)


def greedy_by_hand(model, ids, new):
    """nanoGPT's loop: the whole text, cropped to block_size, through the model for every token."""
    with torch.no_grad():
        for _ in range(new):
            logits = model(ids[:, -model.config.block_size :], use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits[:, : model.config.encoding_size].argmax(-1, keepdim=True)], dim=1)
    return ids
