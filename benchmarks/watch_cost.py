"""Bar 4: what watching costs: processor time inside `Watch` over that of the whole training step.

MiniLM on MS MARCO passages, once looking at every step and once at the default interval, in float32, float16 and
emulated float16. One thread, so that no idle thread's spinning is counted as work.
"""

from __future__ import annotations

import time

import torch

from common import arguments, finish, minilm
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.numerics.scaling import LossScale
from halfrank.numerics.watch import Watch
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs, micro_batches
from halfrank.train.loop import make_optimizer
from halfrank.train.step import train_step
from train_speed import passages

BAR = 0.02
BATCH = 16
FORMATS = {
    "float32": (torch.float32, "float32"),
    "float16": (torch.float16, "float32"),
    "float32, computed in emulated-float16": (torch.float32, "emulated-float16"),
}


def share(dtype: torch.dtype, compute: str, every: int, steps: int, seed: int) -> float:
    """Processor time inside Watch over that of the steps, the first of which warms up and is not counted."""
    torch.manual_seed(seed)
    options = folder.LoadOptions(num_labels=1, dtype=dtype, compute=compute, max_length=192)
    scorer = folder.load(minilm(), options)
    scorer.model.train()
    config = TrainConfig(lr=2e-5, seed=seed)
    optimizer, scale = make_optimizer(scorer, config), LossScale(enabled=scorer.precision.scales_loss)
    examples = from_pairs(passages(seed)[: BATCH * (steps + 1)], scorer.pairs)
    watch = Watch(every=every)
    spent = before = 0.0
    for step in range(steps + 1):
        units = range(BATCH * step, BATCH * (step + 1))
        parts = micro_batches(examples, units, max_tokens=config.max_tokens, per_unit=False)
        started = time.process_time()
        train_step(scorer, parts, LOSSES["bce"].function, optimizer, scale, clip=config.clip, watch=watch)
        found = watch.next_step()
        spent += time.process_time() - started
        assert "headroom_module" in found or step % every, "a step that was to be watched was not"
        if step == 0:
            spent, before = 0.0, watch.seconds
    return (watch.seconds - before) / spent


def main() -> None:
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    steps = {1: 5 if options.quick else 20, TrainConfig().watch_every: 10 if options.quick else 20}
    rows: dict[str, dict[str, float]] = {}
    for name, (dtype, compute) in FORMATS.items():
        rows[name] = {f"every {every}": share(dtype, compute, every, n, options.seed) for every, n in steps.items()}
        print(f"{name:40s} " + "  ".join(f"{every}: {value:.2%}" for every, value in rows[name].items()), flush=True)
    always, usual = (max(row[f"every {every}"] for row in rows.values()) for every in steps)
    bars = {
        f"every step: at most {BAR:.0%} ({always:.2%})": always <= BAR,
        f"at the default interval: less ({usual:.2%})": usual < always,
    }
    finish("watch_cost", options.quick, {"rows": rows, "seed": options.seed}, bars, f"watching costs {always:.2%}")


if __name__ == "__main__":
    main()
