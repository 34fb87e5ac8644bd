"""Compiled kernels on several threads: each ticket once, in a seat of its own, wherever the threads come from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("numba")

from llvmlite.binding import get_host_cpu_features

from halfrank.numerics import team
from halfrank.numerics.team import WORD, WORDS, Kernel, floats_at, whole_registers, words_at


@Kernel
def _count(address: int, ticket: int, seat: int) -> None:
    words = words_at(address, WORDS)
    words_at(words[0] + WORD * ticket, 1)[0] += 1
    words_at(words[1] + WORD * ticket, 1)[0] = seat


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_ticket_is_done_once(count: int, openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(count)
    if not openmp:
        monkeypatch.setattr(team, "_parallel", lambda: None)
    for tickets in (0, 1, 2, 7, 1000):
        done, seats = torch.zeros(1000, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
        _count(done.data_ptr(), seats.data_ptr(), tickets=tickets)
        assert done.tolist() == [1] * tickets + [0] * (1000 - tickets)
        assert 0 <= int(seats.min()) <= int(seats.max()) < count


@Kernel
def _double(address: int, ticket: int, seat: int) -> None:
    whole_registers()
    words = words_at(address, WORDS)
    numbers = floats_at(words[0], words[1])
    for j in range(words[1]):
        numbers[j] = numbers[j] + numbers[j]


@pytest.mark.skipif(not get_host_cpu_features().get("avx512f"), reason="this processor has no such registers")
def test_loops_use_the_widest_registers() -> None:
    numbers = torch.ones(100)
    _double(numbers.data_ptr(), 100, tickets=1)
    assert numbers.tolist() == [2.0] * 100
    assert "zmm" in _double._compiled._library.get_asm_str()


@pytest.mark.skipif(sys.platform != "linux", reason="torch is linked to GNU's OpenMP there")
def test_threads_are_those_of_torch() -> None:
    code = """
import sys, torch
from pathlib import Path
from halfrank.model.dropout import dropout
torch.set_num_threads(2)
count = lambda: len(list(Path("/proc/self/task").iterdir()))
x = torch.ones(1 << 22)
(x + 1).sum()
torch.set_num_threads(1)
dropout(x, 0.5)  # compiled, which may start a thread as well
torch.set_num_threads(2)
before = count()
dropout(x, 0.5)
print(count() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked there")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
import os, torch
from halfrank.model.dropout import drop_levels
torch.set_num_threads(2)
x = torch.ones(1 << 18)
wanted = drop_levels(x, 30000, (1, 2))
child = os.fork()
if child == 0:
    # No operation of torch's own here: its threads stayed with the parent.
    from halfrank.numerics.compiled_dropout import drop
    found = drop(x, (1, 2), 30000 - 32768, 65536 / 35536)
    os._exit(0 if found.numpy().tobytes() == wanted.numpy().tobytes() else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == 0
