"""Weight and residual as float32, by both backends, for every number that 16 bits can hold."""

from __future__ import annotations

import pytest
import torch

from halfrank.numerics import widen
from halfrank.numerics.formats import NARROW_DTYPES
from halfrank.numerics.rounding import join

CODES = [-127, -64, -1, 0, 1, 100, 127]


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", NARROW_DTYPES)
def test_every_number_widens_as_torch_says_and_none_that_is_not_finite_becomes_so(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(widen, "has_numba", lambda: backend == "numba")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for code in CODES:
        residual = torch.full(every.shape, code, dtype=torch.int8)
        wide = widen.widen_(torch.empty(every.shape), every, residual)
        assert torch.equal(wide.isfinite(), every.isfinite())
        assert torch.equal(wide.isnan(), every.isnan())
        numbers = every[~every.isnan()]
        exact = numbers.double() if code == 0 else join(numbers, residual[: len(numbers)]).double()
        assert torch.equal(wide[~every.isnan()].double(), exact)
