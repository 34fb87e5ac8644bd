"""`halfrank score` on a file of any size: memory flat in pairs, and a killed run goes on to the same output.

A tiny model scores 10,000 pairs and then many more (1,000,000; quick 60,000) in processes of their own; the largest
resident set of each is compared. The long run is killed in its middle, started again, and compared to the byte.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, arguments, finish, finished

sys.path.insert(0, str(ROOT / "tests"))
from tiny import PAIRS, make_folder

GROWTH = 0.05
SMALL = 10_000


def write_pairs(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            query, document = PAIRS[number % len(PAIRS)]
            row = {"query": f"{query} {number % 997}", "document": f"{document} {number % 89}"}
            handle.write(json.dumps(row) + "\n")


def command(data: Path, model: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "halfrank", "score", str(data), "--model", str(model), "--out", str(out)]


def killed_in_the_middle(words: list[str], out: Path, pairs: int) -> int:
    """Kill the process once about half of the output is there; the pairs it had kept."""
    note = out.with_name(f".{out.name}.partial.json")
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kept = 0
    while kept < pairs // 2 and process.poll() is None:
        time.sleep(0.05)
        if note.exists():
            kept = json.loads(note.read_text())["pairs"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    return kept


def main() -> None:
    options = arguments(__doc__ or "")
    many = 60_000 if options.quick else 1_000_000
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        model = make_folder("bert", place / "model")
        for name, count in (("few", SMALL), ("many", many)):
            write_pairs(place / f"{name}.jsonl", count)
        few = finished(command(place / "few.jsonl", model, place / "few.out")).peak_mib
        seconds, _, whole, _ = finished(command(place / "many.jsonl", model, place / "whole.out"))
        kept = killed_in_the_middle(command(place / "many.jsonl", model, place / "cut.out"), place / "cut.out", many)
        finished(command(place / "many.jsonl", model, place / "cut.out"))
        same = (place / "cut.out").read_bytes() == (place / "whole.out").read_bytes()
        lines = sum(1 for _ in (place / "whole.out").open())
    growth = whole / few - 1
    print(f"peak memory: {few:.0f} MiB at {SMALL:,} pairs, {whole:.0f} MiB at {many:,} ({seconds:.0f} s)")
    print(f"killed with {kept:,} pairs kept, then started again: {'the same bytes' if same else 'other bytes'}")
    bars = {
        f"peak memory at {many:,} pairs within {GROWTH:.0%} of that at {SMALL:,}": abs(growth) <= GROWTH,
        "killed in the middle and started again: the same output": same and 0 < kept < many,
        "one line a pair": lines == many,
    }
    result = {"pairs": many, "few_mib": few, "many_mib": whole, "seconds": seconds, "kept": kept}
    finish("score_stream", options.quick, result, bars, f"memory grows by {growth:+.1%}, output the same: {same}")


if __name__ == "__main__":
    main()
