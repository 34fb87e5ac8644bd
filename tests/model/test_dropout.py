"""Dropout on a CPU: its share, its mean, its gradient, and the same bits from the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfrank.model import dropout as module
from halfrank.model.dropout import dropout


@given(p=st.floats(0.001, 0.99), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_share_and_mean(p: float, seed: int) -> None:
    torch.manual_seed(seed)
    count = 40_000
    out = dropout(torch.ones(count), p)
    share = float((out == 0).double().mean())
    assert abs(share - p) <= 5 * (p * (1 - p) / count) ** 0.5 + 2**-16
    assert abs(float(out.double().mean()) - 1) <= 5 * (p / (1 - p) / count) ** 0.5
    kept = out[out != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2e-3)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(400_000), 0.3) == 0).double() - 0.3
    for distance in (1, 2, 3, 4, 8):
        together = float((dropped[:-distance] * dropped[distance:]).mean()) / (0.3 * 0.7)
        assert abs(together) <= 5 / 400_000**0.5


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5, 7), (0,)])
def test_gradient_passes_where_the_value_did(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(1)
    out = dropout(x, 0.4)
    (out * 3).sum().backward()
    assert x.grad is not None
    scale = torch.where(out != 0, out / torch.where(x == 0, 1.0, x), 0.0).detach()
    assert torch.allclose(x.grad, 3 * scale, rtol=1e-5)


def test_a_seed_repeats_it_and_the_ends_are_torchs() -> None:
    x = torch.randn(1001)
    torch.manual_seed(3)
    first = dropout(x, 0.5)
    state = torch.get_rng_state()
    second = dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.5))
    torch.set_rng_state(state)
    assert torch.equal(second, dropout(x, 0.5))
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x))
    assert torch.equal(dropout(x, 0.9999999), torch.zeros_like(x))  # the nearest share is all of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 3 * 2**17 + 5])
def test_numba_gives_the_bits_of_torch(count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    x = torch.randn(count, 2).mul_(10.0 ** torch.randint(-8, 5, (count, 2))).to(dtype).t()  # not contiguous
    x[:, :1], x[:, 5:6], x[:, 6:7] = -0.0, torch.inf, torch.nan
    found = []
    for numba in (True, False):
        monkeypatch.setattr(module, "has_numba", lambda numba=numba: numba)
        torch.manual_seed(2)
        own = x.clone().requires_grad_()
        out = dropout(own, 0.3)
        out.backward(x)
        found.append((out.detach().contiguous(), own.grad.contiguous()))
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    for compiled, plain in zip(*found, strict=True):
        assert (compiled.view(bits) == plain.view(bits)).all() or (compiled.nan_to_num(9) == plain.nan_to_num(9)).all()


def test_its_gradient_has_a_gradient() -> None:
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    out = dropout(x, 0.3)
    factor = (out / x).detach()
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * factor**3 * x.detach())
