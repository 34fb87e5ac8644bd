"""Padded batches for callers that run the transformers model themselves, as sentence-transformers makes them.

Shapes: B rows, M tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from halfrank.errors import DataError
from halfrank.model.families import inputs_of
from halfrank.model.scorer import Scorer

TEXT_PAIR = 2


def features_of(scorer: Scorer, inputs: Sequence[Any], prompt: str | None) -> BatchEncoding | dict[str, Any]:
    """Padded ids (B, M) of single texts or of pairs, with `prompt` before each first text; {} for no inputs.

    Raises DataError for anything else.
    `prompt_length` counts the prompt's tokens, with the special tokens before it; a chat template has no such part.
    """
    if isinstance(inputs, str):
        raise DataError(f"preprocess takes a list of texts or of pairs; got the text {inputs!r:.60}.")
    if len(inputs) == 0:
        return {}
    rows = [[row] if isinstance(row, str) else list(row) for row in inputs]
    sizes = {len(row) for row in rows}
    if sizes not in ({1}, {TEXT_PAIR}):
        raise DataError(f"preprocess takes texts or pairs, not both at once; got rows of {sorted(sizes)} texts.")
    firsts = [(prompt or "") + row[0] for row in rows]
    seconds = [row[1] for row in rows] if sizes == {TEXT_PAIR} else None
    if scorer.template is not None and seconds is not None:
        pairs = [(row[0], row[1]) for row in rows]
        ids = scorer.pairs.encode(pairs, instruction=prompt or "").ids()
        encoded = scorer.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
        encoded["modality"] = "message"
        return encoded
    encoded = _encoded(scorer, firsts, seconds)
    encoded["modality"] = "text"
    if prompt:
        ids = scorer.tokenizer(prompt).input_ids
        encoded["prompt_length"] = len(ids) - (ids[-1] in scorer.tokenizer.all_special_ids)
    return encoded


def collated(scorer: Scorer, texts: Sequence[Sequence[str]]) -> BatchEncoding:
    """Padded ids (B, M) of pairs, their outer white space taken away, on the model's device."""
    firsts, seconds = ([row[column].strip() for row in texts] for column in range(TEXT_PAIR))
    return _encoded(scorer, firsts, seconds).to(scorer.device)


def labels_of(scorer: Scorer, labels: Sequence[Any]) -> Tensor:
    """Labels (B,) as a loss takes them: float32 for one score, int64 for classes."""
    dtype = torch.float32 if scorer.num_labels == 1 else torch.int64
    return torch.tensor(labels, dtype=dtype, device=scorer.device)


def with_scores(scorer: Scorer, features: Any) -> Any:
    """The same mapping with the float32 logits of its padded rows (B, labels) under "scores"."""
    known = inputs_of(scorer.model)
    given = {name: value.to(scorer.device) for name, value in features.items() if name in known}
    features["scores"] = scorer.model(**given).logits.float()
    return features


def _encoded(scorer: Scorer, firsts: list[str], seconds: list[str] | None) -> BatchEncoding:
    return scorer.tokenizer(
        firsts, seconds, padding=True, truncation="longest_first", max_length=scorer.max_length, return_tensors="pt"
    )
