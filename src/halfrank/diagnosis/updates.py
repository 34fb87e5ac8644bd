"""What an optimizer's step does to the weights, compared with float32's; the step is taken back.

Shapes: tensors are compared element by element, parameter by parameter.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfrank.diagnosis.finding import Cause, Finding
from halfrank.diagnosis.subject import Subject, in_float32
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.formats import NARROW_DTYPES

SQUARES = ("exp_avg_sq", "state2", "square_avg", "v_scale", "step")  # never negative
DENOMINATORS = ("exp_avg_sq", "v", "state2", "square_avg", "sum", "exp_inf")  # a step divides by them, or their root
STARTING = 20  # steps in which a matrix that began at 0 grows by more than its length
ZERO_MOMENTS = 0.05  # share of gradients that are not 0 and whose second moment is
LOST = 0.5  # share of wanted updates that change nothing
TOO_LARGE = 1.0  # length of an update over that of its weight
SUSPECT = 0.05  # median of the same over all matrices from which a float32 run is tried
TRIAL_STEPS = 8
LONG_TRIAL = 24  # gradient descent throws a loss up and catches it again


@dataclass(frozen=True)
class Step:
    """One parameter before and after a step; `wanted` is AdamW's update in float32 from the same gradient and state."""

    name: str
    before: Tensor
    after: Tensor
    gradient: Tensor
    wanted: Tensor
    state: Mapping[str, Any]
    narrow: bool


def corrupt_state(subject: Subject, optimizer: torch.optim.Optimizer) -> Finding | None:
    """A moment that is NaN, infinite, negative where it is a square, or too large for any gradients."""
    for name, parameter in _trained(subject, optimizer):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
                continue
            bad = ~value.isfinite()
            if key in SQUARES or (key == "v" and "m" in state):  # alone it may be a velocity
                bad |= value < 0
            if bool(bad.any()):
                return _corrupt(subject, optimizer, name, key, int(bad.sum()))
        impossible = _impossible(state)
        if impossible:
            return _corrupt(subject, optimizer, name, "exp_avg beside exp_avg_sq", impossible)
    return None


def bad_update(
    subject: Subject, optimizer: torch.optim.Optimizer, gradients: Mapping[str, Tensor], scale: float
) -> Finding | None:
    """What one step with these gradients does wrong; weights and optimizer are as before afterwards."""
    if _needs_closure(optimizer):
        return None
    with _tried(subject, optimizer, gradients, scale) as (steps, error):
        for check in (_underflown, _lost):
            finding = check(subject, optimizer, steps)
            if finding is not None:
                return finding
    if error is not None:
        return None
    return _too_large(subject, optimizer, steps, gradients, scale)


def _underflown(subject: Subject, optimizer: torch.optim.Optimizer, steps: list[Step]) -> Finding | None:
    gone = alive = broken = by_zero = 0
    for step in steps:
        divisor = _denominator(step.state)
        if divisor is None or divisor.dtype not in NARROW_DTYPES or divisor.shape != step.gradient.shape:
            continue
        with_gradient, lost = step.gradient != 0, ~step.after.isfinite()
        gone += int((with_gradient & (divisor == 0)).sum())
        alive += int(with_gradient.sum())
        broken += int(lost.sum())
        by_zero += int((lost & (divisor == 0)).sum())
    underflown = alive > 0 and gone / alive >= ZERO_MOMENTS
    if not underflown and by_zero * 2 <= broken:
        return None
    numbers = {"share of zero second moments": gone / max(alive, 1), "weights that became non-finite": float(broken)}
    moved = _moved_by_ours(subject, optimizer, steps)
    return Finding(
        Cause.SECOND_MOMENT_UNDERFLOW, "update", None, type(optimizer).__name__, numbers,
        remedy="halfrank.AdamW, or float32 weights; a larger eps only hides it", replayed=moved,
        why="" if underflown else "what a step divides by, and the eps added to it, are 0 in this format",
    )  # fmt: skip


def _lost(subject: Subject, optimizer: torch.optim.Optimizer, steps: list[Step]) -> Finding | None:
    shares: dict[str, tuple[int, int]] = {}
    for step in steps:
        if not step.narrow:
            continue
        wanted = step.wanted != 0
        shares[step.name] = int((wanted & (step.after == step.before)).sum()), int(wanted.sum())
    lost, wanted_all = sum(a for a, _ in shares.values()), sum(b for _, b in shares.values())
    if not wanted_all or lost / wanted_all < LOST:
        return None
    return Finding(
        Cause.UPDATE_LOST, "update", None, type(optimizer).__name__, {"share of updates lost": lost / wanted_all},
        remedy="halfrank.AdamW, which keeps what rounding drops, or float32 weights",
        replayed=_moved_by_ours(subject, optimizer, steps),
    )  # fmt: skip


def _too_large(
    subject: Subject, optimizer: torch.optim.Optimizer, steps: list[Step], gradients: Mapping[str, Tensor], scale: float
) -> Finding | None:
    sizes = {s.name: _relative(s) for s in steps if s.before.ndim > 1 and bool(s.before.any())}
    if not sizes:
        return None
    # A matrix that began at 0, as one of each pair of adapters does, grows by its own length at first.
    begun = {s.name for s in steps if _begins(s, _rate_of(optimizer, subject.model.get_parameter(s.name)))}
    median, worst = _median(sizes.values()), max(sizes, key=lambda name: (name not in begun, sizes[name]))
    replaced = {name: size for name, size in sizes.items() if name not in begun}
    decaying = max(optimizer.param_groups, key=_decayed)
    numbers = {"length of the update over the weight's": sizes[worst]}
    if _decayed(decaying) > TOO_LARGE:
        trial: dict[str, float] = {"decay": 0.0}
        decay = float(decaying["weight_decay"])
        numbers |= {"learning rate": _rate(decaying), "weight decay": decay}
        remedy = f"a weight decay of 0.01: {decay:g} takes {_decayed(decaying):.3g} times each weight away in a step"
    else:
        adaptive = any(_denominator(step.state) is not None for step in steps)
        lost = adaptive and TOO_LARGE < _median(replaced.values()) < math.inf
        if median > SUSPECT:
            finding = _diverges(subject, optimizer, median, lost=lost, adaptive=adaptive)
            if finding is not None:
                return finding
        if worst in begun or sizes[worst] <= TOO_LARGE:
            return None
        rate = _rate_of(optimizer, subject.model.get_parameter(worst))
        numbers |= {"median of all matrices": median, "learning rate": rate}
        if math.isinf(sizes[worst]):
            return Finding(
                Cause.UPDATE_TOO_LARGE, "update", worst.rpartition(".")[0], type(optimizer).__name__, numbers,
                remedy="halfrank.AdamW, or float32 weights: there this step is finite", replayed=True,
                why="the step leaves this format's range, and in float32 it does not",
            )  # fmt: skip
        trial = {"rate": rate / (20 * sizes[worst])}
        remedy = f"a learning rate of {trial['rate']:.1g} for this module"
    with _tried(subject, optimizer, gradients, scale, **trial) as (again, _):
        helped = all(_relative(step) <= TOO_LARGE for step in again if step.name == worst)
    return Finding(
        Cause.UPDATE_TOO_LARGE, "update", worst.rpartition(".")[0], type(optimizer).__name__, numbers,
        remedy=remedy, replayed=helped,
    )  # fmt: skip


def _decayed(group: Mapping[str, Any]) -> float:
    """The share of each weight that a step's decay takes away."""
    return _rate(group) * float(group.get("weight_decay") or 0.0)


def _rate(group: Mapping[str, Any]) -> float:
    """A group's learning rate; 0 for an optimizer that makes its own, as Adafactor may."""
    return float(group["lr"] or 0.0)


def _rate_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    return next(_rate(g) for g in optimizer.param_groups for p in g["params"] if p is parameter)


def _diverges(
    subject: Subject, optimizer: torch.optim.Optimizer, median: float, *, lost: bool, adaptive: bool
) -> Finding | None:
    """Whether float32 loses the model too at this rate: most weights replaced in a step, or the batch's loss raised.

    `lost`: weights replaced by their updates are lost even where the loss of one batch, learned by heart, falls.
    `adaptive`: the size of an update does not follow the gradient's, so what it has destroyed stays so.
    """
    rate = max(_rate(group) for group in optimizer.param_groups)
    first, *_, last = losses = _trial(subject, optimizer, 1.0)
    if not lost and _holds(losses):
        return None
    if not adaptive and _holds(_trial(subject, optimizer, 1.0, LONG_TRIAL)):
        return None
    for divisor in (100.0, 10_000.0):
        *_, lower = _trial(subject, optimizer, 1.0 / divisor)
        if math.isfinite(lower) and lower < first:
            break
    numbers = {
        "learning rate": rate,
        "loss before": first,
        f"loss after {TRIAL_STEPS} steps": last,
        "median update": median,
    }
    return Finding(
        Cause.LEARNING_RATE, "update", None, type(optimizer).__name__, numbers,
        remedy=f"a learning rate of {rate / divisor:.1g}", replayed=math.isfinite(lower) and lower < first,
    )  # fmt: skip


def _holds(losses: list[float]) -> bool:
    first, last = losses[0], min(losses[-3:]) if len(losses) > LONG_TRIAL else losses[-1]
    return math.isfinite(last) and last <= first * 1.5 + 1e-3


def _trial(subject: Subject, optimizer: torch.optim.Optimizer, factor: float, count: int = TRIAL_STEPS) -> list[float]:
    """Losses before and after each of some steps in float32 at `factor` times the rates; the weights are put back."""
    with in_float32(subject) as wide:
        kept = {name: p.detach().clone() for name, p in wide.model.named_parameters()}
        exact = {name: p.detach().float().clone() for name, p in wide.model.named_parameters()}
        step = _float32_step(subject, optimizer, exact, factor)
        losses: list[float] = []
        try:
            for _ in range(count):
                seen = wide.record()
                losses.append(math.nan if seen.loss is None else seen.loss)
                if not math.isfinite(losses[-1]):
                    break
                step({name: gradient.float() for name, gradient in seen.gradients.items()})
                for name in seen.gradients:
                    wide.model.get_parameter(name).data.copy_(exact[name])
            seen = wide.record()
            losses.append(math.nan if seen.loss is None else seen.loss)
        finally:
            for name, values in kept.items():
                wide.model.get_parameter(name).data.copy_(values)
    return losses


def _float32_step(
    subject: Subject, optimizer: torch.optim.Optimizer, exact: dict[str, Tensor], factor: float
) -> Callable[[Mapping[str, Tensor]], None]:
    """What changes `exact` in place by gradients as the optimizer would in float32, from a state of its own."""
    names = {p: name for name, p in _trained(subject, optimizer)}
    if isinstance(optimizer, AdamW):  # its own step needs names and rooms of its own
        rates = {
            names[p]: _rate(group) * factor for group in optimizer.param_groups for p in group["params"] if p in names
        }
        moments = {name: (torch.zeros_like(exact[name]), torch.zeros_like(exact[name])) for name in rates}
        numbers = itertools.count(1)

        def ours(gradients: Mapping[str, Tensor]) -> None:
            number = next(numbers)
            for name in gradients.keys() & rates.keys():
                exact[name] += _adamw(gradients[name], *moments[name], number, rates[name])

        return ours
    twin = _twin(optimizer, fresh=True)
    for group in twin.param_groups:
        group["params"] = [exact[names[p]] for p in group["params"] if p in names]
        group["lr"] = None if group["lr"] is None else float(group["lr"]) * factor

    def theirs(gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            exact[name].grad = gradient
        twin.step()

    return theirs


def _twin(optimizer: torch.optim.Optimizer, *, fresh: bool = False) -> torch.optim.Optimizer:
    """An optimizer over the same parameters with a copy of all it keeps, or `fresh` without a state.

    Nobody hears of its steps: it has neither hooks nor a scheduler that counts them.
    """
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    memo[id(optimizer)] = twin
    for name, value in vars(optimizer).items():
        if name == "step":  # a scheduler's, around the class's own
            continue
        if name.startswith("_optimizer_"):
            vars(twin)[name] = OrderedDict()
        elif name == "state" and fresh:
            vars(twin)[name] = defaultdict(dict)
        else:
            try:
                vars(twin)[name] = copy.deepcopy(value, memo)
            except (TypeError, RuntimeError):  # a lock, a process group: nothing that a step writes to
                vars(twin)[name] = value
    return twin


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer computes the loss itself, as L-BFGS does."""
    given = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in given)


def _begins(step: Step, rate: float) -> bool:
    """Whether a matrix is made of its first few updates alone."""
    taken = step.state.get("step")
    count = 0.0 if taken is None else float(taken) - 1
    return 0 < count <= STARTING and float(step.before.norm()) <= 2 * count * rate * math.sqrt(step.before.numel())


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def _adamw(gradient: Tensor, m: Tensor, v: Tensor, step: int, rate: float) -> Tensor:
    m.lerp_(gradient, 0.1)
    v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    return -rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


@contextmanager
def _tried(
    subject: Subject,
    optimizer: torch.optim.Optimizer,
    gradients: Mapping[str, Tensor],
    scale: float,
    *,
    rate: float | None = None,
    decay: float | None = None,
) -> Iterator[tuple[list[Step], Exception | None]]:
    """The step that the optimizer takes with `gradients`: a twin of it takes it, and the weights are put back."""
    members = _trained(subject, optimizer)
    weights = [(p, p.detach().clone()) for _, p in members]
    grads = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    optimizer = _twin(optimizer)
    steps: list[Step] = []
    error: Exception | None = None
    try:
        for p, _ in grads:
            p.grad = None  # what the model does not hold stays without one: the step leaves it alone
        for name, p in members:
            gradient = gradients.get(name)
            p.grad = (
                None
                if gradient is None
                else (gradient if scale == 1.0 or isinstance(optimizer, AdamW) else gradient / scale)
            )
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
            if decay is not None:
                group["weight_decay"] = decay
        before = {name: _exact(optimizer, p) for name, p in members}
        wanted = {name: _wanted(optimizer, p, scale) for name, p in members}
        try:
            if isinstance(optimizer, AdamW):
                optimizer.step(grad_divisor=scale)
            else:
                optimizer.step()
        except (ArithmeticError, RuntimeError) as raised:
            error = raised
        for name, p in members:
            if p.grad is not None and error is None:
                divisor = scale if isinstance(optimizer, AdamW) else 1.0
                steps.append(
                    Step(
                        name, before[name], _exact(optimizer, p), p.grad.detach().float() / divisor, wanted[name],
                        dict(optimizer.state.get(p, {})), p.dtype in NARROW_DTYPES,
                    )
                )  # fmt: skip
        yield steps, error
    finally:
        for p, weight in weights:
            p.data.copy_(weight)
        for p, gradient in grads:
            p.grad = gradient


def _exact(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    return optimizer.exact(parameter) if isinstance(optimizer, AdamW) else parameter.detach().float().clone()


def _wanted(optimizer: torch.optim.Optimizer, parameter: Tensor, scale: float) -> Tensor:
    """AdamW's first update in float32, from the gradient alone."""
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    return -_rate_of(optimizer, parameter) * parameter.grad.detach().float().sign()


def _moved_by_ours(subject: Subject, optimizer: torch.optim.Optimizer, steps: list[Step]) -> bool:
    """Whether halfrank.AdamW moves copies of the same weights by what float32 AdamW would have moved them."""
    rate = max(_rate(group) for group in optimizer.param_groups)
    if rate == 0:
        return True
    dots = ours_all = exact_all = 0.0
    for step in steps:
        parameter = torch.nn.Parameter(subject.model.get_parameter(step.name).detach().clone())
        parameter.data.copy_(step.before)
        parameter.grad = step.gradient.to(parameter.dtype) if bool(step.gradient.isfinite().all()) else None
        if parameter.grad is None:
            return False
        ours = AdamW([(step.name, parameter)], lr=rate, weight_decay=0.0)
        start = ours.exact(parameter)
        m, v = torch.zeros_like(step.gradient), torch.zeros_like(step.gradient)
        exact = torch.zeros_like(step.gradient, dtype=torch.float64)
        # Some steps together: a single small one is right on average alone, which is what stochastic rounding means.
        for number in range(1, TRIAL_STEPS + 1):
            ours.step()
            exact += _adamw(parameter.grad.float(), m, v, number, rate)
        moved = (ours.exact(parameter) - start).double()
        dots += float((moved * exact).sum())
        ours_all += float(moved.square().sum())
        exact_all += float(exact.square().sum())
    return exact_all > 0 and dots / math.sqrt(max(ours_all * exact_all, 1e-300)) > 0.9


def _denominator(state: Mapping[str, Any]) -> Tensor | None:
    return next((state[key] for key in DENOMINATORS if isinstance(state.get(key), Tensor)), None)


def _impossible(state: Mapping[str, Any]) -> int:
    """Elements whose first moment is larger than the second allows: |m| / sqrt(v) is below 8 for the usual betas."""
    m, v = state.get("exp_avg", state.get("m")), state.get("exp_avg_sq", state.get("v"))
    if (
        not isinstance(m, Tensor)
        or not isinstance(v, Tensor)
        or m.dtype is not torch.float32
        or v.dtype is not torch.float32
    ):
        return 0
    # A hundred times the bound, and only above what float32's own smallest squares blur.
    return int((m.abs() > 800 * v.sqrt() + 1e-18).sum())


def _relative(step: Step) -> float:
    size = float(step.before.norm())
    moved = float((step.after - step.before).norm())
    return math.inf if not math.isfinite(moved) else moved / max(size, 1e-30)


def _corrupt(subject: Subject, optimizer: torch.optim.Optimizer, name: str, key: str, count: int) -> Finding:
    return Finding(
        Cause.OPTIMIZER_STATE, "update", name.rpartition(".")[0], key, {"bad elements": float(count)},
        remedy="start this parameter's moments anew, or resume from an older checkpoint",
        replayed=_steps_without_state(subject, optimizer, name),
    )  # fmt: skip


def _steps_without_state(subject: Subject, optimizer: torch.optim.Optimizer, name: str) -> bool | None:
    if subject.loss is None:
        return None
    parameter = subject.model.get_parameter(name)
    gradients = {key: grad for key, grad in subject.record().gradients.items() if key == name}
    held = optimizer.state.pop(parameter)
    try:
        with _tried(subject, optimizer, gradients, 1.0) as (steps, error):
            return error is None and all(bool(step.after.isfinite().all()) for step in steps)
    finally:
        optimizer.state[parameter] = held


def _trained(subject: Subject, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    names = {parameter: name for name, parameter in subject.model.named_parameters()}
    return [(names[p], p) for group in optimizer.param_groups for p in group["params"] if p in names]
