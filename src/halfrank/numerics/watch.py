"""What is worth watching in a run, counted from outside the model: headroom, underflow, updates lost to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from halfrank.numerics.formats import NARROW_DTYPES

SAMPLE = 4096  # elements of a tensor that the counts look at: a share needs no more


class Watch:
    """Counters of one run, passed as a plain argument; looks at every `every`-th step only."""

    def __init__(self, *, every: int = 10) -> None:
        self.every = max(every, 1)
        self._step = 0
        self._values: dict[str, float] = {}
        self._before: list[tuple[Tensor, Tensor]] = []

    @property
    def due(self) -> bool:
        """Whether this step is looked at."""
        return self._step % self.every == 0

    def scores(self, logits: Tensor) -> None:
        """W1: share of finite scores, and the bits between the largest score and float16's largest number."""
        if self.due:
            finite = logits.detach().isfinite()
            self._values["finite_scores"] = float(finite.float().mean())
            self._values["score_headroom_bits"] = _headroom(logits.detach()[finite])

    def gradients(self, gradients: Iterable[Tensor]) -> None:
        """W2: headroom of the scaled 16-bit gradients, and the shares of zeros and non-finite numbers, on samples."""
        if not self.due:
            return
        narrow = [_sample(gradient) for gradient in gradients if gradient.dtype in NARROW_DTYPES]
        if narrow:
            values = torch.cat([part.float() for part in narrow])
            finite = values.isfinite()
            self._values["gradient_non_finite"] = 1.0 - float(finite.float().mean())
            self._values["gradient_headroom_bits"] = _headroom(values[finite])
            self._values["gradient_zeros"] = float((values == 0).float().mean())

    def before_update(self, parameters: Iterable[Tensor]) -> None:
        """W3: remember samples of the 16-bit weights that have a gradient."""
        self._before = []
        if self.due:
            chosen = (p for p in parameters if p.dtype in NARROW_DTYPES and p.grad is not None)
            self._before = [(p, _sample(p).clone()) for p in chosen]

    def after_update(self) -> None:
        """W3: share of the sampled 16-bit weights with a gradient that rounding left where they were."""
        unmoved = counted = 0
        for parameter, before in self._before:
            assert parameter.grad is not None
            with_gradient = _sample(parameter.grad) != 0
            unmoved += int(((_sample(parameter) == before) & with_gradient).sum())
            counted += int(with_gradient.sum())
        if counted:
            self._values["weights_in_residual_only"] = unmoved / counted
        self._before = []

    def next_step(self) -> dict[str, float]:
        """The numbers of this step, empty where it was not looked at; then move on."""
        values, self._values = self._values, {}
        self._step += 1
        return values


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(flat.numel() // SAMPLE, 1)][:SAMPLE]


def _headroom(values: Tensor) -> float:
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return math.inf if largest == 0 else -math.inf
    return math.log2(65504.0 / largest)
