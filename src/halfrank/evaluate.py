"""Scores to metrics: nDCG, MRR and MAP for groups, accuracy and correlation for pairs.

A tie never helps a model: among documents of equal score the ones with the lower grade come first, so that a model that
scores everything alike gets the worst ranking and not a lucky one. Ties are counted. A document that nobody judged
counts as grade 0. Non-finite scores are refused, never ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ir_measures
import numpy as np
from ir_measures import AP, RR, nDCG

from halfrank.data.pairs import Group, Pair, place
from halfrank.errors import DataError, NonFiniteScoreError
from halfrank.predict import non_finite_rows

CUTOFF = 10  # ranks that nDCG and MRR look at


@dataclass(frozen=True)
class Report:
    """Metrics by name, the one that chooses between models, and what they rest on."""

    values: dict[str, float]
    primary: str
    count: int  # queries, or pairs
    ties: int = 0  # documents whose score equals that of another document of their query
    skipped: int = 0  # queries without any relevant document, which no ranking can get wrong

    @property
    def score(self) -> float:
        """The value of the primary metric."""
        return self.values[self.primary]


def evaluate_groups(groups: Sequence[Group], scores: np.ndarray, *, cutoff: int = CUTOFF) -> Report:
    """nDCG@k and MRR@k, k the `cutoff`, and MAP; `scores` (P,) lie in the order of the groups' documents.

    Raises NonFiniteScoreError for NaN or infinity, DataError when no group has a relevant document.
    """
    _refuse_non_finite(scores)
    per_query, skipped, ties = per_group(groups, scores, cutoff=cutoff)
    primary = f"ndcg@{cutoff}"
    if not per_query[primary]:
        raise DataError(
            "No query has a relevant document: there is nothing to evaluate. Grades above 0 mark relevance."
        )
    values = {name: float(np.mean(list(found.values()))) for name, found in per_query.items()}
    return Report(values, primary, len(per_query[primary]), ties, skipped)


def per_group(
    groups: Sequence[Group], scores: np.ndarray, *, cutoff: int = CUTOFF
) -> tuple[dict[str, dict[int, float]], int, int]:
    """Each metric by group number, the groups left out for want of a relevant document, and the tied documents."""
    if cutoff < 1:
        raise ValueError(f"A ranking is cut off after 1 document or more; got {cutoff}.")
    measures = {f"ndcg@{cutoff}": nDCG @ cutoff, f"mrr@{cutoff}": RR @ cutoff, "map": AP}
    qrels, run = [], []
    start = skipped = ties = 0
    for number, group in enumerate(groups):
        part = np.asarray(scores[start : start + len(group.documents)], dtype=np.float64)
        start += len(group.documents)
        grades = np.array([grade or 0.0 for grade in group.grades])
        ties += len(part) - int((np.unique(part, return_counts=True)[1] == 1).sum())
        if not (grades > 0).any():
            skipped += 1
            continue
        ranked = np.lexsort((grades, -part))
        for rank, index in enumerate(ranked):
            run.append(ir_measures.ScoredDoc(str(number), str(index), float(len(ranked) - rank)))
        qrels += [ir_measures.Qrel(str(number), str(i), _relevance(grade, group)) for i, grade in enumerate(grades)]
    found: dict[str, dict[int, float]] = {name: {} for name in measures}
    names = {measure: name for name, measure in measures.items()}
    for value in ir_measures.iter_calc(list(measures.values()), qrels, run) if qrels else ():
        found[names[value.measure]][int(value.query_id)] = float(value.value)
    return found, skipped, ties


def evaluate_pairs(pairs: Sequence[Pair], scores: np.ndarray) -> Report:
    """Metrics of labelled pairs; `scores` (P,), or (P, L) with one column a class.

    Labels of 0 and 1: accuracy at 0.5, F1 at 0.5 and average precision. Other numbers: Pearson and Spearman.
    Several columns: accuracy. Raises NonFiniteScoreError, and DataError for a pair without label.
    """
    _refuse_non_finite(scores)
    labels = np.array([_label(pair, row) for row, pair in enumerate(pairs)])
    if scores.ndim == 2 and scores.shape[1] > 1:
        return Report({"accuracy": float((scores.argmax(1) == labels).mean())}, "accuracy", len(pairs))
    flat = scores.reshape(-1).astype(np.float64)
    ties = len(flat) - int((np.unique(flat, return_counts=True)[1] == 1).sum())
    if set(np.unique(labels)) <= {0.0, 1.0}:
        return Report(_binary(labels > 0.5, flat), "average_precision", len(pairs), ties)
    if len(np.unique(labels)) < 2:
        raise DataError(f"Correlation needs at least two different labels; all {len(labels)} are {labels[0]:g}.")
    if len(np.unique(flat)) < 2:  # a collapsed model: it tells nothing about the labels
        return Report({"pearson": 0.0, "spearman": 0.0}, "spearman", len(pairs), ties)
    from scipy import stats  # half a second at import, for a number that rankings do not ask for

    values = {"pearson": float(stats.pearsonr(flat, labels)[0]), "spearman": float(stats.spearmanr(flat, labels)[0])}
    return Report(values, "spearman", len(pairs), ties)


def _binary(positive: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    chosen = scores > 0.5
    hits = int((chosen & positive).sum())
    wanted, taken = int(positive.sum()), int(chosen.sum())
    return {
        "accuracy": float((chosen == positive).mean()),
        "f1": 2 * hits / (wanted + taken) if wanted + taken else 0.0,
        "average_precision": _average_precision(positive, scores),
    }


def _average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    # Precision at each distinct score, weighted by the recall gained there: ties enter together.
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    gained = np.diff(np.concatenate([[0], hits[last]]))
    return float((gained * hits[last] / (last + 1)).sum() / max(int(positive.sum()), 1))


def _relevance(grade: float, group: Group) -> int:
    if grade != round(grade):
        raise DataError(f"{group.source or 'group'}: ranking metrics need whole grades; got {grade:g}.")
    return int(grade)


def _label(pair: Pair, row: int) -> float:
    if pair.label is None:
        raise DataError(f"{place(pair.source, row)}: evaluation needs a label for every pair.")
    return float(pair.label)


def _refuse_non_finite(scores: np.ndarray) -> None:
    bad = non_finite_rows(scores)
    if len(bad):
        raise NonFiniteScoreError(
            f"{len(bad)} scores are not finite, the first is {place('', int(bad[0]))}: no metric is computed from them."
        )
