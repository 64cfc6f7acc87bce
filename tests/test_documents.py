"""Documents in one row do not see each other: masks, positions, packed batches of transformers, whole runs.

Run: python -m pytest tests/test_documents.py"""

import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from models import gradients, strong, tiny, tokens
from processes import flags, losses, run_ranks
from transformers import DataCollatorWithFlattening

import train_gpt_moe
from layers.attention import positions_in_documents
from model import GPTLMHeadModel
from tokens.shards import read_shard, write_shard

EOT = 0
MODELS = {
    "dense, learned": dict(use_moe=False), "MoE": dict(),
    "modern": dict(position="rope", n_kv_head=2, qk_norm=True, sliding_window=4, global_every=2),
    "eager": dict(attn_implementation="eager", sliding_window=4, position="rope"),
}  # fmt: skip
ENDS = [[0, 5, 6, 24], [0, 24], [0, 11, 18, 24]]  # of the documents in each row


def rows_of_documents() -> torch.Tensor:
    """Three rows of documents, (3, 24), which begin with EOT."""
    rows = tokens().clamp(min=1)
    for row, ends in zip(rows, ENDS, strict=True):
        row[ends[:-1]] = EOT
    return rows


def one_by_one(model, rows) -> torch.Tensor:
    """Logits (B, T, V) of the documents, each in a row of its own."""
    spans = [[row[None, a:b] for a, b in pairwise(ends)] for row, ends in zip(rows, ENDS, strict=True)]
    return torch.stack([torch.cat([model(ids).logits[0] for ids in row]) for row in spans])


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_documents_in_a_row_equal_the_documents_one_by_one(name):
    """In training and evaluation, with cache and checkpointing, forward and gradients."""
    model, rows = strong(GPTLMHeadModel(tiny(**MODELS[name])), 0.1), rows_of_documents()
    positions, direction = positions_in_documents(rows == EOT), torch.randn(3, 24, 97)
    (one_by_one(model.train(), rows) * direction).mean().backward()
    expected = gradients(model)
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        (model(rows, position_ids=positions).logits * direction).mean().backward()
        close(gradients(model), expected)
    with torch.no_grad():
        alone = one_by_one(model.eval(), rows)
        for more in (dict(use_cache=True), dict(output_attentions=True)):
            close(model(rows, position_ids=positions, **more).logits, alone)
        assert (model(rows).logits - alone).abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_packed_batches_of_transformers_equal_the_texts_one_by_one(name):
    """As Trainer and TRL give them. The row may be longer than block_size, each text may not."""
    model, (text, *_) = strong(GPTLMHeadModel(tiny(**MODELS[name]))).train(), tokens(1, 24).tolist()
    texts = [text[:5], text[5:6], text, text[7:]]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": ids} for ids in texts])
    labels, positions = batch.pop("labels"), batch.pop("position_ids")
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} < batch.keys()
    alone = torch.cat([model(torch.tensor([ids])).logits for ids in texts], dim=1)
    for more in (dict(), dict(position_ids=positions)):
        close(model(**batch, **more).logits, alone)
        loss = F.cross_entropy(alone[0, :-1], labels[0, 1:])
        close(model(**batch, **more, labels=labels).cross_entropy, loss)
        close(model.lm_head(model.base_model(**batch, **more).last_hidden_state), alone)  # as TRL does


def test_compiled_blocks_have_one_graph_for_all_documents():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, documents = strong(GPTLMHeadModel(tiny(use_moe=False))).train(), rows_of_documents()
    batches = documents, tokens().clamp(min=1), documents.flip(0)  # one without documents
    positions = [positions_in_documents(rows == EOT) for rows in batches]
    eager = [model(*pair).logits for pair in zip(batches, [None] * 3, positions, strict=True)]
    model.transformer.h[0].compile(fullgraph=True, backend="aot_eager")
    for *pair, expected in zip(batches, [None] * 3, positions, eager, strict=True):
        close(model(*pair).logits, expected)
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
