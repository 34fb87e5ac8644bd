"""What a run tells: `train.jsonl` for machines, one progress line while it runs, `report.html` afterwards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from halfrank.certify.certificate import read as read_certificate
from halfrank.doctor import page
from halfrank.errors import DataError, SaveError


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


PAGE, QUARANTINE = "report.html", "quarantine.jsonl"
SHOWN_TEXT = 120  # letters of a query or document
SHOWN_PAIRS = 200  # enough to see what is wrong with a file; all of them are in quarantine.jsonl
PAIR_COLUMNS = {
    "place": "file and line",
    "reason": "why",
    "label": "label",
    "query": "query",
    "document": "document",
    "step": "step",
}
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (  # title, fields of train.jsonl, logarithmic
    ("loss", ("loss",), False),
    ("gradient norm", ("gradient_norm",), True),
    ("loss scale", ("loss_scale",), True),
    ("headroom in bits", ("headroom_bits", "gradient_headroom_bits"), False),
    ("share of gradients that underflow", ("underflow_share",), False),
    ("share of updates lost", ("updates_lost", "weights_in_residual_only"), False),
    ("learning rate", ("lr",), False),
    ("tokens per second", ("tokens_per_second",), False),
)


def write_report(folder: Path) -> Path:
    """Draw `train.jsonl` of a run's folder as one self-contained page beside it; the page's place.

    Raises DataError where there is no journal, or none that can be read.
    """
    records = read_journal(folder / "train.jsonl")
    steps = [record for record in records if "event" not in record]
    marks = [mark for record in records if (mark := _mark(record)) is not None]
    start = next((record for record in records if record.get("event") == "start"), {})
    end = [record for record in records if record.get("event") in ("end", "stopped")][-1:]
    span = (1.0, max([1.0, *(_number(record.get("step")) for record in records if "step" in record)]))
    drawn = [
        page.curves(
            title, [_curve(steps, name) for name in names if any(name in s for s in steps)], marks, log=log, span=span
        )
        for title, names, log in PANELS
        if any(name in record for record in steps for name in names)
    ]
    drawn += _evaluations(records, marks, span)
    certificate = read_certificate(folder)
    sections = [
        page.section("Curves", page.figures([figure for figure in drawn if figure])),
        page.section("What happened", _happened(marks)),
    ]
    if pairs := _pairs(folder / QUARANTINE):
        sections.append(page.section("Pairs left out, or that the run stopped at", pairs))
    if certificate is not None:
        sections.append(page.section("Certificate", page.facts({"verdict": certificate.line()})))
    if end:
        sections.append(page.section("The run", page.facts({k: v for k, v in end[0].items() if k != "event"})))
    memory = {name: value for record in (start, *end) for name, value in record.items() if "memory" in name}
    if memory:
        sections.append(page.section("Memory, planned and measured", page.facts(memory)))
    sections.append(
        page.section("Settings", page.facts({k: v for k, v in start.items() if k not in ("event", "step")}))
    )
    target = folder / PAGE
    _replace(target, page.page(f"halfrank run: {folder.absolute().name}", sections))
    return target


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a journal; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        raise DataError(f"'{path}' does not exist: give the folder that `halfrank train --out` wrote.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: not JSON ({error.msg}). The journal is damaged there.") from error
        if isinstance(record, dict):
            records.append(record)
    if not records:
        raise DataError(f"'{path}' holds no records: the run has not begun.")
    return records


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> page.Curve:
    points = [(_number(r.get("step")), _number(r[name])) for r in records if r.get(name) is not None]
    return page.Curve(name.replace("_", " "), [point for point in points if not math.isnan(point[0])])


def _evaluations(
    records: Sequence[Mapping[str, Any]], marks: Sequence[page.Mark], span: tuple[float, float]
) -> list[str]:
    found = [record for record in records if record.get("event") == "evaluation"]
    names = [name for name in (found[0] if found else {}) if name not in ("event", "step", "score")]
    return [page.curves(name, [_curve(found, name)], marks, span=span) for name in names]


def _mark(record: Mapping[str, Any]) -> page.Mark | None:
    """What an event draws on the time axis; steps, evaluations and the frame of the run draw none."""
    event = record.get("event")
    if event in (None, "start", "end", "evaluation"):
        return None
    step = _number(record.get("step"))
    if math.isnan(step):
        return None
    if event == "certificate":
        return page.Mark(step, str(record.get("text", "")), "fine" if record.get("passed") else "fix")
    if event == "finding":
        return page.Mark(step, f"{record['finding']['why']}. Remedy: {record['finding']['remedy']}", "fix")
    what = record.get("rung") or event
    text = f"{what}: {record['reason']}" if record.get("reason") else str(what)
    return page.Mark(step, text, "fix" if what in ("stop", "rollback") else "warn")


def _happened(marks: Sequence[page.Mark]) -> str:
    if not marks:
        return "<p>Nothing but steps.</p>"
    return page.table([{"step": mark.step, "what": mark.text} for mark in marks], {"step": "step", "what": "what"})


def _pairs(path: Path) -> str:
    """The pairs of a quarantine file as a table; nothing where there are none."""
    records = read_journal(path) if path.is_file() and path.stat().st_size else []
    if not records:
        return ""
    rows = [{**record, **{name: _cut(record.get(name)) for name in ("query", "document")}} for record in records]
    more = f"<p>And {len(rows) - SHOWN_PAIRS} more, in {QUARANTINE}.</p>" if len(rows) > SHOWN_PAIRS else ""
    return page.table(rows[:SHOWN_PAIRS], PAIR_COLUMNS) + more


def _cut(text: Any) -> str:
    shown = str(text or "")
    return shown if len(shown) <= SHOWN_TEXT else shown[: SHOWN_TEXT - 1] + "…"


def _number(value: Any) -> float:
    """A number of the journal, where those that are not finite stand as strings."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _replace(target: Path, text: str) -> None:
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        raise SaveError(f"Cannot write to '{target}': {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def _json_safe(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value - value != 0.0 else value
