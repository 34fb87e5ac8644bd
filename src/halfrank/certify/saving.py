"""Folders are saved with a certificate: a 16-bit copy that is too far from the model in memory is refused.

The refused model is not lost: its weights, joined with what training kept beside them, go to a float32 folder beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from halfrank import whole
from halfrank.certify.budget import Budget, budget_for
from halfrank.certify.certificate import NAME, Certificate, Reason
from halfrank.certify.compare import Comparison, describe_data, usual_computes
from halfrank.data import probes
from halfrank.data.pairs import Group
from halfrank.errors import CertificateError, ModelError, NonFiniteWeightError
from halfrank.model import folder
from halfrank.model.adapters import refuse_own_base
from halfrank.model.families import head_modules
from halfrank.model.pieces import Source
from halfrank.model.scorer import Scorer
from halfrank.model.storage import within
from halfrank.numerics.formats import dtype_name

QUERIES, DOCUMENTS = 4, 2  # probe pairs of every save: 8, a fraction of a second for a small model
BESIDE = "-float32"  # what the folder of a refused model is called beside
Writer = Callable[[torch.dtype], Callable[[Path], None]]  # a dtype -> what fills a folder in it


def save(
    scorer: Scorer,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    writer: Writer | None = None,
    budget: Budget | None = None,
) -> Certificate | None:
    """Save as `folder.save` does, certified on probe pairs; None for float32 and for adapters, which lose nothing.

    `writer` gives what fills a folder in a dtype, `folder.writer` by default. Raises CertificateError where the copy
    breaks its budget and NonFiniteWeightError where `dtype` cannot hold the weights; `path` stays as it was, and the
    model is in float32 beside it.
    """
    refuse_own_base(scorer, path)
    storage = dtype or scorer.precision.storage
    writer = writer or (lambda storage: folder.writer(scorer, dtype=storage))
    stale = (*folder.stale_files(scorer), NAME)
    if storage is torch.float32 or scorer.adapters is not None:  # the frozen weights are not saved, so not narrowed
        whole.write_whole(path, writer(storage), stale=stale)
        return None
    try:
        certificate = certify_in_memory(scorer, storage, budget or budget_for(storage))
    except NonFiniteWeightError as error:
        beside = _keep_beside(path, writer, stale)
        raise NonFiniteWeightError(f"{error} The model is kept in float32 in '{beside}'.") from error
    if not certificate.passed:
        beside = _keep_beside(path, writer, stale)
        said = " ".join(f"{number}. {reason}" for number, reason in enumerate(certificate.reasons, 1))
        raise CertificateError(
            f"The {dtype_name(storage)} copy of this model is too far from float32 and was not saved to '{path}': "
            f"{said} The model is kept in float32 in '{beside}'."
        )
    write = writer(storage)

    def fill(stage: Path) -> None:
        write(stage)
        certificate.of_folder(stage, name=path.absolute().name).write(stage)

    whole.write_whole(path, fill, stale=stale)
    return certificate


def certify_in_memory(scorer: Scorer, storage: torch.dtype, budget: Budget) -> Certificate:
    """What saving in `storage` would cost where products are as narrow; the model is the same afterwards."""
    folder.refuse_unstorable(scorer, storage)
    groups = probe_groups()
    model = {"name": "", "storage": dtype_name(storage), "islands": list(scorer.islands), "sha256": {}}
    reference = {
        "name": "the model in memory",
        "storage": "float32",
        "islands": [],
        "sha256": {"weights": _hash(scorer)},
    }
    try:
        comparison = Comparison(scorer, groups, budget)
    except ModelError as error:
        reason = Reason("non-finite-scores", "float32", str(error))
        return Certificate(model, reference, describe_data(groups, "probe texts"), (), {}, asdict(budget), (reason,))
    # Outermost, so that the modules are fitted to their own weights again once these are back.
    with scorer.computing_in("float32"), holding(scorer, storage):
        measured, invariance, reasons = comparison.of(scorer, usual_computes(storage)[-1:], invariance=False)
    return Certificate(
        model, reference, describe_data(groups, "probe texts"), measured, invariance, asdict(budget), tuple(reasons)
    )


def probe_groups() -> list[Group]:
    """The few built-in lists that every save is certified on."""
    return [
        replace(group, documents=group.documents[:DOCUMENTS], grades=group.grades[:DOCUMENTS])
        for group in probes.groups()[:QUERIES]
    ]


@contextmanager
def holding(scorer: Scorer, storage: torch.dtype) -> Iterator[None]:
    """Let the model compute for a while as a folder read in `storage` would, in a format that rounds to `storage`.

    Only what that format does not round by itself is held in a rounded copy: norms, biases, the head, islands. A copy
    of all weights would double what a save takes.
    """
    wide = {*head_modules(scorer.model), *scorer.islands}
    rounding: set[int] = set()
    others: dict[int, nn.Parameter] = {}
    for name, module in scorer.model.named_modules():
        rounds = type(module) in (nn.Linear, nn.Embedding) and not within(name, wide)
        for key, parameter in module.named_parameters(recurse=False):
            if rounds and key == "weight":
                rounding.add(id(parameter))
            else:
                others[id(parameter)] = parameter
    held = [(parameter, parameter.data) for parameter in others.values()]
    residuals = dict(scorer.residuals)
    try:
        for parameter, data in held:
            parameter.data = data.to(storage) if id(parameter) in rounding else data.to(storage).float()
        scorer.residuals.clear()
        yield
    finally:
        for parameter, data in held:
            parameter.data = data
        scorer.residuals.update(residuals)


def _keep_beside(path: Path, writer: Writer, stale: tuple[str, ...]) -> Path:
    beside = path.absolute().with_name(path.absolute().name + BESIDE)
    whole.write_whole(beside, writer(torch.float32), stale=stale)
    return beside


def _hash(scorer: Scorer) -> str:
    """Sha256 of the float32 weights, residuals joined, a piece at a time: a wide copy of a table may not fit."""
    found = hashlib.sha256()
    for name, tensor in scorer.model.state_dict().items():
        found.update(name.encode())
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        for piece in Source(tensor, dtype, scorer.residuals.get(name)).pieces():
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
