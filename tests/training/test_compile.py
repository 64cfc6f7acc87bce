"""torch.compile stays on through validation, sampling and checkpoints, with few graphs and no breaks."""

import functools

import pytest
import torch
from conftest import slow
from devices import needs_compiler
from processes import flags, losses, read_rows, run_ranks

import train_gpt_moe
from training import parallel

pytestmark = needs_compiler


@pytest.mark.parametrize("backend", ["aot_eager", *slow("inductor")])
def test_a_compiled_run_makes_few_graphs_and_equals_the_eager_one(data, tmp_path, monkeypatch, backend):
    """aot_eager does all but generate code, which takes its time."""
    if backend == "aot_eager":
        compile_ = functools.partialmethod(torch.nn.Module.compile, backend=backend)
        monkeypatch.setattr(torch.nn.Module, "compile", compile_)
        monkeypatch.setattr(parallel, "check_compiler", lambda device: None)
    more = "--max_steps 5 --infer_step 2 --sample_every 2 --sample_tokens 8 --dropout 0 --use_compile".split()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name in ("eager", "compiled"):
        assert train_gpt_moe.main(flags(data, tmp_path / name, *more, name == "compiled")) == 0
    # One graph for both blocks and all steps, and one when the routers learn that steps are being marked.
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    state = torch.load(tmp_path / "compiled" / "model_00005.pt")["model"]
    assert not any("_orig_mod" in name for name in state)


@pytest.mark.slow
def test_two_compiled_ranks_equal_one_eager(data, tmp_path):
    """Blocks are compiled whole under DDP, too (the script raises where one is not). With these options
    Inductor lost the gradient that the router has from the weights of experts."""
    more = ["--n_layer", 1, "--max_steps", 3, "--hellaswag", 0, "--dropout", 0, "--log_norms", 1]
    more += ["--qk_norm", 1, "--router_score", "sigmoid", "--num_experts_per_tok", 1]
    assert train_gpt_moe.main(flags(data, tmp_path / "one", *more)) == 0
    more += ["--use_compile", "True", "--B", 2]
    run_ranks(2, flags(data, tmp_path / "two", *more), tmp_path / "out.txt")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    norms = [[row["norm/routers"] for row in read_rows(tmp_path / name)] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
