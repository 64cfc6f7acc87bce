"""python -m analysis evaluate: its numbers against a plain loop, and what it refuses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import byte_model

from analysis.__main__ import main
from tokens.shards import write_shard

TEXT = "Überall ist Text. " * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    byte_model().save_pretrained(path / "model")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    (path / "ids").mkdir()
    ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
    write_shard(path / "ids" / "val_000000.bin", np.concatenate([[256], ids]).astype(np.uint16))
    return path


@pytest.mark.parametrize("more", [["--T=20", "--B=3"], ["--max_tokens=100"], ["--dtype=bfloat16"]])
def test_the_numbers_are_those_of_a_loop_over_tokens(folder, more, capsys):
    model = byte_model()
    settings = dict(word.removeprefix("--").split("=") for word in more)
    T, most = int(settings.get("T", 48)), int(settings.get("max_tokens", 10**9))
    ids = [256, *TEXT.encode()][:most]
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = (i - 1) // T * T
            logits = model.eval()(torch.tensor([ids[start:i]])).logits[0, -1]
            total += F.cross_entropy(logits.double(), torch.tensor(ids[i])).item()
    n = len(ids) - 1
    assert main(["evaluate", str(folder / "model"), str(folder / "text.txt"), "--device=cpu", *more]) == 0
    said = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    close = 2e-2 if "bfloat16" in str(more) else 1e-3
    assert float(said["perplexity"]) == pytest.approx(math.exp(total / n), rel=close)
    assert float(said["bits per byte"]) == pytest.approx(total / n / math.log(2), abs=close)


def test_texts_are_read_as_for_training(folder, tmp_path, capsys):
    """UTF-16 with its mark; of a few invalid bytes each becomes U+FFFD, three bytes in UTF-8."""
    said, raw = {}, TEXT.encode()
    for name, content in dict(text=raw, wide=TEXT.encode("utf-16"), bad=raw + b"\xff").items():
        (tmp_path / name).write_bytes(content)
        assert main(["evaluate", str(folder / "model"), str(tmp_path / name), "--device=cpu"]) == 0
        said[name] = capsys.readouterr().out
    assert said["text"] == said["wide"]
    assert [text.split()[0] for text in said.values()] == [str(len(raw) + n) for n in (0, 0, 3)]


def test_ids_without_text_have_a_loss(folder, tmp_path, capsys):
    byte_model(encoding="none").save_pretrained(tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), str(folder / "ids"), "--device=cpu"]) == 0
    none = capsys.readouterr().out.splitlines()
    assert main(["evaluate", str(folder / "model"), str(folder / "text.txt"), "--device=cpu"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert none[1:] == text[1:3] and "bytes unknown" in none[0]


def test_what_is_refused(folder, refused, tmp_path):
    model, text = str(folder / "model"), str(folder / "text.txt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin").write_bytes(TEXT.encode("latin-1") * 9)
    for arguments, words in (
        ((model, tmp_path / "none.txt"), "none.txt"), ((model, tmp_path / "empty.txt"), "at least 2"),
        ((model, tmp_path / "latin"), "latin is no UTF-8"),
        ((model, text, "--T=49"), "block_size=48"), ((model, text, "--B=0"), "--B 0"),
        ((model, text, "--max_tokens=1"), "--max_tokens 1: must be at least 2"),
        ((model, folder / "ids"), "encoding='gpt2'"), ((tmp_path / "none.pt", text), "none.pt"),
        ((model, tmp_path / "none.bin"), "none.bin is neither a folder nor a file"),
    ):  # fmt: skip
        error = refused(main, "evaluate", *arguments)
        assert error.startswith("python -m analysis: error: ") and words in error
