"""Prediction speed against sentence-transformers' predict on BM25's top 100 of 2019: same scores, in turns."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from common import arguments, finish, interleaved, median_ratio, minilm, ranking_data
from halfrank.model import folder
from halfrank.predict import predict


def main() -> None:
    warnings.filterwarnings("ignore")
    from sentence_transformers import CrossEncoder

    options = arguments(__doc__ or "")
    count, rounds = (600, 3) if options.quick else (4300, 5)
    pairs = [(line["query"], doc["text"]) for line in ranking_data("dl19-bm25-top100.jsonl") for doc in line["docs"]]
    random.Random(options.seed).shuffle(pairs)
    pairs = pairs[:count]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        torch.manual_seed(options.seed)
        folder.save(folder.load(minilm(), folder.LoadOptions(num_labels=1)), path)
        ours = folder.load(path, folder.LoadOptions(compute="float32"))
        theirs = CrossEncoder(str(path), device="cpu")
    scores: dict[str, np.ndarray] = {}

    def run_ours() -> float:
        started = time.perf_counter()
        scores["ours"] = predict(ours, pairs).values[:, 0]
        return time.perf_counter() - started

    def run_theirs() -> float:
        started = time.perf_counter()
        scores["theirs"] = theirs.predict(pairs, batch_size=32, show_progress_bar=False)
        return time.perf_counter() - started

    predict(ours, pairs[:64])
    theirs.predict(pairs[:64], show_progress_bar=False)
    seconds = interleaved({"theirs": run_theirs, "ours": run_ours}, rounds)
    ratio = median_ratio(seconds["theirs"], seconds["ours"])
    error = float(np.abs(scores["ours"] - scores["theirs"]).max())
    speed = {name: len(pairs) / statistics.median(times) for name, times in seconds.items()}
    print(f"{len(pairs)} pairs: sentence-transformers {speed['theirs']:.1f}, halfrank {speed['ours']:.1f} pairs/s")
    bars = {"at least 1.35 times": ratio >= 1.35, "scores equal within 1e-5": error <= 1e-5}
    result = {
        "pairs": len(pairs),
        "seconds": seconds,
        "pairs_per_second": speed,
        "ratio": ratio,
        "largest_error": error,
    }
    finish("predict_speed", options.quick, result, bars, f"predict {ratio:.2f} x, largest difference {error:.1e}")


if __name__ == "__main__":
    main()
