"""fuzz.py tries inputs of all groups, and counts every kind of fault as wrong."""

import re
import sys
import time
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


def says(text: str, code: int):
    """A command that prints this to stderr and ends with this code."""
    return lambda _: print(text, file=sys.stderr) or code


FAULTS = [(lambda _: {}["planted.txt"], "traceback"), (lambda _: bytes(1 << 40), "traceback")]
FAULTS += [(lambda _: time.sleep(99), "hangs"), (lambda _: 3, "exit code 3"), (lambda _: 0, "accepted")]
FAULTS += [(says("planted.txt: bad\nmore", 2), "2 lines"), (says("planted.txt is bad", 2), "refused")]
FAULTS += [(says("bad", 2), "names nothing"), (says("planted.txt" + "!" * 999, 2), "1 lines")]


@pytest.mark.parametrize("fault, verdict", FAULTS)
def test_a_planted_fault_is_counted_as_wrong(fault, verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 0.5)
    monkeypatch.setitem(sys.modules, "planted", SimpleNamespace(main=fault))
    _, found, _ = fuzz.trial(lambda _: fuzz.Case("", "planted", [], ["planted.txt"]), "", tmp_path)
    assert found.startswith(verdict)
