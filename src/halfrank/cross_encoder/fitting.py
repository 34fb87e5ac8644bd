"""What `fit` is given, to what the training loop takes: batches, loss, schedule, optimizer, evaluation.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfrank.data.pairs import Pair, check_text
from halfrank.errors import DataError
from halfrank.losses import LOSSES, default_loss
from halfrank.model.scorer import Scorer, log
from halfrank.numerics.adamw import AdamW
from halfrank.precision import Facts, Precision, choose, detect
from halfrank.train.config import TrainConfig
from halfrank.train.loop import make_optimizer
from halfrank.train.step import LossFunction

DEFAULT_BATCH = 16  # pairs, where the loader does not say
SCHEDULES = {
    "constantlr": ("constant", False),
    "warmupconstant": ("constant", True),
    "warmuplinear": ("linear", True),
    "warmupcosine": ("cosine", True),
    "warmupcosinewithhardrestarts": ("cosine", True),  # with its one cycle the restart is the end of the run
}
OURS = ("lr", "betas", "eps", "weight_decay")
SPEED_FLAGS = ("foreach", "fused", "capturable")


@dataclass(frozen=True)
class Material:
    """Checked pairs, and for each epoch its batches as indices of pairs."""

    pairs: list[Pair]
    epochs: list[list[list[int]]]


def read_loader(loader: Iterable[Any], epochs: int) -> Material:
    """Every epoch's batches as the loader would give them, without its collate function; raises DataError."""
    examples: list[Any] = []
    known: dict[int, int] = {}
    plans: list[list[list[int]]] = []
    once = isinstance(loader, Iterator)  # exhausted after one epoch: its batches are repeated
    for _ in range(1 if once else epochs):
        plans.append([[_remember(example, examples, known) for example in batch] for batch in _batches(loader)])
    pairs = [_labelled_pair(example, number) for number, example in enumerate(examples)]
    if not pairs:
        raise DataError("train_dataloader gave no examples: there is nothing to train on.")
    return Material(pairs, plans * epochs if once else plans)


def loss_function(loss: Any, activation: Callable[[Tensor], Tensor], scorer: Scorer) -> LossFunction | None:
    """A torch loss of (scores, labels) as the loop calls it; None where the loop's own default is meant."""
    if loss is None and type(activation) is nn.Identity:
        return None
    single = scorer.num_labels == 1
    inner = loss if loss is not None else nn.BCEWithLogitsLoss() if single else nn.CrossEntropyLoss()
    if isinstance(inner, nn.Module):
        inner.to(scorer.device)

    def mean(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
        scores = activation(scores_PL.reshape(-1) if single else scores_PL)
        value = inner(scores, labels_P.float() if single else labels_P.long())
        if value.numel() != 1:
            raise ValueError(f"loss_fct must return one number; got shape {tuple(value.shape)}. Use reduction='mean'.")
        return value.reshape(())

    return mean


def check_labels(pairs: Sequence[Pair], num_labels: int, default: bool) -> None:
    """Raise DataError for labels that the loss cannot use: classes out of range, probabilities outside [0, 1]."""
    if default or num_labels > 1:
        labels = torch.tensor([float(pair.label or 0.0) for pair in pairs])
        LOSSES[default_loss(num_labels, grouped=False)].check_labels(labels, num_labels)


def config_of(
    *,
    epochs: int,
    scheduler: str,
    warmup_steps: int,
    optimizer_params: Mapping[str, Any],
    weight_decay: float,
    evaluation_steps: int | None,
    max_grad_norm: float | None,
    default_loss: bool,
) -> TrainConfig:
    """The settings of one `fit`; raises ValueError for a scheduler or number out of range."""
    name = scheduler.lower() if isinstance(scheduler, str) else ""
    if name not in SCHEDULES:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULES)}; got {scheduler!r}.")
    if warmup_steps != int(warmup_steps) or warmup_steps < 0:
        raise ValueError(f"warmup_steps must be a whole number of steps, 0 or more; got {warmup_steps!r}.")
    kind, warms = SCHEDULES[name]
    known = {key: optimizer_params[key] for key in OURS if key in optimizer_params}
    config = {"lr": 1e-3, "weight_decay": weight_decay} | known  # 1e-3: what torch's optimizers start from
    return TrainConfig(
        epochs=epochs,
        schedule=kind,
        warmup=int(warmup_steps) if warms else 0,
        eval_every=int(evaluation_steps or 0),
        clip=float(max_grad_norm or 0.0),
        seed=torch.initial_seed() & 0x7FFFFFFF,  # the loop seeds itself: torch.manual_seed before fit decides
        # A loss of the user's may look at the batch as a whole, so its batches are never split.
        **config | ({} if default_loss else {"max_tokens": 2**62}),
    )


def optimizer_for(
    scorer: Scorer, optimizer_class: Callable[..., torch.optim.Optimizer], params: Mapping[str, Any], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer of `fit`: halfrank.AdamW, or a class of the user's on float32 weights; raises ValueError."""
    narrow = scorer.precision.storage is not torch.float32
    name = getattr(optimizer_class, "__name__", str(optimizer_class))
    theirs = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.AdamW)
    if optimizer_class is AdamW or (narrow and theirs):
        if theirs:
            log.warning(
                "torch.optim.AdamW on %s weights loses updates and divides by zero: halfrank.AdamW is used instead, with "
                "the same settings.", scorer.precision.scheme,
            )  # fmt: skip
        _check_settings(params)
        return make_optimizer(scorer, config)
    if narrow:
        raise ValueError(
            f"optimizer_class={name} cannot train {scorer.precision.scheme} weights: an update below half a step of the "
            "format is lost. Leave optimizer_class out (halfrank.AdamW), or load the model in float32 (use_amp=True "
            "computes in float16)."
        )
    decays: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in scorer.model.parameters():
        if parameter.requires_grad:
            (decays if parameter.ndim > 1 else others).append(parameter)
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return optimizer_class(groups, **{key: value for key, value in params.items() if key != "weight_decay"})


def amp_precision(scorer: Scorer) -> Precision:
    """What `use_amp=True` trains with: float32 weights and the fastest 16-bit products that the device has."""
    before = scorer.precision
    if before.storage is not torch.float32:
        log.warning("use_amp=True changes nothing: the weights are %s already, and train as such.", before.scheme)
        return before
    facts = Facts(scorer.model.num_parameters(), torch.float32, detect(scorer.device))
    chosen = choose(facts, scheme="mixed-float16")
    log.warning("use_amp=True: %s", chosen)
    return chosen


@contextmanager
def training_in(scorer: Scorer, precision: Precision) -> Iterator[None]:
    """Train in another precision of the same storage and return to the former one."""
    before = scorer.precision
    if precision is before:
        yield
        return
    scorer.adopt(precision)
    try:
        yield
    finally:
        scorer.adopt(before)


def primary_score(result: Any, evaluator: Any) -> tuple[float, dict[str, float]]:
    """The number that an evaluator's result is judged by, and all its numbers."""
    if not isinstance(result, Mapping):
        return float(result), {}
    numbers = {str(key): float(value) for key, value in result.items() if isinstance(value, (int, float))}
    name = getattr(evaluator, "primary_metric", None)
    if name not in numbers and len(numbers) != 1:
        raise ValueError(
            f"The evaluator returned {', '.join(numbers) or 'no numbers'}; its primary_metric, which decides what is "
            f"best, is {name!r}. Set evaluator.primary_metric to one of them."
        )
    return numbers[name] if name in numbers else next(iter(numbers.values())), numbers


def _batches(loader: Any) -> Iterator[list[Any]]:
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return _grouped(_without_collate(loader), getattr(loader, "batch_size", None), drop_last=False)
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, torch.utils.data.IterableDataset):
        return _grouped(dataset, loader.batch_size, drop_last=getattr(loader, "drop_last", False))
    if loader.batch_sampler is not None:
        return ([dataset[index] for index in indices] for indices in loader.batch_sampler)
    return _grouped((dataset[index] for index in loader.sampler), None, drop_last=False)


def _without_collate(loader: Any) -> Iterator[Any]:
    """Iterate a loader that is not torch's; one with a `collate_fn` would turn the examples into tensors."""
    if not hasattr(loader, "collate_fn"):
        yield from loader
        return
    before, loader.collate_fn = loader.collate_fn, _as_it_is
    try:
        yield from loader
    finally:
        loader.collate_fn = before


def _as_it_is(batch: Any) -> Any:
    return batch


def _grouped(items: Iterable[Any], size: int | None, *, drop_last: bool) -> Iterator[list[Any]]:
    """Items that are batches as they are, single examples in batches of `size`."""
    held: list[Any] = []
    for item in items:
        if isinstance(item, (list, tuple)):
            yield list(item)
            continue
        held.append(item)
        if len(held) == (size or DEFAULT_BATCH):
            yield held
            held = []
    if held and not drop_last:
        yield held


def _remember(example: Any, examples: list[Any], known: dict[int, int]) -> int:
    # By identity: `examples` keeps every object alive, so no id is used twice.
    if id(example) not in known:
        known[id(example)] = len(examples)
        examples.append(example)
    return known[id(example)]


def _labelled_pair(example: Any, number: int) -> Pair:
    source = f"Training example {number}"
    if not hasattr(example, "texts") or not hasattr(example, "label"):
        raise DataError(f"{source} must have .texts and .label, as an InputExample has; got {type(example).__name__}.")
    texts, label = example.texts, example.label
    if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) != 2:
        raise DataError(f"{source} must have two texts; got {texts!r:.60}.")
    query, document = (check_text(text, source) for text in texts)
    return Pair(query, document, _number(label, source), source)


def _number(label: Any, source: str) -> float:
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    if isinstance(label, str) or not hasattr(label, "__float__"):
        raise DataError(f"{source}: the label must be a number; got {type(label).__name__} {label!r:.60}.")
    if not math.isfinite(float(label)):
        raise DataError(f"{source}: the label is {float(label)}. Remove the example or give it a finite label.")
    return float(label)


def _check_settings(params: Mapping[str, Any]) -> None:
    ignored = [name for name in SPEED_FLAGS if name in params]
    if ignored:
        log.warning("optimizer_params %s are ignored: halfrank.AdamW has one implementation.", ", ".join(ignored))
    unknown = sorted(set(params) - set(OURS) - set(SPEED_FLAGS))
    if unknown:
        raise ValueError(f"halfrank.AdamW takes {', '.join(OURS)} in optimizer_params; got {', '.join(unknown)}.")
