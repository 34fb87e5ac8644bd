"""Packed batches: the tokens of many pairs end to end in one row, no padding anywhere.

Shapes: T tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from halfrank.data.tokens import TokenRows, lengths_of


@dataclass(frozen=True)
class Batch:
    """Pairs laid end to end, longest first; `rows` are their places in the caller's order."""

    input_ids: Tensor  # (T,) int64
    token_type_ids: Tensor | None  # (T,) int64
    lengths: list[int]
    rows: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        return replace(self, input_ids=self.input_ids.to(device), token_type_ids=types)

    def select(self, indices: Sequence[int]) -> Batch:
        """The pairs at `indices` of this batch, in that order."""
        ids = self.input_ids.split(self.lengths)
        types = None if self.token_type_ids is None else self.token_type_ids.split(self.lengths)
        return Batch(
            torch.cat([ids[i] for i in indices]),
            None if types is None else torch.cat([types[i] for i in indices]),
            [self.lengths[i] for i in indices],
            [self.rows[i] for i in indices],
        )

    def runs(self) -> list[Batch]:
        """Batches of neighbours of equal length, in order."""
        found, first, token = [], 0, 0
        for count, length in equal_runs(self.lengths):
            part = slice(token, token + count * length)
            types = None if self.token_type_ids is None else self.token_type_ids[part]
            rows = self.rows[first : first + count]
            found.append(Batch(self.input_ids[part], types, [length] * count, rows))
            first, token = first + count, part.stop
        return found


def equal_runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(count, length) of neighbours of equal length, in order."""
    return [(len(list(same)), length) for length, same in groupby(lengths)]


def pack(tokens: TokenRows, rows: Iterable[int]) -> Batch:
    """Lay `rows` end to end, longest first, so that pairs of equal length are neighbours; ties keep their order."""
    chosen = np.fromiter(rows, dtype=np.int64)
    chosen = chosen[np.argsort(-lengths_of(tokens.offsets, chosen), kind="stable")]
    own = tokens.take(chosen)
    types = own.token_type_ids
    return Batch(
        torch.from_numpy(own.input_ids.astype(np.int64)),
        None if types is None else torch.from_numpy(types.astype(np.int64)),
        own.lengths.tolist(),
        chosen.tolist(),
    )


def by_budget(lengths: np.ndarray, max_tokens: int, *, order: Sequence[int] | None = None) -> list[list[int]]:
    """Rows in batches of at most `max_tokens` tokens, longest first or in `order`; a longer row goes alone."""
    batches: list[list[int]] = []
    used = max_tokens + 1
    for row in np.argsort(-lengths, kind="stable").tolist() if order is None else order:
        if used + lengths[row] > max_tokens:
            batches.append([])
            used = 0
        batches[-1].append(row)
        used += int(lengths[row])
    return batches
