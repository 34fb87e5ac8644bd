"""AdamW against float64 Adam, against torch's, and its two backends against each other."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from halfrank.errors import NonFiniteUpdateError
from halfrank.numerics import adamw, update
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.formats import NARROW_DTYPES, largest_of_each
from halfrank.numerics.moments import (
    BLOCK,
    correction,
    decode_m_,
    encode_m_,
    encode_v,
    fourth_power_,
    maxima,
    root_of,
    v_of_,
)
from halfrank.numerics.noise import hashed_bits, keys, sixteen
from halfrank.numerics.scaling import LossScale, global_norm
from halfrank.numerics.update import Stored, coefficients

FIELDS = ("weight", "residual", "m", "v", "scale")


def stored(count: int, dtype: torch.dtype) -> Stored:
    codes = torch.zeros(count, dtype=torch.int8)
    weight = (torch.randn(count) * 0.05).to(dtype)
    return Stored(weight, codes, codes.clone(), codes.to(torch.uint8), torch.zeros(-(-count // BLOCK)))


def copied(state: Stored) -> Stored:
    return Stored(*(getattr(state, field).clone() for field in FIELDS))


def gradient(count: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(count) * 10.0 ** (torch.rand(count) * -6) * 64
    values[::7] = 0
    return values.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16)) if a.dtype in NARROW_DTYPES else torch.equal(a, b)


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
@pytest.mark.parametrize("gradient_dtype", [*NARROW_DTYPES, torch.float32])
def test_both_backends_give_the_same_bits(
    dtype: torch.dtype, gradient_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = pytest.importorskip("halfrank.numerics.compiled")
    monkeypatch.setattr(compiled, "CHUNK", 5 * BLOCK)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    count = 10_003
    plain = stored(count, dtype)
    fast = copied(plain)
    for step in range(1, 31):
        grad = gradient(count, gradient_dtype)
        numbers = coefficients(step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, divisor=64.0)
        update.update_(plain, grad, numbers, keys(0, step, 3))
        compiled.update_(fast, grad, numbers, keys(0, step, 3))
        for field in FIELDS:
            assert same_bits(getattr(plain, field), getattr(fast, field)), (step, field)
    assert plain.residual.unique().numel() > 100


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("codes", [0, 5])
def test_blocks_without_a_gradient_have_the_same_bits(dtype: torch.dtype, weight_decay: float, codes: int) -> None:
    compiled = pytest.importorskip("halfrank.numerics.compiled")
    count = 12 * BLOCK + 3
    plain = stored(count, dtype)
    plain.residual.copy_(torch.randint(-127, 128, (count,)))
    plain.weight[:4] = torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).tiny])
    plain.m[BLOCK : 2 * BLOCK] = codes  # a state of another's making, whose blocks have no scale
    plain.v[2 * BLOCK : 3 * BLOCK] = codes
    fast = copied(plain)
    for step in range(1, 31):
        grad = torch.zeros(count, dtype=dtype)
        grad[3 * BLOCK :: 7] = -0.0
        if step % 4 == 0:  # of one more block each time, once by a single number
            grad[(3 + step // 4) * BLOCK + step] = 1e-3
        numbers = coefficients(step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, divisor=64.0)
        update.update_(plain, grad, numbers, keys(0, step, 3))
        compiled.update_(fast, grad, numbers, keys(0, step, 3))
        for field in FIELDS:
            assert same_bits(getattr(plain, field), getattr(fast, field)), (step, field)
    assert int((plain.scale == 0).sum()) == 6


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
def test_blocks_without_a_gradient_are_not_passed_over_where_numbers_overflow(dtype: torch.dtype) -> None:
    compiled = pytest.importorskip("halfrank.numerics.compiled")
    numbers = coefficients(1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, divisor=1e-40)
    for apply in (update.update_, compiled.update_):
        state = stored(200, dtype)
        apply(state, torch.zeros(200, dtype=dtype), numbers, (1, 2))
        assert not state.weight.isfinite().any()


def test_compiled_kernels_refuse_what_does_not_fit_together() -> None:
    compiled = pytest.importorskip("halfrank.numerics.compiled")
    numbers = coefficients(1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, divisor=1.0)
    state = stored(200, torch.float16)
    with pytest.raises(ValueError, match="200, 200, 200, 200, 199"):
        compiled.update_(state, torch.zeros(199, dtype=torch.float16), numbers, (1, 2))
    with pytest.raises(ValueError, match="without gaps"):
        compiled.update_(state, torch.zeros(400, dtype=torch.float16)[::2], numbers, (1, 2))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("divisor", [0.0, 1e-40, math.nan])
def test_a_divisor_that_no_float32_number_undoes_is_refused(divisor: float, backend: str) -> None:
    parameters = [nn.Parameter(torch.ones(4, 200, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizer = AdamW(parameters, lr=0.1, backend=backend)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match="grad_divisor"):
        optimizer.step(grad_divisor=divisor)
    for parameter in parameters:
        with pytest.raises(ValueError, match="grad_divisor"):
            optimizer.step_one(parameter, grad_divisor=divisor)
    assert all(bool((parameter == 1).all()) for parameter in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW_DTYPES])
@pytest.mark.parametrize("shape", [(2, 16), (8, 8), (4, 9)])
def test_the_state_of_another_shape_is_refused(shape: tuple[int, int], dtype: torch.dtype) -> None:
    def made(shape: tuple[int, int]) -> AdamW:
        parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
        optimizer = AdamW([("body.weight", parameter)], lr=0.1)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match="'body.weight' was made for another shape"):
        made(shape).load_state_dict(made((4, 8)).state_dict())


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_nothing(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored(3000, dtype)
    parts = copied(whole)
    grad = gradient(3000, dtype)
    numbers = coefficients(1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, divisor=1.0)
    update.update_(whole, grad, numbers, (1, 2))
    monkeypatch.setattr(update, "CHUNK", 2 * BLOCK)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    update.update_(parts, grad, numbers, (1, 2))
    assert all(same_bits(getattr(whole, field), getattr(parts, field)) for field in FIELDS)


def exact_adam(start: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    weight, m, v = start.double(), torch.zeros(start.shape).double(), torch.zeros(start.shape).double()
    for step, grad in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * grad.double()
        v = 0.999 * v + 0.001 * grad.double() ** 2
        weight = weight - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
@pytest.mark.parametrize("lr", [2e-5, 1e-3])
def test_distance_moved_is_that_of_float64_adam(dtype: torch.dtype, lr: float) -> None:
    start = (torch.randn(300, 200) * 0.05).to(dtype)
    sizes = 10.0 ** (torch.rand(start.shape) * 2 - 6)  # squares from 1e-12 down: nothing 16 bits alone could hold
    drift = torch.randn(start.shape)
    gradients = [(drift + torch.randn(start.shape)) * sizes for _ in range(120)]
    parameter = nn.Parameter(start.clone())
    optimizer = AdamW([parameter], lr=lr, weight_decay=0.0, backend="torch")
    for grad in gradients:
        parameter.grad = (grad * 2.0**14).to(dtype)
        optimizer.step(grad_divisor=2.0**14)
    ours = optimizer.exact(parameter).double() - start.double()
    exact = (
        exact_adam(start, [(grad * 2.0**14).to(dtype).double() / 2.0**14 for grad in gradients], lr) - start.double()
    )
    assert float(ours.norm() / exact.norm()) == pytest.approx(1, abs=0.003)
    assert float((ours * exact).sum() / (ours.norm() * exact.norm())) > 0.999


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
@pytest.mark.parametrize("change", [1e-6, 1e-7, 2e-8])
def test_a_small_constant_update_is_kept_on_average(dtype: torch.dtype, change: float) -> None:
    parameter = nn.Parameter(torch.full((64, 64), 0.05).to(dtype))
    start = parameter.detach().double().clone()
    optimizer = AdamW([parameter], lr=change, weight_decay=0.0)
    for _ in range(500):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = float((start - optimizer.exact(parameter).double()).mean()) / (500 * change)
    assert moved == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_float32_parameters_follow_torchs_adamw(scale: float) -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    mine = AdamW([ours], lr=1e-2)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.01)
    for _ in range(20):
        grad = torch.randn(50)
        ours.grad, theirs.grad = grad * scale, grad.clone()
        mine.step(grad_divisor=scale)
        reference.step()
        assert torch.equal(ours.grad, grad * scale), "gradients stay as they came"
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_portions_of_large_float32_parameters_are_the_whole(divisor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    start = [torch.randn(70, 30), torch.randn(5), torch.randn(41, 50).t(), torch.randn(2048)]
    judge = [nn.Parameter(tensor.clone()) for tensor in start]
    own = [nn.Parameter(tensor.clone()) for tensor in start]
    monkeypatch.setattr(adamw, "PORTION", 512)
    expected, found = torch.optim.AdamW(judge, lr=1e-2, fused=True), AdamW(own, lr=1e-2)
    for _ in range(3):
        for one, other in zip(judge, own, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad * divisor
        expected.step()
        found.step(grad_divisor=divisor)
    for one, other in zip(judge, own, strict=True):
        assert torch.equal(one, other)
        assert float(found.state[other]["step"]) == 3


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
def test_small_narrow_parameters_follow_a_float32_master(dtype: torch.dtype) -> None:
    norm = nn.Parameter(torch.ones(16, dtype=dtype))
    reference = nn.Parameter(torch.ones(16))
    mine, theirs = AdamW([norm], lr=1e-6), torch.optim.AdamW([reference], lr=1e-6, weight_decay=0.01)
    for _ in range(50):
        grad = torch.rand(16).to(dtype)
        norm.grad, reference.grad = grad, grad.float()
        mine.step()
        theirs.step()
    assert torch.allclose(mine.exact(norm), reference.detach(), atol=1e-7)


def mixed_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(37, 19), nn.LayerNorm(19), nn.Linear(19, 3))
    model[0].weight.data = model[0].weight.data.half()
    model[2].weight.data = model[2].weight.data.bfloat16()
    return model


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_saved_state_continues_with_the_same_bits() -> None:
    model = mixed_model()
    optimizer = AdamW(model.named_parameters(), lr=1e-3, seed=5)
    for step in range(5):
        give_gradients(model, step)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    restored = AdamW(other.named_parameters(), lr=1e-3, seed=5)
    restored.load_state_dict(torch.load(buffer))
    for step in range(5, 10):
        for current, owner in ((model, optimizer), (other, restored)):
            give_gradients(current, step)
            owner.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) and a[k].dtype is b[k].dtype for k in a if isinstance(a[k], Tensor))


def test_state_takes_three_bytes_an_element() -> None:
    parameter = nn.Parameter(torch.zeros(512, 512).half())
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW([parameter])
    optimizer.step()
    bytes_used = sum(t.numel() * t.element_size() for t in optimizer.state[parameter].values() if isinstance(t, Tensor))
    assert bytes_used / parameter.numel() == pytest.approx(3.03, abs=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_stores_nothing_of_any_parameter(bad: float) -> None:
    model = mixed_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    give_gradients(model, 0)
    model[2].weight.grad[1, 1] = bad
    with pytest.raises(NonFiniteUpdateError, match=r"'2\.weight'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_weight_that_would_leave_its_format_stores_nothing() -> None:
    first, second = nn.Parameter(torch.ones(2, 2).half()), nn.Parameter(torch.full((2, 2), 65504.0).half())
    optimizer = AdamW([("small", first), ("large", second)], lr=0.9, weight_decay=0.0)
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # towards zero: still in range
    held = first.detach().clone()
    optimizer.param_groups[0]["lr"] = 900.0
    first.grad, second.grad = torch.ones_like(first), -1000 * torch.ones_like(second)
    with pytest.raises(NonFiniteUpdateError, match="'large' beyond 65504"):
        optimizer.step()
    assert torch.equal(first, held)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("lr", [1e5, 1e6, 1e9])
def test_an_update_far_beyond_the_format_is_refused(backend: str, lr: float) -> None:
    # Twice the largest number and more: an exponent that is only masked would wrap to a small, finite weight.
    parameter = nn.Parameter(torch.ones(16, 16).half())
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(NonFiniteUpdateError, match="beyond 65504"):
        AdamW([parameter], lr=lr, weight_decay=0.0, backend=backend).step()
    assert torch.equal(parameter, torch.ones(16, 16).half())


def test_torchs_grad_scaler_works_with_16_bit_gradients() -> None:
    torch.manual_seed(3)
    model = nn.Linear(8, 4, bias=False).half()
    start = model.weight.detach().clone()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    x = torch.randn(5, 8).half()
    for _ in range(30):
        scaler.scale(model(x).float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**30
    assert bool(model.weight.isfinite().all())
    assert not torch.equal(start, model.weight)


@given(
    shape=st.sampled_from([(130,), (2, 130)]),
    beta1=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    beta2=st.sampled_from([0.0, 0.3, 0.9, 0.99, 0.9999]),
    eps=st.sampled_from([1e-8, 1e-20, 1e-30]),
    lr=st.sampled_from([1e-3, 1.0, 1e3]),
    sizes=st.lists(st.sampled_from([0.0, 1e-24, 1e-22, 1e-12, 1.0, 1e4]), min_size=4, max_size=60),
    backend=st.sampled_from(["torch", "numba"]),
)
@settings(max_examples=60, deadline=None)
def test_no_settings_store_what_is_not_finite(
    shape: tuple[int, ...], beta1: float, beta2: float, eps: float, lr: float, sizes: list[float], backend: str
) -> None:
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float16))
    optimizer = AdamW([weight], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0, backend=backend)
    for size in sizes + [0.0] * 40:  # moments that outlive their gradients
        weight.grad = torch.ones_like(weight)
        try:
            optimizer.step(grad_divisor=1 / size if size else 1e38)
        except NonFiniteUpdateError:
            return
        finally:
            assert weight.isfinite().all()


@pytest.mark.parametrize("shape", [(128,), (2, 128)])
def test_moments_without_a_bound_are_refused_before_they_are_stored(shape: tuple[int, ...]) -> None:
    outlived = nn.Parameter(torch.zeros(128, dtype=torch.float16))  # m decays more slowly than the root of v
    optimizer = AdamW([outlived], lr=0.01, betas=(0.99, 0.9), weight_decay=0.0)

    def steps() -> None:
        for step in range(600):
            outlived.grad = torch.full_like(outlived, 0.0 if step else 1e4)
            optimizer.step()

    with pytest.raises(NonFiniteUpdateError, match="beyond 65504"):
        steps()
    vanished = nn.Parameter(torch.zeros(shape, dtype=torch.float16))  # v is 0 in float32, and m over eps is left
    vanished.grad = torch.ones_like(vanished)
    with pytest.raises(NonFiniteUpdateError, match="beyond 65504"):
        AdamW([vanished], lr=0.01, eps=1e-30).step(grad_divisor=1e23)
    assert outlived.isfinite().all()
    assert vanished.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": 1e-50}, "eps"), ({"weight_decay": -1.0}, "decay"),
     ({"backend": "fast"}, "backend")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.zeros(2))], **settings)


def test_v_code_is_unbiased_and_zero_only_for_zero() -> None:
    v = 10.0 ** (torch.rand(1600 * BLOCK) * -12)
    v[::5] = 0
    scale, noise = maxima(v), sixteen(hashed_bits(keys(0, 1, 0), 0, v.numel()), 1)
    code = encode_v(v.sqrt(), scale, noise, torch.empty_like(v))
    assert torch.equal(code == 0, v == 0)
    root, back = v.double() ** 0.125, v_of_(fourth_power_(code), scale).double() ** 0.125
    large = v > 0.01 * scale.repeat_interleave(BLOCK)
    assert float((back - root)[large].mean()) == pytest.approx(0, abs=2e-5)
    assert float((back - root)[large].abs().max()) < 1 / 255


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e36])
def test_every_code_stands_for_its_value(scale: float) -> None:
    codes, scales, factor = torch.arange(256.0), torch.full((2,), scale), torch.tensor(1.5)
    fourth = fourth_power_(codes.clone())
    v = scales[0].double() * (codes.double() / 255) ** 8
    root = root_of(fourth, scales, factor, torch.empty_like(fourth))
    torch.testing.assert_close(root.double(), v.sqrt() * 1.5, rtol=5e-7, atol=0)
    normal = v > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(v_of_(fourth, scales)[normal].double(), v[normal], rtol=5e-7, atol=0)
    roots, codes = torch.full((255,), scale), torch.arange(-127.0, 128.0)
    z = codes.double() * 8 / (9 * 127)
    expected = z / (1 - z.abs()) * roots.double()
    torch.testing.assert_close(decode_m_(roots, codes, torch.empty_like(codes)).double(), expected, rtol=2e-6, atol=0)


def test_m_code_is_close_where_v_bounds_it() -> None:
    v = 10.0 ** (torch.rand(50_000) * -8)
    bound = v.sqrt() * correction(10, (0.9, 0.999))
    m = bound * (torch.rand(50_000) * 6 - 3)
    code = encode_m_(m.clone(), bound.clone(), sixteen(hashed_bits(keys(0, 1, 0), 0, 50_000), 2))
    back = decode_m_(bound.clone(), code, torch.empty_like(v))
    relative = ((back - m) / bound).double()
    # A code step of z = r / (1 + |r|) is worth (1 + |r|)^2 of r.
    assert float(relative.abs().max()) < 16 * 1.3 * 8 / (9 * 127)
    assert float(relative.mean()) == pytest.approx(0, abs=2e-3)


def test_loss_scale_backs_off_grows_and_restores() -> None:
    scale = LossScale(initial=4.0, interval=2)
    for finite in (True, True, False, False, True):
        scale.update(finite)
    assert scale.value == 2.0
    other = LossScale(interval=2)
    other.load_state_dict(scale.state_dict())
    other.update(True)
    assert other.value == 4.0
    off = LossScale(enabled=False)
    off.update(False)
    assert off.value == 1.0


def test_global_norm_is_exact_and_tells_non_finite_gradients() -> None:
    gradients = [torch.full((1000,), 60000.0).half(), torch.randn(50), torch.full((9,), 3.0).bfloat16()]
    exact = torch.cat([g.double() for g in gradients]).norm() / 8
    assert float(global_norm(gradients, 8.0)) == pytest.approx(float(exact), rel=1e-6)
    assert not math.isfinite(float(global_norm([*gradients, torch.tensor([math.inf]).half()])))
    assert float(global_norm([])) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("view", ["transposed", "sliced", "one dimension"])
def test_parameters_that_do_not_lie_densely_move_as_dense_ones(dtype: torch.dtype, view: str) -> None:
    whole = torch.randn(10, 12).to(dtype)
    chosen = {"transposed": whole.t(), "sliced": whole[:, ::2], "one dimension": whole[3, ::3]}[view]
    start = chosen.clone()
    strided, dense = nn.Parameter(chosen), nn.Parameter(chosen.clone(memory_format=torch.contiguous_format))
    assert strided.stride() != dense.stride()
    optimizers = AdamW([strided], lr=1e-2), AdamW([dense], lr=1e-2)
    for step in range(4):
        gradient = torch.randn(dense.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        strided.grad, dense.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(strided, dense, rtol=1e-6)
    assert (dense - start).abs().mean() > 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_written_over_between_steps_are_the_ones_that_train(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).to(dtype)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = AdamW(model.named_parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    model.load_state_dict(best)
    for group in optimizer.param_groups:
        group["lr"] = 1e-7
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.float(), best[name].float(), atol=2e-3), name


def test_foreign_states_and_formats_are_named() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.ones_like(parameter)
    theirs = torch.optim.AdamW([parameter])
    theirs.step()
    with pytest.raises(ValueError, match="made by another optimizer"):
        AdamW([parameter]).load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="is float64"):
        AdamW([("weight", nn.Parameter(torch.ones(2, dtype=torch.float64)))])
    half = nn.Linear(4, 4).half()
    optimizer = AdamW(half.parameters())
    for p in half.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    brain = nn.Linear(4, 4).bfloat16()
    with pytest.raises(ValueError, match="for another format"):
        AdamW(brain.parameters()).load_state_dict(optimizer.state_dict())
    half.float()
    for p in half.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="Make a new optimizer"):
        optimizer.step()


def test_the_largest_of_each_tensor_is_its_own() -> None:
    broken = [torch.tensor([2.0, math.nan]), torch.tensor([-math.inf, 2.0], dtype=torch.float16)]
    sound = [torch.tensor([[1.0, -3.0]]), torch.empty(0), torch.tensor([5.0, -1.0], dtype=torch.bfloat16)]
    found = largest_of_each([*broken, *sound])
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, 3.0, 0.0, 5.0]
    assert largest_of_each([]) == []


def test_a_norm_that_is_known_changes_no_bit_and_hides_nothing() -> None:
    torch.manual_seed(0)
    start = [torch.randn(40, 8), torch.randn(40, 8).half()]
    ends = []
    for told in (False, True):
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = AdamW(parameters, lr=1e-3)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.5 + step)
            norm = float(global_norm([p.grad for p in parameters if p.grad is not None]))
            optimizer.step(grad_divisor=2.0, **({"gradient_norm": norm} if told else {}))
        ends.append([optimizer.exact(parameter) for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    for broken in (math.inf, math.nan):
        parameters[1].grad = torch.full_like(parameters[1], broken)
        with pytest.raises(NonFiniteUpdateError, match="parameter 1"):
            optimizer.step(gradient_norm=broken)


def test_a_weight_that_was_written_between_two_updates_is_looked_at_again() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = AdamW([weight], lr=1e33, weight_decay=0.0)  # the rate is what takes a number near the edge beyond it
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    weight.grad = torch.full((4, 4), 1.0)
    with torch.no_grad():
        weight.fill_(-torch.finfo(torch.float32).max)
    kept = weight.detach().clone()
    with pytest.raises(NonFiniteUpdateError, match="largest weight is 3.40282e"):
        optimizer.step()
    assert torch.equal(weight.detach(), kept)
