"""e^x for loops that numba turns into vectors. Importing it needs the extra `[fast]`."""

from __future__ import annotations

from typing import Any

import numpy as np

from halfrank.numerics.compiled import contracted

_f, _u = np.float32, np.uint32
_ZERO, _ONE, _HALF = _f(0.0), _f(1.0), _f(0.5)
_PER_OCTAVE, _WHOLE = _f(1.4426950408889634), _f(1.5 * 2**23)  # log2(e); added, it leaves a whole number
_LN2_HIGH, _LN2_LOW = _f(0.693359375), _f(-2.12194440e-4)  # together log(2): the first times a small integer is exact
_VANISHES = _f(-87.0)  # e^x is below the smallest normal number
_C7, _C6, _C5, _C4, _C3 = _f(1 / 5040), _f(1 / 720), _f(1 / 120), _f(1 / 24), _f(1 / 6)


@contracted
def exp(x: Any) -> Any:
    """e^x for float32 x up to 0, by its power series between -log(2)/2 and log(2)/2; NaN stays NaN."""
    near = _VANISHES if x < _VANISHES else x
    shifted = near * _PER_OCTAVE + _WHOLE
    octaves = shifted - _WHOLE
    r = (near - octaves * _LN2_HIGH) - octaves * _LN2_LOW
    series = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _HALF
    power = (series * r) * r + r + _ONE
    raised = _u(_f(power).view(np.uint32) + _u(_f(shifted).view(np.uint32) << _u(23))).view(np.float32)
    return _ZERO if x < _VANISHES else raised + (x - x)  # the bits of some NaN are raised to those of a number
