"""The command starts its process anew, once, without the C library's caches of each thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAYS = """
import json, os, sys
from halfrank.allocator import restart_without_thread_cache
print("began", os.getpid(), file=sys.stderr, flush=True)
BEFORE
restart_without_thread_cache()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.optimize, os.getpid(), sys.stdin.read()]))
"""
SETTINGS = ("GLIBC_TUNABLES", "HALFRANK_THREAD_CACHE")
NO_CACHE = "glibc.malloc.tcache_count=0"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")


def started(*, before: str = "", **environment: str) -> tuple[list[str], list[object]]:
    """How often the process began, by what number, and what it says of itself in the end."""
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    words = [sys.executable, "-O", "-c", SAYS.replace("BEFORE", before), "--query", "two words", "ü"]
    done = subprocess.run(
        words, env=kept | environment, input="asked", capture_output=True, text=True, check=True, timeout=60
    )
    return done.stderr.split("\n")[:-1], json.loads(done.stdout)


def test_a_process_is_started_anew_once_and_loses_nothing() -> None:
    began, (tunables, words, optimize, number, read) = started()
    assert tunables == NO_CACHE
    assert (words, optimize, read) == (["--query", "two words", "ü"], 1, "asked")
    assert began == [f"began {number}"] * 2  # whoever waits for it or stops it, meets the same process


def test_what_else_is_tuned_stays() -> None:
    began, (tunables, *_) = started(GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert (len(began), tunables) == (2, f"glibc.malloc.arena_max=2:{NO_CACHE}")


@pytest.mark.parametrize(
    "chosen", [{"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, {"HALFRANK_THREAD_CACHE": "keep"}]
)
def test_a_choice_of_the_users_own_stays(chosen: dict[str, str]) -> None:
    began, (tunables, *_) = started(**chosen)
    assert (len(began), tunables) == (1, chosen.get("GLIBC_TUNABLES"))


@pytest.mark.parametrize("watching", ["sys.settrace", "sys.setprofile"])
def test_a_process_that_is_watched_goes_on(watching: str) -> None:
    began, (tunables, *_) = started(before=f"{watching}(lambda *_: None)")
    assert (len(began), tunables) == (1, None)


def test_another_program_is_not_called_by_its_name() -> None:
    began, (tunables, *_) = started(before="sys.executable = '/bin/ls'")
    assert (len(began), tunables) == (1, None)


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (["-m", "halfrank"], 2),
        ([str(Path(sys.executable).with_name("halfrank"))], 2),
        (["-c", "from halfrank.__main__ import start; start()"], 1),
        (["-c", "import runpy; runpy.run_module('halfrank', run_name='__main__')"], 1),
    ],
)
def test_only_the_command_itself_is_started_anew(words: list[str], times: int, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; print('began', file=sys.stderr)")
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words, "--help"], env=kept, capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["began"] * times
    assert done.stdout.startswith("Usage: halfrank ")


def test_without_the_cache_freed_blocks_leave_no_islands() -> None:
    """The setting does what it is there for: small blocks that were freed cut no large one from its neighbour."""
    code = """
import ctypes
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.mallopt(-3, 1 << 25), c.mallopt(-1, 1 << 28)
gaps = [c.malloc(1000) for _ in range(2000)]  # that were there before are filled
large, small = [], []
for _ in range(7):  # as many as a thread keeps of one size
    large.append(c.malloc(1 << 20)), small.append(c.malloc(1000))
assert small[0] > large[0]
end = c.malloc(1 << 20)
for block in small + large:
    c.free(block)
print(c.malloc(7 << 20) < end)  # in their place, not above it
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"GLIBC_TUNABLES": tunables}, capture_output=True, text=True,
            check=True,
        ).stdout.strip()
        for tunables in (NO_CACHE, "glibc.malloc.tcache_count=7")
    ]  # fmt: skip
    assert said == ["True", "False"]


def measured(code: str) -> list[int]:
    """What a process of its own prints, which holds no memory but that of `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return [int(word) for word in done.stdout.split()]


def test_what_nobody_uses_is_known_and_what_is_used_is_not_counted() -> None:
    before, held, freed = measured("""
import torch
from halfrank.allocator import free_in_heap, reusing_allocator
reusing_allocator()
print(free_in_heap())
blocks = [torch.ones(1 << 20) for _ in range(8)]
print(free_in_heap())
del blocks
print(free_in_heap())
""")
    assert held - before < 2**20
    assert abs(freed - held - 8 * 2**22) < 2**20


def test_pages_of_a_file_that_are_brought_in_are_written_to_without_a_fault(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\0" * (1 << 22))
    alone, brought, same = measured(f"""
import ctypes, resource, torch
from halfrank.allocator import bring_in
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for wanted in (False, True):
    weights = torch.from_file({str(tmp_path / "weights")!r}, shared=False, size=1 << 20)
    weights.sum()
    if wanted:
        bring_in(weights.data_ptr() + 40, weights.nbytes - 40)
    before = faults()
    weights.add_(1)
    print(faults() - before)
print(int(weights.eq(1).all()))
""")
    assert same
    assert (tmp_path / "weights").read_bytes() == b"\0" * (1 << 22)  # the file is nobody's to write to
    if brought * 10 >= alone:
        pytest.skip(f"this system cannot bring pages in ({brought} and {alone} faults)")


AT_THE_END = """
import atexit, gc, json
usual = gc.get_threshold()[0]
atexit.register(lambda: print(json.dumps([gc.isenabled(), gc.get_threshold()[0] / usual, gc.get_freeze_count() > 0])))
"""
OURS = "from halfrank.allocator import *; "
NOWHERE = ["rank", "query", "--documents", __file__, "--model", "/nowhere"]


@pytest.mark.parametrize(
    ("words", "collects", "late", "frozen"),
    [
        (["-c", "from halfrank import CrossEncoder"], True, False, False),
        (["-c", "from halfrank.model import folder; folder.LoadOptions()"], True, False, False),
        (["-c", "import gc; gc.disable(); from halfrank import AdamW"], False, False, False),
        (["-c", f"{OURS} collect_late(); collect_late()"], True, True, False),
        (["-c", f"{OURS} collect_late(); collect_late(); collect_as_usual()"], True, False, True),
        (["-c", f"{OURS} collect_late(); gc.disable(); collect_as_usual()"], False, False, True),
        (["-c", f"{OURS} collect_late()\nwith collecting_late(): collect_as_usual()"], True, False, True),
        (["-c", f"{OURS}\nwith collecting_late(): gc.disable()"], False, False, False),
        # The program, which waits until it reads a model, whatever comes of that.
        (["-m", "halfrank", "--help"], True, True, False),
        (["-m", "halfrank", *NOWHERE], True, False, True),
    ],
)
def test_the_collector_waits_for_imports_alone(
    words: list[str], collects: bool, late: bool, frozen: bool, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_THE_END)
    own = {"HALFRANK_THREAD_CACHE": "keep", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, *words], env=os.environ | own, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found[0], found[1] > 1000, found[2]] == [collects, late, frozen], done.stderr
    assert found[1] == 1 or late


def test_threads_that_wait_at_once_leave_the_collector_as_it_was() -> None:
    script = """
import gc, sys, threading
from halfrank.allocator import collecting_late
sys.setswitchinterval(1e-6)
usual = gc.get_threshold()
def wait():
    for _ in range(2000):
        with collecting_late():
            pass
threads = [threading.Thread(target=wait) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(gc.isenabled(), gc.get_threshold() == usual)
import halfrank
halfrank.InputExample, halfrank.InputExample
print("InputExample" in vars(halfrank))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True", "True"], done.stderr
