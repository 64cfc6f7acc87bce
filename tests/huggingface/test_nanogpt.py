"""Checkpoints of nanoGPT and build-nanogpt: the same logits, samples and next losses, and no code of a file.

The files are built here, with a network of our own in nanoGPT's names. docs/huggingface.md names the runs
with nanoGPT's own code."""

import dataclasses
import os
import pickle
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from models import strong, tokens
from torch import nn

import train_gpt_moe
from layers.roles import parameter_groups
from model import GPTLMHeadModel
from training import checkpoints as ckpt

SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50304)
SETTINGS = dict(learning_rate=1e-2, min_lr=1e-3, warmup_iters=1, max_iters=9, weight_decay=0.1, beta1=0.9,
                beta2=0.95, grad_clip=1.0, batch_size=2, block_size=12, eval_interval=5, eval_iters=1,
                gradient_accumulation_steps=3, decay_lr=True, dropout=0.25)  # fmt: skip


class Network(nn.Module):
    """nanoGPT's names and arithmetic. form: of its GELU."""

    def __init__(self, bias: bool, form: str = "none"):
        super().__init__()
        C, V, self.form = SIZES["n_embd"], SIZES["vocab_size"], form
        norm, linear = (lambda: nn.LayerNorm(C, bias=bias)), (lambda *sizes: nn.Linear(*sizes, bias=bias))
        block = lambda: nn.ModuleDict(dict(  # noqa: E731
            ln_1=norm(), attn=nn.ModuleDict(dict(c_attn=linear(C, 3 * C), c_proj=linear(C, C))),
            ln_2=norm(), mlp=nn.ModuleDict(dict(c_fc=linear(C, 4 * C), c_proj=linear(4 * C, C)))
        ))  # fmt: skip
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C), wpe=nn.Embedding(SIZES["block_size"], C),
            h=nn.ModuleList(block() for _ in range(SIZES["n_layer"])), ln_f=norm()))  # fmt: skip
        self.lm_head = nn.Linear(C, V, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        strong(self)

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.size(1)]
        for b in self.transformer.h:
            parts = b.attn.c_attn(b.ln_1(x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + b.attn.c_proj(y)
            x = x + b.mlp.c_proj(F.gelu(b.mlp.c_fc(b.ln_2(x)), approximate=self.form))
        return self.lm_head(self.transformer.ln_f(x))

    def groups(self) -> list[dict]:
        """nanoGPT's groups: matrices, which decay, and the rest."""
        matrices, rest = [[p for p in self.parameters() if (p.dim() >= 2) == it] for it in (True, False)]
        return [dict(params=matrices, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]


def losses(network, optimizer, seeds) -> list[float]:
    """The losses of a step on each seed's tokens."""
    found = []
    for seed in seeds:
        ids = tokens(B=2, T=13, V=50257, seed=seed)
        logits = network(ids[:, :-1])
        loss = F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def save(path, network, optimizer, prefix="", **more):
    """nanoGPT's ckpt.pt after three steps. more: entries that differ."""
    bias = network.transformer.ln_f.bias is not None
    weights = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    args = dict(SIZES, bias=bias, dropout=0.0)
    torch.save(dict(model=weights, optimizer=optimizer.state_dict(), model_args=args, iter_num=3,
                    best_val_loss=torch.tensor(9.5), config=SETTINGS) | more, path)  # fmt: skip


@pytest.mark.parametrize("bias, prefix", [(True, ""), (False, "_orig_mod.")])
def test_logits_samples_and_the_next_losses_are_nanogpts(bias, prefix, tmp_path):
    theirs, path = Network(bias), tmp_path / "ckpt.pt"
    theirs.transformer.h[0].attn.register_buffer("bias", torch.ones(1, 1, 12, 12))  # without fused attention
    optimizer = torch.optim.AdamW(theirs.groups(), lr=1e-2, betas=(0.9, 0.95))
    losses(theirs, optimizer, range(3))
    save(path, theirs, optimizer, prefix)
    ours, ids = ckpt.load_model(path), tokens(T=12, V=50257)
    assert (ours(ids).logits - theirs(ids)).abs().max() < 1e-6 < 1e-3 < theirs(ids).std()
    assert len(ours.generation_config.suppress_tokens) == 50304 - 50257

    text, ours.generation_config.suppress_tokens = ids[:, :3], None
    torch.manual_seed(1)
    drawn = ours.generate(text, 20, 0.8, top_k=50)  # past block_size, too
    torch.manual_seed(1)
    for _ in range(20):
        with torch.no_grad():
            logits = theirs(text[:, -12:])[:, -1] / 0.8
        logits[logits < logits.topk(50).values[:, [-1]]] = -torch.inf
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    assert torch.equal(drawn, text)

    state, loader = ckpt.load_checkpoint(path), Mock()
    again = GPTLMHeadModel(state["config"])
    groups = parameter_groups(again.named_parameters(), 0.1, 1e-2, 1.0, 1.0)
    resumed = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    ckpt.restore(state, again, resumed, loader, path)
    loader.reset.assert_called_once_with(3 * 6)
    assert (state["step"], state["val_loss"]) == (3, 9.5)
    mine, expected = losses(again, resumed, range(3, 7)), losses(theirs, optimizer, range(3, 7))
    assert mine == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("characters", [False, True])
def test_a_run_of_nanogpt_is_resumed(characters, tmp_path, monkeypatch):
    """The data have the table of characters, which the checkpoint does not name."""
    if characters:
        monkeypatch.setitem(SIZES, "vocab_size", 65)
        table = {"vocab_size": 65, "itos": dict(enumerate(map(chr, range(65, 130))))}
        table["stoi"] = {character: i for i, character in table["itos"].items()}
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(table))
    network, path = Network(True), tmp_path / "ckpt.pt"
    save(path, network, torch.optim.AdamW(network.groups()), config=SETTINGS | dict(decay_lr=False))
    for name in ("train", "val"):
        ids = tokens(B=1, T=400, V=min(SIZES["vocab_size"], 50257))
        ids.numpy().astype("uint16").tofile(tmp_path / f"{name}.bin")
    flags = f"""--resume {path} --data_dir {tmp_path} --log_dir {tmp_path}/log --max_steps 4 --device cpu
        --use_compile False --tensorboard False --plot False --sample_every 0 --hellaswag False"""
    assert train_gpt_moe.main(flags.split()) == 0
    state = ckpt.load_checkpoint(tmp_path / "log" / "latest")
    kept = dict(total_batch_size=72, B=2, T=12, max_lr=1e-2, min_lr=1e-2, warmup_steps=0, infer_step=5)
    assert kept.items() <= state["train_config"].items() and state["loader"]["position"] == 4 * 6
    assert state["train_config"]["dropout"] == state["config"]["dropout"] == 0.25
    begin = ["--T", "12", "--B", "2", "--total_batch_size", "24", "--init_from", str(path)]
    assert train_gpt_moe.main([*flags.split()[2:], *begin, "--log_dir", f"{tmp_path}/new"]) == 0
    for folder in ("log", "new") if characters else ():
        text = ckpt.load_model(tmp_path / folder / "latest").generate("ABC", max_new_tokens=5)
        assert text[:3] == "ABC" and len(text) == 8


def test_a_checkpoint_from_before_may_2023_has_the_other_gelu_and_no_moments(tmp_path, refused):
    theirs, path, ids = Network(True, "tanh"), tmp_path / "ckpt.pt", tokens(T=12, V=50257)
    save(path, theirs, torch.optim.AdamW(theirs.parameters()))
    assert (ckpt.load_model(path)(ids).logits - theirs(ids)).abs().max() < 1e-6
    line = refused(train_gpt_moe.main, "--resume", path, "--log_dir", tmp_path / "log", "--device", "cpu")
    assert "lacks" in line and f"--init_from {path}" in line


def test_build_nanogpts_dataclass_is_read_without_its_code(tmp_path, monkeypatch):
    """The pickle names __main__.GPTConfig, a class that no process of ours has."""
    fields = [(name, int) for name in SIZES]
    there = dataclasses.make_dataclass("GPTConfig", fields, namespace=dict(__module__="__main__"))
    path, theirs, ids = tmp_path / "model_00007.pt", Network(True, "tanh"), tokens(T=12, V=50257)
    content = dict(model=theirs.state_dict(), config=there(**SIZES), step=7, val_loss=3.5)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "GPTConfig", there, raising=False)
        torch.save(content, path)
        there.__reduce__ = lambda self: (os.mkdir, (str(tmp_path / "executed"),))
        torch.save(content, tmp_path / "bad.pt")
        there.__reduce__ = lambda self: (there, (os.mkdir,))
        torch.save(content, tmp_path / "called.pt")
    assert (ckpt.load_model(path)(ids).logits - theirs(ids)).abs().max() < 1e-6
    assert ckpt.load_checkpoint(path)["step"] == 7
    for name in ("bad.pt", "called.pt"):
        refuses(name, ckpt.load_model, tmp_path / name, error=ckpt.CheckpointError)
    assert not (tmp_path / "executed").exists()
