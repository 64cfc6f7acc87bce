"""Copy our code into a saved model's folder, so that the model loads on a machine without this project.

    export_code("my_model", Path("model.py"))       # model.py and all files of ours that it imports, flat

transformers (docs/transformers/custom_models) loads such code with trust_remote_code=True. It takes only
files side by side that import each other relatively: `from layers.x import y` becomes `from .x import y`."""

import ast
from pathlib import Path


def export_code(folder: str | Path, start: Path) -> None:
    """Write the file `start`, and every file below its folder that it imports, directly or indirectly.
    A copy can be copied again. ValueError, before anything is written, if two files have the same name."""
    waiting, found, flat = [start], {}, {}
    while waiting:
        path = waiting.pop()
        if found.setdefault(path.name, path) != path:
            raise ValueError(f"{path} and {found[path.name]}: a flat folder cannot hold two {path.name}")
        if path.name in flat:
            continue
        code = path.read_text(encoding="utf-8")
        lines = code.splitlines(keepends=True)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                source = start.parent.joinpath(*node.module.split(".")).with_suffix(".py")
                if source.is_file():
                    waiting.append(source)
                    line = lines[node.lineno - 1]
                    before = "from " + "." * node.level + node.module
                    lines[node.lineno - 1] = line.replace(before, f"from .{source.stem}", 1)
        flat[path.name] = "".join(lines)
    for name, code in flat.items():
        target = Path(folder, name)
        if not (target.exists() and target.samefile(found[name])):
            target.write_text(code, encoding="utf-8")
