"""The 16-bit formats and their grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

NARROW_DTYPES = (torch.float16, torch.bfloat16)
_NAMES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_EXPONENT, _LARGEST = 0x7F800000, 2.0**127  # a float32's exponent field, and the largest power of two it can hold
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


@cache
def constant(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number as a tensor (0-d, on the CPU, which operations on other devices take too).

    Torch makes one of a Python number in each operation, which for a chunk takes a fifth of the operation's time.
    """
    with torch.inference_mode(False):  # it is kept for calls outside of it
        return torch.tensor(value, dtype=dtype, device="cpu")


def ulp(values: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Distance on the grid of `dtype` from each magnitude of float32 `values` to the next larger: a power of two."""
    smallest, mantissa = GRID[dtype]
    power = torch.empty_like(values) if out is None else out
    torch.bitwise_and(values.view(torch.int32), constant(_EXPONENT, torch.int32), out=power.view(torch.int32))
    return power.clamp_(2.0 ** (smallest - 127), _LARGEST).mul_(constant(2.0**-mantissa))


def all_finite(tensor: Tensor) -> bool:
    """True unless some element is NaN or infinite; one pass, no copy."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(low.isfinite() and high.isfinite())


def largest(tensor: Tensor) -> float:
    """Largest magnitude, NaN if there is one; one pass, no copy."""
    return magnitude(tensor).item()


def magnitude(tensor: Tensor) -> Tensor:
    """`largest` as float32 0-d on the tensor's device, not read yet."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    low, high = torch.aminmax(tensor.detach())
    return torch.maximum(-low.float(), high.float())


def largest_of_each(tensors: Sequence[Tensor]) -> list[float]:
    """`largest` of each of them; a GPU is waited for once."""
    return read_at_once([magnitude(tensor) for tensor in tensors])


def read_at_once(numbers: Sequence[Tensor]) -> list[float]:
    """Numbers (0-d) on any devices, exact to float64; each device is waited for once."""
    read: dict[torch.device, Iterator[float]] = {}
    for device in dict.fromkeys(number.device for number in numbers):
        read[device] = iter(torch.stack([n.double() for n in numbers if n.device == device]).tolist())
    return [next(read[number.device]) for number in numbers]
