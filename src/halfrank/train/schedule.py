"""The learning rate's course: warm-up, then linear, cosine or no decay."""

from __future__ import annotations

import math


def factor(step: int, *, total: int, warmup: float, kind: str) -> float:
    """What the learning rate is multiplied with at `step` (from 0); `warmup` below 1 is a share of `total`."""
    rising = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < rising:
        return step / rising
    if kind == "constant" or total <= rising:
        return 1.0
    done = min((step - rising) / (total - rising), 1.0)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
