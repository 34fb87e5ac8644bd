"""The README's table of speed, written from `benchmarks/results/*.json` and from nothing else.

`make bench` runs it last. A row stands there where its result does, the long form before the quick one; machine,
instruction set, versions and date are those of the run. `--check` writes nothing and exits 1 where README differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- speed: written by benchmarks/table.py -->", "<!-- end of speed -->"
BUSY = 2.0  # processes a core that want to run: beyond it the figures of one benchmark alone would be others
HEAD = "| speed | figure | script | machine, date |\n|---|---|---|---|"


class Row(NamedTuple):
    """A line of the table: what was measured, by which benchmark, and how its result is read."""

    what: str
    benchmark: str
    figure: Callable[[dict[str, Any]], str]


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times"


def _growth(kind: str) -> Callable[[dict[str, Any]], str]:
    def figure(result: dict[str, Any]) -> str:
        few, many = result["rows"][kind]["1"], result["rows"][kind]["100"]
        speed = many["pairs_per_second"] / few["pairs_per_second"]
        return f"{speed:.2f} of the speed, {many['peak_mib'] / few['peak_mib']:.3f} of the memory"

    return figure


def _way(result: dict[str, Any], which: str) -> str:
    return str(result["best"][which]).removeprefix("halfrank ")


ROWS = [
    Row("training, MS MARCO passages, float32 against sentence-transformers' float32", "train_speed",
        lambda result: _times(result["passages"]["ratios"]["float32"])),
    Row("training, the same, loaded in float16 against its float32", "train_speed",
        lambda result: _times(result["passages"]["ratios"]["float16"])),
    Row("training, docstrings of at most 512 tokens, float32", "train_speed",
        lambda result: _times(result["docstrings"]["ratios"]["float32"])),
    Row("prediction, exact float32, against sentence-transformers' torch", "predict_speed",
        lambda result: _times(result["ratios"]["exact beside torch"]) + f" ({_way(result, 'halfrank exact')})"),
    Row("the same, against its fastest exact way or ONNX Runtime", "predict_speed",
        lambda result: _times(result["ratios"]["exact beside fastest exact"]) + f" ({_way(result, 'peer exact')})"),
    Row("prediction, the fastest certified format against the fastest of theirs", "predict_speed",
        lambda result: _times(result["ratios"]["fastest beside fastest"])
        + f" ({_way(result, 'halfrank')}; {_way(result, 'peer')})"),
    Row("`rank()` of 100 passages, exact: p50 and p99, against sentence-transformers' torch", "predict_speed",
        lambda result: "; ".join(_times(result["ratios"][f"rank p{quantile}"]) for quantile in (50, 99))),
    Row("MiniLM trained and judged: pairs a processor second in training, nDCG@10, peak memory", "tradeoff",
        lambda result: "; ".join(
            f"{name}: {row['train_pairs_per_processor_second']:.1f}, {row['ndcg']:.3f}, {row['peak_mib']:.0f} MiB"
            for name, row in result["rows"].items())),
    Row("one update of 16-bit weights, nanoseconds an element, with numba and without", "update_speed",
        lambda result: "; ".join(
            f"{name} {result['rows'][f'{name}, numba']['ns']:.1f}, {result['rows'][f'{name}, torch']['ns']:.1f}"
            for name in ("float16", "bfloat16"))),
    Row("scoring at 100 times the pairs", "growth", _growth("scoring")),
    Row("training at 100 times the pairs", "growth", _growth("training")),
    Row("`halfrank --help`; `halfrank rank` of 10 documents with MiniLM, whole processes", "startup",
        lambda result: f"{result['seconds']['halfrank --help']:.2f} s; "
        f"{result['seconds']['halfrank rank, 10 documents']:.1f} s"),
]  # fmt: skip


def found(benchmark: str) -> dict[str, Any] | None:
    """The result of a benchmark, None where it has none yet."""
    for name in (f"{benchmark}.json", f"{benchmark}-quick.json"):
        if (RESULTS / name).exists():
            return json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return None


def line(row: Row, result: dict[str, Any]) -> str:
    """One line of the table."""
    machine = result["machine"]
    limits = "".join(f", {name}={value}" for name, value in machine["limits"].items())
    used = f"{machine['instruction_set']}{limits}, {machine['threads']} threads"
    busy = machine.get("load", 0) > BUSY * machine.get("cores", 1)
    shared = f", busy with other work (load {machine['load']:.0f})" if busy else ""
    where = f"{machine['processor']}, {used}{shared}, {machine['date']}"
    script = f"`benchmarks/{row.benchmark}.py{' --quick' if result['quick'] else ''}`"
    return f"| {row.what} | {row.figure(result)} | {script} | {where} |"


def table() -> str:
    """The whole table, with the versions of what took part below it."""
    results = {row.benchmark: found(row.benchmark) for row in ROWS}
    lines = [line(row, result) for row in ROWS if (result := results[row.benchmark]) is not None]
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in r["machine"]["versions"].items()) for r in results.values() if r is not None}
    )
    return "\n".join([HEAD, *lines, "", f"Versions: {'; '.join(versions)}."])


def written(readme: str) -> str:
    """`readme` with the table between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"README.md has no line {BEGIN}"
    assert after, f"README.md has no line {END}"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    before = README.read_text(encoding="utf-8")
    now = written(before)
    if "--check" in sys.argv:
        if now != before:
            sys.exit("The README's table of speed is not what the results say: run benchmarks/table.py.")
        return
    README.write_text(now, encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
