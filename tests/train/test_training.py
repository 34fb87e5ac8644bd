"""A training run: the same numbers as torch in float32, the same bits after a resume, nothing lost on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfrank.data.pairs import Group, Pair
from halfrank.errors import TrainingError
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.scaling import LossScale
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, from_groups, from_pairs, micro_batches
from halfrank.train.loop import Evaluation, make_optimizer, train
from halfrank.train.step import train_step
from tiny import PAIRS, make_folder

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELLED = [Pair(query, document, float(i % 2)) for i, (query, document) in enumerate(PAIRS)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_folder("bert", tmp_path / "bert")


def scorer_of(path: Path, dtype: torch.dtype = torch.float32, **config: float) -> Scorer:
    return folder.load(path, folder.LoadOptions(dtype=dtype, compute="float32", config=config))


def gradients(scorer: Scorer, parts: list, function) -> torch.Tensor:
    scorer.model.zero_grad()
    for part in parts:
        (function(scorer.logits(part.batch), part.labels_P, part.groups_P) * part.share).backward()
    return torch.cat([p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None])


def grouped(scorer: Scorer) -> Examples:
    sizes = [2, 5, 3, 4]
    groups = [
        Group(PAIRS[i][0], tuple(d for _, d in PAIRS[i : i + size]), tuple(float(j == 1) for j in range(size)))
        for i, size in enumerate(sizes)
    ]
    return from_groups(groups, scorer.pairs)


def test_micro_batches_give_the_gradients_of_the_whole_batch(path: Path) -> None:
    scorer = scorer_of(path, **STILL)
    for examples, name, per_unit in (
        (from_pairs(LABELLED, scorer.pairs), "bce", False),
        (grouped(scorer), "softmax", True),
    ):
        units = range(len(examples))
        whole = micro_batches(examples, units, max_tokens=10**6, per_unit=per_unit)
        split = micro_batches(examples, units, max_tokens=60, per_unit=per_unit)
        assert len(whole) == 1
        assert len(split) > 2
        expected = gradients(scorer, whole, LOSSES[name].function)
        found = gradients(scorer, split, LOSSES[name].function)
        # Positives and negatives nearly cancel here, which leaves ten float32 roundings of the parts.
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_float32_run_equals_torchs_own_loop(path: Path) -> None:
    config = TrainConfig(epochs=2, batch_size=6, lr=1e-3, schedule="constant", warmup=0)
    ours, theirs = scorer_of(path, **STILL), scorer_of(path, **STILL)
    batches = [list(range(i, i + 6)) for i in range(0, 24, 6)]
    result = train(ours, from_pairs(LABELLED, ours.pairs), config, plan=lambda epoch: batches)
    decay = [p for p in theirs.model.parameters() if p.ndim > 1]
    rest = [p for p in theirs.model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.01
    )
    losses = []
    for _ in range(2):
        for batch in batches:
            pairs = [LABELLED[i] for i in batch]
            inputs = theirs.tokenizer(
                [p.query for p in pairs], [p.document for p in pairs], padding=True, return_tensors="pt"
            )
            labels = torch.tensor([p.label for p in pairs])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(theirs.model(**inputs).logits[:, 0], labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert result.losses == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_run_ends_where_float32_ends(path: Path, dtype: torch.dtype) -> None:
    config = TrainConfig(epochs=4, batch_size=6, lr=1e-3)
    narrow = scorer_of(make_folder("bert", path.parent / "narrow", dtype=dtype), dtype, **STILL)
    wide = scorer_of(path.parent / "narrow", torch.float32, **STILL)
    ours = train(narrow, from_pairs(LABELLED, narrow.pairs), config).losses
    exact = train(wide, from_pairs(LABELLED, wide.pairs), config).losses
    assert exact[-1] < exact[0] - 0.02
    assert ours[-1] == pytest.approx(exact[-1], rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_ends_with_the_same_bits(path: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = TrainConfig(epochs=3, batch_size=6, lr=1e-3, checkpoint_every=1, watch_every=2)  # with dropout

    def run(out: Path, stop_at: int | None, resume: bool) -> Scorer:
        scorer = scorer_of(path, dtype)
        calls = iter(range(1000))

        def evaluate(epoch: int, step: int) -> Evaluation:
            if next(calls) == stop_at:
                raise KeyboardInterrupt  # as hard as a kill: nothing is saved on the way out
            return Evaluation(-float(step), {"score": -float(step)})

        train(
            scorer,
            from_pairs(LABELLED, scorer.pairs),
            config,
            evaluate=evaluate,
            out=out,
            resume=resume,
            keep_best=False,
        )
        return scorer

    alone = run(tmp_path / "alone", None, False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 1, False)
    resumed = run(tmp_path / "cut", None, True)
    for (name, a), b in zip(alone.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert alone.residuals.keys() == resumed.residuals.keys()
    assert all(torch.equal(alone.residuals[name], resumed.residuals[name]) for name in alone.residuals)
    assert (len(alone.residuals) > 0) == (dtype is not torch.float32)
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / out / "train.jsonl").read_text().splitlines()]
        for out in ("alone", "cut")
    ]
    assert steps[0] == steps[1]


def test_other_settings_do_not_resume(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path)
    examples = from_pairs(LABELLED, scorer.pairs)
    train(scorer, examples, TrainConfig(steps=2), out=tmp_path / "out")
    with pytest.raises(TrainingError, match="lr: 2e-05 then, 0.001 now"):
        train(scorer, examples, TrainConfig(steps=2, lr=1e-3), out=tmp_path / "out", resume=True)


def test_a_step_with_an_overflowing_gradient_stores_nothing(path: Path) -> None:
    scorer = scorer_of(path, torch.float16)
    optimizer = make_optimizer(scorer, TrainConfig())
    examples = from_pairs(LABELLED, scorer.pairs)
    before = {name: p.clone() for name, p in scorer.model.named_parameters()}
    scale = LossScale(initial=2.0**24)
    parts = micro_batches(examples, range(8), max_tokens=10**6, per_unit=False)
    overflowing = lambda scores, labels, groups: scores.sum() * 1e6  # noqa: E731
    result = train_step(scorer, parts, overflowing, optimizer, scale, clip=1.0)
    assert not result.stored
    assert scale.value == 2.0**23
    assert all(torch.equal(before[name], p) for name, p in scorer.model.named_parameters())


def test_a_loss_that_is_never_finite_ends_the_run_and_keeps_the_weights(path: Path) -> None:
    scorer = scorer_of(path, torch.float16)
    before = {name: p.clone() for name, p in scorer.model.named_parameters()}
    with pytest.raises(TrainingError, match="non-finite"):
        train(
            scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=100, batch_size=2),
            loss=lambda scores, labels, groups: scores.sum() * float("nan"),
        )  # fmt: skip
    assert all(torch.equal(before[name], p) for name, p in scorer.model.named_parameters())


def test_the_best_model_is_kept_and_patience_stops(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, torch.float16)
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    held: list[dict[str, torch.Tensor]] = []

    def evaluate(epoch: int, step: int) -> Evaluation:
        held.append({name: p.detach().clone() for name, p in scorer.model.named_parameters()})
        return Evaluation(next(scores), {})

    config = TrainConfig(steps=20, batch_size=4, eval_every=2, patience=2, lr=1e-3)
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), config, evaluate=evaluate, out=tmp_path / "out")
    assert (result.best_score, result.best_step, result.steps) == (0.5, 4, 8)
    assert all(torch.equal(held[1][name], p) for name, p in scorer.model.named_parameters())
    assert any(not torch.equal(held[1][name], held[3][name]) for name in held[1])
    loaded = folder.load(tmp_path / "out")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(dict(loaded.model.named_parameters())[name], held[1][name])


def test_journal_says_what_happened(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, torch.float16)
    train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=3, watch_every=1), out=tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert records[0]["event"] == "start"
    assert "float16" in records[0]["precision"]
    for key in (
        "loss",
        "gradient_norm",
        "loss_scale",
        "lr",
        "tokens_per_second",
        "underflow_share",
        "gradient_headroom_bits",
        "headroom_bits",
        "headroom_module",
        "updates_lost",
        "weights_in_residual_only",
        "clamped_weights",
    ):
        assert key in records[2], key
    assert records[-1]["event"] == "end"


def test_groups_without_a_right_document_are_announced(path: Path) -> None:
    scorer = scorer_of(path)
    graded = Group(PAIRS[0][0], (PAIRS[0][1], PAIRS[1][1]), (1.0, 0.0))
    empty = Group(PAIRS[2][0], (PAIRS[2][1], PAIRS[3][1]), (0.0, 0.0))
    train(scorer, from_groups([graded, empty], scorer.pairs), TrainConfig(steps=1))
    assert any("1 of 2 groups do not have a grade above 0 and a second" in note for note in scorer.notes)
    with pytest.raises(TrainingError, match="nothing to learn from"):
        train(scorer, from_groups([empty, empty], scorer.pairs), TrainConfig(steps=1))


def test_an_update_beyond_the_format_stops_with_the_state_saved(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, torch.float16)
    examples = from_pairs(LABELLED, scorer.pairs)
    with pytest.raises(TrainingError, match="beyond 65504.*model of step 0 and the state of the run are saved"):
        train(scorer, examples, TrainConfig(steps=2, warmup=0), out=tmp_path / "out", optimizer=Farther(scorer))
    assert (tmp_path / "out" / "checkpoint").is_dir()
    assert all(bool(parameter.isfinite().all()) for parameter in scorer.model.parameters())


class Farther(AdamW):
    """Steps so far that float16 cannot hold where they lead."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(list(scorer.model.named_parameters()), lr=1e6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_larger_than_the_budget_gives_the_gradients_of_the_whole(path: Path, dropout: float) -> None:
    config = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    scorer = scorer_of(path, **config)
    examples = grouped(scorer)
    budget = int(examples.tokens.lengths.max()) * 2
    split = micro_batches(examples, range(4), max_tokens=budget, per_unit=True)
    assert any(part.pieces for part in split)
    assert all(sum(piece.lengths) <= budget for part in split for piece in part.pieces)
    assert [part.batch.rows for part in split if part.pieces] == [
        [row for piece in part.pieces for row in piece.rows] for part in split if part.pieces
    ]
    found = []
    for parts in (split, [replace(part, pieces=()) for part in split]):
        scorer = scorer_of(path, **config)
        scorer.model.train()
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(scorer.model.parameters(), lr=1.0)
        before = torch.cat([p.detach().flatten().clone() for p in scorer.model.parameters()])
        result = train_step(scorer, parts, LOSSES["softmax"].function, optimizer, LossScale(enabled=False), clip=0)
        after = torch.cat([p.detach().flatten() for p in scorer.model.parameters()])
        found.append((result.loss, before - after))
    if dropout == 0:
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)  # weights of 1 step by 1.2e-7
    assert all(bool(moved.isfinite().all()) and moved.norm() > 0 for _, moved in found)


def test_both_passes_of_a_split_group_see_the_same_dropout(path: Path) -> None:
    config = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0}
    scorer = scorer_of(path, **config)
    examples = grouped(scorer)
    (part,) = micro_batches(examples, [1], max_tokens=30, per_unit=True)
    seen: list[torch.Tensor] = []
    plain = scorer.logits
    scorer.logits = lambda batch: seen.append(plain(batch)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    scorer.model.train()
    optimizer = torch.optim.SGD(scorer.model.parameters(), lr=0.0)
    train_step(scorer, [part], LOSSES["softmax"].function, optimizer, LossScale(enabled=False), clip=0)
    first, second = seen[: len(part.pieces)], seen[len(part.pieces) :]
    assert len(part.pieces) > 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
