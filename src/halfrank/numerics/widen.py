"""A 16-bit weight and its residual as float32, written into a buffer that is already there."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from halfrank.numerics.formats import ulp
from halfrank.numerics.rounding import decode_residual_

CHUNK = 1 << 16  # elements: the float32 temporaries of the residual stay in the cache


def widen_(wide: Tensor, narrow: Tensor, residual: Tensor | None = None) -> Tensor:
    """Fill contiguous float32 `wide` with `narrow`, plus what int8 `residual` holds; the same bits on every backend."""
    if residual is None:
        return wide.copy_(narrow)
    if narrow.device.type == "cpu" and narrow.is_contiguous() and has_numba():
        from halfrank.numerics import compiled

        compiled.widen_(wide.view(-1), narrow.view(-1), residual.view(-1))
        return wide
    parts = zip(*(tensor.reshape(-1).split(CHUNK) for tensor in (narrow, residual)), strict=True)
    for out, (weights, codes) in zip(wide.view(-1).split(CHUNK), parts, strict=True):
        out.copy_(weights)
        out.add_(decode_residual_(codes.float(), ulp(out, weights.dtype)))
    return wide


def update_compiled() -> bool:
    """Whether this process has compiled the 16-bit update, which takes memory for good."""
    module = sys.modules.get("halfrank.numerics.compiled")
    return module is not None and module.update_compiled()


@cache
def has_numba() -> bool:
    """Whether the extra [fast] is installed."""
    return find_spec("numba") is not None
