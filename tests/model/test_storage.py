"""16-bit storage and every compute format against float32, float64 and torch's own 16-bit arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from halfrank.data.packing import pack
from halfrank.model import folder, storage
from halfrank.model.scorer import Scorer
from halfrank.model.storage import NARROW
from halfrank.precision import COMPUTES, compute_named
from tiny import PAIRS, make_folder

FAMILIES = ["bert", "roberta", "llama", "mpnet", "deberta-v2"]


def in_callers_order(scorer: Scorer, count: int) -> torch.Tensor:
    batch = pack(scorer.pairs.encode(PAIRS[:count]), range(count))
    logits = scorer.logits(batch)
    return torch.zeros_like(logits).index_copy(0, torch.tensor(batch.rows), logits)


def logits_in(path: Path, dtype: torch.dtype, compute: str, count: int = len(PAIRS)) -> torch.Tensor:
    scorer = folder.load(path, folder.LoadOptions(dtype=dtype, compute=compute, num_labels=1))
    with torch.no_grad():
        return in_callers_order(scorer, count)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", NARROW)
def test_float32_compute_equals_the_same_weights_in_float32(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_folder(family, tmp_path / "narrow", dtype=dtype)
    narrow = logits_in(path, dtype, "float32")
    assert torch.allclose(narrow, logits_in(path, torch.float32, "float32"), atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_every_compute_format_runs_forward_and_backward(
    family: str, compute: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = make_folder(family, tmp_path / family)
    scorer = folder.load(path, folder.LoadOptions(dtype=dtype, compute=compute, num_labels=1))
    logits = in_callers_order(scorer, 6)
    assert logits.dtype is torch.float32
    logits.sum().backward()
    exact = logits_in(path, torch.float32, "float32", 6)
    unit = {"float32": 2**-11 if dtype is torch.float16 else 2**-8, "float16": 2**-10, "bfloat16": 2**-7}
    allowed = 40 * max(unit[compute.removeprefix("emulated-")], 2**-8 if dtype is torch.bfloat16 else 0.0)
    assert (logits - exact).abs().max() <= allowed
    trained = {name for name, p in scorer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("embed" in name for name in trained)
    assert any(part in name for name in trained for part in ("query", "q_proj", ".q."))


@pytest.mark.parametrize("dtype", NARROW)
def test_only_body_matrices_are_narrow(dtype: torch.dtype, tmp_path: Path) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(dtype=dtype))
    for name, parameter in scorer.model.named_parameters():
        expected = dtype if parameter.ndim > 1 and not name.startswith("classifier") else torch.float32
        assert parameter.dtype is expected, name


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_of_a_widened_product_match_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16)
    layer.weight.data = layer.weight.data.to(dtype)
    holder = nn.Sequential(layer)
    storage.attach(holder, compute_named("float32"), set())
    x = torch.randn(5, 7, 24, requires_grad=True)
    seed = torch.randn(5, 7, 16)
    (holder(x) * seed).sum().backward()
    exact_x = x.detach().double().requires_grad_()
    exact_w = layer.weight.detach().double().requires_grad_()
    (torch.nn.functional.linear(exact_x, exact_w, layer.bias.detach().double()) * seed).sum().backward()
    assert torch.allclose(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-6)
    assert layer.weight.grad.dtype is dtype
    assert torch.equal(layer.weight.grad, exact_w.grad.to(dtype)) or torch.allclose(
        layer.weight.grad.double(), exact_w.grad, rtol=2 * torch.finfo(dtype).eps
    )


def test_a_token_seen_often_sums_its_gradient_in_float32() -> None:
    table = nn.Embedding(4, 3)
    table.weight.data = table.weight.data.bfloat16()
    holder = nn.Sequential(table)
    storage.attach(holder, compute_named("float32"), set())
    holder(torch.ones(1000, dtype=torch.long)).sum().backward()
    # bfloat16 would stop counting at 256, where adding 1 rounds back.
    assert torch.equal(table.weight.grad[1].float(), torch.full((3,), 1000.0))
    assert table.weight.grad[[0, 2, 3]].abs().sum() == 0


class Block(nn.Module):
    """Two products and a residual sum, as large as asked."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(8))
            self.second.weight.copy_(torch.eye(8) * size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.first(x)
        return self.second(inner + x)


@pytest.mark.parametrize(
    ("start", "size"), [(40_000.0, 1.0), (300.0, 300.0)], ids=["overflowing residual sum", "overflowing product"]
)
def test_emulated_float16_overflows_where_native_float16_does(start: float, size: float) -> None:
    x = torch.full((2, 8), start)
    native = Block(size).half()(x.half())
    emulated = Block(size)
    storage.attach(emulated, compute_named("emulated-float16"), set())
    assert not native.isfinite().any()
    assert torch.equal(emulated(x).isfinite(), native.isfinite())
    assert not Block(size)(x).isinf().any(), "float32 must not overflow, or the test shows nothing"


def test_emulated_float16_gradient_overflows_where_native_does() -> None:
    x = torch.full((2, 8), 0.5)
    native, emulated = Block(200.0).half(), Block(200.0)
    storage.attach(emulated, compute_named("emulated-float16"), set())
    seed = torch.full((2, 8), 1000.0)
    native(x.half()).backward(seed.half())
    emulated(x).backward(seed)
    assert native.first.weight.grad.isinf().any()
    assert torch.equal(emulated.first.weight.grad.isinf(), native.first.weight.grad.isinf())


def test_emulated_bfloat16_is_close_to_native_bfloat16() -> None:
    torch.manual_seed(1)
    x = torch.randn(16, 8)
    block, emulated = Block(1.5), Block(1.5)
    native = block.bfloat16()(x.bfloat16()).float()
    storage.attach(emulated, compute_named("emulated-bfloat16"), set())
    assert torch.allclose(emulated(x), native, rtol=2**-7)


def test_detach_restores_the_module() -> None:
    block = Block(2.0)
    x = torch.randn(3, 8)
    before = block(x)
    detach = storage.attach(block, compute_named("emulated-bfloat16"), set())
    assert not torch.equal(block(x), before)
    detach()
    assert torch.equal(block(x), before)


def test_a_scale_that_loading_rounded_is_made_exact_again() -> None:
    class Scaled(torch.nn.Embedding):  # as Gemma's
        def __init__(self) -> None:
            super().__init__(4, 32)
            self.scalar_embed_scale = 32**0.5
            self.register_buffer("embed_scale", torch.tensor(32**0.5, dtype=torch.bfloat16), persistent=False)

    model = torch.nn.Sequential(Scaled())
    storage.narrow_storage(model, torch.bfloat16, set())
    assert model[0].embed_scale.item() == pytest.approx(32**0.5, rel=1e-7)


def test_threads_that_score_at_once_do_not_share_a_widened_weight() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(400, 400, bias=False)) for _ in range(2)]
    for model in models:
        storage.narrow_storage(model, torch.float16, set())
        storage.attach(model.eval(), compute_named("float32"), set())
    x = torch.randn(8, 400)
    with torch.no_grad():
        alone = [model(x) for model in models]

    def unlike(number: int) -> int:
        with torch.no_grad():
            return sum(not torch.equal(models[number](x), alone[number]) for _ in range(400))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(unlike, [0, 1])) == [0, 0]
