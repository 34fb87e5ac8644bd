"""The next items are made while the present one is used.

A background thread runs an iterator ahead of its reader. Tokenizers, numpy and torch release the interpreter's lock in
their long calls, so the thread works while the reader computes, and nothing depends on how far ahead it is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Made(Generic[Item]):
    """What the thread hands over: some items, and after the last one the error that ended them, if any."""

    items: tuple[Item, ...] = ()
    error: BaseException | None = None


@contextmanager
def ahead(items: Iterable[Item], *, depth: int = 1) -> Iterator[Iterator[Item]]:
    """Iterate over `items` in order while a thread makes up to `depth` of them, and one more, in advance.

    What `items` raises is raised in its place, after all that came before. The thread ends with the block, whatever
    ends that: an item in the making is finished and dropped.
    """
    waiting: queue.Queue[_Made[Item]] = queue.Queue(depth)
    left = threading.Event()

    def work() -> None:
        last: _Made[Item] = _Made()
        try:
            for item in items:
                if left.is_set():
                    return
                waiting.put(_Made((item,)))
        except BaseException as error:  # raised again by the reader, whatever it is
            last = _Made(error=error)
        if not left.is_set():
            waiting.put(last)

    def read() -> Iterator[Item]:
        while (made := waiting.get()).items:
            yield from made.items
        if made.error is not None:
            raise made.error

    thread = threading.Thread(target=work, name="halfrank-ahead", daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        left.set()
        while not waiting.empty():  # room for the one that may be on its way in: then the thread sees that all left
            waiting.get()
        thread.join()
