"""`halfrank` and `python -m halfrank`: the command line, in a process whose memory suits it."""

from __future__ import annotations

from halfrank.allocator import restart_without_thread_cache


def start() -> None:
    """What the installed command calls."""
    restart_without_thread_cache()
    from halfrank.cli import main  # not before: a process that is replaced reads no more than it must

    main()


if __name__ == "__main__":
    start()
