"""Begin with other weights: a dense model becomes a Mixture-of-Experts, or a run trains a model further."""

import pytest
import torch
from conftest import refuses
from models import dense_model, strong, tiny, tokens
from processes import equal, flags, metrics

import train_gpt_moe
from training.checkpoints import load_checkpoint
from training.upcycle import upcycle


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("K", "norm"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_upcycling_changes_no_logit(score, K, norm, activation):
    dense = strong(dense_model(activation=activation))
    fields = dict(num_experts_per_tok=K, router_score=score, norm_topk_prob=norm, activation=activation)
    model = upcycle(dense, tiny(num_experts=8, **fields)).eval()
    wanted = dense(input_ids=tokens()).logits
    limit = 1e-5 * wanted.abs().max().item()
    torch.testing.assert_close(model(input_ids=tokens()).logits, wanted, atol=limit, rtol=0)
    model.train()
    model(tokens(), targets=tokens())
    used = (model.moe_layers()[0].get_usage_counts() > 0).sum()
    assert used > K  # tokens are spread already at the first step


def test_upcycled_experts_are_in_use_at_once_and_part_ways():
    """With K = 2, hardly one of 2 x 8 experts is idle in any of the first steps, and no two stay equal."""
    dense, idle, steps = strong(dense_model(), std=0.1), 0, 20
    model = upcycle(dense, tiny(num_experts=8, num_experts_per_tok=2)).train()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model.update_routers()
    for step in range(steps):
        text = tokens(8, 25, seed=step)
        model(text[:, :-1], targets=text[:, 1:])[1].backward()
        model.update_routers()
        optimizer.step()
        optimizer.zero_grad()
        idle += sum((moe.last_step_counts() == 0).sum().item() for moe in model.moe_layers())
    for moe in model.moe_layers():
        for projection in (moe.experts.c_fc, moe.experts.c_proj):
            assert torch.pdist(projection.flatten(1)).min() > 1e-2
    assert idle / steps < 1


def test_upcycling_every_other_layer_and_what_it_refuses():
    dense = dense_model()
    mixed = upcycle(dense, tiny(moe_every=2)).eval()
    assert len(mixed.moe_layers()) == 1
    logits = (model(input_ids=tokens()).logits for model in (mixed, dense))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    refused = {
        "has experts already": (mixed, {}), "does not fit the new model": (dense, dict(n_layer=1)),
        "num_shared_experts=1": (dense, dict(num_shared_experts=1)),
        "expert_hidden_size=8.*--expert_hidden_size 256": (dense, dict(expert_hidden_size=8)),
    }  # fmt: skip
    for message, (source, fields) in refused.items():
        refuses(message, upcycle, source, tiny(**fields))


def begin(source, data, log_dir, *more) -> list:
    """Flags of a new run with the weights of `source`."""
    words = ["--init_from", source, "--data_dir", data, "--log_dir", log_dir]
    words += "--B 4 --T 32 --total_batch_size 256 --warmup_steps 0".split()
    words += "--device cpu --use_compile 0 --plot 0 --tensorboard 0 --sample_every 0 --val_steps 2".split()
    return [*map(str, words), *map(str, more)]


def test_upcycling_end_to_end(data, tmp_path, capsys):
    """The validation loss is that of the dense run; preset and flags decide about experts, the source about
    all else. Killed and resumed with the same command, the run continues from its own checkpoint."""
    dense, log_dir = tmp_path / "dense", tmp_path / "moe"
    assert train_gpt_moe.main(flags(data, dense, "--use_moe", False, "--max_steps", 3)) == 0
    more = "--preset moe-small --max_steps 2 --checkpoint_every 1".split()
    assert train_gpt_moe.main(begin(dense / "latest", data, log_dir, *more)) == 0
    assert "use_moe=False; --use_moe True turns its MLPs into experts" in capsys.readouterr().out
    more += "--use_moe True --expert_hidden_size 128".split()
    assert train_gpt_moe.main(begin(dense / "latest", data, log_dir, *more)) == 0
    assert metrics(log_dir)[0]["val_loss"] == pytest.approx(metrics(dense)[-1]["val_loss"], abs=1e-5)
    state = load_checkpoint(log_dir / "model_00002.pt")
    assert state["config"]["num_experts"] == 8 and state["config"]["n_embd"] == 32
    assert state["train_config"]["n_embd"] == 32 and state["train_config"]["dropout"] == 0.1
    (log_dir / "model_00002.pt").unlink()
    assert train_gpt_moe.main(begin(dense / "latest", data, log_dir, *more, "--resume", "auto")) == 0
    assert equal(state["model"], load_checkpoint(log_dir / "model_00002.pt")["model"])


def test_flags_that_contradict_the_weights_are_refused(straight, data, tmp_path, refused):
    for flag, value in (("n_layer", 3), ("num_experts", 8), ("use_moe", False), ("T", 64)):
        words = begin(straight / "latest", data, tmp_path, "--max_steps", 1, f"--{flag}", value)
        assert f"{flag}={value}, but init_from={straight}" in refused(train_gpt_moe.main, *words)
    assert not (tmp_path / "log.txt").exists()


def test_a_new_run_may_have_a_shorter_text_and_another_balance_loss(straight, data, tmp_path):
    more = "--max_steps 1 --T 16 --block_size 16 --moe_loss_type diversity_regularization".split()
    assert train_gpt_moe.main(begin(straight / "latest", data, tmp_path, *more)) == 0
    config = load_checkpoint(tmp_path / "latest")["config"]
    assert config["block_size"] == 16 and config["moe_loss_type"] == "diversity_regularization"
    assert metrics(tmp_path)[0]["val_loss"] < 5.0  # the weights came along: a fresh model has log 384 = 5.95
