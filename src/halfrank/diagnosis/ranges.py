"""How large the numbers of each leaf module are, measured in float32: what a narrow format would have to hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfrank.model.storage import leaves


@dataclass
class Range:
    """The largest magnitudes that a leaf module reads and writes; infinite where they are not finite."""

    read: float = 0.0
    written: float = 0.0

    @property
    def largest(self) -> float:
        return max(self.read, self.written)


def measure(model: nn.Module, run: Callable[[], object]) -> dict[str, Range]:
    """Ranges of the leaf modules of `model` during `run`, in the order in which they ran."""
    found: dict[str, Range] = {}

    def reading(name: str) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            entry = found.setdefault(name, Range())
            entry.read = max([entry.read, *(magnitude(value) for value in args)])

        return read

    def writing(name: str) -> Callable[..., None]:
        def write(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            found[name].written = max([found[name].written, *(magnitude(value) for value in outputs)])

        return write

    handles: list[Any] = []
    for name, module in leaves(model):
        handles.append(module.register_forward_pre_hook(reading(name), prepend=True))
        handles.append(module.register_forward_hook(writing(name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def magnitude(value: Any) -> float:
    """Largest magnitude of a floating tensor; infinite where one is not finite, 0 for anything else."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return 0.0
    low, high = torch.aminmax(value.detach())
    size = max(-float(low), float(high))
    return size if math.isfinite(size) and math.isfinite(float(low)) else math.inf


def headroom_bits(largest: float, dtype: torch.dtype) -> float:
    """Bits between `largest` and the largest number of `dtype`; negative beyond it, infinite for 0."""
    if largest == 0:
        return math.inf
    return -math.inf if math.isinf(largest) else math.log2(torch.finfo(dtype).max / largest)
