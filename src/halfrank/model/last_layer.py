"""Only what the score reads: where the head looks at one token of each pair, the last layer computes that token alone.

Its keys and values still come from all tokens; queries, output projection and feed-forward from one token a pair.
Nothing is approximated: the other tokens' outputs had no reader. For layers laid out as BERT's.
Shapes: T tokens of a row, P pairs, D hidden size, H heads, S head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from halfrank.model.attention import Runs, packed_attention


def last_layer(body: nn.Module) -> nn.Module | None:
    """The last layer of `body`, if its parts are BERT's and it reads in both directions."""
    layers = getattr(getattr(body, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return None
    layer = layers[-1]
    own = getattr(getattr(layer, "attention", None), "self", None)
    parts = [getattr(own, name, None) for name in ("query", "key", "value")]
    parts += [getattr(owner, "output", None) for owner in (layer, getattr(layer, "attention", None))]
    parts.append(getattr(layer, "intermediate", None))
    fits = all(isinstance(part, nn.Module) for part in parts) and hasattr(own, "scaling")
    return layer if fits and not getattr(own, "is_causal", False) and not getattr(layer, "is_decoder", False) else None


def accept_kept(layer: nn.Module) -> None:
    """Let the layer's forward compute only the tokens that a row's runs keep; without runs nothing changes."""
    own: Any = layer.attention.self  # type: ignore[union-attr]
    layer.forward = partial(_forward, layer)
    own.forward = partial(_attend, own)


def _forward(layer: Any, hidden_1TD: Tensor, *args: Any, **others: Any) -> Tensor:
    runs: Runs | None = others.get("packed_runs")
    if runs is None or runs.kept is None:
        return type(layer).forward(layer, hidden_1TD, *args, **others)
    kept_1PD = hidden_1TD[:, runs.kept]
    mixed_1PD = layer.attention.self(hidden_1TD, kept_1PD=kept_1PD, packed_runs=runs)
    attended_1PD = layer.attention.output(mixed_1PD, kept_1PD)
    return layer.output(layer.intermediate(attended_1PD), attended_1PD)


def _attend(own: Any, hidden_1TD: Tensor, *args: Any, kept_1PD: Tensor | None = None, **others: Any) -> Any:
    if kept_1PD is None:
        return type(own).forward(own, hidden_1TD, *args, **others)
    query, key, value = (
        part.view(*part.shape[:2], own.num_attention_heads, -1).transpose(1, 2)
        for part in (own.query(kept_1PD), own.key(hidden_1TD), own.value(hidden_1TD))
    )
    dropout = own.dropout.p if own.training else 0.0
    mixed_1PHS, _ = packed_attention(
        own, query, key, value, None, packed_runs=others["packed_runs"], dropout=dropout, scaling=own.scaling
    )
    return mixed_1PHS.flatten(2)
