"""A batch cut by a token budget has the gradients of the whole: every family, pairs and groups, packed and padded."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from halfrank.data.pairs import Group, Pair
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.scaling import LossScale
from halfrank.train.examples import Examples, MicroBatch, from_groups, from_pairs, micro_batches
from halfrank.train.step import train_step
from tiny import PAIRS, SIZES, make_causal_folder, make_folder

ALLOWED = 1e-6  # relative norm of the difference, over all gradients together
WHOLE, CUT = 10**6, 150  # tokens of a pass
LABELLED = [Pair(query, document, float(i % 2)) for i, (query, document) in enumerate(PAIRS)]
STARTS = (0, 2, 14, 17, 24)  # one group has more tokens than a pass, some share one
GRADED = [
    Group(PAIRS[a][0], tuple(d for _, d in PAIRS[a:b]), tuple(float(i % 3) for i in range(b - a)))
    for a, b in pairwise(STARTS)
]
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "classifier_dropout_prob")


class Recorder(AdamW):
    """Keeps the gradients that it is given, divided as an update would divide them, and updates nothing."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(list(scorer.model.named_parameters()), lr=1e-3)
        self.seen: dict[Tensor, Tensor] = {}
        self.one_by_one = False

    def step(
        self, closure: Any = None, *, grad_divisor: Any = 1.0, gradient_norm: float = 0.0, largest: Any = None
    ) -> Any:
        self.seen = {p: p.grad.clone() / grad_divisor for p in self.parameters() if p.grad is not None}

    def step_one(self, parameter: Tensor, *, grad_divisor: float = 1.0) -> None:
        assert parameter.grad is not None
        self.one_by_one = True
        self.seen[parameter] = parameter.grad.to_dense().clone() / grad_divisor

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def without_dropout(path: Path) -> Path:
    """The same folder, so that two passes in training mode see the same."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | dict.fromkeys(DROPOUT, 0.0)))
    return path


def scorer_of(family: str, place: Path, *, padded: bool) -> Scorer:
    path = without_dropout(make_folder(family, place / family))
    scorer = folder.load(path, folder.LoadOptions(compute="float32"))
    if padded:
        scorer._layout = None
    scorer.model.train()
    return scorer


def gradients(scorer: Scorer, parts: list[MicroBatch], loss: str, *, release: bool = False) -> tuple[Tensor, bool]:
    """All gradients of one step, one after the other, and whether they came one by one."""
    recorder = Recorder(scorer)
    scale = LossScale(enabled=False)
    assert train_step(scorer, parts, LOSSES[loss].function, recorder, scale, clip=0.0, release=release).stored
    return torch.cat([recorder.seen[p].flatten() for p in recorder.parameters() if p in recorder.seen]), (
        recorder.one_by_one
    )


def plain(scorer: Scorer, examples: Examples, loss: str, dtype: torch.dtype) -> Tensor:
    """The gradients of transformers' own padded pass over the whole batch."""
    model = AutoModelForSequenceClassification.from_pretrained(scorer.config.name_or_path, dtype=dtype)
    model.config.pad_token_id = scorer.config.pad_token_id
    part = micro_batches(examples, range(len(examples)), max_tokens=WHOLE, per_unit=False)[0]
    scores = model(**scorer.padded_inputs(part.batch)).logits[:, 0]
    labels = part.labels_P.to(dtype)
    if loss == "bce":
        nn.functional.binary_cross_entropy_with_logits(scores, labels).backward()
    else:
        each = []
        for group in part.groups_P.unique():
            there = part.groups_P == group
            targets = labels[there] / labels[there].sum().clamp(min=1e-30)
            each.append(-(targets * scores[there].log_softmax(0)).sum())
        torch.stack(each).mean().backward()
    named = dict(model.named_parameters())
    return torch.cat([named[n].grad.flatten() for n, _ in scorer.model.named_parameters() if named[n].grad is not None])


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", sorted(SIZES))
def test_gradients_are_those_of_the_whole_batch(family: str, padded: bool, tmp_path: Path) -> None:
    scorer = scorer_of(family, tmp_path, padded=padded)
    if not (padded or scorer.packed):
        pytest.skip("this family is padded anyway")
    for loss in ("bce", "softmax"):
        per_unit = LOSSES[loss].unit == "group"
        examples = from_groups(GRADED, scorer.pairs) if per_unit else from_pairs(LABELLED, scorer.pairs)
        units = range(len(examples))
        whole = micro_batches(examples, units, max_tokens=WHOLE, per_unit=per_unit)
        cut = micro_batches(examples, units, max_tokens=CUT, per_unit=per_unit)
        assert len(whole) == 1 < len(cut)
        assert any(part.pieces for part in cut) is per_unit
        wanted, together = gradients(scorer, whole, loss)
        exact = plain(scorer, examples, loss, torch.float64)
        # Where gradients nearly cancel (over a group, in mpnet's pairs), float32 itself is further from the exact ones.
        rounding = apart(plain(scorer, examples, loss, torch.float32), exact)
        # Two roundings of the same sum lie up to twice that apart; a wrong share would be thousands of times more.
        allowed = 3 * max(ALLOWED, rounding)
        assert rounding < 3e-5
        assert apart(wanted, exact) < allowed
        released, one_by_one = gradients(scorer, whole, loss, release=True)
        assert (together, one_by_one) == (False, True)
        assert torch.equal(released, wanted)
        for checkpointing in (False, True):
            scorer.checkpointing = checkpointing
            for release in (False, True):  # which several micro-batches do not: their gradients are summed first
                found, one_by_one = gradients(scorer, cut, loss, release=release)
                assert not one_by_one
                assert apart(found, wanted) < allowed
        scorer.checkpointing = False


def test_a_vocabulary_is_in_no_tensor_between_tokens_and_loss(tmp_path: Path) -> None:
    # A causal reranker's scores are one number a pair: memory beside the loss grows with pairs, not with words.
    path = make_causal_folder("qwen3", tmp_path / "causal", tied=False)
    scorer = folder.load(path, folder.LoadOptions(compute="float32"))
    words, held = len(scorer.tokenizer), []

    def note(tensor: Tensor) -> Tensor:
        held.append(tuple(tensor.shape))
        return tensor

    examples = from_pairs(LABELLED, scorer.pairs)
    part = micro_batches(examples, range(len(examples)), max_tokens=WHOLE, per_unit=False)[0]
    weights = {tuple(p.shape) for p in scorer.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        LOSSES["bce"].function(scorer.logits(part.batch), part.labels_P, part.groups_P)
    assert held
    assert all(words not in shape for shape in held if shape not in weights)
