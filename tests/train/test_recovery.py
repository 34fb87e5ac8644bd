"""Each rung of recovery on a real fault, in the arithmetic of float32, float16 and bfloat16: it goes on and tells."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfrank.data.pairs import Group, Pair
from halfrank.diagnosis import Cause
from halfrank.errors import DataError, Interrupted, NonFiniteWeightError, TornUpdateError, TrainingError
from halfrank.model import folder
from halfrank.model.pieces import TensorFile
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.predict import predict
from halfrank.train.config import Limits, TrainConfig
from halfrank.train.examples import Examples, from_groups, from_pairs
from halfrank.train.faults import Attempt, absurd_labels
from halfrank.train.loop import Evaluation, TrainResult, train
from halfrank.train.step import random_state
from tiny import PAIRS, make_folder

COMPUTES = ["float32", "emulated-float16", "emulated-bfloat16"]
LABELLED = [Pair(q, d, float(i % 2), f"pairs.jsonl:{i + 1}") for i, (q, d) in enumerate(PAIRS)]
MARK = "flute"  # stands in two of the eleven sentences


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "bert")


def scorer_of(path: Path, compute: str, dtype: torch.dtype = torch.float32) -> Scorer:
    return folder.load(path, folder.LoadOptions(dtype=dtype, compute=compute))


def events(out: Path, rung: str | None = None) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [r for r in records if r.get("event") == "recovery" and rung in (None, r["rung"])]


def quarantined(out: Path) -> list[dict[str, Any]]:
    path = out / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def relabelled(examples: Examples, **labels: float) -> Examples:
    changed = examples.labels.clone()
    for row, label in labels.items():
        changed[int(row.removeprefix("row"))] = label
    return replace(examples, labels=changed)


def finite(scorer: Scorer) -> bool:
    return all(bool(p.isfinite().all()) for p in scorer.model.parameters())


def marked_rows() -> set[int]:
    return {row for row, pair in enumerate(PAIRS) if any(MARK in text for text in pair)}


@contextmanager
def poisoned_token(scorer: Scorer, text: str, value: float) -> Iterator[set[int]]:
    """The embedding of a word comes out as `value`, as from broken memory; gives the rows of PAIRS that hold it."""
    (token,) = scorer.tokenizer.convert_tokens_to_ids([text])
    table = scorer.model.get_input_embeddings()

    def spoil(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((args[0] == token)[..., None], value, output)

    handle = table.register_forward_hook(spoil)
    tokens = scorer.pairs.encode(PAIRS)
    holds = (tokens.input_ids == token).nonzero()[0]
    yield {int(np.searchsorted(tokens.offsets, place, side="right")) - 1 for place in holds}
    handle.remove()


CONFIG = TrainConfig(steps=12, batch_size=6, lr=1e-3, limits=Limits(quarantined=0.5))


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_pair_that_is_not_finite_in_any_format_is_left_out_by_name(path: Path, tmp_path: Path, compute: str) -> None:
    scorer = scorer_of(path, compute)
    with poisoned_token(scorer, MARK, float("inf")) as bad:
        result = train(scorer, from_pairs(LABELLED, scorer.pairs), CONFIG, out=tmp_path)
    assert 0 < len(bad) < 12
    records = quarantined(tmp_path)
    assert [record["place"] for record in records] == [LABELLED[row].source for row in sorted(bad)]
    for record in records:
        pair = next(pair for pair in LABELLED if pair.source == record["place"])
        assert (record["query"], record["document"], record["label"]) == (pair.query, pair.document, pair.label)
        assert "not finite" in record["reason"]
    assert result.skipped == 0
    assert result.recovery.islands == []
    assert len(result.losses) == 12
    assert all(np.isfinite(result.losses))
    assert finite(scorer)
    assert any("pairs left out" in note for note in scorer.notes)
    assert not (tmp_path / "good").exists()


@pytest.mark.parametrize("compute", COMPUTES)
def test_what_overflows_in_float16_only_becomes_an_island(path: Path, tmp_path: Path, compute: str) -> None:
    scorer = scorer_of(path, compute)
    wide = dict(scorer.model.named_modules())["bert.encoder.layer.0.intermediate.dense"]
    with torch.no_grad():
        wide.weight.mul_(3e5)
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), CONFIG, out=tmp_path / "out")
    assert all(np.isfinite(result.losses))
    if compute == "emulated-float16":
        assert result.recovery.widenings == 1
        assert scorer.islands
        assert "bert.encoder.layer.0.intermediate.dense" in scorer.islands
        assert "bert.encoder.layer.1.intermediate.dense" not in scorer.islands
        assert folder.load(tmp_path / "out").islands == scorer.islands
        (event,) = events(tmp_path / "out", "widen")
        assert event["modules"] == list(scorer.islands)
    else:
        assert events(tmp_path / "out") == []
        assert not result.recovery.happened


@pytest.mark.parametrize("compute", COMPUTES)
def test_gradients_that_a_lower_scale_cures_cost_a_few_steps(path: Path, tmp_path: Path, compute: str) -> None:
    scorer = scorer_of(path, compute)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    loss: Callable[..., Tensor] = lambda scores, labels, groups: 1e5 * bce(scores[:, 0], labels)  # noqa: E731
    config = replace(CONFIG, steps=20)
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path, loss=loss)
    if compute == "emulated-float16":
        assert 3 < result.skipped == result.recovery.lowered < 20
        scales = [event["loss_scale"] for event in events(tmp_path, "skip")]
        assert scales == [2.0 ** (15 - n) for n in range(result.skipped)]
    else:
        assert result.skipped == 0
    assert result.recovery.islands == []
    assert result.recovery.quarantined == []


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_diverging_run_goes_back_with_a_lower_rate(path: Path, tmp_path: Path, compute: str) -> None:
    scorer = scorer_of(path, compute)
    calls: list[float] = []

    def burst(step: int, total: int) -> float:
        calls.append(step)
        return 1e5 if step in (45, 46) and len(calls) < 60 else 1.0

    config = replace(CONFIG, steps=80, limits=Limits(good_every=30))
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path, lr_factor=burst)
    assert result.recovery.rollbacks >= 1
    assert result.recovery.islands == []  # what diverges overflows too, and float32 would not help
    assert result.recovery.rate == 0.5**result.recovery.rollbacks
    assert 15 <= result.recovery.repeated <= 60
    assert result.steps == 80
    assert np.mean(result.losses[-10:]) < 1.0
    assert finite(scorer)
    assert events(tmp_path, "rollback")[0]["reason"]
    assert "learning rate 0.5" in str(result.recovery)


def test_a_run_that_cannot_be_mended_stops_with_the_last_good_model(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    config = replace(CONFIG, steps=80, limits=Limits(good_every=30, rollbacks=2))
    with pytest.raises(TrainingError, match="model of step 30 .* saved"):
        train(
            scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path,
            lr_factor=lambda step, total: 1e5 if step >= 45 else 1.0,
        )  # fmt: skip
    assert [event["rung"] for event in events(tmp_path)].count("rollback") == 2
    assert events(tmp_path)[-1]["rung"] == "stop"
    saved = folder.load(tmp_path)
    for (name, a), b in zip(scorer.model.named_parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert float(scorer.model.classifier.weight.detach().abs().max()) < 1.0


@pytest.mark.parametrize("folder_given", [True, False])
def test_a_state_that_was_lost_before_it_showed_is_left_behind(path: Path, tmp_path: Path, folder_given: bool) -> None:
    scorer = scorer_of(path, "float32")
    steps: list[int] = []

    def burst(step: int, total: int) -> float:
        steps.append(step)
        return 1e5 if step == 59 and steps.count(59) == 1 else 1.0  # the last update before the state of step 60

    config = replace(CONFIG, steps=70, batch_size=3, limits=Limits(good_every=30))
    out = tmp_path if folder_given else None
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=out, lr_factor=burst)
    assert result.recovery.rollbacks == 2
    backwards = [step for before, step in pairwise(steps) if step < before]
    assert backwards == [60, 30]
    assert result.recovery.rate == 0.25
    assert np.mean(result.losses[-10:]) < 1.0
    assert finite(scorer)


def test_a_single_spike_is_skipped_and_a_new_level_of_the_data_accepted(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    number = iter(range(1000))
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def loss(scores: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        factor = 1.0 if not scores.requires_grad else 50.0 if (n := next(number)) == 30 or n >= 45 else 1.0
        return factor * bce(scores[:, 0], labels)

    result = train(scorer, from_pairs(LABELLED, scorer.pairs), replace(CONFIG, steps=80), out=tmp_path, loss=loss)
    assert [event["rung"] for event in events(tmp_path)] == ["skip", "skip", "skip", "accept"]
    assert result.recovery.rollbacks == 0
    assert result.recovery.spikes == result.skipped == 3


def test_an_absurd_label_is_left_out_when_its_loss_explodes(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    pairs = [*LABELLED * 10]
    examples = relabelled(from_pairs(pairs, scorer.pairs), row200=1e30)
    config = replace(CONFIG, steps=40, loss="mse", limits=Limits())
    plan = [[*range(n, n + 6)] for n in range(0, 240, 6)]
    result = train(scorer, examples, config, out=tmp_path, plan=lambda epoch: plan)
    (record,) = quarantined(tmp_path)
    assert record["place"] == LABELLED[200 % 24].source
    assert "its label is 1e+30" in record["reason"]
    assert result.skipped == 0
    assert max(result.losses) < 100


def test_labels_lengths_and_tokens_are_looked_at_before_the_first_step(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32", torch.float16)
    long = scorer.pairs.__class__(scorer.tokenizer, 4000)
    texts = [*PAIRS[:22], (PAIRS[0][0], "word " * 500), PAIRS[23]]
    examples = relabelled(from_pairs([Pair(q, d, 1.0) for q, d in texts], long), row3=float("nan"), row4=float("-inf"))
    examples.tokens.input_ids[examples.tokens.offsets[7] + 1] = 10_000
    (token,) = scorer.tokenizer.convert_tokens_to_ids([MARK])
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[token] = float("inf")
    result = train(scorer, examples, CONFIG, out=tmp_path)
    reasons = {record["row"]: record["reason"] for record in result.recovery.quarantined}
    assert [record["place"] for record in quarantined(tmp_path)] == [
        f"pair {n} (counted from 0)" for n in sorted(reasons)
    ]
    assert "its label is nan" in reasons[3]
    assert "its label is -inf" in reasons[4]
    assert "token 10000" in reasons[7]
    assert "tokens, and the model holds 1 to 96" in reasons[22]
    assert {row for row, (q, d) in enumerate(texts) if MARK in q + d} <= reasons.keys()
    assert finite(scorer)
    assert result.skipped == 0
    assert folder.load(tmp_path) is not None


def test_too_many_bad_pairs_are_refused(path: Path) -> None:
    scorer = scorer_of(path, "float32")
    bad = relabelled(from_pairs(LABELLED, scorer.pairs), row3=float("nan"), row4=float("nan"), row5=float("nan"))
    with pytest.raises(DataError, match=r"3 of 24 pairs .*pairs.jsonl:4 \('.*: its label is nan"):
        train(scorer, bad, TrainConfig(steps=2))
    one = relabelled(from_pairs(LABELLED, scorer.pairs), row3=float("nan"))
    with pytest.raises(DataError, match=r"1 of 24.*leave out --strict, and they are left out"):
        train(scorer, one, TrainConfig(steps=2, limits=Limits(strict=True)))
    with poisoned_token(scorer, MARK, float("nan")), pytest.raises(TrainingError, match="10% are never left out"):
        train(scorer, from_pairs(LABELLED, scorer.pairs), replace(CONFIG, limits=Limits()))


def test_a_finding_names_the_line_of_its_file(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    with poisoned_token(scorer, MARK, float("inf")) as bad:
        train(scorer, from_pairs(LABELLED, scorer.pairs), CONFIG, out=tmp_path)
    (first, *_) = events(tmp_path, "quarantine")
    assert first["finding"]["pair"]["place"] in first["pairs"]
    assert {place for event in events(tmp_path, "quarantine") for place in event["pairs"]} == {
        LABELLED[row].source for row in bad
    }
    assert all("row" not in record for record in quarantined(tmp_path))  # a second number, counted from 0
    assert f"<td>{first['pairs'][0]}</td>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("grade", "said"), [(3.0, False), (7.0, True)])
def test_a_grade_that_outweighs_all_others_is_announced(path: Path, grade: float, said: bool) -> None:
    scorer = scorer_of(path, "float32")
    groups = [
        Group(PAIRS[i][0], tuple(d for _, d in PAIRS[i : i + 4]), (1.0, 0.0, 0.0, 0.0), f"g.jsonl:{i + 1}")
        for i in range(0, 20, 4)
    ]
    groups[2] = replace(groups[2], grades=(0.0, grade, 1.0, 0.0))
    train(scorer, from_groups(groups, scorer.pairs), TrainConfig(steps=1, batch_size=2, loss="lambda"))
    assert any("7 at g.jsonl:9, weighs as much as 127 documents" in note for note in scorer.notes) is said


def test_a_document_leaves_its_group_and_the_group_stays(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    groups = [
        Group(PAIRS[i][0], tuple(d for _, d in PAIRS[i : i + 4]), (1.0, 0.0, 0.0, 0.0), f"g.jsonl:{i}")
        for i in range(0, 20, 4)
    ]
    examples = relabelled(from_groups(groups, scorer.pairs), row6=float("nan"))
    train(scorer, examples, TrainConfig(steps=3, batch_size=2), out=tmp_path)
    (record,) = quarantined(tmp_path)
    assert (record["place"], record["document"]) == ("g.jsonl:4", PAIRS[6][1])
    assert [len(unit) for unit in examples.without([6]).units] == [4, 3, 4, 4, 4]


def test_weights_that_are_not_finite_are_not_trained(path: Path) -> None:
    scorer = scorer_of(path, "float32")
    with torch.no_grad():
        scorer.model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=r"layer\.0\.output\.dense\.weight"):
        train(scorer, from_pairs(LABELLED, scorer.pairs), CONFIG)


@pytest.mark.parametrize("compute", COMPUTES)
def test_strict_stops_at_the_first_fault_and_goes_on_without(path: Path, tmp_path: Path, compute: str) -> None:
    def run(strict: bool, resume: bool, out: Path) -> TrainResult:
        scorer = scorer_of(path, compute)
        config = replace(CONFIG, limits=replace(CONFIG.limits, strict=strict))
        with poisoned_token(scorer, MARK, float("inf")):
            return train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=out, resume=resume)

    with pytest.raises(TrainingError, match=r"(?s)not finite.*the run is strict.*goes on: it leaves these pairs out"):
        run(True, False, tmp_path / "cut")
    assert {record["place"] for record in quarantined(tmp_path / "cut")} <= {
        LABELLED[row].source for row in marked_rows()
    }  # written down, not left out
    assert quarantined(tmp_path / "cut")
    run(False, True, tmp_path / "cut")
    run(False, False, tmp_path / "alone")
    assert_same_run(tmp_path / "cut", tmp_path / "alone")


def test_strict_keeps_a_model_that_scores_and_says_how_to_go_on(path: Path, tmp_path: Path) -> None:
    def run(strict: bool, resume: bool, out: Path) -> TrainResult:
        scorer = scorer_of(path, "emulated-float16", torch.float16)
        layer = scorer.model.bert.encoder.layer[0]
        with torch.no_grad():
            layer.intermediate.dense.weight.mul_(1.5e5)
            layer.intermediate.dense.bias.zero_()
            layer.output.dense.weight.mul_(1e-4)
        config = replace(CONFIG, steps=4, loss_scale=16.0, limits=Limits(strict=strict))
        return train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=out, resume=resume)

    with pytest.raises(TrainingError) as caught:
        run(True, False, tmp_path / "cut")
    said = str(caught.value)
    assert re.search(r"The model of step 0, with \d modules in float32, and the state of the run are saved in", said)
    assert "--resume and without --strict, and the run goes on: it computes these modules in float32." in said
    assert "Lower the learning rate" not in said
    kept = folder.load(tmp_path / "cut", folder.LoadOptions(compute="emulated-float16"))
    assert "bert.encoder.layer.0.intermediate.dense" in kept.islands
    assert np.isfinite(predict(kept, PAIRS).values).all()
    assert not predict(kept, PAIRS).rescued
    run(False, True, tmp_path / "cut")
    run(False, False, tmp_path / "alone")
    assert_same_run(tmp_path / "cut", tmp_path / "alone")


def test_strict_leaves_lost_weights_behind(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    config = replace(CONFIG, steps=8, limits=Limits(strict=True, good_every=4))
    optimizer = AdamW(list(scorer.model.named_parameters()), lr=1e-3)
    whole = optimizer.step

    def torn(closure: Any = None, **known: Any) -> Any:
        whole(closure, **known)
        if optimizer.state[scorer.model.classifier.bias]["step"] == 6:
            raise TornUpdateError("The update stopped half-way.")

    optimizer.step = torn  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"half-way, and the run is strict.*model of step 4.*it goes back to its last good state"
    ):
        train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path, optimizer=optimizer)
    assert optimizer.state[scorer.model.classifier.bias]["step"] == 4


class Eventful:
    """A run with islands, pairs left out and a step back, that can be cut off at any call."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path, self.dtype, self.calls = path, dtype, 0

    def run(self, out: Path, *, resume: bool, cut_at: int = -1) -> TrainResult:
        scorer = scorer_of(self.path, "emulated-float16", self.dtype)
        with torch.no_grad():
            scorer.model.bert.encoder.layer[0].intermediate.dense.weight.mul_(2e4)
            scorer.model.bert.encoder.layer[0].intermediate.dense.bias.mul_(2e5)
        self.calls = 0

        def evaluate(epoch: int, step: int) -> Evaluation:
            return Evaluation(-float(step), {})

        def rate(step: int, total: int) -> float:
            self.calls += 1
            if self.calls == cut_at:
                raise KeyboardInterrupt  # as hard as a kill: nothing is saved on the way out
            # Only before the first step back: the optimizer's rate tells, and it is part of the state.
            return 1e5 if step in (33, 34) and self.rate_of_run(out) == 0 else 1.0

        config = TrainConfig(
            steps=50, batch_size=6, lr=1e-3, checkpoint_every=7, limits=Limits(quarantined=0.5, good_every=20)
        )
        with poisoned_token(scorer, MARK, float("inf")):
            return train(
                scorer, from_pairs(LABELLED, scorer.pairs), config, out=out, resume=resume, lr_factor=rate,
                evaluate=evaluate, keep_best=False,
            )  # fmt: skip

    def rate_of_run(self, out: Path) -> int:
        return len(events(out, "rollback"))


def assert_same_run(one: Path, other: Path) -> None:
    a, b = (folder.load(out) for out in (one, other))
    assert a.islands == b.islands
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert (one / "checkpoint" / "state.safetensors").read_bytes() == (
        other / "checkpoint" / "state.safetensors"
    ).read_bytes()
    assert quarantined(one) == quarantined(other)


@pytest.mark.parametrize(("dtype", "cuts"), [(torch.float32, (37,)), (torch.float16, (16, 36, 46))])
def test_a_resumed_run_keeps_islands_quarantine_and_the_steps_it_went_back(
    path: Path, tmp_path: Path, dtype: torch.dtype, cuts: tuple[int, ...]
) -> None:
    eventful = Eventful(path, dtype)
    alone = eventful.run(tmp_path / "alone", resume=False)
    assert alone.recovery.islands
    assert alone.recovery.quarantined
    assert alone.recovery.rollbacks == 1
    for cut_at in cuts:
        out = tmp_path / f"cut{cut_at}"
        with pytest.raises(KeyboardInterrupt):
            eventful.run(out, resume=False, cut_at=cut_at)
        result = eventful.run(out, resume=True)
        assert_same_run(tmp_path / "alone", out)
        assert replace(result.recovery, seconds=0, seconds_since_good=0) == replace(
            alone.recovery, seconds=0, seconds_since_good=0
        )
        told = [
            [(line.get("event"), line.get("rung"), line["step"], line.get("loss")) for line in map(json.loads, text)]
            for text in ((run / "train.jsonl").read_text().splitlines() for run in (tmp_path / "alone", out))
        ]
        assert told[0] == told[1]


def test_a_run_killed_before_its_first_checkpoint_starts_again(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    examples = from_pairs(LABELLED, scorer.pairs)
    config = TrainConfig(steps=2)
    with pytest.raises(TrainingError, match="start without --resume"):
        train(scorer, examples, config, out=tmp_path, resume=True)
    (tmp_path / "train.jsonl").write_text('{"event": "start", "step": 0}\n')
    assert train(scorer, examples, config, out=tmp_path, resume=True).steps == 2
    assert any("starts again" in note for note in scorer.notes)


def test_without_a_folder_the_last_good_state_is_kept_on_the_host_or_in_a_scratch_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for limit in (2**30, 0):
        monkeypatch.setattr("halfrank.train.checkpoint.HOST_BYTES", limit)
        scorer = scorer_of(path, "float32", torch.float16)
        calls: list[int] = []

        def burst(step: int, total: int, calls: list[int] = calls) -> float:
            calls.append(step)
            return 1e5 if len(calls) in (46, 47) else 1.0

        config = replace(CONFIG, steps=60, limits=Limits(good_every=30))
        result = train(scorer, from_pairs(LABELLED, scorer.pairs), config, lr_factor=burst)
        assert result.recovery.rollbacks == 1
        found.append([p.detach().clone() for p in scorer.model.parameters()])
        assert isinstance(result.optimizer, AdamW)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["optimizer", "weights"])
def test_a_damaged_checkpoint_is_not_resumed_and_the_tensor_is_named(path: Path, tmp_path: Path, kind: str) -> None:
    scorer, config = scorer_of(path, "float32", torch.float16), TrainConfig(steps=4, batch_size=8, checkpoint_every=2)
    train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path)
    file = tmp_path / "checkpoint" / "state.safetensors"
    tensors = load_file(file)
    chosen = next(key for key in tensors if key.startswith(kind) and key.endswith(("v_scale", "output.dense.weight")))
    tensors[chosen].view(-1)[0] = -1.0 if kind == "optimizer" else float("nan")
    save_file(tensors, file)
    state = json.loads(file.with_name("state.json").read_text())
    file.with_name("state.json").write_text(json.dumps(state | {"checksum": TensorFile(file).checksum()}))
    again = scorer_of(path, "float32", torch.float16)
    with pytest.raises(TrainingError, match="is damaged") as caught:
        train(again, from_pairs(LABELLED, again.pairs), config, out=tmp_path, resume=True)
    expected = Cause.OPTIMIZER_STATE if kind == "optimizer" else Cause.CORRUPT_WEIGHT
    assert caught.value.finding is not None
    assert caught.value.finding.cause is expected
    assert caught.value.finding.module in dict(again.model.named_modules())


def test_a_rate_beside_which_the_weights_are_small_is_announced(path: Path) -> None:
    for rate, said in ((1e-4, False), (0.5, True)):
        scorer = scorer_of(path, "float32")
        train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=1, batch_size=4, lr=rate))
        assert any(f"A learning rate of {rate:g} changes the weights" in note for note in scorer.notes) is said


GROUPS = [
    Group(PAIRS[i][0], tuple(d for _, d in PAIRS[i : i + 4]), (1.0, 0.0, 0.0, 0.0), f"g.jsonl:{i + 1}")
    for i in range(0, 20, 4)
]


@pytest.mark.parametrize(("loss", "rate", "learned"), [
    ("bce", 0.5, False), ("mse", 0.5, False), ("softmax", 0.5, False), ("kl", 0.5, False), ("bce", 5e-3, True),
    ("mse", 5e-3, True), ("softmax", 5e-3, True), ("kl", 5e-3, True),
])  # fmt: skip
def test_a_run_that_did_not_learn_says_so_at_its_end(
    path: Path, tmp_path: Path, loss: str, rate: float, learned: bool
) -> None:
    scorer = scorer_of(path, "float32")
    grouped = loss in ("softmax", "kl")
    examples = from_groups(GROUPS, scorer.pairs) if grouped else from_pairs(LABELLED[:11], scorer.pairs)
    config = TrainConfig(steps=60, batch_size=5 if grouped else 11, lr=rate, loss=loss)
    result = train(scorer, examples, config, out=tmp_path)
    assert (result.finding is None) is learned, str(result.finding)
    told = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert any(record.get("event") == "finding" for record in told) is not learned
    assert any("the run did not learn" in note for note in scorer.notes) is not learned
    assert ("the run did not learn" in (tmp_path / "report.html").read_text()) is not learned
    if result.finding is not None:
        assert result.finding.cause is Cause.LEARNING_RATE
        numbers = result.finding.numbers
        share = float(examples.labels.mean())
        alike = {
            "bce": -share * np.log(share) - (1 - share) * np.log(1 - share),
            "mse": share * (1 - share),
            "softmax": np.log(4),
            "kl": np.log(4) - scipy.stats.entropy(scipy.special.softmax([1.0, 0, 0, 0])),
        }[loss]
        assert numbers["loss of one score for all"] == pytest.approx(alike, rel=1e-3)
        assert numbers["loss of the last batches"] > 0.99 * alike


@pytest.mark.parametrize("damage", ["flipped", "cut", "json", "gone"])
def test_a_checkpoint_with_other_bytes_than_were_written_is_not_resumed(
    path: Path, tmp_path: Path, damage: str
) -> None:
    scorer = scorer_of(path, "float32", torch.float16)
    config = TrainConfig(steps=4, batch_size=8, checkpoint_every=2, limits=Limits(good_every=3))
    train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path)
    file = tmp_path / "checkpoint" / ("state.json" if damage == "json" else "state.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flipped": data, "cut": data[: len(data) // 2], "json": b'{"x":'}[damage])
    again = scorer_of(path, "float32", torch.float16)
    with pytest.raises(TrainingError, match=r"checkpoint' is damaged: .*Remove it, and start a new folder"):
        train(again, from_pairs(LABELLED, again.pairs), config, out=tmp_path, resume=True)


def test_a_damaged_checkpoint_names_the_good_state_beside_it_which_goes_on(path: Path, tmp_path: Path) -> None:
    def run(out: Path, *, resume: bool = False, stop: int = 0) -> TrainResult:
        scorer = scorer_of(path, "float32", torch.float16)
        config = TrainConfig(steps=6, batch_size=8, eval_every=2, limits=Limits(good_every=3))

        def evaluate(epoch: int, step: int) -> Evaluation:
            if step == stop:
                raise RuntimeError("the lights went out")
            return Evaluation(0.0, {})

        return train(scorer, from_pairs(LABELLED, scorer.pairs), config, evaluate=evaluate, out=out, resume=resume)

    run(tmp_path / "alone")
    cut = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="lights"):
        run(cut, stop=6)  # the checkpoint is of step 4, the good state of step 3
    file = cut / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TrainingError, match=r"good', the state of step 3, in its place"):
        run(cut, resume=True)
    shutil.rmtree(cut / "checkpoint")
    (cut / "good").rename(cut / "checkpoint")
    run(cut, resume=True)
    assert (cut / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_run_that_stores_no_step_is_no_success(path: Path, tmp_path: Path, compute: str) -> None:
    scorer = scorer_of(path, compute, torch.float16)
    examples = from_pairs([replace(pair, label=1e30) for pair in LABELLED], scorer.pairs)
    with pytest.raises(TrainingError, match=r"None of the 3 steps could be stored.*the loss of every pair") as caught:
        train(scorer, examples, TrainConfig(steps=3, batch_size=4, loss="mse"), out=tmp_path)
    assert caught.value.finding is not None
    assert caught.value.finding.cause is Cause.LABEL, str(caught.value.finding)


@pytest.mark.parametrize("label", [1e5, 1e18])
@pytest.mark.parametrize("strict", [False, True])
def test_a_label_far_from_all_others_is_left_out_before_the_loss_scale_is_blamed(
    path: Path, tmp_path: Path, label: float, strict: bool
) -> None:
    scorer = scorer_of(path, "float32", torch.float16)
    examples = relabelled(from_pairs(LABELLED, scorer.pairs), row3=label)
    config = TrainConfig(steps=8, batch_size=8, loss="mse", limits=Limits(strict=strict))
    if strict:
        with pytest.raises(TrainingError, match=r"its label is 1.*pairs: pairs.jsonl:4, and the run is strict"):
            train(scorer, examples, config, out=tmp_path)
    else:
        result = train(scorer, examples, config, out=tmp_path)
        assert result.recovery.lowered <= 1  # the scale of a first step may be too large for any label
    (record,) = quarantined(tmp_path)
    assert (record["place"], record["label"]) == ("pairs.jsonl:4", label)


def test_settings_that_no_run_could_finish_with_are_refused() -> None:
    for settings in ({"loss_scale": float("inf")}, {"loss_scale": 1e30}, {"weight_decay": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            TrainConfig(**settings)  # type: ignore[arg-type]


def test_rare_positives_are_not_far_labels(path: Path) -> None:
    scorer = scorer_of(path, "float32")
    examples = from_pairs([*LABELLED] * 20, scorer.pairs)
    labels = torch.zeros(len(examples.labels))
    labels[7], labels[9] = 1.0, 1e4
    attempt = Attempt(
        scorer, replace(examples, labels=labels), range(16), torch.nn.functional.mse_loss, False, 4096, 1.0,
        random_state(scorer.device), [],
    )  # fmt: skip
    assert set(absurd_labels(attempt)) == {9}


def ended(out: Path) -> dict[str, Any]:
    """The account that the journal closes with."""
    records = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return next(record for record in reversed(records) if record.get("event") in ("end", "stopped"))


@pytest.mark.parametrize("compute", ["emulated-float16", "float16"])
def test_a_run_that_explodes_in_its_first_steps_goes_back_and_widens_nothing(
    path: Path, tmp_path: Path, compute: str
) -> None:
    scorer = scorer_of(path, compute)
    calls: list[int] = []

    def burst(step: int, total: int) -> float:
        calls.append(step)
        return 1e5 if step in (2, 3) and len(calls) < 8 else 1.0

    result = train(scorer, from_pairs(LABELLED, scorer.pairs), CONFIG, out=tmp_path, lr_factor=burst)
    assert result.recovery.rollbacks >= 1
    assert result.recovery.islands == []
    assert result.losses[-1] < 1.0
    assert "exploded" in events(tmp_path, "rollback")[0]["reason"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the latter ends with a certificate
def test_a_run_that_stops_says_what_it_recovered_until_then(path: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    scorer = scorer_of(path, "float32", dtype)
    examples = relabelled(from_pairs(LABELLED * 4, scorer.pairs), row20=1e30, row30=1e30, row40=1e30)
    config = replace(CONFIG, steps=40, loss="mse", limits=Limits(quarantined=0.022))
    plan = [[*range(n, n + 6)] for n in range(0, 96, 6)]
    with pytest.raises(TrainingError, match=r"listed in '.*quarantine.jsonl': repair or drop them") as stopped:
        train(scorer, examples, config, out=tmp_path, plan=lambda epoch: plan)
    assert "learning rate" not in str(stopped.value)
    told = ended(tmp_path)
    assert told["event"] == "stopped"
    assert told == json.loads((tmp_path / "train.jsonl").read_text().splitlines()[-1])
    assert told["recovery"]["pairs_left_out"] == 2
    assert any(note.startswith("Recovered: 2 pairs left out") for note in scorer.notes)
    assert len(quarantined(tmp_path)) == 3  # and the one that was too many


def test_an_interrupted_run_says_what_it_recovered_and_a_resumed_one_says_all(path: Path, tmp_path: Path) -> None:
    examples_of = lambda scorer: relabelled(from_pairs(LABELLED * 4, scorer.pairs), row20=1e30, row70=1e30)  # noqa: E731
    config = replace(CONFIG, steps=20, loss="mse", limits=Limits(quarantined=0.1))
    plan = [[*range(n, n + 6)] for n in range(0, 96, 6)]

    def stop(step: int, total: int) -> float:
        if step == 8:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    scorer = scorer_of(path, "float32")
    with pytest.raises(Interrupted):
        train(scorer, examples_of(scorer), config, out=tmp_path, plan=lambda epoch: plan, lr_factor=stop)
    assert ended(tmp_path) | {"recovery": None} == {
        "event": "stopped", "step": 9, "skipped": 0, "reason": "interrupted", "recovery": None
    }  # fmt: skip
    assert ended(tmp_path)["recovery"]["pairs_left_out"] == 1
    assert any("1 pairs left out" in note for note in scorer.notes)
    again = scorer_of(path, "float32")
    result = train(again, examples_of(again), config, out=tmp_path, plan=lambda epoch: plan, resume=True)
    assert len(result.recovery.quarantined) == 2
    assert ended(tmp_path)["event"] == "end"
    assert "stopped" not in {json.loads(line).get("event") for line in (tmp_path / "train.jsonl").open()}


@pytest.mark.parametrize("size", [1, 2])
def test_a_rare_label_is_no_spike_for_long(path: Path, tmp_path: Path, size: int) -> None:
    scorer = scorer_of(path, "float32")
    rare = [Pair(q, d, float(i % 6 == 0)) for i, (q, d) in enumerate(PAIRS)]
    config = TrainConfig(epochs=max(1, 25 // size), batch_size=size, lr=5e-4)
    result = train(scorer, from_pairs(rare, scorer.pairs), config, out=tmp_path)
    assert result.skipped <= config.limits.spikes_in_a_row - 1
    assert result.recovery.rollbacks == 0


def test_what_is_absurd_stays_a_spike_however_often_it_comes(path: Path, tmp_path: Path) -> None:
    scorer = scorer_of(path, "float32")
    calls = iter(range(10_000))

    def loss(scores: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        usual = torch.nn.functional.binary_cross_entropy_with_logits(scores[:, 0], labels)
        return usual * (1000.0 if scores.requires_grad and next(calls) in (30, 40, 50, 60, 70) else 1.0)

    config = replace(CONFIG, steps=80, limits=Limits())
    result = train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path, loss=loss)
    assert result.recovery.spikes == 5
    assert max(result.losses[i] for i in range(len(result.losses)) if i not in (30, 40, 50, 60, 70)) < 5.0
