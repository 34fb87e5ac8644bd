"""The doctor's numbers against plain counts, and its warnings on models and data that deserve them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from halfrank.data.pairs import Group, Pair, by_query
from halfrank.doctor import checks
from halfrank.doctor.arithmetic import constants, lost_constants, moved
from halfrank.doctor.checks import Plan, examine
from halfrank.doctor.modules import Module, Numbers, measure
from halfrank.doctor.report import Examination
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.precision import Hardware
from tiny import PAIRS, make_folder

UNIQUE = sorted(set(PAIRS))
GROUPS = by_query([Pair(q, d, float(n % 2)) for n, (q, d) in enumerate(UNIQUE)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "bert")


def loaded(model: Path, compute: str = "auto", dtype: torch.dtype | None = None) -> Scorer:
    return folder.load(model, folder.LoadOptions(compute=compute, dtype=dtype))


def levels(report: Examination) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for check in report.checks:
        found.setdefault(check.topic, set()).add(check.level)
    return found


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_underflow_is_that_of_rounding(scale: float) -> None:
    values = torch.randn(20_000) * torch.exp2(torch.randint(-40, 4, (20_000,)).float())
    numbers = Numbers()
    numbers.see(values)
    exact = float(((values * scale).half() == 0)[values != 0].float().mean())
    # Counted by exponent: the binade that half the smallest number lies at the edge of is a 44th of the values here.
    assert numbers.underflow(torch.float16, scale) == pytest.approx(exact, abs=0.03)
    assert numbers.largest == float(values.abs().max())
    assert numbers.headroom(torch.float16) == pytest.approx(math.log2(65504 / numbers.largest))


def test_names_tell_layer_and_role() -> None:
    assert (Module("bert.encoder.layer.3.output.dense", "Linear").layer, Module("a.layers.11.mlp.up", "").layer) == (
        3,
        11,
    )
    assert Module("bert.encoder.layer.3.output.dense", "Linear").role == "output.dense"
    assert (Module("classifier", "Linear").layer, Module("classifier", "Linear").role) == (None, "classifier")


def test_measured_gradients_are_those_of_plain_autograd(model: Path) -> None:
    scorer = loaded(model)
    labels = torch.tensor([float(n % 2) for n in range(len(PAIRS))])
    found, logits, mean = measure(scorer, PAIRS, labels, LOSSES["bce"].function)
    ours = {name: p.grad.clone() for name, p in scorer.model.named_parameters() if p.grad is not None}
    batch = scorer.tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, truncation=True, return_tensors="pt")
    scorer.model.zero_grad()
    plain = scorer.model(**batch).logits
    loss = nn.functional.binary_cross_entropy_with_logits(plain[:, 0], labels)
    loss.backward()
    torch.testing.assert_close(logits, plain.detach(), atol=1e-5, rtol=0)
    assert mean == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, parameter in scorer.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-3)
    dense = "bert.encoder.layer.0.output.dense"
    assert found[dense].gradient.largest >= float(ours[f"{dense}.weight"].abs().max())
    assert not scorer.model.training


def test_constants_in_narrow_formats() -> None:
    assert constants(torch.float16)["eps"] == 0
    assert constants(torch.bfloat16)["beta2"] == 1
    assert len(lost_constants(torch.float16)) == len(lost_constants(torch.bfloat16)) == 1
    assert lost_constants(torch.float32) == []


def test_moved_shares_are_those_of_real_steps() -> None:
    torch.manual_seed(1)
    weight, gradient = torch.randn(64, 64) * 0.05, torch.randn(64, 64) * 1e-3
    shares = moved({"w": (weight, gradient)}, lr=2e-5)
    assert shares["plain float16"]["non_finite"] > 0.9
    assert shares["halfrank float16"] == {"moved": pytest.approx(1.0, abs=0.01), "non_finite": 0.0}
    stored = weight.bfloat16()
    unmoved = float(((stored.float() - 2e-5 * gradient.sign()).bfloat16() == stored).float().mean())
    assert shares["plain bfloat16"]["moved"] == pytest.approx(1 - unmoved, abs=0.05)


def test_a_sound_model_on_sound_data_has_nothing_to_fix(model: Path) -> None:
    scorer = loaded(model, "emulated-float16")
    before = {name: tensor.clone() for name, tensor in scorer.model.state_dict().items()}
    report = examine(scorer, GROUPS, None, Plan(), name="bert")
    assert report.sound, report.worst_first
    assert all(torch.equal(before[name], tensor) for name, tensor in scorer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in scorer.model.parameters())
    assert {row.layer for row in report.modules} == {None, 0, 1}
    assert len(report.attention) == 2
    assert report.loss_scale is not None
    scaled = report.loss_scale["largest_gradient"] * report.loss_scale["recommended"]
    assert 65504 / 16 < scaled <= 65504 / 8


@pytest.mark.parametrize("family", ["llama", "mpnet", "deberta-v2"])
def test_other_families_are_examined(family: str, tmp_path: Path) -> None:
    report = examine(loaded(make_folder(family, tmp_path / family)), None, None, Plan(), name=family)
    assert report.sound
    assert len(report.attention) == 2


def test_overflow_is_a_fix_where_the_format_is_asked_for_and_a_note_elsewhere(model: Path) -> None:
    for compute, level in (("emulated-float16", "fix"), ("emulated-bfloat16", "note"), ("float32", "note")):
        scorer = loaded(model, compute)
        with torch.no_grad():
            scorer.model.bert.encoder.layer[0].output.dense.weight.mul_(3e5)
        report = examine(scorer, GROUPS, None, Plan(), name="bert")
        assert level in levels(report)["overflow"], compute
        assert report.sound == (level == "note")
        if level == "fix":
            said = next(check for check in report.worst_first if check.topic == "overflow")
            assert "layer.0.output.dense" in said.found
            assert "then every score is finite" in said.change


def test_bfloat16_products_are_offered_where_the_processor_has_them(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for products in (True, False):
        monkeypatch.setattr(checks, "detect", lambda _, p=products: Hardware("cpu", False, p, "CPU with amx_bf16"))
        report = examine(loaded(model, "float32"), None, None, Plan(), name="bert")
        offered = [check for check in report.checks if check.topic == "speed"]
        assert len(offered) == products
        for check in offered:
            assert check.level == "note"
            assert "halfrank export MODEL --dtype bfloat16" in check.change
            assert 0 < float(check.found.rsplit(" ", 1)[1].rstrip(".")) < 0.05


def test_bad_data_is_named(model: Path) -> None:
    one_label = by_query([Pair(q, d, 1.0) for q, d in UNIQUE])
    stars = by_query([Pair(q, d, float(n % 5)) for n, (q, d) in enumerate(UNIQUE)])
    quarrel = by_query([Pair(q, d, label) for q, d in UNIQUE for label in (0.0, 1.0)])
    cases = {"labels": (one_label, None), "labels ": (stars, None), "contradictions": (quarrel, None),
             "leakage": (GROUPS, GROUPS)}  # fmt: skip
    for topic, (groups, held_out) in cases.items():
        report = examine(loaded(model), groups, held_out, Plan(), name="bert")
        assert "fix" in levels(report)[topic.strip()], topic
        assert not report.sound
    assert "labels" not in levels(examine(loaded(model), stars, None, Plan(grouped=True), name="bert"))


def test_a_large_rate_zeros_and_saturated_attention_are_named(model: Path) -> None:
    assert "fix" in levels(examine(loaded(model), GROUPS, None, Plan(lr=0.05), name="bert"))["learning rate"]
    scorer = loaded(model)
    with torch.no_grad():
        scorer.model.bert.encoder.layer[1].attention.self.query.weight.mul_(300)
        scorer.model.bert.encoder.layer[0].output.dense.weight.zero_()
    found = levels(examine(scorer, GROUPS, None, Plan(), name="bert"))
    assert "fix" in found["weights"]
    assert "warn" in found["attention"]


def test_a_report_is_plain_json(model: Path) -> None:
    import json

    scorer = loaded(model)
    with torch.no_grad():
        scorer.model.classifier.weight.zero_()
    report = examine(scorer, [Group("q", ("a", "b"), (1.0, 0.0))], None, Plan(), name="bert")
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content["sound"]
    assert any("at first only the head learns" in check["found"] for check in content["checks"])
