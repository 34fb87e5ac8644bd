"""A tensor's chunks shared out among as many threads as torch uses; no result depends on how they do."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
Job = Callable[[int, int], None]


def in_chunks(job: Job, total: int, chunk: int) -> None:
    """Call `job(start, stop)` for every chunk of `total` elements and wait for all; raises what one of them raises."""
    threads = torch.get_num_threads()
    if threads == 1 or total <= chunk:
        in_turn(job, total, chunk)
        return
    process = os.getpid()  # a forked one has none of the threads
    pool = _pools.setdefault((process, threads), ThreadPoolExecutor(threads, thread_name_prefix="halfrank"))
    for done in [pool.submit(job, *span) for span in _spans(total, chunk)]:
        done.result()


def in_turn(job: Job, total: int, chunk: int) -> None:
    """The same in the thread that calls."""
    for span in _spans(total, chunk):
        job(*span)


def _spans(total: int, chunk: int) -> list[tuple[int, int]]:
    return [(start, min(start + chunk, total)) for start in range(0, total, chunk)]
