"""Compiled kernels on the threads that torch's own operations have just left. Importing it needs the extra `[fast]`.

Between two operations torch's threads spin, ready for the next one; threads of our own would have to push them off
their cores first. So a kernel runs where they are, by the OpenMP library that torch is linked to, and in threads of a
pool where that cannot be found (macOS, Windows) or no longer works (a forked process). Whoever is free takes the next
ticket, so no result depends on how many take part, or when.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from halfrank.numerics.threads import in_chunks

WORDS = 32  # that a kernel has at most
JOB, TICKET, TICKETS, SEAT, GIVEN = 0, 1, 2, 3, 4  # its address, the next ticket, how many, the next seat, a call's own
WORD, FLOAT, HALF = 8, 4, 2  # bytes
WIDEST = '"prefer-vector-width"="512"'
_process = os.getpid()


@intrinsic
def _taken(context: Any, address: Any) -> Any:
    """The int64 at an address, and 1 more in its place, as one step that no other thread can come between."""

    def code(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = builder.inttoptr(given[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), code


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def code(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], target.get_value_type(signature.return_type))

    return types.voidptr(types.int64), code


@intrinsic
def _called(context: Any, function: Any, words: Any, ticket: Any, seat: Any) -> Any:
    """Call the compiled job at an address."""

    def code(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), given[1:])
        return target.get_dummy_value()

    return types.void(*[types.int64] * 4), code


@intrinsic
def whole_registers(context: Any) -> Any:
    """Said in a function whose loops are to be made of the processor's widest vectors.

    LLVM makes them half as wide where AVX-512 may slow a processor down; by then torch's products have done so already.
    """

    def code(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        set.add(builder.function.attributes, WIDEST)  # llvmlite knows none that has a value
        return target.get_dummy_value()

    return types.void(), code


def _numbers_at(kind: Any) -> Any:
    """The function (address, count) whose array is so many numbers of a kind, where they lie."""

    def view(address: Any, count: Any) -> Any:
        return carray(_pointer(address), count, kind)

    return njit(inline="always")(view)


floats_at, words_at, halves_at = _numbers_at(np.float32), _numbers_at(np.int64), _numbers_at(np.uint16)
codes_at, levels_at = _numbers_at(np.int8), _numbers_at(np.uint8)


def compile_once(*kinds: Any, exact: bool = False) -> Callable[[Any], Any]:
    """Compile a function of `kinds` once, for Python and for other compiled functions, which call it where it lies.

    Numba would compile a copy into each of them otherwise. Unless it is `exact`, `a * b + c` is one step where the
    processor has that. Said either way: what it calls takes over what is said here, but not what is left out.
    """
    contracted = False if exact else {"contract"}

    def made(function: Any) -> Any:
        return cfunc(types.void(*kinds), nopython=True, error_model="numpy", fastmath=contracted)(function)

    return made


@cache
def _run() -> Any:
    """What each thread does."""

    def run(address: Any) -> None:
        words = words_at(address, WORDS)
        seat, tickets, ticket = _taken(address + WORD * SEAT), words[TICKETS], _taken(address + WORD * TICKET)
        while ticket < tickets:
            _called(words[JOB], address + WORD * GIVEN, ticket, seat)
            ticket = _taken(address + WORD * TICKET)

    return compile_once(types.int64)(run)


class Kernel:
    """`job(words, ticket, seat)` for every ticket from 0 to below a number, on as many threads as torch uses.

    `job` is compiled by numba, when it is first called; unless it is `exact`, as `compile_once` says. At the address
    `words` it finds the int64 that a call gives, among them the addresses of what it reads and writes. No two tickets
    may write to the same place; a thread keeps its seat, from 0 to below the number of threads, so that each may have
    room of its own.
    """

    def __init__(self, job: Any, *, exact: bool = True) -> None:
        self._job, self._exact = job, exact

    def __call__(self, *words: int, tickets: int) -> None:
        """Return when all is done; the caller keeps alive what the addresses among the words lead to."""
        given = np.zeros(WORDS, np.int64)
        given[JOB], given[TICKETS], given[GIVEN : GIVEN + len(words)] = self._compiled.address, tickets, words
        address, threads = given.ctypes.data, min(torch.get_num_threads(), tickets)
        parallel = _parallel() if threads > 1 and os.getpid() == _process else None
        if parallel is not None:
            parallel(_run().address, address, threads, 0)
        elif threads > 1:
            in_chunks(lambda start, stop: _run().ctypes(address), threads, 1)
        else:
            _run().ctypes(address)

    @property
    def compiled(self) -> bool:
        """Whether it has been called."""
        return "_compiled" in vars(self)

    @cached_property
    def _compiled(self) -> Any:
        return compile_once(types.int64, types.int64, types.int64, exact=self._exact)(self._job)


@cache
def _parallel() -> Any:
    """OpenMP's entry of the library that torch is linked to: (function, its argument, threads, flags)."""
    try:
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.restype, entry.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return entry
