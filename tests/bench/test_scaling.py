"""Bytes, seconds and memory of every layout: formulas against numbers worked out by hand, and against what
processes really send."""

from collections import defaultdict
from csv import DictReader
from dataclasses import replace

import pytest
from conftest import ROOT, slow
from wire import train_ranks

from bench import __main__ as bench
from bench.traffic import LAYOUTS, Collective, Links, Plan, memory_by_use, step_seconds, step_traffic
from model import GPTConfig
from training.setup import new_model

# 2 layers, C = 8, 4 experts of H = 32, 2 per token, no biases, V = 32, T = 16: P by hand
SMALL = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=32, num_experts=4, num_experts_per_tok=2, bias=False)
OUTSIDE = 32 * 8 + 16 * 8 + 8  # wte, wpe, ln_f
GATES, EXPERTS = 2 * 4 * 8, 2 * 4 * 2 * 32 * 8
BLOCKS = 2 * (8 + 3 * 8 * 8 + 8 * 8 + 8)  # ln_1, c_attn, c_proj, ln_2
INSIDE = GATES + BLOCKS + EXPERTS
P = OUTSIDE + INSIDE
# Losses and signals; and per layer entropy, counts twice, sums of probabilities.
STATISTICS = 9 * 4 + 2 * 8 * (1 + 4 + 4 + 4)
PLAN = Plan(ranks=4, B=2, T=16, dtype="float32")
FSDP = replace(PLAN, parallel="fsdp")


def model(**fields):
    return new_model(GPTConfig(block_size=16, **SMALL | fields), "fsdp")


def sent(collectives: list[Collective]) -> dict[str, float]:
    """Bytes that each rank sends, by kind of collective."""
    total = defaultdict(float)
    for collective in collectives:
        total[collective.kind] += collective.sent
    return {kind: size for kind, size in total.items() if size}


def test_seconds_of_links():
    links = Links(100.0, 10.0, per_machine=4, latency=0.5)
    assert links.seconds(Collective("all_gather", 400.0, 1)) == 0
    assert links.seconds(Collective("all_gather", 400.0, 4, calls=3)) == 3 * 0.5 * 2 + 3.0
    assert links.seconds(Collective("all_gather", 800.0, 8)) == 0.5 * 3 + 700 / (4 * 10)  # four cards
    assert links.seconds(Collective("all_gather", 800.0, 8, stride=4)) == 0.5 * 3 + 700 / 10  # one each
    # 100 bytes for each of 8 ranks: 3 within the machine, 4 out of it
    assert links.seconds(Collective("all_to_all", 800.0, 8)) == 0.5 * 3 + 400 / 10
    fast = Links(100.0, 1000.0, per_machine=4, latency=0)
    assert fast.seconds(Collective("all_reduce", 800.0, 8)) == 1400 / 100  # NVLink is the narrow part


def test_what_hides_behind_what():
    """ddp: one bucket, all too late. fsdp: only the first group of the gathers, and of the scatters."""
    links = Links(1e6, 1e6, per_machine=4, latency=0.0)
    step, communication, waits = step_seconds(model(), PLAN, links, 3.0, 1.0)
    assert waits == communication == pytest.approx(1.5 * (4 * P + STATISTICS) / 1e6) and step == 4.0 + waits
    fsdp = replace(FSDP, micro_steps=2)
    gathers = 0.75 * 4 * (OUTSIDE + 2 * INSIDE) / 1e6
    scatters, rest = 0.75 * 4 * P / 1e6, 1.5 * (STATISTICS + 4) / 1e6
    step, communication, waits = step_seconds(model(), fsdp, links, 3.0, 1.0)
    assert communication == pytest.approx(2 * gathers + scatters + rest)
    assert waits == pytest.approx((2 * gathers + scatters) / 3 + rest)  # 2 blocks, so a third is too late
    assert step == pytest.approx(2 * 3.0 + 1.0 / 4 + waits)  # a rank updates a quarter
    slow = step_seconds(model(), fsdp, Links(1e3, 1e3, 4, 0.0), 3.0, 1.0)
    assert slow[2] == pytest.approx(1e3 * communication - 2 * 3.0)  # both phases of both micro-steps are full
    zero = step_seconds(model(), replace(PLAN, zero_stage=1), links, 3.0, 1.0)
    assert zero[0] == pytest.approx(3.25 + zero[1])


@pytest.mark.parametrize("case", [(2, "float32"), *slow((4, "float32"), (2, "bfloat16"))], ids=str)
def test_formulas_equal_what_ranks_send(case, tmp_path):
    """Two micro-steps of every layout, byte by byte, in the calls; and, within the messages' heads and gloo's
    reduce-scatter by an all-reduce, through the network. Two experts on four ranks are cut through."""
    ranks, dtype = case
    fields = SMALL | dict(n_embd=32, vocab_size=128, num_experts=2, num_shared_experts=1, bias=True)
    plan = Plan(ranks=ranks, B=2, T=16, dtype=dtype, micro_steps=2)
    meta = model(**fields)
    found = train_ranks(tmp_path, plan, fields, list(LAYOUTS))
    for name, changes in LAYOUTS.items():
        formula = sent(step_traffic(meta, replace(plan, **changes)))
        for rank in found:
            assert {kind: size for kind, size in rank[name]["sent"].items() if size} == formula, name
        wire = sum(rank[name]["wire"] for rank in found) / ranks
        expected = sum(formula.values()) + formula.get("reduce_scatter", 0)
        assert wire == pytest.approx(expected, rel=0.1), name
        mean = sum(rank[name]["held"] for rank in found) / ranks
        uses = memory_by_use(meta, replace(plan, **changes))
        held = uses["parameters"] + uses["gradients"] + uses["optimizer"]
        assert mean == pytest.approx(held, rel=0.01), name


def test_the_forecast(rows_of):
    command = "scale --size d12-moe8x2 --micro_ms 90 --update_ms 8 --dtype bfloat16 --ranks 1,8,1024"
    rows = rows_of(bench.main, *command.split())
    assert [(row["layout"], row["ranks"]) for row in rows[3:6]] == [("zero", n) for n in ("1", "8", "1024")]
    assert rows[11]["layout"] == "ep 128 x 8" and rows[11]["tokens/step"] == str(1024 * 16 * 1024)
    assert rows[0]["tokens/s"] == str(round(2**19 / (32 * 0.09 + 0.008)))
    with open(ROOT / "docs" / "measurements" / "scale_forecast.csv") as file:
        shown = {line["layout"].split()[0]: line for line in DictReader(file) if line["ranks"] == "1024"}
    for row in rows[2:12:3]:
        memory = float(shown[row["layout"].split()[0]]["GiB per rank (forecast)"])
        assert memory == pytest.approx(float(row["GiB per rank"]), abs=0.06)
    efficiency = [float(row["efficiency %"]) for row in rows]
    assert (efficiency[0], max(efficiency)) == pytest.approx((100, 100))
