"""What a folder of sentence-transformers is made of: the modules that it lists, and how its first one reads texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfrank.errors import ModelError
from halfrank.model.modular import CONFIG, Spec

MODULES, TRANSFORMER = "modules.json", "sentence_bert_config.json"
TRANSFORMER_TYPE = "sentence_transformers.base.modules.transformer.Transformer"
FileOf = Callable[[str], str | None]  # a file of a folder or repository, by its name there


@dataclass(frozen=True)
class Parts:
    """The settings of the first module, and the modules after it; `listed` is False for a folder without a list."""

    listed: bool
    transformer: Mapping[str, Any]
    steps: tuple[Spec, ...] = ()

    @property
    def answers(self) -> tuple[int, int | None] | None:
        """Tokens of yes and no where the folder scores by them; no may be None."""
        if not self.steps or not self.steps[0].type.endswith(".LogitScore"):
            return None
        config = self.steps[0].config
        return config["true_token_id"], config.get("false_token_id")

    @property
    def modular(self) -> bool:
        """True where steps of other kinds make the score."""
        return bool(self.steps) and self.answers is None


def parts_of(file_of: FileOf, *, cross_encoder: bool) -> Parts:
    """Read the list of modules; that of another kind of model than a cross-encoder counts as none."""
    listing = file_of(MODULES) if cross_encoder else None
    if listing is None:
        return Parts(False, {})
    first, *others = json.loads(Path(listing).read_text(encoding="utf-8"))
    if first["path"] or not first["type"].endswith(".Transformer"):
        raise ModelError(f"The first module must be a Transformer in the folder itself; it is {first['type']!r}.")
    return Parts(True, _json(file_of(TRANSFORMER)), tuple(_spec(entry, file_of) for entry in others))


def _spec(entry: Mapping[str, Any], file_of: FileOf) -> Spec:
    path = Path(entry["path"])
    if path.is_absolute() or ".." in path.parts:
        raise ModelError(f"{MODULES} names the path {entry['path']!r}, which leads out of the folder.")
    return Spec(entry["name"], entry["path"], entry["type"], _json(file_of(f"{entry['path']}/{CONFIG}")))


def _json(path: str | None) -> dict[str, Any]:
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
