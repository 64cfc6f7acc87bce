"""Readers of llm.c's files from the tables in docs/formats.md, without our code; for test_llmc*.py."""

import re
from pathlib import Path

import numpy as np
from conftest import ROOT

FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
# (llm.c's name, shape, offset in numbers, our name) of every tensor
TABLE = re.findall(r"^    (\w+)\s+\(([^)]*)\)\s+(\S.*?)\s+(transformer\.[\w.{}]+)", FORMATS, re.MULTILINE)
STATE = r"^    (\w+)\s+(\(.*?\)|as tensors)\s+(int32|fp32)\s+(\d.*)$"


def read_tensors(raw: bytes, sizes: dict[str, int], start: int, bf16: bool = False) -> dict[str, np.ndarray]:
    """Tensors as float64 by our names, found by the shapes and offsets of the table."""
    assert len(TABLE) == 16
    a, b = sizes["L"] * sizes["C"], sizes["L"] * sizes["C"] ** 2
    letters = sizes | {"D": (sizes["Vp"] + sizes["P"]) * sizes["C"], "a": a, "b": b}
    letters |= {"3C": 3 * sizes["C"], "4C": 4 * sizes["C"]}
    tensors, end, size = {}, start, 2 if bf16 else 4
    for name, shape, first, ours in TABLE:
        offset = start + size * eval(first, {}, letters)
        assert offset == end, f"{name} does not begin where the tensor before it ends"
        shape = [letters[s.strip()] for s in shape.split(",")]
        end = offset + size * int(np.prod(shape))
        values = np.frombuffer(raw[offset:end], "<u2" if bf16 else "<f4")
        values = (values.astype(np.uint32) << 16).view(np.float32) if bf16 else values
        values = values.astype(np.float64).reshape(shape)
        tensors |= {ours.format(i=i): part for i, part in enumerate(values if "{i}" in ours else [values])}
    assert end == len(raw), "bytes that the table does not name"
    return tensors


def read_model(path: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """(sizes, tensors) of a model file."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[0] == 20240326 and header[1] in (3, 5) and not header[8:].any()
    sizes = dict(zip(("P", "V", "L", "nh", "C", "Vp"), header[2:8].tolist(), strict=True))
    return sizes, read_tensors(raw, sizes, 1024, bf16=header[1] == 5)


def read_state(path: Path) -> dict[str, np.ndarray]:
    """x, y (B, T), logits (B, T, V), loss (), gradients of a debug state; its model must lie beside it."""
    sizes, _ = read_model(path.with_name(path.name.replace("_debug_state", "")))
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:2].tolist() == [20240327, 2] and not header[4:].any()
    letters = sizes | {"B": int(header[2]), "T": int(header[3])}
    *rows, gradients = re.findall(STATE, FORMATS, re.MULTILINE)
    assert [row[0] for row in (*rows, gradients)] == ["x", "y", "logits", "loss", "gradients"]
    fields = {}
    for name, shape, kind, first in rows:
        shape, dtype = [letters[s] for s in re.findall(r"\w+", shape)], "<i4" if kind == "int32" else "<f4"
        values = np.frombuffer(raw, dtype, int(np.prod(shape)), eval(first, {}, letters))
        fields[name] = values.reshape(shape)
    return fields | read_tensors(raw, sizes, eval(gradients[3], {}, letters))


def read_tokenizer(path: Path) -> tuple[list[bytes], int]:
    """Bytes of all tokens, and the end of text's id."""
    raw, position, tokens = path.read_bytes(), 1024, []
    header = np.frombuffer(raw[:1024], "<i4").tolist()
    assert header[:2] == [20240328, 2] and not any(header[4:])
    for _ in range(header[2]):
        tokens.append(raw[position + 1 : position + 1 + raw[position]])
        position += 1 + raw[position]
    assert position == len(raw)
    return tokens, header[3]
