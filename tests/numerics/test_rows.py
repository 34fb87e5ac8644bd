"""Gradients that are rows of a table give the update of the dense gradients they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfrank.numerics import rows
from halfrank.numerics.adamw import AdamW

TABLE = (37, 24)


def gradients(seed: int, steps: int, share: float) -> list[torch.Tensor]:
    """Dense gradients of which each row is there in a share of the steps, one of them as zeros."""
    generator = torch.Generator().manual_seed(seed)
    dense = [torch.randn(TABLE, generator=generator) for _ in range(steps)]
    for gradient in dense:
        gradient[torch.rand(TABLE[0], generator=generator) >= share] = 0.0
    return dense


def as_rows(dense: torch.Tensor, *, doubled: bool = False) -> torch.Tensor:
    """The same gradient as rows; `doubled`: each token was seen twice, and one token has a gradient of 0."""
    ids = dense.any(1).nonzero()[:, 0]
    values = dense[ids]
    if doubled:
        silent = (~dense.any(1)).nonzero()[:1, 0]
        ids = torch.cat([ids, ids.flip(0), silent])
        values = torch.cat([values / 2, values.flip(0) / 2, torch.zeros(len(silent), TABLE[1])])
    return torch.sparse_coo_tensor(ids[None], values, dense.shape, check_invariants=True)


@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    part=st.sampled_from([1, TABLE[1] * 33, 10**6]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    divisor=st.sampled_from([1.0, 0.5, 8.0]),
    doubled=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rows_give_torchs_own_update_of_a_dense_gradient(
    seed: int, share: float, part: int, weight_decay: float, divisor: float, doubled: bool
) -> None:
    start = torch.randn(TABLE, generator=torch.Generator().manual_seed(seed))
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=weight_decay, fused=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PART", part)
        optimizer = AdamW([ours], lr=1e-2, weight_decay=weight_decay)
        for dense in gradients(seed, 4, share):
            theirs.grad, ours.grad = dense.clone(), as_rows(dense * divisor, doubled=doubled)
            reference.step()
            optimizer.step(grad_divisor=divisor)
            assert torch.equal(ours, theirs)
    for name, other in (("m", "exp_avg"), ("v", "exp_avg_sq")):
        assert torch.equal(optimizer.state[ours][name], reference.state[theirs][other])


@pytest.mark.parametrize("size", [300, 100, 25, 7, 1])
def test_parts_end_where_vectors_do(size: int) -> None:
    """Beside the first boundary, where a part's last elements would be rounded by another code of the kernel."""
    first = rows.PART // size
    shape = (2 * first, size)
    theirs, ours = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(shape))
    reference, optimizer = torch.optim.AdamW([theirs], fused=True), AdamW([ours])
    ids = torch.arange(first - 20, first + 20)
    for seed in range(12):
        values = torch.randn(len(ids), size, generator=torch.Generator().manual_seed(seed))
        theirs.grad = torch.zeros(shape).index_copy_(0, ids, values)
        ours.grad = torch.sparse_coo_tensor(ids[None], values, shape, check_invariants=True)
        reference.step()
        optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(optimizer.state[ours]["v"], reference.state[theirs]["exp_avg_sq"])


def test_a_table_without_columns_is_left() -> None:
    parameter = torch.nn.Parameter(torch.empty(5, 0))
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.empty(1, 0), (5, 0), check_invariants=True)
    AdamW([parameter]).step()


@pytest.mark.parametrize("name", ["m", "v"])
def test_a_write_to_one_moment_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PART", 16)
    ends = []
    for sparse in (False, True):
        parameter = torch.nn.Parameter(torch.ones(TABLE))
        optimizer = AdamW([parameter], lr=1e-2)
        for number in range(3):
            dense = torch.zeros(TABLE)
            dense[0] = 1.0
            parameter.grad = as_rows(dense) if sparse else dense
            if number == 1:
                optimizer.state[parameter][name][-1] = 0.5
            optimizer.step()
        ends.append([parameter.detach(), optimizer.state[parameter][name]])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_a_16_bit_table_are_made_dense(dtype: torch.dtype) -> None:
    start, ends = torch.randn(TABLE).to(dtype), []
    for sparse in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = AdamW([parameter], lr=1e-2)
        for dense in gradients(0, 3, 0.3):
            parameter.grad = as_rows(dense.to(dtype)) if sparse else dense.to(dtype)
            optimizer.step()
        ends.append([parameter.detach(), *(optimizer.state[parameter][name] for name in ("residual", "m", "v"))])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("how", ["load", "write", "dense"])
def test_moments_that_come_from_elsewhere_are_seen(how: str) -> None:
    """Rows that a loaded state, a write or a dense step has given moments go on moving."""
    first, second = gradients(1, 2, 0.9)[0], gradients(2, 1, 0.1)[0]
    start = torch.randn(TABLE)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    reference, optimizer = torch.optim.AdamW([theirs], fused=True), AdamW([ours])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PART", TABLE[1])
        for gradient in (torch.zeros(TABLE), first):
            theirs.grad = gradient.clone()
            reference.step()
        ours.grad = as_rows(torch.zeros(TABLE))
        optimizer.step()
        if how == "dense":
            ours.grad = first.clone()
            optimizer.step()
        else:
            other = AdamW([torch.nn.Parameter(ours.detach().clone())])
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            copied = other.param_groups[0]["params"][0]
            copied.grad = first.clone()
            other.step()
            ours.detach().copy_(copied)
            if how == "load":
                optimizer.load_state_dict(other.state_dict())
            else:
                for name in ("m", "v"):
                    optimizer.state[ours][name].copy_(other.state[copied][name])
                optimizer.state[ours]["step"] += 1
        theirs.grad, ours.grad = second.clone(), as_rows(second)
        reference.step()
        optimizer.step()
    assert torch.equal(ours, theirs)


def test_a_table_that_does_not_lie_in_one_row_takes_a_dense_gradient() -> None:
    start, ends = torch.randn(TABLE[::-1]), []
    for sparse in (False, True):
        parameter = torch.nn.Parameter(start.clone().t())
        optimizer = AdamW([parameter], lr=1e-2)
        for dense in gradients(3, 2, 0.4):
            parameter.grad = as_rows(dense) if sparse else dense.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)
