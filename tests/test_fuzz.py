"""Run: python -m pytest tests/test_fuzz.py"""

import re
import sys
from types import SimpleNamespace

import fuzz
import pytest
from processes import finish, start


@pytest.mark.slow
def test_inputs_of_every_group_are_tried_and_counted(tmp_path):
    code = finish(start(["--inputs", 1, "--seed", 5], tmp_path / "out", script="fuzz"), 300)
    table = r"^(\w+) +1 tried +(\d) accepted +(\d) refused +(\d) wrong$"
    rows = re.findall(table, (tmp_path / "out").read_text(), re.M)
    assert [row[0] for row in rows] == list(fuzz.GROUPS)
    assert all(sum(map(int, counts)) == 1 for _, *counts in rows)
    assert code == 0 and all(int(wrong) == 0 for *_, wrong in rows)


def a_traceback(arguments):
    raise ValueError("planted.txt")


def two_lines(arguments):
    print("planted.txt: bad\nmore", file=sys.stderr)
    return 2


def no_end(arguments):
    while True:
        pass


def good_refusal(arguments):
    print("planted.txt is bad", file=sys.stderr)
    return 2


FAULTS = [(a_traceback, "traceback"), (two_lines, "2 lines"), (no_end, "hangs"), (good_refusal, "refused")]
FAULTS += [(lambda _: bytes(1 << 40), "traceback"), (lambda _: 3, "exit code 3"), (lambda _: 0, "accepted")]


@pytest.mark.parametrize("fault, verdict", FAULTS)
def test_a_planted_fault_is_counted_as_wrong(fault, verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 0.5)
    monkeypatch.setitem(sys.modules, "planted", SimpleNamespace(main=fault))
    _, found, _ = fuzz.trial(lambda _: fuzz.Case("", "planted", [], ["planted.txt"]), "", tmp_path)
    assert found.startswith(verdict)
