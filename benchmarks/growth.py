"""Pairs per second and memory at 1, 10 and 100 times the data, for scoring and for training: neither may change.

Each size is a process of its own over a file on disk, by the command line's own path: `halfrank score`, and the
training loop over tokens kept on disk. A tiny model, so that what grows with the data is not hidden behind arithmetic.
Speed is taken between the first and the last pair, start-up and compilation apart; memory is the largest resident set
of the process. The smallest size is more than the pairs that are held at one time.
"""

from __future__ import annotations

from halfrank.allocator import restart_without_thread_cache

if __name__ == "__main__":
    restart_without_thread_cache()  # as the command does; before torch is imported

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, arguments, finish, finished

sys.path.insert(0, str(ROOT / "tests"))
SLOWER, LARGER = 0.10, 0.05  # what 100 times the data may cost: a share of the speed, a share of the peak
TIMES = (1, 10, 100)
BASE = {"scoring": 10_000, "training": 2_000}
QUICK = {"scoring": 1_200, "training": 200}  # less than a chunk of some buffers: it shows, the long form proves


def write_pairs(path: Path, count: int) -> None:
    from tiny import PAIRS

    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            query, document = PAIRS[number % len(PAIRS)]
            row = {"query": f"{query} {number % 997}", "document": f"{document} {number}", "label": number % 2}
            handle.write(json.dumps(row) + "\n")


def run_scoring(data: Path, model: Path, out: Path) -> float:
    """Seconds that scoring the file takes."""
    from halfrank.allocator import steady_allocator
    from halfrank.data.readers import stream
    from halfrank.model import folder
    from halfrank.predict import predict
    from halfrank.score import score

    steady_allocator()
    scorer = folder.load(model, folder.LoadOptions(compute="float32"))
    predict(scorer, [("one pair", "before the clock starts")])
    started = time.perf_counter()
    score(scorer, stream(data), out)
    return time.perf_counter() - started


def run_training(data: Path, model: Path, out: Path) -> float:
    """Seconds from the first step to the last."""
    from halfrank.allocator import steady_allocator
    from halfrank.data.pairs import Pair
    from halfrank.data.source import Source
    from halfrank.model import folder
    from halfrank.train.config import TrainConfig
    from halfrank.train.examples import from_pairs, from_source
    from halfrank.train.loop import train

    steady_allocator()
    scorer = folder.load(model, folder.LoadOptions(compute="float32"))
    examples = from_source(Source(data), scorer.pairs, out / ".tokens")
    train(scorer, from_pairs([Pair("one pair", "before the clock starts", 1.0)] * 64, scorer.pairs), TrainConfig())
    started = time.perf_counter()
    train(scorer, examples, TrainConfig(batch_size=32, warmup=0.1))
    return time.perf_counter() - started


RUNS = {"scoring": run_scoring, "training": run_training}


def measured(kind: str, count: int, place: Path, model: Path) -> dict[str, float]:
    """One process: pairs a second, largest resident set in MiB."""
    data = place / f"{count}.jsonl"
    write_pairs(data, count)
    words = [
        sys.executable,
        __file__,
        "--row",
        json.dumps([kind, str(data), str(model), str(place / f"{kind}-{count}")]),
    ]
    done = finished(words)
    data.unlink()
    seconds, worked = json.loads(done.said.strip().splitlines()[-1])
    return {
        "pairs": count, "pairs_per_second": count / seconds, "pairs_per_processor_second": count / worked,
        "peak_mib": done.peak_mib,
    }  # fmt: skip


def row(asked: str) -> None:
    kind, data, model, out = json.loads(asked)
    worked = time.process_time()
    before: dict[str, Any] = {"seconds": RUNS[kind](Path(data), Path(model), Path(out))}
    print(json.dumps([before["seconds"], time.process_time() - worked]))


def main() -> None:
    if "--row" in sys.argv:
        return row(sys.argv[-1])
    options = arguments(__doc__ or "")
    from tiny import make_folder

    rows: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        model = make_folder("bert", place / "model")
        for kind, base in (QUICK if options.quick else BASE).items():
            rows[kind] = {str(times): measured(kind, base * times, place, model) for times in TIMES}
            for times, found in rows[kind].items():
                print(
                    f"{kind:9s} {times:>4s} x  {found['pairs']:9.0f} pairs  {found['pairs_per_second']:8.1f} a second  "
                    f"{found['peak_mib']:7.1f} MiB"
                )
    bars, figures = {}, []
    for kind, found in rows.items():
        few, many = found["1"], found["100"]
        speed, memory = many["pairs_per_second"] / few["pairs_per_second"], many["peak_mib"] / few["peak_mib"]
        bars[f"{kind}: pairs a second at 100 times within {SLOWER:.0%} of those at once"] = speed >= 1 - SLOWER
        bars[f"{kind}: peak memory at 100 times within {LARGER:.0%}"] = memory <= 1 + LARGER
        figures.append(f"{kind} at 100 times the data: {speed:.2f} of the speed, {memory:.3f} of the memory")
    finish("growth", options.quick, {"rows": rows}, bars, "; ".join(figures))
    return None


if __name__ == "__main__":
    main()
