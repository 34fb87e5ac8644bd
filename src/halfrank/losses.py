"""Losses: pure float32 functions of scores and labels.

Shapes: P pairs, L labels, G groups. Scores are logits (P, L); labels are (P,); groups (P,) say which pairs belong
to one query. Each loss is a mean, over pairs or over groups (`Loss.unit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from halfrank.errors import DataError


@dataclass(frozen=True)
class Loss:
    """A loss, what its mean runs over, and which labels it accepts."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    unit: str  # "pair" or "group"
    check_labels: Callable[[Tensor, int], None]


def binary_cross_entropy(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean of -y log s(x) - (1 - y) log(1 - s(x)) over pairs, s the logistic function, y in [0, 1]."""
    return F.binary_cross_entropy_with_logits(scores_PL[:, 0].float(), labels_P.float())


def cross_entropy(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean of -log softmax(x)[y] over pairs, y a class number."""
    return F.cross_entropy(scores_PL.float(), labels_P.long())


def mean_squared_error(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean of (x - y)^2 over pairs, on the logits."""
    return F.mse_loss(scores_PL[:, 0].float(), labels_P.float())


def softmax_over_group(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean over groups of -sum_i t_i log softmax(x)_i, t the grades of a group divided by their sum.

    With one positive this is InfoNCE, with grades the top-one ListNet loss (Cao et al., 2007). A group whose grades
    are all zero has nothing to prefer and counts as zero.
    """
    scores_P, labels_P = scores_PL[:, 0].float(), labels_P.float()
    count = int(groups_P.max()) + 1
    # The largest score of each group is subtracted first: exp never overflows. Its gradient cancels, so it is cut.
    largest = scores_P.new_full((count,), -math.inf).scatter_reduce(0, groups_P, scores_P.detach(), "amax")
    shifted = scores_P - largest[groups_P]
    log_sums = scores_P.new_zeros(count).index_add(0, groups_P, shifted.exp()).log()
    totals = scores_P.new_zeros(count).index_add(0, groups_P, labels_P)
    targets = labels_P / totals.clamp(min=torch.finfo(torch.float32).tiny)[groups_P]
    return -(targets * (shifted - log_sums[groups_P])).sum() / count


def default_loss(num_labels: int, grouped: bool) -> str:
    """The usual loss: over the group for graded groups, else by the number of labels."""
    return "softmax" if grouped else "bce" if num_labels == 1 else "cross-entropy"


def _finite(labels: Tensor) -> None:
    bad = (~labels.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            f"Labels must be finite numbers; pair {bad[0]} has {labels[bad[0]].item()} ({len(bad)} such pairs)."
        )


def _probabilities(labels: Tensor, num_labels: int) -> None:
    _finite(labels)
    _single("bce", num_labels)
    bad = ((labels < 0) | (labels > 1)).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            f"The bce loss needs labels from 0 to 1; pair {bad[0]} has {labels[bad[0]].item():g} "
            f"({len(bad)} such pairs). "
            "Scale the labels, or use the mse loss."
        )


def _classes(labels: Tensor, num_labels: int) -> None:
    _finite(labels)
    bad = ((labels < 0) | (labels >= num_labels) | (labels != labels.round())).nonzero()[:, 0].tolist()
    if bad or num_labels < 2:
        got = f"pair {bad[0]} has {labels[bad[0]].item():g}" if bad else f"the model has {num_labels} label"
        raise DataError(
            f"The cross-entropy loss needs whole labels from 0 to {num_labels - 1} and 2 or more of them; {got}."
        )


def _real(labels: Tensor, num_labels: int) -> None:
    _finite(labels)
    _single("mse", num_labels)


def _grades(labels: Tensor, num_labels: int) -> None:
    _finite(labels)
    _single("softmax", num_labels)
    if bool((labels < 0).any()):
        raise DataError(f"The softmax loss needs grades of 0 or more; the lowest is {labels.min().item():g}.")


def _single(loss: str, num_labels: int) -> None:
    if num_labels != 1:
        raise DataError(f"The {loss} loss needs a model with one label; this one has {num_labels}. Use cross-entropy.")


LOSSES: dict[str, Loss] = {
    "bce": Loss(binary_cross_entropy, "pair", _probabilities),
    "cross-entropy": Loss(cross_entropy, "pair", _classes),
    "mse": Loss(mean_squared_error, "pair", _real),
    "softmax": Loss(softmax_over_group, "group", _grades),
}
