"""What `fit` is given, to what the training loop takes: loss, schedule, optimizer, precision, evaluation.

Shapes: P pairs, L labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from halfrank.allocator import peak_resident, resident
from halfrank.errors import CertificateError
from halfrank.memory import Plan
from halfrank.model.scorer import Scorer, log
from halfrank.numerics.adamw import AdamW
from halfrank.precision import Facts, Precision, choose, detect
from halfrank.train.budget import TokenBudget
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples
from halfrank.train.loop import Evaluation, make_optimizer
from halfrank.train.planning import compared, first_use, memory_facts, planned
from halfrank.train.step import LossFunction

SCHEDULES = {
    "constantlr": ("constant", False),
    "warmupconstant": ("constant", True),
    "warmuplinear": ("linear", True),
    "warmupcosine": ("cosine", True),
    "warmupcosinewithhardrestarts": ("cosine", True),  # with its one cycle the restart is the end of the run
}
Callback = Callable[[float, float, int], object]  # score, epochs passed, steps passed
OURS = ("lr", "betas", "eps", "weight_decay")
SPEED_FLAGS = ("foreach", "fused", "capturable")


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
        seed=torch.initial_seed() & 0x7FFFFFFF,  # of the optimizer's rounding: torch.manual_seed decides
        # A loss of the user's may look at the batch as a whole, so its batches are never split.
        **config | ({} if default_loss else {"max_tokens": 2**62}),
    )


def optimizer_for(
    scorer: Scorer,
    optimizer_class: Callable[..., torch.optim.Optimizer],
    params: Mapping[str, Any],
    config: TrainConfig,
) -> torch.optim.Optimizer:
    """The optimizer of `fit`: halfrank.AdamW, or a class of the user's on float32 weights; raises ValueError."""
    narrow = scorer.precision.storage is not torch.float32 and scorer.adapters is None  # adapters are float32
    name = getattr(optimizer_class, "__name__", str(optimizer_class))
    theirs = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.AdamW)
    if optimizer_class is AdamW or (narrow and theirs):
        if theirs:
            text = "torch.optim.AdamW divides by zero or loses updates on %s weights: halfrank.AdamW is used instead."
            log.warning(text, scorer.precision.scheme)
        _check_settings(params)
        return make_optimizer(scorer, config)
    if narrow:
        raise ValueError(
            f"optimizer_class={name} cannot train {scorer.precision.scheme} weights: updates below half a step of "
            "that format vanish. Leave optimizer_class out (halfrank.AdamW), or load the model in float32; with "
            "use_amp=True it computes in float16."
        )
    decays: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in scorer.model.parameters():
        if parameter.requires_grad:
            (decays if parameter.ndim > 1 else others).append(parameter)
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return optimizer_class(groups, **{key: value for key, value in params.items() if key != "weight_decay"})


class Run(NamedTuple):
    """A `fit` with the memory that it may take: settings, token budget, and the plan where there is one."""

    config: TrainConfig
    budget: TokenBudget | None = None
    plan: Plan | None = None
    peak: int = 0  # that the process had come to before

    def compare(self) -> None:
        """Log what was planned beside what was measured."""
        if facts := memory_facts(self.plan):
            earlier = "" if peak_resident() > self.peak else " An earlier peak of this process was higher."
            log.info("%s%s", compared(facts), earlier)


def planned_run(
    scorer: Scorer,
    examples: Examples,
    config: TrainConfig,
    batches: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer,
    *,
    splits: bool,
    limit: int | None = None,
    release: str = "auto",
    checkpointing: str = "auto",
) -> Run:
    """Settings that fit into memory, as `halfrank train` chooses them; on a GPU, which is not planned, as they are.

    Raises TrainingError, with the plan, where nothing fits.
    """
    own = isinstance(optimizer, AdamW)
    if release == "yes" and not own:
        raise ValueError(f"release_gradients='yes' needs halfrank.AdamW; got {type(optimizer).__name__}.")
    if scorer.device.type != "cpu" or not examples:
        return Run(replace(config, release_gradients=release == "yes", checkpointing=checkpointing == "yes"))
    held = sum(parameter.nbytes for parameter in scorer.model.parameters())
    first_use(scorer)
    peak = peak_resident()
    found, plan, budget = planned(
        scorer, examples, config, base=max(resident() - held, 0), batches=batches, splits=splits,
        release=release if own else "no", checkpointing=checkpointing, limit=limit,
    )  # fmt: skip
    log.info("%s", plan or "")
    return Run(found, budget, plan, peak)


def amp_precision(scorer: Scorer) -> Precision:
    """What `use_amp=True` trains with: float32 weights and the fastest 16-bit products that the device has."""
    before = scorer.precision
    if before.storage is not torch.float32:
        log.warning("use_amp=True changes nothing: the weights are %s already, and train as such.", before.scheme)
        return before
    facts = Facts(scorer.model.num_parameters(), torch.float32, detect(scorer.device))
    chosen = choose(facts, scheme="mixed-float16", frozen=scorer.adapters is not None)
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


class Savable(Protocol):
    """What the best model is saved through."""

    def save(self, path: str | os.PathLike[str]) -> None: ...


class Best:
    """Runs the evaluator of `fit` and keeps the best model in its folder."""

    def __init__(
        self,
        model: Savable,
        evaluator: Any,
        *,
        folder: str | os.PathLike[str] | None,
        keep_best: bool,
        callback: Callback | None,
        steps_per_epoch: int,
    ) -> None:
        self._model, self._evaluator, self._callback = model, evaluator, callback
        self._folder, self._keep_best, self._steps_per_epoch = folder, keep_best, steps_per_epoch
        self._best: float | None = None
        self._refused: CertificateError | None = None

    def evaluate(self, epoch: int, step: int) -> Evaluation:
        """Call the evaluator as sentence-transformers does: with passed epochs, in parts too, and passed steps."""
        reports = None if self._folder is None else os.path.join(self._folder, "eval")
        if reports is not None:
            os.makedirs(reports, exist_ok=True)
        passed = step / self._steps_per_epoch
        result = self._evaluator(self._model, output_path=reports, epoch=passed, steps=step)
        score, numbers = primary_score(result, self._evaluator)
        if self._callback is not None:
            self._callback(score, passed, step)
        higher = score if getattr(self._evaluator, "greater_is_better", True) else -score
        if self._best is None or higher > self._best:
            self._best = higher
            if self._folder is not None and self._keep_best:
                try:
                    self._model.save(self._folder)
                    self._refused = None
                except CertificateError as refused:
                    # The run goes on: what was trained so far lies beside in float32, and the end says so.
                    log.warning("%s", refused)
                    self._refused = refused
        return Evaluation(higher, numbers)

    def finish(self) -> None:
        """Save the model as it stands unless a best one was saved; raises CertificateError if that one was refused."""
        if self._folder is not None and (self._best is None or not self._keep_best):
            self._model.save(self._folder)
        elif self._refused is not None:
            raise self._refused


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


def _check_settings(params: Mapping[str, Any]) -> None:
    ignored = [name for name in SPEED_FLAGS if name in params]
    if ignored:
        log.warning("optimizer_params %s are ignored: halfrank.AdamW has one implementation.", ", ".join(ignored))
    unknown = sorted(set(params) - set(OURS) - set(SPEED_FLAGS))
    if unknown:
        raise ValueError(f"halfrank.AdamW takes {', '.join(OURS)} in optimizer_params; got {', '.join(unknown)}.")
