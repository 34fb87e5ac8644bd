"""Training data ready for the loop: tokens, labels, and the units (pairs or groups) that batches are made of."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from halfrank.data import cache
from halfrank.data.packing import Batch, by_budget, pack
from halfrank.data.pairs import Group, Pair, place
from halfrank.data.source import Source
from halfrank.data.tokens import Encoder, TokenRows, lengths_of
from halfrank.errors import DataError, SaveError

BUCKET_BATCHES = 50  # whose units are put in order of length together


class Units(Sequence[np.ndarray]):
    """The rows of each pair or group, made when they are asked for: neighbours, less those that were left out.

    `first_rows` holds the first row of each unit and, last, the number of rows.
    """

    def __init__(self, first_rows: Sequence[int] | np.ndarray, left_out: frozenset[int] = frozenset()) -> None:
        self.first_rows, self._left_out = first_rows, left_out

    def __len__(self) -> int:
        return len(self.first_rows) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        rows = np.arange(int(self.first_rows[place]), int(self.first_rows[place + 1]))
        return rows if self._left_out.isdisjoint(rows.tolist()) else rows[~np.isin(rows, list(self._left_out))]

    def rows(self) -> np.ndarray:
        """The rows of all units."""
        rows = np.arange(int(self.first_rows[len(self)]))
        return np.delete(rows, sorted(self._left_out)) if self._left_out else rows

    def without(self, rows: Iterable[int]) -> Units:
        """The same units less `rows`; units stay in their places, some perhaps empty."""
        return Units(self.first_rows, self._left_out.union(rows))


@dataclass(frozen=True)
class Examples:
    """P tokenized pairs with labels; `units` are the rows of each pair or group, never split over two batches."""

    tokens: TokenRows
    labels: Tensor  # (P,) float32
    units: Units
    grouped: bool
    records: Callable[[int], dict[str, Any]] | None = None  # row -> its texts and source, for messages and files

    def __len__(self) -> int:
        return len(self.units)

    def record(self, row: int) -> dict[str, Any]:
        """A pair as its file had it: row (counted from 0), place (for people), query, document, label."""
        known = {} if self.records is None else self.records(row)
        return {
            "row": row,
            "place": place(known.get("source", ""), row),
            "query": known.get("query"),
            "document": known.get("document"),
            "label": _shortest(self.labels[row].item()),
        }

    def place(self, row: int) -> str:
        """Where a person finds a pair."""
        return str(self.record(row)["place"])

    def without(self, rows: Iterable[int]) -> Examples:
        """The same examples with `rows` in no unit; units stay in their places, some perhaps empty."""
        return replace(self, units=self.units.without(rows))


def _shortest(label: float) -> float:
    """The number of fewest digits that is this one in float32: 1e30, not what its 24 bits spell out."""
    return float(str(np.float32(label)))


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
    units = Units(range(len(pairs) + 1))
    return Examples(tokens, labels, units, False, lambda row: _described(pairs[row], pairs[row].document))


def from_groups(groups: Sequence[Group], tokenizer: Encoder, progress: Callable[[int], None] | None = None) -> Examples:
    """Examples of graded groups; every group is a unit. Raises DataError for a document that was not judged."""
    labels = torch.tensor([grade for row, group in enumerate(groups) for grade in _grades(group, row)])
    texts = [text for group in groups for text in group.texts]
    ends = np.cumsum([len(group.documents) for group in groups]).tolist()

    def records(row: int) -> dict[str, Any]:
        number = bisect_right(ends, row)
        return _described(groups[number], groups[number].documents[row - ends[number]])

    return Examples(tokenizer.encode(texts, progress=progress), labels, Units([0, *ends]), True, records)


def check(source: Source) -> None:
    """Read all rows and keep none; raises DataError for rows that nothing can be learned from."""
    for _ in _labelled(source.items([])):
        pass


def from_source(
    source: Source,
    tokenizer: Encoder,
    root: Path,
    *,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Examples:
    """Examples of a file of any size: tokens, labels and texts lie on disk in `root` and are read a batch at a time.

    `tell` hears what is to be known about the data, and where they cannot be written and are kept in memory instead.
    Raises DataError for rows that cannot be used.
    """

    def items(notes: list[str]) -> Iterator[Pair | Group]:
        return _labelled(source.items(notes))

    try:
        found = cache.stored(root, items, tokenizer, digest=source.digest(), progress=progress, tell=tell)
    except SaveError as error:
        tell(f"{error} The tokens and texts of all pairs are kept in memory instead, a few hundred bytes a pair.")
        dataset = source.dataset()
        examples = (
            from_groups(dataset.groups, tokenizer, progress)
            if dataset.grouped
            else from_pairs(dataset.pairs, tokenizer, progress)
        )
        notes = dataset.notes
    else:
        labels, units = torch.from_numpy(found.labels), Units(found.first_rows)
        examples, notes = Examples(found.tokens, labels, units, found.grouped, found.record), found.notes
    for note in notes:
        tell(note)
    return examples


def _labelled(items: Iterable[Pair | Group]) -> Iterator[Pair | Group]:
    """The same rows; raises DataError for one that nothing can be learned from."""
    for row, item in enumerate(items):
        if isinstance(item, Pair):
            _label(item, row)
        else:
            for _ in _grades(item, row):
                pass
        yield item


def _described(item: Pair | Group, document: str) -> dict[str, Any]:
    return {"source": item.source, "query": item.query, "document": document}


def _label(pair: Pair, row: int) -> float:
    if pair.label is None:
        raise DataError(
            f"{place(pair.source, row)}: the pair has no label, and nothing can be learned without. Training "
            "data need a column 'label' or 'score'; name another one (--column label=...)."
        )
    return float(pair.label)


def _grades(group: Group, row: int) -> Iterator[float]:
    for document, grade in zip(group.documents, group.grades, strict=True):
        if grade is None:
            where = group.source or f"group {row} (counted from 0)"
            raise DataError(f"{where}: the document {document[:40]!r} has no grade. Judge it or drop it.")
        yield float(grade)


class Batches(Sequence[list[int]]):
    """An order of units cut into batches, made when they are asked for."""

    def __init__(self, order: np.ndarray, size: int) -> None:
        self._order, self._size = order, size

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        start = range(len(self))[index] * self._size
        return self._order[start : start + self._size].tolist()


def epoch_plan(examples: Examples, batch_size: int, *, seed: int, epoch: int, buckets: bool = False) -> Batches:
    """Unit indices of each batch of an epoch: a function of (seed, epoch) alone, so that a resumed run repeats it.

    With `buckets` the units of `BUCKET_BATCHES` batches at a time are put in order of length before they are cut, and
    all whole batches are shuffled afterwards: pairs of a batch are alike, and which ones meet still differs each epoch.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(examples))
    if buckets:
        order = _by_length(order, examples, batch_size, random)
    return Batches(order, batch_size)


def _by_length(order: np.ndarray, examples: Examples, batch_size: int, random: np.random.Generator) -> np.ndarray:
    firsts = np.asarray(examples.units.first_rows)
    longest = np.maximum.reduceat(np.asarray(examples.tokens.lengths), firsts[:-1])
    window = batch_size * BUCKET_BATCHES
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    ordered = np.concatenate([part[np.argsort(longest[part], kind="stable")] for part in parts])
    whole = len(ordered) // batch_size * batch_size
    batches = random.permutation(ordered[:whole].reshape(-1, batch_size))
    return np.concatenate([batches.reshape(-1), ordered[whole:]])


def tokens_of(examples: Examples, unit: int) -> np.ndarray:
    """Tokens of each pair of a unit."""
    return lengths_of(examples.tokens.offsets, examples.units[unit])


def micro_batches(examples: Examples, units: Sequence[int], *, max_tokens: int, per_unit: bool) -> list[MicroBatch]:
    """Split a batch by token budget; shares make the sum of micro-batch means the mean of the whole batch.

    `per_unit`: the loss is a mean over units (groups), not over pairs.
    """
    lengths = {unit: tokens_of(examples, unit) for unit in units}
    parts: list[list[int]] = [[]]
    used = 0
    for unit in sorted(units, key=lambda index: int(lengths[index].max())):
        size = int(lengths[unit].sum())
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
