"""Copies of our code for a saved model's folder, so that it loads on a machine without this project.

    export_code("my_model", Path("model.py"))       # model.py and all files of ours that it imports, flat

transformers loads the code of a folder with trust_remote_code=True. It takes only files that lie side by side
and import each other relatively, so `from layers.experts import Experts` becomes `from .experts import
Experts`.

Reference: https://huggingface.co/docs/transformers/custom_models
"""

import re
from pathlib import Path

IMPORT = re.compile(r"^([ \t]*from )(\.?)([\w.]+)( import )", re.MULTILINE)


def export_code(folder: str | Path, start: Path) -> None:
    """Write the file `start` and every file that it imports, directly or not, into `folder`, side by side.

    Files are looked for beside `start` and in the folders there; a copy that this function has made can be
    copied again. ValueError if two of the files have the same name.
    """

    def source(module: str) -> Path:
        return start.parent.joinpath(*module.split(".")).with_suffix(".py")

    def relative(match: re.Match) -> str:
        before, _, module, after = match.groups()
        return f"{before}.{module.split('.')[-1]}{after}" if source(module).is_file() else match[0]

    waiting, copied = [start], {}
    while waiting:
        path = waiting.pop()
        if copied.setdefault(path.name, path) != path:
            raise ValueError(f"{path} and {copied[path.name]}: a flat folder cannot hold two {path.name}")
        code = path.read_text(encoding="utf-8")
        found = {source(match[3]) for match in IMPORT.finditer(code)}
        waiting += [file for file in found if file.is_file() and copied.get(file.name) != file]
        target = Path(folder, path.name)
        if not (target.exists() and target.samefile(path)):
            target.write_text(IMPORT.sub(relative, code), encoding="utf-8")
