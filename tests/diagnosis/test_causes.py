"""Every cause on a real mechanism: the fault is put into weights, data or optimizer, never into a message."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfrank
from halfrank import CrossEncoder, diagnose
from halfrank.diagnosis import Cause, Finding
from tiny import PAIRS, make_folder

LABELS = torch.tensor([float(row % 2) for row in range(8)])
EIGHT = PAIRS[:8]
BCE = nn.BCEWithLogitsLoss()
COMPUTES = ["emulated-float16", "emulated-bfloat16", "float16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_folder(family, root / family) for family in ("bert", "llama", "deberta-v2")}


def ours(
    folders: dict[str, Path], family: str = "bert", compute: str = "emulated-float16", **options: Any
) -> CrossEncoder:
    model = CrossEncoder(str(folders[family]), num_labels=1, compute=compute, **options)
    model._scorer.untrained_head = False
    return model


def plain(
    folders: dict[str, Path], family: str = "bert", dtype: torch.dtype = torch.float16
) -> tuple[Any, dict[str, Tensor]]:
    """A model and a padded batch of transformers' own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(folders[family], num_labels=1, dtype=dtype).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer(*map(list, zip(*EIGHT, strict=True)), padding=True, return_tensors="pt")
    return model, {**batch, "labels": LABELS.to(dtype)}


def found(finding: Finding | None, cause: Cause, module: str | None = None) -> Finding:
    assert finding is not None
    assert finding.cause is cause, str(finding)
    if module is not None:
        assert finding.module == module, str(finding)
    assert str(finding)
    assert finding.as_json()["cause"] == cause.value
    return finding


@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
@pytest.mark.parametrize("compute", ["float32", *COMPUTES, "bfloat16"])
def test_a_healthy_step_has_no_finding(folders: dict[str, Path], family: str, compute: str) -> None:
    model = ours(folders, family, compute)
    optimizer = halfrank.AdamW(model.named_parameters(), lr=2e-5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert diagnose(model, (EIGHT, LABELS), BCE, optimizer, loss_scale=2.0**10) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not optimizer.state


def test_a_healthy_prediction_and_a_healthy_plain_step_have_none(folders: dict[str, Path]) -> None:
    assert diagnose(ours(folders), EIGHT) is None
    for family in folders:
        model, batch = plain(folders, family, torch.float32)
        assert diagnose(model, batch, BCE, torch.optim.AdamW(model.parameters(), lr=2e-5)) is None


def test_corrupt_weight(folders: dict[str, Path]) -> None:
    model = ours(folders)
    model.model.bert.encoder.layer[1].output.dense.weight.data[3, 4] = math.nan
    found(diagnose(model, EIGHT), Cause.CORRUPT_WEIGHT, "bert.encoder.layer.1.output.dense")


def test_weight_out_of_range_once_converted_and_when_it_is_narrowed(folders: dict[str, Path]) -> None:
    name = "bert.encoder.layer.0.intermediate.dense"
    model = ours(folders)
    model.model.get_submodule(name).weight.data[3, 4] = 1e5
    finding = found(diagnose(model, EIGHT), Cause.WEIGHT_OUT_OF_RANGE, name)
    assert finding.replayed
    narrow, batch = plain(folders)
    narrow.get_submodule(name).weight.data[3, 4] = torch.tensor(1e5).half()
    found(diagnose(narrow, batch, BCE), Cause.WEIGHT_OUT_OF_RANGE, name)


@pytest.mark.parametrize("compute", ["emulated-float16", "float16"])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "bert.encoder.layer.0.intermediate.dense"),
        ("llama", "model.layers.0.mlp.up_proj"),
        ("deberta-v2", "deberta.encoder.layer.0.intermediate.dense"),
    ],
)
def test_product_overflow_names_the_product_and_its_islands_help(
    folders: dict[str, Path], family: str, name: str, compute: str
) -> None:
    model = ours(folders, family, compute)
    model.model.get_submodule(name).weight.data *= 3e5
    model.model.get_submodule(name).weight.data.clamp_(-6e4, 6e4)
    finding = found(diagnose(model, EIGHT), Cause.PRODUCT_OVERFLOW)
    assert finding.module == name
    assert finding.replayed, str(finding)
    model._scorer.widen(finding.islands)
    assert torch.tensor(model.predict(EIGHT)).isfinite().all()


def test_a_number_that_is_put_in_is_of_the_operation_that_puts_it_in(folders: dict[str, Path]) -> None:
    model = ours(folders)
    table = model.model.get_input_embeddings()

    def spoil(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((args[0] == args[0].flatten()[3])[..., None], math.inf, output)

    handle = table.register_forward_hook(spoil)
    finding = diagnose(model, EIGHT)
    handle.remove()
    assert finding is not None
    assert (finding.module, finding.operation) == ("bert.embeddings.word_embeddings", "where"), str(finding)


@pytest.mark.parametrize("compute", ["emulated-float16", "float16"])
def test_residual_overflow_is_told_from_a_product(folders: dict[str, Path], compute: str) -> None:
    model = ours(folders, "llama", compute)
    with torch.no_grad():
        model.model.model.embed_tokens.weight.mul_(0).add_(5e4)
        projection = model.model.model.layers[0].mlp.down_proj
        projection.weight.mul_(0)
        projection.bias = nn.Parameter(torch.full((projection.out_features,), 4e4))
    finding = found(diagnose(model, EIGHT), Cause.RESIDUAL_OVERFLOW, "model.layers.0")
    assert finding.operation == "add"
    assert finding.replayed


def test_a_fully_masked_row(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, "bert")
    model.set_attn_implementation("eager")
    batch["attention_mask"][5] = 0

    def half_mask(*args: Any, attention_mask: Tensor, **others: Any) -> Tensor:
        return ((1 - attention_mask[:, None, None, :].float()) * -1e9).half()

    class Wrapped(nn.Module):  # a model that makes its mask as users reported: -1e9, cast to float16
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
            mask = half_mask(attention_mask=attention_mask)
            return self.inner(input_ids=input_ids, attention_mask=mask, token_type_ids=token_type_ids)

    finding = found(diagnose(Wrapped(), batch, BCE), Cause.MASKED_ROW)
    assert "layer.0" in (finding.module or "")
    assert finding.pair is not None
    assert finding.pair.row == 5
    assert finding.replayed


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_softmax_saturation(folders: dict[str, Path], family: str) -> None:
    model = ours(folders, family, "float32")
    attention = "bert.encoder.layer.0.attention.self" if family == "bert" else "model.layers.0.self_attn"
    with torch.no_grad():
        for name, parameter in model.model.get_submodule(attention).named_parameters():
            if name.split(".")[0] in ("query", "key", "q_proj", "k_proj"):
                parameter.mul_(3e3)
    finding = found(diagnose(model, (EIGHT, LABELS), BCE), Cause.SOFTMAX_SATURATION, attention)
    assert finding.replayed
    assert finding.numbers["share of rows at 0 and 1"] == 1.0
    behind = finding.numbers["largest gradient behind it"]
    assert behind < finding.numbers["largest gradient before it"]
    assert ("no gradient passes it" in str(finding)) is (behind == 0.0)


@pytest.mark.parametrize("value", [1e30, 0.0])
def test_normalisation(folders: dict[str, Path], value: float) -> None:
    model = ours(folders, compute="float32")
    layer = model.model.bert.encoder.layer[0].output
    with torch.no_grad():
        if value:
            layer.dense.weight.mul_(value)
        else:
            layer.dense.weight.zero_()
            layer.dense.bias.zero_()
            model.model.bert.encoder.layer[0].attention.output.LayerNorm.weight.zero_()
            model.model.bert.encoder.layer[0].attention.output.LayerNorm.bias.zero_()
            layer.LayerNorm.eps = 0.0
    found(diagnose(model, EIGHT), Cause.NORMALISATION, "bert.encoder.layer.0.output.LayerNorm")


def test_logit_and_loss_overflow(folders: dict[str, Path]) -> None:
    model = ours(folders, compute="float32")
    with torch.no_grad():
        model.model.classifier.weight.mul_(1e38).mul_(100)
        model.model.classifier.weight.clamp_(-3e38, 3e38)
    found(diagnose(model, (EIGHT, LABELS), BCE), Cause.LOSS_OVERFLOW, "classifier")
    model = ours(folders, compute="float32")

    def exploding(scores: Tensor, labels: Tensor) -> Tensor:
        return (scores * 1e5).exp().mean() + (labels * scores).mean()

    found(diagnose(model, (EIGHT, LABELS), exploding), Cause.LOSS_OVERFLOW, "")


@pytest.mark.parametrize("label", [math.nan, math.inf, 7.0])
def test_labels(folders: dict[str, Path], label: float) -> None:
    labels = LABELS.clone()
    labels[3] = label
    finding = found(diagnose(ours(folders), (EIGHT, labels), BCE), Cause.LABEL)
    assert finding.pair is not None
    assert finding.pair.row == 3
    assert "pair 3 (counted from 0)" in str(finding)
    assert EIGHT[3][0][:20] in finding.pair.text
    assert finding.replayed
    assert ("takes labels from 0 to 1" in str(finding)) is (label == 7.0)


def test_gradient_overflow_that_a_lower_scale_cures(folders: dict[str, Path]) -> None:
    finding = found(diagnose(ours(folders), (EIGHT, LABELS), BCE, loss_scale=2.0**26), Cause.GRADIENT_OVERFLOW_SCALE)
    assert finding.loss_scale is not None
    assert diagnose(ours(folders), (EIGHT, LABELS), BCE, loss_scale=finding.loss_scale) is None


def test_gradient_overflow_that_no_scale_cures(folders: dict[str, Path]) -> None:
    def rooted(scores: Tensor, labels: Tensor) -> Tensor:
        return (scores * 0).sqrt().sum() + BCE(scores, labels)

    found(diagnose(ours(folders), (EIGHT, LABELS), rooted, loss_scale=1024.0), Cause.GRADIENT_OVERFLOW, "")


def test_gradient_underflow(folders: dict[str, Path]) -> None:
    def faint(scores: Tensor, labels: Tensor) -> Tensor:
        return BCE(scores, labels) * 1e-6

    finding = found(diagnose(ours(folders), (EIGHT, LABELS), faint), Cause.GRADIENT_UNDERFLOW)
    assert finding.replayed


@pytest.mark.parametrize("fused", [False, True])
def test_second_moment_underflow_of_plain_adamw(folders: dict[str, Path], fused: bool) -> None:
    model, batch = plain(folders)
    finding = found(
        diagnose(model, batch, BCE, torch.optim.AdamW(model.parameters(), lr=2e-5, fused=fused)),
        Cause.SECOND_MOMENT_UNDERFLOW,
    )
    assert finding.replayed
    assert (finding.numbers["weights that became non-finite"] > 0) is not fused


def test_update_lost_to_rounding(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.bfloat16)
    finding = found(diagnose(model, batch, BCE, torch.optim.AdamW(model.parameters(), lr=2e-5)), Cause.UPDATE_LOST)
    assert finding.replayed
    ours_ = halfrank.AdamW(model.named_parameters(), lr=2e-5)
    assert diagnose(model, batch, BCE, ours_) is None


def test_one_update_larger_than_its_weight(folders: dict[str, Path]) -> None:
    model = ours(folders, compute="float32")
    name = "bert.encoder.layer.1.intermediate.dense"
    chosen = model.model.get_submodule(name).weight
    others = [p for p in model.parameters() if p is not chosen]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 2e-5}, {"params": [chosen], "lr": 3.0}])
    finding = found(diagnose(model, (EIGHT, LABELS), BCE, optimizer), Cause.UPDATE_TOO_LARGE, name)
    assert finding.replayed


def test_learning_rate_too_high(folders: dict[str, Path]) -> None:
    model = ours(folders, compute="float32")
    finding = found(
        diagnose(model, (EIGHT, LABELS), BCE, torch.optim.AdamW(model.parameters(), lr=3.0)), Cause.LEARNING_RATE
    )
    assert finding.replayed


def test_wrong_pad_token(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, "llama", torch.float32)
    model.config.pad_token_id = 9
    finding = found(diagnose(model, batch, BCE), Cause.PAD_TOKEN)
    assert finding.replayed


def test_untrained_head_is_found_when_predicting_only(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    batch.pop("labels")
    assert diagnose(model, batch) is None
    with torch.no_grad():
        model.classifier.weight.normal_(0.0, model.config.initializer_range)
        model.classifier.bias.zero_()
    found(diagnose(model, batch), Cause.UNTRAINED_HEAD, "classifier")


def test_score_ties_from_saturation(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.bfloat16)
    batch.pop("labels")
    with torch.no_grad():
        model.classifier.bias.fill_(9.0)
    finding = found(diagnose(model, batch, activation=torch.sigmoid), Cause.SCORE_TIES)
    assert finding.replayed


@pytest.mark.parametrize("damage", [math.nan, math.inf, -1.0])
def test_corrupt_optimizer_state(folders: dict[str, Path], damage: float) -> None:
    model = ours(folders, compute="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    BCE(
        torch.cat([p.reshape(-1)[:1] for p in model.parameters()]), torch.ones(len(list(model.parameters())))
    ).backward()
    optimizer.step()
    name = "bert.encoder.layer.1.output.dense"
    state = optimizer.state[model.model.get_submodule(name).weight]
    state["exp_avg_sq"].view(-1)[5] = damage
    before = copy.deepcopy(state)
    finding = found(diagnose(model, (EIGHT, LABELS), BCE, optimizer), Cause.OPTIMIZER_STATE, name)
    assert finding.replayed
    assert torch.equal(before["exp_avg"], state["exp_avg"])


def test_a_model_of_sentence_transformers_with_its_own_loss(folders: dict[str, Path]) -> None:
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    peer = Peer(str(folders["bert"]), num_labels=1, device="cpu", model_kwargs={"dtype": torch.float16})
    optimizer = torch.optim.AdamW(peer.parameters(), lr=2e-5)
    found(diagnose(peer, (EIGHT, LABELS), BinaryCrossEntropyLoss(peer), optimizer), Cause.SECOND_MOMENT_UNDERFLOW)
    peer.float()
    assert (
        diagnose(peer, (EIGHT, LABELS), BinaryCrossEntropyLoss(peer), torch.optim.AdamW(peer.parameters(), lr=2e-5))
        is None
    )


class Normed(nn.Module):
    """A model that transformers knows nothing of: running statistics, no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def normed() -> tuple[Normed, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Normed(), {"x": torch.randn(8, 4), "labels": LABELS.clone()}


def test_anybodys_module_has_no_finding_and_keeps_its_running_statistics() -> None:
    model, batch = normed()
    before = copy.deepcopy(model.state_dict())
    for form in (batch, ({"x": batch["x"]}, LABELS), ({"x": batch["x"]}, LABELS.tolist())):
        assert diagnose(model, form, BCE, torch.optim.AdamW(model.parameters(), lr=1e-3)) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_step_is_diagnosed_in_inference_mode_too() -> None:
    model, batch = normed()
    with torch.inference_mode():
        inside = {name: tensor.clone() for name, tensor in batch.items()}
        assert diagnose(model, inside, BCE) is None
        model.layers[0].bias[2] = math.nan  # type: ignore[index]
        found(diagnose(model, inside, BCE), Cause.CORRUPT_WEIGHT, "layers.0")


def test_a_logarithm_of_zero_is_the_losss_and_no_mask() -> None:
    model, batch = normed()
    batch["labels"] = torch.ones(8)
    nn.init.constant_(model.layers[3].bias, -200.0)  # type: ignore[arg-type]

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return -(labels * torch.log(torch.sigmoid(scores))).mean()

    found(diagnose(model, batch, loss), Cause.LOSS_OVERFLOW)


def test_a_rate_that_replaces_every_weight_is_too_high_though_one_batch_is_learned_by_heart() -> None:
    model, batch = normed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
    assert found(diagnose(model, batch, BCE, optimizer), Cause.LEARNING_RATE).replayed


def test_a_mask_of_four_dimensions_with_a_masked_row_is_no_pad_token(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    model.set_attn_implementation("eager")
    wide = batch["attention_mask"][:, None, None, :].float().log()
    wide = wide.expand(-1, -1, wide.shape[-1], -1).contiguous()
    assert diagnose(model, {**batch, "attention_mask": wide}, BCE) is None
    wide[5, :, 1] = -math.inf
    finding = found(diagnose(model, {**batch, "attention_mask": wide}, BCE), Cause.MASKED_ROW)
    assert finding.pair is not None
    assert finding.pair.row == 5
    assert finding.replayed


def test_an_input_that_is_not_finite_is_named(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[2, 1, 3] = math.nan
    finding = found(diagnose(model, {**batch, "inputs_embeds": embeds}, BCE), Cause.INPUT)
    assert finding.operation == "inputs_embeds", str(finding)
    assert finding.pair is not None
    assert finding.pair.row == 2
    assert finding.replayed


@pytest.mark.parametrize("token", [10_000, -1])
def test_a_token_that_the_model_does_not_have_is_named(folders: dict[str, Path], token: int) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    batch["input_ids"][6, 1] = token
    finding = found(diagnose(model, batch, BCE), Cause.INPUT)
    assert finding.pair is not None
    assert finding.pair.row == 6
    assert finding.numbers["token"] == token


def test_only_what_is_no_mask_is_an_input_that_is_not_finite() -> None:
    model, batch = normed()

    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.inner(x) + (mask.softmax(-1) * x).sum(-1, keepdim=True)

    mask = torch.zeros(8, 4)
    mask[:, 3] = -math.inf
    assert diagnose(Masking(), {**batch, "mask": mask}, BCE) is None
    found(diagnose(Masking(), {**batch, "mask": -mask}, BCE), Cause.INPUT)


def test_what_float32_does_not_cure_is_not_said_to_be_cured(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    handle = model.classifier.weight.register_hook(lambda gradient: gradient * math.nan)
    finding = found(diagnose(model, batch, BCE), Cause.GRADIENT_OVERFLOW)
    handle.remove()
    assert "in float32 either" in finding.remedy
    assert not finding.replayed


def test_a_weight_decay_that_takes_the_weights_away(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=1e6)
    finding = found(diagnose(model, batch, BCE, optimizer), Cause.UPDATE_TOO_LARGE)
    assert "weight decay" in finding.remedy
    assert finding.replayed
    assert optimizer.param_groups[0]["weight_decay"] == 1e6


def test_a_label_that_no_loss_can_hold(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][6] = 1e25
    finding = found(diagnose(model, batch, nn.MSELoss()), Cause.LABEL)
    assert finding.pair is not None
    assert finding.pair.row == 6
    assert finding.replayed


def test_a_loss_without_weights_is_said(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.float32)
    with pytest.raises(ValueError, match="does not depend on any weight"):
        diagnose(model, batch, lambda scores, labels: BCE(scores.detach(), labels))


def test_small_updates_of_bfloat16_are_seen_to_be_saved(folders: dict[str, Path]) -> None:
    model, batch = plain(folders, dtype=torch.bfloat16)
    for rate in (1e-6, 2e-5):
        finding = diagnose(model, batch, BCE, torch.optim.AdamW(model.parameters(), lr=rate))
        assert found(finding, Cause.UPDATE_LOST).replayed, rate


class Dividing(nn.Module):
    """Scores divided by what the caller says, in a module of its own as pooling is."""

    def __init__(self, divide: Any) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Linear(4, 8), Divide(divide), nn.Linear(8, 1)

    def forward(self, x: Tensor, divisor: Tensor) -> Tensor:
        return self.last(self.pool(self.first(x), divisor))


class Divide(nn.Module):
    def __init__(self, divide: Any) -> None:
        super().__init__()
        self.divide = divide

    def forward(self, x: Tensor, divisor: Tensor) -> Tensor:
        return self.divide(x, divisor[:, None])


@pytest.mark.parametrize(
    ("divide", "operation"),
    [
        (lambda x, y: x / y, "div"),
        (lambda x, y: x.div(y, rounding_mode=None), "div"),
        (lambda x, y: x.clone().div_(y), "div_"),
        (lambda x, y: x * y.reciprocal(), "reciprocal"),
        (lambda x, y: x * y.rsqrt(), "rsqrt"),
        (lambda x, y: x * y**-2, "pow"),
        (lambda x, y: (x * 0) / y, "div"),  # 0 / 0
    ],
)
def test_a_division_by_zero_is_no_overflow_of_a_product(divide: Any, operation: str) -> None:
    torch.manual_seed(0)
    divisor = torch.tensor([1.0, 2, 3, 4, 0, 5, 6, 7])
    batch = {"x": torch.randn(8, 4), "divisor": divisor, "labels": LABELS}
    finding = found(diagnose(Dividing(divide), batch, BCE), Cause.NORMALISATION, "pool")
    assert finding.operation == operation
    assert finding.numbers["zeros divided by"] == 1
    assert "a division by 0 made the first number that is not finite (1 divisor 0)" in str(finding)
    assert finding.pair is not None
    assert finding.pair.row == 4
    assert "drop the pair" in finding.remedy
    assert finding.replayed
    assert diagnose(Dividing(divide), batch | {"divisor": divisor + 1}, BCE) is None


def test_a_large_quotient_is_no_division_by_zero() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 4), "divisor": torch.full((8,), 1e-39), "labels": LABELS}
    finding = found(diagnose(Dividing(lambda x, y: x / y), batch, BCE), Cause.PRODUCT_OVERFLOW, "pool")
    assert "by 0" not in str(finding)


def test_a_division_by_zero_in_the_loss_is_said() -> None:
    model, batch = normed()
    finding = found(
        diagnose(model, batch, lambda scores, labels: (scores / (labels - labels)).mean()), Cause.LOSS_OVERFLOW
    )
    assert "a division by 0" in str(finding)
    assert "away from 0" in finding.remedy


class Around(nn.Module):
    """A model of its own whose scores are another's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_the_logarithm_of_a_saturated_softmax_is_no_mask() -> None:
    torch.manual_seed(0)
    model = Around(nn.Linear(4, 3))
    nn.init.normal_(model.inner.weight, std=1e4)  # type: ignore[arg-type]

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return -torch.log(scores.softmax(-1)).gather(1, labels[:, None]).mean()

    batch = {"x": torch.randn(8, 4), "labels": torch.arange(8) % 3}
    finding = found(diagnose(model, batch, loss), Cause.LOSS_OVERFLOW)
    assert finding.operation == "log"
    assert finding.phase == "loss"
    assert "with logits" in finding.remedy


class Pooled(nn.Module):
    """Divides in its own forward, between two leaves; `late` in what follows the last of them."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.late = nn.Linear(4, 4), nn.Linear(4, 1), late

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        if self.late:
            return self.head(self.body(x)) / count[:, None]
        return self.head(self.body(x) / count[:, None])


@pytest.mark.parametrize("labels", [LABELS, None])
def test_what_a_models_own_forward_does_is_the_losss_only_after_its_last_leaf(labels: Tensor | None) -> None:
    torch.manual_seed(0)
    count = torch.ones(8)
    count[3] = 0
    batch = {"x": torch.randn(8, 4), "count": count, **({} if labels is None else {"labels": labels})}
    loss = None if labels is None else BCE
    finding = found(diagnose(Pooled(), batch, loss), Cause.NORMALISATION)
    assert finding.phase == "forward"
    assert finding.pair is not None
    assert finding.pair.row == 3
    assert found(diagnose(Pooled(late=True), batch, loss), Cause.LOSS_OVERFLOW).phase == "loss"


def test_a_loss_of_no_label_at_all_is_the_labels() -> None:
    torch.manual_seed(0)
    model = Around(nn.Linear(4, 3))
    batch = {"x": torch.randn(8, 4), "labels": torch.full((8,), -100)}
    assert "-100" in str(found(diagnose(model, batch, nn.CrossEntropyLoss()), Cause.LABEL))
    batch["labels"][2] = 7
    finding = found(diagnose(model, batch, nn.CrossEntropyLoss()), Cause.LABEL)
    assert finding.pair is not None
    assert finding.pair.row == 2
    assert "0 to 2" in str(finding)
    batch["labels"][2] = 1
    assert diagnose(model, batch, nn.CrossEntropyLoss()) is None


def test_what_only_the_loss_or_the_optimizer_holds_is_left_as_found() -> None:
    model, batch = normed()
    temperature, stranger = nn.Linear(1, 1), nn.Linear(2, 2)
    stranger(torch.randn(3, 2)).sum().backward()
    temperature.weight.grad = torch.full((1, 1), 3.0)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *temperature.parameters(), *stranger.parameters()], lr=0.01, momentum=0.9
    )
    heard = []
    optimizer.register_step_post_hook(lambda *_: heard.append(1))
    held = [*temperature.parameters(), *stranger.parameters()]
    before = [(p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone()) for p in held]
    finding = diagnose(model, batch, lambda s, y: BCE(temperature(s[:, None])[:, 0], y), optimizer)
    assert finding is None, str(finding)
    for parameter, (weight, gradient, values) in zip(held, before, strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is gradient
        assert gradient is None or values is None or torch.equal(gradient, values)
    assert not optimizer.state
    assert not heard


@pytest.mark.parametrize(
    ("make", "rate"),
    [(torch.optim.SGD, 0.3), (torch.optim.Adagrad, 0.05), (torch.optim.RMSprop, 1e-3), (torch.optim.Adamax, 2e-3)],
)
def test_a_rate_is_judged_by_the_optimizer_that_it_belongs_to(make: Any, rate: float) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = Around(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
        x = torch.randn(32, 8)
        batch = {"x": x, "labels": x[:, 0].sin()}
        finding = diagnose(model, batch, nn.MSELoss(), make(model.parameters(), lr=rate))
        assert finding is None or finding.cause is not Cause.LEARNING_RATE, str(finding)
        trained = make(model.parameters(), lr=rate)
        losses = []
        for _ in range(200):
            loss = nn.functional.mse_loss(model(x)[:, 0], batch["labels"])
            losses.append(loss.item())
            trained.zero_grad()
            loss.backward()
            trained.step()
        assert losses[-1] < losses[0] * 0.9  # the rate is a good one
    found(diagnose(model, batch, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=300.0)), Cause.LEARNING_RATE)


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_every_optimizer_that_divides_by_a_moment_can_lose_it(folders: dict[str, Path], make: Any) -> None:
    model, batch = plain(folders)
    finding = found(diagnose(model, batch, BCE, make(model.parameters(), lr=1e-4)), Cause.SECOND_MOMENT_UNDERFLOW)
    assert finding.replayed
    after = copy.deepcopy(model)
    optimizer = make(after.parameters(), lr=1e-4)
    BCE(after(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, 0], batch["labels"]).backward()
    optimizer.step()
    assert not all(bool(p.isfinite().all()) for p in after.parameters())  # the real step breaks them


def test_a_matrix_that_began_at_zero_may_grow_by_its_own_length() -> None:
    torch.manual_seed(0)
    model = Normed()
    nn.init.zeros_(model.layers[0].weight)  # type: ignore[arg-type]
    batch = {"x": torch.randn(8, 4), "labels": LABELS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(3):
        assert diagnose(model, batch, BCE, optimizer) is None, step
        optimizer.zero_grad()
        BCE(model(batch["x"])[:, 0], LABELS).backward()
        optimizer.param_groups[0]["lr"] = 1e-4 * (step + 1)
        optimizer.step()


def test_a_velocity_named_v_is_no_second_moment() -> None:
    model, batch = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        optimizer.state[parameter]["v"] = -torch.ones_like(parameter)
    assert diagnose(model, batch, BCE, optimizer) is None


def test_rows_as_gradients_and_an_optimizer_with_a_closure_are_no_crash() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).mean(1))

    torch.manual_seed(0)
    model = Rows()
    batch = {"ids": torch.randint(0, 20, (8, 5)), "labels": LABELS}
    assert diagnose(model, batch, BCE, torch.optim.LBFGS(model.parameters())) is None
    model.table.weight.data[batch["ids"][4, 0]] = math.inf
    found(diagnose(model, batch, BCE), Cause.CORRUPT_WEIGHT, "table")


def test_a_batch_of_another_form_is_refused_with_those_that_are_taken(folders: dict[str, Path]) -> None:
    model, batch = normed()
    for wrong in ((batch["x"], LABELS), [batch["x"], LABELS], batch["x"], "text", object()):
        with pytest.raises(TypeError, match="A batch is a mapping"):
            diagnose(model, wrong, BCE)
    for missing in ({"x": batch["x"]}, ({"x": batch["x"]}, None)):
        with pytest.raises(ValueError, match="needs labels"):
            diagnose(model, missing, BCE)
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        diagnose(model, batch, nn.BCEWithLogitsLoss(reduction="none"))
    with pytest.raises(ValueError, match="8 pairs and 2 labels"):
        diagnose(ours(folders), (EIGHT, LABELS[:2]), BCE)


@pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch)")
def test_a_listwise_step_of_sentence_transformers_is_diagnosed(folders: dict[str, Path]) -> None:
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.cross_encoder.losses import LambdaLoss

    model = Peer(str(folders["bert"]), num_labels=1, device="cpu")
    texts = [text for _, text in EIGHT]
    batch = ([EIGHT[0][0], EIGHT[4][0]], [texts[:4], texts[4:]])
    labels = [torch.tensor([1.0, 0, 0, 1]), torch.tensor([0.0, 1, 0, 0])]
    assert diagnose(model, (batch, labels), LambdaLoss(model)) is None
    labels[1][2] = math.nan
    finding = found(diagnose(model, (batch, labels), LambdaLoss(model)), Cause.LABEL)
    assert finding.pair is not None
    assert finding.pair.row == 6
    with pytest.raises(ValueError, match="as many labels"):
        diagnose(model, (batch, labels[:1]), LambdaLoss(model))


class Counting(torch.optim.SGD):
    """Keeps counters of its own, on itself and in its groups."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.01, momentum=0.9)
        self.count, self.seen = 0, [0]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.count += 1
        self.seen[0] += 1
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


def test_a_trial_step_is_a_twins_and_leaves_the_optimizer_to_the_object() -> None:
    model, batch = normed()
    optimizer = Counting(model.parameters())
    BCE(model(batch["x"])[:, 0], LABELS).backward()
    optimizer.step()
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    buffers = {p: state["momentum_buffer"] for p, state in optimizer.state.items()}
    values = {p: buffer.clone() for p, buffer in buffers.items()}
    assert diagnose(model, batch, BCE, optimizer) is None
    assert (optimizer.count, optimizer.seen, optimizer.param_groups[0]["k"]) == (1, [1], 1)
    assert all(optimizer.state[p]["momentum_buffer"] is buffer for p, buffer in buffers.items())
    assert all(torch.equal(buffers[p], value) for p, value in values.items())
    assert not getattr(optimizer, "_opt_called", False)


def test_an_optimizer_without_a_rate_of_its_own_is_diagnosed() -> None:
    from transformers.optimization import Adafactor

    model, batch = normed()
    optimizer = Adafactor(model.parameters())
    assert diagnose(model, batch, BCE, optimizer) is None
    assert not optimizer.state
