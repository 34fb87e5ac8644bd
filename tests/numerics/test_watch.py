"""What Watch counts, against the same counts by hand on tensors small enough that a sample is all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from halfrank.numerics import watch
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.watch import TOKENS, Watch


class Block(nn.Module):
    """A product, a norm and a head, with the largest number between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        return self.head(self.norm(self.first(hidden) + 1000.0 * hidden))


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_headroom_names_the_module_that_reads_or_writes_the_largest_number(narrow: torch.dtype) -> None:
    model, watch = Block(), Watch(every=2, narrow=narrow)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        hidden = model.table(ids)
        largest = float((model.first(hidden) + 1000.0 * hidden).abs().max())
    with watch.looking(model):
        model(ids)
    values = watch.next_step()
    assert values["headroom_module"] == "norm"
    assert values["headroom_bits"] == pytest.approx(math.log2(torch.finfo(narrow).max / largest))
    with watch.looking(model):  # the second step is not looked at
        model(ids)
    assert watch.next_step() == {}
    with watch.looking(model, {"norm"}), torch.no_grad():
        model.first.bias.add_(5e3)
        model(ids)
        product = float(model.first(hidden).abs().max())
    values = watch.next_step()
    assert values["headroom_module"] == "first"
    assert values["headroom_bits"] == pytest.approx(math.log2(torch.finfo(narrow).max / product))
    assert not any(module._forward_hooks for module in model.modules())
    assert watch.seconds > 0


def test_a_number_that_is_not_finite_leaves_no_headroom() -> None:
    model, watch = Block(), Watch(every=1)
    with torch.no_grad():
        model.first.bias[0] = math.nan
    with watch.looking(model):
        model(torch.arange(16)[None])
    values = watch.next_step()
    assert (values["headroom_bits"], values["headroom_module"]) == (-math.inf, "first")


def test_long_rows_are_looked_at_in_turn() -> None:
    model, watch = nn.Sequential(nn.Linear(4, 4, bias=False)), Watch(every=1)
    rows = torch.zeros(3 * TOKENS - 10, 4)
    rows[-1, 0] = 7.0
    seen = []
    for _ in range(3):
        with watch.looking(model):
            model(rows)
        seen.append(watch.next_step()["headroom_bits"])
    assert seen[:2] == [math.inf, math.inf]
    assert seen[2] == pytest.approx(math.log2(65504 / 7.0), abs=1.0)


def test_underflow_counts_zeros_only_in_rows_that_have_a_gradient() -> None:
    watch = Watch(every=1)
    embedding = torch.zeros(10, 4, dtype=torch.float16)
    embedding[3] = torch.tensor([1.0, 0.0, 2.0, -3.0])
    matrix = torch.tensor([[0.5, 0.0], [0.25, 1.0]])
    watch.gradients([embedding, matrix, torch.zeros(5)])
    values = watch.next_step()
    assert values["underflow_share"] == pytest.approx(2 / 8)
    assert values["gradient_headroom_bits"] == pytest.approx(math.log2(65504 / 3))
    matrix[0, 0] = math.inf
    watch.gradients([embedding, matrix])
    assert watch.next_step()["gradient_non_finite"] == pytest.approx(1 / 44)


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float16, 1e-7), (torch.bfloat16, 1e-6), (torch.float32, 1e-9)])
def test_updates_that_change_nothing_or_the_residual_only_are_told_apart(dtype: torch.dtype, lr: float) -> None:
    weight = nn.Parameter(torch.linspace(0.5, 4.0, 64).view(8, 8).to(dtype))
    optimizer, watch = AdamW([weight], lr=lr, backend="torch"), Watch(every=1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()  # makes the residual
    before, held = weight.detach().clone(), optimizer.state[weight].get("residual")
    kept = None if held is None else held.clone()
    watch.before_update(optimizer)
    optimizer.step()
    watch.after_update()
    values = watch.next_step()
    unmoved = weight.detach() == before
    still = unmoved if held is None or kept is None else unmoved & (held.view(8, 8) == kept.view(8, 8))
    assert values["updates_lost"] == pytest.approx(float(still.float().mean()))
    assert values["weights_in_residual_only"] == pytest.approx(float((unmoved & ~still).float().mean()))
    assert 0.1 < values["updates_lost"] <= 1.0
    assert values["clamped_weights"] == 0


def test_clamped_weights_stand_at_the_largest_number() -> None:
    weight = nn.Parameter(torch.tensor([[65504.0, 1.0], [-65504.0, 2.0]], dtype=torch.float16))
    optimizer, watch = torch.optim.SGD([weight], lr=1e-9), Watch(every=1)
    weight.grad = torch.ones_like(weight)
    watch.before_update(optimizer)
    optimizer.step()
    watch.after_update()
    values = watch.next_step()
    assert (values["clamped_weights"], values["updates_lost"]) == (2, 1.0)


def test_rows_are_sampled_as_the_dense_gradient_they_stand_for() -> None:
    for shape, seen in (((5000, 24), [0, 3, 7, 4998]), ((20, 8), [2, 19]), ((5000, 24), [])):
        dense = torch.zeros(shape)
        dense[seen] = torch.randn(len(seen), shape[1])
        if seen:
            dense[seen[0], 1] = 0.0
        step = max(shape[0] // max(watch.SAMPLE // shape[1], 1), 1)
        dense[step] = 1.0  # one that is looked at
        ids = dense.any(1).nonzero()
        rows = torch.sparse_coo_tensor(ids.t(), dense[ids[:, 0]], shape, check_invariants=True)
        assert torch.equal(watch.sample(rows), watch.sample(dense))
        assert bool(watch.sample(rows).any())
