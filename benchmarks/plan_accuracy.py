"""Is the plan right? Planned against measured peak memory, each run in a process of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import arguments, finish
from halfrank.memory import Way, describe, need
from halfrank.model.folder import LoadOptions
from peaks import Run, measured, model_folder

ALLOWED = 0.15
QUICK = [
    ("minilm", "float32", False, False, 16, 128),
    ("minilm", "float16", False, False, 16, 128),
    ("minilm", "float16", True, True, 16, 128),
    ("minilm", "bfloat16", True, False, 8, 256),
]
FULL = [
    *QUICK,
    ("minilm", "float32", True, False, 8, 256),
    ("minilm", "float16", False, True, 8, 256),
    ("mpnet", "float32", False, False, 8, 128),
    ("mpnet", "float16", True, True, 8, 256),
    ("llama-135m", "float32", False, False, 8, 128),
    ("llama-135m", "float16", True, False, 8, 128),
    ("llama-135m", "bfloat16", False, True, 8, 256),
    ("llama-1b", "float16", True, True, 4, 128),
]


def main() -> None:
    options = arguments(__doc__ or "")
    rows, bars = [], {}
    with tempfile.TemporaryDirectory() as root:
        for shape, scheme, checkpointing, released, pairs, length in QUICK if options.quick else FULL:
            path = model_folder(shape, Path(root))
            described = describe(path, LoadOptions(num_labels=1))
            planned = need(described, Way(scheme, checkpointing, released), [length] * pairs)
            found = measured(Run(str(path), scheme, released, checkpointing, pairs, length))
            name = f"{shape}, {Way(scheme, checkpointing, released)}, {pairs} x {length}"
            ratio = planned.peak / found["peak"] if "peak" in found else float("nan")
            rows.append({"setting": name, "planned": planned.as_json(), "measured": found, "ratio": ratio})
            bars[f"{name}: within 15 %"] = abs(ratio - 1) <= ALLOWED
            shown = f"{found['peak'] / 2**20:8.0f} MiB measured" if "peak" in found else found["failed"]
            print(f"{name:70s} {planned.peak / 2**20:8.0f} MiB planned {shown}  ratio {ratio:.3f}", flush=True)
    worst = max(abs(row["ratio"] - 1) for row in rows)  # type: ignore[operator]
    finish("plan_accuracy", options.quick, {"rows": rows}, bars, f"worst plan is off by {worst:.1%}")


if __name__ == "__main__":
    main()
