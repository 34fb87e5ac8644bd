"""The same batch again, under observation: from what is seen to a Finding, the first cause that holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from halfrank.data.packing import Batch
from halfrank.diagnosis import causes, updates
from halfrank.diagnosis.finding import Cause, Finding
from halfrank.diagnosis.recorder import Recording, kept_buffers
from halfrank.diagnosis.subject import Labelled, Loss, Part, Subject, of_model, of_scorer
from halfrank.errors import NonFiniteWeightError
from halfrank.model.scorer import Scorer


def diagnose(
    model: nn.Module | Any,
    batch: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss_scale: float = 1.0,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Finding | None:
    """Why a training step, or without a loss a prediction, of any PyTorch model goes wrong; None if nothing does.

    `batch` is a mapping of the model's input tensors, with "labels" for training or as (mapping, labels), or (pairs of
    texts, labels) for a CrossEncoder of halfrank or sentence-transformers. `loss_fn(scores, labels)` gives a scalar,
    scores without their axis of one label; a loss module of sentence-transformers works, a listwise one on ((queries,
    documents of each), labels of each); without it the model's own loss is taken. `activation` turns scores into what
    is ranked. Weights, gradients, buffers, optimizer and random state are left as found, also those of modules that
    only the loss or the optimizer holds. An optimizer whose step needs a closure takes no trial step. Raises TypeError
    for a batch of another form, ValueError for one without labels or a loss that is not one number.
    """
    state = torch.get_rng_state()
    training = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        with torch.inference_mode(False), kept_buffers(model) if training else nullcontext():
            subject = of_model(model, batch, loss_fn)
            return explain(subject, optimizer=optimizer, loss_scale=loss_scale, activation=activation)
    finally:
        torch.set_rng_state(state)
        for module, was in training:
            module.training = was


def explain_step(
    scorer: Scorer,
    parts: Sequence[Part],
    loss: Loss,
    *,
    loss_scale: float = 1.0,
    check_labels: Callable[[Tensor], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    source_of: Callable[[int], str] = lambda row: "",
) -> Finding | None:
    """Why a step of the training loop went wrong; call it with the random state that the step began with.

    `optimizer` is looked at only where given: its trial step costs a copy of its state. `source_of` gives the file and
    line of a row. Nothing is changed.
    """
    state = torch.get_rng_state()
    try:
        subject = of_scorer(scorer, parts, loss, check_labels, source_of)
        return explain(subject, optimizer=optimizer, loss_scale=loss_scale)
    finally:
        torch.set_rng_state(state)


def explain_scores(scorer: Scorer, batch: Batch, *, source_of: Callable[[int], str] = lambda row: "") -> Finding | None:
    """Why scores of a batch are not finite in the scorer's compute format; nothing is changed."""
    count = len(batch.rows)
    part = Labelled(batch, torch.zeros(count), torch.zeros(count, dtype=torch.int64), 1.0)
    return _not_finite(of_scorer(scorer, [part], source_of=source_of), 1.0)[0]


def explain_weights(error: NonFiniteWeightError) -> Finding:
    """The finding of weights that a model could not be loaded, stored or saved with."""
    cause = Cause.WEIGHT_OUT_OF_RANGE if error.out_of_range else Cause.CORRUPT_WEIGHT
    module, _, name = (error.tensors[0] if error.tensors else "").rpartition(".")
    remedy = "bfloat16 or float32" if error.out_of_range else "another copy of the weights"
    return Finding(cause, "weights", module, name, {"tensors": float(len(error.tensors))}, remedy=remedy)


def explain_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Finding | None:
    """What is wrong with weights and optimizer state as they were read, before any step is taken with them."""
    subject = Subject(model, lambda: torch.zeros(0, 1))
    return causes.corrupt_weights(subject) or updates.corrupt_state(subject, optimizer)


def explain(
    subject: Subject,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: float = 1.0,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Finding | None:
    """The first cause that holds: what makes numbers non-finite, in the order of the flow, then what is silent."""
    if optimizer is not None and (finding := updates.corrupt_state(subject, optimizer)) is not None:
        return finding
    finding, seen = _not_finite(subject, loss_scale)
    if finding is not None or seen is None:
        return finding
    if (finding := causes.wrong_pad_token(subject)) is not None:
        return finding
    if subject.loss is None:
        return causes.untrained_head(subject) or causes.score_ties(subject, activation)
    if (finding := causes.saturation(subject, seen)) is not None:
        return finding
    if optimizer is not None:
        finding = updates.bad_update(subject, optimizer, seen.gradients, loss_scale)
    return finding or causes.gradient_underflow(subject, seen, loss_scale)


def _not_finite(subject: Subject, loss_scale: float) -> tuple[Finding | None, Recording | None]:
    for check in (causes.corrupt_weights, causes.bad_labels, causes.bad_inputs):
        if (finding := check(subject)) is not None:
            return finding, None
    seen = subject.record(scale=loss_scale)
    if seen.error is not None:
        if (finding := causes.class_beyond_scores(subject, seen)) is not None:
            return finding, None
        raise seen.error
    finding = causes.forward_overflow(subject, seen) or causes.backward_overflow(subject, seen, loss_scale)
    return finding, seen
