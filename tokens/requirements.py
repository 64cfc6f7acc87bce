"""Imported first by every script: an old Python, a missing package and a warning get one line each.
It also chooses how torch allocates GPU memory, which torch reads when it is imported.

An old Python must be able to read this file and what the scripts have before it. So it is written for 3.8."""

import os
import re
import sys
import warnings

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIST = os.path.join(HERE, "requirements.txt")


def stop(problem):
    """End the script with exit code 2, after one line on stderr that names the problem."""
    folder, name = os.path.split(sys.argv[0])
    script = "python -m " + os.path.basename(folder) if name == "__main__.py" else name
    print(f"{script}: error: {problem}", file=sys.stderr)
    sys.exit(2)


def explain(kind, error, traceback):
    """For sys.excepthook: one line if a package of requirements.txt is missing, otherwise the traceback."""
    if kind is ModuleNotFoundError and not hasattr(sys, "ps1"):  # ps1: Python is interactive
        with open(LIST, encoding="utf-8") as file:
            packages = re.findall(r"^\w+", file.read(), re.MULTILINE)
        if str(error.name).split(".")[0] in packages:
            stop(f"{error.name} is not installed; install it with: pip install -r requirements.txt")
    sys.__excepthook__(kind, error, traceback)


if sys.version_info < (3, 11):  # noqa: UP036 (ruff believes that no older one gets here)
    stop("this is Python {}.{}, but 3.11 or newer is needed".format(*sys.version_info))
# A program of others that imports our modules keeps its own settings.
if os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "").startswith(HERE + os.sep):
    sys.excepthook = explain
    # Without the line of our source code, which tells a user nothing.
    warnings.formatwarning = lambda message, *place, **more: f"warning: {message}\n"
    # Experts get other numbers of rows in every step. Segments of fixed size would fragment a GPU's memory.
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
