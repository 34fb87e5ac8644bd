"""Is every weight of a copy the reference's, rounded to the copy's format? Distances in units of the last place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfrank.numerics.formats import dtype_name

MANTISSA = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126}  # normal numbers
ENOUGH = 16  # values: fewer may lie on a coarser grid by chance


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the reference's: how many values, the largest distance, what it looks like and its cause."""

    name: str
    values: int
    ulps: float
    cause: str = "weights-differ"
    looks: str = ""

    def __str__(self) -> str:
        return f"'{self.name}' has {self.values} values up to {self.ulps:.3g} units of the last place away{self.looks}"


def missing(reference: Mapping[str, Tensor], copy: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one of the two has, or that have another shape."""
    return sorted(
        name
        for name in reference.keys() | copy.keys()
        if name not in reference or name not in copy or reference[name].shape != copy[name].shape
    )


def differences(
    pairs: Iterable[tuple[str, Tensor, Tensor]], dtype: torch.dtype, *, allowed_ulps: float
) -> Iterator[Difference]:
    """The tensors, given as (name, reference, copy), that are further than `allowed_ulps` of `dtype` apart."""
    for name, reference, copy in pairs:
        if not copy.is_floating_point():
            changed = int((reference != copy).sum())
            if changed:
                yield Difference(name, changed, float("inf"))
            continue
        wanted, found = reference.detach().float().cpu(), copy.detach().float().cpu()
        if torch.equal(wanted.to(dtype).float(), found):
            continue  # the usual case, without float64 copies of every tensor
        ulps = ulps_apart(wanted, found, dtype)
        far = ulps > allowed_ulps
        if bool(far.any()):
            yield Difference(name, int(far.sum()), float(ulps.max()), *_looks(wanted, found, dtype))


def ulps_apart(reference: Tensor, copy: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of each value in units of the last place of `dtype` at the larger of the two; float64."""
    size = torch.maximum(reference.abs(), copy.abs()).double().clamp(min=SMALLEST[dtype])
    spacing = torch.exp2(torch.floor(torch.log2(size)) - MANTISSA[dtype])
    return (reference.double() - copy.double()).abs() / spacing


def mantissa_bits(values: Tensor) -> int:
    """The fewest mantissa bits that hold every one of the float32 `values`."""
    fields = (values.float().contiguous().view(torch.int32) & 0x7FFFFF).numpy()
    used = int(np.bitwise_or.reduce(fields, axis=None))
    return 0 if used == 0 else 24 - (used & -used).bit_length()


def _looks(wanted: Tensor, found: Tensor, dtype: torch.dtype) -> tuple[str, str]:
    """The cause of a difference, and what it looks like in words."""
    if wanted.ndim > 1 and len(wanted) > 1 and torch.equal(_sorted_rows(wanted, dtype), _sorted_rows(found, dtype)):
        return "row-order", ": its rows are the reference's in another order"
    if torch.equal(found, -wanted.to(dtype).float()):
        return "weights-differ", ": every sign is turned"
    if bool((found == 0).all()):
        return "weights-differ", ": it is all zeros"
    bits = mantissa_bits(found)
    near = bool(((found - wanted).abs() <= 2.0**-bits * wanted.abs() + SMALLEST[dtype]).all())
    if found.numel() >= ENOUGH and near and 0 < bits < mantissa_bits(wanted.to(dtype)) - 1:
        return "mantissa", f": it is rounded to {bits} mantissa bits, {dtype_name(dtype)} has {MANTISSA[dtype]}"
    return "weights-differ", ""


def _sorted_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    rows = matrix.to(dtype).float().flatten(1)
    return rows[torch.argsort(rows[:, 0], stable=True)]
