"""Clients that nobody here wrote: TRL, PEFT and lm_eval, on exported folders and on GPTLMHeadModel.

Run: pip install trl peft lm_eval && python -m pytest -m slow tests/huggingface/test_clients.py"""

import copy
import math

import pytest
import torch
from models import ARCHITECTURES, WORDS, byte_model, strong, tiny, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from huggingface.export import export_folder
from model import GPTLMHeadModel

pytestmark = pytest.mark.slow
STEPS, TRUST = 3, dict(trust_remote_code=True)
TEXTS = [" ".join(WORDS[i : i + 3]) for i in range(4)]
DATA = {
    "SFT": dict(text=TEXTS),
    "DPO": dict(prompt=["a man "] * 4, chosen=TEXTS, rejected=["zx"] * 4),
    "GRPO": dict(prompt=["a man ", "he "] * 6),
    "Reward": dict(chosen=TEXTS, rejected=["zx"] * 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model of two layers, the second with experts."""
    path = tmp_path_factory.mktemp("clients") / "own"
    export_folder(byte_model(moe_every=2), path)
    return path


def load(folder, source, kind=AutoModelForCausalLM, **settings):
    """The model of the folder by its own code, or the same model of ours."""
    if source == "folder":
        return kind.from_pretrained(folder, **TRUST, **settings)
    return byte_model(moe_every=2)


def train(folder, tmp_path, method, model, **more):
    """The losses that TRL logs in STEPS steps, and the trained model."""
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset

    settings = dict(GRPO=dict(max_completion_length=8, num_generations=4)).get(method, dict(max_length=40))
    args = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=4,
        max_steps=STEPS, logging_steps=1, learning_rate=1e-3, lr_scheduler_type="constant", seed=1,
        **TRUST, **settings,
    )  # fmt: skip
    words = AutoTokenizer.from_pretrained(folder, **TRUST)
    data = Dataset.from_dict(DATA[method])
    trainer = getattr(trl, f"{method}Trainer")(
        model=model, args=args, train_dataset=data, processing_class=words, **more
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer.model


@pytest.mark.parametrize("source", ["folder", "GPTLMHeadModel"])
def test_sft_is_a_plain_loop(folder, tmp_path, source):
    """With one MoE layer TRL's loss is ours, the balance loss included. So are three steps of AdamW."""
    losses, _ = train(folder, tmp_path, "SFT", load(folder, source))
    words = AutoTokenizer.from_pretrained(folder, **TRUST)
    batch = words([text + words.eos_token for text in TEXTS], padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = load(folder, "GPTLMHeadModel").train()
    optimizer, expected = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0), []
    for _ in range(STEPS):
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(output.loss.item())
        assert output.loss > output.cross_entropy + 0.005
    assert losses == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("method, source", [
    ("DPO", "folder"), ("DPO", "GPTLMHeadModel"), ("GRPO", "folder"), ("GRPO", "GPTLMHeadModel"),
    ("Reward", "folder"),  # a GPTLMHeadModel has no score
])  # fmt: skip
def test_trl_trains(folder, tmp_path, method, source):
    kind, settings, more = AutoModelForCausalLM, {}, {}
    if method == "Reward":
        kind, settings = AutoModelForSequenceClassification, dict(num_labels=1)
    model = load(folder, source, kind, **settings)
    if method == "GRPO":
        more["reward_funcs"] = lambda completions, **rest: [float(len(set(text))) for text in completions]
    if method == "DPO" and source == "GPTLMHeadModel":  # TRL loads the reference from the policy's folder
        more["ref_model"] = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses, trained = train(folder, tmp_path, method, model, **more)
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert method == "GRPO" or losses[-1] < losses[0]
    for name, value in trained.named_parameters():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["PrefixTuning", "PromptTuning"])
def test_generating_after_a_tuned_prompt_equals_the_plain_loop(method, name):
    peft = pytest.importorskip("peft", reason="needs peft")
    model, ids = strong(GPTLMHeadModel(tiny(**ARCHITECTURES[name]))), tokens(B=2, T=5)
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    alone = model.generate(ids, **how)
    tuned = peft.get_peft_model(
        model, getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tuned.eval()
    by_hand = ids
    with torch.no_grad():
        for _ in range(8):
            mask = torch.ones_like(by_hand)
            chosen = tuned(input_ids=by_hand, attention_mask=mask).logits[:, -1:].argmax(-1)
            by_hand = torch.cat([by_hand, chosen], dim=1)
    found = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(found, by_hand) and not torch.equal(found, alone)
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(part.grad.any() for part in tuned.parameters() if part.requires_grad)


def test_lora_on_attention_and_stacked_experts():
    peft = pytest.importorskip("peft", reason="needs peft")
    experts = ["mlp.experts.c_fc", "mlp.experts.c_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], target_parameters=experts)
    model, ids = strong(GPTLMHeadModel(tiny())), tokens()
    frozen = {name: value.clone() for name, value in model.named_parameters()}
    adapted = peft.get_peft_model(model, config).train()
    learned = [part for part in adapted.parameters() if part.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, 1e-2), []
    for _ in range(3):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0] - 0.5
    logits = adapted.eval()(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)
    changed = {name for name, value in merged.named_parameters() if not torch.equal(value, frozen[name])}
    names = ("attn.c_attn.weight", *experts)
    assert changed == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in names}


def test_lm_eval_gives_our_log_likelihoods(folder):
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("a man", " is seen"), ("he", " pulls up shingles"), ("the roof", " and")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = HFLM(pretrained=str(folder), device="cpu", batch_size=3, **TRUST).loglikelihood(requests)
    model = load(folder, "GPTLMHeadModel")
    for (context, ending), (value, _) in zip(pairs, found, strict=True):
        ids = torch.tensor([list((context + ending).encode())])
        with torch.no_grad():
            logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        assert value == pytest.approx(logs[-len(ending) :].sum().item(), abs=1e-4)
