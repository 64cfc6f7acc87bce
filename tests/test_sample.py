"""sample.py: text that appears while it is made, where it ends, prompts from files and from the user."""

import io
import json
import shutil

import pytest
import torch
from models import byte_model

import sample

PROMPT = "añb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    byte_model().save_pretrained(path)
    return path


def run(capsys, folder, *more) -> str:
    capsys.readouterr()
    words = ["--model", folder, "--device=cpu", "--num_samples=1", "--max_new_tokens=40", "--prompt", PROMPT]
    assert sample.main([str(word) for word in (*words, *more)]) == 0
    return capsys.readouterr().out


def test_what_is_printed_piece_by_piece_is_the_text(folder, capsys, monkeypatch):
    pieces, show = [], sample.Printer._show
    monkeypatch.setattr(sample.Printer, "_show", lambda self, text: (pieces.append(text), show(self, text)))
    out = run(capsys, folder)
    torch.manual_seed(1)
    how = dict(max_new_tokens=40, do_sample=True, temperature=0.8, top_k=50)
    assert out == f"--- sample 1\n{sample.load_model(str(folder)).generate(PROMPT, **how)}\n"
    assert pieces[0] == PROMPT and len({*pieces}) > 20  # the prompt at once, then as the tokens come


def test_a_folder_that_asks_for_several_texts_and_scores_gives_one_text(folder, tmp_path, capsys):
    out, other = run(capsys, folder), shutil.copytree(folder, tmp_path / "other")
    settings = dict(do_sample=True, num_return_sequences=3, return_dict_in_generate=True)
    settings |= dict(stop_strings=["e"], bad_words_ids=[[300], [301, 302]])
    (other / "generation_config.json").write_text(json.dumps(settings))
    assert run(capsys, other) == out


def test_a_sample_ends_before_the_text_that_stops_it(folder, capsys):
    whole = run(capsys, folder).removeprefix("--- sample 1\n")
    for start in (5, 20, 36):
        stop = whole[start : start + 3]
        end = whole.index(stop, len(PROMPT))
        assert run(capsys, folder, "--stop", stop) == f"--- sample 1\n{whole[:end]}\n"
    assert run(capsys, folder, "--stop", PROMPT) == f"--- sample 1\n{whole}"  # it stands in the prompt only


def test_prompts_of_a_file_and_of_the_user(folder, tmp_path, capsys, monkeypatch, refused):
    (tmp_path / "essay.txt").write_text("Once\nupon", encoding="utf-8-sig")
    essay = f"FILE:{tmp_path}/essay.txt"
    assert run(capsys, folder, "--prompt", essay).startswith("--- sample 1\nOnce\nupon")
    (tmp_path / "essay.txt").write_bytes("café".encode("latin-1"))
    for bad, words in ((essay, "essay.txt is no UTF-8"), ("caf\udce9", "in UTF-8")):
        assert words in refused(sample.main, "--model", folder, "--prompt", bad)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert sample.main(["--model", str(folder), "--interactive", "--max_new_tokens=1", "--top_p=0.5"]) == 0
    assert [text[:3] for text in capsys.readouterr().out.split("prompt> ")] == ["", "one", "two", "\n"]


@pytest.mark.parametrize("flag", ["temperature=inf", "temperature=nan", "top_p=1.5", "min_p=-1",
                                  "seed=9999999999999999999", "num_samples=0", "repetition_penalty=0",
                                  "top_k=-1", "max_new_tokens=0"])  # fmt: skip
def test_numbers_outside_their_limits(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--model", "gpt2", f"--{flag}"])
    assert stopped.value.code == 2 and f"--{flag.split('=')[0]} " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--checkpoint", "--model"])
def test_an_empty_name_is_no_model(flag, refused):
    assert "no such file or folder" in refused(sample.main, flag, "")
