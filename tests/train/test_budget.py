"""Memory that runs out halves the token budget and repeats the batch; other errors pass through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfrank.data.pairs import Pair
from halfrank.errors import TrainingError
from halfrank.memory import resident
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.train.budget import TokenBudget, is_memory
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from tiny import PAIRS, make_folder

LABELLED = [Pair(query, document, float(i % 2)) for i, (query, document) in enumerate(PAIRS)]


@pytest.fixture
def scorer(tmp_path: Path) -> Scorer:
    return folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32"))


def refusing_above(scorer: Scorer, monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Let passes over more than `tokens` tokens fail; the sizes of all passes."""
    plain, seen = scorer.logits, []

    def logits(batch):
        seen.append(sum(batch.lengths))
        if seen[-1] > tokens:
            torch.rand(3)  # what a pass drew before it failed must not matter
            raise error
        return plain(batch)

    monkeypatch.setattr(scorer, "logits", logits)
    return seen


def test_a_batch_is_repeated_with_half_the_budget_and_the_same_dropout(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    examples = from_pairs(LABELLED, scorer.pairs)
    start = {name: p.detach().clone() for name, p in scorer.model.named_parameters()}
    config = TrainConfig(steps=3, batch_size=8, lr=1e-3, max_tokens=100)
    wanted = train(scorer, examples, config)
    ended = [p.detach().clone() for p in scorer.model.parameters()]
    with torch.no_grad():
        for name, parameter in scorer.model.named_parameters():
            parameter.copy_(start[name])
    seen = refusing_above(scorer, monkeypatch, 100, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))
    larger = TrainConfig(steps=3, batch_size=8, lr=1e-3, max_tokens=400)
    found = train(scorer, examples, larger, out=tmp_path / "out")
    assert max(seen) > 100
    assert found.recovery.halvings == 2
    assert found.losses == wanted.losses
    assert all(torch.equal(a, b.detach()) for a, b in zip(ended, scorer.model.parameters(), strict=True))
    journal = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [line["max_tokens"] for line in journal if line.get("event") == "memory"] == [200, 100]


def test_after_three_halvings_the_run_stops_with_the_plan(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_above(scorer, monkeypatch, 0, MemoryError())
    with pytest.raises(TrainingError, match=r"at 50 tokens.*\nthe plan"):
        train(
            scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=1), budget=TokenBudget(400, plan="the plan")
        )


def test_a_limit_is_not_crossed(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = refusing_above(scorer, monkeypatch, 10**9, MemoryError())
    limit = resident() + 300 * 2**20
    budget = TokenBudget(400, limit=limit, bytes_per_token=2.0**20 * 2)  # 150 tokens fit, if little else is taken
    train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=1, batch_size=24), budget=budget)
    assert budget.halvings in (2, 3)
    assert max(seen) <= 100


def test_other_errors_pass_through(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_above(scorer, monkeypatch, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=1))


def test_what_the_processors_allocator_says_is_understood() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_memory(refused.value)
    assert not is_memory(ValueError("out of memory"))
