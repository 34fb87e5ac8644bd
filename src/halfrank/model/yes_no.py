"""A causal checkpoint as a scorer: the answer yes against no, as one float32 row of the vocabulary's head.

The score of a pair is `(w_yes - w_no) . h` of its last token. The rows are subtracted once, in float32, so no two
16-bit logits ever are; the rest of the vocabulary's head is dropped. What comes out is the family's own
sequence-classification class, or for families without one a body with a head of ours.
Shapes: D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from halfrank.data.packing import Batch
from halfrank.errors import ModelError
from halfrank.model.families import head_modules
from halfrank.model.modular import Model, Modular, last_token_head

SCALES = (1.0, 64.0)  # exact in every format, and far enough apart to see that a class bends its logits
AGREEMENT = 1e-4  # of the largest score: float32 sums in another order


def is_causal(config: Any) -> bool:
    """Whether a folder says that it holds a causal language model."""
    return any(name.endswith("ForCausalLM") for name in config.architectures or [])


def scorer_of(causal: PreTrainedModel, yes: int, no: int | None, *, by_mask: bool = False) -> Model:
    """A model with one label and the body of `causal`, whose head is the row of `yes` less that of `no`.

    The body is shared, not copied. `by_mask` finds the last token by the mask where it may be the pad token. Raises
    ModelError where a class's score is not such a row.
    """
    row_D, shift = _row(causal, yes, no)
    made = None if by_mask or shift is not None else _classifier(causal)
    if made is not None:
        _linear_head(made).weight = nn.Parameter(row_D[None])
        return made
    steps = Modular(causal.base_model, last_token_head(len(row_D), bias=shift is not None))
    dense: Any = steps.head["2"]
    dense.linear.weight = nn.Parameter(row_D[None])
    if shift is not None:
        dense.linear.bias = nn.Parameter(row_D.new_tensor([shift]))
    return steps


def agrees(causal: PreTrainedModel, yes: int, no: int | None) -> Callable[[Batch, Tensor], None]:
    """A check of scores (P, 1) against the logits of `causal` itself; raises ModelError where they differ.

    Only the two rows of the answers are multiplied.
    """
    rows, bias = _answers(causal, yes, no)

    def check(batch: Batch, scores_P1: Tensor) -> None:
        with _headed(causal, rows, bias, torch.float32), torch.no_grad():
            alone = [
                causal(input_ids=ids[None], use_cache=False).logits[0, -1]
                for ids in batch.input_ids.split(batch.lengths)
            ]
        logits = torch.stack(alone).float()
        wanted = logits[:, 0] - logits[:, 1] if no is not None else logits[:, 0]
        if (scores_P1[:, 0] - wanted).abs().max() > AGREEMENT * wanted.abs().max().clamp(min=1e-3):
            raise ModelError(
                f"As a sequence classifier {type(causal).__name__} does not score as its own logits say: its template "
                "may end with the pad token. Give the tokenizer a pad token of its own."
            )

    return check


def _row(causal: PreTrainedModel, yes: int, no: int | None) -> tuple[Tensor, float | None]:
    """The float32 row (D,) and the constant, where there is one, that make a hidden state's score."""
    rows, bias = _answers(causal, yes, no)
    scale = _scale(causal)
    row_D = rows[0] if no is None else rows[0] - rows[1]
    shift = None if bias is None else float(bias[0] if no is None else bias[0] - bias[1]) * scale
    return row_D * scale, shift


def _answers(causal: PreTrainedModel, yes: int, no: int | None) -> tuple[Tensor, Tensor | None]:
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(causal).__name__} has no linear head over its vocabulary: pass num_labels=1.")
    wanted = [yes] if no is None else [yes, no]
    if max(wanted) >= head.out_features:
        raise ModelError(f"The answers' tokens {wanted} lie beyond the vocabulary of {head.out_features} tokens.")
    bias = None if head.bias is None else head.bias.detach()[wanted].float()
    return head.weight.detach()[wanted].float(), bias


def _scale(causal: PreTrainedModel) -> float:
    """What the class multiplies its logits with; raises ModelError where it does more, such as capping them."""
    size = causal.get_output_embeddings().in_features
    zeros, body = torch.zeros(len(SCALES), size), causal.base_model

    def silent(*_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(
            last_hidden_state=torch.zeros(1, 1, size, dtype=causal.dtype, device=causal.device)
        )

    body.forward = silent  # only what comes after the body is asked
    try:
        with _headed(causal, zeros, torch.tensor(SCALES), causal.dtype), torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=causal.device)
            low, high = causal(input_ids=token, use_cache=False).logits[0, -1].float().tolist()
    finally:
        del body.forward
    if not abs(high / low - SCALES[1] / SCALES[0]) < 1e-2 * SCALES[1]:
        raise ModelError(
            f"{type(causal).__name__} caps its logits, so yes less no is not one row of its head. Pass config_kwargs="
            "{'final_logit_softcapping': None} to score without the cap, or num_labels=1 for a new score head."
        )
    return low


class _headed:
    """A causal model whose vocabulary is two words for a while."""

    def __init__(self, causal: PreTrainedModel, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._causal, self._before = causal, causal.get_output_embeddings()
        place = causal.device
        self._head = nn.Linear(rows.shape[1], len(rows), bias=bias is not None, device=place, dtype=dtype)
        self._head.weight.data.copy_(rows)
        if bias is not None:
            self._head.bias.data.copy_(bias)

    def __enter__(self) -> None:
        self._causal.set_output_embeddings(self._head)

    def __exit__(self, *_: object) -> None:
        self._causal.set_output_embeddings(self._before)


def _classifier(causal: PreTrainedModel) -> PreTrainedModel | None:
    """The family's sequence-classification class around the body of `causal`; None where there is none that fits."""
    config = causal.config
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    config.num_labels = 1
    with torch.device("meta"):
        made = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    heads = [made.get_submodule(name) for name in head_modules(made)]
    plain = len(heads) == 1 and type(heads[0]) is nn.Linear and heads[0].bias is None
    if not plain or type(made.base_model) is not type(causal.base_model):
        return None
    setattr(made, made.base_model_prefix, causal.base_model)
    return made


def _linear_head(model: PreTrainedModel) -> Any:
    (name,) = head_modules(model)
    return model.get_submodule(name)
