"""The 16-bit formats and their grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NARROW_DTYPES = (torch.float16, torch.bfloat16)
_NAMES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# In a float32's exponent field: the smallest exponent whose grid still shrinks, and the mantissa bits of the format.
# float16 is evenly spaced by 2^-24 below 2^-14. bfloat16 would go down to 2^-133, where float32 itself underflows and a
# residual becomes NaN: its grid is taken as 2^-110 there, far below any weight.
GRID = {torch.float16: (113, 10), torch.bfloat16: (24, 7)}


def parse_dtype(value: str | torch.dtype) -> torch.dtype:
    """A dtype from its name, with or without `torch.`; raises ValueError for one halfrank does not store."""
    dtype = _NAMES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype is None or dtype not in _NAMES.values():
        raise ValueError(f"Weights are stored in float16, bfloat16 or float32; got {value!r}.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """'float16' for torch.float16."""
    return str(dtype).removeprefix("torch.")


def ulp(narrow: Tensor) -> Tensor:
    """Float32 distance from each narrow number's magnitude to the next larger one, built from bits."""
    return _power(_ulp_exponent(narrow.float(), narrow.dtype))


def ulp_and_inverse(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ulp` of float32 `values` that lie on the grid of `dtype`, and its exact reciprocal."""
    exponent = _ulp_exponent(values, dtype)
    return _power(exponent), _power(254 - exponent)


def all_finite(tensor: Tensor) -> bool:
    """True unless some element is NaN or infinite; one pass, no copy."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(low.isfinite() and high.isfinite())


def largest(tensor: Tensor) -> float:
    """Largest magnitude, NaN if there is one; one pass, no copy."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high)) if low == low and high == high else math.nan


def _ulp_exponent(values: Tensor, dtype: torch.dtype) -> Tensor:
    smallest, mantissa = GRID[dtype]
    field = (values.view(torch.int32) >> 23) & 0xFF
    return field.clamp_(min=smallest).sub_(mantissa)


def _power(exponent_field: Tensor) -> Tensor:
    return (exponent_field << 23).view(torch.float32)
