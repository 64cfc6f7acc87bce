"""Training under transformers.Trainer, and the callbacks that report how experts are used."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import refuses, slow
from models import strong, tiny, tokens
from processes import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from layers.roles import role_of
from mixture_of_experts import expert_usage
from model import GPT, GPTLMHeadModel, MoEUsageLoggingCallback, MoEUsageTensorBoardCallback
from training import parallel

ROWS, T, STEPS = 8, 16, 2


def build(cls=GPTLMHeadModel, **fields):
    losses = dict(moe_loss_coef=0.5, router_z_loss_coef=0.05)
    return strong(cls(tiny(n_head=2, n_embd=32, **losses | fields))).train()


def ragged_rows() -> list[dict]:
    """Eight texts of 2 to 16 tokens, padded on the right; most labels of one are left out as well."""
    ids = tokens(ROWS, T)
    mask = (torch.arange(T) < torch.tensor([16, 2, 9, 16, 4, 12, 3, 16])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[3, :13] = -100
    return [dict(input_ids=ids[i], attention_mask=mask[i], labels=labels[i]) for i in range(ROWS)]


def whole() -> dict:
    """All rows as one batch, and the number of their labels."""
    batch = {name: torch.stack([row[name] for row in ragged_rows()]) for name in ragged_rows()[0]}
    return batch | dict(num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())


def arguments(folder, batch=4, accumulation=2, **more) -> TrainingArguments:
    settings = dict(output_dir=str(folder), per_device_train_batch_size=batch,
                    gradient_accumulation_steps=accumulation, max_steps=STEPS, learning_rate=0.1,
                    lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, use_cpu=True,
                    report_to="none", disable_tqdm=True, save_strategy="no", seed=7,
                    per_device_eval_batch_size=8, logging_nan_inf_filter=False, optim="sgd")  # fmt: skip
    return TrainingArguments(**settings | more)


def train(model, folder, callbacks=(MoEUsageLoggingCallback,), resume=None, **settings) -> Trainer:
    """By default every step is over all eight rows, whatever their order."""
    data = dict(train_dataset=ragged_rows(), eval_dataset=ragged_rows())
    trainer = Trainer(model=model, args=arguments(folder, **settings), callbacks=[*callbacks], **data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.fixture(scope="module")
def whole_batch():
    """Steps of gradient descent in float64, all rows in one call: the parameters and the losses."""
    model, found = build().double(), []
    model.update_routers()
    for _ in range(STEPS):
        loss = model(**whole()).loss
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.update_routers()
        found.append(loss.item())
    return {name: p.detach().float() for name, p in model.named_parameters()}, found


@pytest.mark.parametrize("cut", [
    dict(batch=8, accumulation=1), dict(batch=2, accumulation=4),
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    *slow(dict(batch=1, accumulation=8),
          dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})),
], ids=str)  # fmt: skip
def test_trainer_equals_one_whole_batch_however_it_is_cut(cut, whole_batch, tmp_path):
    expected, expected_losses = whole_batch
    trainer = train(build(), tmp_path, **cut)
    assert losses(trainer) == pytest.approx(expected_losses, rel=2e-5)
    torch.testing.assert_close(dict(trainer.model.named_parameters()), expected, rtol=0, atol=2e-6)


def test_evaluation_has_no_auxiliary_terms_and_leaves_no_trace(tmp_path):
    trainer, batch = train(build(GPT), tmp_path, max_steps=1), whole()
    before = copy.deepcopy(trainer.model.state_dict())
    logits = copy.deepcopy(trainer.model).double().eval()(**batch)["logits"]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(ragged_rows()).predictions.shape == (ROWS, T, 97)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_smoothed_labels_are_shifted_and_refused_with_experts(tmp_path):
    """Trainer then computes the loss, and shifts labels for models it knows to be causal language models."""
    model, settings = build(use_moe=False).eval(), arguments(tmp_path, label_smoothing_factor=0.1)
    batch = {name: value for name, value in whole().items() if name != "num_items_in_batch"}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    found = Trainer(model=model, args=settings).compute_loss(model, dict(batch))
    torch.testing.assert_close(found, F.cross_entropy(*rows, label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1: .*balance losses"):
        MoEUsageLoggingCallback().on_train_begin(settings, TrainerState(), TrainerControl(), model=build())


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_trainer_decays_what_our_optimizers_decay(norm, tmp_path):
    model = build(norm=norm, qk_norm=True)
    decayed = Trainer(model=model, args=arguments(tmp_path)).get_decay_parameter_names(model)
    assert set(decayed) == {n for n, _ in model.named_parameters(remove_duplicate=False) if role_of(n).decays}


def test_resuming_is_bit_identical(tmp_path):
    settings = dict(
        batch=2, max_steps=5, save_strategy="steps", save_steps=3, optim="adamw_torch",
        learning_rate=1e-2, lr_scheduler_type="cosine", max_grad_norm=1.0,
    )  # fmt: skip
    fields = dict(dropout=0.1, router_bias_update_rate=0.01)
    straight = train(build(**fields), tmp_path / "a", **settings)
    fresh = build(**fields)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.zero_()  # all must come from the checkpoint
    resumed = train(fresh, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"), **settings)
    assert losses(resumed)[3:] == losses(straight)[3:] and len(losses(resumed)) == 5
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in straight.model.state_dict().items())
    assert straight.model.moe_layers()[0].router_bias.count_nonzero() > 0
    # A checkpoint of Trainer is also a folder of ours. Its usage counts may lack the last report's reset.
    loaded = GPTLMHeadModel.from_pretrained(tmp_path / "b" / "checkpoint-5").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items() if "usage" not in name)


def main(arguments: list[str]) -> dict:
    """One of two processes that train together."""
    (folder,), alone = arguments, Recording(log_interval=2)
    trainer = train(build(), folder, callbacks=[alone], batch=2)
    assert dist.get_world_size() == 2
    evaluated = trainer.evaluate()["eval_loss"]
    # Without the callback nobody adds up the ranks' counts before expert_usage. DDP must not mix them.
    plain = train(build(), folder, callbacks=[], batch=2)
    usage = [usage.counts.tolist() for usage in expert_usage(plain.model.moe_layers())]
    found = dict(losses=losses(trainer), reports=alone.found, evaluated=evaluated, usage=usage)
    found["weights"] = trainer.model.state_dict()
    del trainer, plain  # DDP before its process group
    parallel.stop()
    return found


def test_two_processes_equal_one(whole_batch, tmp_path):
    expected, expected_losses = whole_batch
    alone = Recording(2)
    trainer = train(build(), tmp_path / "alone", callbacks=[alone])
    result, other = run_ranks(2, [tmp_path], tmp_path / "output", script="test_callbacks")
    assert result["losses"] == pytest.approx(expected_losses, rel=2e-5)
    model = build()
    model.load_state_dict(result["weights"])
    torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=2e-6)
    assert alone.found == result["reports"] and not other["reports"]  # only the master reports
    assert [sum(counts) for counts in result["usage"]] == [STEPS * ROUTED] * 2
    assert result["evaluated"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


ROUTED = 2 * int(whole()["num_items_in_batch"])  # rows of a step in each layer: K * tokens that count


class Recording(MoEUsageLoggingCallback):
    """Keeps the counts that would be logged."""

    def __init__(self, log_interval):
        super().__init__(log_interval=log_interval)
        self.found = []

    def _report(self, counts, step):
        self.found.append((step, [count.tolist() for count in counts]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps with many callbacks at once. An epoch is one step, and its end is reported too."""
    folder, lines = tmp_path_factory.mktemp("run"), []
    writer = SummaryWriter(str(folder / "given"))
    given = MoEUsageTensorBoardCallback(log_interval=2, tb_writer=writer)
    own = MoEUsageTensorBoardCallback(log_interval=2)
    logger = SimpleNamespace(info=lines.append)
    callbacks = [Recording(log_interval=5), MoEUsageLoggingCallback(logger, 2), given, own]
    train(build(), folder, callbacks=callbacks, max_steps=5, gradient_checkpointing=True)
    assert given.tb_writer is writer and own.tb_writer is None  # each closes only the writer that it opened
    writer.add_scalar("afterwards", 1.0, 5)
    writer.flush()
    return SimpleNamespace(folder=folder, lines=lines)


def test_log_lines_cover_every_step_once(run):
    expected = [f"step {step} MoE layer {layer}" for step in range(1, 6) for layer in (0, 1)]
    assert [line.split(":")[0] for line in run.lines] == expected
    for line in run.lines:
        assert f": {ROUTED} assignments, max/mean " in line
        shares = [float(share) for share in line.split("shares ")[1].replace("%", "").split()]
        assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)


@pytest.mark.parametrize("folder", ["given", "runs"])
def test_tensorboard(folder, run):
    events = EventAccumulator(str(run.folder / folder), {"scalars": 0, "histograms": 0}).Reload()
    assert ("afterwards" in events.Tags()["scalars"]) == (folder == "given")
    for layer in (0, 1):
        scalars = [events.Scalars(f"moe/layer_{layer}/expert_{expert}") for expert in range(4)]
        shares = torch.tensor([[event.value for event in expert] for expert in scalars])
        assert shares.sum(0).tolist() == pytest.approx([1.0] * 3)
        load = events.Scalars(f"moe/layer_{layer}/max_load")
        assert [event.step for event in load] == [2, 4, 5]  # the interval, and the end
        assert [event.value for event in load] == pytest.approx((4 * shares.amax(0)).tolist(), rel=1e-5)
        histogram = events.Histograms(f"moe/layer_{layer}/counts")[0].histogram_value
        assert histogram.num == 4 and histogram.sum == 2 * ROUTED


def test_a_dense_model_has_nothing_to_report_and_the_interval_is_at_least_one_step():
    logger = SimpleNamespace(info=lambda line: pytest.fail(line))
    callback, rest = MoEUsageLoggingCallback(logger, 1), (None, TrainerState(global_step=1), TrainerControl())
    for event in (callback.on_train_begin, callback.on_step_end, callback.on_epoch_end):
        event(*rest, model=build(use_moe=False))
    for cls in (MoEUsageLoggingCallback, MoEUsageTensorBoardCallback):
        assert cls().log_interval == 100
        refuses("log_interval=0", cls, log_interval=0)
