"""How a packed row goes through a model class's own forward pass, and what differs between model families.

The body reads all pairs as one row; its hidden states are then laid out per pair, so that the class's own head reads
them as it always does: nothing is listed by name, and what does not fit is found by the scorer's proof.
Shapes: T tokens of a row, P pairs, M tokens of the longest pair, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfrank.data.branches import Branches
from halfrank.data.packing import Batch
from halfrank.model.attention import Runs
from halfrank.model.last_layer import accept_kept, last_layer
from halfrank.model.modular import Model

Pooled = Literal["first", "last", "all"]
AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
    "xmod",
)


@dataclass(frozen=True)
class Layout:
    """What the proof finds out about a class: the position of a pair's first token, and the tokens its head reads."""

    first_position: int
    pooled: Pooled
    one_token: bool = False  # the last layer computes nothing but that token


@dataclass(frozen=True)
class Row:
    """A packed row on its way through the body."""

    inputs: dict[str, Any]  # what the body is called with
    kept_PM: Tensor  # places in the row of the tokens that the head sees
    there_PM: Tensor  # False where a pair has no such token


def inputs_of(module: nn.Module) -> frozenset[str]:
    """Names of the arguments that the forward of a module's class takes."""
    return frozenset(inspect.signature(type(module).forward).parameters)


def without_cache(module: nn.Module) -> dict[str, bool]:
    """What keeps a decoder from storing every key and value, to be passed on to its forward; empty for other classes.

    Nothing reads them here, and layers that are computed again would store them twice.
    """
    return {"use_cache": False} if "use_cache" in inputs_of(module) else {}


def layouts(model: Model) -> Iterator[Layout]:
    """Layouts worth proving, the likeliest first; none where the class declares that its attention is its own."""
    body = model.base_model
    if body is model or not model.is_backend_compatible():
        return
    known = inputs_of(body)
    if "position_ids" not in known:
        return
    after_padding = (model.config.pad_token_id or 0) + 1
    firsts = [after_padding, 0] if model.config.model_type in AFTER_PADDING else [0, after_padding]
    pooled: list[Pooled] = ["last", "first", "all"] if "use_cache" in known else ["first", "last", "all"]
    if last_layer(body) is not None:
        yield from (Layout(first, "first", one_token=True) for first in firsts)
    yield from (Layout(first, part) for part, first in product(pooled, firsts))


def row_of(batch: Batch, model: Model, layout: Layout, runs: Runs) -> tuple[Row, dict[str, Tensor]]:
    """The body's inputs, and the head's own `input_ids` and `attention_mask` (P, M)."""
    ids, device = batch.input_ids, batch.input_ids.device
    lengths = torch.tensor(batch.lengths, device=device)
    total, longest = sum(batch.lengths), max(batch.lengths)
    starts = lengths.cumsum(0) - lengths
    offsets = torch.arange(total, device=device) - starts.repeat_interleave(lengths, output_size=total)
    inputs = _body_inputs(batch, model, offsets + layout.first_position, runs)
    if layout.pooled == "first":
        kept = starts[:, None]
    elif layout.pooled == "last":
        # As transformers' decoders do: the last token that is not the pad token.
        real = torch.where(ids != model.config.pad_token_id, offsets, 0)
        last = torch.zeros_like(starts).scatter_reduce(
            0, torch.arange(len(starts), device=device).repeat_interleave(lengths, output_size=total), real, "amax"
        )
        kept = (starts + last)[:, None]
    else:
        kept = starts[:, None] + torch.arange(longest, device=device)
    there = kept < (starts + lengths)[:, None]
    kept = torch.where(there, kept, starts[:, None])
    filler = model.config.pad_token_id or 0
    head = {"input_ids": torch.where(there, ids[kept], filler), "attention_mask": there.long()}
    if layout.one_token:
        inputs["packed_runs"] = replace(runs, kept=kept[:, 0])
        kept = torch.arange(len(starts), device=device)[:, None]  # the body gives back these tokens and no others
    return Row(inputs, kept, there), head


def row_of_branches(batch: Branches, model: Model, layout: Layout, runs: Runs) -> tuple[Row, dict[str, Tensor]]:
    """The same for a row that holds the beginnings of its pairs once; its head reads the last token of each pair."""
    inputs = _body_inputs(batch, model, batch.positions + layout.first_position, runs)
    kept = batch.last[:, None]
    head = {"input_ids": batch.input_ids[kept], "attention_mask": torch.ones_like(kept)}
    return Row(inputs, kept, torch.ones_like(kept, dtype=torch.bool)), head


def _body_inputs(batch: Batch | Branches, model: Model, positions_T: Tensor, runs: Runs) -> dict[str, Any]:
    known = inputs_of(model.base_model)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[None],
        "attention_mask": None,
        "position_ids": positions_T[None],
        "packed_runs": runs,
    }
    if batch.token_type_ids is not None and "token_type_ids" in known:
        inputs["token_type_ids"] = batch.token_type_ids[None]
    return inputs | without_cache(model.base_model)


def accept_rows(model: Model) -> None:
    """Let the body's forward take a packed row by the argument `packed_row`; without it nothing changes."""
    body = model.base_model
    body.forward = partial(_forward, body)
    if (layer := last_layer(body)) is not None:
        accept_kept(layer)


def _forward(body: nn.Module, *args: Any, packed_row: Row | None = None, **inputs: Any) -> Any:
    plain = type(body).forward
    if packed_row is None:
        return plain(body, *args, **inputs)
    output = plain(body, **packed_row.inputs)
    hidden_PMD = output.last_hidden_state[0][packed_row.kept_PM] * packed_row.there_PM[..., None]
    output.last_hidden_state = hidden_PMD
    if getattr(output, "pooler_output", None) is not None:
        output.pooler_output = _pooled(body, hidden_PMD)
    return output


def _pooled(body: nn.Module, hidden_PMD: Tensor) -> Tensor:
    pooler: Any = body.pooler
    if hasattr(body, "pooler_activation"):  # ALBERT keeps its activation beside the pooler, which is a Linear
        return body.pooler_activation(pooler(hidden_PMD[:, 0]))  # type: ignore[operator]
    return pooler(hidden_PMD)


def head_modules(model: Model) -> set[str]:
    """Names of the top modules outside the body: the score head, which stays float32."""
    return {name for name, _ in model.named_children() if name != model.base_model_prefix}


def position_limit(model: Model) -> int | None:
    """Longest pair, in tokens, that the position table holds; None where there is no table."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    after_padding = model.config.model_type in AFTER_PADDING
    return limit - (model.config.pad_token_id or 0) - 1 if after_padding else limit
