"""Each module's numbers on a few pairs, forward and backward, measured in float32: what a narrow format would lose.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfrank.data.packing import by_budget, pack
from halfrank.diagnosis.ranges import headroom_bits, magnitude
from halfrank.model.scorer import Scorer
from halfrank.model.storage import leaves

# Below half the smallest number that a format tells from 0, rounding to nearest gives 0.
ZERO_BELOW = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
EXPONENTS = 96  # gradients are counted by their exponent from 2^-80 on
LOWEST = -80
SAMPLE = 1 << 15  # values of a tensor that are counted: a share needs no more
MAX_TOKENS = 2048  # of one forward and backward pass: the largest activations stay small
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Numbers:
    """The magnitudes of one kind of tensor of one module: the largest of all, and a sample's count by exponent."""

    largest: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(EXPONENTS, dtype=torch.int64))
    total: int = 0  # values that are not 0

    def see(self, tensor: Tensor) -> None:
        """Take note of all values' size, and count a sample of them."""
        self.reach(tensor)
        flat = tensor.detach().reshape(-1)
        sizes = flat[:: max(flat.numel() // SAMPLE, 1)].float().abs()
        sizes = sizes[(sizes > 0) & sizes.isfinite()]
        self.total += sizes.numel()
        place = (torch.frexp(sizes).exponent - LOWEST).clamp_(0, EXPONENTS - 1)
        self.counts += torch.bincount(place, minlength=EXPONENTS)

    def reach(self, tensor: Tensor) -> None:
        """Take note of all values' size only."""
        self.largest = max(self.largest, magnitude(tensor))

    def headroom(self, dtype: torch.dtype, scale: float = 1.0) -> float:
        """Bits up to the largest number of `dtype` when every value is multiplied by `scale`."""
        return headroom_bits(self.largest * scale, dtype)

    def underflow(self, dtype: torch.dtype, scale: float = 1.0) -> float:
        """Share of the values that are not 0 and would be in `dtype`, multiplied by `scale`; to the power of two."""
        limit = math.log2(ZERO_BELOW[dtype] / scale) - LOWEST
        below = int(self.counts[: max(math.floor(limit) + 1, 0)].sum())
        return below / self.total if self.total else 0.0


@dataclass
class Module:
    """What one leaf module read, wrote, and got back."""

    name: str
    kind: str
    read: Numbers = field(default_factory=Numbers)
    written: Numbers = field(default_factory=Numbers)
    gradient: Numbers = field(default_factory=Numbers)  # of what it wrote and of its weights, without loss scale

    @property
    def largest(self) -> float:
        """The largest magnitude of the forward pass."""
        return max(self.read.largest, self.written.largest)

    def headroom(self, dtype: torch.dtype) -> float:
        """Bits left in the forward pass; below 0 it overflows."""
        return headroom_bits(self.largest, dtype)

    @property
    def layer(self) -> int | None:
        """The number of its layer; None outside the layers."""
        found = re.search(r"\.(\d+)\.", f".{self.name}.")
        return int(found[1]) if found else None

    @property
    def role(self) -> str:
        """Its name within its layer, or its whole name."""
        return (
            re.sub(r"^.*?\.?\d+\.", "", f"{self.name}.", count=1).rstrip(".") if self.layer is not None else self.name
        )


def measure(
    scorer: Scorer, texts: Sequence[tuple[str, str]], labels: Tensor, loss: LossFunction | None
) -> tuple[dict[str, Module], Tensor, float | None]:
    """Modules by name in the order in which they ran, float32 logits (P, L), and the mean loss.

    With a `loss` (scores, labels, groups -> scalar) gradients flow too and stay in the parameters' `.grad`; dropout is
    off. Every pair is a group of its own.
    """
    tokens = scorer.pairs.encode(texts)
    found: dict[str, Module] = {}
    logits_PL = torch.zeros(len(texts), scorer.num_labels)
    total = 0.0
    training = scorer.model.training
    scorer.model.eval()
    scorer.model.zero_grad(set_to_none=True)
    handles = [handle for name, module in leaves(scorer.model) for handle in _watched(name, module, found)]
    try:
        with scorer.computing_in("float32"), torch.set_grad_enabled(loss is not None):
            for rows in by_budget(tokens.lengths, MAX_TOKENS):
                batch = pack(tokens, rows)
                scores = scorer.logits(batch)
                logits_PL[batch.rows] = scores.detach().cpu()
                if loss is not None:
                    part = loss(scores, labels[batch.rows].to(scores.device), torch.arange(len(batch.rows)))
                    part = part * (len(batch.rows) / len(texts))
                    part.backward()
                    total += float(part.detach())
    finally:
        for handle in handles:
            handle.remove()
        scorer.model.train(training)
    if loss is not None:
        _see_weights(scorer.model, found)
    return found, logits_PL, total if loss is not None else None


def _watched(name: str, module: nn.Module, found: dict[str, Module]) -> list[Any]:
    def read(_: nn.Module, args: tuple[Any, ...]) -> None:
        entry = found.setdefault(name, Module(name, type(module).__name__))
        for value in args:
            if isinstance(value, Tensor) and value.is_floating_point():
                entry.read.reach(value)

    def written(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point():
                found[name].written.see(value)
                if value.requires_grad:
                    value.register_hook(found[name].gradient.see)

    return [module.register_forward_pre_hook(read, prepend=True), module.register_forward_hook(written)]


def _see_weights(model: nn.Module, found: dict[str, Module]) -> None:
    for name, module in leaves(model):
        for parameter in module.parameters(recurse=False):
            if parameter.grad is not None and name in found:
                found[name].gradient.see(parameter.grad)
