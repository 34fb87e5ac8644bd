"""Training data ready for the loop: tokens, labels, and the units (pairs or groups) that batches are made of."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfrank.data.packing import Batch, by_budget, pack
from halfrank.data.pairs import Group, Pair
from halfrank.data.tokens import Encoder, Tokens
from halfrank.errors import DataError


@dataclass(frozen=True)
class Examples:
    """P tokenized pairs with labels; `units` are the rows of each pair or group, never split over two batches."""

    tokens: Tokens
    labels: Tensor  # (P,) float32
    units: list[np.ndarray]
    grouped: bool
    records: Callable[[int], dict[str, Any]] | None = None  # row -> its texts and source, for messages and files

    def __len__(self) -> int:
        return len(self.units)

    def record(self, row: int) -> dict[str, Any]:
        """A pair as its file had it: row, source, query, document, label."""
        known = {"source": "", "query": None, "document": None} if self.records is None else self.records(row)
        return {"row": row, **known, "label": self.labels[row].item()}

    def rows(self) -> np.ndarray:
        """The rows of all units."""
        return np.concatenate(self.units)

    def without(self, rows: Iterable[int]) -> Examples:
        """The same examples with `rows` in no unit; units stay in their places, some perhaps empty."""
        left = np.fromiter(rows, dtype=np.int64)
        return replace(self, units=[unit[~np.isin(unit, left)] for unit in self.units])


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass sees; `share` is its part of the whole batch's mean."""

    batch: Batch
    labels_P: Tensor
    groups_P: Tensor
    share: float
    pieces: tuple[Batch, ...] = ()  # the same pairs in order, where one group alone exceeds the token budget


def from_pairs(pairs: Sequence[Pair], tokenizer: Encoder, progress: Callable[[int], None] | None = None) -> Examples:
    """Examples of labelled pairs; every pair is a unit. Raises DataError for a pair without a label."""
    labels = torch.tensor([_label(pair, row) for row, pair in enumerate(pairs)])
    tokens = tokenizer.encode([(pair.query, pair.document) for pair in pairs], progress=progress)
    units = [np.array([row]) for row in range(len(pairs))]
    return Examples(tokens, labels, units, False, lambda row: _described(pairs[row], pairs[row].document))


def from_groups(groups: Sequence[Group], tokenizer: Encoder, progress: Callable[[int], None] | None = None) -> Examples:
    """Examples of graded groups; every group is a unit. Raises DataError for a document that was not judged."""
    labels = torch.tensor([grade for row, group in enumerate(groups) for grade in _grades(group, row)])
    texts = [text for group in groups for text in group.texts]
    ends = np.cumsum([len(group.documents) for group in groups]).tolist()
    units = [np.arange(end - len(group.documents), end) for end, group in zip(ends, groups, strict=True)]

    def records(row: int) -> dict[str, Any]:
        number = bisect_right(ends, row)
        return _described(groups[number], groups[number].documents[row - ends[number]])

    return Examples(tokenizer.encode(texts, progress=progress), labels, units, True, records)


def _described(item: Pair | Group, document: str) -> dict[str, Any]:
    return {"source": item.source, "query": item.query, "document": document}


def _label(pair: Pair, row: int) -> float:
    if pair.label is None:
        raise DataError(
            f"{pair.source or f'pair {row}'}: the pair has no label, and nothing can be learned without. Training "
            "data need a column 'label' or 'score'; name another one (--column label=...)."
        )
    return float(pair.label)


def _grades(group: Group, row: int) -> Iterator[float]:
    for document, grade in zip(group.documents, group.grades, strict=True):
        if grade is None:
            where = group.source or f"group {row}"
            raise DataError(f"{where}: the document {document[:40]!r} has no grade. Judge it or drop it.")
        yield float(grade)


def epoch_plan(examples: Examples, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Unit indices of each batch of an epoch: a function of (seed, epoch) alone, so that a resumed run repeats it."""
    order = np.random.default_rng([seed, epoch]).permutation(len(examples)).tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def micro_batches(examples: Examples, units: Sequence[int], *, max_tokens: int, per_unit: bool) -> list[MicroBatch]:
    """Split a batch by token budget; shares make the sum of micro-batch means the mean of the whole batch.

    `per_unit`: the loss is a mean over units (groups), not over pairs.
    """
    lengths = examples.tokens.lengths
    parts: list[list[int]] = [[]]
    used = 0
    for unit in sorted(units, key=lambda index: int(lengths[examples.units[index]].max())):
        size = int(lengths[examples.units[unit]].sum())
        if parts[-1] and used + size > max_tokens:
            parts.append([])
            used = 0
        parts[-1].append(unit)
        used += size
    whole = len(units) if per_unit else sum(len(examples.units[unit]) for unit in units)
    return [_micro_batch(examples, part, whole, per_unit, max_tokens) for part in parts]


def _micro_batch(examples: Examples, units: list[int], whole: int, per_unit: bool, max_tokens: int) -> MicroBatch:
    rows = np.concatenate([examples.units[unit] for unit in units])
    group_of = {int(row): index for index, unit in enumerate(units) for row in examples.units[unit]}
    batch = pack(examples.tokens, rows.tolist())
    groups = torch.tensor([group_of[row] for row in batch.rows])
    share = (len(units) if per_unit else len(rows)) / whole
    pieces: tuple[Batch, ...] = ()
    if sum(batch.lengths) > max_tokens and len(batch.rows) > 1:
        cuts = by_budget(examples.tokens.lengths, max_tokens, order=batch.rows)
        pieces = tuple(pack(examples.tokens, cut) for cut in cuts)
    return MicroBatch(batch, examples.labels[batch.rows], groups, share, pieces)
