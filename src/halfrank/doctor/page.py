"""Self-contained HTML pages: tables, a heat map and curves as plain SVG. No script, no request to any host.

Readable on a phone, in the dark and on paper; everything that is drawn is also said in a title or a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from halfrank.doctor.report import Examination, ModuleRow

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #5d6b7a; --line: #d8dee6; --field: #f4f6f9;
  --fix: #b3261e; --warn: #8a5a00; --note: #2a5db0; --fine: #1d6b3a; --curve: #2a5db0; --curve2: #b0562a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --paper: #14181e; --soft: #9aa7b5; --line: #323b47;
  --field: #1d232b; --fix: #ff8a80; --warn: #f0c060; --note: #8ab4ff; --fine: #7fd6a0; --curve: #8ab4ff;
  --curve2: #ffb088; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0; } p { margin: .5rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.checks { list-style: none; padding: 0; }
ul.checks li { border-left: 4px solid var(--level); padding: .1rem .8rem; margin: .6rem 0; }
.fix { --level: var(--fix); } .warn { --level: var(--warn); } .note { --level: var(--note); }
.fine { --level: var(--fine); } ul.checks b { color: var(--level); }
svg { display: block; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg.plot text { font-size: 13px; }
svg text.dim { fill: var(--soft); } svg .axis { stroke: var(--line); } svg .curve { fill: none; stroke-width: 1.6; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; background: var(--field); border-radius: 6px; break-inside: avoid; }
figure svg { width: 100%; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .wide { overflow: visible; }
  svg { max-width: 100%; } h2 { break-after: avoid; } }
""".strip()


@dataclass(frozen=True)
class Curve:
    """A line of points (step, value); values that are not finite are left out and counted."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: float
    text: str
    level: str = "note"  # "fix", "warn", "note" or "fine"


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The browser would else ask the host that the file came from for an icon.
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def doctor_page(report: Examination) -> str:
    """The doctor's page: what to change, the model, heat maps, tables."""
    sections = [
        f"<p>{'Nothing must be fixed.' if report.sound else 'Something must be fixed before training.'}</p>",
        section("What to change, worst first", checks(report)),
        section("The model", facts(report.facts)),
    ]
    rows = report.modules
    for name, field, unit, low, high in (
        ("Headroom in float16", "headroom_float16", "bits", 0.0, 12.0),
        ("Headroom in bfloat16", "headroom_bfloat16", "bits", 0.0, 12.0),
        ("Kept of the gradients in float16 without a loss scale", "gradient_underflow", "share", 0.0, 1.0),
    ):
        sections.append(section(name, heat_map(rows, field, unit=unit, low=low, high=high)))
    if report.loss_scale:
        sections.append(section("Loss scale", facts(report.loss_scale)))
    if report.attention:
        columns = {"layer": "layer", "saturated": "queries on one token", "rounded_to_zero": "float16 rounds to 0"}
        sections.append(section("Attention", table([dict(row) for row in report.attention], columns)))
    updates = [{"optimizer": name, **values} for name, values in report.updates.items()]
    columns = {"optimizer": "AdamW", "moved": "weights moved by a step", "non_finite": "made non-finite"}
    sections.append(section("Updates", table(updates, columns)))
    if report.data:
        sections.append(section("The data", facts(report.data)))
    if report.memory:
        sections.append(section("Memory", facts(report.memory)))
    names = {"name": "module", "kind": "kind", "largest": "largest", "headroom_float16": "float16 bits left",
             "underflow_float16": "underflow", "gradient_largest": "largest gradient",
             "gradient_underflow": "gradient underflow", "gradient_underflow_scaled": "with loss scale"}  # fmt: skip
    sections.append(section("Every module", table([vars(row) for row in rows], names)))
    return page(f"halfrank doctor: {report.model}", sections)


def section(title: str, content: str) -> str:
    """A heading and what stands under it."""
    return f'<section>\n<h2>{escape(title)}</h2>\n<div class="wide">{content}</div>\n</section>'


def checks(report: Examination) -> str:
    """The list of checks."""
    items = [
        f'<li class="{check.level}"><b>{check.level}</b> {escape(check.topic)}: {escape(check.found)}'
        + (f"<br>{escape(check.change)}" if check.change else "")
        + "</li>"
        for check in report.worst_first
    ]
    return f'<ul class="checks">{"".join(items)}</ul>'


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(shown(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table with the given columns (key -> heading)."""
    head = "".join(f"<th>{escape(title)}</th>" for title in columns.values())
    body = "".join("<tr>" + "".join(_cell(row.get(key)) for key in columns) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def heat_map(rows: Sequence[ModuleRow], field: str, *, unit: str, low: float, high: float) -> str:
    """Modules by layers: a cell is red at `low` and blue at `high`; those outside the layers stand below.

    Of a share, what is kept is drawn: 1 minus the value.
    """
    layers = sorted({row.layer for row in rows if row.layer is not None})
    roles = list(dict.fromkeys(row.role for row in rows if row.layer is not None))
    outside = [row for row in rows if row.layer is None]
    side, left, top = 20, 210, 18
    cells: list[str] = []

    def cell(row: ModuleRow, x: int, y: int) -> None:
        value = getattr(row, field)
        if value is None:
            return
        good = 1 - value if unit == "share" else value
        text = f"{row.name}: {shown(value)} {unit}"
        cells.append(
            f'<rect class="cell" x="{x}" y="{y}" width="{side - 2}" height="{side - 2}" rx="2" '
            f'fill="{_color((good - low) / (high - low))}"><title>{escape(text)}</title></rect>'
        )
        if unit == "bits" and good < 0:  # not by colour alone
            cells.append(f'<text x="{x + 5}" y="{y + 13}" style="fill:#fff;font-weight:700">!</text>')

    for number, layer in enumerate(layers):
        cells.append(f'<text class="dim" x="{left + number * side + 3}" y="{top - 5}">{layer}</text>')
    for line, role in enumerate(roles):
        y = top + line * side
        cells.append(f'<text x="0" y="{y + 13}">{escape(_short(role))}</text>')
        for row in (row for row in rows if row.layer is not None and row.role == role):
            cell(row, left + layers.index(row.layer or 0) * side, y)
    for line, row in enumerate(outside, len(roles)):
        y = top + line * side + 6
        cells.append(f'<text class="dim" x="0" y="{y + 13}">{escape(_short(row.name))}</text>')
        cell(row, left, y)
    width, height = left + max(len(layers), 1) * side + 4, top + (len(roles) + len(outside)) * side + 10
    legend = "red: overflows or nearly (! is beyond), blue: room" if unit == "bits" else "red: lost, blue: kept"
    return (
        f'<svg class="heat" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="modules by layers">{"".join(cells)}</svg><p class="soft">{legend}; rows are modules, columns '
        "layers.</p>"
    )


def curves(
    title: str,
    lines: Sequence[Curve],
    marks: Sequence[Mark] = (),
    *,
    log: bool = False,
    span: tuple[float, float] | None = None,
) -> str:
    """A figure of lines over steps, with marks as vertical strokes; nothing where no line has a point.

    `span` is the first and the last step of the axis, so that several figures share one.
    """
    found_in = [(line, _finite(line.points, log)) for line in lines]
    kept = [(line, found) for line, found in found_in if found]
    points = [point for _, found in kept for point in found]
    if not points:
        return ""
    left, top, width, height = 62, 8, 404, 130
    steps = [*(step for step, _ in points), *(mark.step for mark in marks), *(span or ())]
    values = [math.log10(value) if log else value for _, value in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - max(abs(low) * 0.05, 0.5e-6), high + max(abs(high) * 0.05, 0.5e-6)

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * width

    def y(value: float) -> float:
        return top + (high - (math.log10(value) if log else value)) / (high - low) * height

    parts = [f'<line class="axis" x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}"/>']
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        at = top + (1 - share) * height
        parts.append(f'<line class="axis" x1="{left}" y1="{at:.1f}" x2="{left + width}" y2="{at:.1f}"/>')
        label = shown(10**value if log else value)
        parts.append(f'<text class="dim" x="{left - 4}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text class="dim" x="{x(step):.1f}" y="{top + height + 14}" text-anchor="{anchor}">{step:g}</text>'
        )
    for mark in marks:
        parts.append(
            f'<line x1="{x(mark.step):.1f}" y1="{top}" x2="{x(mark.step):.1f}" y2="{top + height}" '
            f'style="stroke:var(--{mark.level});stroke-dasharray:3 3"><title>step {mark.step:g}: '
            f"{escape(mark.text)}</title></line>"
        )
    for number, (_, found) in enumerate(kept):
        color = "--curve" if number == 0 else "--curve2"
        path = " ".join(f"{'M' if i == 0 else 'L'}{x(s):.1f},{y(v):.1f}" for i, (s, v) in enumerate(found))
        dot = f'<circle cx="{x(found[0][0]):.1f}" cy="{y(found[0][1]):.1f}" r="2.5" style="fill:var({color})"/>'
        parts.append(f'<path class="curve" d="{path}" style="stroke:var({color})"/>' + (dot if len(found) == 1 else ""))
    missing = [(line.name, len(line.points) - len(found)) for line, found in found_in]
    names = [name + (f" ({lost} points are not finite)" if lost else "") for name, lost in missing]
    total = top + height + 20
    said = f'<p class="soft">{escape(", ".join(names))}</p>' if len(names) > 1 or names[0] != title else ""
    return (
        f'<figure><h3>{escape(title)}</h3><svg class="plot" viewBox="0 0 {left + width + 8} {total}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>{said}</figure>'
    )


def figures(drawn: Sequence[str]) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="grid">{"".join(drawn)}</div>'


def shown(value: Any) -> str:
    """A value in few characters."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value) or "none"
    return str(value)


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f'<td class="number">{escape(shown(value))}</td>' if number else f"<td>{escape(shown(value))}</td>"


def _finite(points: Sequence[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if math.isfinite(value) and (value > 0 or not log)]


def _color(share: float) -> str:
    """From red over a pale middle to blue; both ends tell themselves apart without seeing red or green."""
    share = min(max(share if math.isfinite(share) else float(share > 0), 0.0), 1.0)
    red, pale, blue = (178, 38, 30), (233, 196, 106), (42, 93, 176)
    start, end, part = (red, pale, share * 2) if share < 0.5 else (pale, blue, share * 2 - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(start, end, strict=True))


def _short(name: str) -> str:
    return name if len(name) <= 34 else "…" + name[-33:]
