"""What a run tells while it runs: `train.jsonl` for machines, one progress line for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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

    def drop(self) -> None:
        """Leave no file behind."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


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
        self._console = Console(stderr=True)
        self._bar = Progress(
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not shown,
        )
        self._width = self._console.width - 2 * len(str(total)) - 12  # the count, the time left and the gaps
        self._watched: dict[str, Any] = {}
        self._task = self._bar.add_task("train", total=total, completed=start, numbers="")

    def __enter__(self) -> Line:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: int, record: Mapping[str, Any]) -> None:
        """Move the bar to `step` and show its numbers; what is watched now and then stays until it is seen again."""
        self._watched |= {key: record[key] for key in WATCHED if key in record}
        self._bar.update(self._task, completed=step, numbers=numbers({**self._watched, **record}, self._width))


WATCHED = ("headroom_bits", "headroom_module", "underflow_share", "updates_lost", "clamped_weights")


def numbers(record: Mapping[str, Any], width: int) -> str:
    """What a step showed, in at most `width` characters: the least telling parts go first."""
    log_scale = math.log2(record["loss_scale"])
    parts = [
        (0, f"loss {record['loss']:.3f}"),
        (1, f"|g| {_brief(record['gradient_norm'])}"),
        (3, f"2^{log_scale:g}" if log_scale else ""),
        (2, f"skip {record['skipped']}" if record["skipped"] else ""),
        (4, f"room {record['headroom_bits']:.0f}" if "headroom_bits" in record else ""),
        (8, _short(record.get("headroom_module", ""))),
        (5, f"zero {record['underflow_share']:.0%}" if "underflow_share" in record else ""),
        (6, f"lost {record['updates_lost']:.0%}" if "updates_lost" in record else ""),
        (7, f"clamp {record['clamped_weights']}" if record.get("clamped_weights") else ""),
        (9, f"{record['tokens_per_second']:.0f} tok/s"),
    ]
    chosen = [(rank, text) for rank, text in parts if text]
    while len(" ".join(text for _, text in chosen)) > width and len(chosen) > 1:
        chosen.remove(max(chosen))
    return " ".join(text for _, text in chosen)


def _brief(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def _short(module: str) -> str:
    """A module's name from its layer's number on: bert.encoder.layer.3.output.dense is 3.output.dense."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), max(len(parts) - 2, 0))
    return ".".join(parts[number:])


def _json_safe(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value - value != 0.0 else value
