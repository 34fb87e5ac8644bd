"""Training data before training: labels, lengths, repeated and contradicting pairs, leakage into the test data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from halfrank.data.pairs import Group
from halfrank.data.tokens import Tokens
from halfrank.doctor.report import Check

CUT_MANY = 0.25  # share of truncated pairs from which on a longer limit is worth a thought
UNBALANCED = 0.02


def describe(groups: Sequence[Group], tokens: Tokens, held_out: Sequence[Group]) -> dict[str, Any]:
    """Counts of what stands in the data."""
    rows = list(_rows(groups))
    labels = [label for _, _, label in rows if label is not None]
    test = {(_key(query), _key(document)) for query, document, _ in _rows(held_out)}
    train_queries = {_key(group.query) for group in groups}
    seen: dict[tuple[str, str], set[float | None]] = {}
    for query, document, label in rows:
        seen.setdefault((_key(query), _key(document)), set()).add(label)
    lengths = tokens.lengths
    return {
        "pairs": len(rows),
        "queries": len(groups),
        "labelled": len(labels),
        "labels": dict(Counter(labels).most_common(12)),
        "smallest_label": min(labels, default=None),
        "largest_label": max(labels, default=None),
        "tokens": {"median": float(np.median(lengths)), "longest": int(lengths.max()), "total": int(lengths.sum())},
        "truncated": tokens.truncated,
        "repeated": len(rows) - len(seen),
        "contradicting": sum(len(values) > 1 for values in seen.values()),
        "held_out_pairs": len(test),
        "leaked_pairs": len(test & seen.keys()),
        "leaked_queries": len({_key(group.query) for group in held_out} & train_queries),
        "single_grade_groups": sum(len(set(g.grades)) == 1 for g in groups if len(g.documents) > 1),
        "groups": sum(len(g.documents) > 1 for g in groups),
    }


def checks(facts: dict[str, Any], *, num_labels: int, max_length: int, grouped: bool) -> Iterator[Check]:
    """What is wrong with data that `describe` has counted."""
    pairs = facts["pairs"]
    if facts["labelled"] < pairs:
        yield Check(
            "labels", "fix", f"{pairs - facts['labelled']} of {pairs} pairs have no label.", "Label or drop them."
        )
    if facts["labelled"]:
        yield from _label_checks(facts, num_labels, grouped)
    if facts["contradicting"]:
        level = "fix" if facts["contradicting"] > 0.05 * pairs else "warn"
        yield Check(
            "contradictions",
            level,
            f"{facts['contradicting']} pairs stand there with different labels: no model can fit both.",
            "Keep one label for each pair.",
        )
    if facts["repeated"] > facts["contradicting"]:
        yield Check(
            "repetitions",
            "warn" if facts["repeated"] > 0.05 * pairs else "note",
            f"{facts['repeated']} of {pairs} pairs repeat another one: they count twice.",
            "Drop the copies, unless the weight is meant.",
        )
    cut = facts["truncated"]
    if cut:
        yield Check(
            "length",
            "warn" if cut > CUT_MANY * pairs else "note",
            f"{cut} of {pairs} pairs are longer than {max_length} tokens and are cut.",
            "Raise --max-length where the model allows it, or split the documents." if cut > CUT_MANY * pairs else "",
        )
    if facts["leaked_pairs"]:
        yield Check(
            "leakage",
            "fix",
            f"{facts['leaked_pairs']} of {facts['held_out_pairs']} held-out pairs stand in the training data: the "
            "evaluation measures memory.",
            "Take them out of one of the two.",
        )
    elif facts["leaked_queries"]:
        yield Check(
            "leakage",
            "warn",
            f"{facts['leaked_queries']} held-out queries stand in the training data with other documents.",
            "Split by query.",
        )


def _label_checks(facts: dict[str, Any], num_labels: int, grouped: bool) -> Iterator[Check]:
    low, high, counts = facts["smallest_label"], facts["largest_label"], facts["labels"]
    if low == high:
        yield Check(
            "labels",
            "fix",
            f"Every label is {low:g}: there is nothing to tell apart.",
            "Add pairs of the other kind (hard negatives for a reranker).",
        )
    elif grouped and facts["groups"] and facts["single_grade_groups"]:
        alike = facts["single_grade_groups"]
        yield Check(
            "labels",
            "fix" if alike == facts["groups"] else "warn",
            f"{alike} of {facts['groups']} groups hold documents of one grade: ranking losses learn nothing there.",
            "Grade them or drop them.",
        )
    if num_labels > 1:
        wrong = [label for label in counts if label != round(label) or not 0 <= label < num_labels]
        if wrong:
            yield Check(
                "labels",
                "fix",
                f"Labels such as {wrong[0]:g} are no class of a model with {num_labels} labels.",
                f"Use whole numbers from 0 to {num_labels - 1}.",
            )
    elif not grouped and (low < 0 or high > 1):
        yield Check(
            "labels",
            "fix",
            f"Labels run from {low:g} to {high:g}; the usual loss of single pairs, bce, takes 0 to 1.",
            "Divide them by their largest, or train with --loss mse.",
        )
    share = min(counts.values()) / facts["labelled"] if len(counts) == 2 else 1.0
    if share < UNBALANCED:
        yield Check("labels", "note", f"The rarer of two labels makes up {share:.1%} of the pairs.")


def _rows(groups: Sequence[Group]) -> Iterator[tuple[str, str, float | None]]:
    for group in groups:
        for document, grade in zip(group.documents, group.grades, strict=True):
            yield group.query, document, grade


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()
