"""Do batches of like lengths train faster, and what do they do to nDCG@10? `--length-buckets` against random batches.

Both start from one MiniLM whose head is fitted to grades, train on the judged passages of 2020 for one epoch and
rerank BM25's candidates of 2019. Runs of one seed are neighbours in time; the processor's seconds are compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from common import arguments, finish
from halfrank.model import folder
from halfrank.predict import predict
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from predict_speed import fitted
from tradeoff import LR, Setting, judged
from train_speed import BATCH, passages

NEAR = 0.01  # nDCG@10: what may be lost on average before buckets have to stay off


def one(setting: Setting, *, buckets: bool) -> dict[str, float]:
    """Train and judge once."""
    options = folder.LoadOptions(compute="float32", max_length=setting.tokens)
    scorer = folder.load(setting.model, options)
    torch.manual_seed(setting.seed)
    examples = from_pairs(passages(setting.seed)[: setting.steps * BATCH], scorer.pairs)
    config = TrainConfig(batch_size=BATCH, lr=LR, seed=setting.seed, length_buckets=buckets)
    worked = time.process_time()
    train(scorer, examples, config)
    worked = time.process_time() - worked
    ndcg, _ = judged(setting, lambda pairs: predict(scorer, pairs).values[:, 0])
    return {"pairs_per_processor_second": len(examples) / worked, "ndcg": ndcg}


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = str(fitted(Path(temporary) / "model", options.seed, 150 if options.quick else 300))
        for seed in range(options.seed, options.seed + (1 if options.quick else 3)):
            setting = Setting(model, seed)
            if options.quick:
                setting = Setting(model, seed, steps=25, queries=8, candidates=20)
            for buckets in (False, True) if seed % 2 == 0 else (True, False):
                runs.append({"seed": seed, "buckets": buckets, **one(setting, buckets=buckets)})
                shown = runs[-1]
                print(
                    f"seed {seed}, {'length buckets' if buckets else 'random order  '}: "
                    f"{shown['pairs_per_processor_second']:.1f} pairs a processor second, nDCG@10 {shown['ndcg']:.4f}",
                    flush=True,
                )
    plain, ordered = ([run for run in runs if run["buckets"] is buckets] for buckets in (False, True))
    by_seed = {run["seed"]: run for run in plain}
    speed = statistics.median(
        run["pairs_per_processor_second"] / by_seed[run["seed"]]["pairs_per_processor_second"] for run in ordered
    )
    away = statistics.mean(run["ndcg"] - by_seed[run["seed"]]["ndcg"] for run in ordered)
    bars = {f"nDCG@10 at most {NEAR:g} below that of random batches, on average ({away:+.4f})": away >= -NEAR}
    figure = f"length buckets: {speed:.2f} times the speed, nDCG@10 {away:+.4f} over {len(ordered)} seeds"
    finish("length_buckets", options.quick, {"runs": runs, "speed": speed, "away": away}, bars, figure)


if __name__ == "__main__":
    main()
