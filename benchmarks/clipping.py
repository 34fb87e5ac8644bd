"""Ways to clip where gradients are consumed as they arrive, against clipping all of them by their true global norm.

float16 weights, one model, the same batches: how far the weights move and in which direction, against a float32 run
that keeps its gradients; processor time of a step; and how many tensors were updated already when the first gradient
that is not finite arrived, at the loss scale that a run begins with.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import arguments, finish, minilm
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.scaling import LossScale
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, MicroBatch, from_pairs, micro_batches
from halfrank.train.loop import make_optimizer
from halfrank.train.step import train_step
from optimizer_only import compared, small_model
from train_speed import passages

BCE = LOSSES["bce"].function
SCALE = 2.0**10  # low enough that no step of the comparison overflows
CLIP = 0.5
COSINE = 0.995  # of the way that is taken, against float32
Step = Callable[[MicroBatch], float]  # does one step and returns the gradient's norm


def kept(scorer: Scorer, optimizer: AdamW, scale: LossScale) -> Step:
    """All gradients at once, clipped by their norm: what the others are measured by."""
    return lambda part: train_step(scorer, [part], BCE, optimizer, scale, clip=CLIP).gradient_norm


def two_passes(scorer: Scorer, optimizer: AdamW, scale: LossScale) -> Step:
    """The norm in one backward pass, the update in a second one."""
    return lambda part: train_step(scorer, [part], BCE, optimizer, scale, clip=CLIP, release=True).gradient_norm


def norm_before(scorer: Scorer, optimizer: AdamW, scale: LossScale) -> Step:
    """One backward pass, clipped by the norm of the step before; the first step by nothing."""
    last = 0.0

    def step(part: MicroBatch) -> float:
        nonlocal last
        squares = 0.0
        divisor = scale.value * max(1.0, last / CLIP)

        def consume(parameter: Tensor) -> None:
            nonlocal squares
            assert parameter.grad is not None
            squares += float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)) ** 2
            optimizer.step_one(parameter, grad_divisor=divisor)

        one_pass(scorer, part, scale, consume)
        last = math.sqrt(squares) / scale.value
        return last

    return step


def per_tensor(scorer: Scorer, optimizer: AdamW, scale: LossScale) -> Step:
    """One backward pass, each tensor's rate lowered where its gradient is larger than usual, as StableAdamW does.

    The second moment that decides is kept in float32 here: 4 bytes a weight that only this measurement has.
    """
    moments: dict[Tensor, Tensor] = {}
    done = 0

    def step(part: MicroBatch) -> float:
        nonlocal done
        done += 1
        squares = 0.0

        def consume(parameter: Tensor) -> None:
            nonlocal squares
            assert parameter.grad is not None
            group = optimizer._places()[id(parameter)][1]
            gradient = parameter.grad.float() / scale.value
            squares += float(gradient.square().sum())
            moment = moments.setdefault(parameter, torch.zeros_like(gradient))
            moment.mul_(group["betas"][1]).addcmul_(gradient, gradient, value=1 - group["betas"][1])
            usual = (moment / (1 - group["betas"][1] ** done)).clamp(min=group["eps"] ** 2)
            rate, unusual = group["lr"], float((gradient.square() / usual).mean().sqrt())
            group["lr"] = rate / max(1.0, unusual)
            optimizer.step_one(parameter, grad_divisor=scale.value)
            group["lr"] = rate

        one_pass(scorer, part, scale, consume)
        return math.sqrt(squares)

    return step


WAYS = {"kept": kept, "two backward passes": two_passes, "norm of the step before": norm_before,
        "per tensor (StableAdamW)": per_tensor}  # fmt: skip


def one_pass(scorer: Scorer, part: MicroBatch, scale: LossScale, consume: Callable[[Tensor], None]) -> None:
    """A backward pass that gives each gradient to `consume` and drops it."""
    with arriving(scorer, consume):
        (BCE(scorer.logits(part.batch), part.labels_P, part.groups_P) * scale.value).backward()


@contextmanager
def arriving(scorer: Scorer, consume: Callable[[Tensor], None]) -> Any:
    def act(parameter: Tensor) -> None:
        consume(parameter)
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(act) for p in scorer.model.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prepared(path: Path, dtype: torch.dtype, lr: float, seed: int, batch: int, steps: int) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # The same starting values for all: those that float16 holds.
    options = folder.LoadOptions(num_labels=1, max_length=64, dtype=torch.float16, compute="float32", config=still)
    scorer = folder.load(path, options)
    if dtype is torch.float32:
        scorer.model.float()
    optimizer = make_optimizer(scorer, TrainConfig(lr=lr, weight_decay=0.0))
    optimizer.allocate()
    scorer.model.train()
    examples: Examples = from_pairs(passages(seed)[: batch * steps], scorer.pairs)
    parts = [
        micro_batches(examples, range(n * batch, (n + 1) * batch), max_tokens=10**6, per_unit=False)[0]
        for n in range(steps)
    ]
    return scorer, optimizer, parts


def moved(path: Path, way: str, dtype: torch.dtype, **settings: Any) -> tuple[dict[str, Tensor], list[float], float]:
    """Distance moved by each weight, norms of all steps, and processor seconds of the middle step."""
    scorer, optimizer, parts = prepared(path, dtype, **settings)
    before = {name: p.detach().double() for name, p in scorer.model.named_parameters()}
    scale = LossScale(initial=SCALE, enabled=dtype is not torch.float32)
    step = WAYS[way](scorer, optimizer, scale)
    norms, seconds = [], []
    for part in parts:
        started = time.process_time()
        norms.append(step(part))
        seconds.append(time.process_time() - started)
    ended = {name: optimizer.exact(p).double() - before[name] for name, p in scorer.model.named_parameters()}
    return ended, norms, statistics.median(seconds)


def torn(path: Path, **settings: Any) -> tuple[int, int]:
    """(tensors updated before the first gradient that is not finite arrives, all tensors), products in float16."""
    scorer, _, parts = prepared(path, torch.float16, **settings)
    updated, found = 0, False

    def consume(parameter: Tensor) -> None:
        nonlocal updated, found
        assert parameter.grad is not None
        found = found or not bool(parameter.grad.isfinite().all())
        updated += not found

    scale = LossScale()
    with scorer.computing_in("emulated-float16"):
        while not found and scale.value < 2.0**40:
            updated = 0
            one_pass(scorer, parts[0], scale, consume)
            scale.value *= 2.0 if not found else 1.0
    return updated, sum(1 for _ in scorer.model.parameters())


def main() -> None:
    options = arguments(__doc__ or "")
    settings = {"lr": 1e-4, "seed": options.seed, "batch": 8, "steps": 30 if options.quick else 60}
    rows: dict[str, dict[str, float]] = {}
    ends: dict[str, dict[str, Tensor]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = small_model(Path(temporary), options.seed) if options.quick else minilm()
        wanted, norms, _ = moved(path, "kept", torch.float32, **settings)
        clipped = sum(norm > CLIP for norm in norms)
        print(f"gradient norms {min(norms):.2f} to {max(norms):.2f}; {clipped} of {len(norms)} steps are clipped")
        for way in WAYS:
            ends[way], _, seconds = moved(path, way, torch.float16, **settings)
            rows[way] = compared(ends[way], wanted) | {"seconds": seconds}
            row = rows[way]
            times = seconds / rows["kept"]["seconds"]
            print(f"{way:26s} ratio {row['ratio']:.4f}  cosine {row['cosine']:.5f}  time {times:.2f}", flush=True)
        updated, tensors = torn(path, **settings)
        print(f"a float16 gradient overflows: {updated} of {tensors} tensors had been updated by then in one pass")
    ours = rows["two backward passes"]
    bars = {
        "two passes: the bits of gradients that are kept": all(
            torch.equal(ends["two backward passes"][name], ends["kept"][name]) for name in wanted
        ),
        f"two passes: cosine at least {COSINE}": ours["cosine"] >= COSINE,
        "some steps are clipped and some are not": 0 < clipped < len(norms),
    }
    figure = f"two backward passes cost {ours['seconds'] / rows['kept']['seconds']:.2f} times a step"
    result = {"rows": rows, "norms": norms, "clipped": clipped, "updated_before_overflow": [updated, tensors]}
    finish("clipping", options.quick, result, bars, figure)


if __name__ == "__main__":
    main()
