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

Where = Callable[[int], str]


@dataclass(frozen=True)
class Loss:
    """A loss, what its mean runs over, and which labels it accepts."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    unit: str  # "pair" or "group"
    check_labels: Callable[[Tensor, int, Where], None]  # (labels, labels of the model, index -> where that pair is)
    learns_from: str = "two documents"  # what a group needs to teach anything, in words
    distinguishes: Callable[[Tensor], bool] = lambda labels: True  # and whether two or more labels have it

    def teaches(self, labels: Tensor) -> bool:
        """Whether a group with these labels has a gradient."""
        return len(labels) > 1 and self.distinguishes(labels)


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


def margin_mean_squared_error(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean over groups of the mean of ((x_b - x_i) - (y_b - y_i))^2, b the best document by the teacher's scores y.

    Margin-MSE (Hofstaetter et al., 2020); a group of one document counts as zero.
    """
    x_GM, y_GM, there_GM = _by_group(scores_PL, labels_P, groups_P)
    best_G1 = y_GM.masked_fill(~there_GM, -math.inf).argmax(1, keepdim=True)
    x_margin, y_margin = (values.gather(1, best_G1) - values for values in (x_GM, y_GM))
    others_GM = there_GM.scatter(1, best_G1, False)
    return _mean_over_groups((x_margin - y_margin).square(), others_GM)


def kl_divergence(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean over groups of sum_i t_i (log t_i - log p_i), t the teacher's softmax and p the model's."""
    x_GM, y_GM, there_GM = _by_group(scores_PL, labels_P, groups_P)
    log_p, log_t = (values.masked_fill(~there_GM, -math.inf).log_softmax(1) for values in (x_GM, y_GM))
    terms = log_t.exp() * (log_t - log_p).masked_fill(~there_GM, 0.0)
    return terms.sum(1).mean()


def ranknet(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean over groups of the mean of -log2 s(x_i - x_j) over document pairs with y_i > y_j (Burges et al., 2005)."""
    x_GM, y_GM, there_GM = _by_group(scores_PL, labels_P, groups_P)
    losses_GMM = -F.logsigmoid(x_GM[:, :, None] - x_GM[:, None, :]) / math.log(2)
    return _mean_over_groups(losses_GMM, _preferred(y_GM, there_GM))


def lambda_loss(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """RankNet with each document pair weighted by what its order does to nDCG: NDCG-Loss2++ (Wang et al., 2018), mu 10.

    Gains are 2^y - 1 over the ideal DCG, ranks are those of the scores. Grades are 0 or more.
    """
    x_GM, y_GM, there_GM = _by_group(scores_PL, labels_P, groups_P)
    order_GM = x_GM.detach().masked_fill(~there_GM, -math.inf).argsort(dim=1, descending=True, stable=True)
    x_GM, y_GM, there_GM = (values.gather(1, order_GM) for values in (x_GM, y_GM, there_GM))
    y_GM = y_GM.masked_fill(~there_GM, 0.0)
    ranks_M = torch.arange(1, x_GM.shape[1] + 1, device=x_GM.device)
    inverse_M = 1.0 / torch.log2(1.0 + ranks_M)
    ideal_G1 = ((2.0 ** y_GM.sort(1, descending=True).values - 1) * inverse_M).sum(1, keepdim=True).clamp(min=1e-10)
    gain_GM = (2.0**y_GM - 1) / ideal_G1
    apart_MM = (ranks_M[:, None] - ranks_M[None, :]).abs()
    by_distance_MM = 1.0 / torch.log2(apart_MM.clamp(min=1) + 1.0) - 1.0 / torch.log2(apart_MM + 2.0)
    by_rank_MM = (inverse_M[:, None] - inverse_M[None, :]).abs()
    weights_GMM = (10.0 * by_distance_MM + by_rank_MM) * (gain_GM[:, :, None] - gain_GM[:, None, :]).abs()
    losses_GMM = -weights_GMM * F.logsigmoid(x_GM[:, :, None] - x_GM[:, None, :]) / math.log(2)
    return _mean_over_groups(losses_GMM, _preferred(y_GM, there_GM))


def listmle(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
    """Mean over groups of -log of the Plackett-Luce probability of the order by label (Xia et al., 2008).

    Documents of equal label keep the order of the batch.
    """
    x_GM, y_GM, there_GM = _by_group(scores_PL, labels_P, groups_P)
    order_GM = y_GM.masked_fill(~there_GM, -math.inf).argsort(dim=1, descending=True, stable=True)
    x_GM, there_GM = x_GM.gather(1, order_GM), there_GM.gather(1, order_GM)
    # A very small score stands for "not there": an infinite one would make the gradient of logcumsumexp NaN.
    filled_GM = x_GM.masked_fill(~there_GM, torch.finfo(torch.float32).min)
    rest_GM = filled_GM.flip(1).logcumsumexp(1).flip(1)
    return (rest_GM - x_GM).masked_fill(~there_GM, 0.0).sum(1).mean()


def _by_group(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and presence, each (G, M) for at most M documents a group, filled with 0 and False."""
    order_P = groups_P.argsort(stable=True)
    sizes_G = groups_P.bincount()
    starts_G = sizes_G.cumsum(0) - sizes_G
    rows_P = groups_P[order_P]
    places_P = torch.arange(len(order_P), device=groups_P.device) - starts_G[rows_P]
    shape = (len(sizes_G), int(sizes_G.max()))
    there_GM = torch.zeros(shape, dtype=torch.bool, device=groups_P.device)
    there_GM[rows_P, places_P] = True
    x_P, y_P = scores_PL[:, 0].float()[order_P], labels_P.float()[order_P]
    x_GM = x_P.new_zeros(shape).index_put((rows_P, places_P), x_P)
    return x_GM, y_P.new_zeros(shape).index_put((rows_P, places_P), y_P), there_GM


def _preferred(y_GM: Tensor, there_GM: Tensor) -> Tensor:
    both_GMM = there_GM[:, :, None] & there_GM[:, None, :]
    return both_GMM & (y_GM[:, :, None] > y_GM[:, None, :])


def _mean_over_groups(losses: Tensor, counted: Tensor) -> Tensor:
    """Mean over groups of each group's mean of `losses` where `counted`; a group with none counts as zero."""
    kept = losses.masked_fill(~counted, 0.0).flatten(1).sum(1)
    return (kept / counted.flatten(1).sum(1).clamp(min=1)).mean()


def default_loss(num_labels: int, grouped: bool) -> str:
    """The usual loss: over the group for graded groups, else by the number of labels."""
    return "softmax" if grouped else "bce" if num_labels == 1 else "cross-entropy"


def _refuse(labels: Tensor, bad: Tensor, where: Where, rule: str, remedy: str) -> None:
    """Raise DataError where any label is `bad` (P,): the rule, the first of them, where it is, and what to do."""
    rows = bad.nonzero()[:, 0].tolist()
    if rows:
        more = f" ({len(rows)} such labels)" if len(rows) > 1 else ""
        raise DataError(f"{rule}; {where(rows[0])} has {labels[rows[0]].item():g}{more}. {remedy}")


def _finite(labels: Tensor, where: Where) -> None:
    _refuse(labels, ~labels.isfinite(), where, "Labels must be finite numbers", "Correct or drop them.")


def _probabilities(labels: Tensor, num_labels: int, where: Where) -> None:
    _finite(labels, where)
    _single("bce", num_labels)
    bad = (labels < 0) | (labels > 1)
    _refuse(labels, bad, where, "The bce loss needs labels from 0 to 1", "Scale the labels, or use the mse loss.")


def _classes(labels: Tensor, num_labels: int, where: Where) -> None:
    _finite(labels, where)
    if num_labels < 2:
        raise DataError("The cross-entropy loss needs a model with 2 or more labels; this one has 1. Use bce or mse.")
    bad = (labels < 0) | (labels >= num_labels) | (labels != labels.round())
    rule = f"The cross-entropy loss of a model with {num_labels} labels needs whole labels from 0 to {num_labels - 1}"
    _refuse(labels, bad, where, rule, "Correct the labels, or load the model with as many labels as there are.")


def _real(name: str) -> Callable[[Tensor, int, Where], None]:
    def check(labels: Tensor, num_labels: int, where: Where) -> None:
        _finite(labels, where)
        _single(name, num_labels)

    return check


def _grades(name: str, largest: float = math.inf) -> Callable[[Tensor, int, Where], None]:
    def check(labels: Tensor, num_labels: int, where: Where) -> None:
        _finite(labels, where)
        _single(name, num_labels)
        high = f"from 0 to {largest:g}, because a gain is 2 to the grade" if largest < math.inf else "of 0 or more"
        bad = (labels < 0) | (labels > largest)
        _refuse(labels, bad, where, f"The {name} loss needs grades {high}", "Shift or scale the grades.")

    return check


def _single(loss: str, num_labels: int) -> None:
    if num_labels != 1:
        raise DataError(f"The {loss} loss needs a model with one label; this one has {num_labels}. Use cross-entropy.")


def _some_positive(labels: Tensor) -> bool:
    return bool((labels > 0).any())


def _some_different(labels: Tensor) -> bool:
    return bool((labels != labels[0]).any())


LARGEST_GRADE = 30.0  # 2^30 gains and their sums are still exact enough in float32

LOSSES: dict[str, Loss] = {
    "bce": Loss(binary_cross_entropy, "pair", _probabilities),
    "cross-entropy": Loss(cross_entropy, "pair", _classes),
    "mse": Loss(mean_squared_error, "pair", _real("mse")),
    "softmax": Loss(
        softmax_over_group, "group", _grades("softmax"), "a grade above 0 and a second document", _some_positive
    ),
    "margin-mse": Loss(margin_mean_squared_error, "group", _real("margin-mse")),
    "kl": Loss(kl_divergence, "group", _real("kl")),
    "ranknet": Loss(ranknet, "group", _real("ranknet"), "different grades", _some_different),
    "lambda": Loss(lambda_loss, "group", _grades("lambda", LARGEST_GRADE), "different grades", _some_different),
    "listmle": Loss(listmle, "group", _real("listmle"), "different grades", _some_different),
}
