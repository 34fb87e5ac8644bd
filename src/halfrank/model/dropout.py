"""Dropout for CPUs: 16 random bits decide an element, where torch draws a float64 for each; a quarter of the time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= dropped - LEVELS // 2
        ctx.save_for_backward(kept)
        ctx.scale = LEVELS / max(LEVELS - dropped, 1)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.scale), None
