"""Loaders of labelled examples to checked pairs and batches: whatever other people's scripts hand to `fit`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfrank.data.pairs import Pair, check_text, place
from halfrank.errors import DataError
from halfrank.losses import LOSSES, default_loss

DEFAULT_BATCH = 16  # pairs, where the loader does not say


@dataclass(frozen=True)
class Material:
    """Checked pairs, and for each epoch its batches as indices of pairs."""

    pairs: list[Pair]
    epochs: list[list[list[int]]]


def read_loader(loader: Iterable[Any], epochs: int) -> Material:
    """Every epoch's batches as the loader would give them, without its collate function; raises DataError."""
    examples: list[Any] = []
    known: dict[int, int] = {}
    plans: list[list[list[int]]] = []
    once = isinstance(loader, Iterator)  # exhausted after one epoch: its batches are repeated
    for _ in range(1 if once else epochs):
        plans.append([[_remember(example, examples, known) for example in batch] for batch in _batches(loader)])
    pairs = [_labelled_pair(example, number) for number, example in enumerate(examples)]
    if not pairs:
        raise DataError("train_dataloader gave no examples: there is nothing to train on.")
    return Material(pairs, plans * epochs if once else plans)


def check_labels(pairs: Sequence[Pair], num_labels: int, default: bool) -> None:
    """Raise DataError for labels that the loss cannot use: classes out of range, probabilities outside [0, 1]."""
    if default or num_labels > 1:
        labels = torch.tensor([float(pair.label or 0.0) for pair in pairs])
        LOSSES[default_loss(num_labels, grouped=False)].check_labels(
            labels, num_labels, lambda row: place(pairs[row].source, row)
        )


def _batches(loader: Any) -> Iterator[list[Any]]:
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return _grouped(_without_collate(loader), getattr(loader, "batch_size", None), drop_last=False)
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, torch.utils.data.IterableDataset):
        return _grouped(dataset, loader.batch_size, drop_last=getattr(loader, "drop_last", False))
    if loader.batch_sampler is not None:
        return ([dataset[index] for index in indices] for indices in loader.batch_sampler)
    return _grouped((dataset[index] for index in loader.sampler), None, drop_last=False)


def _without_collate(loader: Any) -> Iterator[Any]:
    """Iterate a loader that is not torch's; one with a `collate_fn` would turn the examples into tensors."""
    if not hasattr(loader, "collate_fn"):
        yield from loader
        return
    before, loader.collate_fn = loader.collate_fn, _as_it_is
    try:
        yield from loader
    finally:
        loader.collate_fn = before


def _as_it_is(batch: Any) -> Any:
    return batch


def _grouped(items: Iterable[Any], size: int | None, *, drop_last: bool) -> Iterator[list[Any]]:
    """Items that are batches as they are, single examples in batches of `size`."""
    held: list[Any] = []
    for item in items:
        if isinstance(item, (list, tuple)):
            yield list(item)
            continue
        held.append(item)
        if len(held) == (size or DEFAULT_BATCH):
            yield held
            held = []
    if held and not drop_last:
        yield held


def _remember(example: Any, examples: list[Any], known: dict[int, int]) -> int:
    # By identity: `examples` keeps every object alive, so no id is used twice.
    if id(example) not in known:
        known[id(example)] = len(examples)
        examples.append(example)
    return known[id(example)]


def _labelled_pair(example: Any, number: int) -> Pair:
    source = f"training example {number} (counted from 0)"
    if not hasattr(example, "texts") or not hasattr(example, "label"):
        raise DataError(f"{source} must have .texts and .label, as an InputExample has; got {type(example).__name__}.")
    texts, label = example.texts, example.label
    if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) != 2:
        raise DataError(f"{source} must have two texts; got {texts!r:.60}.")
    query, document = (check_text(text, source) for text in texts)
    return Pair(query, document, _number(label, source), source)


def _number(label: Any, source: str) -> float:
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    if isinstance(label, str) or not hasattr(label, "__float__"):
        raise DataError(f"{source}: the label must be a number; got {type(label).__name__} {label!r:.60}.")
    if not math.isfinite(float(label)):
        raise DataError(f"{source}: the label is {float(label)}. Remove the example or give it a finite label.")
    return float(label)
