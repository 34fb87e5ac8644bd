"""Scores of a copy beside those of its reference: errors, rank changes, ties.

Shapes: P pairs, L labels, D documents of one query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfrank.data.pairs import Group
from halfrank.evaluate import per_group

TOP = 10


@dataclass(frozen=True)
class Agreement:
    """How far the scores of a copy are from its reference's; errors count in `unit`."""

    unit: float  # 1, or the reference scores' standard deviation where that is larger
    max_score_error: float
    mean_score_error: float
    max_logit_error: float
    non_finite: int
    kendall_tau: float | None  # mean over queries; None without queries of two documents, or with several labels
    min_kendall_tau: float | None
    top10_overlap: float | None
    min_top10_overlap: float | None
    clear_kendall_tau: float | None  # over the queries whose scores lie further apart than the error allowed
    clear_top10_overlap: float | None
    new_ties: int  # pairs of documents of one query that score alike in the copy only
    ndcg_reference: float | None
    ndcg_copy: float | None

    @property
    def ndcg_loss(self) -> float | None:
        """How much nDCG@10 the copy loses."""
        if self.ndcg_reference is None or self.ndcg_copy is None:
            return None
        return self.ndcg_reference - self.ndcg_copy


def agreement(
    reference_PL: np.ndarray,
    copy_PL: np.ndarray,
    logits: tuple[np.ndarray, np.ndarray],
    groups: Sequence[Group],
    *,
    allowed: float,
) -> Agreement:
    """Compare scores (P, L) in the order of the groups' documents; `logits` are reference's and copy's, (P, L).

    A query is clear where the reference's scores spread over more than four times the `allowed` error: nearer
    scores may change places in a sound copy.
    """
    finite = np.isfinite(copy_PL).all(axis=1)
    unit = max(1.0, float(reference_PL.std()))
    errors = np.abs(copy_PL[finite].astype(np.float64) - reference_PL[finite]) / unit
    apart = np.abs(logits[1][finite].astype(np.float64) - logits[0][finite])
    ranked = reference_PL.shape[1] == 1 and bool(finite.all())
    rows = _ranks(reference_PL[:, 0], copy_PL[:, 0], groups) if ranked else []
    clear = [row for row in rows if row.spread > 4 * allowed * unit]
    ndcg = _ndcg(groups, reference_PL[:, 0], copy_PL[:, 0]) if ranked else (None, None)
    taus, overlaps = [row.tau for row in rows], [row.overlap for row in rows]
    return Agreement(
        unit,
        float(errors.max(initial=0.0)),
        float(errors.mean()) if errors.size else 0.0,
        float(apart.max(initial=0.0)),
        int((~finite).sum()),
        _mean(taus),
        min(taus, default=None),
        _mean(overlaps),
        min(overlaps, default=None),
        _mean([row.tau for row in clear]),
        _mean([row.overlap for row in clear]),
        sum(row.new_ties for row in rows),
        *ndcg,
    )


@dataclass(frozen=True)
class _Ranks:
    tau: float
    overlap: float
    new_ties: int
    spread: float


def _ranks(reference_P: np.ndarray, copy_P: np.ndarray, groups: Sequence[Group]) -> list[_Ranks]:
    rows = []
    start = 0
    for group in groups:
        part = slice(start, start + len(group.documents))
        start = part.stop
        if len(group.documents) > 1:
            a, b = reference_P[part], copy_P[part]
            rows.append(_Ranks(kendall_tau(a, b), top_overlap(a, b), new_ties(a, b), float(a.std())))
    return rows


def kendall_tau(reference_D: np.ndarray, copy_D: np.ndarray) -> float:
    """Kendall's tau-b of two score lists; where one list is all ties, 1 if both are and else 0."""
    from scipy import stats  # half a second at import, which loading a model need not wait for

    tau = float(stats.kendalltau(reference_D, copy_D).statistic)
    if math.isnan(tau):
        return float(np.ptp(reference_D) == 0 and np.ptp(copy_D) == 0)
    return tau


def top_overlap(reference_D: np.ndarray, copy_D: np.ndarray, top: int = TOP) -> float:
    """Share of the reference's first `top` documents that are among the copy's; equal scores keep their order."""
    first = [set(np.argsort(-scores, kind="stable")[:top].tolist()) for scores in (reference_D, copy_D)]
    return len(first[0] & first[1]) / len(first[0])


def new_ties(reference_D: np.ndarray, copy_D: np.ndarray) -> int:
    """Pairs of documents with equal scores in the copy and different ones in the reference."""
    both = np.unique(np.stack([reference_D, copy_D], axis=1), axis=0, return_counts=True)[1]
    return _tied(np.unique(copy_D, return_counts=True)[1]) - _tied(both)


def _tied(counts: np.ndarray) -> int:
    return int((counts * (counts - 1) // 2).sum())


def _ndcg(groups: Sequence[Group], *both: np.ndarray) -> tuple[float | None, float | None]:
    grades = [grade or 0.0 for group in groups for grade in group.grades]
    if not any(grade > 0 for grade in grades) or any(grade != round(grade) for grade in grades):
        return None, None
    first, second = (_mean(list(per_group(groups, scores)[0]["ndcg@10"].values())) for scores in both)
    return first, second


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
