"""One training step: scores, loss, scaled gradients, the finite check, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from halfrank.model.families import head_modules
from halfrank.model.scorer import Scorer
from halfrank.model.storage import row_gradients
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.formats import NARROW_DTYPES, read_at_once
from halfrank.numerics.scaling import LossScale, global_norm
from halfrank.numerics.watch import Watch
from halfrank.train.checkpoint import residuals_of
from halfrank.train.examples import MicroBatch
from halfrank.train.released import Arriving, can_release

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
RandomState = tuple[Tensor, Tensor | None]  # of torch on the CPU and, where the model is there, on its GPU


@dataclass(frozen=True)
class StepResult:
    """What a step saw; `stored` is False where a non-finite number, or a refused loss, made it skip its update."""

    loss: float
    gradient_norm: float
    loss_scale: float
    stored: bool
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether loss and gradients were."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def train_step(
    scorer: Scorer,
    parts: Sequence[MicroBatch],
    loss: LossFunction,
    optimizer: torch.optim.Optimizer,
    scale: LossScale,
    *,
    clip: float,
    watch: Watch | None = None,
    refuses: Callable[[float], bool] = lambda loss: False,
    release: bool = False,
) -> StepResult:
    """Accumulate the gradients of all parts, then update once; nothing is stored unless every gradient is finite.

    `refuses` is asked about a finite loss before the update: where it says yes, nothing is stored either. With
    `release` gradients are consumed as they arrive where they can be, in a second backward pass; the bits are the same.

    Gradients stay scaled where they lie: the update divides by the scale and clips in float32, element by element.
    """
    watch = watch or Watch(every=0)
    if release and can_release(optimizer, parts):
        assert isinstance(optimizer, AdamW)
        return _released_step(scorer, parts[0], loss, optimizer, scale, clip=clip, watch=watch, refuses=refuses)
    used = scale.value
    means: list[Tensor] = []
    with _passes(scorer, optimizer, watch):
        for part in parts:
            if part.pieces:
                means.append(_backward_in_pieces(scorer, part, loss, used, watch))
                continue
            logits_PL = scorer.logits(part.batch)
            watch.scores(logits_PL)
            mean = _weighted(loss, logits_PL, part)
            (mean * used).backward()
            means.append(mean.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # once: norm, watch and update read it
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A GPU is waited for once: everything before and after only puts work in its queue.
    sizes = optimizer.unknown_sizes() if isinstance(optimizer, AdamW) else {}
    asked = [torch.stack(means).double().sum(), global_norm(gradients, divisor=used), *sizes.values()]
    total, norm, *read = read_at_once(asked)
    watch.gradients(gradients)
    finite = math.isfinite(norm) and math.isfinite(total)
    stored = finite and not refuses(total)
    if stored:
        watch.before_update(optimizer)
        _update(optimizer, used / _shrink(norm, clip), norm * used, dict(zip(sizes, read, strict=True)))
        watch.after_update()
        _know_residuals(scorer, optimizer)
    scale.update(finite)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, norm, used, stored, sum(sum(part.batch.lengths) for part in parts))


def _released_step(
    scorer: Scorer,
    part: MicroBatch,
    loss: LossFunction,
    optimizer: AdamW,
    scale: LossScale,
    *,
    clip: float,
    watch: Watch,
    refuses: Callable[[float], bool],
) -> StepResult:
    used, total = scale.value, math.nan

    def forward() -> Tensor:
        nonlocal total
        logits_PL = scorer.logits(part.batch)
        watch.scores(logits_PL)
        mean = _weighted(loss, logits_PL, part)
        total = mean.item()
        return mean * used

    arriving = Arriving(scorer, optimizer, watch)
    with _passes(scorer, optimizer, watch, released=True):
        scaled, norm = arriving.measured(forward, used)
        finite = math.isfinite(norm) and math.isfinite(total)
        stored = finite and not refuses(total)
        if stored:
            arriving.update(scaled, norm, used / _shrink(norm, clip))
    if stored:
        _know_residuals(scorer, optimizer)
    scale.update(finite)
    return StepResult(total, norm, used, stored, sum(part.batch.lengths))


@contextmanager
def _passes(
    scorer: Scorer, optimizer: torch.optim.Optimizer, watch: Watch, *, released: bool = False
) -> Iterator[None]:
    """The forward and backward passes of one step: they are watched, and 16-bit products feel the residuals."""
    ours = type(optimizer) is AdamW  # others, and classes made of it, may want dense gradients
    rows = row_gradients(scorer.model, narrow=released) if ours or released else nullcontext()
    noise = optimizer.noise if isinstance(optimizer, AdamW) else None
    wide = {*scorer.islands, *head_modules(scorer.model)}
    with scorer.residuals.felt(noise), watch.looking(scorer.model, wide), rows:
        yield


def _know_residuals(scorer: Scorer, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer makes them in its first step, of 16-bit weights; from then on they are the same tensors."""
    if not scorer.residuals and scorer.precision.storage in NARROW_DTYPES:
        scorer.residuals.update(residuals_of(scorer, optimizer))


def _shrink(norm: float, clip: float) -> float:
    return min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0


def _weighted(loss: LossFunction, logits_PL: Tensor, part: MicroBatch) -> Tensor:
    return loss(logits_PL, part.labels_P.to(logits_PL.device), part.groups_P.to(logits_PL.device)) * part.share


def _backward_in_pieces(scorer: Scorer, part: MicroBatch, loss: LossFunction, scale: float, watch: Watch) -> Tensor:
    """A group larger than the token budget: score it in pieces, then score each again and push its gradient back.

    The loss needs all scores at once, the activations of all pieces at once would not fit. Both passes see the same
    dropout. After gradient caching (Gao et al., 2021).
    """
    states, scores = [], []
    with torch.no_grad():
        for piece in part.pieces:
            states.append(random_state(scorer.device))
            scores.append(scorer.logits(piece))
    logits_PL = torch.cat(scores).requires_grad_()
    watch.scores(logits_PL)
    mean = _weighted(loss, logits_PL, part)
    (mean * scale).backward()
    assert logits_PL.grad is not None
    after = random_state(scorer.device)
    for piece, state, gradient in zip(
        part.pieces, states, logits_PL.grad.split([len(piece.rows) for piece in part.pieces]), strict=True
    ):
        restore(state)
        scorer.logits(piece).backward(gradient)
    restore(after)
    return mean.detach()


def random_state(device: torch.device) -> RandomState:
    """What decides the next dropout masks."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore(state: RandomState) -> None:
    """Go back to what `random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _update(optimizer: torch.optim.Optimizer, divisor: float, norm: float, largest: Mapping[Tensor, float]) -> None:
    if isinstance(optimizer, AdamW):
        optimizer.step(grad_divisor=divisor, gradient_norm=norm, largest=largest)
        return
    # A float32 optimizer of the user's own: its gradients are float32, so dividing them in place loses nothing.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(divisor)
    optimizer.step()
