"""Would AdamW survive in a format: its constants, and whether one step at a learning rate moves the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from halfrank.numerics.adamw import AdamW
from halfrank.numerics.formats import NARROW_DTYPES, dtype_name

SAMPLE = 64  # rows and columns of each weight that a step is tried on
CONSTANTS = {"eps": 1e-8, "1 - beta2": 1 - 0.999, "beta2": 0.999}


def constants(dtype: torch.dtype) -> dict[str, float]:
    """What AdamW's constants become when they are stored in `dtype`."""
    return {name: float(torch.tensor(value, dtype=torch.float64).to(dtype)) for name, value in CONSTANTS.items()}


def lost_constants(dtype: torch.dtype) -> list[str]:
    """Constants that no longer do their work in `dtype`: an eps of 0, a beta2 of 1."""
    stored = constants(dtype)
    lost = [f"eps {CONSTANTS['eps']:g} is 0"] if stored["eps"] == 0 else []
    return lost + (["beta2 0.999 is 1, so that v never decays"] if stored["beta2"] == 1 else [])


def lost_second_moments(gradients: Iterable[Tensor], dtype: torch.dtype) -> float:
    """Share of the gradients that are not 0 whose (1 - beta2) g^2 is 0 in `dtype`."""
    lost = total = 0
    for gradient in gradients:
        size = _sample(gradient).float()
        size = size[size != 0]
        lost += int((((1 - 0.999) * size * size).to(dtype) == 0).sum())
        total += size.numel()
    return lost / total if total else 0.0


def moved(named: Mapping[str, tuple[Tensor, Tensor]], lr: float) -> dict[str, dict[str, float]]:
    """Shares of weights that one step moves, that it makes non-finite, and that it leaves, by format and optimizer.

    `named` holds weights and their gradients; samples of both are stepped, by torch's AdamW on 16-bit weights and by
    halfrank's. A weight that only its residual remembers has moved.
    """
    found = {}
    for dtype in NARROW_DTYPES:
        for kind in ("plain", "halfrank"):
            counts = {"moved": 0, "non_finite": 0, "total": 0}
            for weight, gradient in named.values():
                _count(counts, _sample(weight), _sample(gradient), dtype, lr, kind)
            total = max(counts.pop("total"), 1)
            found[f"{kind} {dtype_name(dtype)}"] = {name: value / total for name, value in counts.items()}
    return found


def _count(counts: dict[str, int], weight: Tensor, gradient: Tensor, dtype: torch.dtype, lr: float, kind: str) -> None:
    # What the format cannot hold at all is found by the checks of ranges; here it counts for nothing.
    fits = (weight.abs() < torch.finfo(dtype).max / 2) & (gradient.abs() < torch.finfo(dtype).max)
    stored = torch.nn.Parameter(torch.where(fits, weight, 0.0).to(dtype))
    stored.grad = torch.where(fits, gradient, 0.0).to(dtype)
    has_gradient = stored.grad != 0
    before = stored.detach().clone()
    if kind == "plain":
        torch.optim.AdamW([stored], lr=lr, foreach=False, fused=False, weight_decay=0.0).step()
        changed = stored.detach() != before
    else:
        optimizer = AdamW([stored], lr=lr, weight_decay=0.0, backend="torch")
        optimizer.step()
        changed = optimizer.exact(stored) != before.float()
    finite = stored.detach().isfinite()
    counts["moved"] += int((changed & has_gradient & finite).sum())
    counts["non_finite"] += int((~finite & has_gradient).sum())
    counts["total"] += int(has_gradient.sum())


def _sample(tensor: Tensor) -> Tensor:
    """At most 64 x 64 values, spread over a matrix, without the rows of tokens that were not seen."""
    rows = tensor.detach()
    rows = rows[:: max(len(rows) // SAMPLE, 1)][:SAMPLE]
    return rows[:, :: max(rows.shape[1] // SAMPLE, 1)][:, :SAMPLE].float().contiguous() if rows.ndim > 1 else rows
