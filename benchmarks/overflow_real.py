"""gemma-3-270m, whose activations pass 100,000, stored in float16 and computed in (emulated) float16, as a reranker.

Real weights, real queries (DL 2019), yes against no through the built-in qwen3 template. Plain float16 gives scores
that are not finite. halfrank finds its islands on the way, and its scores are compared with float32's of the same
weights. Then a short fine-tuning run on DL 2020 in the same arithmetic beside float32's: the mean of three draws of the
rounding noise, on the same batches, because a run as short as this one ends where chance takes it.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common import arguments, finish, ranking_data
from halfrank.data.packing import by_budget, pack
from halfrank.data.pairs import Pair
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.model.storage import leaves, within
from halfrank.predict import predict
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Batches, epoch_plan, from_pairs
from halfrank.train.loop import train
from real_models import gemma

SCORE_BAR, LOSS_BAR, SCALE = 0.02, 0.02, 2.0**12
DRAWS = 3  # of the rounding noise; the quick form takes one
COMPUTE = "emulated-float16"


def loaded(compute: str, tokens: int) -> Scorer:
    """Gemma's float16 weights computed in a format."""
    options = folder.LoadOptions(dtype=torch.float16, compute=compute, template="qwen3", max_length=tokens)
    return folder.load(gemma(), options)


def nudged(scorer: Scorer) -> Scorer:
    """The same model with every weight of its norms one unit of float16 away: how far apart two runs may lie anyway."""
    with torch.no_grad():
        for name, parameter in scorer.model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, 1e4)))
    return scorer


def plain_non_finite(scorer: Scorer, pairs: list[tuple[str, str]]) -> int:
    """Pairs whose score is not finite when nothing is done about it."""
    tokens = scorer.pairs.encode(pairs)
    bad = 0
    with torch.no_grad():
        for rows in by_budget(tokens.lengths, 4096):
            bad += int((~scorer.logits(pack(tokens, rows)).isfinite()).sum())
    return bad


def same_top(exact: np.ndarray, narrow: np.ndarray, count: int = 10) -> bool:
    """The same first documents, exchanges allowed only between scores that float32 has within the bar."""
    a, b = (set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (exact, narrow))
    least = min(exact[list(a)])
    return all(abs(exact[index] - least) <= SCORE_BAR for index in a ^ b)


def tuned(
    scorer: Scorer, pairs: list[Pair], steps: int, batch_size: int, *, order: int, noise: int = 0
) -> dict[str, Any]:
    """A short run: the losses of its batches, and the loss of all its pairs after it.

    `order` is the seed of the batches, `noise` that of the rounding.
    """
    # A scale that fits from the start: the search for it skips steps, and not as many in both formats.
    config = TrainConfig(steps=steps, batch_size=batch_size, lr=1e-6, warmup=0.2, seed=noise, loss_scale=SCALE)
    examples = from_pairs(pairs, scorer.pairs)

    def plan(epoch: int) -> Batches:
        return epoch_plan(examples, batch_size, seed=order, epoch=epoch)

    losses = train(scorer, examples, config, plan=plan).losses
    return {"after": loss_of(scorer, pairs), "batches": losses}


def another_draw(islands: Sequence[str], tokens: int) -> Scorer:
    """The float16 model as it was before it was trained, with its islands."""
    scorer = loaded(COMPUTE, tokens)
    scorer.widen(islands)
    return scorer


def loss_of(scorer: Scorer, pairs: list[Pair]) -> float:
    """Mean binary cross-entropy of all pairs; a batch's own halves or doubles whenever Adam moves this model."""
    tokens = scorer.pairs.encode([(pair.query, pair.document) for pair in pairs])
    total = 0.0
    with torch.no_grad():
        for rows in by_budget(tokens.lengths, 2048):
            batch = pack(tokens, rows)
            labels = torch.tensor([pairs[row].label for row in batch.rows], dtype=torch.float32)
            logits = scorer.logits(batch)[:, 0].float()
            total += float(F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"))
    return total / len(pairs)


def main() -> None:
    options = arguments(__doc__ or "")
    logging.getLogger("halfrank").setLevel(logging.ERROR)
    count, depth, tokens = (2, 12, 128) if options.quick else (20, 50, 160)
    tuning, steps, batch_size = (2, 2, 8) if options.quick else (12, 12, 8)
    draws = 1 if options.quick else DRAWS
    queries = ranking_data("dl19-bm25-top100.jsonl")[:count]
    groups = [[(line["query"], doc["text"]) for doc in line["docs"][:depth]] for line in queries]
    flat = [pair for group in groups for pair in group]
    exact, narrow = loaded("float32", tokens), loaded(COMPUTE, tokens)
    broken = plain_non_finite(narrow, flat[:8] if options.quick else flat[:100])
    print(f"plain {COMPUTE}: {broken} scores are not finite", flush=True)
    wanted = predict(exact, flat).values[:, 0]
    result = predict(narrow, flat)
    found = result.values[:, 0]
    islands, names = list(narrow.islands), [name for name, _ in leaves(narrow.model)]
    wide = [name for name in names if within(name, narrow.islands)]
    held = sum(p.numel() for n in wide for p in narrow.model.get_submodule(n).parameters())
    total = sum(p.numel() for p in narrow.model.parameters())
    cost = statistics.median(
        _seconds(narrow, flat[:8]) / _seconds(exact, flat[:8]) for _ in range(1 if options.quick else 5)
    )
    ends = np.cumsum([len(group) for group in groups])
    tops = [same_top(wanted[e - len(g) : e], found[e - len(g) : e]) for e, g in zip(ends, groups, strict=True)]
    again = predict(narrow, flat[:4] if options.quick else flat[:depth])
    pairs = [
        Pair(line["query"], doc["text"], float(doc["grade"] >= 2))
        for line in ranking_data("dl20-judged.jsonl")[:tuning]
        for doc in line["docs"][:8]
    ]
    before = loss_of(exact, pairs)
    run = partial(tuned, pairs=pairs, steps=steps, batch_size=batch_size, order=options.seed)
    runs = {"float32": run(exact)}
    del exact  # room for another
    if not options.quick:
        runs["float32, one unit away"] = run(nudged(loaded("float32", tokens)))
    narrow_runs = [run(narrow, noise=options.seed)]
    del narrow
    for draw in range(1, draws):
        narrow_runs.append(run(another_draw(islands, tokens), noise=options.seed + draw))
    runs |= {f"{COMPUTE}, draw {draw}": one for draw, one in enumerate(narrow_runs, 1)}
    apart = float(np.abs(found - wanted).max())
    print(f"{len(islands)} islands of {len(names)} modules, {held / total:.1%} of the parameters, for example "
          f"{', '.join(islands[:4])}")  # fmt: skip
    later = len(again.rescued)
    print(f"time with islands over float32's: {cost:.2f}; scored again: {len(result.rescued)}, later: {later}")
    print(
        f"largest difference of {len(flat)} scores {apart:.4f} (they lie from {wanted.min():.2f} to {wanted.max():.2f})"
    )
    for name, one in runs.items():
        shown = ", ".join(f"{loss:.3f}" for loss in one["batches"][:8])
        print(f"{name}: loss of {len(pairs)} pairs {before:.4f}, after {steps} steps {one['after']:.4f} ({shown})")
    reference = runs["float32"]["after"]
    off = abs(statistics.fmean(one["after"] for one in narrow_runs) / reference - 1)
    worst = max(abs(one["after"] / reference - 1) for one in narrow_runs)
    fell = 1 - reference / before
    bars = {
        f"plain {COMPUTE} breaks: {broken} non-finite scores": broken > 0,
        "every score finite": bool(np.isfinite(found).all()),
        f"within {SCORE_BAR} of float32: {apart:.4f}": apart <= SCORE_BAR,
        f"same top 10 on {sum(tops)} of {len(tops)} queries": all(tops),
        "islands are found once: nothing to rescue afterwards": not again.rescued,
        f"fine-tuned loss, the mean of {draws} draws, finite and within {LOSS_BAR:.0%} of float32's: {off:.2%}, the "
        f"worst draw {worst:.2%}": off <= LOSS_BAR and all(np.isfinite(one["batches"]).all() for one in narrow_runs),
        f"and it learned: float32's loss fell by {fell:.1%}, more than they are apart": fell > 2 * off,
    }
    facts: dict[str, Any] = {
        "pairs": len(flat), "broken": broken, "islands": islands, "modules": len(names),
        "parameters_wide": held / total, "cost": cost, "apart": apart,
        "tuning": {"before": before} | runs,
    }  # fmt: skip
    finish("overflow_real", options.quick, facts, bars, f"{len(islands)} islands, largest difference {apart:.4f}")


def _seconds(scorer: Scorer, pairs: list[tuple[str, str]]) -> float:
    started = time.perf_counter()
    predict(scorer, pairs)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
