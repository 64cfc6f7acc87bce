"""Clients that nobody here wrote: TRL and PEFT, on exported folders and on GPTLMHeadModel.

Run: python -m pytest tests/huggingface/test_clients.py -m slow    # after pip install trl peft"""

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


@pytest.mark.parametrize("method, source", [(method, "folder") for method in DATA] + [
    (method, "GPTLMHeadModel") for method in DATA if method != "Reward"] + [("SFT", "packed")])  # fmt: skip
def test_trl(folder, tmp_path, method, source):
    """Every parameter learns. With one MoE layer SFT's losses are a plain loop's, balance loss included."""
    trl, datasets = pytest.importorskip("trl", reason="needs trl"), pytest.importorskip("datasets")
    words, more = AutoTokenizer.from_pretrained(folder, **TRUST), {}
    model = byte_model(moe_every=2)
    if method == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **TRUST)
    elif source == "folder":
        model = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
    elif method == "DPO":  # TRL would load the reference from the policy's folder
        more["ref_model"] = copy.deepcopy(model)
    if method == "GRPO":
        more["reward_funcs"] = lambda completions, **rest: [float(len(set(text))) for text in completions]
    sizes = dict(GRPO=dict(max_completion_length=8, num_generations=4)).get(method, dict(max_length=40))
    sizes |= dict(padding_free=True, max_length=None) if source == "packed" else {}  # all texts in one row
    args = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=4,
        max_steps=STEPS, logging_steps=1, learning_rate=1e-3, lr_scheduler_type="constant", **TRUST, **sizes,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.named_parameters()}
    more |= dict(args=args, train_dataset=datasets.Dataset.from_dict(DATA[method]), processing_class=words)
    trainer = getattr(trl, f"{method}Trainer")(model=model, **more)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert method == "GRPO" or losses[-1] < losses[0]
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    if method == "SFT":
        assert losses == pytest.approx(plain_loop(words), abs=2e-5)


def plain_loop(words) -> list[float]:
    """The losses that SFT should have."""
    batch = words([text + words.eos_token for text in TEXTS], padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model, losses = byte_model(moe_every=2).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss.item())
        assert output.loss > output.cross_entropy + 0.005
    return losses


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "n-grams"])  # vectors have no ids
@pytest.mark.parametrize("method", ["PrefixTuning", "PromptTuning"])
def test_generating_after_a_tuned_prompt_equals_the_plain_loop(method, name):
    peft = pytest.importorskip("peft", reason="needs peft")
    model, ids = strong(GPTLMHeadModel(tiny(**ARCHITECTURES[name]))), tokens(B=2, T=5)
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    alone, by_hand, mask = model.generate(ids, **how), ids, torch.ones(2, 13, dtype=torch.long)
    config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config).eval()
    learned = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    torch.nn.init.normal_(*learned)
    with torch.no_grad():
        for T in range(5, 13):
            logits = tuned(input_ids=by_hand, attention_mask=mask[:, :T]).logits
            by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], dim=1)
    found = tuned.generate(input_ids=ids, attention_mask=mask[:, :5], **how)
    assert torch.equal(found, by_hand) and not torch.equal(found, alone)
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    assert learned[0].grad.any()


def test_lora_on_attention_and_stacked_experts():
    peft = pytest.importorskip("peft", reason="needs peft")
    experts = ["mlp.experts.c_fc", "mlp.experts.c_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], target_parameters=experts)
    model, ids = strong(GPTLMHeadModel(tiny())), tokens()
    frozen = {name: value.clone() for name, value in model.named_parameters()}
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([part for part in adapted.parameters() if part.requires_grad], 1e-2)
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    logits = adapted.eval()(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)
    changed = {name for name, value in merged.named_parameters() if not torch.equal(value, frozen[name])}
    names = "attn.c_attn.weight", *experts
    assert changed == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in names}
