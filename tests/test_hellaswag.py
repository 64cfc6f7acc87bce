"""HellaSwag: the fast scores equal the plain ones, ranks and modes, styles, bad files, download, script."""

import copy
import hashlib
import io
import json
import statistics
import urllib.error
import urllib.request
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import refuses, shared_file, slow
from models import make_examples, strong, tiny
from processes import full_disk, run_ranks

import hellaswag
from hellaswag import HellaSwagUnavailable, build_question, evaluate, iterate_examples, render_example
from model import GPT, GPTLMHeadModel
from tokens import hellaswag_files
from training import parallel


@pytest.fixture
def write(tmp_path):
    """Function that writes lines, each bytes or to become JSON, to a file and returns its path."""

    def to_file(lines):
        raw = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        (tmp_path / "questions.jsonl").write_bytes(b"\n".join(raw) + b"\n")
        return tmp_path / "questions.jsonl"

    return to_file


def make_model(**fields) -> GPTLMHeadModel:
    """A model whose probabilities are far from equal."""
    sizes = dict(n_embd=32, vocab_size=257, block_size=192, encoding="bytes", use_moe=False)
    return strong(GPTLMHeadModel(tiny(**sizes | fields)))


def assert_close(losses, expected):
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("style, fields", [
    ("completion", dict(position="rope", n_kv_head=2, qk_norm=True, norm="rmsnorm")),
    ("completion", dict(use_moe=True, num_shared_experts=1, logit_softcap=3.0)),
    ("completion", dict(ngram_order=3, ngram_rows=100)),
    ("completion", dict(sliding_window=7)), ("completion", dict(block_size=8)),  # shorter than endings
    ("harness", dict(block_size=60)), ("completion", dict(block_size=60)),  # most contexts are cropped
    ("harness", dict(sliding_window=11, global_every=2, position="rope", activation="swiglu")),
    ("harness", dict(use_moe=True, moe_every=2, router_score="sigmoid", tie_word_embeddings=False)),
], ids=str)  # fmt: skip
def test_batched_scores_equal_plain_ones(style, fields, write):
    model, path = make_model(**fields), write(make_examples(16))
    block, examples = model.config.block_size, iterate_examples(data=path)
    plain = hellaswag.score_one_by_one(model, [build_question(e, "bytes", style, block) for e in examples])
    for budget in (1, 300, 100_000):  # one row per forward, some, all
        result = evaluate(model, path, style=style, tokens_per_batch=budget)
        assert_close(result.losses, plain)
    bare = GPT(model.config)
    bare.load_state_dict(model.state_dict())
    assert_close(evaluate(bare, path, style=style).losses, plain)
    model.set_attn_implementation("eager")
    assert_close(evaluate(model, path, style=style).losses, plain)
    assert (result.cropped > 5) == ("block_size" in fields)


def test_losses_against_hugging_face_in_double_precision(tmp_path, write):
    """Each ending alone, no padding, no batch, by transformers' GPT-2 in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=90, vocab_size=300)
    theirs = strong(GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path / "gpt2")
    examples = make_examples(8, longest=12)
    path, expected, double = write(examples), [], copy.deepcopy(theirs).double()
    for example in examples:
        for ending in example["endings"]:
            row = (example["ctx"] + " " + ending).encode()[-91:]
            scored = min(len((" " + ending).encode()), 90)
            with torch.no_grad():
                logprobs = double(torch.tensor([list(row[:-1])])).logits[0].log_softmax(-1)
            targets = torch.tensor(list(row[1:]))[:, None]
            expected.append(-logprobs.gather(1, targets)[-scored:].sum())
    expected = torch.stack(expected).view(-1, 4).float()
    for model in (theirs, GPTLMHeadModel.from_pretrained(tmp_path / "gpt2")):
        result = evaluate(model, path, encoding="bytes", tokens_per_batch=200)
        assert_close(result.losses, expected)
        assert result.cropped > 0
    theirs.config.model_type = "other"
    refuses(r"model_type='other' .*encoding=", evaluate, theirs, path)


def test_accuracies_and_standard_errors(write):
    model, examples = make_model(), make_examples(17)
    path, labels = write(examples), [example["label"] for example in examples]
    result, harness = evaluate(model, path), evaluate(model, path, style="harness")
    tokens = torch.tensor([[len((" " + e).encode()) for e in x["endings"]] for x in examples])
    characters = torch.tensor([[len(e) for e in x["endings"]] for x in examples])
    for losses, choices, acc, error in (
        (result.losses, result.choices, result.acc, result.acc_stderr),
        (result.losses / tokens, result.choices_norm, result.acc_norm, result.acc_norm_stderr),
        (harness.losses / characters, harness.choices_norm, harness.acc_norm, harness.acc_norm_stderr),
    ):
        assert choices == losses.argmin(1).tolist()
        hits = [int(a == b) for a, b in zip(choices, labels, strict=True)]
        assert (acc, error) == (sum(hits) / 17, pytest.approx(statistics.stdev(hits) / 17**0.5))
    assert harness.choices_norm != (harness.losses / tokens).argmin(1).tolist()
    marks = examples[0] | {"endings": ["[step]", "a b", "c d", "e f"]}  # the first has no characters
    assert evaluate(model, write([marks]), style="harness").choices_norm[0] != 0


def test_limit_takes_the_first_questions_and_a_changed_file_is_read_again(write):
    model, path = make_model(), write(make_examples(9))
    every, three, one = (evaluate(model, path, limit=limit) for limit in (None, 3, 1))
    seen: list[tuple[int, int]] = []  # (questions scored, all) before each forward
    evaluate(model, path, tokens_per_batch=200, progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen) and len(set(seen)) > 2 and seen[0] == (0, every.n) and seen[-1][0] < every.n
    assert three.n == 3 and torch.equal(three.losses, every.losses[:3])
    assert one.n == 1 and one.acc in (0.0, 1.0) and one.acc_stderr != one.acc_stderr  # not a number
    assert evaluate(model, write(make_examples(5, seed=1)), limit=1).losses.ne(one.losses).all()


def test_wrong_arguments_encodings_and_nan_are_refused(write):
    model, path = make_model(), write(make_examples(2))
    for wrong, words in ((dict(limit=0), "limit=0"), (dict(tokens_per_batch=0), "tokens_per_batch=0"),
                         (dict(style="letters"), "style='letters'"),
                         (dict(world_size=2), "world_size=2.*torchrun")):  # fmt: skip
        refuses(words, evaluate, model, path, **wrong)
    refuses(r"encoding='bytes' .*256 .*vocab_size=200", evaluate, make_model(vocab_size=200), path)
    model.transformer.wte.weight.data.fill_(torch.nan)
    refuses("NaN", evaluate, model, path, error=FloatingPointError)


def test_modes_and_router_statistics_are_left_as_they_were(write):
    model, path = make_model(use_moe=True, dropout=0.5).train(), write(make_examples(3))
    model.transformer.h[0].eval()
    modes, before = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    first, second = evaluate(model, path), evaluate(model, path)
    assert torch.equal(first.losses, second.losses)  # no dropout
    model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
    refuses("division", evaluate, model, path, error=ZeroDivisionError)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("how", ["block.compile()", *slow("torch.compile(model)")])
def test_a_compiled_model_builds_no_further_graph(how, write):
    torch._dynamo.reset()
    model, path, idx = make_model(use_moe=True), write(make_examples(5)), torch.randint(256, (2, 32))
    plain = evaluate(model, path).losses
    compiled = torch.compile(model, backend="eager") if how == "torch.compile(model)" else model
    for block in model.transformer.h if compiled is model else ():
        block.compile(backend="eager")

    def train_and_count():
        model.train()
        compiled(idx, targets=idx)[1].backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    graphs = train_and_count()
    assert graphs > 0
    torch.testing.assert_close(evaluate(compiled, path).losses, plain)
    assert train_and_count() == graphs
    torch._dynamo.reset()


def test_autocast_changes_little_and_ends_with_the_evaluation(write):
    model, path = make_model(), write(make_examples(6))
    exact, rough = evaluate(model, path).losses, evaluate(model, path, autocast=torch.bfloat16).losses
    assert 1e-4 < (exact - rough).abs().max() and (exact / rough - 1).abs().max() < 0.05
    assert not torch.is_autocast_enabled("cpu")


def main(arguments: list[str]) -> dict:
    """One of two processes: all questions, then a file that rank 1 does not find."""
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), make_model(use_moe=True, block_size=70)
    (path,), lengths, found = arguments, [], {}
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: lengths.append(output.size(1)))
    model = torch.nn.parallel.DistributedDataParallel(model)
    for budget in (1, 160):
        losses = evaluate(model, path, tokens_per_batch=budget, rank=rank, world_size=2).losses
        found[budget] = losses, [*lengths]
    try:
        evaluate(model, path if rank == 0 else "missing", rank=rank, world_size=2)
    except HellaSwagUnavailable as error:
        found["error"] = str(error)
    del model  # DDP before its process group
    parallel.stop()
    return found


def test_two_ranks_run_equally_many_forwards_give_the_result_of_one_and_fail_together(tmp_path, write):
    examples = [*make_examples(4, longest=3), *make_examples(3, seed=1)]  # of which some are cropped
    found, found1 = run_ranks(2, [write(examples)], tmp_path / "output", script="test_hellaswag")
    whole = evaluate(make_model(use_moe=True, block_size=70), write(examples))
    assert 0 < whole.cropped < 7
    for budget in (1, 160):  # one row per rank and forward (the last forward has one for both), and more
        (losses, lengths), (losses1, lengths1) = found[budget], found1[budget]
        assert_close(losses, whole.losses)
        assert torch.equal(losses, losses1) and lengths == lengths1 and len(set(lengths)) > 1
    assert "another rank could not load the questions" in found["error"]
    assert "cannot read the questions in missing" in found1["error"]


def test_an_error_lets_go_of_the_model():
    """Otherwise DDP and the process group's threads live until the interpreter ends, and disturb its end."""
    model = make_model()
    alive = weakref.ref(model)
    with pytest.raises(HellaSwagUnavailable):
        evaluate(model, "missing")
    del model
    assert alive() is None


def test_render_example_is_build_nanogpts(gpt2_encoding):
    endings = ["jumps.", "is asleep now", "A", "x y z"]
    example = dict(ctx="A man is sitting on a roof. he", label=3, endings=endings)
    data, tokens, mask, label = render_example(example)
    assert label == 3 and set(data) == {"label", "ctx_tokens", "ending_tokens"}
    assert data["ctx_tokens"] == gpt2_encoding.encode(example["ctx"])
    assert tokens.dtype == mask.dtype == torch.long and tokens.shape == mask.shape
    for row, ending in enumerate(endings):
        length = len(data["ctx_tokens"]) + len(data["ending_tokens"][row])
        assert gpt2_encoding.decode(tokens[row, :length].tolist()) == example["ctx"] + " " + ending
        assert gpt2_encoding.decode(tokens[row][mask[row] == 1].tolist()) == " " + ending
        assert tokens[row, length:].sum() == mask[row, length:].sum() == 0
    assert tokens.size(1) == len(data["ctx_tokens"]) + max(map(len, data["ending_tokens"]))


@pytest.mark.parametrize("fields, context, endings", [
    (dict(ctx_a="He sits on a ROOF.", ctx_b="then HE", endings=[" jumps ", "[step] runs", "a  b", "[x]"]),
     "Roofing: He sits on a ROOF. Then he", [" jumps", "  runs", " a b", " "]),
    (dict(ctx_a="[header] How to sit [title] Find a roof. [step] Climb. [substeps]", ctx_b=""),
     "Roofing: How to sit. Find a roof. Climb.",
     ["  a", "  b", "  c", "  d"]),  # the space before [substeps] is counted to the endings
    (dict(ctx="no parts [x]here. he"), "Roofing: no parts here. he", [" a", " b", " c", " d"]),
], ids=["capitalised", "wikihow", "joined"])  # fmt: skip
def test_harness_style_by_hand(fields, context, endings):
    """Worked out by hand from lm-evaluation-harness's process_docs and _encode_pair."""
    example = dict(ctx="unused", activity_label="Roofing", label=0, endings=["a", "b", "c", "d"]) | fields
    start, rest, characters = hellaswag.tokenize(example, "bytes", "harness")
    assert bytes(start).decode() == context
    assert [bytes(ending).decode() for ending in rest] == endings
    assert characters == [len(hellaswag.preprocess(ending)) for ending in example["endings"]]


def test_all_validation_questions_are_read():
    assert sum(1 for _ in iterate_examples(data=shared_file("hellaswag_val.jsonl"))) == 10042


@pytest.mark.parametrize("wrong, words", [
    (dict(label=4), "label: .* found 4"), (dict(label=True), "label"), (dict(label=1.0), "label"),
    (dict(label=""), "label"),  # Hugging Face's test questions
    (dict(endings=["a", "b", "c"]), "endings: .* 4"), (dict(endings="abcd"), "endings: .* 4"),
    (dict(endings=["a", "b", None, "d"]), r"endings\[2\]: expected a text"),
    (dict(ctx=None), "ctx: expected a text"), (dict(ctx=""), "ctx: expected a text to continue"),
    (dict(ctx="half a \ud83d pair"), "ctx: .*whole characters"),
    (dict(activity_label=3), "activity_label"), (dict(ctx_b=["x"]), "ctx_b"),
    (b"{", ""), (b"[]", ".*JSON object"), (b"null", ".*JSON object"), (b"\xff\xfe", ""),
    (b'{"ctx": "a"}', "endings"), (b"[" * 100_000, ""), (b"1" * 5000, ""), (b"\xef\xbb\xbf{}", ""),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_bad_questions_name_file_line_and_field(wrong, words, write):
    good = make_examples(1)[0]
    path = write([good, b"", wrong if isinstance(wrong, bytes) else good | wrong])
    refuses(f"{path}, line 3: {words}", list, iterate_examples(data=path))


def test_labels_may_be_texts_and_files_must_have_questions(tmp_path, write):
    example = make_examples(1)[0] | {"label": "2"}  # as in Hugging Face's copy
    assert [e["label"] for e in iterate_examples(data=write([example]))] == [2]
    refuses("no questions in this file", evaluate, make_model(), write([b"", b"  "]))
    words = f"cannot read the questions in {tmp_path}"  # missing files: test_two_ranks
    refuses(words, evaluate, make_model(), tmp_path, error=HellaSwagUnavailable)


@pytest.fixture
def urlopen(monkeypatch, tmp_path):
    """A stand-in for the network, which answers with one question."""
    content = json.dumps(make_examples(1)[0]).encode()
    known = {"val": (len(content), hashlib.sha256(content).hexdigest())}
    monkeypatch.setattr(hellaswag_files, "DATA_DIR", tmp_path / "hellaswag")
    monkeypatch.setattr(hellaswag_files, "HELLASWAG_FILES", known)
    monkeypatch.setattr(urllib.request, "urlopen", mock.Mock(return_value=io.BytesIO(content)))
    return urllib.request.urlopen


def test_download_once(urlopen, tmp_path):
    assert len(list(iterate_examples("val"))) == len(list(iterate_examples("val"))) == 1
    url = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
    urlopen.assert_called_once_with(url, timeout=mock.ANY)
    assert [p.name for p in (tmp_path / "hellaswag").iterdir()] == ["hellaswag_val.jsonl"]
    refuses("split='test'", hellaswag.download, "test")


@pytest.mark.parametrize("trouble", [urllib.error.URLError("no route"), TimeoutError(), "html", "full disk"])
def test_a_failed_download_is_one_clear_line_and_leaves_nothing(trouble, urlopen, tmp_path):
    if trouble == "html":
        urlopen.return_value = io.BytesIO(b"<html>")
    elif trouble != "full disk":
        urlopen.side_effect = trouble
    with full_disk(100), pytest.raises(HellaSwagUnavailable) as caught:
        evaluate(make_model())
    assert isinstance(caught.value, FileNotFoundError)
    assert "curl" in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "hellaswag").iterdir()) == []


def test_script(tmp_path, write, capsys, monkeypatch):
    def run(model, data, *more):
        words = ["--model", str(tmp_path / model), "--data", str(data), "--device", "cpu", *more]
        return hellaswag.main(words), capsys.readouterr()

    model, path = make_model(use_moe=True), write(make_examples(4))
    model.save_pretrained(tmp_path / "exported")
    torch.save({"model": model.state_dict(), "config": model.config.to_dict(), "step": 7}, tmp_path / "7.pt")
    for source in ("exported", "7.pt"):
        code, printed = run(source, path)
        assert code == 0 and str(evaluate(model, path)) in printed.out
    code, printed = run("exported", path, "--style", "harness", "--limit", "2", "--dtype", "bfloat16")
    assert code == 0 and "2 questions" in printed.out
    missing = f"{tmp_path / 'missing'}: no such file or folder (`ls -d log/model_*`"
    for source, data, words in (("missing", path, missing), ("exported", write([b"{"]), "line 1")):
        code, printed = run(source, data)
        last = printed.err.splitlines()[-1]  # after transformers' bar
        assert code == 2 and last.startswith("hellaswag.py: error: ") and words in last
    monkeypatch.setattr(hellaswag, "evaluate", mock.Mock(side_effect=KeyboardInterrupt))
    assert run("exported", path)[0] == 130
