"""Nanoseconds an element of the 16-bit update on two threads: compiled by numba, in plain torch, and what bounds both.

Beside them torch's fused AdamW over float32 (28 bytes an element), and a copy of memory: an update reads and writes
12 bytes an element, so at the copy's speed it would take the time shown last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common import arguments, finish
from halfrank.numerics import compiled, update
from halfrank.numerics.moments import blocks
from halfrank.numerics.noise import keys
from halfrank.numerics.update import Stored, coefficients

THREADS = 2
COMPILED, PLAIN = 4.0, 15.0  # ns an element
TRAFFIC = 12  # bytes an element: weight 2, residual 1, m 1, v 1, read and written, and the gradient's 2
FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BACKENDS = {"numba": compiled.update_, "torch": update.update_}


def fresh(count: int, dtype: torch.dtype, seed: int) -> tuple[Stored, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(count, generator=generator) * 0.02).to(dtype)
    gradient = (torch.randn(count, generator=generator) * 0.01).to(dtype)
    m = torch.zeros(count, dtype=torch.int8)
    return Stored(weight, m.clone(), m, torch.zeros(count, dtype=torch.uint8), torch.zeros(blocks(count))), gradient


def timed(run: Callable[[int], object], count: int, rounds: int) -> dict[str, float]:
    """Median wall-clock and processor nanoseconds an element of `run(step)`, after two that warm up."""
    wall, work = [], []
    for step in range(1, rounds + 3):
        started, worked = time.perf_counter(), time.process_time()
        run(step)
        wall.append((time.perf_counter() - started) / count * 1e9)
        work.append((time.process_time() - worked) / count * 1e9)
    return {"ns": statistics.median(wall[2:]), "processor_ns": statistics.median(work[2:])}


def measured(backend: str, dtype: torch.dtype, count: int, rounds: int, seed: int) -> tuple[dict[str, float], Stored]:
    stored, gradient = fresh(count, dtype, seed)

    def step(number: int) -> None:
        numbers = coefficients(number, lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, divisor=10.0)
        BACKENDS[backend](stored, gradient, numbers, keys(seed, number, 0))

    return timed(step, count, rounds), stored


def same(a: Stored, b: Stored) -> bool:
    """Whether every stored byte is equal."""
    return all(torch.equal(vars(a)[name].view(torch.uint8), vars(b)[name].view(torch.uint8)) for name in vars(a))


def main() -> None:
    options = arguments(__doc__ or "")
    count, rounds = (1 << 22, 5) if options.quick else (1 << 25, 9)
    torch.set_num_threads(THREADS)
    rows: dict[str, dict[str, float]] = {}
    equal = {}
    for name, dtype in FORMATS.items():
        ends = {}
        for backend in BACKENDS:
            rows[f"{name}, {backend}"], ends[backend] = measured(backend, dtype, count, rounds, options.seed)
        equal[name] = same(ends["numba"], ends["torch"])
    weight = torch.zeros(count, requires_grad=True)
    weight.grad = torch.full_like(weight, 1e-3)
    fused = torch.optim.AdamW([weight], fused=True)
    rows["float32, torch's fused AdamW"] = timed(lambda _: fused.step(), count, rounds)
    source, target = (torch.zeros(count * TRAFFIC // 2, dtype=torch.int8) for _ in range(2))
    rows["a copy of as many bytes"] = timed(lambda _: target.copy_(source), count, rounds)
    for name, row in rows.items():
        print(f"{name:30s} {row['ns']:7.2f} ns an element, of the processor {row['processor_ns']:7.2f}")
    bars = {f"{name}: the same bits after {rounds + 2} steps": found for name, found in equal.items()}
    for name in FORMATS:
        bars[f"{name}, numba: at most {COMPILED:g} ns"] = rows[f"{name}, numba"]["ns"] <= COMPILED
        bars[f"{name}, without numba: at most {PLAIN:g} ns"] = rows[f"{name}, torch"]["ns"] <= PLAIN
    figure = ", ".join(f"{name} {rows[name]['ns']:.1f} ns" for name in rows)
    finish("update_speed", options.quick, {"elements": count, "rows": rows}, bars, figure)


if __name__ == "__main__":
    main()
