"""A model folder in another format, certified: what `halfrank export` does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from halfrank.certify import saving
from halfrank.certify.certificate import Certificate
from halfrank.errors import DataError
from halfrank.model import adapters, folder
from halfrank.model.shards import MAX_SHARD_SIZE
from halfrank.numerics.formats import parse_dtype

BESIDE = "config_sentence_transformers.json"
KEPT = ("prompts", "default_prompt_name")  # what that file says beyond the model


def export(
    source: str | os.PathLike[str],
    out: Path,
    *,
    dtype: str | torch.dtype,
    max_shard_size: str = MAX_SHARD_SIZE,
    islands: tuple[str, ...] = (),
) -> Certificate | None:
    """Write the model at `source` to `out` in `dtype`, prompts and card included; None for float32.

    Adapters are merged into the model that they belong to. `islands` compute in float32 from now on, beside those that
    the folder names. Raises CertificateError and leaves a float32 folder beside `out` where the copy scores too far
    from its source, DataError where `out` is in use.
    """
    storage = parse_dtype(dtype)
    origin = Path(source)
    if out.exists() and origin.exists() and out.samefile(origin):
        raise DataError(f"'{out}' is the model itself: export to another folder.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise DataError(f"'{out}' is not an empty folder. Choose another one.")
    scorer = folder.load(source, folder.LoadOptions(compute="float32"))
    if scorer.adapters is not None:
        adapters.merge(scorer)
    scorer.widen(islands)
    card = _text_of(origin / "README.md")
    settings = json.loads(_text_of(origin / BESIDE) or "{}")
    kept = {name: settings[name] for name in KEPT if name in settings}

    def writer(storage: torch.dtype) -> Callable[[Path], None]:
        write = folder.writer(scorer, dtype=storage, card=card, max_shard_size=max_shard_size)

        def fill(stage: Path) -> None:
            write(stage)
            content = json.loads((stage / BESIDE).read_text(encoding="utf-8")) | kept
            (stage / BESIDE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

        return fill

    return saving.save(scorer, out, dtype=storage, writer=writer)


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
