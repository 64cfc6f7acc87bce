"""torch.compile stays on through validation, sampling and checkpoints, with few graphs and no breaks.

Run: python -m pytest tests/test_compile.py
"""

import pytest
import torch
from conftest import needs_compiler
from processes import finish, flags, start_ranks, write_data
from test_train import TINY, losses

import train_gpt_moe
from tokens.demo import prepare_demo

pytestmark = needs_compiler


def test_a_compiled_run_makes_few_graphs_and_equals_the_eager_one(tmp_path):
    """Evaluation, sampling and checkpoints in mid-run compile nothing."""
    prepare_demo(tmp_path / "data")
    flags = [*TINY, "--data_dir", str(tmp_path / "data"), "--B", "8", "--tensorboard", "False"]
    flags += ["--max_steps", "7", "--infer_step", "2", "--checkpoint_every", "3"]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name in ("eager", "compiled"):
        more = ["--log_dir", str(tmp_path / name), "--use_compile", str(name == "compiled")]
        assert train_gpt_moe.main([*flags, *more]) == 0
    # One graph for both blocks and all steps, and one when the routers learn that steps are being marked.
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert compiled == pytest.approx(eager, rel=1e-4)
    state = torch.load(tmp_path / "compiled" / "model_00007.pt")["model"]
    assert not any("_orig_mod" in name for name in state)


def test_two_compiled_ranks_equal_one_eager(tmp_path):
    """Blocks are compiled whole under DDP, too (the script raises where one is not)."""
    data = write_data(tmp_path / "bytes")
    more = ["--n_layer", 1, "--max_steps", 3, "--hellaswag", 0, "--dropout", 0]
    assert train_gpt_moe.main(flags(data, tmp_path / "one", *more)) == 0
    more += ["--use_compile", "True", "--B", 2]
    ranks = start_ranks(2, flags(data, tmp_path / "two", *more), tmp_path / "out.txt")
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "out.txt").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
