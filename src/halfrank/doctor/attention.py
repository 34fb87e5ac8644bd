"""How saturated each layer's attention is, by the class's own plain attention on a few padded pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halfrank.data.packing import pack
from halfrank.doctor.modules import ZERO_BELOW
from halfrank.model.scorer import MISFITS, Scorer

PAIRS = 8
SURE = 0.999  # a query that gives so much of its attention to one token has almost no gradient


@torch.no_grad()
def saturation(scorer: Scorer, texts: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], ...]:
    """By layer: share of queries that attend to one token only, and of attention that float16 rounds to 0.

    Empty where the class does not give its attention away.
    """
    usual = scorer.config._attn_implementation
    batch = pack(scorer.pairs.encode(texts[:PAIRS]), range(min(PAIRS, len(texts)))).to(scorer.device)
    given = scorer.padded_inputs(batch)
    training = scorer.model.training
    scorer.model.eval()
    try:
        with scorer.computing_in("float32"):
            scorer.model.set_attn_implementation("eager")
            shares = scorer.model(**given, output_attentions=True).attentions
    except MISFITS:
        shares = None
    finally:
        scorer.model.set_attn_implementation(usual)
        scorer.model.train(training)
    real = given["attention_mask"].bool()
    return tuple(_layer(number, layer, real) for number, layer in enumerate(shares or ()) if layer is not None)


def _layer(number: int, shares: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
    rows = shares.float().transpose(1, 2)  # pairs, queries, heads, keys
    rows = rows[real] if real.shape == rows.shape[:2] else rows.flatten(0, 1)
    there = rows[rows > 0]
    return {
        "layer": number,
        "saturated": float((rows.amax(-1) > SURE).float().mean()),
        "rounded_to_zero": float((there < ZERO_BELOW[torch.float16]).float().mean()) if there.numel() else 0.0,
    }
