"""`halfrank` and `python -m halfrank`: the command line, in a process whose memory suits it."""

from __future__ import annotations

import sys
from pathlib import Path

from halfrank.allocator import collect_late, restart_without_thread_cache


def start() -> None:
    """What the installed command calls; called by another program, it leaves that program's process alone."""
    if _is_the_program():
        restart_without_thread_cache()
        collect_late()
    from halfrank.cli import main  # not before: a process that is replaced reads no more than it must

    main()


def _is_the_program() -> bool:
    program = sys.modules["__main__"]
    if (spec := getattr(program, "__spec__", None)) is not None:  # of python -m
        return bool(spec.name == "halfrank.__main__")
    place = Path(getattr(program, "__file__", None) or "")
    return place.name == "halfrank" and place.is_file()


if __name__ == "__main__":
    start()
