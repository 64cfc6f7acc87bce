"""Training under transformers.Trainer, and the callbacks that report how experts are used.

Run: python -m pytest tests/huggingface/test_callbacks.py
"""

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import finish, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from mixture_of_experts import expert_usage
from model import GPT, GPTConfig, GPTLMHeadModel, MoEUsageLoggingCallback, MoEUsageTensorBoardCallback
from training import parallel

ROWS, T = 8, 16


def tiny(**fields) -> GPTConfig:
    defaults = dict(
        n_layer=2, n_head=2, n_embd=32, vocab_size=61, block_size=T, num_experts=4, num_experts_per_tok=2,
        moe_loss_coef=0.5, router_z_loss_coef=0.05,
    )  # fmt: skip
    return GPTConfig(**defaults | fields)


def build(cls=GPTLMHeadModel, **fields):
    torch.manual_seed(0)
    model = cls(tiny(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.normal_(std=0.2)
    return model


def ragged_rows() -> list[dict]:
    """Eight texts of 2 to 16 tokens, padded on the right; most labels of some are left out as well."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (ROWS, T), generator=generator)
    lengths = torch.tensor([16, 2, 9, 16, 4, 12, 3, 16])
    mask = (torch.arange(T) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[3, :13] = -100
    return [dict(input_ids=ids[i], attention_mask=mask[i], labels=labels[i]) for i in range(ROWS)]


def arguments(folder, batch=8, accumulation=1, **more) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=3, learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=7,
        per_device_eval_batch_size=8, logging_nan_inf_filter=False, optim="sgd",
    )  # fmt: skip
    return TrainingArguments(**settings | more)


def train(model, folder, callbacks=None, resume=None, data=None, **settings) -> Trainer:
    """Every step is over all eight rows, whatever their order."""
    data = data or ragged_rows()
    callbacks = [MoEUsageLoggingCallback()] if callbacks is None else callbacks
    trainer = Trainer(
        model=model, args=arguments(folder, **settings), train_dataset=data, eval_dataset=data,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def assert_same_weights(model, expected):
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert (a.double() - b.double()).abs().max() < 2e-6, name


# -----------------------------------------------------------------------------
# Trainer


@pytest.fixture(scope="module")
def whole_batch():
    """Three steps of gradient descent in float64, all rows in one call: the model and the losses."""
    model = build().double()
    batch = {name: torch.stack([row[name] for row in ragged_rows()]) for name in ragged_rows()[0]}
    found = []
    model.update_routers()
    for _ in range(3):
        count = (batch["labels"][:, 1:] != -100).sum()
        output = model(**batch, num_items_in_batch=count)
        model.zero_grad()
        output.loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.update_routers()
        found.append(output.loss.item())
    return model, found


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_trainer_equals_one_whole_batch_however_it_is_cut(batch, accumulation, whole_batch, tmp_path):
    expected, expected_losses = whole_batch
    trainer = train(build(), tmp_path, batch=batch, accumulation=accumulation)
    assert losses(trainer) == pytest.approx(expected_losses, rel=2e-5)
    assert_same_weights(trainer.model, expected)
    assert (expected.lm_head.weight - build().lm_head.weight).abs().max() > 1e-2  # they did move


def test_the_reference_of_these_tests_is_the_cross_entropy_and_the_auxiliary_losses(whole_batch):
    """Its first loss from the definitions, token by token."""
    model, rows = build().double().eval(), ragged_rows()
    found, routers = [], []
    for moe in model.moe_layers():
        moe.gate.register_forward_hook(lambda gate, inputs, logits: routers.append(logits))
    total_z, kept = 0.0, 0
    for row in rows:
        routers.clear()
        logits = model(row["input_ids"][None]).logits[0]
        for t in range(T - 1):
            if row["labels"][t + 1] != -100:
                found.append(F.cross_entropy(logits[t], row["labels"][t + 1]))
                total_z += sum(router[t].logsumexp(-1).square() for router in routers)
                kept += 1
    balance = 2 * 1.0  # layers; in the first step the experts' fractions are taken for equal
    expected = torch.stack(found).mean() + 0.05 * total_z / kept + 0.5 * balance
    assert whole_batch[1][0] == pytest.approx(expected.item(), rel=1e-6)


def test_without_a_callback_the_balance_loss_is_each_micro_batchs_own(tmp_path):
    trainer = train(build(), tmp_path, callbacks=[])
    model = build()
    batch = {name: torch.stack([row[name] for row in ragged_rows()]) for name in ragged_rows()[0]}
    count = (batch["labels"][:, 1:] != -100).sum()
    assert losses(trainer)[0] == pytest.approx(model(**batch, num_items_in_batch=count).loss.item(), rel=1e-5)
    assert not any(moe.step_managed for moe in trainer.model.moe_layers())


@pytest.mark.parametrize("cls", [GPT, GPTLMHeadModel])
def test_evaluation_has_no_auxiliary_terms_and_leaves_no_trace(cls, tmp_path):
    data = ragged_rows()
    trainer = train(build(cls), tmp_path, data=data, batch=4, accumulation=2, max_steps=1)
    model = trainer.model
    before = copy.deepcopy(model.state_dict())
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(**batch)["logits"]
    targets = batch["labels"][:, 1:].reshape(-1)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 61), targets, ignore_index=-100).item()
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert expected < losses(trainer)[0] - 0.5
    predictions = trainer.predict(data)
    assert predictions.predictions.shape == (ROWS, T, 61)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_smoothed_labels_are_shifted(tmp_path):
    """Trainer has the loss then, and shifts labels for models it knows to be causal language models."""
    model = build(use_moe=False).eval()
    trainer = Trainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.1))
    batch = {name: torch.stack([row[name] for row in ragged_rows()]) for name in ragged_rows()[0]}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(*rows, label_smoothing=0.1)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1: .* without the experts' balance"):
        train(build(), tmp_path, label_smoothing_factor=0.1)


def test_resuming_is_bit_identical(tmp_path):
    settings = dict(
        batch=2, accumulation=2, max_steps=6, save_strategy="steps", save_steps=3, optim="adamw_torch",
        learning_rate=1e-2, lr_scheduler_type="cosine", max_grad_norm=1.0,
    )  # fmt: skip
    fields = dict(dropout=0.1, router_bias_update_rate=0.01)
    straight = train(build(**fields), tmp_path / "a", **settings)
    fresh = build(**fields)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.zero_()  # all must come from the checkpoint
    resumed = train(fresh, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"), **settings)
    assert losses(resumed)[3:] == losses(straight)[3:] and len(losses(resumed)) == 6
    state = resumed.model.state_dict()
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert straight.model.moe_layers()[0].router_bias.count_nonzero() > 0
    # a checkpoint is also a folder of ours
    loaded = GPTLMHeadModel.from_pretrained(tmp_path / "b" / "checkpoint-6").state_dict()
    unreported = "usage"  # the callback reports at the end of the epoch, after the checkpoint
    assert all(torch.equal(value, loaded[name]) for name, value in state.items() if unreported not in name)


def test_gradient_checkpointing_and_bfloat16(whole_batch, tmp_path):
    expected, expected_losses = whole_batch
    for reentrant in (True, False):
        trainer = train(
            build(), tmp_path, batch=2, accumulation=4, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        assert losses(trainer) == pytest.approx(expected_losses, rel=2e-5)
        assert_same_weights(trainer.model, expected)
    trainer = train(build(), tmp_path, batch=2, accumulation=4, bf16=True)
    assert losses(trainer) == pytest.approx(expected_losses, rel=0.02)
    assert losses(trainer) != pytest.approx(expected_losses, rel=1e-5)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def main(arguments: list[str]) -> int:
    """One of two processes that train together."""
    (folder,) = arguments
    alone = Recording(log_interval=2)
    trainer = train(build(), folder, callbacks=[alone], batch=2, accumulation=2)
    assert dist.get_world_size() == 2
    counts = [moe.get_usage_counts().tolist() for moe in trainer.model.moe_layers()]
    evaluated = trainer.evaluate()["eval_loss"]
    # Nobody adds up the ranks' counts here until they are asked for: DDP must leave each rank its own.
    plain = train(build(), folder, callbacks=[], batch=2, accumulation=2)
    usage = [usage.counts.tolist() for usage in expert_usage(plain.model.moe_layers())]
    if dist.get_rank() == 0:
        torch.save(trainer.model.state_dict(), folder + "/weights.pt")
        found = dict(losses=losses(trainer), reports=alone.found, counts=counts)
        result = found | dict(evaluated=evaluated, usage=usage)
        Path(folder, "result.json").write_text(json.dumps(result))
    else:
        assert not alone.found  # only the master reports
    del trainer, plain  # DDP before its process group
    parallel.stop()
    return 0


def test_two_processes_equal_one(whole_batch, tmp_path):
    expected, expected_losses = whole_batch
    ranks = start_ranks(2, [tmp_path], tmp_path / "output", script="test_callbacks")
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "output").read_text()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["losses"] == pytest.approx(expected_losses, rel=2e-5)
    model = build()
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert_same_weights(model, expected)

    alone = Recording(log_interval=2)
    trainer = train(build(), tmp_path / "alone", callbacks=[alone], batch=4, accumulation=2)
    assert alone.found == [(step, counts) for step, counts in map(tuple, result["reports"])]
    assert [sum(counts) for counts in result["usage"]] == [3 * 2 * counted_tokens()] * 2
    assert result["counts"] == [moe.get_usage_counts().tolist() for moe in trainer.model.moe_layers()]
    assert result["evaluated"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


# -----------------------------------------------------------------------------
# Callbacks


class Recording(MoEUsageLoggingCallback):
    """Keeps what would be logged."""

    def __init__(self, log_interval):
        super().__init__(log_interval=log_interval)
        self.found = []

    def _report(self, counts, step):
        self.found.append((step, [count.tolist() for count in counts]))


def counted_tokens() -> int:
    return sum(int((row["labels"][1:] != -100).sum()) for row in ragged_rows())


def test_reports_cover_every_step_once_for_callbacks_with_other_intervals(tmp_path):
    callbacks = [Recording(log_interval=n) for n in (1, 2, 5)]
    how = dict(batch=4, accumulation=2, max_steps=5, gradient_checkpointing=True)
    train(build(), tmp_path, callbacks=callbacks, **how)
    every, second, fifth = ([step for step, _ in callback.found] for callback in callbacks)
    # an epoch is one step here, and its end reports what the interval has not
    assert every == second == fifth == [1, 2, 3, 4, 5]
    totals = [torch.tensor([counts for _, counts in callback.found]).sum(0) for callback in callbacks]
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert totals[0].sum(-1).tolist() == [5 * 2 * counted_tokens()] * 2  # steps * K * tokens, for each layer


def test_intervals_reset_and_counts_by_hand():
    """The callbacks' methods called as Trainer calls them, on routings counted from the router itself."""
    model, state, control = build(), TrainerState(is_world_process_zero=True), TrainerControl()
    arguments = SimpleNamespace(output_dir="unused")
    routed = torch.zeros(2, 4, dtype=torch.long)
    for layer, moe in enumerate(model.moe_layers()):

        def count(gate, inputs, logits, layer=layer):
            chosen = logits.softmax(-1).topk(2).indices.flatten()
            routed[layer] += torch.bincount(chosen, minlength=4)

        moe.gate.register_forward_hook(count)
    short, long = Recording(log_interval=2), Recording(log_interval=3)
    for callback in (short, long):
        callback.on_train_begin(arguments, state, control, model=model)
    expected = []
    for step in range(1, 7):
        for part in range(2):
            ids = torch.randint(0, 61, (3, T), generator=torch.Generator().manual_seed(10 * step + part))
            model(ids, targets=ids)
        expected.append(routed.clone())
        routed.zero_()
        model.eval()
        model(ids)
        model.train()
        routed.zero_()  # what evaluation routed must not be reported
        state.global_step = step
        for callback in (short, long):
            callback.on_step_end(arguments, state, control, model=model)
        reported = step % 2 == 0 or step % 3 == 0
        assert reported == all(moe.get_usage_counts().sum() == 0 for moe in model.moe_layers())
    total = [sum(expected[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert short.found == list(zip((2, 4, 6), total, strict=True))
    total = [sum(expected[i : i + 3]).tolist() for i in (0, 3)]
    assert long.found == list(zip((3, 6), total, strict=True))
    assert short._get_moe_layers(torch.nn.Sequential(model)) == model.moe_layers()
    short.on_epoch_end(arguments, state, control, model=model)
    assert len(short.found) == 3  # nothing new since step 6


def test_log_lines(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(build(), tmp_path, callbacks=[MoEUsageLoggingCallback(logging.getLogger("MoELogger"), 2)])
    lines = [record.getMessage() for record in caplog.records if record.name == "MoELogger"]
    expected = [f"step {step} MoE layer {layer}" for step in (1, 2, 3) for layer in (0, 1)]
    assert [line.split(":")[0] for line in lines] == expected
    rows = 2 * counted_tokens()
    assert all(f": {rows} assignments, max/mean " in line and line.count("%") == 4 for line in lines)
    shares = [float(share) for share in lines[0].split("shares ")[1].replace("%", "").split()]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert MoEUsageLoggingCallback().log_interval == 100


def test_a_dense_model_has_nothing_to_report(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        callbacks = [MoEUsageLoggingCallback(log_interval=1)]
        train(build(use_moe=False), tmp_path, callbacks=callbacks, max_steps=1)
    assert "MoE layer" not in caplog.text


@pytest.mark.parametrize("cls", [MoEUsageLoggingCallback, MoEUsageTensorBoardCallback])
def test_an_interval_below_one_step_is_refused(cls):
    with pytest.raises(ValueError, match="log_interval=0: must be at least 1 step"):
        cls(log_interval=0)


def read_events(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    return events.Reload()


def test_tensorboard(tmp_path):
    writer = SummaryWriter(str(tmp_path / "given"))
    given = MoEUsageTensorBoardCallback(log_interval=2, tb_writer=writer)
    own = MoEUsageTensorBoardCallback(log_interval=2)
    closed = []
    writer.close = lambda: closed.append(True)
    train(build(), tmp_path / "out", callbacks=[given, own])
    assert not closed and given.tb_writer is writer  # open: the caller's
    assert own.tb_writer is None  # closed: the callback's
    writer.add_scalar("afterwards", 1.0, 4)
    writer.flush()
    for folder in (tmp_path / "given", tmp_path / "out" / "runs"):
        events = read_events(folder)
        for layer in (0, 1):
            scalars = [events.Scalars(f"moe/layer_{layer}/expert_{expert}") for expert in range(4)]
            shares = [[event.value for event in expert] for expert in scalars]
            assert torch.tensor(shares).sum(0).tolist() == pytest.approx([1.0, 1.0])
            load = events.Scalars(f"moe/layer_{layer}/max_load")
            assert [event.step for event in load] == [2, 3]  # the interval, and the end
            assert load[0].value == pytest.approx(4 * max(share[0] for share in shares), rel=1e-5)
            histogram = events.Histograms(f"moe/layer_{layer}/counts")[0].histogram_value
            assert histogram.num == 4 and histogram.sum == 2 * 2 * counted_tokens()
