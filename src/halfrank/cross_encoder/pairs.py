"""What callers of `predict` hand over, to a list of text pairs; and scores to what they expect back.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfrank.data.pairs import place
from halfrank.errors import DataError


@dataclass(frozen=True)
class Readout:
    """Logits (P, L) to what `predict` returns: the activation, one label without its axis, softmax over several."""

    activation: Callable[[Tensor], Tensor]
    softmax: bool

    def __call__(self, logits_PL: Tensor) -> Tensor:
        scores = self.activation(logits_PL)
        if logits_PL.shape[1] == 1 and scores.ndim > 1:
            scores = scores.squeeze(-1)
        return scores.softmax(dim=1) if self.softmax and scores.ndim > 1 else scores


@dataclass(frozen=True)
class PredictReport:
    """What `predict` had to do: pairs cut to max_length, rows scored again wider, modules that are wide from now on."""

    truncated: int
    rescued: tuple[int, ...]
    islands: tuple[str, ...]


def is_single(inputs: Any) -> bool:
    """Whether `inputs` are one pair and not a list of pairs."""
    if isinstance(inputs, np.ndarray):
        return inputs.size > 0 and inputs.ndim < 2
    if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        return len(inputs) > 0 and (isinstance(inputs[0], str) or not isinstance(inputs[0], (Sequence, np.ndarray)))
    return True


def as_pairs(inputs: Any) -> tuple[list[tuple[str, str]], bool]:
    """The pairs of a list, tuple, array or column, and whether it was a single pair; raises DataError for others."""
    if isinstance(inputs, (str, bytes, dict)) or not isinstance(inputs, Iterable):
        raise DataError(f"predict takes a pair of texts or a list of such pairs; got {type(inputs).__name__}.")
    rows = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
    single = len(rows) > 0 and isinstance(rows[0], str)
    if single:
        rows = [rows]
    return [_pair(row, number, single) for number, row in enumerate(rows)], single


def as_documents(documents: Any) -> list[str]:
    """The documents of `rank`; raises DataError for one text where several are expected."""
    if isinstance(documents, str) or not isinstance(documents, Iterable):
        raise DataError(f"rank takes a list of documents; got {type(documents).__name__}.")
    return list(documents)


def shaped(
    scores: np.ndarray, *, single: bool, to_tensor: bool, to_numpy: bool, device: torch.device
) -> np.ndarray | np.floating[Any] | Tensor | list[Tensor]:
    """Scores as array, tensor on `device` or list of tensors; of a single pair its own score."""
    if to_tensor or not to_numpy:
        tensor = torch.from_numpy(scores).to(device)
        values: Any = tensor if to_tensor else list(tensor)
    else:
        values = scores
    return values[0] if single else values


def _pair(row: Any, number: int, single: bool) -> tuple[str, str]:
    what = "The pair" if single else place("", number)
    if isinstance(row, str) or not isinstance(row, (Sequence, np.ndarray)):
        raise DataError(f"{what} must be two texts; got {type(row).__name__} {row!r:.60}.")
    if len(row) != 2:
        raise DataError(f"{what} must be two texts; got {len(row)}.")
    for text in row:
        if not isinstance(text, str):
            raise DataError(f"{what} must be two texts; got {type(text).__name__} {text!r:.60} in it.")
    return row[0], row[1]
