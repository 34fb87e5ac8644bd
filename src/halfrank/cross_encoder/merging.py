"""Several fine-tunes of one model to their weighted average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfrank.errors import ModelError
from halfrank.model.folder import exported_weights
from halfrank.model.scorer import Scorer


def average(scorers: Sequence[Scorer], parameters: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Float32 weights, residuals joined, averaged by `parameters["weight"]`: a number for each model, 1 by default.

    Raises ModelError for models of different shape or vocabulary, ValueError for other parameters.
    """
    shares = _shares(len(scorers), parameters)
    _check_alike(scorers)
    states = [exported_weights(scorer, torch.float32) for scorer in scorers]
    return {
        name: torch.stack([share * state[name] for share, state in zip(shares, states, strict=True)]).sum(0)
        if first.is_floating_point()
        else first
        for name, first in states[0].items()
    }


def _shares(count: int, parameters: Mapping[str, Any] | None) -> list[float]:
    given = dict(parameters or {})
    weights = given.pop("weight", None)
    shares = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if given:
        raise ValueError(f"merge takes the parameter 'weight' alone; got {', '.join(map(repr, given))}.")
    if len(shares) != count or not sum(shares) > 0:
        raise ValueError(f"'weight' must be {count} numbers with a sum above 0, one for each model; got {weights!r}.")
    return [share / sum(shares) for share in shares]


def _check_alike(scorers: Sequence[Scorer]) -> None:
    if len(scorers) < 2:
        raise ValueError(f"merge needs at least two models; got {len(scorers)}.")
    if any(scorer.adapters is not None for scorer in scorers):
        raise ModelError("An average of adapters is not the adapters' average: merge them into their models first.")
    first, *others = ({name: tuple(t.shape) for name, t in scorer.model.state_dict().items()} for scorer in scorers)
    for number, shapes in enumerate(others, 2):
        different = sorted(set(first.items()) ^ set(shapes.items()))
        if different:
            raise ModelError(f"Model {number} differs from the first in '{different[0][0]}': merge fine-tunes of one.")
    if any(scorer.tokenizer.get_vocab() != scorers[0].tokenizer.get_vocab() for scorer in scorers[1:]):
        raise ModelError("The models have different vocabularies: merge fine-tunes of one model.")
