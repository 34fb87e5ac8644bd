"""What is worth watching in a run, counted from outside the model: headroom, underflow, updates lost, clamped weights.

Everything is counted on samples of whole rows, so that it costs little even in every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfrank.numerics.formats import NARROW_DTYPES

SAMPLE = 2048  # elements of a weight or gradient that the counts look at: a share needs no more
TOKENS = 128  # rows of an activation that are looked at, other ones in each step


class Watch:
    """Counters of one run, passed as a plain argument; looks at every `every`-th step only, with 0 at none.

    `narrow` is the 16-bit format that headroom is counted in. `seconds` is the processor time spent in here.
    """

    def __init__(self, *, every: int = 10, narrow: torch.dtype = torch.float16) -> None:
        self.every = every
        self.narrow = narrow
        self.seconds = 0.0
        self._step = 0
        self._values: dict[str, Any] = {}
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._last: Tensor | None = None
        self._before: list[tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]] = []

    @property
    def due(self) -> bool:
        """Whether this step is looked at."""
        return self.every > 0 and self._step % self.every == 0

    @contextmanager
    def looking(self, model: nn.Module, wide: Collection[str] = ()) -> Iterator[None]:
        """W1: while it lasts, note the largest numbers that products and norms read and write.

        `wide` names the modules, with all that is in them, that compute in float32 and need no headroom.
        """
        if not self.due:
            yield
            return
        with self._timed():
            self._seen = []
            handles = [
                module.register_forward_hook(self._noting(name))
                for name, module in model.named_modules()
                if _computes(module) and not any(name == root or name.startswith(f"{root}.") for root in wide)
            ]
        try:
            yield
        finally:
            with self._timed():
                for handle in handles:
                    handle.remove()
                self._last = None
                self._worst()

    def scores(self, logits: Tensor) -> None:
        """W1: share of finite scores, and the bits between the largest score and the format's largest number."""
        if self.due:
            with self._timed():
                finite = logits.detach().isfinite()
                self._values["finite_scores"] = float(finite.float().mean())
                self._values["score_headroom_bits"] = self._headroom(logits.detach()[finite])

    def gradients(self, gradients: Iterable[Tensor]) -> None:
        """W2: headroom of the scaled gradients of matrices, and the share of zeros among rows that have any gradient.

        A row without any, such as the embedding of a token that the batch does not hold, has not underflowed.
        """
        if not self.due:
            return
        with self._timed():
            zeros = alive = broken = counted = 0
            largest = 0.0
            for gradient in gradients:
                if gradient.ndim < 2:
                    continue
                rows = sample(gradient)
                there = rows != 0
                used = int(there.any(dim=1).sum()) * rows.shape[1]
                zeros, alive = zeros + used - int(there.sum()), alive + used
                low, high = (float(bound) for bound in torch.aminmax(rows))
                size = max(-low, high)
                if not math.isfinite(size):
                    broken += int((~rows.isfinite()).sum())
                else:
                    largest = max(largest, size)
                counted += rows.numel()
            if counted:
                self._values["gradient_non_finite"] = broken / counted
                self._values["gradient_headroom_bits"] = self._bits(largest)
                self._values["underflow_share"] = zeros / max(alive, 1)

    def before_update(self, optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor] | None = None) -> None:
        """W3: remember samples of the matrices that are about to change, and of what is kept beside them.

        `gradients` are samples of gradients that are not there any more, by parameter.
        """
        self._before = []
        if not self.due:
            return
        with self._timed():
            for group in optimizer.param_groups:
                for parameter in group["params"] if float(group["lr"]) > 0 else ():
                    gradient = parameter.grad if gradients is None else gradients.get(parameter)
                    if gradient is not None and parameter.ndim > 1:
                        held = optimizer.state.get(parameter, {}).get("residual")
                        kept = None if held is None else sample(held.view_as(parameter)).clone()
                        there = (gradient if gradients is not None else sample(gradient)) != 0
                        self._before.append((parameter, held, sample(parameter).clone(), kept, there))

    def after_update(self) -> None:
        """W3: of the sampled weights with a gradient, the shares of which nothing changed, or the residual only.

        Rounding a residual is unbiased: what stays as it is in one step is not lost on average. Without residuals it
        is. Clamped weights stand at the format's largest number.
        """
        if not self._before:
            return
        with self._timed():
            lost = inside = clamped = counted = 0
            for parameter, held, weight, kept, there in self._before:
                now = sample(parameter)
                unmoved = (now == weight) & there
                both = held is not None and kept is not None
                still = unmoved & (sample(held.view_as(parameter)) == kept) if both else unmoved  # type: ignore[union-attr]
                inside += int(unmoved.sum())
                lost += int(still.sum())
                counted += int(there.sum())
                if parameter.dtype in NARROW_DTYPES:
                    clamped += int((now.abs() >= torch.finfo(parameter.dtype).max).sum())
            if counted:
                self._values["updates_lost"] = lost / counted
                self._values["weights_in_residual_only"] = (inside - lost) / counted
                self._values["clamped_weights"] = clamped
        self._before = []

    def next_step(self) -> dict[str, Any]:
        """The numbers of this step, empty where it was not looked at; then move on."""
        values, self._values = self._values, {}
        self._step += 1
        return values

    def _noting(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            with self._timed():
                for value in (*args[:1], output):
                    # The products of one layer read the same tensor: once is enough.
                    if isinstance(value, Tensor) and value is not self._last and value.is_floating_point():
                        low, high = torch.aminmax(self._some_rows(value.detach()))
                        self._seen.append((name, low, high))
                        self._last = value

        return note

    def _some_rows(self, values: Tensor) -> Tensor:
        rows = values.reshape(-1, values.shape[-1])
        places = max(-(-len(rows) // TOKENS), 1)
        start = min((self._step // self.every) % places * TOKENS, max(len(rows) - TOKENS, 0))
        return rows[start : start + TOKENS]

    def _worst(self) -> None:
        if not self._seen:
            return
        names, lows, highs = zip(*self._seen, strict=True)
        sizes = torch.maximum(-torch.stack(lows).float(), torch.stack(highs).float())
        sizes = sizes.nan_to_num(nan=math.inf, posinf=math.inf)
        worst = int(sizes.argmax())
        bits = self._bits(float(sizes[worst]))
        if bits <= self._values.get("headroom_bits", math.inf):
            self._values["headroom_bits"], self._values["headroom_module"] = bits, names[worst]
        self._seen = []

    def _headroom(self, values: Tensor) -> float:
        return self._bits(float(values.abs().max()) if values.numel() else 0.0)

    def _bits(self, largest: float) -> float:
        if largest == 0 or not math.isfinite(largest):
            return math.inf if largest == 0 else -math.inf
        return math.log2(torch.finfo(self.narrow).max / largest)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds += time.process_time() - started


def _computes(module: nn.Module) -> bool:
    """Whether a module is a leaf with weights of its own and reads floating numbers: a product or a norm."""
    own = next(module.parameters(recurse=False), None)
    return own is not None and next(module.children(), None) is None and not isinstance(module, nn.Embedding)


def sample(tensor: Tensor) -> Tensor:
    """Whole rows, evenly spread, of about `SAMPLE` elements together; of a sparse tensor those of the dense one."""
    count = max(SAMPLE // max(tensor.shape[-1], 1), 1)
    if not tensor.is_sparse:
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        return rows[:: max(len(rows) // count, 1)][:count]
    given = tensor.detach().coalesce()
    ids, values = given.indices()[0], given.values()
    wanted = torch.arange(0, len(tensor), max(len(tensor) // count, 1), device=ids.device)[:count]
    found = torch.isin(wanted, ids)
    rows = values.new_zeros(len(wanted), values.shape[1])
    rows[found] = values[torch.searchsorted(ids, wanted[found])]
    return rows
