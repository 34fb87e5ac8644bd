"""What a thread makes in advance comes in order, its errors too, and it ends with the block that reads it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from halfrank.data.ahead import ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "halfrank-ahead"]


def endless(made: list[int]) -> Iterator[int]:
    while True:
        made.append(len(made))
        yield made[-1]


@pytest.mark.parametrize("depth", [1, 3])
def test_items_come_in_order_and_the_thread_ends(depth: int) -> None:
    with ahead(range(500), depth=depth) as items:
        assert list(items) == list(range(500))
    assert not threads()


def test_it_is_ahead_and_not_further() -> None:
    made: list[int] = []
    with ahead(endless(made), depth=2) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:  # one in use, two that wait, one in the thread's hand
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == 4
    assert not threads()


def test_an_error_comes_in_its_place() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    seen: list[int] = []
    with ahead(failing(), depth=5) as items, pytest.raises(ValueError, match="third") as caught:
        seen.extend(items)
    assert seen == [1, 2]
    assert "failing" in [entry.name for entry in caught.traceback]
    assert not threads()


@pytest.mark.parametrize("taken", [0, 1, 2, 7])
def test_a_reader_that_leaves_takes_the_thread_along(taken: int) -> None:
    made: list[int] = []
    with ahead(endless(made)) as items:
        assert [next(items) for _ in range(taken)] == list(range(taken))
    assert not threads()
    assert len(made) <= taken + 3


def test_ctrl_c_ends_a_reader_that_waits() -> None:
    def slow() -> Iterator[int]:
        yield 1
        threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)).start()
        time.sleep(0.3)
        yield 2

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), ahead(slow()) as items:
            list(items)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not threads()
