"""Dropout compiled by numba: one pass over memory. Importing it needs the extra `[fast]`.

Which elements are dropped is what `model/dropout.py` says in torch's operations, to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfrank.numerics.compiled import READ_AND_WRITTEN, as_it_is, hashed, inline
from halfrank.numerics.noise import Keys
from halfrank.numerics.team import FLOAT, HALF, WORDS, Kernel, floats_at, halves_at, whole_registers, words_at

SPAN = 1 << 16  # elements of a ticket
_f, _u, _i = np.float32, np.uint32, np.int32
_ZERO = _f(0.0)


@inline
def as_float(word: Any) -> Any:
    """The float32 whose bits an int64 holds."""
    return _i(word).view(np.float32)


@inline
def kept(number: Any, key0: Any, key1: Any, least: Any) -> Any:
    """Whether an element is not dropped: one hash for two neighbours, the low half for the first."""
    half = _u(hashed(_u(number >> _u(1)), key0, key1) >> _u((number & _u(1)) << _u(4)))
    return _i(_i(half << _u(16)) >> _i(16)) >= least


def _build(numbers_at: Any, width: int, wide: Any, narrow: Any) -> Kernel:
    def job(address: Any, ticket: Any, seat: Any) -> None:
        whole_registers()
        words = words_at(address, WORDS)
        count, least, scale, key0, key1 = words[2], _i(words[3]), as_float(words[4]), _u(words[5]), _u(words[6])
        start, stop = ticket * SPAN, min((ticket + 1) * SPAN, count)
        count = stop - start
        out, value = numbers_at(words[0] + width * start, count), numbers_at(words[1] + width * start, count)
        for j in range(count >> 1):
            h = hashed(_u((start >> 1) + j), key0, key1)
            low, high = _i(_i(h << _u(16)) >> _i(16)) >= least, _i(_i(h) >> _i(16)) >= least
            out[2 * j] = narrow(wide(value[2 * j]) * (scale if low else _ZERO))
            out[2 * j + 1] = narrow(wide(value[2 * j + 1]) * (scale if high else _ZERO))
        for j in range(count & -2, count):
            out[j] = narrow(wide(value[j]) * (scale if kept(_u(start) + _u(j), key0, key1, least) else _ZERO))

    return Kernel(job)


_KERNELS = {
    torch.float32: _build(floats_at, FLOAT, as_it_is, as_it_is),
    **{dtype: _build(halves_at, HALF, *READ_AND_WRITTEN[dtype]) for dtype in (torch.float16, torch.bfloat16)},
}


def drop(x: Tensor, keys: Keys, least: int, scale: float) -> Tensor:
    """`x`, float32 or 16 bits, times `scale` where 16 hashed bits, as a signed number, are at least `least`; else 0."""
    x = x.contiguous()
    out = torch.empty_like(x)
    count = x.numel()
    kernel = _KERNELS[x.dtype]
    kernel(out.data_ptr(), x.data_ptr(), count, least, bits(scale), *keys, tickets=-(-count // SPAN))
    return out


def bits(number: float) -> int:
    """Those of a float32, which `as_float` reads."""
    return int(_f(number).view(np.int32))
