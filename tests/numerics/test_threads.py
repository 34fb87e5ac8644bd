"""Chunks shared out among threads: each element once, all of it done, failures heard."""

from __future__ import annotations

import threading

import pytest
import torch

from halfrank.numerics.threads import in_chunks


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_element_is_done_once(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for total in (0, 1, 7, 100, 1003):
        counts = [0] * total

        def count(start: int, stop: int, counts: list[int] = counts) -> None:
            assert 0 < stop - start <= 10
            for place in range(start, stop):
                counts[place] += 1

        in_chunks(count, total, 10)
        assert counts == [1] * total


def test_several_threads_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = threading.Barrier(2, timeout=30)  # broken, and raising, unless two are there at once
    in_chunks(lambda start, stop: together.wait() and None, 20, 10)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_one_raises_is_raised(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def fail(start: int, stop: int) -> None:
        if start == 30:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        in_chunks(fail, 50, 10)
