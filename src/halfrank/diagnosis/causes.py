"""What was seen, to its cause: one function a cause or a family of causes, each a Finding or None.

The checks look at values and operations, never at messages. Shapes: P pairs, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfrank.diagnosis.finding import Cause, Finding, PairReference
from halfrank.diagnosis.islands import find_islands, modules_of
from halfrank.diagnosis.recorder import Event, Recording, clamped_masks
from halfrank.diagnosis.subject import IGNORED, Subject, beyond, in_float32
from halfrank.numerics.formats import all_finite, dtype_name

SMALLEST_SCALE = 2.0**-14
UNDERFLOW_SHARE = 0.25  # of the gradients that float32 has, lost as zeros: below it a run is only slightly off
UNDERFLOW_SCALE = 2.0**16
FAR_LABEL = 1e6  # times the largest score
LOGARITHMS = ("log", "log2", "log10")
NORMALISING = ("native_layer_norm", "native_layer_norm_backward", "rsqrt", "var", "var_mean", "std", "_fused_rms_norm")


def corrupt_weights(subject: Subject) -> Finding | None:
    """A parameter or buffer that is not finite as it is stored."""
    tensors = (*subject.model.named_parameters(), *subject.model.named_buffers())
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0 or bool(tensor.detach().isfinite().all()):
            continue
        values = tensor.detach()
        numbers = {"NaN": float(values.isnan().sum()), "infinite": float(values.isinf().sum())}
        # Conversion makes infinities of what is too large, never NaN; a scorer has refused such weights on loading.
        converted = tensor.dtype is torch.float16 and numbers["NaN"] == 0 and subject.scorer is None
        module, _, _ = name.rpartition(".")
        remedy = "load the weights in bfloat16 or float32" if converted else "load another copy of the weights"
        cause = Cause.WEIGHT_OUT_OF_RANGE if converted else Cause.CORRUPT_WEIGHT
        return Finding(cause, "weights", module, name.rpartition(".")[2], numbers, remedy=remedy)
    return None


def bad_labels(subject: Subject) -> Finding | None:
    """Labels that are not finite, or outside what the loss is defined for."""
    if subject.labels is None:
        return None
    labels = subject.labels.detach().reshape(-1) if subject.labels.ndim < 2 else subject.labels.detach()
    rows = range(len(labels))
    bad = [row for row in rows if not bool(labels[row].float().isfinite().all())]
    why = "a label is NaN or infinite"
    if not bad and not labels.is_floating_point() and len(labels) and bool((labels == IGNORED).all()):
        bad = list(rows)
        why = f"every label is {IGNORED}, which losses leave out: the mean of no loss is 0 divided by 0"
    if not bad and subject.check_labels is not None:
        refused = {row: _refused(subject.check_labels, labels[row : row + 1]) for row in rows}
        bad = [row for row, reason in refused.items() if reason]
        why = f"a label is outside what the loss is defined for: {refused[bad[0]]}" if bad else why
    return _bad_label(subject, labels, bad, why) if bad else None


def class_beyond_scores(subject: Subject, seen: Recording) -> Finding | None:
    """After a loss that raised: a class for which there is no score."""
    labels, scores = subject.labels, seen.scores
    if labels is None or scores is None or scores.ndim != 2 or labels.is_floating_point() or labels.ndim != 1:
        return None
    classes = scores.shape[1]
    bad = beyond(labels, classes).nonzero()[:, 0].tolist()
    why = f"a label is outside what the loss is defined for: the classes are 0 to {classes - 1}"
    return _bad_label(subject, labels, bad, why) if bad else None


def bad_inputs(subject: Subject) -> Finding | None:
    """Inputs that hold NaN or infinity (-inf is a mask's), or a token beyond the embedding table."""
    for name, values in (subject.inputs or {}).items():
        if not isinstance(values, Tensor) or values.ndim == 0 or values.is_sparse:
            continue
        if values.is_floating_point():
            endless = values == math.inf
            wrong = values.isnan() | endless
            numbers = {"NaN": float(values.isnan().sum()), "infinite": float(endless.sum())}
            why = f"'{name}' holds numbers that are not finite, and so is everything made of them"
        elif name == "input_ids" and (known := _table_size(subject.model)) is not None:
            wrong = (values < 0) | (values >= known)
            numbers = {"token": float(values[wrong][0]) if bool(wrong.any()) else 0.0, "tokens known": float(known)}
            why = "a token is not in the embedding table, which was made for another tokenizer"
        else:
            continue
        bad = sorted(set(wrong.nonzero()[:, 0].tolist()))
        if bad and len(values) == len(subject.rows):
            return _bad_rows(subject, Cause.INPUT, len(values), bad, numbers, why, name)
        if bad:
            return Finding(
                Cause.INPUT, "data", operation=name, numbers=numbers, remedy=f"correct '{name}'", why=why
            )  # fmt: skip
    return None


def forward_overflow(subject: Subject, seen: Recording) -> Finding | None:
    """Scores or loss that are not finite, from the first operation that made them so."""
    event = seen.event
    if event is None or event.phase == "backward":
        return None
    if event.masked_row:
        return _masked_row(subject, seen, event)
    cause, module, operation = _forward_cause(subject, event)
    why = _divided(event)
    finding = Finding(cause, event.phase, module, operation, event.numbers, pair=_pair(subject, seen), why=why)
    if event.phase == "loss":
        if (far := _far_label(subject, seen)) is not None:
            return far
        if event.zero_divisors:
            return _with_guard(subject, finding)
        if operation in LOGARITHMS and event.numbers.get("share of zeros"):
            return replace(
                finding, why="a logarithm of 0: a sigmoid or softmax of scores this far apart is exactly 0 or 1",
                remedy="take the logarithm of the scores in one piece, as logsigmoid, log_softmax and torch's losses "
                "with logits do",
            )  # fmt: skip
        remedy = "compute scores and loss in float32, and lower the learning rate if the scores keep growing"
        return replace(finding, remedy=remedy, replayed=_finite_in_float32(subject))
    return _with_islands(subject, seen, event, finding)


def backward_overflow(subject: Subject, seen: Recording, scale: float) -> Finding | None:
    """Gradients that are not finite though the loss is: cured by a lower scale, or by none."""
    if seen.loss is None or not math.isfinite(seen.loss) or _all_finite(seen.gradients.values()):
        return None
    event = seen.event
    module = event.module if event is not None else _first_broken(seen)
    operation = None if event is None else event.operation
    numbers = {} if event is None else dict(event.numbers)
    pair = _pair_of_gradient(subject, scale)
    smaller = _largest_finite_scale(subject, scale)
    if smaller is not None:
        return Finding(
            Cause.GRADIENT_OVERFLOW_SCALE, "backward", module, operation, {**numbers, "loss scale": scale}, pair,
            remedy=f"a loss scale of {smaller:g}", loss_scale=smaller, replayed=True,
        )  # fmt: skip
    wide = subject.narrow is not None and _finite_in_float32(subject)
    islands = (module,) if wide and module and subject.scorer is not None else ()
    remedy = "compute this module in float32" if wide else "drop the pair; its gradient is not finite in float32 either"
    replayed = wide or _finite_without(subject, _others(subject, pair))
    return Finding(
        Cause.GRADIENT_OVERFLOW, "backward", module, operation, numbers, pair, remedy, islands, replayed=replayed,
        why="" if event is None else _divided(event),
    )  # fmt: skip


def saturation(subject: Subject, seen: Recording) -> Finding | None:
    """A softmax whose rows are 0 and 1, so that nothing behind it learns."""
    if not seen.saturated:
        return None
    event = seen.saturated[-1]  # the last one backward is the first one forward
    rows, behind = event.numbers["share of rows at 0 and 1"], event.numbers["largest gradient behind it"]
    kind = "sigmoid" if "sigmoid" in event.operation else "softmax"
    passes = f"the largest gradient that passes it is {behind:.2g}" if behind else "no gradient passes it"
    why = f"{rows:.0%} of the rows of a {kind} hold nothing but 0 and 1, and {passes}"
    return Finding(
        Cause.SOFTMAX_SATURATION, "backward", event.module, event.operation, event.numbers,
        remedy="scale down what enters the softmax (its scores are far apart), or start from other weights",
        replayed=_alive_when_scaled(subject, event.module), why=why,
    )  # fmt: skip


def gradient_underflow(subject: Subject, seen: Recording, scale: float) -> Finding | None:
    """Gradients that are 0 at this loss scale and not at a larger one."""
    narrow = {name: grad for name, grad in seen.gradients.items() if grad.ndim > 1 and bool(grad.isfinite().all())}
    if subject.narrow is None or not narrow or scale >= UNDERFLOW_SCALE:
        return None
    raised = subject.record(scale=UNDERFLOW_SCALE).gradients
    lost, kept = {}, {}
    for name, gradient in narrow.items():
        there = raised[name] != 0
        if int(there.sum()):
            lost[name] = float((there & (gradient == 0)).sum())
            kept[name] = float(there.sum())
    share = sum(lost.values()) / max(sum(kept.values()), 1.0)
    if share < UNDERFLOW_SHARE:
        return None
    worst = max(lost, key=lambda name: lost[name] / kept[name])
    numbers = {"share of zeros": share, "worst module": lost[worst] / kept[worst], "loss scale": scale}
    return Finding(
        Cause.GRADIENT_UNDERFLOW, "backward", worst.rpartition(".")[0], None, numbers,
        remedy=f"scale the loss, by {UNDERFLOW_SCALE:g} for example", loss_scale=UNDERFLOW_SCALE,
        replayed=_all_finite(raised.values()),
    )  # fmt: skip


def wrong_pad_token(subject: Subject) -> Finding | None:
    """A pad id in the configuration that is not what stands in the padding."""
    stored, true = subject.pad_token_id, subject.true_pad_token_id
    if not hasattr(getattr(subject.model, "config", None), "pad_token_id"):
        return None  # a model that is told of no pad id reads none
    ids, mask = (None if subject.inputs is None else subject.inputs.get(key) for key in ("input_ids", "attention_mask"))
    if ids is not None and mask is not None and ids.shape == mask.shape:
        padding = ids[mask == 0].unique()
        if len(padding) == 1:
            true = int(padding[0])
        elif len(padding) == 0 and true is None:
            return None
    if true is None or stored == true:
        return None
    return Finding(
        Cause.PAD_TOKEN, "data",
        numbers={"pad_token_id": float(-1 if stored is None else stored), "in the padding": float(true)},
        remedy=f"set config.pad_token_id to {true}", replayed=_same_scores_alone(subject, true),
    )  # fmt: skip


def untrained_head(subject: Subject) -> Finding | None:
    """A score head whose values are those that its initialisation draws: a bias of 0 and the usual spread."""
    known = subject.scorer is not None and subject.scorer.untrained_head
    spread = getattr(getattr(subject.model, "config", None), "initializer_range", None)
    for name, module in subject.model.named_modules():
        if name.split(".")[0] not in subject.head or type(module) is not nn.Linear:
            continue
        weight = module.weight.detach().float()
        fresh = spread is not None and _drawn(weight, spread) and (module.bias is None or not bool(module.bias.any()))
        if known or fresh:
            numbers = {"mean": float(weight.mean()), "standard deviation": float(weight.std())}
            return Finding(Cause.UNTRAINED_HEAD, "weights", name, "weight", numbers, remedy="train the head")
    return None


def score_ties(subject: Subject, activation: Callable[[Tensor], Tensor] | None) -> Finding | None:
    """Different pairs whose scores are equal though float32 tells them apart."""
    with torch.no_grad():
        scores = subject.scores().detach()
        given = scores if activation is None else activation(scores)
        with in_float32(subject) as wide:
            exact = wide.scores().detach().float()
    flat, exact_flat = given.reshape(len(given), -1)[:, 0], exact.reshape(len(exact), -1)[:, 0]
    tied = len(flat) - len(flat.unique())
    distinct = len(exact_flat.unique())
    if len(flat) < 2 or len(flat.unique()) >= distinct:
        return None
    again = exact_flat if activation is None else activation(exact)[:, 0]
    numbers = {"ties": float(tied), "distinct in float32": float(distinct), "largest": float(flat.abs().max())}
    values, counts = flat.unique(return_counts=True)
    first = int((flat == values[counts.argmax()]).nonzero()[0])
    replayed = len(again.unique()) > len(flat.unique()) or len(exact_flat.unique()) > len(flat.unique())
    return Finding(
        Cause.SCORE_TIES, "scores", None, None if activation is None else "activation", numbers, subject.pair(first),
        "take the score in float32, or rank by the logits", replayed=replayed,
    )  # fmt: skip


def _far_label(subject: Subject, seen: Recording) -> Finding | None:
    """A label so far from every score that no format holds the loss between them."""
    if subject.labels is None or seen.scores is None or not subject.labels.is_floating_point():
        return None
    sizes_P = subject.labels.detach().float().reshape(len(subject.labels), -1).abs().amax(1)
    row = int(sizes_P.argmax())
    if not float(sizes_P[row]) > FAR_LABEL * max(1.0, float(seen.scores.abs().max())):
        return None
    good = [index for index in range(len(sizes_P)) if index != row]
    return Finding(
        Cause.LABEL, "data", numbers={"label": float(sizes_P[row]), "largest score": float(seen.scores.abs().max())},
        pair=subject.pair(row), remedy="correct or drop this pair", replayed=_finite_without(subject, good),
        why="a label is so far from every score that the loss between them is not finite",
    )  # fmt: skip


def _forward_cause(subject: Subject, event: Event) -> tuple[Cause, str, str]:
    module, operation = event.module, event.operation
    if event.parameter is not None:
        owner, _, leaf = event.parameter.rpartition(".")
        return Cause.WEIGHT_OUT_OF_RANGE, owner, f"{leaf} to {_format(subject)}"
    producer = event.producer
    if producer is not None:
        # A narrowing blames who made the number: an operation in the leaf itself, or one between two leaves.
        operation = producer.operation
        module = producer.module or event.consumer or module
    if producer is not None and producer.hidden and not _attends(subject, module):
        return Cause.RESIDUAL_OVERFLOW, module, operation
    if event.phase == "loss" or (module and module.split(".")[0] in subject.head):
        return Cause.LOSS_OVERFLOW, module, operation
    if operation in NORMALISING or event.zero_divisors or _normalises(subject, module):
        return Cause.NORMALISATION, module, operation
    return Cause.PRODUCT_OVERFLOW, module, operation


def _bad_label(subject: Subject, labels: Tensor, bad: Sequence[int], why: str) -> Finding:
    numbers = {"label": float(labels[bad[0]].float().reshape(-1)[0]), "bad labels": float(len(bad))}
    return _bad_rows(subject, Cause.LABEL, len(labels), bad, numbers, why)


def _bad_rows(
    subject: Subject,
    cause: Cause,
    count: int,
    bad: Sequence[int],
    numbers: dict[str, float],
    why: str,
    name: str | None = None,
) -> Finding:
    """Data of `count` pairs of which those in `bad` cannot be computed with; `name` is the input's."""
    good = sorted(set(range(count)).difference(bad))
    return Finding(
        cause, "data", operation=name, numbers=numbers, pair=subject.pair(bad[0]),
        remedy=f"correct or drop {_count(len(bad), 'pair')} of this batch", replayed=_finite_without(subject, good),
        why=why,
    )  # fmt: skip


def _masked_row(subject: Subject, seen: Recording, event: Event) -> Finding:
    def clamped() -> bool:
        with clamped_masks():
            return _finite(subject.record())

    return Finding(
        Cause.MASKED_ROW, event.phase, event.module, event.operation, event.numbers, _pair(subject, seen),
        "drop pairs without tokens, and mask with the format's smallest number instead of -inf", replayed=clamped(),
    )  # fmt: skip


def _divided(event: Event) -> str:
    """What there is to say of an operation that divided by 0; nothing for any other."""
    if not event.zero_divisors:
        return ""
    return f"a division by 0 made the first number that is not finite ({_count(event.zero_divisors, 'divisor')} 0)"


def _with_guard(subject: Subject, finding: Finding) -> Finding:
    """The remedy of a division by 0 that is one in float32 too."""
    alone = _finite_without(subject, _others(subject, finding.pair))
    remedy = "keep what this operation divides by away from 0, with a small number added to it"
    return replace(finding, remedy=f"{remedy}, or drop the pair" if alone else remedy, replayed=alone or None)


def _with_islands(subject: Subject, seen: Recording, event: Event, finding: Finding) -> Finding:
    if event.zero_divisors and (subject.narrow is None or not _finite_in_float32(subject)):
        return _with_guard(subject, finding)
    if subject.narrow is None:
        pair = finding.pair
        helps = _finite_without(subject, _others(subject, pair))
        remedy = "drop the pair, or load other weights: the number leaves float32's range too"
        if not helps:
            remedy = "look at this operation or load other weights: other pairs, and float32, are not finite either"
            return replace(finding, remedy=remedy)
        return replace(finding, remedy=remedy, replayed=True)
    if subject.scorer is None:
        wide = _finite_in_float32(subject)
        names = tuple(modules_of(event, seen.order))
        remedy = f"compute {_listed(names)} in float32, or the model in bfloat16 or float32"
        return replace(finding, remedy=remedy, islands=names, replayed=wide)
    found = find_islands(subject.scorer, subject.scores)
    remedy = f"compute {_listed(found.islands)} in float32"
    return replace(finding, remedy=remedy, islands=found.islands, replayed=found.finite)


def _largest_finite_scale(subject: Subject, scale: float) -> float | None:
    step = scale
    while step > SMALLEST_SCALE:
        step = max(step / 16, SMALLEST_SCALE)
        if _all_finite(subject.record(scale=step).gradients.values()):
            while step * 2 < scale and _all_finite(subject.record(scale=step * 2).gradients.values()):
                step *= 2
            return step
    return None


def _alive_when_scaled(subject: Subject, module: str) -> bool | None:
    """Whether gradients pass once the weights that feed the softmax are 1,000 times smaller; they are put back."""
    names = [name for name, _ in subject.model.named_parameters() if _feeds(name, module)]
    if not names:
        return None
    kept = {name: subject.model.get_parameter(name).detach().clone() for name in names}
    try:
        with torch.no_grad():
            for name in names:
                subject.model.get_parameter(name).mul_(1e-3)
        return not any(event.module == module for event in subject.record().saturated)
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                subject.model.get_parameter(name).copy_(values)


def _feeds(name: str, module: str) -> bool:
    parts = name.removeprefix(f"{module}.").split(".") if module else []
    return name.startswith(f"{module}.") and any(part.startswith(("q", "k", "Wqkv", "in_proj")) for part in parts)


def _same_scores_alone(subject: Subject, pad: int) -> bool | None:
    """Whether, with this pad id, every pair scores in the batch as it scores alone."""
    config = getattr(subject.model, "config", None)
    if config is None or subject.only is None or not subject.rows:
        return None
    before, config.pad_token_id = config.pad_token_id, pad
    try:
        with torch.no_grad():
            together = subject.scores().float()
            alone = torch.cat([subject.only([index]).scores().float() for index in range(len(together))])
        return bool((together - alone).abs().max() <= 1e-2 * together.abs().max().clamp(min=1e-3))
    finally:
        config.pad_token_id = before


def _pair(subject: Subject, seen: Recording) -> PairReference | None:
    """The first pair whose score is not finite, else the one that has no finite loss alone."""
    if seen.scores is not None:
        bad = (~seen.scores.reshape(len(seen.scores), -1).isfinite().all(dim=1)).nonzero()
        if len(bad):
            return subject.pair(int(bad[0]))
    return _pair_alone(subject, lambda part: _finite(part.record()))


def _pair_of_gradient(subject: Subject, scale: float) -> PairReference | None:
    return _pair_alone(subject, lambda part: _all_finite(part.record(scale=scale).gradients.values()))


def _pair_alone(subject: Subject, healthy: Callable[[Subject], bool]) -> PairReference | None:
    """The pair that shows the fault alone, by halving; None where no half shows it alone."""
    if subject.only is None:
        return None
    rows = list(range(len(subject.rows)))
    while len(rows) > 1:
        half = len(rows) // 2
        sick = next((part for part in (rows[:half], rows[half:]) if not healthy(subject.only(part))), None)
        if sick is None:
            return None
        rows = sick
    return subject.pair(rows[0]) if rows else None


def _others(subject: Subject, pair: PairReference | None) -> list[int]:
    return [] if pair is None else [index for index, row in enumerate(subject.rows) if row != pair.row]


def _finite_without(subject: Subject, good: Sequence[int]) -> bool | None:
    if subject.only is None or not good:
        return None
    return _finite(subject.only(good).record())


def _finite_in_float32(subject: Subject) -> bool:
    with in_float32(subject) as wide:
        return _finite(wide.record())


def _finite(seen: Recording) -> bool:
    scores = seen.scores is not None and bool(seen.scores.isfinite().all())
    return (
        scores
        and seen.error is None
        and (seen.loss is None or math.isfinite(seen.loss))
        and _all_finite(seen.gradients.values())
    )


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(all_finite(tensor) for tensor in tensors)


def _first_broken(seen: Recording) -> str | None:
    broken = [name for name, grad in seen.gradients.items() if not bool(grad.isfinite().all())]
    return broken[-1].rpartition(".")[0] if broken else None


def _refused(check: Callable[[Tensor], None], label: Tensor) -> str:
    """Why a label is refused; nothing where it is not."""
    try:
        check(label)
    except ValueError as error:
        return str(error) or "it is refused"
    return ""


def _drawn(weight: Tensor, spread: float) -> bool:
    """Whether values look drawn from a normal distribution of this spread: mean, spread and tails."""
    count = weight.numel()
    if count < 16:
        return False
    mean, deviation = float(weight.mean()), float(weight.std())
    # Four standard errors of a mean and of a standard deviation.
    return abs(mean) < 4 * spread / math.sqrt(count) and abs(deviation / spread - 1) < 4 / math.sqrt(2 * count)


def _normalises(subject: Subject, module: str) -> bool:
    owner = subject.model.get_submodule(module) if module else None
    return owner is not None and "norm" in type(owner).__name__.lower() and next(owner.children(), None) is None


def _attends(subject: Subject, module: str) -> bool:
    owner = subject.model.get_submodule(module) if module else None
    return owner is not None and "selfattention" in type(owner).__name__.lower()


def _format(subject: Subject) -> str:
    return "float32" if subject.narrow is None else dtype_name(subject.narrow)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "the model"


def _table_size(model: nn.Module) -> int | None:
    """How many tokens a transformers model has embeddings for; None for other models."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                table = module.get_input_embeddings()
            except NotImplementedError:
                return None
            return table.num_embeddings if isinstance(table, nn.Embedding) else None
    return None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
