"""Gradients consumed as they arrive: the whole model's gradient never exists at once.

Two backward passes over one forward pass. The first only measures: norm, finiteness. The second updates each tensor as
soon as its gradient is there, with the clip factor that the whole gradient decides. Nothing is updated before every
gradient is known to be finite, so an overflow that is found late leaves nothing half-updated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from halfrank.errors import NonFiniteUpdateError, TornUpdateError, is_refusal
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import LARGEST_GRADIENT, AdamW
from halfrank.numerics.scaling import norm_of
from halfrank.numerics.watch import Watch, sample
from halfrank.train.examples import MicroBatch


def can_release(optimizer: torch.optim.Optimizer, parts: Sequence[MicroBatch]) -> bool:
    """Whether a step's gradients may be consumed one by one: one micro-batch, and weights far inside their format.

    Gradients of several micro-batches must be summed first, and near the edge of a format an update is tried before it
    is stored: there they are kept, at 2 bytes for each 16-bit weight.
    """
    return isinstance(optimizer, AdamW) and len(parts) == 1 and not parts[0].pieces and optimizer.certain()


class Arriving:
    """The gradients of one micro-batch, seen twice and never all at once."""

    def __init__(self, scorer: Scorer, optimizer: AdamW, watch: Watch) -> None:
        self._scorer, self._optimizer, self._watch = scorer, optimizer, watch
        self._members = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._norms: dict[Tensor, Tensor] = {}
        self._samples: dict[Tensor, Tensor] = {}

    def measured(self, forward: Callable[[], Tensor], divisor: float) -> tuple[Tensor, float]:
        """The loss that `forward` gives, and the norm of its gradients over `divisor`; its graph is kept."""
        self._optimizer.allocate()  # what is made during the second pass could be refused when half is updated
        loss = forward()
        with self._at_each(self._measure):
            loss.backward(retain_graph=True)
        self._watch.gradients(self._samples.values())
        norms = [self._norms[p] for p in self._members if p in self._norms]
        if not norms:
            return loss, 0.0
        together = torch.stack([norm.to(norms[0].device) for norm in norms])
        return loss, float(torch.linalg.vector_norm(together) / divisor)

    def update(self, loss: Tensor, norm: float, divisor: float) -> None:
        """Update every tensor when its gradient arrives, in a second backward pass that frees the graph.

        Raises TornUpdateError where that pass fails: some tensors are updated then and others are not.
        """
        if norm > LARGEST_GRADIENT:
            raise NonFiniteUpdateError(
                f"The gradient's norm is {norm:g}: nothing of this step was stored. Lower the loss scale, or look for "
                "the pair that caused it."
            )
        self._watch.before_update(self._optimizer, self._samples)
        try:
            with self._at_each(lambda parameter: self._optimizer.step_one(parameter, grad_divisor=divisor)):
                loss.backward()
        except (RuntimeError, MemoryError) as error:
            reason = str(error).strip()[:200] or type(error).__name__
            raise TornUpdateError(
                f"The update stopped half-way ({reason}): the run goes back to its last good state.",
                out_of_memory=is_refusal(error),
            ) from error
        self._watch.after_update()

    def _measure(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self._norms[parameter] = norm_of(gradient)
        if self._watch.due and gradient.ndim > 1:
            self._samples[parameter] = sample(gradient).clone()

    @contextmanager
    def _at_each(self, act: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `act` with each parameter whose gradient is complete, then drop the gradient."""

        def consume(parameter: Tensor) -> None:
            act(parameter)
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(consume) for p in self._members]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
