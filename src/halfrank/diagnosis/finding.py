"""The answer to "why is it not finite": cause, place, numbers, pair, remedy, and whether the remedy was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from halfrank.data.pairs import place


class Cause(str, Enum):
    """The closed list of causes."""

    CORRUPT_WEIGHT = "corrupt weight"
    WEIGHT_OUT_OF_RANGE = "weight out of range"
    PRODUCT_OVERFLOW = "activation overflow in a product"
    RESIDUAL_OVERFLOW = "overflow in the residual stream"
    MASKED_ROW = "attention row fully masked"
    SOFTMAX_SATURATION = "softmax saturation"
    NORMALISATION = "variance or divisor out of range"
    LOSS_OVERFLOW = "logit or loss overflow"
    LABEL = "label not finite or out of range"
    INPUT = "input not finite or out of range"
    GRADIENT_OVERFLOW_SCALE = "gradient overflow that a lower loss scale cures"
    GRADIENT_OVERFLOW = "gradient overflow that no loss scale cures"
    GRADIENT_UNDERFLOW = "gradient underflow"
    SECOND_MOMENT_UNDERFLOW = "second-moment underflow"
    UPDATE_TOO_LARGE = "update larger than the weight"
    UPDATE_LOST = "update lost to rounding"
    LEARNING_RATE = "learning rate too high"
    PAD_TOKEN = "wrong pad token"
    UNTRAINED_HEAD = "score head never trained"
    SCORE_TIES = "score ties from saturation"
    OPTIMIZER_STATE = "optimizer state corrupt"


WHY = {
    Cause.CORRUPT_WEIGHT: "a stored weight is NaN or infinite, so everything that reads it is",
    Cause.WEIGHT_OUT_OF_RANGE: "a weight is larger than the largest number of the format it was converted to",
    Cause.PRODUCT_OVERFLOW: "a product is larger than the largest number of the format it is computed in",
    Cause.RESIDUAL_OVERFLOW: "the sum that runs through all layers left the format's range",
    Cause.MASKED_ROW: "a softmax saw nothing but -inf: 0 divided by 0",
    Cause.SOFTMAX_SATURATION: "the rows of a softmax are 0 and 1, so next to no gradient passes it",
    Cause.NORMALISATION: "the variance of a normalisation overflowed, or what was divided by is 0",
    Cause.LOSS_OVERFLOW: "the score head's product or the loss computed from it is not finite",
    Cause.LABEL: "a label is NaN, infinite or outside what the loss is defined for",
    Cause.INPUT: "what the model was given holds NaN, infinity or a token that it does not have",
    Cause.GRADIENT_OVERFLOW_SCALE: "the loss scale is too large for the gradients of this batch",
    Cause.GRADIENT_OVERFLOW: "a gradient is not finite at any loss scale",
    Cause.GRADIENT_UNDERFLOW: "gradients are smaller than the smallest number of the format and become 0",
    Cause.SECOND_MOMENT_UNDERFLOW: "squared gradients are below the format's smallest number: v is 0",
    Cause.UPDATE_TOO_LARGE: "one step changes some weights by more than their own size",
    Cause.UPDATE_LOST: "the update is below half a spacing of the format at the weight, and rounding drops it",
    Cause.LEARNING_RATE: "the run diverges in float32 arithmetic too",
    Cause.PAD_TOKEN: "the model's pad token is not the one that stands in the padding, so it reads the wrong place",
    Cause.UNTRAINED_HEAD: "the score head holds the values it was initialised with",
    Cause.SCORE_TIES: "scores of different pairs round to the same number",
    Cause.OPTIMIZER_STATE: "a moment in the optimizer's state cannot come from any gradients",
}


@dataclass(frozen=True)
class PairReference:
    """The pair that shows the fault: its row in the input, counted from 0, its text, shortened, and its file's line."""

    row: int
    text: str = ""
    source: str = ""  # "file.jsonl:12", where it comes from a file

    @property
    def place(self) -> str:
        """Where a person finds it."""
        return place(self.source, self.row)

    def __str__(self) -> str:
        return self.place + (f" ({self.text!r})" if self.text else "")


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, and what helps; `replayed` is None where the remedy cannot be tried by computing."""

    cause: Cause
    phase: str  # weights, data, forward, loss, backward, update or scores
    module: str | None = None
    operation: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    pair: PairReference | None = None
    remedy: str = ""
    islands: tuple[str, ...] = ()  # modules to compute in float32, where that is the remedy
    loss_scale: float | None = None  # the largest finite one, where that is the remedy
    replayed: bool | None = None
    why: str = ""  # what was seen to happen, where that says more than the cause's own sentence

    def __str__(self) -> str:
        place = "".join(
            [f" in '{self.module}'" if self.module else "", f" at {self.operation}" if self.operation else ""]
        )
        numbers = ", ".join(f"{name} {_short(value)}" for name, value in self.numbers.items())
        tried = {True: " (replayed: it helps)", False: " (replayed: it does not help alone)", None: ""}[self.replayed]
        parts = [f"{self.cause.value}{place} ({self.phase}): {self.why or WHY[self.cause]}."]
        parts += [f"Seen just before: {numbers}."] if numbers else []
        parts += [f"First in {self.pair}."] if self.pair else []
        parts += [f"Remedy: {self.remedy}{tried}."] if self.remedy else []
        return " ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values; numbers that are not finite as strings, which JSON can hold."""
        pair = None if self.pair is None else {"place": self.pair.place, "text": self.pair.text}
        return {
            "cause": self.cause.value,
            "phase": self.phase,
            "module": self.module,
            "operation": self.operation,
            "numbers": {k: v if math.isfinite(v) else str(v) for k, v in self.numbers.items()},
            "why": self.why or WHY[self.cause],
            "pair": pair,
            "remedy": self.remedy,
            "islands": list(self.islands),
            "loss_scale": self.loss_scale,
            "replayed": self.replayed,
        }


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e7 and value == int(value) else f"{value:.4g}"
