"""The README's picture of speed against nDCG@10 and memory, drawn from the result of `tradeoff.py` and nothing else.

`make bench` runs it after the table. Nothing is drawn where there is no result.
"""

from __future__ import annotations

from typing import Any

import matplotlib

from table import ROOT, found

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

TARGET = ROOT / "docs" / "img" / "tradeoff.svg"
COLOURS = {"sentence-transformers": "#b5482a", "halfrank": "#1f6f8b"}
MARKS = {"float32": "o", "float16": "s", "bfloat16": "^"}  # of the weights; hollow where products are in 16 bits
SPEED = "train_pairs_per_processor_second"


def points(axes: Axes, rows: dict[str, dict[str, float]], number: str) -> None:
    """A mark for each way, at its speed and `number`; the first panel names them."""
    for name, row in rows.items():
        library, weights = name.split(",")[0].split(" ")
        colour = COLOURS[library]
        filled = colour if "products" not in name else "none"
        axes.plot(
            row[SPEED], row[number], MARKS[weights], markersize=9, label=name, color=colour, markerfacecolor=filled,
            linestyle="none",
        )  # fmt: skip
    axes.set_xlim(0, 1.1 * max(row[SPEED] for row in rows.values()))
    axes.set_xlabel("training, pairs a second of the processor")
    axes.grid(alpha=0.3)


def picture(result: dict[str, Any]) -> pyplot.Figure:
    """Speed against nDCG@10 on the left, against peak memory on the right."""
    figure, (quality, memory) = pyplot.subplots(1, 2, figsize=(9, 4.2))
    rows = result["rows"]
    points(quality, rows, "ndcg")
    middle = rows["sentence-transformers float32"]["ndcg"]
    quality.set_ylim(middle - 0.1, middle + 0.1)
    quality.set_ylabel("nDCG@10, DL 2019 reranked")
    points(memory, rows, "peak_mib")
    memory.set_ylim(0, 1.1 * max(row["peak_mib"] for row in rows.values()))
    memory.set_ylabel("peak memory of the process, MiB")
    handles, labels = quality.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    return figure


def main() -> None:
    result = found("tradeoff")
    if result is None:
        print("no result of tradeoff.py: nothing drawn")
        return
    matplotlib.rcParams["svg.hashsalt"] = "halfrank"  # the same picture from the same numbers
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    picture(result).savefig(TARGET, metadata={"Date": None})
    print(TARGET.relative_to(ROOT))


if __name__ == "__main__":
    main()
