"""Which modules have to compute in float32 so that a model stays within a narrow format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfrank.diagnosis.ranges import Range, headroom_bits, measure
from halfrank.diagnosis.recorder import Event, record
from halfrank.model.checkpointing import repeated_layers
from halfrank.model.scorer import Scorer
from halfrank.model.storage import within

MARGIN_BITS = 1.0  # a module that uses more than half of the range on the pairs seen becomes an island
ROUNDS = 12


@dataclass(frozen=True)
class Widening:
    """Modules to widen, and whether everything was finite with them."""

    islands: tuple[str, ...]
    finite: bool


def find_islands(scorer: Scorer, run: Callable[[], Tensor], *, margin_bits: float = MARGIN_BITS) -> Widening:
    """The islands that make the scores of `run` finite in the scorer's compute format; nothing is changed.

    Ranges measured in float32 name most of them at once; what they cannot see, such as attention scores, is found by
    replaying in the narrow format until nothing overflows any more.
    """
    narrow = scorer.active_compute.narrow
    if narrow is None:
        return Widening((), finite=False)
    with scorer.computing_in("float32"):
        ranges = measure(scorer.model, run)
    before = scorer.islands
    found = beyond(ranges, narrow, margin_bits)
    try:
        for _ in range(ROUNDS):
            scorer.widen(found)
            recorded = record(scorer.model, run)
            if recorded.scores is not None and bool(recorded.scores.isfinite().all()):
                return Widening(_added(scorer.islands, before), finite=True)
            if recorded.event is not None:
                more = modules_of(recorded.event, recorded.order)
            else:  # a class that multiplies a wide tensor with a narrow one: both have to be wide
                more = [name.rpartition(".")[0] for name in _added(scorer.islands, before)]
            found = [name for name in more if name and name not in scorer.islands]
            if not found:
                break
        return Widening(_added(scorer.islands, before), finite=False)
    finally:
        scorer.set_islands(before)


def beyond(ranges: Mapping[str, Range], narrow: torch.dtype, margin_bits: float) -> list[str]:
    """Leaves that read or write more than the format holds, less a margin; with a reader also who wrote just before.

    A sum or product between two leaves takes the wider format of its two sides, so widening the leaf before it is
    enough for it to be computed wide.
    """
    order = list(ranges)
    found: list[str] = []
    for index, name in enumerate(order):
        if headroom_bits(ranges[name].written, narrow) < margin_bits:
            found.append(name)
        if headroom_bits(ranges[name].read, narrow) < margin_bits:
            found += [order[max(index - 1, 0)], name]
    return list(dict.fromkeys(found))


def ahead_of(model: nn.Module, islands: Collection[str]) -> tuple[str, ...]:
    """Embeddings and the layers that run before the residual stream leaves the format's range for good; else nothing.

    There the stream is still small, and small differences decide how far it goes: of 1,000 pairs of gemma-3-270m in
    float16 five differ from float32 by 0.0126 to 0.0227 with islands alone, by at most 0.0009 with these seven of its
    eighteen layers as well, and as before with all the layers after them (docs/log.md).
    """
    body: nn.Module = model.base_model  # type: ignore[assignment]
    names = {module: name for name, module in model.named_modules()}
    layers = [names[layer] for layer in repeated_layers(body)]
    wide = [any(within(island, [layer]) for island in islands) for layer in layers]
    first = wide.index(True) if True in wide else 0
    if first == 0 or len(layers) - first < 2 or not all(wide[first:]):  # one product, and not the stream
        return ()
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return (*tables, *layers[:first])


def modules_of(event: Event, order: Sequence[str]) -> list[str]:
    """The modules that an event in the forward pass asks to be widened."""
    if event.consumer is not None:
        before = order[max(order.index(event.consumer) - 1, 0)] if event.consumer in order else event.consumer
        return list(dict.fromkeys([before, event.consumer, *([event.module] if event.module else [])]))
    return [event.module] if event.module else []


def _added(islands: Sequence[str], before: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in islands if name not in before)
