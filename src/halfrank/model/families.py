"""What differs between model families: where positions start, which token the head reads, and the head itself.

Shapes: P pairs, D hidden size, L labels; hidden states come as one packed row of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How a packed row of one model family becomes logits."""

    pooled: str  # "first" or "last" token of each pair
    head: Callable[[PreTrainedModel, Tensor], Tensor]  # (P, D) pooled hidden states -> (P, L) logits
    offset_by_padding: bool = False  # positions start at padding_idx + 1


def _pooler_head(model: PreTrainedModel, pooled_PD: Tensor) -> Tensor:
    return model.classifier(model.dropout(model.base_model.pooler(pooled_PD[:, None])))


def _first_token_head(model: PreTrainedModel, pooled_PD: Tensor) -> Tensor:
    return model.classifier(pooled_PD[:, None])


def _score_head(model: PreTrainedModel, pooled_PD: Tensor) -> Tensor:
    return model.score(pooled_PD)


FAMILIES = {
    "bert": Family("first", _pooler_head),
    "roberta": Family("first", _first_token_head, offset_by_padding=True),
    "xlm-roberta": Family("first", _first_token_head, offset_by_padding=True),
    "llama": Family("last", _score_head),
}


def family_of(model: PreTrainedModel) -> Family | None:
    """The family whose packed forward fits `model`; None where only the padded path is right."""
    named = FAMILIES.get(model.config.model_type)
    return named if named is not None and type(model).is_backend_compatible() else None


def head_modules(model: PreTrainedModel) -> set[str]:
    """Names of the top modules outside the body: the score head, which stays float32."""
    return {name for name, _ in model.named_children() if name != model.base_model_prefix}


def position_offset(model: PreTrainedModel, family: Family | None) -> int:
    """Position of a pair's first token."""
    offset = family.offset_by_padding if family else False
    return model.config.pad_token_id + 1 if offset and model.config.pad_token_id is not None else 0


def position_limit(model: PreTrainedModel) -> int | None:
    """Longest pair, in tokens, that the position table holds; None where there is no table."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    padding_offset = model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
    return limit - (model.config.pad_token_id or 0) - 1 if padding_offset else limit
