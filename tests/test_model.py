"""The model: interface, configuration, sizes, initialisation, loss, outputs."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from models import ARCHITECTURES, strong, tiny, tokens
from transformers import DynamicCache

import model as model_module
from huggingface.outputs import CACHE
from model import GPT, GPTConfig, GPTLMHeadModel

MODERN = ARCHITECTURES["modern"]

DOCUMENTED = """
LayerNorm: __init__(ndim, bias); forward(input)
CausalSelfAttention: __init__(config); forward(x)
MLP: __init__(config); forward(x)
MoE: __init__(config); forward(x); get_auxiliary_loss(); get_usage_counts(); reset_usage_counts()
Block: __init__(config); forward(x)
GPT: __init__(config); get_input_embeddings(); set_input_embeddings(new_embeddings); _init_weights(module)
GPT: get_num_params(non_embedding); configure_optimizers(weight_decay, learning_rate, betas, device_type)
GPT: forward(input_ids); crop_block_size(block_size); estimate_mfu(fwdbwd_per_iter, dt)
GPTLMHeadModel: __init__(config); get_input_embeddings(); set_input_embeddings(new_embeddings)
GPTLMHeadModel: get_output_embeddings(); set_output_embeddings(new_embeddings); forward(input_ids, labels)
GPTLMHeadModel: prepare_inputs_for_generation(input_ids)
MoEUsageLoggingCallback: __init__(logger, log_interval); on_step_end(args, state, control)
MoEUsageLoggingCallback: on_epoch_end(args, state, control); _get_moe_layers(model)
MoEUsageTensorBoardCallback: __init__(log_interval, tb_writer); on_step_end(args, state, control)
MoEUsageTensorBoardCallback: on_train_end(args, state, control); _get_moe_layers(model)
"""


@pytest.mark.parametrize("line", DOCUMENTED.strip().split("\n"))
def test_documented_names_exist_with_their_arguments(line):
    name, signatures = line.split(": ")
    for signature in signatures.split("; "):
        method, names = signature.rstrip(")").split("(")
        parameters = inspect.signature(getattr(getattr(model_module, name), method)).parameters
        given = [parameter for parameter in names.split(", ") if parameter]
        assert set(given) <= set(parameters), signature
        ordinary = [p for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        required = [p.name for p in ordinary if p.default is p.empty]
        assert set(required) <= {"self", *given}, signature


def test_every_layer_works_by_itself():
    config, x = tiny(), torch.randn(2, 5, 64)
    assert model_module.LayerNorm(64, bias=False)(x).shape == x.shape
    for cls in (model_module.CausalSelfAttention, model_module.MLP, model_module.MoE, model_module.Block):
        layer = cls(config)
        assert layer(x).shape == x.shape, cls
    assert layer.mlp.get_usage_counts().sum() == 2 * 5 * 2 and layer.mlp.get_auxiliary_loss() > 0


def test_defaults_are_the_documented_ones():
    config = GPTConfig()
    expected = dict(
        block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True,
        use_moe=True, num_experts=2, num_experts_per_tok=1, moe_every=1, moe_loss=True,
        moe_loss_type="load_balancing", moe_loss_coef=0.01, router_z_loss_coef=0.0, router_score="softmax",
        norm_topk_prob=True, router_bias_update_rate=0.0, num_shared_experts=0, expert_hidden_size=None,
        position="learned", rope_theta=10000.0, n_kv_head=None, sliding_window=None, global_every=None,
        norm="layernorm", activation="gelu", qk_norm=False, logit_softcap=0.0, tie_word_embeddings=True,
        infer_step=250, model_type="gpt_moe",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("fields, words", [
    (dict(dropout=1.0), "below 1"), (dict(dropout=-0.1), "at least 0"), (dict(n_layer=0), "at least 1"),
    (dict(num_experts=40_000), "at most 32767"), (dict(sliding_window=0), "at least 1"),
    (dict(norm_eps=0.0), "above 0"), (dict(rope_theta=-1.0), "above 0"), (dict(rope_theta=0), "above 0"),
    (dict(rope_theta=math.inf), "finite"), (dict(norm_eps=math.nan), "finite"),
    (dict(dropout=math.nan), "finite"), (dict(moe_loss_type="switch"), "load_balancing"),
    (dict(activation="gelu_new"), "gelu, gelu_erf, relu2, swiglu"), (dict(position="alibi"), "learned, rope"),
    (dict(norm="batchnorm"), "layernorm, rmsnorm"), (dict(router_score="tanh"), "softmax"),
    (dict(n_embd=65), "n_head=12"), (dict(n_head=12, n_kv_head=5), "n_head=12"),
    (dict(position="rope", n_embd=36), "n_head=12 .* odd size, 3"), (dict(global_every=2), "sliding_window"),
    (dict(num_experts_per_tok=3), "num_experts=2"), (dict(encoding_size=60000), "vocab_size=50257"),
    (dict(ngram_order=1), "2 or more"), (dict(n_layer=2, moe_every=3), "n_layer=2; use --moe_every 1"),
], ids=str)  # fmt: skip
def test_impossible_configurations_are_refused_by_name(fields, words):
    name, value = list(fields.items())[-1]
    assert f"{name}={value!r}" in refuses(words, GPTConfig, **fields)


@pytest.mark.parametrize("name, value", [("vocab_size", "x"), ("n_layer", 2.0), ("bias", 1), ("bias", "no")])
def test_types_are_checked_at_construction_and_assignment(name, value):
    refuses(name, GPTConfig, **{name: value}, error=Exception)
    refuses(name, setattr, GPTConfig(), name, value, error=Exception)


def test_configuration_survives_dictionary_and_file_and_unknown_names_are_refused_or_left_out(tmp_path):
    config = tiny(**MODERN, sliding_window=8, global_every=2, encoding="bytes", bos_token_id=3)
    assert GPTConfig(**config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    again = GPTConfig.from_pretrained(tmp_path).to_dict()
    assert again.pop("auto_map")["AutoModel"] == "model.GPT" and again == config.to_dict()
    refuses("'n_embed'.*'n_embd'", GPTConfig, n_embed=64)
    # A file of a later version may hold names that this one does not know.
    assert GPTConfig(**config.to_dict() | {"name_of_tomorrow": 1}).n_layer == 2
    both = config.to_dict() | {"num_key_value_heads": 4}
    refuses("n_kv_head=2 and num_key_value_heads=4", GPTConfig, **both)


def test_every_standard_name_gives_the_resolved_value(tmp_path):
    names = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, num_local_experts=4,
                 max_position_embeddings=24, rms_norm_eps=1e-5, decoder_sparse_step=1)  # fmt: skip
    given = dict(num_key_value_heads=2, intermediate_size=5, moe_intermediate_size=7)
    usual = dict(num_key_value_heads=4, intermediate_size=256, moe_intermediate_size=256)
    ours = dict(n_kv_head=2, mlp_hidden_size=5, expert_hidden_size=7)
    for fields, resolved in (({}, usual), (ours, given), (given, given)):
        tiny(**fields).save_pretrained(tmp_path)
        for each in (tiny(**fields), GPTConfig.from_pretrained(tmp_path)):
            assert {name: getattr(each, name) for name in names | resolved} == names | resolved


@pytest.mark.parametrize("n_layer, n_head, n_embd, count", [
    (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080),
    (48, 25, 1600, 1_557_611_200),
])  # fmt: skip
def test_parameter_counts_of_the_gpt2_family(n_layer, n_head, n_embd, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(use_moe=False, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.get_num_params(non_embedding=False) == count
    assert model.get_num_params() == model.get_num_active_params() == count - 1024 * n_embd


def test_flops_and_utilisation_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig(use_moe=False))
    # 6 N + 12 L nh hs T, as nanoGPT counts it
    assert model.flops_per_token() == 6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024 == 855_166_464
    # 16 sequences in 0.1 s on a device of 312 TFLOP/s
    assert model.estimate_mfu(16, 0.1, peak_flops=312e12) == pytest.approx(855_166_464 * 1024 * 160 / 312e12)
    assert GPT(tiny()).estimate_mfu(16, 0.1) is None  # a CPU's peak is not known


def test_active_parameters_of_experts_by_hand():
    C, H, E, K, V = 64, 16, 4, 2, 97
    config = tiny(n_layer=1, expert_hidden_size=H, num_shared_experts=1, tie_word_embeddings=False)
    model = GPT(config)
    expert, shared = 2 * C * H + H + C, 2 * C * H + H + C
    attention, norms, router = C * 3 * C + 3 * C + C * C + C, 3 * 2 * C, E * C
    rest = attention + norms + router + shared
    assert model.get_num_params(non_embedding=False) == rest + E * expert + 2 * V * C + 24 * C
    assert model.get_num_params() == rest + E * expert + V * C  # the head; tokens and positions are looked up
    assert model.get_num_active_params() == rest + K * expert + V * C
    windowed = GPT(tiny(n_layer=2, sliding_window=8, global_every=2))
    assert windowed.flops_per_token() == 6 * windowed.get_num_active_params() + 12 * C * (8 + 24)


@pytest.mark.parametrize("fields", [dict(), MODERN, dict(use_moe=False), dict(num_shared_experts=1)])
def test_initialisation_is_gpt2s(fields):
    model = GPTLMHeadModel(tiny(n_layer=4, n_embd=128, vocab_size=512, block_size=64, **fields))
    residual = 0.02 / math.sqrt(2 * 4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif "ln_" in name or "_norm." in name:
            assert (parameter == 1).all(), name
        else:
            std = residual if "c_proj" in name else 0.02
            # the standard deviation of n draws is off by about 1 / sqrt(2 n); 5 times that is not chance
            chance = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, rel=chance), name
            assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.numel()), name
    ids = tokens(V=512)
    assert model.eval()(ids, targets=ids.roll(-1, 1))[1].item() == pytest.approx(math.log(512), abs=0.15)


def test_three_ways_to_the_same_loss():
    model, ids = strong(GPTLMHeadModel(tiny())), tokens()
    targets = F.pad(ids[:, 1:], (0, 1), value=-1)
    targets[0, 3:7] = -1
    labels = ids.clone()
    labels[0, 4:8] = -100
    logits, loss = model(ids, targets=targets)
    output = model(input_ids=ids, labels=labels)
    assert torch.equal(output.logits, logits) and torch.equal(output.loss, loss)
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    count = (targets != -1).sum()
    part = model(input_ids=ids, labels=labels, num_items_in_batch=count * 4)
    assert part.loss.item() == pytest.approx(loss.item() / 4, rel=1e-6)


def test_training_loss_is_the_sum_of_its_reported_parts():
    model, ids = GPTLMHeadModel(tiny(moe_loss_coef=0.3, router_z_loss_coef=0.02)), tokens()
    strong(model).train()
    output = model(input_ids=ids, labels=ids)
    parts = output.cross_entropy + 0.3 * output.balance_loss + 0.02 * output.z_loss
    assert output.loss.item() == pytest.approx(parts.item(), rel=1e-6)
    assert output.balance_loss > 0 and output.z_loss > 0
    auxiliary = sum(moe.get_auxiliary_loss() for moe in model.moe_layers())
    assert output.balance_loss.item() == pytest.approx(auxiliary.item(), rel=1e-6)
    quiet = model.eval()(input_ids=ids, labels=ids)
    assert quiet.loss.item() == pytest.approx(output.cross_entropy.item(), rel=1e-5)
    assert quiet.balance_loss is None and quiet.cross_entropy is None


def test_gpt_gives_hidden_states_and_with_a_target_what_the_head_gives():
    model = strong(GPTLMHeadModel(tiny(**MODERN)))
    base = GPT(model.config.to_dict()).eval()
    base.load_state_dict(model.state_dict())
    ids = tokens()
    assert torch.equal(base(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
    for target in (dict(labels=ids), dict(targets=ids)):
        a, b = base(ids, **target), model(ids, **target)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_outputs_in_every_form():
    model, ids = strong(GPTLMHeadModel(tiny())), tokens()
    full = model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(model.lm_head(full.hidden_states[-1]), full.logits)
    assert full[CACHE].get_seq_length() == 24
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, model(ids).logits)
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0 and torch.equal(logits, model(ids).logits)
    assert torch.equal(GPT.forward(model, ids, return_dict=False)[0], model(ids).logits)
    assert model(ids, use_cache=False).get(CACHE) is None
    some = torch.tensor([0, 7, 23])
    for keep, expected in ((3, [21, 22, 23]), (1, [23]), (0, list(range(24))), (some, some)):
        kept = model(ids, logits_to_keep=keep).logits
        assert torch.allclose(kept, full.logits[:, expected], atol=1e-5), keep
    model.set_attn_implementation("eager")  # transformers would refuse: it guesses from a model's source
    assert model.config._attn_implementation == "eager"
    model.config.output_hidden_states = model.config.output_attentions = True
    configured = model(ids)
    assert len(configured.hidden_states) == 3
    assert torch.allclose(configured.attentions[1], full.attentions[1], atol=1e-5)


def test_bad_calls_are_refused():
    model, ids = GPTLMHeadModel(tiny()), tokens()
    for arguments, message in (
        (dict(input_ids=tokens(T=25)), "25 tokens .*block_size=24"),
        (dict(input_ids=tokens(T=25), attention_mask=torch.ones(3, 25)), "25 tokens .*block_size=24"),
        (dict(input_ids=ids, inputs_embeds=torch.zeros(3, 24, 64)), "input_ids and inputs_embeds"),
        (dict(), "input_ids and inputs_embeds"), (dict(input_ids=ids, labels=ids, targets=ids), "labels"),
    ):  # fmt: skip
        refuses(message, model, **arguments)


def test_a_cache_goes_by_two_names():
    """transformers renamed past_key_values in 5.24. PEFT's prefix may meet transformers' empty cache."""
    model, ids = strong(GPTLMHeadModel(tiny())), tokens()
    a, b, c, d, same, other = (model(ids[:, :-1])[CACHE] for _ in range(6))
    empty, last = DynamicCache(config=model.config), ids[:, -1:]
    pairs = (a, None), (None, b), (c, empty), (empty, d), (same, same)
    found = [model(last, past_key_values=first, cache=second).logits for first, second in pairs]
    assert all(torch.equal(logits, found[0]) for logits in found)
    assert torch.allclose(found[0], model(ids).logits[:, -1:], atol=1e-5)
    refuses("past_key_values or cache", model, last, past_key_values=same, cache=other)
