"""HellaSwag: the fast scores equal the plain ones, ranks and modes, styles, bad files, download, script.

Run: python -m pytest tests/test_hellaswag.py
"""

import copy
import gc
import hashlib
import io
import json
import os
import statistics
import urllib.error
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import shared_file, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_examples
from processes import finish, start_ranks

import hellaswag
from hellaswag import HellaSwagUnavailable, build_question, evaluate, iterate_examples, render_example
from model import GPT, GPTConfig, GPTLMHeadModel
from tokens import hellaswag_files
from training import parallel

TINY = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=257, block_size=192, encoding="bytes", use_moe=False)


@pytest.fixture
def write(tmp_path):
    """Function that writes examples (or lines) to a file and returns its path."""

    def to_file(examples, name="questions.jsonl"):
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in examples]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / name

    return to_file


def make_model(model_class=GPTLMHeadModel, **fields):
    """A model whose probabilities are far from equal."""
    torch.manual_seed(3)
    model = model_class(GPTConfig(**TINY | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def plain_losses(model, path, style="completion"):
    """What score_one_by_one says of all questions in a file."""
    examples = iterate_examples(data=path)
    questions = [build_question(e, "bytes", style, hellaswag.longest_input(model.config)) for e in examples]
    return hellaswag.score_one_by_one(model, questions)


# --- scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {}, dict(position="rope", n_kv_head=2, qk_norm=True, norm="rmsnorm"), dict(sliding_window=7),
        dict(sliding_window=11, global_every=2, position="rope", activation="swiglu"),
        dict(use_moe=True, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, logit_softcap=3.0),
        dict(use_moe=True, num_experts=3, moe_every=2, router_score="sigmoid", tie_word_embeddings=False),
        dict(block_size=60),  # crops most questions, so that contexts differ between endings
        dict(block_size=8),  # shorter than endings
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("style", ["completion", "harness"])
def test_batched_scores_equal_plain_ones(fields, style, write):
    model, path = make_model(**fields), write(make_examples(21))
    plain = plain_losses(model, path, style)
    for budget in (1, 300, 100_000):  # one row per forward, some, all
        result = evaluate(model, path, style=style, tokens_per_batch=budget)
        torch.testing.assert_close(result.losses, plain, atol=1e-4, rtol=1e-5)
        assert result.choices == plain.argmin(1).tolist()
    assert result.n == 21
    assert (result.cropped > 5) == ("block_size" in fields)


def test_attention_written_out_and_a_bare_gpt_give_the_same(write):
    model, path = make_model(sliding_window=9, global_every=2, logit_softcap=2.0), write(make_examples(9))
    plain = plain_losses(model, path)
    bare = GPT(model.config)
    bare.load_state_dict(model.state_dict())
    torch.testing.assert_close(evaluate(bare, path).losses, plain, atol=1e-4, rtol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(evaluate(model, path).losses, plain, atol=1e-4, rtol=1e-5)


def test_losses_against_hugging_face_in_double_precision(tmp_path, write):
    """Each ending alone, no padding, no batch, by transformers' GPT-2 in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=90, vocab_size=300)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(4)
    theirs.save_pretrained(tmp_path / "gpt2")
    examples = make_examples(8, longest=12)
    path, wanted, double = write(examples), [], copy.deepcopy(theirs).double()
    for example in examples:
        for ending in example["endings"]:
            row = (example["ctx"] + " " + ending).encode()[-91:]
            scored = min(len((" " + ending).encode()), 90)
            with torch.no_grad():
                logprobs = double(torch.tensor([list(row[:-1])])).logits[0].log_softmax(-1)
            targets = torch.tensor(list(row[1:]))[:, None]
            wanted.append(-logprobs.gather(1, targets)[-scored:].sum())
    wanted = torch.stack(wanted).view(-1, 4).float()
    ours = GPTLMHeadModel.from_pretrained(tmp_path / "gpt2")
    for model in (theirs, ours):
        result = evaluate(model, path, encoding="bytes", tokens_per_batch=200)
        torch.testing.assert_close(result.losses, wanted, atol=1e-4, rtol=1e-5)
        assert result.choices == wanted.argmin(1).tolist()
        assert result.cropped > 0
    theirs.config.model_type = "other"
    with pytest.raises(ValueError, match="model_type='other' does not name its encoding: give encoding="):
        evaluate(theirs, path)


def test_accuracies_and_standard_errors(write):
    model, examples = make_model(), make_examples(17)
    result = evaluate(model, write(examples))
    labels = [example["label"] for example in examples]
    lengths = torch.tensor([[len((" " + e).encode()) for e in x["endings"]] for x in examples])
    characters = torch.tensor([[len(e) for e in x["endings"]] for x in examples])
    hits = [int(a == b) for a, b in zip(result.losses.argmin(1).tolist(), labels, strict=True)]
    normed = (result.losses / lengths).argmin(1).tolist()
    hits_norm = [int(a == b) for a, b in zip(normed, labels, strict=True)]
    assert (result.acc, result.acc_norm) == (sum(hits) / 17, sum(hits_norm) / 17)
    assert result.acc_stderr == pytest.approx(statistics.stdev(hits) / 17**0.5)
    assert result.acc_norm_stderr == pytest.approx(statistics.stdev(hits_norm) / 17**0.5)
    harness = evaluate(model, write(examples), style="harness")
    assert harness.choices_norm == (harness.losses / characters).argmin(1).tolist()
    assert harness.choices_norm != (harness.losses / lengths).argmin(1).tolist()


def test_limit_takes_the_first_questions_and_a_changed_file_is_read_again(write):
    model, examples = make_model(), make_examples(9)
    every, three = evaluate(model, write(examples)), evaluate(model, write(examples), limit=3)
    assert three.n == 3 and torch.equal(three.losses, every.losses[:3])
    one = evaluate(model, write(examples), limit=1)
    assert one.n == 1 and one.acc in (0.0, 1.0) and one.acc_stderr != one.acc_stderr  # not a number
    assert evaluate(model, write(make_examples(5, seed=1)), limit=1).losses.ne(one.losses).all()


def test_encoding_and_arguments_are_checked(write):
    model, path = make_model(), write(make_examples(2))
    for field, value in dict(limit=0, tokens_per_batch=0, style="letters").items():
        with pytest.raises(ValueError, match=f"{field}={value!r}"):
            evaluate(model, path, **{field: value})
    with pytest.raises(ValueError, match="torchrun"):
        evaluate(model, path, world_size=2)
    with pytest.raises(ValueError, match="encoding='bytes' has 256 ids, the model only vocab_size=200"):
        evaluate(make_model(vocab_size=200), path)


@given(st.integers(1, 5000))
def test_few_lengths_of_rows(size):
    rounded = hellaswag.round_length(size)
    assert size <= rounded < max(size + 16, 1.125 * size)
    assert len({hellaswag.round_length(n) for n in range(1, 1025)}) <= 32


# --- around the model -----------------------------------------------------------------------------------


def test_modes_and_router_statistics_are_left_as_they_were(write, monkeypatch):
    model, path = make_model(use_moe=True, dropout=0.5), write(make_examples(3))
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    first, second = evaluate(model, path), evaluate(model, path)
    assert torch.equal(first.losses, second.losses)  # no dropout
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    monkeypatch.setattr(hellaswag, "attention_masks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, path)
    assert modes == [module.training for module in model.modules()]
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("how", ["block.compile()", *slow("torch.compile(model)", "model.compile()")])
def test_a_compiled_model_builds_no_further_graph(how, write):
    torch._dynamo.reset()
    model = make_model(use_moe=True)
    plain = evaluate(model, write(make_examples(5))).losses
    compiled = model
    if how == "torch.compile(model)":
        compiled = torch.compile(model, backend="eager")
    elif how == "model.compile()":
        model.compile(backend="eager")
    else:
        for block in model.transformer.h:
            block.compile(backend="eager")
    idx = torch.randint(256, (2, 32))

    def train_and_count():
        model.train()
        compiled(idx, targets=idx)[1].backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    graphs = train_and_count()
    assert graphs > 0
    torch.testing.assert_close(evaluate(compiled, write(make_examples(5))).losses, plain)
    assert train_and_count() == graphs
    torch._dynamo.reset()


def test_autocast_changes_little_and_ends_with_the_evaluation(write):
    model, path = make_model(), write(make_examples(6))
    exact, rough = evaluate(model, path).losses, evaluate(model, path, autocast=torch.bfloat16).losses
    assert 1e-4 < (exact - rough).abs().max() and (exact / rough - 1).abs().max() < 0.05
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_questions_and_run_equally_many_forwards(world_size, write, monkeypatch):
    """Every rank's part computed here, one after the other; their sum is what all_reduce would give."""
    model, path = make_model(block_size=70), write(make_examples(11))
    whole = evaluate(model, path).losses
    questions = [build_question(e, "bytes", "completion", 70) for e in make_examples(11)]
    shapes, parts = [], []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: parts.append(tensor.clone()))
    for rank in range(world_size):
        seen = []
        note = lambda m, args, out, seen=seen: seen.append(out.size(1))  # noqa: E731
        handle = model.transformer.wte.register_forward_hook(note)
        hellaswag.score_batched(model, questions, 160, rank, world_size)
        handle.remove()
        shapes.append(seen)
    assert all(seen == shapes[0] for seen in shapes)
    torch.testing.assert_close(sum(parts).view(-1, 4), whole, atol=1e-4, rtol=1e-5)


def main(arguments: list[str]) -> int:
    """One of two processes: all questions, then a file that rank 1 does not find."""
    folder, path = map(Path, arguments)
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), torch.nn.parallel.DistributedDataParallel(make_model(use_moe=True))
    torch.save(evaluate(model, path, rank=rank, world_size=2).losses, f"{folder}/losses{rank}.pt")
    try:
        evaluate(model, path if rank == 0 else "missing", rank=rank, world_size=2)
    except HellaSwagUnavailable as error:
        (folder / f"error{rank}").write_text(str(error))
    del model  # DDP before its process group
    parallel.stop()
    return 0


def test_two_processes_give_the_result_of_one_or_fail_together(tmp_path, write):
    path = write(make_examples(7))
    ranks = start_ranks(2, [tmp_path, path], tmp_path / "output", script="test_hellaswag")
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "output").read_text()
    whole = evaluate(make_model(use_moe=True), path).losses
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"losses{rank}.pt"), whole, atol=1e-4, rtol=1e-5)
    assert (tmp_path / "error0").read_text().startswith("another rank could not load the questions")
    assert "cannot read the questions in missing" in (tmp_path / "error1").read_text()


def test_an_error_lets_go_of_the_model():
    """Else a DDP, and by it the process group's threads, live until the interpreter ends, and disturb it."""
    model = make_model()
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(HellaSwagUnavailable):
            evaluate(model, "missing")
        del model
        assert alive() is None
    finally:
        gc.enable()


# --- rendering ------------------------------------------------------------------------------------------


def test_render_example_is_build_nanogpts(gpt2_encoding):
    endings = ["jumps.", "is asleep now", "A", "x y z"]
    example = dict(ctx="A man is sitting on a roof. he", label=3, endings=endings)
    data, tokens, mask, label = render_example(example)
    assert label == 3 and set(data) == {"label", "ctx_tokens", "ending_tokens"}
    assert data["ctx_tokens"] == gpt2_encoding.encode(example["ctx"])
    assert tokens.dtype == mask.dtype == torch.long and tokens.shape == mask.shape
    for row, ending in enumerate(example["endings"]):
        length = len(data["ctx_tokens"]) + len(data["ending_tokens"][row])
        assert gpt2_encoding.decode(tokens[row, :length].tolist()) == example["ctx"] + " " + ending
        assert gpt2_encoding.decode(tokens[row][mask[row] == 1].tolist()) == " " + ending
        assert tokens[row, length:].sum() == mask[row, length:].sum() == 0
    assert tokens.size(1) == len(data["ctx_tokens"]) + max(map(len, data["ending_tokens"]))


@pytest.mark.parametrize(
    ("fields", "context", "endings"),
    [
        (dict(ctx_a="He sits on a ROOF.", ctx_b="then HE", endings=[" jumps ", "[step] runs", "a  b", "[x]"]),
         "Roofing: He sits on a ROOF. Then he", [" jumps", "  runs", " a b", " "]),
        (dict(ctx_a="[header] How to sit [title] Find a roof. [step] Climb. [substeps]", ctx_b=""),
         "Roofing: How to sit. Find a roof. Climb.",
         ["  a", "  b", "  c", "  d"]),  # the space before [substeps] is counted to the endings
        (dict(ctx="no parts [x]here. he"), "Roofing: no parts here. he", [" a", " b", " c", " d"]),
    ],
    ids=["capitalised", "wikihow", "joined"],
)  # fmt: skip
def test_harness_style_by_hand(fields, context, endings):
    """Worked out by hand from lm-evaluation-harness's process_docs and _encode_pair."""
    example = dict(ctx="unused", activity_label="Roofing", label=0, endings=["a", "b", "c", "d"]) | fields
    start, rest, characters = hellaswag.tokenize(example, "bytes", "harness")
    assert bytes(start).decode() == context
    assert [bytes(ending).decode() for ending in rest] == endings
    assert characters == [len(hellaswag.preprocess(ending)) for ending in example["endings"]]


def test_an_ending_of_marks_alone_is_never_the_normalised_choice(write):
    example = make_examples(1)[0] | {"endings": ["[step]", "a b", "c d", "e f"]}
    assert evaluate(make_model(), write([example]), style="harness").choices_norm[0] != 0


def test_missing_parts_of_the_context_are_mentioned_in_harness_style_only(write, recwarn):
    examples = [{k: v for k, v in e.items() if k not in ("ctx_a", "ctx_b")} for e in make_examples(2)]
    evaluate(make_model(), write(examples))
    assert not [w for w in recwarn if "ctx_a" in str(w.message)]
    with pytest.warns(UserWarning, match="without ctx_a and ctx_b"):
        evaluate(make_model(), write(examples), style="harness")


# --- files ----------------------------------------------------------------------------------------------


def test_all_validation_questions_are_read():
    path = shared_file("hellaswag_val.jsonl")
    assert sum(1 for _ in iterate_examples(data=path)) == 10042


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(label=4), "label: expected 0, 1, 2 or 3, found 4"),
        (dict(label=True), "label"),
        (dict(label=""), "label"),  # Hugging Face's test questions
        (dict(label=1.0), "label"),
        (dict(endings=["a", "b", "c"]), "endings: expected a list of 4"),
        (dict(endings="abcd"), "endings: expected a list of 4"),
        (dict(endings=["a", "b", None, "d"]), r"endings\[2\]: expected a text"),
        (dict(ctx=None), "ctx: expected a text"),
        (dict(ctx=""), "ctx: expected a text to continue"),
        (dict(activity_label=3), "activity_label"),
        (dict(ctx_b=["x"]), "ctx_b"),
        (dict(ctx="half a \ud83d pair"), "ctx: expected a text of whole characters"),
    ],
)
def test_bad_questions_name_file_line_and_field(change, message, write):
    good = make_examples(1)[0]
    path = write([good, b"", good | change])
    with pytest.raises(ValueError, match=f"questions.jsonl, line 3: {message}"):
        list(iterate_examples(data=path))


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"null", b"\xff\xfe", b'{"ctx": "a"}', b"[" * 100_000, b"1" * 5000, b"\xef\xbb\xbf{}"],
    ids=["cut", "list", "null", "utf16", "fields", "deep", "long", "bom"],
)
def test_bad_lines_name_file_and_line(line, write):
    with pytest.raises(ValueError, match=r"questions.jsonl, line 1: "):
        list(iterate_examples(data=write([line])))


def test_files_without_questions(tmp_path, write):
    with pytest.raises(ValueError, match="no questions in this file"):
        evaluate(make_model(), write([b"", b"  "]))
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(HellaSwagUnavailable, match="cannot read the questions"):
            evaluate(make_model(), path)


def test_labels_as_text_are_understood(write):
    example = make_examples(1)[0] | {"label": "2"}  # as in Hugging Face's copy
    assert [e["label"] for e in iterate_examples(data=write([example]))] == [2]


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(SIMPLE, lambda x: st.lists(x, max_size=5))
FIELDS = st.sampled_from(["ctx", "label", "endings", "activity_label", "ctx_a", "ctx_b"])
TEXTS = st.text(st.characters(codec="utf-8"))
FOUR_TEXTS = st.lists(TEXTS, min_size=4, max_size=4)
NEARLY = st.fixed_dictionaries(
    dict(ctx=TEXTS, label=st.integers(0, 4), endings=FOUR_TEXTS, activity_label=TEXTS),
    optional=dict(ctx_a=TEXTS, ctx_b=TEXTS),
)
CHANGE = st.dictionaries(FIELDS, VALUES, max_size=2)
LINES = st.binary(max_size=60) | st.builds(lambda x, y: json.dumps(x | y).encode(), NEARLY, CHANGE)


@settings(max_examples=100)
@given(st.lists(LINES, max_size=3), st.sampled_from(["completion", "harness"]), st.integers(1, 80))
def test_any_file_is_read_or_refused(write, lines, style, block):
    """Random bytes and nearly right questions: rows that fit, or a ValueError with file and line."""
    path = write(lines)
    try:
        examples = list(iterate_examples(data=path))
    except ValueError as error:
        assert f"{path}, line " in str(error) and str(error).isascii()
        return
    for example in examples:
        assert example["label"] in range(4) and len(example["endings"]) == 4
        question = build_question(example, "bytes", style, block)
        for context, ending in question.rows:
            assert context and ending and len(context) + len(ending) <= block + 1


# --- download -------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in for the network: what it answers, and what it was asked for."""
    content = json.dumps(make_examples(1)[0]).encode()
    state = {"content": content, "asked": []}

    def urlopen(url, timeout):
        state["asked"].append(url)
        if isinstance(state["content"], Exception):
            raise state["content"]
        return io.BytesIO(state["content"])

    monkeypatch.setattr(hellaswag_files.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(hellaswag_files, "DATA_DIR", tmp_path / "hellaswag")
    known = {"val": (len(content), hashlib.sha256(content).hexdigest())}
    monkeypatch.setattr(hellaswag_files, "HELLASWAG_FILES", known)
    return state


def test_download_once(server, tmp_path):
    assert len(list(iterate_examples("val"))) == len(list(iterate_examples("val"))) == 1
    url = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
    assert server["asked"] == [url]
    assert [p.name for p in (tmp_path / "hellaswag").iterdir()] == ["hellaswag_val.jsonl"]
    assert evaluate(make_model()).n == 1
    with pytest.raises(ValueError, match="split='test'"):
        hellaswag.download("test")


@pytest.mark.parametrize("answer", [urllib.error.URLError("no route"), b"<html>", TimeoutError("slow")])
def test_a_failed_download_is_one_clear_line_and_leaves_nothing(answer, server, tmp_path):
    server["content"] = answer
    with pytest.raises(HellaSwagUnavailable) as caught:
        evaluate(make_model())
    assert isinstance(caught.value, FileNotFoundError)
    assert "curl" in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "hellaswag").iterdir()) == []


def test_a_full_disk_leaves_nothing_either(server, tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(HellaSwagUnavailable, match="No space left"):
        hellaswag.download()
    assert list((tmp_path / "hellaswag").iterdir()) == []


# --- script ---------------------------------------------------------------------------------------------


def test_script(tmp_path, write, capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    model, path = make_model(use_moe=True), write(make_examples(4))
    model.save_pretrained(tmp_path / "exported")
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 7}
    torch.save(state, tmp_path / "model_00007.pt")
    wanted = str(evaluate(model, path))
    for source in ("exported", "model_00007.pt"):
        command = ["--model", str(tmp_path / source), "--data", str(path), "--device", "cpu"]
        assert hellaswag.main(command) == 0
        assert wanted in capsys.readouterr().out
        assert hellaswag.main([*command, "--style", "harness", "--limit", "2", "--dtype", "bfloat16"]) == 0
        assert "2 questions" in capsys.readouterr().out
    assert hellaswag.main(["--model", str(tmp_path / "missing"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'missing'}: no such file or folder (`ls -d log/model_*`" in error
    assert error.count("\n") == 1
    for source, data in (("missing.pt", path), ("exported", "missing"), ("exported", write([b"{"], "bad"))):
        command = ["--model", str(tmp_path / source), "--data", str(data), "--device", "cpu"]
        assert hellaswag.main(command) == 2
        error = capsys.readouterr().err
        assert "hellaswag.py: " in error and ("missing" in error or "bad, line 1" in error)
