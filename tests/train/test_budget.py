"""Memory that runs out halves the token budget and repeats the batch; other errors pass through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfrank.allocator import Kept, resident
from halfrank.data.pairs import Pair
from halfrank.errors import MemoryExhaustedError, MemoryLimitError, TrainingError, is_refusal
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.train.budget import TokenBudget
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs, micro_batches
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
    seen = refusing_above(scorer, monkeypatch, 60, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))
    plain = TrainConfig(steps=3, batch_size=8, lr=1e-3)  # its budget is far above what any batch has
    found = train(scorer, examples, plain, out=tmp_path / "out")
    ended = [p.detach().clone() for p in scorer.model.parameters()]
    journal = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    budgets = [line["max_tokens"] for line in journal if line.get("event") == "memory"]
    assert budgets[0] == seen[0] // 2 < 16384 // 2  # each halving makes the pass shorter that was refused
    assert found.recovery.halvings == len(budgets) == len([tokens for tokens in seen if tokens > 60])
    assert found.recovery.pass_tokens == budgets[-1]
    with torch.no_grad():
        for name, parameter in scorer.model.named_parameters():
            parameter.copy_(start[name])
    wanted = train(scorer, examples, TrainConfig(steps=3, batch_size=8, lr=1e-3, max_tokens=budgets[-1]))
    assert found.losses == wanted.losses
    assert all(torch.equal(a, b.detach()) for a, b in zip(ended, scorer.model.parameters(), strict=True))


def test_after_three_halvings_the_run_stops_with_the_plan_and_goes_on_later(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    examples, out = from_pairs(LABELLED, scorer.pairs), tmp_path / "out"
    config = TrainConfig(steps=4, batch_size=8, lr=1e-3)
    start = {name: p.detach().clone() for name, p in scorer.model.named_parameters()}
    plain, begun = scorer.logits, 0

    def logits(batch):
        nonlocal begun
        begun += 1
        if begun > 2:
            raise MemoryError
        return plain(batch)

    monkeypatch.setattr(scorer, "logits", logits)
    with pytest.raises(MemoryExhaustedError, match=r"at \d\d tokens.*model of step 2.*saved.*\nthe plan") as stopped:
        train(scorer, examples, config, out=out, budget=TokenBudget(400, plan="the plan"))
    assert isinstance(stopped.value, TrainingError)
    saved = folder.load(out).model.state_dict()
    assert all(torch.equal(saved[name], p) for name, p in scorer.model.state_dict().items())
    assert not torch.equal(saved["classifier.weight"], start["classifier.weight"])
    longest: list[int] = []

    def noted(batch):
        longest.append(sum(batch.lengths))
        return plain(batch)

    monkeypatch.setattr(scorer, "logits", noted)
    found = train(scorer, examples, config, out=out, resume=True, budget=TokenBudget(400))
    assert (found.recovery.halvings, found.steps, len(found.losses)) == (3, 4, 2)
    assert found.recovery.pass_tokens < 50
    assert max(longest) < 50  # or one pair
    assert all(bool(p.isfinite().all()) for p in scorer.model.parameters())


@pytest.mark.parametrize("released", [False, True])
def test_a_batch_that_fails_in_its_last_micro_batch_is_repeated_whole(released: bool, tmp_path: Path) -> None:
    # Gradients of the micro-batches before are there already: they must not be counted twice.
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    scorer = folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32", config=still))
    examples = from_pairs(LABELLED, scorer.pairs)
    start = {name: p.detach().clone() for name, p in scorer.model.named_parameters()}
    ends, calls = [], 0

    def refuse(gradient: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == (2 if released else 4):  # in the second step: the words' gradient is the last of each pass
            raise MemoryError

    for fails in (False, True):
        with torch.no_grad():
            for name, parameter in scorer.model.named_parameters():
                parameter.copy_(start[name])
        config = TrainConfig(
            steps=3, batch_size=8, lr=1e-3, max_tokens=100 if not fails else 200, release_gradients=released
        )
        words = scorer.model.get_input_embeddings().weight
        handle = words.register_hook(refuse) if fails else None
        result = train(scorer, examples, config)
        ends.append([p.detach().clone() for p in scorer.model.parameters()])
        if handle is not None:
            handle.remove()
            assert result.recovery.halvings == 1
    assert calls > 4
    wanted = torch.cat([t.flatten() for t in ends[0]])
    found = torch.cat([t.flatten() for t in ends[1]])
    moved = torch.cat([t.flatten() for t in start.values()]) - wanted
    assert float((found - wanted).norm() / moved.norm()) < 1e-3  # an Adam step of a gradient counted twice is 0.1 off


def test_a_limit_is_not_crossed(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = refusing_above(scorer, monkeypatch, 10**9, MemoryError())
    limit = resident() + 300 * 2**20
    budget = TokenBudget(400, limit=limit, bytes_per_token=2.0**20 * 2)  # 150 tokens fit, if little else is taken
    train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=1, batch_size=24), budget=budget)
    assert budget.halvings in (2, 3)
    assert max(seen) <= 100


def test_beside_one_of_several_passes_lie_the_gradients_of_those_before(scorer: Scorer) -> None:
    examples = from_pairs(LABELLED, scorer.pairs)
    one, several = (
        micro_batches(examples, list(range(8)), max_tokens=tokens, per_unit=False) for tokens in (10**6, 40)
    )
    assert len(one) == 1 < len(several)
    limit = resident() + 2**30
    budget = TokenBudget(10**6, limit=limit, bytes_per_token=1.0, activations_per_token=1.0, gradients=2**31)
    budget.check(one)
    with pytest.raises(MemoryLimitError, match="are left"):
        budget.check(several)


def test_a_run_goes_on_with_what_its_checkpoint_says() -> None:
    budget = TokenBudget(400)
    budget.go_on(0, 0)  # memory never ran out
    assert (budget.tokens, budget.halvings) == (400, 0)
    budget.go_on(2, 0)  # a checkpoint of before tokens were written into it
    assert budget.tokens == 400
    budget.go_on(2, 60)
    assert (budget.tokens, budget.halvings) == (60, 2)


def test_other_errors_pass_through(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_above(scorer, monkeypatch, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=1))


def test_what_the_processors_allocator_says_is_understood() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_refusal(refused.value)
    assert not is_refusal(ValueError("out of memory"))


@pytest.mark.parametrize("told", [True, False])
def test_freed_memory_is_kept_where_there_is_room_until_it_has_grown(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for place in ("train.budget.reusing_allocator", "train.budget.steady_allocator", "train.budget.give_back",
                  "allocator.give_back"):  # fmt: skip
        monkeypatch.setattr(f"halfrank.{place}", lambda name=place.rpartition(".")[2]: done.append(name))
    monkeypatch.setattr("halfrank.allocator.HOLES", 0)
    # After the first step, which makes what stays, 80 of 180 are free, or given back; three steps settle at 200.
    held = iter([180, *([] if told else [100]), 150, 190, 200, 219, 221, 120, 130, 140, 220, 240, 241, 120, 500])
    monkeypatch.setattr("halfrank.allocator.resident", lambda: next(held))
    monkeypatch.setattr("halfrank.allocator.free_in_heap", lambda: 80 if told else None)
    scorer = SimpleNamespace(device=torch.device("cpu"))
    tight, roomy = TokenBudget(400, roomy=False), TokenBudget(400)

    def steps(budget: TokenBudget, count: int) -> None:
        for _ in range(count):
            budget.run(scorer, lambda tokens: tokens, lambda record: None)  # type: ignore[arg-type]

    for budget in (tight, roomy):
        budget.begin()
        steps(budget, 1)
    assert done == ["steady_allocator", "reusing_allocator", *([] if told else ["give_back"])]
    done[2:] = ["give_back"]
    steps(roomy, 4)
    assert done[3:] == []
    steps(roomy, 1)  # 121 above the 100 that are left, more than 1.2 times the 100 that steps took
    assert done[3:] == ["give_back"]
    steps(roomy, 4)
    assert done[4:] == []
    steps(roomy, 1)  # 121 above 120
    assert done[4:] == ["give_back"]
    for budget in (tight, roomy):
        budget.end()
    assert done[5:] == ["give_back"]
    roomy.halve()
    steps(roomy, 3)
    roomy.end()
    assert done[6:] == ["steady_allocator", "give_back"]
    assert list(held) == [500]  # nobody asks once nothing is kept


def test_what_a_longer_batch_takes_is_no_hole(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = from_pairs(LABELLED, scorer.pairs)
    lengths = examples.tokens.lengths.tolist()
    few, many = min(lengths), max(lengths)
    short, long = (
        micro_batches(examples, [lengths.index(length)], max_tokens=400, per_unit=False) for length in (few, many)
    )
    monkeypatch.setattr("halfrank.allocator.HOLES", 0)
    most = 400 + 1.2 * 600 * many / few
    held = iter([800, 900, 900, 1000, most - 1, most - 1, most + 1, 400])
    monkeypatch.setattr("halfrank.allocator.free_in_heap", lambda: 400)
    done: list[str] = []
    monkeypatch.setattr("halfrank.allocator.give_back", lambda: done.append("give_back"))
    monkeypatch.setattr("halfrank.allocator.resident", lambda: next(held))
    budget = TokenBudget(400)
    for number, parts in enumerate([short, short, short, short, long, short, short]):
        budget.check(parts)
        budget.run(scorer, lambda tokens: tokens, lambda record: None)
        assert len(done) == (number == 6)


def test_a_few_holes_are_cheaper_than_giving_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    few = 2**23  # all that a tiny model's step takes is less
    held = iter([500, 150, 200, 200, 100 + few, 200 + few, 201 + few, 100])
    monkeypatch.setattr("halfrank.allocator.free_in_heap", lambda: 400)
    done: list[str] = []
    monkeypatch.setattr("halfrank.allocator.give_back", lambda: done.append("give_back"))
    monkeypatch.setattr("halfrank.allocator.resident", lambda: next(held))
    kept = Kept()
    for number in range(7):
        kept.after(1)
        assert len(done) == (0 if number < 6 else 1), number


def test_memory_that_is_only_kept_refuses_no_pass(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 2**30
    monkeypatch.setattr("halfrank.memory.resident", lambda: 2**28 + kept)

    def given_back() -> None:
        nonlocal kept
        kept = 0

    monkeypatch.setattr("halfrank.train.budget.give_back", given_back)
    parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(4), max_tokens=400, per_unit=False)
    tight = TokenBudget(400, limit=2**30, bytes_per_token=1.0, roomy=False)
    with pytest.raises(MemoryLimitError):
        tight.check(parts)
    TokenBudget(400, limit=2**30, bytes_per_token=1.0).check(parts)
    assert kept == 0


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_memory_that_is_kept_does_not_come_page_by_page() -> None:
    code = """
import resource, sys, torch
from halfrank import allocator
getattr(allocator, sys.argv[1])()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(20):
    before = faults()
    torch.ones(1 << 19)
print(faults() - before)
"""
    counts = [
        int(subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True).stdout)
        for name in ("steady_allocator", "reusing_allocator")
    ]
    assert counts[1] * 10 < counts[0]  # 2 MiB are 512 pages
