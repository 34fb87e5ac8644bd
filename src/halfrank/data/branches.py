"""Pairs that begin alike, in rows that hold their beginning once: a causal model reads it alike in every pair.

Shapes: T tokens of a row, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from halfrank.data.packing import Batch
from halfrank.data.tokens import TokenRows, Tokens, lengths_of

SHORTEST = 8  # tokens: a shorter beginning saves less than its own attention call costs


@dataclass(frozen=True)
class Family:
    """Pairs with one beginning: its tokens, 0 for none, and how many follow it in each pair, longest first."""

    beginning: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.beginning + sum(self.lengths)


@dataclass(frozen=True)
class Branches:
    """Families laid end to end, each its beginning and then the rest of each pair; `rows` are the caller's places."""

    input_ids: Tensor  # (T,) int64
    token_type_ids: Tensor | None  # (T,) int64
    positions: Tensor  # (T,) int64, of each token within its pair
    last: Tensor  # (P,) int64, place in the row of each pair's last token that is not the pad token
    families: tuple[Family, ...]
    rows: list[int]

    def to(self, device: torch.device | str) -> Branches:
        """The same row on another device."""
        types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        return replace(
            self, input_ids=self.input_ids.to(device), token_type_ids=types, positions=self.positions.to(device),
            last=self.last.to(device),
        )  # fmt: skip

    def select(self, indices: Sequence[int]) -> Batch:
        """The pairs at `indices`, whole again, in that order."""
        pieces = list(self._pieces())
        types = self.token_type_ids
        return Batch(
            torch.cat([self.input_ids[part] for i in indices for part in pieces[i]]),
            None if types is None else torch.cat([types[part] for i in indices for part in pieces[i]]),
            [sum(part.stop - part.start for part in pieces[i]) for i in indices],
            [self.rows[i] for i in indices],
        )

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        place = 0
        for family in self.families:
            shared = slice(place, place + family.beginning)
            place = shared.stop
            for length in family.lengths:
                yield shared, slice(place, place + length)
                place += length


def branched(
    tokens: TokenRows, families: Sequence[Sequence[int]], max_tokens: int, *, pad: int | None
) -> Iterator[Branches]:
    """Rows of at most `max_tokens` tokens; `families` are the places of pairs that may begin alike, all pairs in all.

    A pair that alone is longer goes alone. Each pair keeps a token of its own that is not `pad`.
    """
    chosen: list[tuple[int, list[int]]] = []
    used = max_tokens + 1
    for beginning, rows in _with_beginnings(tokens, families, pad):
        entered = False
        for row, length in zip(rows, lengths_of(tokens.offsets, np.array(rows)).tolist(), strict=True):
            if used + (length - beginning if entered else length) > max_tokens:
                if chosen:
                    yield _laid_out(tokens, chosen, pad)
                chosen, used, entered = [], 0, False
            if not entered:
                chosen.append((beginning, []))
                used, entered = used + beginning, True
            chosen[-1][1].append(row)
            used += length - beginning
    if chosen:
        yield _laid_out(tokens, chosen, pad)


def _with_beginnings(
    tokens: TokenRows, families: Sequence[Sequence[int]], pad: int | None
) -> Iterator[tuple[int, list[int]]]:
    """(tokens that they share, rows) of each family, longest first; pairs that share too little come last, as one."""
    alone: list[int] = []
    for rows in families:
        own = tokens.take(np.array(rows))
        shared = _shared(own) if len(rows) > 1 else 0
        rests = [own.input_ids[a + shared : b] for a, b in zip(own.offsets[:-1], own.offsets[1:], strict=True)]
        if shared < SHORTEST or not all((rest != pad).any() for rest in rests):
            alone += rows
        else:
            yield shared, [rows[i] for i in np.argsort([-len(rest) for rest in rests], kind="stable")]
    if alone:
        lengths = lengths_of(tokens.offsets, np.array(alone))
        yield 0, [alone[i] for i in np.argsort(-lengths, kind="stable")]


def _shared(own: Tokens) -> int:
    """How many tokens all pairs begin with alike, less than any of them has."""
    longest = int(own.lengths.min()) - 1
    heads = own.input_ids[own.offsets[:-1, None] + np.arange(longest)]
    differs = (heads != heads[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else longest


def _laid_out(tokens: TokenRows, chosen: Sequence[tuple[int, list[int]]], pad: int | None) -> Branches:
    ids, types, positions, last, families, place = [], [], [], [], [], 0
    for beginning, rows in chosen:
        own = tokens.take(np.array(rows))
        spans = list(zip(own.offsets[:-1].tolist(), own.offsets[1:].tolist(), strict=True))
        for start, stop in [(spans[0][0], spans[0][0] + beginning), *((a + beginning, b) for a, b in spans)]:
            ids.append(own.input_ids[start:stop])
            types += [] if own.token_type_ids is None else [own.token_type_ids[start:stop]]
        positions += [np.arange(beginning), *(np.arange(beginning, stop - start) for start, stop in spans)]
        place += beginning
        for start, stop in spans:
            real = np.flatnonzero(own.input_ids[start + beginning : stop] != pad)
            last.append(place + (int(real[-1]) if len(real) else 0))
            place += stop - start - beginning
        families.append(Family(beginning, tuple(b - a - beginning for a, b in spans)))
    return Branches(
        torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        torch.from_numpy(np.concatenate(types).astype(np.int64)) if types else None,
        torch.from_numpy(np.concatenate(positions)),
        torch.tensor(last),
        tuple(families),
        [row for _, rows in chosen for row in rows],
    )
