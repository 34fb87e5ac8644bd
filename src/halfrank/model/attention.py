"""Attention over a packed row: pairs of equal length share one call, no token sees another pair.

Shapes: T tokens in the row, H query heads, K key heads, D head size, N pairs of one length L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from halfrank.data.branches import Family
from halfrank.data.packing import equal_runs
from halfrank.model.dropout import dropout as drop
from halfrank.model.dropped_attention import by_pair, dropped_attention
from halfrank.model.storage import WIDE, rounded

NAME = "halfrank_packed"


@dataclass(frozen=True)
class Runs:
    """A packed row as runs of pairs of equal length, and the format that scores are rounded to.

    `kept` (P,) is the place in the row of the one token of each pair that the head reads, where only that is wanted.
    `after` (one for each run, or nothing) is the run whose tokens these pairs read before their own, None for none.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    narrow: torch.dtype | None = None
    kept: Tensor | None = None
    after: tuple[int | None, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [count * length for count, length in zip(self.counts, self.lengths, strict=True)]


def runs_of(lengths: list[int], narrow: torch.dtype | None = None) -> Runs:
    """Runs of neighbours of equal length, in the order of the row."""
    runs = equal_runs(lengths)
    return Runs(tuple(count for count, _ in runs), tuple(length for _, length in runs), narrow)


def runs_of_families(families: Sequence[Family], narrow: torch.dtype | None = None) -> Runs:
    """Runs of a row that holds the beginning of each family once, in the order of the row."""
    runs: list[tuple[int, int, int | None]] = []
    for family in families:
        beginning = len(runs) if family.beginning else None
        runs += [(1, family.beginning, None)] if family.beginning else []
        runs += [(count, length, beginning) for count, length in equal_runs(family.lengths)]
    counts, lengths, after = zip(*runs, strict=True)
    return Runs(counts, lengths, narrow, after=after)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_runs: Runs | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,  # transformers hands every attention function whatever its callers passed on
) -> tuple[Tensor, Tensor | None]:
    """Attention of (1, H, T, D) queries, returned as (1, T, H, D); without runs it is transformers' own sdpa.

    With one query a pair, (1, H, N, D) for N pairs and not causal, it is (1, N, H, D).
    """
    causal = bool(others["is_causal"] if others.get("is_causal") is not None else getattr(module, "is_causal", False))
    if packed_runs is None and softcap is None:
        if attention_mask is None and sliding_window is not None:  # no mask came in, so none was made of the window
            before = key.shape[2] - query.shape[2]
            attention_mask = _band(before, query.shape[2], sliding_window, causal, query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if packed_runs is None:  # a padded call of a class that caps its scores, which sdpa refuses
        mask = attention_mask
        if mask is not None:  # a row of padding that may look at nothing looks at all, and nobody looks at it
            mask = mask | ~mask.any(-1, keepdim=True)
        mixed = _plain(query, key, value, mask, causal and mask is None, scaling, dropout, softcap, None)
        return mixed.transpose(1, 2), None
    if not query.dtype == key.dtype == value.dtype:  # an island among the three: all take its float32
        query, key, value = query.float(), key.float(), value.float()
    narrow = None if getattr(module, WIDE, False) else packed_runs.narrow
    whole = query.shape[2] == key.shape[2]
    own = dropout > 0 and query.device.type == "cpu" and narrow is None and softcap is None
    if own and not packed_runs.after:
        bands = [_reach(length, sliding_window, causal, query.device) for length in packed_runs.lengths]
        return dropped_attention(
            query, key, value, counts=packed_runs.counts, lengths=packed_runs.lengths, bands=bands, dropout=dropout,
            scale=_scale(query, scaling),
        ), None  # fmt: skip
    # split, not slices: the backward of one split is one concatenation.
    queries = query.split(packed_runs.tokens if whole else list(packed_runs.counts), dim=2)
    keys, values = (tensor.split(packed_runs.tokens, dim=2) for tensor in (key, value))
    after = packed_runs.after or [None] * len(packed_runs.counts)
    if not causal and any(run is not None for run in after):
        raise ValueError("Only a causal model reads the beginning of a pair without what follows it.")
    outputs = []
    for q, k, v, count, length, run in zip(
        queries, keys, values, packed_runs.counts, packed_runs.lengths, after, strict=True
    ):
        q, k, v = by_pair(q, count, length if whole else 1), by_pair(k, count, length), by_pair(v, count, length)
        before = 0
        if run is not None:
            before = packed_runs.lengths[run]
            k, v = (torch.cat([t[run].expand(count, -1, -1, -1), own], 2) for t, own in ((keys, k), (values, v)))
        band = _band(before, length, sliding_window, causal, q.device)
        if narrow is not None or softcap is not None:
            mixed = _plain(q, k, v, band, causal, scaling, dropout, softcap, narrow)
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=causal and band is None, scale=scaling
            )
        outputs.append(mixed.transpose(1, 2).reshape(1, -1, mixed.shape[1], mixed.shape[3]))
    return torch.cat(outputs, dim=1), None


def padding_mask(*args: Any, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """None where no mask came in (a packed row), else the mask that sdpa gets (a padded call of the user's)."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **others)


def register() -> None:
    """Make both functions known to transformers under `NAME`; safe to repeat."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def _band(before: int, length: int, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    """Which of `before` earlier tokens and its own `length` each token of a pair reads; None for what needs no mask."""
    if before == 0 and (window is None or length <= window):
        return None
    places = torch.arange(before + length, device=device)
    behind = places[before:, None] - places[None, :]
    if not causal:
        assert window is not None  # only what is causal has tokens before
        return behind.abs() < window
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def _reach(length: int, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    band = _band(0, length, window, causal, device)
    return _triangle((length, length), device) if band is None and causal else band


def _triangle(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool, device=device).tril()


def _scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor | None,
    causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    narrow: torch.dtype | None,
) -> Tensor:
    def narrowed(tensor: Tensor) -> Tensor:
        return tensor if narrow is None else rounded(tensor, narrow)

    scale = _scale(q, scaling)
    scores = narrowed(q @ k.transpose(-1, -2) * scale) if narrow is not None else (q * scale) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = narrowed(softcap * torch.tanh(scores / softcap))
    if band is None and causal:
        band = _triangle(scores.shape[-2:], scores.device)
    if band is not None:
        scores = scores.masked_fill(~band, float("-inf"))
    shares = narrowed(scores.softmax(-1))
    return narrowed((drop(shares, dropout) if dropout else shares) @ v)
