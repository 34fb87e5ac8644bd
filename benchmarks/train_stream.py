"""`halfrank train` on a file of any size: memory flat in pairs, because tokens and texts lie on disk.

A tiny model trains one epoch on 10,000 pairs and one on many more (100,000; quick 50,000), of at most 32 tokens, in
processes of their own; the largest resident set of each is compared. Groups of four documents likewise.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, arguments, finish, finished

sys.path.insert(0, str(ROOT / "tests"))
from tiny import PAIRS, make_folder

GROWTH = 0.05
SMALL, TOKENS, BATCH = 10_000, 32, 64  # pairs of a batch
DOCUMENTS = 4


def write_pairs(path: Path, count: int, *, grouped: bool) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count // DOCUMENTS if grouped else count):
            query, document = PAIRS[number % len(PAIRS)]
            asked = f"{query} {number % 997}"
            documents = [f"{document} {number % 89} {place} {document}" for place in range(DOCUMENTS)]
            row: dict[str, Any] = {"query": asked, "pos": documents[:1], "neg": documents[1:]}
            if not grouped:
                row = {"query": asked, "document": documents[0], "label": number % 2}
            handle.write(json.dumps(row) + "\n")


def peak(data: Path, model: Path, out: Path, units: int) -> tuple[float, float]:
    """(largest resident set in MiB, seconds) of a training run that ends well."""
    words = [sys.executable, "-m", "halfrank", "train", str(data), "--model", str(model), "--out", str(out)]
    words += ["--max-length", str(TOKENS), "--batch-size", str(units), "--precision", "float16"]
    done = finished(words)
    return done.peak_mib, done.seconds


def main() -> None:
    options = arguments(__doc__ or "")
    many = 50_000 if options.quick else 100_000
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        model = make_folder("bert", place / "model")
        for shape in ("pairs", "groups"):
            found = {}
            for count in (SMALL, many):
                data = place / f"{shape}-{count}.jsonl"
                write_pairs(data, count, grouped=shape == "groups")
                units = BATCH // DOCUMENTS if shape == "groups" else BATCH
                found[count] = peak(data, model, place / f"{shape}-{count}", units)
            growth = found[many][0] / found[SMALL][0] - 1
            rows.append({"shape": shape, "few_mib": found[SMALL][0], "many_mib": found[many][0], "growth": growth,
                         "seconds": found[many][1]})  # fmt: skip
            print(
                f"{shape:7s} peak {found[SMALL][0]:.0f} MiB at {SMALL:,} pairs, {found[many][0]:.0f} MiB at {many:,} "
                f"({growth:+.1%}, {found[many][1]:.0f} s)",
                flush=True,
            )
    bars = {
        f"{row['shape']}: peak memory at {many:,} pairs within {GROWTH:.0%} of that at {SMALL:,}": (
            abs(row["growth"]) <= GROWTH
        )
        for row in rows
    }
    worst = max(rows, key=lambda row: abs(row["growth"]))
    finish(
        "train_stream", options.quick, {"pairs": many, "rows": rows}, bars, f"memory grows by {worst['growth']:+.1%}"
    )


if __name__ == "__main__":
    main()
