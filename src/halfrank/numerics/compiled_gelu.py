"""GELU and its gradient compiled by numba: one pass over memory each. Importing it needs the extra `[fast]`.

GELU(x) = x P(x), with P of the normal distribution (Hendrycks and Gimpel, 2016), is max(x, 0) - |x| P(-|x|). P(-t) is
e^(-t^2/2) times a polynomial in 1 / (1 + 0.35 t), the form of 26.2.17 in Abramowitz and Stegun (1964) with more terms,
fitted here to a relative error of 3e-8 up to t = 14. So results far below 0 keep the digits that 1 + erf drops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfrank.numerics.compiled import FORMATS, contracted
from halfrank.numerics.compiled_exp import exp
from halfrank.numerics.team import WORDS, Kernel, whole_registers, words_at

SPAN = 1 << 15  # elements of a ticket
_f = np.float32
_ZERO, _ONE, _MINUS_HALF = _f(0.0), _f(1.0), _f(-0.5)
_SLOPE, _DENSITY = _f(0.35), _f((2 * np.pi) ** -0.5)
_FAR = _f(14.0)  # from here on P(-t) is below float32's smallest normal number
_C1, _C2, _C3 = _f(0.13962140679359436), _f(0.1398618370294571), _f(0.11983311921358109)
_C4, _C5, _C6 = _f(0.10550691187381744), _f(-0.023106999695301056), _f(0.15916965901851654)
_C7, _C8, _C9 = _f(-0.2557099461555481), _f(0.14396943151950836), _f(-0.02914542704820633)


@contracted
def _share(t: Any) -> Any:
    """P(-t) e^(t^2/2)."""
    u = _ONE / (_ONE + _SLOPE * t)
    series = (((((((_C9 * u + _C8) * u + _C7) * u + _C6) * u + _C5) * u + _C4) * u + _C3) * u + _C2) * u + _C1
    return series * u


@contracted
def _gelu(x: Any, _: Any) -> Any:
    t = abs(x)
    beyond = exp(_MINUS_HALF * t * t) * _share(t)
    near = (x if x > _ZERO else _ZERO) - t * beyond  # of an infinity NaN, which torch has for the negative one
    return x if x > _FAR else near


@contracted
def _gelu_back(x: Any, grad: Any) -> Any:
    t = abs(x)
    power = exp(_MINUS_HALF * t * t)
    beyond = power * _share(t)
    return grad * ((_ONE - beyond if x > _ZERO else beyond) + x * power * _DENSITY)


def _kernels(of: Any) -> dict[torch.dtype, Kernel]:
    """For each format the kernel that makes `of(x, grad)` of two tensors."""

    def build(numbers_at: Any, width: int, wide: Any, narrow: Any) -> Kernel:
        def job(address: Any, ticket: Any, seat: Any) -> None:
            whole_registers()
            words = words_at(address, WORDS)
            start = ticket * SPAN
            count = min(SPAN, words[3] - start)
            out, value = numbers_at(words[0] + width * start, count), numbers_at(words[1] + width * start, count)
            grad = numbers_at(words[2] + width * start, count)
            for j in range(count):
                out[j] = narrow(of(wide(value[j]), wide(grad[j])))

        return Kernel(job, exact=False)

    return {dtype: build(*way) for dtype, way in FORMATS.items()}


_FORWARD, _BACKWARD = _kernels(_gelu), _kernels(_gelu_back)


def gelu(x: Tensor) -> Tensor:
    """GELU of float32 `x`, or of 16-bit `x` in float32, rounded once."""
    x = x.contiguous()
    return _made(_FORWARD, x, x)


def gelu_back(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x` from that of `gelu(x)`, both of one format and shape."""
    if grad.shape != x.shape or grad.dtype is not x.dtype:
        raise ValueError(f"A gradient of {grad.dtype} {tuple(grad.shape)} is not that of {x.dtype} {tuple(x.shape)}.")
    return _made(_BACKWARD, x.contiguous(), grad.contiguous())


def _made(kernels: dict[torch.dtype, Kernel], x: Tensor, grad: Tensor) -> Tensor:
    out, count = torch.empty_like(x), x.numel()
    kernels[x.dtype](out.data_ptr(), x.data_ptr(), grad.data_ptr(), count, tickets=-(-count // SPAN))
    return out
