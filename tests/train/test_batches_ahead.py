"""Batches are packed beside the step before them: by a thread that ends with the run, whatever ends that."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfrank.data.pairs import Pair
from halfrank.data.tokens import Tokens
from halfrank.errors import DataError
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.train import loop
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, from_pairs, micro_batches
from halfrank.train.loop import train
from tiny import PAIRS, make_folder

LABELLED = [Pair(query, document, float(number % 2)) for number, (query, document) in enumerate(PAIRS)]


@pytest.fixture
def scorer(tmp_path: Path) -> Scorer:
    return folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32"))


def left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "halfrank-ahead"]


def test_the_next_batch_is_packed_while_this_one_is_trained_on(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, trained, waited = [], [], threading.Event()
    plain_step = loop.train_step

    def noted(examples: Examples, units: list[int], **others: Any) -> Any:
        packed.append((tuple(units), threading.current_thread() is threading.main_thread()))
        if len(packed) == 2:
            waited.set()
        return micro_batches(examples, units, **others)

    def step(*arguments: Any, **others: Any) -> Any:
        trained.append(waited.wait(20))  # in the first step: until the second batch is packed
        return plain_step(*arguments, **others)

    monkeypatch.setattr(loop, "micro_batches", noted)
    monkeypatch.setattr(loop, "train_step", step)
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(batch_size=4))
    assert result.steps == len(trained) == 6
    assert all(trained)
    assert len(packed) == 6
    assert not any(main for _, main in packed)
    assert not left()


class Failing:
    """Tokens whose file ends at the third batch."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self.taken = tokens, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)

    def __len__(self) -> int:
        return len(self._tokens)

    def take(self, rows: np.ndarray) -> Tokens:
        self.taken += threading.current_thread() is not threading.main_thread()
        if self.taken == 3:
            raise DataError("the file ends")
        return self._tokens.take(rows)


def test_an_error_of_packing_comes_in_its_place(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = from_pairs(LABELLED, scorer.pairs)
    steps = []
    plain = loop.train_step

    def step(*arguments: Any, **others: Any) -> Any:
        steps.append(plain(*arguments, **others))
        return steps[-1]

    monkeypatch.setattr(loop, "train_step", step)
    failing = Examples(Failing(examples.tokens), examples.labels, examples.units, False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the file ends"):
        train(scorer, failing, TrainConfig(batch_size=4))
    assert len(steps) == 2
    assert not left()


def test_a_failed_step_ends_the_thread(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(batch_size=4))
    assert not left()


def test_what_was_left_out_meanwhile_is_packed_again(scorer: Scorer) -> None:
    """A poisoned pair is found in the first step; later batches, packed before that, may not hold it."""
    bad = from_pairs([*LABELLED, *LABELLED], scorer.pairs)
    seen: list[int] = []

    def loss(scores: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        seen.append(len(labels))
        return (scores[:, 0] * torch.where(labels == 7.0, torch.inf, 1.0) - labels).square().mean()

    labels = bad.labels.clone()
    labels[5] = 7.0
    poisoned = Examples(bad.tokens, labels, bad.units, False)
    plan = [list(range(0, 8)), list(range(4, 12)), list(range(2, 10)), list(range(24, 32))]
    result = train(scorer, poisoned, TrainConfig(batch_size=8), loss=loss, plan=lambda epoch: plan)
    assert [record["row"] for record in result.recovery.quarantined] == [5]
    assert result.steps == 4
    assert seen[-3:] == [7, 7, 8]
