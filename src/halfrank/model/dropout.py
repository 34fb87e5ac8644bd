"""Dropout for CPUs: 16 random bits decide an element, where torch draws a float64 for each; a quarter of the time.

With numba the bits are compared, the mask is kept and the product is taken in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from halfrank.numerics.widen import has_numba

LEVELS = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with a share `p` of its elements set to 0 and the others divided by 1 - p; torch's own outside CPUs.

    The share is the nearest multiple of 2^-16, and the divisor belongs to that share: the mean is exact. Random bits
    come from torch's default generator, so a seed or a restored state repeats them.
    """
    if x.device.type != "cpu" or not 0.0 < p < 1.0:
        return F.dropout(x, p)
    return _Dropout.apply(x, round(p * LEVELS))


def module_dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    """What stands in for the forward of an `nn.Dropout`."""
    return dropout(x, module.p) if module.training else x


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        out, kept = drop_levels(x, dropped)
        ctx.dropped = dropped
        ctx.save_for_backward(kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return drop_again(grad, kept, ctx.dropped), None


def drop_levels(x: Tensor, dropped: int) -> tuple[Tensor, Tensor]:
    """`x` with `dropped` of 2^16 elements set to 0 and the others scaled, and which stayed; no gradient."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return _functions(x.dtype)[0](x, bits, dropped - LEVELS // 2, _scale(dropped))


def drop_again(x: Tensor, kept: Tensor, dropped: int) -> Tensor:
    """What `drop_levels` did to another tensor, for `x`."""
    return _functions(x.dtype)[1](x, kept, _scale(dropped))


def _scale(dropped: int) -> float:
    return LEVELS / max(LEVELS - dropped, 1)


def _functions(dtype: torch.dtype) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """What drops, and what does the same to a gradient; the same bits whether or not numba is there."""
    # Whoever watches torch's operations, or runs them on shapes alone, would not see numba's.
    if dtype is torch.float32 and has_numba() and not is_in_torch_dispatch_mode():
        from halfrank.numerics import compiled

        return compiled.drop, compiled.drop_again
    return _drop, _drop_again


def _drop(x: Tensor, bits: Tensor, least: int, scale: float) -> tuple[Tensor, Tensor]:
    kept = bits >= least
    return _drop_again(x, kept, scale), kept


def _drop_again(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    return (x * kept.view(torch.uint8)).mul_(scale)  # a product with bool takes twice the time
