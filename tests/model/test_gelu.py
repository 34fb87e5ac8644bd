"""GELU of a training step against float64: every 16-bit number, far tails, gradients, and where torch's own stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erfc
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from halfrank.model import dropout as module
from halfrank.model.gelu import is_gelu, module_gelu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def trained() -> nn.Module:
    return ACT2FN["gelu"].train()


def exact(x: Tensor) -> Tensor:
    """In float64, without the loss of digits that 1 + erf has far below 0."""
    wide = x.double()
    return wide * torch.from_numpy(erfc(-wide.numpy() / 2**0.5)) / 2


def exact_slope(x: Tensor) -> Tensor:
    wide = x.double()
    density = torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
    return torch.from_numpy(erfc(-wide.numpy() / 2**0.5)) / 2 + wide * density


def with_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    own = x.clone().requires_grad_()
    out = module_gelu(trained(), own)
    out.backward(grad)
    assert own.grad is not None
    assert out.dtype == own.grad.dtype == x.dtype
    return out.detach(), own.grad


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_number_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    out, slope = with_gradient(x, torch.ones_like(x))
    cancelling = x.double().abs() * torch.exp(-x.double().square() / 2)  # what the slope is a difference of
    for found, right, of in ((out, exact(x), 0.0), (slope, exact_slope(x), cancelling)):
        nearest = right.to(dtype)
        error = (found.double() - right).abs()
        # Where two numbers are equally near but for float32's last bits, either is right.
        assert (error <= (nearest.double() - right).abs() + 2e-6 * right.abs() + 3e-7 * of + 1e-37).all()


@given(st.integers(0, 2**20), st.integers(1, 70_000), st.floats(0.01, 30))
@settings(max_examples=15, deadline=None)
def test_float32_is_right_to_its_last_digits(seed: int, count: int, spread: float) -> None:
    torch.manual_seed(seed)
    x, grad = torch.randn(2, count)
    x *= spread
    out, slope = with_gradient(x, grad)
    error = (out.double() - exact(x)).abs()
    of_exponent = 6e-8 * x.double().square()  # relative, for the rounding of x^2 / 2 comes out of e^ so
    assert (error <= (4e-7 + of_exponent) * exact(x).abs() + 1e-37).all()
    assert ((slope.double() - grad.double() * exact_slope(x)).abs() <= 4e-7 * grad.double().abs()).all()


def test_the_tail_keeps_its_digits() -> None:
    x = -torch.linspace(0.5, 12.0, 100_001)
    out, _ = with_gradient(x, torch.ones_like(x))
    relative = ((out.double() - exact(x)) / exact(x)).abs().max()
    assert relative < 1e-5 < ((F.gelu(x).double() - exact(x)) / exact(x)).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_as_in_torch(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.0, *[2.0] * 40], dtype=dtype)
    grad = torch.ones_like(x)
    out, slope = with_gradient(x, grad)
    assert torch.equal(out.isnan(), F.gelu(x).isnan())
    assert out[0] == torch.inf
    assert torch.equal(slope.isnan(), torch.ops.aten.gelu_backward(grad, x).isnan())
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isnan()].to(dtype)  # whatever else their bits say
    assert all(found.isnan().all() for found in with_gradient(every, torch.ones_like(every)))
    broken = torch.where(torch.arange(len(x)) == 4, torch.nan, grad)
    assert with_gradient(x, broken)[1].isnan().sum() == slope.isnan().sum() + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 40_000)])
def test_shapes_and_layouts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    grad = torch.randn(shape).to(dtype)
    plain = with_gradient(x, grad)
    turned = with_gradient(x.t() if x.ndim == 2 else x.transpose(0, -1), grad.transpose(0, -1))
    for a, b in zip(plain, turned, strict=True):
        assert torch.equal(a, b.transpose(0, -1))
    expanded = module_gelu(trained(), x[..., :1].expand(shape))
    assert torch.equal(expanded, module_gelu(trained(), x[..., :1].expand(shape).contiguous()))


def test_threads_do_not_change_bits() -> None:
    x, grad = torch.randn(2, 300_001)
    torch.set_num_threads(1)
    one = with_gradient(x, grad)
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(one, with_gradient(x, grad), strict=True))


def test_its_gradient_has_a_gradient() -> None:
    x = torch.randn(1000, requires_grad=True)
    (first,) = torch.autograd.grad(module_gelu(trained(), x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    wide = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(F.gelu(wide).pow(2).sum(), wide, create_graph=True)
    (right,) = torch.autograd.grad(right.sum(), wide)
    torch.testing.assert_close(second.double(), right, rtol=1e-4, atol=1e-5)


def test_many_gradients_at_once() -> None:
    x = torch.randn(2, 7, requires_grad=True)
    rows = module_gelu(trained(), x).sum(1)
    (at_once,) = torch.autograd.grad(rows, x, torch.eye(2), is_grads_batched=True)
    for row in range(2):
        torch.testing.assert_close(at_once[row, row].double(), exact_slope(x.detach())[row], rtol=1e-5, atol=1e-6)


def test_a_view_with_another_sign() -> None:
    x = torch.randn(1000)
    torch.testing.assert_close(module_gelu(trained(), torch._neg_view(x)), F.gelu(-x))


@pytest.mark.parametrize("changed", ["eval", "without numba", "float64"])
def test_elsewhere_it_is_torchs_own(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, acts = torch.randn(10_000), trained()
    assert not torch.equal(module_gelu(acts, x), F.gelu(x))  # the last bits tell who computed
    if changed == "eval":
        acts.eval()
    elif changed == "without numba":
        monkeypatch.setattr(module, "has_numba", lambda: False)
    x = x.to(torch.float64 if changed == "float64" else torch.float32).requires_grad_()
    assert torch.equal(module_gelu(acts, x), F.gelu(x))


def test_who_watches_sees_torchs_operations() -> None:
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(5, requires_grad=True)
    with Watching():
        module_gelu(trained(), x).sum().backward()
    assert {"aten.gelu.default", "aten.gelu_backward.default"} <= set(seen)
    with FakeTensorMode():
        assert module_gelu(trained(), torch.empty(7, 3)).shape == (7, 3)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (ACT2FN["gelu"], True), (nn.GELU(), True), (ACT2FN["gelu_python"], False), (ACT2FN["gelu_new"], False),
        (ACT2FN["gelu_pytorch_tanh"], False), (nn.GELU(approximate="tanh"), False), (ACT2FN["silu"], False),
    ],
)  # fmt: skip
def test_only_the_exact_one_is_taken(activation: nn.Module, expected: bool) -> None:
    assert is_gelu(activation) is expected
