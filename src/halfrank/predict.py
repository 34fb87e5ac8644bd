"""Pairs to scores: the one inference path of the command line, of evaluation and of the public face.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from halfrank.data.packing import Batch, by_budget, pack
from halfrank.data.pairs import check_type
from halfrank.errors import NonFiniteScoreError
from halfrank.model.activation import activation_named
from halfrank.model.scorer import Scorer

DEFAULT_MAX_TOKENS = 4096  # tokens of one forward pass: longer rows fall out of a CPU cache and are slower


@dataclass(frozen=True)
class Scores:
    """Float32 scores (P, L) in the caller's order, always finite, and what had to be done for them."""

    values: np.ndarray
    truncated: int
    rescued: tuple[int, ...]  # rows scored again in float32 because the compute format overflowed

    def __len__(self) -> int:
        return len(self.values)


def predict(
    scorer: Scorer,
    pairs: Sequence[tuple[str, str]],
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score pairs; `activation` maps float32 logits (P, L), the model's own by default.

    `progress` is called with the number of pairs finished since the last call. Raises NonFiniteScoreError when a
    pair has no finite score even in float32, DataError for anything that is not text.
    """
    for row, (query, document) in enumerate(pairs):
        check_type(query, f"pair {row}")
        check_type(document, f"pair {row}")
    tokens = scorer.pairs.encode(pairs)
    logits = np.zeros((len(pairs), scorer.num_labels), dtype=np.float32)
    rescued: list[int] = []
    training = scorer.model.training
    scorer.model.eval()
    try:
        with torch.no_grad():
            for rows in by_budget(tokens.lengths, max_tokens):
                batch = pack(tokens, rows)
                values = scorer.logits(batch)
                bad = (~values.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
                if bad:
                    again = pack(tokens, [batch.rows[index] for index in bad])
                    values[_order(batch, again)] = _rescued_logits(scorer, again, pairs)
                    rescued += again.rows
                logits[batch.rows] = values.cpu().numpy()
                if progress is not None:
                    progress(len(rows))
    finally:
        scorer.model.train(training)
    function = activation or activation_named(scorer.activation)
    activated = function(torch.from_numpy(logits)) if len(pairs) else torch.from_numpy(logits)
    values_PL = activated.float().numpy()
    _refuse_non_finite(values_PL, pairs)
    return Scores(values_PL, tokens.truncated, tuple(sorted(rescued)))


def _order(batch: Batch, part: Batch) -> list[int]:
    where = {row: index for index, row in enumerate(batch.rows)}
    return [where[row] for row in part.rows]


def _rescued_logits(scorer: Scorer, batch: Batch, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Logits of the pairs that overflowed, in float32."""
    with scorer.computing_in("float32"):
        values = scorer.logits(batch)
        bad = (~values.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            module = _first_non_finite_module(scorer, batch)
            row = batch.rows[bad[0]]
            raise NonFiniteScoreError(
                f"{len(bad)} pairs have no finite score even in float32, the first is pair {row} "
                f"({pairs[row][0][:60]!r}, {pairs[row][1][:60]!r}); the first module that is not finite is '{module}'. "
                "The weights are damaged: load another copy of the model."
            )
    return values


def _first_non_finite_module(scorer: Scorer, batch: Batch) -> str:
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def look(_: nn.Module, __: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                found.append(name)

        return look

    leaves = [(name, m) for name, m in scorer.model.named_modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        scorer.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "attention"


def non_finite_rows(values: np.ndarray) -> np.ndarray:
    """Rows of `values`, of any shape (P, ...), that hold a number which is not finite."""
    axes = tuple(range(1, values.ndim))
    return np.flatnonzero(~np.isfinite(values).all(axis=axes))


def _refuse_non_finite(values_PL: np.ndarray, pairs: Sequence[tuple[str, str]]) -> None:
    bad = non_finite_rows(values_PL)
    if len(bad):
        row = int(bad[0])
        raise NonFiniteScoreError(
            f"The activation made {len(bad)} scores non-finite, the first is pair {row} ({pairs[row][0][:60]!r}). "
            "Its logits are finite: use another activation."
        )
