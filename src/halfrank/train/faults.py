"""What a failed step is due to, found by running parts of it again: its pairs, a narrow format, or the weights.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from halfrank.data.packing import Batch, by_budget, pack
from halfrank.data.tokens import TokenRows
from halfrank.errors import NonFiniteWeightError
from halfrank.model.families import position_limit
from halfrank.model.scorer import PROBES, Scorer
from halfrank.numerics.formats import all_finite
from halfrank.train.examples import Examples, MicroBatch, micro_batches
from halfrank.train.step import LossFunction, RandomState, random_state, restore

SCALE, NARROW, PAIRS, WEIGHTS, LOSS = "loss scale", "narrow format", "pairs", "weights", "loss"
SMALLEST_SCALE = 2.0**-14
FAR = 100.0  # times the spread of all labels: a label further from their median is a mistake, not a measurement
# What a loss of the user's may raise that needs more than one pair at a time.
UNJUDGED = (ValueError, RuntimeError, IndexError, TypeError)


@dataclass(frozen=True)
class Fault:
    """What is wrong: `kind` is one of the constants above; `pairs` maps rows to reasons."""

    kind: str
    reason: str
    pairs: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """A step that failed, with all that it takes to run it, or parts of it, again."""

    scorer: Scorer
    examples: Examples
    units: Sequence[int]
    loss: LossFunction
    per_unit: bool
    max_tokens: int
    scale: float
    random: RandomState
    reference: Sequence[int]  # units of steps that went well

    @cached_property
    def parts(self) -> list[MicroBatch]:
        return micro_batches(self.examples, self.units, max_tokens=self.max_tokens, per_unit=self.per_unit)

    @property
    def rows(self) -> list[int]:
        return [int(row) for unit in self.units for row in self.examples.units[unit]]


def screen(scorer: Scorer, examples: Examples) -> dict[int, str]:
    """Rows that cannot be trained on, with the reason: no finite label, an impossible length, unknown tokens.

    An embedding row that is not finite makes its pairs unusable and is set to the mean of the others, so that the
    model can be saved; any other weight that is not finite raises NonFiniteWeightError.
    """
    faults: dict[int, str] = {}
    for row in (~examples.labels.isfinite()).nonzero()[:, 0].tolist():
        faults[row] = f"its label is {examples.labels[row].item()}"
    lengths, limit = examples.tokens.lengths, position_limit(scorer.model) or math.inf
    for row in np.flatnonzero((lengths == 0) | (lengths > limit)).tolist():
        faults.setdefault(row, f"it has {lengths[row]} tokens, and the model holds 1 to {limit:g}")
    table = _embedding(scorer.model)
    if table is not None:
        unusable = _unusable_tokens(scorer, table)
        for row, token in _strange_tokens(examples.tokens, unusable):
            outside = not 0 <= token < len(unusable)
            why = f"the model has {len(unusable)} tokens" if outside else "whose embedding is not finite"
            faults.setdefault(row, f"it holds token {token}, {why}")
    _refuse_other_weights(scorer.model)
    return faults


def examine(attempt: Attempt) -> Fault:
    """Why a step was not finite, from the outside in: labels, scores, losses, gradients; random state is kept."""
    before = random_state(attempt.scorer.device)
    try:
        return _by_labels(attempt) or _by_scores(attempt) or _by_losses(attempt) or _by_gradients(attempt)
    finally:
        restore(before)


def absurd_labels(attempt: Attempt) -> dict[int, str]:
    """Rows of the step whose label lies far outside of all labels, with the reason."""
    held = attempt.examples.labels.double()
    finite = held[held.isfinite()].numpy()
    if not len(finite):
        return {}
    edge = max(0.01, 2.0 / len(finite))  # of a small set, one of two labels is more than a hundredth
    low, high = np.quantile(finite, edge, method="higher"), np.quantile(finite, 1.0 - edge, method="lower")
    middle = float(np.median(finite))
    # At least 1: where nearly all labels are 0, the few that are 1 are what is to be learned.
    reach = FAR * max(high - low, abs(middle), 1.0)
    return {
        row: f"its label is {held[row].item():g}, and nearly all labels lie from {low:g} to {high:g}"
        for row in attempt.rows
        if abs(held[row].item() - middle) > reach
    }


def reference_loss(attempt: Attempt) -> float:
    """The loss of the last steps that went well, with the weights of now; NaN where there was none."""
    if not attempt.reference:
        return math.nan
    before = random_state(attempt.scorer.device)
    try:
        units = [unit for unit in attempt.reference if len(attempt.examples.units[unit])]
        parts = micro_batches(attempt.examples, units, max_tokens=attempt.max_tokens, per_unit=attempt.per_unit)
        with torch.no_grad():
            return sum(_weighted(attempt, attempt.scorer.logits(part.batch), part).item() for part in parts)
    finally:
        restore(before)


def _by_labels(attempt: Attempt) -> Fault | None:
    labels = attempt.examples.labels
    bad = {row: f"its label is {labels[row].item()}" for row in attempt.rows if not bool(labels[row].isfinite())}
    bad = bad or absurd_labels(attempt)
    return Fault(PAIRS, next(iter(bad.values())), bad) if bad else None


def _by_scores(attempt: Attempt) -> Fault | None:
    bad = _non_finite(*_scores(attempt))
    if not bad:
        return None
    if attempt.scorer.active_compute.narrow is not None:
        bad = _non_finite(*_scores(attempt, "float32"))
        if not bad:
            return Fault(NARROW, f"scores leave the range of {attempt.scorer.active_compute.name}")
    return _pairs_or_weights(attempt, dict.fromkeys(bad, "its score is not finite, not even in float32"))


def _by_losses(attempt: Attempt) -> Fault | None:
    rows, values_PL = _scores(attempt)
    place = {row: index for index, row in enumerate(rows)}
    restore(attempt.random)
    with torch.no_grad():
        whole = [
            _weighted(attempt, values_PL[[place[row] for row in part.batch.rows]], part).item()
            for part in attempt.parts
        ]
    if math.isfinite(sum(whole)):
        return None
    alone = {unit: _alone(attempt, values_PL[[place[int(r)] for r in attempt.examples.units[unit]]], unit)
             for unit in attempt.units}  # fmt: skip
    bad = [unit for unit, value in alone.items() if value is not None and not math.isfinite(value)]
    if not bad:
        return Fault(LOSS, "the loss of the batch is not finite, though its scores and labels are")
    why = "the pair's loss is not finite, though its score and label are"
    if len(bad) == len(alone) and not math.isfinite(reference_loss(attempt)):
        return Fault(LOSS, "the loss of every pair is not finite, though scores and labels are")
    return Fault(PAIRS, why, {int(row): why for unit in bad for row in attempt.examples.units[unit]})


def _by_gradients(attempt: Attempt) -> Fault:
    if attempt.scale != 1.0 and _gradients_finite(attempt, attempt.parts, SMALLEST_SCALE):
        return Fault(SCALE, f"gradients overflow at a loss scale of {attempt.scale:g}")
    if attempt.scorer.active_compute.narrow is not None and _gradients_finite(attempt, attempt.parts, 1.0, "float32"):
        return Fault(NARROW, f"gradients leave the range of {attempt.scorer.active_compute.name} at any loss scale")
    bad = [
        unit for unit in attempt.units
        if not _gradients_finite(
            attempt,
            micro_batches(attempt.examples, [unit], max_tokens=attempt.max_tokens, per_unit=attempt.per_unit),
            1.0, "float32",
        )
    ]  # fmt: skip
    if not bad:
        return Fault(LOSS, "the gradients of the batch are not finite, though those of each pair are")
    why = "the pair's gradient is not finite, though its loss is"
    return _pairs_or_weights(attempt, {int(row): why for unit in bad for row in attempt.examples.units[unit]})


def _pairs_or_weights(attempt: Attempt, bad: dict[int, str]) -> Fault:
    """Pairs that break sound weights, or weights that break sound pairs: a step that went well tells."""
    tokens: TokenRows = attempt.examples.tokens
    known = (int(row) for unit in attempt.reference for row in attempt.examples.units[unit])
    rows: Sequence[int] = [row for row in known if row not in bad]
    if not rows:
        tokens = attempt.scorer.pairs.encode(PROBES)
        rows = range(len(PROBES))
    rows = by_budget(tokens.lengths, attempt.max_tokens, order=rows)[0]
    with torch.no_grad(), attempt.scorer.computing_in("float32"):
        sound = bool(attempt.scorer.logits(pack(tokens, rows)).isfinite().all())
    if sound:
        return Fault(PAIRS, next(iter(bad.values())), bad)
    return Fault(WEIGHTS, "pairs that were scored before are not finite any more: the weights have diverged")


def _scores(attempt: Attempt, compute: str | None = None) -> tuple[list[int], Tensor]:
    """Rows and logits (P, L) of the step, with its own random numbers."""
    restore(attempt.random)
    rows: list[int] = []
    values: list[Tensor] = []
    with torch.no_grad(), attempt.scorer.computing_in(compute) if compute else nullcontext():
        for batch in _batches(attempt.parts):
            rows += batch.rows
            values.append(attempt.scorer.logits(batch))
    return rows, torch.cat(values)


def _batches(parts: Iterable[MicroBatch]) -> list[Batch]:
    return [batch for part in parts for batch in part.pieces or (part.batch,)]


def _non_finite(rows: list[int], values_PL: Tensor) -> list[int]:
    return [rows[index] for index in (~values_PL.isfinite().all(dim=1)).nonzero()[:, 0].tolist()]


def _weighted(attempt: Attempt, logits_PL: Tensor, part: MicroBatch) -> Tensor:
    device = logits_PL.device
    return attempt.loss(logits_PL, part.labels_P.to(device), part.groups_P.to(device)) * part.share


def _alone(attempt: Attempt, logits_PL: Tensor, unit: int) -> float | None:
    labels = attempt.examples.labels[attempt.examples.units[unit]].to(logits_PL.device)
    groups = torch.zeros(len(labels), dtype=torch.long, device=logits_PL.device)
    try:
        return attempt.loss(logits_PL, labels, groups).item()
    except UNJUDGED:
        return None  # the loss needs more than this unit: it can say nothing about it


def _gradients_finite(attempt: Attempt, parts: Sequence[MicroBatch], scale: float, compute: str | None = None) -> bool:
    # autograd.grad and not backward(): nothing is left in the parameters, no hook of an optimizer runs.
    restore(attempt.random)
    parameters = [p for p in attempt.scorer.model.parameters() if p.requires_grad]
    with attempt.scorer.computing_in(compute) if compute else nullcontext():
        for part in parts:
            try:
                loss = _weighted(attempt, attempt.scorer.logits(part.batch), part) * scale
            except UNJUDGED:
                continue
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            if not all(bool(g.isfinite().all()) for g in gradients if g is not None):
                return False
    return True


def _embedding(model: nn.Module) -> nn.Embedding | None:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def _unusable_tokens(scorer: Scorer, table: nn.Embedding) -> np.ndarray:
    """(V,) bool: rows of the embedding that are not finite; they are set to the mean of the others."""
    if all_finite(table.weight):  # ten times faster than to ask for each row
        return np.zeros(len(table.weight), dtype=bool)
    with torch.no_grad():
        bad = ~table.weight.isfinite().all(dim=1)
        if not bool(bad.all()):
            # What transformers gives to tokens that are new.
            table.weight[bad] = table.weight[~bad].float().mean(dim=0).to(table.weight.dtype)
            count = int(bad.sum())
            scorer.note(
                f"{count} embedding row(s) were not finite (tokens {bad.nonzero()[:5, 0].tolist()}): pairs with these "
                "tokens are left out, and the rows are set to the mean of the others."
            )
    return bad.cpu().numpy()


def _strange_tokens(tokens: TokenRows, unusable: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, token) of every token that the model does not have, or that is `unusable` (V,)."""
    first = 0
    for block in tokens.blocks():
        ids = block.input_ids
        outside = (ids < 0) | (ids >= len(unusable))
        for place in np.flatnonzero(outside | unusable[np.where(outside, 0, ids)]).tolist():
            yield first + int(np.searchsorted(block.offsets, place, side="right")) - 1, int(ids[place])
        first += len(block)


def _refuse_other_weights(model: nn.Module) -> None:
    bad = [name for name, parameter in model.named_parameters() if not all_finite(parameter)]
    if bad:
        raise NonFiniteWeightError(
            f"{len(bad)} tensors hold NaN or infinite values ({', '.join(bad[:5])}): no training can mend them. "
            "Load another copy of the model."
        )
