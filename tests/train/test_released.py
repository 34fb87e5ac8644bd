"""Gradients consumed as they arrive: the same bits as a run that keeps them, and never all of them at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfrank.data.pairs import Pair
from halfrank.losses import LOSSES
from halfrank.model import folder, storage
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.scaling import LossScale
from halfrank.numerics.watch import Watch
from halfrank.train.budget import TokenBudget
from halfrank.train.config import Limits, TrainConfig
from halfrank.train.examples import from_pairs, micro_batches
from halfrank.train.loop import TrainResult, make_optimizer, train
from halfrank.train.step import train_step
from tiny import PAIRS, SIZES, make_folder

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LABELLED = [Pair(query, document, float(i % 2)) for i, (query, document) in enumerate(PAIRS)]
BCE = LOSSES["bce"].function


def scorer_of(path: Path, dtype: torch.dtype) -> Scorer:
    return folder.load(path, folder.LoadOptions(dtype=dtype, compute="float32"))


def sparse_gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the tables whose gradients come as rows from here on."""
    found: list[torch.Size] = []
    made = torch.sparse_coo_tensor
    monkeypatch.setattr(torch, "sparse_coo_tensor", lambda *a, **k: found.append(a[2]) or made(*a, **k))
    return found


def bits(scorer: Scorer, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [v for p in scorer.model.parameters() for _, v in sorted(optimizer.state[p].items(), key=lambda kv: kv[0])]
    return [*(p.detach() for p in scorer.model.parameters()), *(v for v in state if isinstance(v, torch.Tensor))]


@pytest.mark.parametrize("family", sorted(SIZES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_a_run_that_keeps_its_gradients(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_folder(family, tmp_path / family)
    ends = []
    for released, checkpointing in ((False, False), (True, False), (True, True)):
        scorer = scorer_of(path, dtype)
        config = TrainConfig(
            steps=4, batch_size=8, lr=1e-3, clip=0.5, release_gradients=released, checkpointing=checkpointing
        )
        examples = from_pairs(LABELLED, scorer.pairs)
        result = train(scorer, examples, config)
        assert not scorer.checkpointing
        ends.append((result.losses, bits(scorer, result.optimizer)))
    for losses, found in ends[1:]:
        assert losses == ends[0][0]
        assert len(found) == len(ends[0][1])
        assert all(torch.equal(a, b) for a, b in zip(found, ends[0][1], strict=True))


def test_gradients_do_not_lie_beside_each_other(tmp_path: Path) -> None:
    scorer = scorer_of(make_folder("bert", tmp_path / "bert"), torch.float16)
    optimizer = make_optimizer(scorer, TrainConfig())
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in scorer.model.parameters()))

    for parameter in scorer.model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=10**6, per_unit=False)
    scorer.model.train()
    for release, expected in ((False, len(list(scorer.model.parameters()))), (True, 2)):
        most = 0
        train_step(scorer, parts, BCE, optimizer, LossScale(), clip=1.0, release=release)
        assert 0 < most <= expected
        assert (most > 2) is not release


def test_an_overflow_that_is_found_last_leaves_nothing_half_updated(tmp_path: Path) -> None:
    scorer = scorer_of(make_folder("bert", tmp_path / "bert"), torch.float16)
    optimizer = make_optimizer(scorer, TrainConfig(lr=1e-3))
    parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=10**6, per_unit=False)
    scorer.model.train()
    train_step(scorer, parts, BCE, optimizer, LossScale(), clip=1.0, release=True)
    before = [tensor.clone() for tensor in bits(scorer, optimizer)]
    words = scorer.model.get_input_embeddings().weight  # its gradient is the last to arrive
    words.register_hook(lambda gradient: gradient.clone().fill_(float("inf")))
    scale = LossScale()
    result = train_step(scorer, parts, BCE, optimizer, scale, clip=1.0, release=True)
    assert not result.stored
    assert scale.value == 2.0**15
    assert all(torch.equal(a, b) for a, b in zip(bits(scorer, optimizer), before, strict=True))
    assert all(p.grad is None for p in scorer.model.parameters())


def test_several_micro_batches_keep_their_gradients_and_give_the_same_step(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    ends = []
    for release in (False, True):
        scorer = scorer_of(path, torch.float16)
        optimizer = make_optimizer(scorer, TrainConfig(lr=1e-3))
        parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=64, per_unit=False)
        assert len(parts) > 1
        scorer.model.eval()
        train_step(scorer, parts, BCE, optimizer, LossScale(), clip=1.0, release=release)
        ends.append([t.clone() for t in bits(scorer, optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_a_large_table_give_the_update_of_a_dense_gradient(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder("bert", tmp_path / "bert")
    ends = []
    for limit in (storage.LARGE_TABLE, 0):
        monkeypatch.setattr(storage, "LARGE_TABLE", limit)
        scorer = scorer_of(path, dtype)
        optimizer = make_optimizer(scorer, TrainConfig(lr=1e-3))
        kinds = []
        words = scorer.model.get_input_embeddings().weight
        words.register_hook(lambda gradient: kinds.append(gradient.is_sparse))  # noqa: B023
        parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=10**6, per_unit=False)
        scorer.model.eval()
        for _ in range(3):
            assert train_step(scorer, parts, BCE, optimizer, LossScale(), clip=1e6, release=True).stored
        assert kinds == [limit == 0] * 6
        ends.append(bits(scorer, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("max_tokens", [10**6, 64])
def test_rows_of_a_float32_table_give_the_update_of_a_dense_gradient(
    release: bool, max_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder("bert", tmp_path / "bert")
    ends = []
    for limit in (storage.WIDE_TABLE, 0):
        monkeypatch.setattr(storage, "WIDE_TABLE", limit)
        scorer = scorer_of(path, torch.float32)
        optimizer = make_optimizer(scorer, TrainConfig(lr=1e-3))
        kinds = sparse_gradients(monkeypatch)
        parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=max_tokens, per_unit=False)
        watch = Watch(every=1)
        for _ in range(3):
            torch.manual_seed(0)
            step = train_step(
                scorer, parts, BCE, optimizer, LossScale(), clip=1e6, release=release, watch=watch
            )  # too far to clip: sums of norms round otherwise
            assert step.stored
            assert watch.next_step()["updates_lost"] < 1.0
        assert bool(kinds) is (limit == 0)
        ends.append(bits(scorer, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("whose", ["torch", "subclass", "hook", "released hook"])
def test_what_a_user_wrote_gets_dense_gradients(whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WIDE_TABLE", 0)
    scorer = scorer_of(make_folder("bert", tmp_path / "bert"), torch.float32)
    kinds = sparse_gradients(monkeypatch)
    if "hook" in whose:
        for module in scorer.model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.register_hook(lambda gradient: gradient.clamp(-1.0, 1.0))
    makers = {"torch": torch.optim.AdamW, "subclass": type("Own", (AdamW,), {})}
    optimizer = makers.get(whose, AdamW)(scorer.model.parameters(), lr=1e-3)
    parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=10**6, per_unit=False)
    step = train_step(scorer, parts, BCE, optimizer, LossScale(), clip=1.0, release=whose.startswith("released"))
    assert step.stored
    assert not kinds


def test_a_table_that_several_modules_share_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WIDE_TABLE", 0)
    model = torch.nn.ModuleList([torch.nn.Embedding(9, 9), torch.nn.Embedding(9, 9)])
    model[1].weight = model[0].weight
    with storage.row_gradients(model, narrow=False):
        assert getattr(model[0].weight, storage.ROWS)
    assert not hasattr(model[0].weight, storage.ROWS)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copied_optimizer_steps_on(copied: Callable[[Any], Any]) -> None:
    first = torch.nn.Linear(8, 4).half()
    optimizer = AdamW(first.parameters(), lr=1e-2, seed=3)
    ends = []
    for model, own in ((first, optimizer), copied((first, optimizer))):
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1)
            own.step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_one_parameter_at_a_time_is_the_same_step() -> None:
    torch.manual_seed(0)
    start = [torch.randn(40, 30).half(), torch.randn(30), torch.randn(7, 5).bfloat16(), torch.randn(9).half()]
    ends = []
    for one_by_one in (False, True):
        parameters = [torch.nn.Parameter(t.clone()) for t in start]
        optimizer = AdamW(parameters, lr=1e-2)
        optimizer.allocate()
        assert optimizer.certain()
        for step in range(3):
            for number, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(10 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if one_by_one:
                for parameter in reversed(parameters):
                    optimizer.step_one(parameter, grad_divisor=8.0)
            else:
                optimizer.step(grad_divisor=8.0)
        ends.append([p.detach() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Failing:
    """Lets the second pass of one step of a run end after some tensors were updated."""

    def __init__(self, optimizer: AdamW, error: Exception, step: int, *, after: int = 5) -> None:
        self._plain, self._error, self._step, self._left = optimizer.step_one, error, step, after
        self._optimizer, self.torn = optimizer, 0
        optimizer.step_one = self  # type: ignore[method-assign]

    def __call__(self, parameter: torch.Tensor, *, grad_divisor: float = 1.0) -> None:
        done = {int(state["step"]) for state in self._optimizer.state.values()}
        if self._left and max(done) == self._step:
            self._left -= 1
            if self._left == 0:
                self.torn += 1
                raise self._error
        self._plain(parameter, grad_divisor=grad_divisor)


def torn_run(path: Path, error: Exception | None, out: Path | None) -> tuple[TrainResult, list[torch.Tensor], Failing]:
    scorer = scorer_of(path, torch.float16)
    config = TrainConfig(steps=6, batch_size=8, lr=1e-3, release_gradients=True, limits=Limits(good_every=2))
    optimizer = make_optimizer(scorer, config)
    failing = Failing(optimizer, error or RuntimeError(), 3 if error else 10**6)
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=out, optimizer=optimizer)
    return result, [t.clone() for t in bits(scorer, result.optimizer)], failing


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")])
def test_memory_that_ends_an_update_half_way_changes_no_bit_of_the_run(
    error: Exception, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The halved budget is not to shorten the passes: the question is what the torn update leaves behind.
    monkeypatch.setattr(TokenBudget, "check", lambda budget, parts: None)
    path = make_folder("bert", tmp_path / "bert")
    wanted, ended, _ = torn_run(path, None, None)
    found, bits_of_it, failing = torn_run(path, error, tmp_path / "out" if on_disk else None)
    assert failing.torn == 1
    assert (found.recovery.rollbacks, found.recovery.rate, found.recovery.halvings) == (1, 1.0, 1)
    assert found.losses[-3:] == wanted.losses[-3:]
    assert all(torch.equal(a, b) for a, b in zip(bits_of_it, ended, strict=True))


def test_another_error_half_way_goes_back_with_a_lower_rate(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    found, _, failing = torn_run(path, RuntimeError("a broken kernel"), tmp_path / "out")
    assert failing.torn == 1
    assert (found.recovery.rollbacks, found.recovery.rate, found.recovery.halvings) == (1, 0.5, 0)
    journal = (tmp_path / "out" / "train.jsonl").read_text()
    assert "stopped half-way (a broken kernel)" in journal


def test_memory_that_is_refused_in_the_first_pass_leaves_everything_as_it_was(tmp_path: Path) -> None:
    scorer = scorer_of(make_folder("bert", tmp_path / "bert"), torch.float16)
    optimizer = make_optimizer(scorer, TrainConfig(lr=1e-3))
    optimizer.allocate()
    parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=10**6, per_unit=False)
    scorer.model.train()
    before = [tensor.clone() for tensor in bits(scorer, optimizer)]

    def refuse(gradient: torch.Tensor) -> None:
        raise MemoryError

    handle = scorer.model.get_input_embeddings().weight.register_hook(refuse)  # the last gradient to arrive
    with pytest.raises(MemoryError):
        train_step(scorer, parts, BCE, optimizer, LossScale(), clip=1.0, release=True)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(bits(scorer, optimizer), before, strict=True))
    assert train_step(scorer, parts, BCE, optimizer, LossScale(), clip=1.0, release=True).stored
