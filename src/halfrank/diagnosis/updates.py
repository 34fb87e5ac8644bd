"""What an optimizer's step does to the weights, compared with AdamW in float32; the step is taken back.

Shapes: tensors are compared element by element, parameter by parameter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfrank.diagnosis.finding import Cause, Finding
from halfrank.diagnosis.subject import Subject, in_float32
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.formats import NARROW_DTYPES

SECOND_MOMENTS = ("exp_avg_sq", "v", "state2")
ZERO_MOMENTS = 0.05  # share of gradients that are not 0 and whose second moment is
LOST = 0.5  # share of wanted updates that change nothing
TOO_LARGE = 1.0  # length of an update over that of its weight
SUSPECT = 0.05  # median of the same over all matrices from which a float32 run is tried
TRIAL_STEPS = 8


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
            if key in (*SECOND_MOMENTS, "v_scale", "step"):
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
    with _tried(subject, optimizer, gradients, scale) as (steps, error):
        for check in (_underflown, _lost):
            finding = check(subject, optimizer, steps)
            if finding is not None:
                return finding
    if error is not None:
        return None
    return _too_large(subject, optimizer, steps, gradients, scale)


def _underflown(subject: Subject, optimizer: torch.optim.Optimizer, steps: list[Step]) -> Finding | None:
    gone = alive = broken = 0
    for step in steps:
        second = _second_moment(step.state)
        if second is None or second.dtype not in NARROW_DTYPES or second.shape != step.gradient.shape:
            continue
        with_gradient = step.gradient != 0
        gone += int((with_gradient & (second == 0)).sum())
        alive += int(with_gradient.sum())
        broken += int((~step.after.isfinite()).sum())
    if not alive or gone / alive < ZERO_MOMENTS:
        return None
    numbers = {"share of zero second moments": gone / alive, "weights that became non-finite": float(broken)}
    moved = _moved_by_ours(subject, optimizer, steps)
    return Finding(
        Cause.SECOND_MOMENT_UNDERFLOW, "update", None, type(optimizer).__name__, numbers,
        remedy="halfrank.AdamW, or float32 weights; a larger eps only hides it", replayed=moved,
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
    ordered = sorted(sizes.values())
    median, worst = ordered[len(ordered) // 2], max(sizes, key=lambda name: sizes[name])
    decaying = max(optimizer.param_groups, key=_decayed)
    numbers = {"length of the update over the weight's": sizes[worst]}
    if _decayed(decaying) > TOO_LARGE:
        trial: dict[str, float] = {"decay": 0.0}
        decay = float(decaying["weight_decay"])
        numbers |= {"learning rate": float(decaying["lr"]), "weight decay": decay}
        remedy = f"a weight decay of 0.01: {decay:g} takes {_decayed(decaying):.3g} times each weight away in a step"
    else:
        if median > SUSPECT and (finding := _diverges(subject, optimizer, median)) is not None:
            return finding
        if sizes[worst] <= TOO_LARGE:
            return None
        rate = _rate_of(optimizer, subject.model.get_parameter(worst))
        trial = {"rate": rate / (20 * sizes[worst])}
        numbers |= {"median of all matrices": median, "learning rate": rate}
        remedy = f"a learning rate of {trial['rate']:.1g} for this module"
    with _tried(subject, optimizer, gradients, scale, **trial) as (again, _):
        helped = all(_relative(step) <= TOO_LARGE for step in again if step.name == worst)
    return Finding(
        Cause.UPDATE_TOO_LARGE, "update", worst.rpartition(".")[0], type(optimizer).__name__, numbers,
        remedy=remedy, replayed=helped,
    )  # fmt: skip


def _decayed(group: Mapping[str, Any]) -> float:
    """The share of each weight that a step's decay takes away."""
    return float(group["lr"]) * float(group.get("weight_decay") or 0.0)


def _rate_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    return next(float(g["lr"]) for g in optimizer.param_groups for p in g["params"] if p is parameter)


def _diverges(subject: Subject, optimizer: torch.optim.Optimizer, median: float) -> Finding | None:
    """Whether float32 loses the model too at this rate: most weights replaced in a step, or the batch's loss raised."""
    rate = max(float(group["lr"]) for group in optimizer.param_groups)
    first, last = _trial(subject, rate)
    # Weights replaced by their updates are lost even where the loss of one batch, learned by heart, falls.
    if median <= TOO_LARGE and math.isfinite(last) and last <= first * 1.5 + 1e-3:
        return None
    for divisor in (100.0, 10_000.0):
        _, lower = _trial(subject, rate / divisor)
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


def _trial(subject: Subject, rate: float) -> tuple[float, float]:
    """Loss before and after a few AdamW steps in float32; the weights are put back."""
    with in_float32(subject) as wide:
        kept = {name: p.detach().clone() for name, p in wide.model.named_parameters()}
        exact = {name: p.detach().float().clone() for name, p in wide.model.named_parameters()}
        moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in exact.items()}
        losses: list[float] = []
        try:
            for number in range(1, TRIAL_STEPS + 1):
                seen = wide.record()
                losses.append(math.nan if seen.loss is None else seen.loss)
                if not math.isfinite(losses[-1]):
                    break
                for name, gradient in seen.gradients.items():
                    m, v = moments[name]
                    exact[name] += _adamw(gradient.float(), m, v, number, rate)
                    wide.model.get_parameter(name).data.copy_(exact[name])
            seen = wide.record()
            losses.append(math.nan if seen.loss is None else seen.loss)
        finally:
            for name, values in kept.items():
                wide.model.get_parameter(name).data.copy_(values)
    return losses[0], losses[-1]


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
    """The step that the optimizer takes with `gradients`, taken back at the end."""
    members = _trained(subject, optimizer)
    kept = [(p, p.detach().clone(), p.grad, copy.deepcopy(optimizer.state.get(p))) for _, p in members]
    groups = [dict(group) for group in optimizer.param_groups]
    steps: list[Step] = []
    error: Exception | None = None
    try:
        for (name, p), _ in zip(members, kept, strict=True):
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
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: values[key] for key in ("lr", "weight_decay") if key in values})
        for p, weight, gradient, state in kept:
            p.data.copy_(weight)
            p.grad = gradient
            if state is None:
                optimizer.state.pop(p, None)
            else:
                optimizer.state[p] = state


def _exact(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    return optimizer.exact(parameter) if isinstance(optimizer, AdamW) else parameter.detach().float().clone()


def _wanted(optimizer: torch.optim.Optimizer, parameter: Tensor, scale: float) -> Tensor:
    """AdamW's first update in float32, from the gradient alone."""
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    return -_rate_of(optimizer, parameter) * parameter.grad.detach().float().sign()


def _moved_by_ours(subject: Subject, optimizer: torch.optim.Optimizer, steps: list[Step]) -> bool:
    """Whether halfrank.AdamW moves copies of the same weights by what float32 AdamW would have moved them."""
    rate = max(float(group["lr"]) for group in optimizer.param_groups)
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


def _second_moment(state: Mapping[str, Any]) -> Tensor | None:
    return next((state[key] for key in SECOND_MOMENTS if isinstance(state.get(key), Tensor)), None)


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
