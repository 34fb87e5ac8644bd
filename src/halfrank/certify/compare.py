"""A narrow copy against its float32 reference: both read, both scored, every difference named.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfrank.certify import facts, weights
from halfrank.certify.budget import Budget, budget_for
from halfrank.certify.certificate import Certificate, Measured, Reason, hashes, texts_hash
from halfrank.certify.scores import Agreement, agreement
from halfrank.data.packing import pack
from halfrank.data.pairs import Group
from halfrank.diagnosis.islands import find_islands
from halfrank.diagnosis.ranges import Range, headroom_bits, measure
from halfrank.errors import ModelError, NonFiniteWeightError
from halfrank.model import adapters, folder
from halfrank.model.activation import activation_named
from halfrank.model.families import head_modules
from halfrank.model.scorer import Scorer
from halfrank.model.storage import within
from halfrank.numerics.formats import dtype_name
from halfrank.precision import COMPUTES, compute_named
from halfrank.predict import raw_logits

INVARIANCE_PAIRS = 12
REPAIR_PAIRS = 128  # islands are searched for on so many, and judged on all
NAMED = 6  # modules that a message names
Progress = Callable[[int], None]


def certify(
    path: str | Path,
    reference: str | Path,
    groups: Sequence[Group],
    *,
    limits: Mapping[str, float | int | None] | None = None,
    copied: bool = True,
    computes: Sequence[str] | None = None,
    data_name: str = "built-in texts",
    repair: bool = False,
    progress: Progress | None = None,
) -> tuple[Certificate, Scorer | None]:
    """Compare the folder `path` with its `reference` on `groups`; the copy's scorer too, None where it cannot be read.

    `limits` change fields of the storage format's usual Budget; without `copied` weights are not compared. `computes`
    are the formats to compute in, float32 and the emulated storage format by default. With `repair`, modules that leave
    the range of a compute format become islands of the returned scorer, and it is compared again.
    """
    for name in computes or ():
        if name not in COMPUTES:
            raise ValueError(f"compute must be one of {', '.join(COMPUTES)}; got {name!r}.")
    wide = folder.load(reference, folder.LoadOptions(compute="float32"))
    if wide.untrained_head:
        raise ModelError(
            f"The reference '{reference}' has no trained score head: there are no scores to compare with. "
            "Give the cross-encoder that the copy was made of."
        )
    if wide.adapters is not None:
        adapters.merge(wide)  # the copy is of the model that base and adapters are together
    budget = budget_for(wide.precision.storage, limits, copied=copied)
    facts_of_data = describe_data(groups, data_name)
    try:
        copy = folder.load(path, folder.LoadOptions(compute="float32"))
    except NonFiniteWeightError as error:
        return _unread(
            path, wide, reference, facts_of_data, budget, Reason("non-finite-weights", str(path), str(error))
        ), None
    except ModelError as error:
        return _unread(path, wide, reference, facts_of_data, budget, Reason("unreadable", str(path), str(error))), None
    if copy.adapters is not None:
        raise ModelError(
            f"'{path}' holds adapters (LoRA), which are no copy of a model. Merge them (halfrank export '{path}' "
            f"--dtype float16 --out MERGED), and certify that with --reference '{path}'."
        )
    budget = budget_for(copy.precision.storage, limits, copied=copied)
    texts = [text for group in groups for text in group.texts]
    reasons = list(facts.differing(wide, copy, (str(reference), str(path)), texts))
    reasons += weight_reasons(wide.model.state_dict(), copy.model.state_dict(), copy.precision.storage, budget)
    names = list(computes or usual_computes(copy.precision.storage))
    measured: tuple[Measured, ...] = ()
    invariance: dict[str, float | None] = {}
    more: list[Reason] = []
    if copy.num_labels == wide.num_labels:  # else there is nothing to compare, and the reasons say so already
        comparison = Comparison(wide, groups, budget, progress)
        measured, invariance, more = comparison.of(copy, names)
    if repair and (found := _islands(copy, texts[:REPAIR_PAIRS], measured)):
        copy.widen(found)
        measured, invariance, more = comparison.of(copy, names)
        reasons = [reason for reason in reasons if reason.cause != "islands"]
    certificate = Certificate(
        describe_model(copy, Path(path)),
        describe_model(wide, Path(reference)),
        facts_of_data,
        measured,
        invariance,
        asdict(budget),
        (*reasons, *more),
    )
    return certificate, copy


def usual_computes(storage: torch.dtype) -> tuple[str, ...]:
    """Float32, and what a device that computes in the storage format would do."""
    return ("float32",) if storage is torch.float32 else ("float32", f"emulated-{dtype_name(storage)}")


class Comparison:
    """The reference's scores on some groups, and what copies make of the same groups."""

    def __init__(
        self, reference: Scorer, groups: Sequence[Group], budget: Budget, progress: Progress | None = None
    ) -> None:
        self._groups, self._budget, self._progress = groups, budget, progress
        self._texts = [text for group in groups for text in group.texts]
        self._activation = activation_named(reference.activation)
        with reference.computing_in("float32"):
            self._wanted_PL = raw_logits(reference, self._texts, exact=True, progress=progress)
        if not np.isfinite(self._wanted_PL).all():
            raise ModelError("The reference itself gives scores that are not finite: nothing can be compared with it.")

    def of(
        self, copy: Scorer, computes: Sequence[str], *, invariance: bool = True
    ) -> tuple[tuple[Measured, ...], dict[str, float | None], list[Reason]]:
        """What `copy` does in each format, its invariance in float32, and the reasons against it."""
        reasons: list[Reason] = []
        measured = []
        for name in computes:
            found, agreed = self._measure(copy, name)
            measured.append(found)
            reasons += list(_verdict(found, agreed, self._budget))
        changes = invariance_of(copy, self._texts[:INVARIANCE_PAIRS]) if invariance else {}
        for name, error in changes.items():
            if error is not None and not error <= self._budget.max_invariance_error:
                text = (
                    f"The same pair scores differently by {error:.2g} of the largest logit when it is batched with "
                    "others: " + ("padding is read as text." if name == "padding" else "pairs see each other.")
                )
                reasons.append(Reason("invariance", name, text))
        return tuple(measured), changes, reasons

    def _measure(self, copy: Scorer, compute: str) -> tuple[Measured, Agreement]:
        started = time.perf_counter()
        found_PL = np.zeros(0, np.float32)

        def run() -> None:
            nonlocal found_PL
            found_PL = raw_logits(copy, self._texts, progress=self._progress)

        with copy.computing_in(compute):
            ranges = measure(copy.model, run)
        seconds = time.perf_counter() - started
        wanted, found = (self._activated(values) for values in (self._wanted_PL, found_PL))
        agreed = agreement(
            wanted, found, (self._wanted_PL, found_PL), self._groups, allowed=self._budget.max_score_error
        )
        narrow = compute_named(compute).narrow or copy.precision.storage
        bits, module, beyond = _tightest(ranges, narrow, copy)
        return Measured(
            compute, asdict(agreed) | {"ndcg_loss": agreed.ndcg_loss}, bits, module, beyond, seconds
        ), agreed

    def _activated(self, logits_PL: np.ndarray) -> np.ndarray:
        return self._activation(torch.from_numpy(logits_PL)).float().numpy()


@torch.no_grad()
def invariance_of(scorer: Scorer, texts: Sequence[tuple[str, str]]) -> dict[str, float | None]:
    """Largest change of a float32 logit, in parts of the largest: batched with others, and padded as callers pad.

    None where it does not apply: a class that reads padding is never padded here, a graph always is.
    """
    with scorer.computing_in("float32"):
        together = raw_logits(scorer, texts)
        alone = np.concatenate([raw_logits(scorer, [text]) for text in texts])
        padded = _padded(scorer, texts) if scorer.pads and scorer.engine is None else None
    largest = max(float(np.abs(alone).max()), 1e-3)
    return {
        "composition": float(np.abs(together - alone).max()) / largest,
        "padding": None if padded is None else float(np.abs(padded - alone).max()) / largest,
    }


def _padded(scorer: Scorer, texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """Logits by the way that plain transformers code takes: padded rows and a mask through the model's own forward."""
    batch = pack(scorer.pairs.encode(texts), range(len(texts))).to(scorer.device)
    logits_PL = np.zeros((len(texts), scorer.num_labels), dtype=np.float32)
    logits_PL[batch.rows] = scorer.model(**scorer.padded_inputs(batch)).logits.float().cpu().numpy()
    return logits_PL


def weight_reasons(
    reference: Mapping[str, Tensor], copy: Mapping[str, Tensor], storage: torch.dtype, budget: Budget
) -> Iterator[Reason]:
    """Tensors of the copy that are not the reference's, rounded to `storage`."""
    if budget.max_weight_ulps is None:
        return
    absent = weights.missing(reference, copy)
    if absent:
        yield Reason(
            "weights-missing",
            absent[0],
            f"{len(absent)} tensors are missing, new or of another shape: {_listed(absent)}.",
        )
    shared = ((name, tensor, copy[name]) for name, tensor in reference.items() if name in copy and name not in absent)
    found = list(weights.differences(shared, storage, allowed_ulps=budget.max_weight_ulps))
    for cause in dict.fromkeys(difference.cause for difference in found):
        told = [difference for difference in found if difference.cause == cause]
        rest = f", and {len(told) - 1} more tensors ({_listed([d.name for d in told[1:]])})" if told[1:] else ""
        again = f"Make the copy again: halfrank export REFERENCE --dtype {dtype_name(storage)}."
        yield Reason(cause, told[0].name, f"{told[0]}{rest}. {again}")


def describe_model(scorer: Scorer, path: Path) -> dict[str, Any]:
    """Name, storage, islands and hashes of a folder."""
    return {
        "name": path.absolute().name if path.exists() else str(path),
        "storage": dtype_name(scorer.precision.storage),
        "islands": list(scorer.islands),
        "sha256": hashes(path) if path.is_dir() else {},
    }


def describe_data(groups: Sequence[Group], name: str) -> dict[str, Any]:
    """Name, size and hash of what a certificate was measured on."""
    texts = [text for group in groups for text in group.texts]
    return {"name": name, "sha256": texts_hash(texts), "pairs": len(texts), "queries": len(groups)}


def _unread(
    path: str | Path, wide: Scorer, reference: str | Path, data: dict[str, Any], budget: Budget, reason: Reason
) -> Certificate:
    place = Path(path)
    model = {"name": place.name, "storage": "unknown", "islands": [], "sha256": hashes(place) if place.is_dir() else {}}
    return Certificate(model, describe_model(wide, Path(reference)), data, (), {}, asdict(budget), (reason,))


def _tightest(ranges: Mapping[str, Range], narrow: torch.dtype, copy: Scorer) -> tuple[float, str, tuple[str, ...]]:
    """The smallest headroom outside islands and head, its module, and every module out of range."""
    wide = {*head_modules(copy.model), *copy.islands}
    bits = {n: headroom_bits(seen.largest, narrow) for n, seen in ranges.items() if not within(n, wide)}
    if not bits:
        return float("inf"), "", ()
    module = min(bits, key=lambda name: bits[name])
    return bits[module], module, tuple(name for name, left in bits.items() if left < 0)


def _islands(copy: Scorer, texts: Sequence[tuple[str, str]], measured: Sequence[Measured]) -> list[str]:
    """Modules whose float32 keeps the formats in range in which something left it."""
    found: list[str] = []
    for compute in (m.compute for m in measured if m.beyond or m.values["non_finite"]):
        with copy.computing_in(compute):
            found += find_islands(copy, lambda: torch.from_numpy(raw_logits(copy, texts))).islands
    return list(dict.fromkeys(found))


def _verdict(m: Measured, agreed: Agreement, budget: Budget) -> Iterator[Reason]:
    narrow = compute_named(m.compute).narrow
    if narrow is not None and m.beyond:
        yield Reason(
            "overflow",
            m.beyond[0],
            f"In {m.compute} {len(m.beyond)} modules leave the range of {dtype_name(narrow)}: {_listed(m.beyond)}. "
            "Keep them in float32 (halfrank certify --repair, or scorer.widen), or store bfloat16.",
        )
    elif narrow is not None and m.headroom_bits is not None and m.headroom_bits < budget.min_headroom_bits:
        yield Reason(
            "headroom",
            m.headroom_module,
            f"In {m.compute} only {m.headroom_bits:.1f} bits are left; {budget.min_headroom_bits:g} are asked for.",
        )
    if agreed.non_finite:
        yield Reason("non-finite-scores", m.compute, f"{agreed.non_finite} pairs have no finite score in {m.compute}.")
    limits = [
        ("score-error", "largest score error", agreed.max_score_error, budget.max_score_error, 1),
        ("score-error", "mean score error", agreed.mean_score_error, budget.max_mean_score_error, 1),
        ("rank-changes", "Kendall tau", agreed.clear_kendall_tau, budget.min_kendall_tau, -1),
        ("rank-changes", "top-10 overlap", agreed.clear_top10_overlap, budget.min_top10_overlap, -1),
        ("rank-changes", "loss of nDCG@10", agreed.ndcg_loss, budget.max_ndcg_loss, 1),
        ("new-ties", "number of new ties", agreed.new_ties, budget.max_new_ties, 1),
    ]
    for cause, what, value, limit, sign in limits:
        if value is not None and limit is not None and sign * value > sign * limit:
            word = "above" if sign > 0 else "below"
            yield Reason(cause, m.compute, f"In {m.compute} the {what} is {value:.4g}, {word} the budget of {limit:g}.")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:NAMED]) + more
