"""Documents in one row do not see each other: masks, positions, packed batches of transformers, runs."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from models import ARCHITECTURES, gradients, strong, tiny, tokens
from processes import flags, losses, run_ranks
from transformers import DataCollatorWithFlattening

import train_gpt_moe
from huggingface.outputs import CACHE
from layers.attention import positions_in_documents
from model import GPTLMHeadModel
from tokens.shards import read_shard, write_shard

EOT = 0
SIZES = 4, 0, 17, 23, 10, 6, 5
TEXTS = [torch.cat([torch.tensor([EOT]), tokens(1, n, seed=n)[0].clamp(min=1)]) for n in SIZES]
ROWS = torch.cat(TEXTS).view(3, 24)


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_documents_in_a_row_equal_the_documents_one_by_one(name):
    """With checkpointing (a block's second forward would add its keys to a cache again), in evaluation with a
    cache, and as batches that Trainer and TRL pack. A row may be longer than block_size, a text may not."""
    fields = ARCHITECTURES[name] | dict(logit_softcap=0.0)  # below, the head alone gives the logits
    model = strong(GPTLMHeadModel(tiny(**fields)), 0.1).train()
    alone = torch.cat([model(text[None]).logits[0] for text in TEXTS])  # (72, V)
    direction, more = torch.randn(72, 97), dict(position_ids=positions_in_documents(ROWS == EOT))
    (alone * direction).sum().div(72).backward()
    expected = gradients(model)
    for checkpointing in (False, True):
        model.zero_grad()
        output = model(ROWS, use_cache=True, **more)
        assert (output.get(CACHE) is None) == checkpointing
        logits = output.logits.flatten(0, 1)
        (logits * direction).sum().div(72).backward()
        close(logits, alone)
        close(gradients(model), expected)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.eval()
    for name in ("use_cache", "output_attentions"):
        close(model(ROWS, **more, **{name: True}).logits.flatten(0, 1), alone)
    assert (model(ROWS).logits.flatten(0, 1) - alone).abs().max() > 0.01
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": text.tolist()} for text in TEXTS])
    labels, positions = batch.pop("labels"), batch.pop("position_ids")
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} < batch.keys()
    loss = F.cross_entropy(alone[:-1], labels[0, 1:])
    for more in (dict(), dict(position_ids=positions)):
        close(model(**batch, **more, labels=labels).loss, loss)
        close(model.lm_head(model.base_model(**batch, **more).last_hidden_state)[0], alone)  # as TRL does


@pytest.mark.slow
def test_compiled_blocks_have_one_graph_for_all_documents():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = strong(GPTLMHeadModel(tiny(use_moe=False))).train()
    batches = ROWS, ROWS.clamp(min=1), ROWS.flip(0)
    forward = lambda rows: model(rows, position_ids=positions_in_documents(rows == EOT)).logits  # noqa: E731
    eager = [forward(rows) for rows in batches]
    model.transformer.h[0].compile(fullgraph=True, backend="aot_eager")
    close([forward(rows) for rows in batches], eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("ranks", [1, *slow(2)])
def test_a_run_on_documents_resumes(data, tmp_path, capsys, ranks):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for path in folder.glob("*.bin"):
        text = read_shard(path)
        text[np.cumsum(np.random.default_rng(0).integers(1, 100, len(text) // 101))] = 256
        write_shard(path, text)
    same = "--align documents --document_mask True --dropout 0 --max_steps 6 --activation_checkpointing block"
    assert train_gpt_moe.main(flags(folder, tmp_path / "a", *same.split())) == 0
    assert re.search(r"\ndocuments .*[1-9]% of tokens dropped", capsys.readouterr().out)
    more = *same.split(), "--B", 4 // ranks, "--resume", tmp_path / "a" / "model_00003.pt"
    resumed = flags(folder, tmp_path / "b", *more)
    if ranks == 1:
        assert train_gpt_moe.main(resumed) == 0
    else:
        run_ranks(ranks, resumed, tmp_path / "out.txt")
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a")[3:], rel=1e-4)
