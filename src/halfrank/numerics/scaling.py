"""Dynamic loss scale: keeps small gradients above a format's smallest number and large ones below its largest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 10  # elements from which the faster way to a norm matters; it gives up the range of a single number
PIECE = 1 << 20  # elements of a 16-bit tensor that are float32 at one time


class LossScale:
    """A power of two that halves when a gradient overflows and doubles after `interval` clean steps.

    Disabled, its value is 1 for ever.
    """

    def __init__(
        self,
        *,
        initial: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        smallest: float = 2.0**-14,
        largest: float = 2.0**24,
        enabled: bool = True,
    ) -> None:
        self._growth, self._backoff, self._interval = growth, backoff, interval
        self._smallest, self._largest, self._enabled = smallest, largest, enabled
        self.value = initial if enabled else 1.0
        self._clean = 0

    def update(self, finite: bool) -> None:
        """Take note of one step: whether every gradient was finite."""
        if not self._enabled:
            return
        if not finite:
            self.value, self._clean = max(self.value * self._backoff, self._smallest), 0
            return
        self._clean += 1
        if self._clean == self._interval:
            self.value, self._clean = min(self.value * self._growth, self._largest), 0

    def state_dict(self) -> dict[str, Any]:
        """Value and clean steps since the last change."""
        return {"value": self.value, "clean": self._clean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.value, self._clean = float(state["value"]), int(state["clean"])


def global_norm(gradients: Iterable[Tensor], divisor: float = 1.0) -> Tensor:
    """Euclidean norm of all gradients together over `divisor`, float64 0-d; not finite iff some gradient is not.

    Sums are taken in float32 and added in float64, so that scaled 16-bit gradients cannot overflow on the way.
    """
    norms = [norm_of(gradient) for gradient in gradients]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])) / divisor


def norm_of(tensor: Tensor) -> Tensor:
    """Euclidean norm, float64 0-d, of sums in float32; not finite iff some element is not.

    16-bit numbers go a piece at a time: torch would convert all of them first.
    """
    tensor = values_of(tensor.detach())
    plain = tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    if plain and tensor.numel() >= LARGE:
        return torch.dot(tensor.view(-1), tensor.view(-1)).double().sqrt()  # at twice the speed of vector_norm
    if tensor.dtype is torch.float32 or tensor.device.type != "cpu" or tensor.numel() <= PIECE:
        return torch.linalg.vector_norm(tensor, dtype=torch.float32).double()
    pieces = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in tensor.reshape(-1).split(PIECE)]
    return torch.linalg.vector_norm(torch.stack(pieces).double())


def values_of(gradient: Tensor) -> Tensor:
    """The numbers that a gradient holds: of a sparse one its rows, summed where a token was seen more than once."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
