"""A model folder in another format or for another runtime, certified: what `halfrank export` does."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halfrank import whole
from halfrank.certify import saving
from halfrank.certify.budget import Budget, budget_for
from halfrank.certify.certificate import Certificate, Measured, Reason
from halfrank.certify.compare import Comparison, describe_data, describe_model
from halfrank.data import probes
from halfrank.data.pairs import Group
from halfrank.errors import CertificateError, DataError
from halfrank.model import adapters, folder, graphs
from halfrank.model.backends import format_named
from halfrank.model.scorer import Scorer
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
    _refuse_used(out, Path(source))
    scorer = _merged(source)
    scorer.widen(islands)
    card, kept = _text_of(Path(source) / "README.md"), _kept(Path(source))

    def writer(storage: torch.dtype) -> Callable[[Path], None]:
        write = folder.writer(scorer, dtype=storage, card=card, max_shard_size=max_shard_size)

        def fill(stage: Path) -> None:
            write(stage)
            _keep(kept, stage)

        return fill

    return saving.save(scorer, out, dtype=storage, writer=writer)


def export_graph(
    source: str | os.PathLike[str],
    out: Path,
    *,
    kind: str,
    int8: bool = False,
    computes: Sequence[str] = ("float32",),
    groups: Sequence[Group] | None = None,
    data_name: str = "built-in texts",
) -> Certificate:
    """Write the model at `source` to `out` as a graph of the runtime `kind`, onnx or openvino, with all beside it that
    a folder needs but torch's weights.

    It is certified on `groups`, built-in texts by default, by running it in each of `computes` (OpenVINO has bfloat16
    too, where the processor has). Raises CertificateError, with nothing left
    behind, where its scores are too far from those of the source in float32.
    """
    format_named(kind)
    _refuse_used(out, Path(source))
    scorer = _merged(source)
    groups = probes.groups() if groups is None else groups
    what = f"{'int8' if int8 else 'float32'} {kind}"
    whole.make(out.absolute().parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.exporting-", dir=out.absolute().parent) as temporary:
        stage = Path(temporary) / out.name
        stage.mkdir()
        graphs.write_graph(scorer, stage, kind, int8=int8)
        folder.write_settings(scorer, stage, card=_text_of(Path(source) / "README.md"))
        _keep(_kept(Path(source)), stage)
        parts = [_compared(scorer, stage, kind, name, int8=int8, groups=groups) for name in computes]
        certificate = Certificate(
            {"name": out.absolute().name, "storage": what, "islands": [], "sha256": {}},
            describe_model(scorer, Path(source)),
            describe_data(groups, data_name),
            tuple(measured for measured, *_ in parts),
            parts[0][1],
            asdict(parts[-1][2]),
            tuple(reason for *_, reasons in parts for reason in reasons),
        ).of_folder(stage, name=out.absolute().name)
        if not certificate.passed:
            said = " ".join(f"{number}. {reason}" for number, reason in enumerate(certificate.reasons, 1))
            raise CertificateError(
                f"The {what} copy of this model is too far from float32 and was not written to '{out}': {said} "
                + ("Export it without --int8." if int8 else "Use backend='torch'.")
            )
        certificate.write(stage)
        whole.write_whole(out, partial(_move, stage))
    return certificate


def _compared(
    scorer: Scorer, stage: Path, kind: str, compute: str, *, int8: bool, groups: Sequence[Group]
) -> tuple[Measured, dict[str, float | None], Budget, list[Reason]]:
    """What the graph in `stage` makes of the groups, run as whoever loads the folder will run it."""
    rounded = torch.int8 if int8 else torch.bfloat16 if compute == "bfloat16" else torch.float32
    budget = budget_for(rounded, copied=False)
    if rounded is not torch.float32:
        # One scale of 8 bits for all pairs of a piece, 16 bits summed in another order: a score depends a little on its
        # neighbours. How much is in the certificate; pairs that saw each other would not pass by their scores.
        budget = replace(budget, max_invariance_error=1.0)
    copy = folder.load(stage, folder.LoadOptions(backend=kind, compute=compute, instruction=scorer.instruction))
    measured, invariance, reasons = Comparison(scorer, groups, budget).of(copy, ["float32"])
    named = f"{kind} {compute}"
    own = [replace(reason, text=reason.text.replace("In float32", f"In {named}", 1)) for reason in reasons]
    return replace(measured[0], compute=named, headroom_bits=None, headroom_module=""), invariance, budget, own


def _move(stage: Path, target: Path) -> None:
    for item in stage.iterdir():
        shutil.move(item, target / item.name)


def _refuse_used(out: Path, origin: Path) -> None:
    if out.exists() and origin.exists() and out.samefile(origin):
        raise DataError(f"'{out}' is the model itself: export to another folder.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise DataError(f"'{out}' is not an empty folder. Choose another one.")


def _merged(source: str | os.PathLike[str]) -> Scorer:
    """The model in float32 products, its adapters merged into it."""
    scorer = folder.load(source, folder.LoadOptions(compute="float32"))
    if scorer.adapters is not None:
        adapters.merge(scorer)
    return scorer


def _kept(origin: Path) -> dict[str, Any]:
    settings = json.loads(_text_of(origin / BESIDE) or "{}")
    return {name: settings[name] for name in KEPT if name in settings}


def _keep(kept: dict[str, Any], stage: Path) -> None:
    content = json.loads((stage / BESIDE).read_text(encoding="utf-8")) | kept
    (stage / BESIDE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
