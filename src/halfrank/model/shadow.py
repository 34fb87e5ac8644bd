"""A model without memory: its forward and backward pass run on shapes alone, and every byte they would hold is counted.

Nothing is estimated from a table of families: the class's own code runs, on tensors that have no elements.
Shapes: T tokens of a row, P pairs, M tokens of the longest pair.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from halfrank.data.packing import Batch
from halfrank.errors import ModelError
from halfrank.model import attention, storage
from halfrank.model.adapters import is_adapter
from halfrank.model.checkpointing import recompute
from halfrank.model.families import Layout, accept_rows, head_modules, layouts, row_of, without_cache
from halfrank.precision import Compute


@dataclass(frozen=True)
class Sizes:
    """Elements of a model: those of matrices that rest in 16 bits, of everything else, and of its largest parts."""

    narrow: int  # plain Linear and Embedding weights outside the head
    wide: int
    head: int  # part of `wide`: all that is trained beside adapters
    embeddings: int  # part of `narrow`: gradients of these may be rows
    width: int  # of an embedding row
    largest: int  # the largest Linear weight
    largest_embedding: int
    sides: int  # inputs and outputs of all these Linear modules: what one rank of adapters has

    @property
    def parameters(self) -> int:
        """All elements."""
        return self.narrow + self.wide


@dataclass(frozen=True)
class Traced:
    """Bytes that one micro-batch holds beside weights and optimizer: after the forward pass, at most, and at the end.

    Gradients of embeddings are not part of it.
    """

    forward: int
    peak: int
    end: int


def empty_model(config: Any) -> PreTrainedModel:
    """The sequence-classification model of `config` with shapes and no elements."""
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"transformers has no sequence-classification class for {config.model_type!r}, so its memory cannot be "
            "planned from its config."
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except (RuntimeError, ValueError, KeyError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The config describes a {config.model_type} that cannot be built: {reason}.") from error
    return model


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Count the elements of a model by what they may rest in; adapters are counted by `Way.lora_rank`, not here."""
    head = head_modules(model)
    narrow: dict[int, Tensor] = {}
    tables: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding) and not (storage.within(name, head) or is_adapter(name)):
            weight: Tensor = module.weight
            narrow[id(weight)] = weight
            if isinstance(module, nn.Embedding):
                tables[id(weight)] = weight
    products = [weight for key, weight in narrow.items() if key not in tables]
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if not is_adapter(name))
    held = sum(weight.numel() for weight in narrow.values())
    scoring = sum(p.numel() for name, p in model.named_parameters() if storage.within(name.rpartition(".")[0], head))
    biggest = max(tables.values(), key=Tensor.numel, default=None)
    return Sizes(
        held, total - held, scoring, sum(weight.numel() for weight in tables.values()),
        0 if biggest is None else biggest.shape[-1], max((weight.numel() for weight in products), default=0),
        0 if biggest is None else biggest.numel(), sum(sum(weight.shape) for weight in products),
    )  # fmt: skip


def trace(
    config: Any,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    compute: Compute,
    checkpointing: bool = False,
    released: bool = False,
    frozen: bool = False,
    layout: Layout | None = None,
) -> Traced:
    """Train one micro-batch of pairs of `lengths` tokens on shapes alone.

    `released`: gradients are dropped as they arrive, in two backward passes over one forward pass. `frozen`: no matrix
    of the body has a gradient. Raises what a class raises that looks at values.
    """
    model = empty_model(config)
    layout = layout or next(iter(layouts(model)), None)
    storage.narrow_storage(model, dtype, head_modules(model))
    if layout is not None:
        attention.register()
        model.set_attn_implementation(attention.NAME)
        accept_rows(model)
    with FakeTensorMode(), storage.other_buffers():
        _give_shapes(model, frozen)
        storage.attach(model, compute, head_modules(model))
        if checkpointing:
            recompute(model.base_model)
        model.train()
        if released:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop)
        with _Live(model) as live:
            loss = _logits(model, layout, lengths).float().sum()
            forward = live.now
            if released:
                loss.backward(retain_graph=True)
            loss.backward()
            return Traced(forward, live.peak, live.now)


def _logits(model: PreTrainedModel, layout: Layout | None, lengths: Sequence[int]) -> Tensor:
    ordered = sorted(lengths, reverse=True)
    if layout is None:
        ids_PM = torch.zeros(len(ordered), ordered[0], dtype=torch.long)
        return model(input_ids=ids_PM, attention_mask=torch.ones_like(ids_PM), **without_cache(model)).logits
    ids_T = torch.zeros(sum(ordered), dtype=torch.long)
    batch = Batch(ids_T, ids_T, ordered, list(range(len(ordered))))
    row, head = row_of(batch, model, layout, attention.runs_of(ordered))
    return model(**head, packed_row=row).logits


def _give_shapes(model: PreTrainedModel, frozen: bool) -> None:
    """Replace meta tensors by ones that are dispatched as the processor's are."""
    made: dict[int, nn.Parameter] = {}
    head = head_modules(model)
    for name, module in model.named_modules():
        # Which rows of a table have gradients depends on values: its gradient is counted apart.
        stays = isinstance(module, nn.Embedding) or (
            frozen and isinstance(module, nn.Linear) and not storage.within(name, head)
        )
        for key, parameter in module._parameters.items():
            if parameter is not None:
                shaped = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[key] = made.setdefault(id(parameter), nn.Parameter(shaped, requires_grad=not stays))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of storages made while it is active, and takes away what is freed again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        there = [*model.parameters(), *model.buffers()]
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in there)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, held: Any) -> None:
        if held in self._seen:
            return
        self._seen.add(held)
        size = held.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size
