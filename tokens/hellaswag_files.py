"""HellaSwag's questions (https://github.com/rowanz/hellaswag): download them once, and check each one."""

import hashlib
import http.client
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tokens.files import check_regular, write_atomically

DATA_DIR = Path(__file__).parents[1] / "hellaswag"
# Bytes and SHA-256, as in tensorflow/datasets (url_checksums/hellaswag.txt).
HELLASWAG_FILES = {
    "train": (47496131, "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d"),
    "val": (12246618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
}


class HellaSwagUnavailable(FileNotFoundError):
    """The questions are missing and cannot be downloaded; the message is one line."""


def download(split: str = "val") -> Path:
    """Path of a split's file, downloaded if it does not exist. Raises HellaSwagUnavailable, ValueError."""
    if split not in HELLASWAG_FILES:
        raise ValueError(f"split={split!r}: choose train or val (the test file has no labels)")
    path = DATA_DIR / f"hellaswag_{split}.jsonl"
    if path.exists():
        return path
    url = f"https://raw.githubusercontent.com/rowanz/hellaswag/master/data/{path.name}"
    try:
        DATA_DIR.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
        found = (len(content), hashlib.sha256(content).hexdigest())
        if found != HELLASWAG_FILES[split]:
            raise OSError(f"size and SHA-256 are {found}, expected {HELLASWAG_FILES[split]}")
        write_atomically(path, lambda file: file.write(content))
    except (OSError, http.client.HTTPException) as error:
        get_it = f"get it by: curl --create-dirs -o {path} {url}"
        raise HellaSwagUnavailable(f"no {path} and no download ({error}); {get_it}") from error
    return path


def iterate_examples(split: str = "val", data: str | Path | None = None) -> Iterator[dict]:
    """Checked questions of a split or a .jsonl file. Raises ValueError with line, HellaSwagUnavailable."""
    path = download(split) if data is None else Path(data)
    try:
        check_regular(path)
        lines = open(path, "rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise HellaSwagUnavailable(f"cannot read the questions in {path}: {reason}") from error
    with lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield check_example(json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def check_example(example: object) -> dict:
    """The example with its label as int (Hugging Face's copy has strings). ValueError names a wrong field."""
    if not isinstance(example, dict):
        raise ValueError(f"expected a JSON object, found {example!a:.60}")
    endings, label = example.get("endings"), example.get("label")
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError(f"endings: expected a list of 4 texts, found {endings!a:.60}")
    texts = {name: example.get(name) for name in ("ctx", "activity_label")}
    texts |= {name: example[name] for name in ("ctx_a", "ctx_b") if name in example}
    texts |= {f"endings[{i}]": ending for i, ending in enumerate(endings)}
    for name, text in texts.items():
        if not isinstance(text, str) or text != text.encode("utf-8", "ignore").decode("utf-8"):
            raise ValueError(f"{name}: expected a text of whole characters, found {text!a:.60}")
    if not example["ctx"]:
        raise ValueError("ctx: expected a text to continue, found an empty one")
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"label: expected 0, 1, 2 or 3, found {label!a:.60}")
    return example | {"label": int(label)}
