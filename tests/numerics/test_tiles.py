"""Products inside compiled kernels, against float64: every height of a tile, both ways to read the first matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from halfrank.numerics.tiles import LANES, MOST, product


@given(
    rows=st.integers(1, 3 * MOST + 1),
    panels=st.integers(1, 3),
    count=st.integers(1, 40),
    turned=st.booleans(),
    gap=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_it_is_the_product(rows: int, panels: int, count: int, turned: bool, gap: int) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + count)
    columns = panels * LANES
    a = torch.randn(count, rows + gap, generator=generator).t() if turned else torch.randn(rows + gap, count)
    b = torch.randn(count, columns + gap, generator=generator)
    c = torch.full((rows + 1, columns + gap), 7.0)
    product(
        c.data_ptr(), c.stride(0), a.data_ptr(), a.stride(0), a.stride(1), b.data_ptr(), b.stride(0), rows, columns,
        count,
    )  # fmt: skip
    wanted = a[:rows].double() @ b[:, :columns].double()
    bound = a[:rows].abs().double() @ b[:, :columns].abs().double()
    assert bool(((c[:rows, :columns].double() - wanted).abs() <= 1e-6 * (count + 1) ** 0.5 * bound).all())
    assert bool((c[rows:] == 7.0).all())  # nothing beyond is written
    assert bool((c[:, columns:] == 7.0).all())
