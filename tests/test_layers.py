"""Imports go down the house, never up, and never sideways between folders on one floor."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "halfrank"
FLOORS = [
    {"__main__"}, {"cli"}, {"demo"}, {"cross_encoder"}, {"train", "export"}, {"certify"},
    {"evaluate", "doctor", "score"}, {"predict"}, {"diagnosis", "memory"}, {"model"}, {"precision"},
    {"losses", "numerics", "data"}, {"whole"}, {"errors", "allocator"},
]  # fmt: skip
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def imports(path: Path) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [
        name for node in nodes
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    ]  # fmt: skip


def test_every_import_goes_down() -> None:
    checked = 0
    for path in sorted(SOURCE.rglob("*.py")):
        unit = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for name in imports(path):
            assert not name.startswith("sentence_transformers"), f"{path}: the core does not import the peer"
            parts = name.split(".")
            if parts[0] == "halfrank" and len(parts) > 1 and unit not in ("__init__", parts[1]):
                checked += 1
                assert FLOOR[parts[1]] > FLOOR[unit], (
                    f"{path.relative_to(SOURCE)} imports {name}, which is not below it"
                )
    assert checked > 20


def test_every_module_has_a_floor() -> None:
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__init__", "__pycache__", "py"} <= FLOOR.keys()
