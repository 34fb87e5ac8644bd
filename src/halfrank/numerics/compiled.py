"""The 16-bit AdamW update compiled by numba: the same roundings as `update.py` in the same order, a block at a time.

Importing this module needs the extra `[fast]`. A few threads share a tensor in many small chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from halfrank.numerics.dither import HALF_STEPS, thresholds
from halfrank.numerics.formats import GRID, NARROW_DTYPES
from halfrank.numerics.moments import BLOCK, EIGHTH, FOURTH, M_DECODE, M_ENCODE, V_UNIT
from halfrank.numerics.noise import FIRST, SECOND
from halfrank.numerics.rounding import PART, STEPS
from halfrank.numerics.team import (
    FLOAT,
    HALF,
    WORDS,
    Kernel,
    codes_at,
    floats_at,
    halves_at,
    levels_at,
    whole_registers,
    words_at,
)
from halfrank.numerics.update import Coefficients, Stored

NUMBERS = len(fields(Coefficients))
CHUNK = 1 << 15  # elements of a ticket, whole blocks: a tenth of a millisecond, many times what taking it takes
_f, _u, _i = np.float32, np.uint32, np.int32
_PART, _STEPS, _M_ENCODE, _M_DECODE = _f(PART), _f(STEPS), _f(M_ENCODE), _f(M_DECODE)
_V_UNIT, _FOURTH, _EIGHTH = _f(V_UNIT), _f(FOURTH), _f(EIGHTH)
_FIRST, _SECOND = _u(FIRST), _u(SECOND)
_UNIT, _ROOT_STEPS, _ONE, _ZERO = _f(2.0**-16), _f(255.0), _f(1.0), _f(0.0)
_CODE, _LOW = _f(127.0), _f(-127.0)
_UP, _HALF, _TINY = _f(2.0**112), _f(0.5), _f(2.0**-14)
_BEYOND = _f(65520.0)
_HALF_BITS = _u(np.float32(0.5).view(np.uint32))


def _kernel(function: Any, **options: Any) -> Any:
    return njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)


def inline(function: Any) -> Any:
    """Compiled once, and put into each function that calls it by LLVM, so that loops over it become vectors."""
    return _kernel(function, forceinline=True, fastmath=False)


def contracted(function: Any) -> Any:
    """`inline`, where `a * b + c` is one step if the processor has that."""
    return _kernel(function, forceinline=True, fastmath={"contract"})


@intrinsic
def _extended(context: Any, pattern: Any) -> Any:
    def code(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.fpext(builder.bitcast(given[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _truncated(context: Any, value: Any) -> Any:
    def code(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.bitcast(builder.fptrunc(given[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), code


@inline
def _wide_half_at_once(bits: Any) -> Any:
    return _extended(np.uint16(bits))


@inline
def _narrow_half_at_once(value: Any) -> Any:
    return _truncated(_f(value))


@inline
def _wide_half(bits: Any) -> Any:
    # The exponent is moved by multiplying with a power of two, which also normalises subnormal numbers exactly.
    magnitude = _u(_u(_u(bits) & _u(0x7FFF)) << _u(13))
    value = _u(magnitude).view(np.float32) * _UP
    # Moving it leaves infinity and NaN finite: their exponent field is all ones in both formats.
    endless = _u(0x7F800000) if _u(_u(bits) & _u(0x7C00)) == _u(0x7C00) else _u(0)
    return _u(_f(value).view(np.uint32) | endless | _u(_u(_u(bits) & _u(0x8000)) << _u(16))).view(np.float32)


@inline
def _narrow_half(value: Any) -> Any:
    bits = _f(value).view(np.uint32)
    sign = _u((bits >> _u(16)) & _u(0x8000))
    magnitude = _u(bits & _u(0x7FFFFFFF))
    size = _u(magnitude).view(np.float32)
    rebased = _u(magnitude - _u(112 << 23))
    normal = _u(_u(rebased + _u(0xFFF) + ((rebased >> _u(13)) & _u(1))) >> _u(13))
    # Adding 0.5 leaves exactly ten bits below 2^-14: the addition itself rounds to nearest even.
    subnormal = _u(_f(size + _HALF).view(np.uint32) - _HALF_BITS)
    chosen = normal if size >= _TINY else subnormal
    # From 65520 on, the exponent field has no room: what torch rounds to infinity is infinity here, NaN as well.
    finite = chosen if size < _BEYOND else _u(0x7C00)
    return np.uint16(finite | sign)


@inline
def _wide_brain(bits: Any) -> Any:
    return _u(_u(bits) << _u(16)).view(np.float32)


@inline
def _narrow_brain(value: Any) -> Any:
    bits = _f(value).view(np.uint32)
    return np.uint16((bits + _u(0x7FFF) + ((bits >> _u(16)) & _u(1))) >> _u(16))


@inline
def hashed(number: Any, key0: Any, key1: Any) -> Any:
    """`noise.hashed_bits` of one number, uint32."""
    h = _u(number ^ key0)
    h = _u((h ^ (h >> _u(16))) * _FIRST)
    h = _u(h ^ key1)
    h = _u((h ^ (h >> _u(15))) * _SECOND)
    return _u(h ^ (h >> _u(16)))


@inline
def _fourth_power(code: Any) -> Any:
    root = _f(code) * _V_UNIT
    square = root * root
    return square * square


@inline
def _spacing(value: Any, small: Any, fine: Any) -> Any:
    """The exponent, as float32 has it, of the distance between a format's numbers around this one."""
    return _u(max(_u(_f(value).view(np.uint32) >> _u(23)) & _u(0xFF), small) - fine)


@inline
def _held(value: Any, code: Any, small: Any, fine: Any) -> Any:
    """What a residual's code adds to its weight."""
    return (_f(code) * _PART) * _u(_spacing(value, small, fine) << _u(23)).view(np.float32)


@inline
def _span(ticket: Any, total: Any, chunk: Any) -> Any:
    """First and last element of a ticket."""
    return ticket * chunk, min((ticket + 1) * chunk, total)


class Format(NamedTuple):
    """How compiled code finds the numbers of a format, reads them as float32, and writes them."""

    at: Any
    width: int  # bytes
    wide: Any
    narrow: Any


def _build(weights_in: Format, smallest: int, mantissa: int, gradients_in: Format) -> Kernel:
    small, fine = _u(smallest), _u(mantissa)
    wide, narrow, gradients_at, wide_gradient = weights_in.wide, weights_in.narrow, gradients_in.at, gradients_in.wide

    @inline
    def settled(w: Any, code: Any, change: Any, decay: Any, bits: Any) -> Any:
        """A weight less its change and its share `decay`, and the residual's code, whose step 16 of the bits round."""
        moved = (_held(w, code, small, fine) - change) - w * decay
        stored = narrow(w + moved)
        rounded = wide(stored)
        rest = (w - rounded) + moved
        inverse = _u(_u(_u(254) - _spacing(rounded, small, fine)) << _u(23)).view(np.float32)
        noise = _f(_i(bits & _u(0xFFFF))) * _UNIT
        step = np.floor((rest * inverse) * _STEPS + noise)
        return stored, np.int8(_i(min(max(step, _LOW), _CODE)))

    def update(
        weights: Any, residuals: Any, m_codes: Any, v_codes: Any, scales: Any, gradients: Any,
        start: int, stop: int, numbers: Any, key0: Any, key1: Any,
    ) -> None:  # fmt: skip
        whole_registers()
        factor, beta1, rest1, beta2, rest2 = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
        step_size, inverse_root, eps, decay = numbers[5], numbers[6], numbers[7], numbers[8]
        before, after = numbers[9], numbers[10]
        # Of a weight without gradient and moments. It is none where a number overflows: 0 times infinity is not 0.
        none = _ZERO * factor
        root = np.sqrt(_ZERO * beta2 + (none * rest2) * none)
        stays = ((_ZERO * beta1 + none * rest1) / (root * inverse_root + eps)) * step_size == _ZERO
        m = np.empty(BLOCK, np.float32)
        v = np.empty(BLOCK, np.float32)
        roots = np.empty(BLOCK, np.float32)
        bits = np.empty(BLOCK, np.uint32)
        # Views of one block, loops from 0 and the maximum apart: each of these lets LLVM vectorise.
        for first in range(start, stop, BLOCK):
            count = min(BLOCK, stop - first)
            weight, residual = weights[first : first + count], residuals[first : first + count]
            m_code, v_code = m_codes[first : first + count], v_codes[first : first + count]
            gradient = gradients[first : first + count]
            scale = scales[first // BLOCK]
            given = 0
            for j in range(count):
                given |= (wide_gradient(gradient[j]) != _ZERO) | (m_code[j] != 0) | (v_code[j] != 0)
            if stays and not given and scale == _ZERO:  # rows of tokens that no batch has held: they decay
                for j in range(count):
                    h = hashed(_u(_u(first) + _u(j)), key0, key1)
                    weight[j], residual[j] = settled(wide(weight[j]), residual[j], _ZERO, decay, h)
                continue
            v_factor, root_factor = scale * _EIGHTH, (np.sqrt(scale) * _FOURTH) * before
            for j in range(count):
                w = wide(weight[j])
                g = wide_gradient(gradient[j]) * factor
                fourth = _fourth_power(v_code[j])
                z = _f(m_code[j]) * _M_DECODE
                m_before = (fourth * root_factor) * (z / (_ONE - abs(z)))
                m_new = m_before * beta1 + g * rest1
                v_new = ((fourth * fourth) * v_factor) * beta2 + (g * rest2) * g
                root = np.sqrt(v_new)
                change = (m_new / (root * inverse_root + eps)) * step_size
                h = hashed(_u(_u(first) + _u(j)), key0, key1)
                weight[j], residual[j] = settled(w, residual[j], change, decay, h)
                m[j] = m_new
                v[j] = v_new
                roots[j] = root
                bits[j] = h
            top = _u(0)
            for j in range(count):
                top = max(top, _f(v[j]).view(np.uint32))  # floats that are not negative order as their bits do
            largest = _u(top).view(np.float32)
            scales[first // BLOCK] = largest
            largest_root = np.sqrt(largest) if largest > _ZERO else _ONE
            root_factor = (np.sqrt(largest) * _FOURTH) * after
            for j in range(count):
                eighth = np.sqrt(np.sqrt(roots[j] / largest_root))
                noise = _f(_i((bits[j] >> _u(8)) & _u(0xFFFF))) * _UNIT
                level = np.floor(eighth * _ROOT_STEPS + noise)
                v_code[j] = np.uint8(_i(min(max(level, _ONE), _ROOT_STEPS))) if roots[j] > _ZERO else np.uint8(0)
            for j in range(count):
                d = _fourth_power(v_code[j]) * root_factor
                r = m[j] / d if d > _ZERO else _ZERO
                noise = _f(_i(bits[j] >> _u(16))) * _UNIT
                step = np.floor((r / (abs(r) + _ONE)) * _M_ENCODE + noise)
                m_code[j] = np.int8(_i(min(max(step, _LOW), _CODE)))

    compiled = _kernel(update)

    def job(address: Any, ticket: Any, seat: Any) -> None:
        whole_registers()
        words = words_at(address, WORDS)
        total = words[0]
        start, stop = _span(ticket, total, words[1])
        compiled(
            halves_at(words[2], total), codes_at(words[3], total), codes_at(words[4], total),
            levels_at(words[5], total), floats_at(words[7], -(-total // BLOCK)), gradients_at(words[6], total),
            start, stop, floats_at(words[8], NUMBERS), _u(words[9]), _u(words[10]),
        )  # fmt: skip

    return Kernel(job)


def _build_widener(wide_one: Any, smallest: int, mantissa: int) -> Kernel:
    small, fine = _u(smallest), _u(mantissa)

    def job(address: Any, ticket: Any, seat: Any) -> None:
        whole_registers()
        words = words_at(address, WORDS)
        start, stop = _span(ticket, words[0], words[1])
        count = stop - start
        wide, narrow = floats_at(words[2] + FLOAT * start, count), halves_at(words[3] + HALF * start, count)
        residual = codes_at(words[4] + start, count)
        for j in range(count):
            w = wide_one(narrow[j])
            wide[j] = w + _held(w, residual[j], small, fine)

    return Kernel(job)


def _build_ditherer(fine: int, coarse: int, largest: int) -> Kernel:
    mask, power, top = _i(fine), _i(coarse), _i(largest)

    def job(address: Any, ticket: Any, seat: Any) -> None:
        whole_registers()
        words = words_at(address, WORDS)
        key0, key1 = _u(words[5]), _u(words[6])
        start, stop = _span(ticket, words[0], words[1])
        count = stop - start
        out, narrow = halves_at(words[2] + HALF * start, count), halves_at(words[3] + HALF * start, count)
        residual = codes_at(words[4] + start, count)
        for j in range(count):
            bits, code = _i(narrow[j]), _i(residual[j])
            size = _i(bits & _i(0x7FFF))
            negative = _i(code < 0) if size == 0 else _i(bits >> _i(15))
            outwards = _i(code < 0) == negative
            nearer = _i((not outwards) and (size & mask) == 0 and size >= power)
            h = hashed(_u(_u(start) + _u(j)), key0, key1)
            share = _i(abs(code) << (_i(15) + nearer))
            moves = _i(h & _u(0xFFFF)) * _i(HALF_STEPS) < share and not (outwards and size >= top)
            size += _i(moves) * (_i(1) if outwards else _i(-1))
            out[j] = np.uint16(size | (negative << _i(15)))

    return Kernel(job)


@inline
def _as_it_is(value: Any) -> Any:
    return value


# One instruction of most processors; LLVM asks a function that is not there to do it on others.
_AT_ONCE = bool(get_host_cpu_features().get("f16c"))
_half = (_wide_half_at_once, _narrow_half_at_once) if _AT_ONCE else (_wide_half, _narrow_half)
FORMATS = {
    torch.float16: Format(halves_at, HALF, *_half),
    torch.bfloat16: Format(halves_at, HALF, _wide_brain, _narrow_brain),
    torch.float32: Format(floats_at, FLOAT, _as_it_is, _as_it_is),
}
_KERNELS = {
    (weight, gradient): _build(FORMATS[weight], *GRID[weight], way)
    for weight in NARROW_DTYPES
    for gradient, way in FORMATS.items()
}
_WIDENERS = {dtype: _build_widener(FORMATS[dtype].wide, *GRID[dtype]) for dtype in NARROW_DTYPES}
_DITHERERS = {dtype: _build_ditherer(*thresholds(dtype)) for dtype in NARROW_DTYPES}


def update_(stored: Stored, gradient: Tensor, numbers: Coefficients, noise_keys: tuple[int, int]) -> None:
    """Update a whole tensor in place on as many threads as torch uses."""
    alike = (stored.weight, stored.residual, stored.m, stored.v, gradient)
    kernel = _KERNELS[stored.weight.dtype, gradient.dtype]
    _in_chunks(kernel, alike, stored.scale, numbers.packed(), noise_keys=noise_keys)


def update_compiled() -> bool:
    """Whether any of the update's kernels has been compiled: that happens when it is first called."""
    return any(kernel.compiled for kernel in _KERNELS.values())


def widen_(wide: Tensor, narrow: Tensor, residual: Tensor) -> None:
    """Fill flat float32 `wide` with `narrow` plus its residual, on as many threads as torch uses."""
    _in_chunks(_WIDENERS[narrow.dtype], (wide, narrow, residual))


def dither_(out: Tensor, narrow: Tensor, residual: Tensor, noise_keys: tuple[int, int]) -> None:
    """Fill flat `out` with `narrow` or its neighbours, on as many threads as torch uses."""
    _in_chunks(_DITHERERS[narrow.dtype], (out, narrow, residual), noise_keys=noise_keys)


def _in_chunks(kernel: Kernel, alike: Sequence[Tensor], *others: Tensor, noise_keys: tuple[int, ...] = ()) -> None:
    """Kernels know tensors by their address alone: those that are `alike` have an element for each of the first's."""
    total = alike[0].numel()
    if not all(tensor.is_contiguous() for tensor in (*alike, *others)):
        raise ValueError("Compiled kernels read and write tensors without gaps.")
    if any(tensor.numel() != total for tensor in alike):
        raise ValueError(f"Tensors of {[tensor.numel() for tensor in alike]} elements cannot be worked on together.")
    places = [tensor.data_ptr() for tensor in (*alike, *others)]
    kernel(total, CHUNK, *places, *noise_keys, tickets=-(-total // CHUNK))
