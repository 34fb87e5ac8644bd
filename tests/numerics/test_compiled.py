"""Both ways in which compiled kernels read and write float16, against torch: every value, all kinds of roundings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from numba import njit

from halfrank.numerics import compiled

READS = [compiled._wide_half, compiled._wide_half_at_once]
WRITES = [compiled._narrow_half, compiled._narrow_half_at_once]


def mapped(function: Any, values: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    @njit
    def run(values: Any, out: Any) -> None:
        for place in range(values.shape[0]):
            out[place] = function(values[place])

    run(values, out)
    return out


@pytest.fixture(autouse=True)
def needs_the_instruction(request: pytest.FixtureRequest) -> None:
    if "at_once" in request.node.name and not compiled._AT_ONCE:
        pytest.skip("this processor has no instruction for it")


@pytest.mark.parametrize("read", READS, ids=lambda function: function.__name__)
def test_every_float16_is_read_as_torch_reads_it(read: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    found = mapped(read, every, np.empty(1 << 16, np.float32))
    wanted = torch.from_numpy(every.view(np.float16)).float().numpy()
    there = ~np.isnan(wanted)
    assert (found.view(np.uint32) == wanted.view(np.uint32))[there].all()
    assert np.isnan(found[~there]).all()


@pytest.mark.parametrize("write", WRITES, ids=lambda function: function.__name__)
def test_float32_is_rounded_as_torch_rounds_it(write: Any) -> None:
    generator = np.random.default_rng(0)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2  # ties, and their neighbours on both sides
    values = np.concatenate([
        halves, middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf)),
        generator.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32),
        np.array([65519.996, 65520.0, -65520.0, 1e30, np.inf, -np.inf, 0.0, -0.0, 2.0**-25, 2.0**-26], np.float32),
    ])  # fmt: skip
    values = values[~np.isnan(values)]  # an update that is not finite is refused before
    found = mapped(write, values, np.empty(values.size, np.uint16))
    wanted = torch.from_numpy(values).half().numpy().view(np.uint16)
    assert (found == wanted).all()
