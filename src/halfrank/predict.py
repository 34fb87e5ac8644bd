"""Pairs to scores: the one inference path of the command line, of evaluation and of the public face.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from halfrank.data.ahead import ahead
from halfrank.data.branches import Branches, branched
from halfrank.data.packing import Batch, by_budget, pack
from halfrank.data.pairs import check_encodable, place
from halfrank.data.tokens import NONE, gathered
from halfrank.diagnosis.islands import ahead_of, find_islands
from halfrank.diagnosis.replay import explain_scores
from halfrank.errors import NonFiniteScoreError
from halfrank.model.activation import activation_named
from halfrank.model.pace import USUAL, tokens_a_pass
from halfrank.model.scorer import Scorer

ISLAND_TOKENS = 1024  # tokens of the pairs that decide which modules become islands; at least one pair
ISLAND_ROUNDS = 3  # attempts before these pairs are computed in float32
WINDOW = 4096  # pairs that are sorted by length together; memory is flat in all others
AHEAD = 8  # batches that wait for their turn, 16 bytes a token


@dataclass(frozen=True)
class Scores:
    """Float32 scores (P, L) in the caller's order, always finite, and what had to be done for them."""

    values: np.ndarray
    truncated: int
    rescued: tuple[int, ...]  # rows scored again because the compute format overflowed
    islands: tuple[str, ...] = ()  # modules that compute in float32 from this call on, because of them

    def __len__(self) -> int:
        return len(self.values)


def predict(
    scorer: Scorer,
    pairs: Sequence[tuple[str, str]],
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
    instruction: str | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
    sources: Sequence[str] = (),
) -> Scores:
    """Score pairs; `activation` maps float32 logits (P, L), `instruction` is what the model is told about its task.

    Both are the model's own by default. Pairs that are equal are scored once. `max_tokens` go through one forward pass,
    when not given as many as are fastest on this machine.

    `progress` is called with the number of pairs finished since the last call; `sources` say where each pair comes
    from, in messages. Raises NonFiniteScoreError when a pair has no finite score even in float32, DataError for
    anything that is not text.
    """
    given = _Given(pairs, sources)
    for row, pair in enumerate(pairs):
        where = given.place(row)
        for text in pair:
            check_encodable(text, where)
    own, first_P, place_P = _distinct(pairs)
    copies = np.bincount(place_P, minlength=len(own))
    share = len({query for query, _ in own}) < len(own) and scorer.branches
    logits = np.zeros((len(own), scorer.num_labels), dtype=np.float32)
    truncated, rescued = 0, np.zeros(len(own), dtype=bool)
    islands: tuple[str, ...] = ()
    training = scorer.model.training
    scorer.model.eval()
    try:
        budget = tokens_a_pass(scorer, _expected(own, scorer.max_length)) if max_tokens is None else max_tokens
        packed = _packed(scorer, own, share=share, instruction=instruction, max_tokens=budget)
        with torch.no_grad(), ahead(packed, depth=AHEAD) as ready:
            for batch, rows, cut in ready:
                values = scorer.logits(batch)
                bad = (~values.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
                if bad:
                    again = replace(batch.select(bad), rows=first_P[rows[bad]].tolist())
                    values[bad], added = _rescued_logits(scorer, again, given)
                    rescued[rows[bad]] = True
                    islands += added
                logits[rows] = values.cpu().numpy()
                truncated += int(copies[cut].sum())
                if progress is not None:
                    progress(int(copies[rows].sum()))
    finally:
        scorer.model.train(training)
    function = activation or activation_named(scorer.activation)
    logits_PL = logits[place_P]
    activated = function(torch.from_numpy(logits_PL)) if len(pairs) else torch.from_numpy(logits_PL)
    values_PL = activated.float().numpy()
    _refuse_non_finite(values_PL, given)
    return Scores(values_PL, truncated, tuple(np.flatnonzero(rescued[place_P]).tolist()), islands)


@dataclass(frozen=True)
class _Given:
    """The pairs of a call and, where it is known, where each comes from."""

    pairs: Sequence[tuple[str, str]]
    sources: Sequence[str]

    def source(self, row: int) -> str:
        return self.sources[row] if self.sources else ""

    def place(self, row: int) -> str:
        return place(self.source(row), row)

    def named(self, row: int) -> str:
        query, document = self.pairs[row]
        return f"{self.place(row)} ({query[:60]!r}, {document[:60]!r})"


def _expected(pairs: Sequence[tuple[str, str]], max_length: int) -> int:
    """About how many tokens pairs have, at four letters a token."""
    return sum(min((len(query) + len(document)) // 4, max_length) for query, document in pairs)


def _distinct(pairs: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    """Each pair once, where it comes first, and of each of `pairs` its place among them."""
    places: dict[tuple[str, str], int] = {}
    place_P = np.array([places.setdefault((a, b), len(places)) for a, b in pairs], dtype=np.int64)
    return list(places), np.unique(place_P, return_index=True)[1], place_P


def _packed(
    scorer: Scorer, pairs: list[tuple[str, str]], *, share: bool, instruction: str | None, max_tokens: int
) -> Iterator[tuple[Batch | Branches, np.ndarray, np.ndarray]]:
    """Batches, the rows of their pairs, and the rows that were cut, counted once; some pairs are looked at at a time.

    The first batches come when a few pairs have tokens: the rest get theirs while these are computed.
    """
    done = 0
    for tokens in gathered(scorer.pairs.stream(pairs, instruction=instruction), WINDOW):
        rows, cut = done + np.arange(len(tokens)), done + tokens.cut
        if share:
            queries = [query for query, _ in pairs[done : done + len(tokens)]]
            batches: Iterable[Batch | Branches] = branched(
                tokens, _alike(queries), max_tokens, pad=scorer.config.pad_token_id
            )
        else:
            batches = (pack(tokens, chosen) for chosen in by_budget(tokens.lengths, max_tokens))
        for batch in batches:
            yield batch, rows[batch.rows], cut
            cut = NONE
        done += len(tokens)


def _alike(queries: Sequence[str]) -> list[list[int]]:
    """The places of each query."""
    places: dict[str, list[int]] = {}
    for index, query in enumerate(queries):
        places.setdefault(query, []).append(index)
    return list(places.values())


@torch.no_grad()
def raw_logits(
    scorer: Scorer,
    texts: Sequence[tuple[str, str]],
    *,
    exact: bool = False,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Float32 logits (P, L) in the caller's order, with nothing rescued: what is not finite stays so.

    `exact`: 16-bit weights count together with the residuals that training keeps beside them.
    """
    tokens = scorer.pairs.encode(texts)
    logits_PL = np.zeros((len(tokens), scorer.num_labels), dtype=np.float32)
    training = scorer.model.training
    scorer.model.eval()
    for module in scorer.model.modules():
        if exact and type(module) in (nn.Linear, nn.Embedding):
            module.training = True  # their products take residuals in training; nothing else of theirs changes
    try:
        for rows in by_budget(tokens.lengths, USUAL):
            batch = pack(tokens, rows)
            logits_PL[batch.rows] = scorer.logits(batch).cpu().numpy()
            if progress is not None:
                progress(len(rows))
    finally:
        scorer.model.train(training)
    return logits_PL


def merged(parts: Sequence[Scores]) -> Scores:
    """The scores of neighbouring pieces of one list as those of the whole."""
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return Scores(
        np.concatenate([part.values for part in parts]),
        sum(part.truncated for part in parts),
        tuple(int(start) + row for start, part in zip(starts, parts, strict=False) for row in part.rescued),
        tuple(dict.fromkeys(name for part in parts for name in part.islands)),
    )


def _rescued_logits(scorer: Scorer, batch: Batch, given: _Given) -> tuple[Tensor, tuple[str, ...]]:
    """Logits of pairs that overflowed, and the islands that they needed and that the scorer keeps.

    Where islands are not enough these pairs are computed in float32.
    """
    if scorer.engine is not None:
        raise NonFiniteScoreError(
            f"{_pairs(len(batch.rows))} have no finite score in {scorer.engine.name}, the first is "
            f"{given.named(batch.rows[0])}. Score with backend='torch', which says why."
        )
    added: tuple[str, ...] = ()
    for _ in range(ISLAND_ROUNDS):
        sample = _first(batch, range(len(batch.rows)))
        found = find_islands(scorer, partial(scorer.logits, sample))
        if not (found.finite and found.islands):
            break
        named = (*found.islands, *ahead_of(scorer.model, found.islands))
        scorer.widen(named)
        added += named
        values = scorer.logits(batch)
        if bool(values.isfinite().all()):
            more = ", ..." if len(added) > 3 else ""
            scorer.note(
                f"{_pairs(len(batch.rows))} not finite in {scorer.active_compute.name}: {len(added)} modules are "
                f"float32 from now on, in a saved folder too ({', '.join(added[:3])}{more})."
            )
            return values, added
    with scorer.computing_in("float32"):
        values = scorer.logits(batch)
        bad = (~values.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            finding = explain_scores(scorer, _first(batch, bad), source_of=given.source)
            raise NonFiniteScoreError(
                f"{_pairs(len(bad))} have no finite score even in float32, the first is "
                f"{given.named(batch.rows[bad[0]])}. {finding or 'Load another copy of the model.'}"
            )
    return values, added


def _first(batch: Batch, chosen: Sequence[int]) -> Batch:
    """Some of the `chosen` pairs: what finds the modules that overflow need not be all that did."""
    ends = np.cumsum([batch.lengths[index] for index in chosen])
    return batch.select(chosen[: max(int((ends <= ISLAND_TOKENS).sum()), 1)])


def _pairs(count: int) -> str:
    return f"{count} pair" + ("" if count == 1 else "s")


def non_finite_rows(values: np.ndarray) -> np.ndarray:
    """Rows of `values`, of any shape (P, ...), that hold a number which is not finite."""
    axes = tuple(range(1, values.ndim))
    return np.flatnonzero(~np.isfinite(values).all(axis=axes))


def _refuse_non_finite(values_PL: np.ndarray, given: _Given) -> None:
    bad = non_finite_rows(values_PL)
    if len(bad):
        raise NonFiniteScoreError(
            f"The activation made {len(bad)} scores non-finite, the first is {given.named(int(bad[0]))}. "
            "Its logits are finite: use another activation."
        )
