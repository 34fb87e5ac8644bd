"""What a run tells while it runs: `train.jsonl` for machines, one progress line for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Journal:
    """Appends one JSON object a line; a resumed run first drops what came after its checkpoint."""

    def __init__(self, path: Path | None, *, kept: int = 0) -> None:
        self.lines = kept
        self._path = path
        if path is None or not path.exists():
            return
        if not kept:
            path.unlink()
            return
        with path.open("r+b") as handle:  # cut in place: a kill meanwhile loses nothing that the checkpoint counts
            for _ in range(kept):
                handle.readline()
            handle.truncate(handle.tell())

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`; numbers that are not finite are written as strings, which JSON can hold."""
        self.lines += 1
        if self._path is not None:
            line = json.dumps({key: _json_safe(value) for key, value in record.items()}, default=str)
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while the block runs; call what it gives with the number finished since the last call."""
    # rich would send what is printed meanwhile to the bar's terminal, and `> scores.jsonl` would stay empty.
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


class Line:
    """The progress line of a run on standard error; silent when not wanted."""

    def __init__(self, total: int, start: int, *, shown: bool) -> None:
        self._bar = Progress(
            BarColumn(8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, numbers="")

    def __enter__(self) -> Line:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: int, record: Mapping[str, Any]) -> None:
        """Move the bar to `step` and show loss, gradient norm, loss scale and speed."""
        numbers = (  # with the bar and the time left within 80 columns
            f"loss {record['loss']:.4f} |g| {record['gradient_norm']:.2g} scale {record['loss_scale']:g}"
            f" {record['tokens_per_second']:.0f} tok/s"
        )
        if record["skipped"]:
            numbers += f" skipped {record['skipped']}"
        self._bar.update(self._task, completed=step, numbers=numbers)


def _json_safe(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value - value != 0.0 else value
