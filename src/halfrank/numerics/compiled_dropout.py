"""Dropout compiled by numba: one pass over memory. Importing it needs the extra `[fast]`.

Which elements are dropped is what `model/dropout.py` says in torch's operations, to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfrank.numerics.compiled import FORMATS, hashed, inline
from halfrank.numerics.noise import Keys
from halfrank.numerics.team import WORDS, Kernel, whole_registers, words_at

SPAN = 1 << 16  # elements of a ticket
_f, _u, _i = np.float32, np.uint32, np.int32
_ZERO = _f(0.0)


@inline
def as_float(word: Any) -> Any:
    """The float32 whose bits an int64 holds."""
    return _i(word).view(np.float32)


@inline
def _stays(bits: Any, least: Any) -> Any:
    """Whether an element is not dropped whose bits are the low 16."""
    return _i(_i(bits << _u(16)) >> _i(16)) >= least


@inline
def kept(number: Any, key0: Any, key1: Any, least: Any) -> Any:
    """Whether an element is not dropped: one hash for two neighbours, the low half for the first."""
    return _stays(_u(hashed(_u(number >> _u(1)), key0, key1) >> _u((number & _u(1)) << _u(4))), least)


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
            out[2 * j] = narrow(wide(value[2 * j]) * (scale if _stays(h, least) else _ZERO))
            out[2 * j + 1] = narrow(wide(value[2 * j + 1]) * (scale if _stays(_u(h >> _u(16)), least) else _ZERO))
        for j in range(count & -2, count):
            out[j] = narrow(wide(value[j]) * (scale if kept(_u(start) + _u(j), key0, key1, least) else _ZERO))

    return Kernel(job)


_KERNELS = {dtype: _build(*way) for dtype, way in FORMATS.items()}


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
