"""The learning rate beside the weights: announced where it is large, and at the end whether such a run learned.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfrank.diagnosis import Cause, Finding
from halfrank.model.scorer import Scorer
from halfrank.numerics.scaling import norm_of
from halfrank.train.examples import MicroBatch
from halfrank.train.faults import UNJUDGED
from halfrank.train.step import LossFunction

USUAL_SHARE = 1e-3  # of the weights' size, a step: what fine-tuning takes
UNUSUAL_SHARE = 0.01  # from which on a run is asked at its end whether it learned
LARGE_SHARE = 0.1  # from which on the rate is announced before the first step
BETTER = 0.01  # share by which a loss is below that of one score for all where the scores tell anything


def share_of_weights(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate, which is about what AdamW adds to each weight, over the weights' size: median of matrices."""
    shares = [
        float(group["lr"]) / size
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.ndim > 1 and (size := float(norm_of(parameter)) / math.sqrt(parameter.numel())) > 0
    ]
    return statistics.median(shares) if shares else 0.0


def announce(scorer: Scorer, rate: float, share: float) -> None:
    """Say so where the learning rate is large beside the weights."""
    if share > LARGE_SHARE:
        scorer.note(
            f"A learning rate of {rate:g} changes the weights by {share:.0%} of their size in every step, which few "
            f"models survive in any format; {_usual(rate, share)} is usual for weights of this size."
        )


def nothing_learned(
    scorer: Scorer,
    last: Callable[[], Sequence[MicroBatch]],
    loss: LossFunction,
    *,
    rate: float,
    share: float,
    steps: int,
) -> Finding | None:
    """Whether `steps` at a high rate left a model that does no better on its last batches than one score for all pairs.

    Only a run whose updates add up to the size of its weights, at ten times the usual rate, is asked.
    """
    if share <= UNUSUAL_SHARE or share * steps < 1 or not (parts := last()):
        return None
    try:
        with torch.no_grad():
            logits = [torch.cat([scorer.logits(batch) for batch in part.pieces or (part.batch,)]) for part in parts]
            own = float(_total(loss, logits, parts))
        alike = _loss_of_one_score(loss, logits, parts)
    except UNJUDGED:  # a loss of the user's that does not take such scores
        return None
    if own < alike - BETTER * abs(alike):
        return None
    spread = float(torch.cat(logits).std(dim=0, correction=0).max())
    numbers = {
        "learning rate": rate, "share of the weights' size a step": share, "loss of the last batches": own,
        "loss of one score for all": alike, "spread of the scores": spread,
    }  # fmt: skip
    return Finding(
        Cause.LEARNING_RATE, "update", numbers=numbers, remedy=f"a learning rate of {_usual(rate, share)}",
        why="the run did not learn: on its last batches the model does no better than one score for all pairs",
    )  # fmt: skip


def _usual(rate: float, share: float) -> str:
    return f"{rate * USUAL_SHARE / share:.0e}"


def _total(loss: LossFunction, logits: Sequence[Tensor], parts: Sequence[MicroBatch]) -> Tensor:
    sums = [
        loss(values_PL, part.labels_P.to(values_PL.device), part.groups_P.to(values_PL.device)) * part.share
        for values_PL, part in zip(logits, parts, strict=True)
    ]
    return torch.stack(sums).sum()


def _loss_of_one_score(loss: LossFunction, logits: Sequence[Tensor], parts: Sequence[MicroBatch]) -> float:
    """The lowest loss that logits reach which are the same for every pair."""
    same_L = torch.zeros_like(logits[0][0], requires_grad=True)
    search = torch.optim.LBFGS([same_L], max_iter=50, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        return _total(loss, [same_L.expand(len(values_PL), -1) for values_PL in logits], parts)

    def downhill() -> Tensor:
        search.zero_grad()
        found = value()
        if found.requires_grad:
            found.backward()
        return found

    search.step(downhill)
    with torch.no_grad():
        return float(value())
