"""What the C library and Python's collector do with freed memory, and what this process holds.

The C library is told something only where it is glibc on Linux.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # glibc's names in mallopt
MADV_POPULATE_WRITE = 23  # Linux's name in madvise
AT_ONCE = (2**16, 2**16)  # bytes from which a freed block goes back, and of free memory that lies above all others
REUSED = (2**24, 2**28)
SETTLED = 3  # rounds after which what is kept is about what one of them needs
GROWN = 1.2  # times what a round took then: more are holes that rows of other lengths have left
HOLES = 2**23  # bytes of holes that are never worth a round: all that one of a tiny model takes is less
TUNABLES, NO_THREAD_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
THREAD_CACHE = "HALFRANK_THREAD_CACHE"  # set by a process that was started anew, or by who does not want that
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's in front of it
KERNELS = 128  # about what one training step of new lengths asks for, 104 in a MiniLM with 16-bit products
LATE = 2**22  # objects: more than all imports make, few enough that a run's own are looked at some time
_usual: list[tuple[int, int, int]] = []  # the collector's thresholds as each who lets it wait has found them
_program = ExitStack()  # what ends when it need not wait for the program itself any more
_waiting = threading.Lock()


def restart_without_thread_cache() -> None:
    """Start this process anew, once, with a C library that keeps no freed small blocks for each thread.

    They stay where they lie, between large ones, and cut the room that a later, longer row needs: memory grows by
    holes, and giving these back costs time. glibc reads the setting when a process starts and never again, so a
    library that is imported cannot do this. Called by the program itself, before it has done anything. Returns where
    there is nothing to do: another C library, a setting of the user's own, a process that could not be repeated.
    """
    tunables = os.environ.get(TUNABLES, "")
    if THREAD_CACHE in os.environ or "tcache" in tunables or _glibc() is None or not _repeatable():
        return
    chosen = {TUNABLES: f"{tunables}:{NO_THREAD_CACHE}".removeprefix(":"), THREAD_CACHE: "0"}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | chosen)
    except OSError:  # where no program may be started, this one goes on as it is: only slower
        return


def collect_late() -> None:
    """Let Python's collector of reference cycles wait for `collect_as_usual`, which a loaded library has called.

    Importing torch and transformers makes a million objects that stay. To look through them for garbage, a dozen times
    while they become more, is a sixth of the time until a model is there. For the program itself, as it begins.
    """
    _program.enter_context(collecting_late())
    _program.callback(gc.freeze)


def collect_as_usual() -> None:
    """End what `collect_late` began; what exists now is never looked through again. Without it, nothing happens."""
    _program.close()


@contextmanager
def collecting_late() -> Iterator[None]:
    """Within it the collector waits: for imports in a process that is somebody else's, where nothing is frozen."""
    # Its thresholds, not whether it is on: that is left to whoever else wants to turn it on or off meanwhile.
    with _waiting:
        usual = gc.get_threshold()
        _usual.append(usual)
        if usual[0]:  # 0 keeps it off
            gc.set_threshold(LATE, *usual[1:])
    try:
        yield
    finally:
        with _waiting:
            first, _ = _usual[0], _usual.pop()
            if not _usual and gc.get_threshold()[0] == LATE:
                gc.set_threshold(*first)


def _repeatable() -> bool:
    """Whether what Python was called with, called again, is this process: no program that only contains a Python, no
    other one by the same name, nobody who is watching."""
    try:
        same = os.path.samefile(sys.executable, "/proc/self/exe")
    except OSError:
        return False
    return same and bool(sys.orig_argv) and sys.gettrace() is None and sys.getprofile() is None


def steady_allocator() -> None:
    """Let the C library give blocks back as soon as they are freed (Linux with glibc; elsewhere nothing).

    By default it keeps blocks of up to 32 MiB for later ones of other sizes, and a run's peak is a third higher than
    the tensors that it holds at once. Smaller ones share a heap with what lives long, such as the kernels compiled for
    each new length, and leave holes that no longer row fits into. Of these kernels 128 are kept instead of 1,024 in
    each of two caches, where none was made before. It lasts until `reusing_allocator` is called.
    """
    _set_allocator(AT_ONCE)


def reusing_allocator() -> None:
    """Let the C library keep freed blocks below 16 MiB for later ones.

    Memory that is given back comes again page by page, each cleared by the system: a third of a training step of a
    small model. The price is holes: glibc before 2.38 hardly reuses a block for another of the same size.
    """
    _set_allocator(REUSED)


def give_back() -> None:
    """Return what the C library keeps and nobody uses, holes included."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # glibc's, in order
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def free_in_heap() -> int | None:
    """Bytes that the C library keeps and nobody uses; None where it does not say."""
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):  # glibc before 2.33
        return None
    library.mallinfo2.restype = _Mallinfo2
    return int(library.mallinfo2().fordblks)


def bring_in(address: int, count: int) -> None:
    """Make memory that is about to be written the process's own, in one call instead of page by page.

    A page of a file that lies in memory is copied when it is first written to, and each time all cores have to hear of
    it: six times as long for a model's weights. Where the system cannot do it (Linux before 5.14), nothing changes.
    """
    if (library := _glibc()) is not None and count:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + count - start), MADV_POPULATE_WRITE)


class Kept:
    """Freed memory that is kept for the next round of like work, and given back once it has grown.

    The first round makes what stays. What rounds of other sizes leave are holes, and these grow with the work done.
    """

    def __init__(self) -> None:
        self._rounds = -1  # since memory was last given back
        self._base, self._settled = 0, 0.0  # bytes held just after that, and beyond it once rounds have settled
        self._usual = 0  # the largest round since then

    def after(self, size: int) -> None:
        """To be called after each round; `size`, its tokens for example, is in proportion to what it takes."""
        held = resident()
        if self._rounds < 0 and (unused := free_in_heap()) is not None:  # the next rounds go on with what this one had
            self._rounds, self._base = 0, max(held - unused, 0)
            return
        if self._rounds < 0 or (self._rounds >= SETTLED and held > self._base + self._allowed(size)):
            give_back()
            self._rounds, self._base, self._usual = 0, resident(), 0
            return
        self._rounds += 1
        if self._rounds <= SETTLED:
            self._usual, self._settled = max(self._usual, size), held - self._base

    def _allowed(self, size: int) -> float:
        """What a round took when it had settled, and some holes; a round larger than all since takes its share more."""
        if size > self._usual:
            self._settled *= size / self._usual
            self._usual = size
        return max(GROWN * self._settled, self._settled + HOLES)


@contextmanager
def keeping(progress: Callable[[int], None] | None = None) -> Iterator[Callable[[int], None]]:
    """Within it freed memory is kept for the next forward pass; what it gives is called after each, for `progress`."""
    reusing_allocator()
    kept = Kept()

    def passed(count: int) -> None:
        kept.after(1)  # all passes but a few last ones are of one size
        if progress is not None:
            progress(count)

    try:
        yield passed
    finally:
        give_back()


def _set_allocator(thresholds: tuple[int, int]) -> None:
    for cache in KERNEL_CACHES:
        os.environ.setdefault(cache, str(KERNELS))
    if (library := _glibc()) is not None:
        for option, value in zip((M_MMAP_THRESHOLD, M_TRIM_THRESHOLD), thresholds, strict=True):
            library.mallopt(option, value)


def _glibc() -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(size_of_process("VmRSS") or 0)


def peak_resident() -> int:
    """The most that this process has held at one time."""
    return int(size_of_process("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def size_of_process(name: str) -> int | None:
    """A size of /proc/self/status in bytes; None where the system has no such file."""
    return listed_size(Path("/proc/self/status"), name)


def listed_size(path: Path, name: str) -> int | None:
    """A size in bytes from a file that lists them in kB; None without the file or the name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
