# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG, written by hand: one file for light and dark, text that is text, no library.

    lines   a figure over the number of streams, both logarithmic
    bars    one figure of each contender, logarithmic where they are far apart

Colours are classes; the reader's preference chooses between the two sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LIGHT = ("#cf222e", "#8250df", "#bc4c00", "#1a7f37", "#bf3989", "#57606a", "#0969da", "#0a7ea4")
DARK = ("#ff7b72", "#bc8cff", "#f0883e", "#3fb950", "#f778ba", "#9ea7b3", "#58a6ff", "#39c5cf")
GREY, BLUE = 5, 6
"""Of these; bars need no more."""

WIDTH = 860


@dataclass(frozen=True, slots=True)
class Line:
    """A contender: x, and y or None where there was no answer. ``strong`` is drawn thicker."""

    title: str
    points: tuple[tuple[float, float | None], ...]
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A contender's figure with its quartiles."""

    title: str
    value: float
    low: float
    high: float
    strong: bool = False


def _style() -> str:
    def classes(colours: Sequence[str]) -> str:
        return " ".join(f".c{i} {{ stroke: {colour} }} .f{i} {{ fill: {colour} }}" for i, colour in enumerate(colours))

    return (
        "<style>.text { fill: #1f2328 } .soft { fill: #57606a; font-size: 12px } .grid { stroke: #d0d7de } "
        f".band {{ fill: #ffebe9 }} .back {{ fill: #ffffff }} .none {{ fill: none }} {classes(LIGHT)}\n"
        "@media (prefers-color-scheme: dark) { .text { fill: #e6edf3 } .soft { fill: #9ea7b3 } "
        f".grid {{ stroke: #30363d }} .band {{ fill: #3d1d20 }} .back {{ fill: #0d1117 }} {classes(DARK)} }}</style>"
    )


def frame(height: float, title: str, description: str, body: list[str]) -> str:
    """A whole file around shapes that use the classes text, soft, grid, none, c0… (strokes) and f0… (fills)."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        'aria-labelledby="t d" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<title id="t">{escape(title)}</title>\n'
        f'<desc id="d">{escape(description)}</desc>\n{_style()}\n'
        f'<rect class="back" width="{WIDTH}" height="{height:.0f}" rx="8"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "soft", anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten around both."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def short(value: float) -> str:
    """A figure for an axis or a bar: 8,000, 57, 1.5, 0.02."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _apart(wanted: list[float], gap: float, top: float, bottom: float) -> list[float]:
    """Positions near the wanted ones with at least a gap between them; in the order given."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    at = top - gap
    for i in order:
        at = places[i] = max(wanted[i], at + gap)
    # What was pushed below the bottom goes up again.
    at = bottom + gap
    for i in reversed(order):
        at = places[i] = min(places[i], at - gap)
    return places


def lines(title: str, subtitle: str, x_label: str, series: list[Line]) -> str:
    """y above all that was answered is a band for who did not answer."""
    left, right, top, bottom, band = 70.0, 620.0, 84.0, 400.0, 40.0
    xs = sorted({x for line in series for x, _ in line.points})
    ys = [y for line in series for _, y in line.points if y is not None]
    if not xs or not ys:
        raise ValueError("a chart without a single point")
    # Zero streams have a place of their own, left of one.
    positive = [x for x in xs if x > 0]
    low, high = math.log10(positive[0]) - 0.6, math.log10(positive[-1])
    marks = _decades(min(ys), max(ys))
    floor, ceiling = math.log10(marks[0]), math.log10(marks[-1])

    def place_x(x: float) -> float:
        at = low if x <= 0 else math.log10(x)
        return left + (at - low) / (high - low or 1) * (right - left)

    def place_y(y: float) -> float:
        return bottom - (math.log10(y) - floor) / (ceiling - floor or 1) * (bottom - top - band - 10)

    body = [_text(20, 32, title, "text", bold=True), _text(20, 52, subtitle)]
    body.append(f'<rect class="band" x="{left}" y="{top}" width="{right - left}" height="{band}"/>')
    body.append(_text(left + 8, top + 24, "no answer"))
    for mark in marks:
        y = place_y(mark)
        body.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        body.append(_text(left - 8, y + 4, short(mark), anchor="end"))
    for x in xs:
        body.append(_text(place_x(x), bottom + 20, f"{x:,.0f}", anchor="middle"))
    body.append(_text((left + right) / 2, bottom + 42, x_label, anchor="middle"))
    ends: list[float] = []
    for number, line in enumerate(series):
        height = top + 8 + number * (band - 12) / max(1, len(series) - 1)
        spots = [(place_x(x), place_y(y) if y is not None else height) for x, y in line.points]
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(spots))
        colour = number % len(LIGHT)
        body.append(f'<path class="none c{colour}" stroke-width="{3.5 if line.strong else 1.8}" d="{path}"/>')
        for (x, y), (_, value) in zip(spots, line.points, strict=True):
            if value is not None:
                body.append(f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{4 if line.strong else 3}"/>')
        ends.append(spots[-1][1])
    for number, (line, y) in enumerate(zip(series, _apart(ends, 18, top + 6, bottom), strict=True)):
        colour = number % len(LIGHT)
        body.append(f'<path class="none c{colour}" d="M{right + 6} {ends[number]:.1f} L{right + 22} {y:.1f}"/>')
        body.append(_text(right + 28, y + 4, line.title, f"f{colour}", bold=line.strong))
    return frame(bottom + 58, title, subtitle, body)


def bars(title: str, subtitle: str, rows: list[Bar]) -> str:
    """Logarithmic where the largest is more than thirty times the smallest; the subtitle then says so."""
    if not rows:
        raise ValueError("a chart without a single bar")
    left, right, top, step = 230.0, 700.0, 74.0, 28.0
    smallest, largest = min(row.value for row in rows), max(row.high for row in rows)
    logarithmic = smallest > 0 and largest / smallest > 30
    start = math.log10(smallest) - 0.5 if logarithmic else 0.0

    def place(value: float) -> float:
        if not logarithmic:
            return left + value / largest * (right - left)
        return left + max(0.0, math.log10(value) - start) / (math.log10(largest) - start) * (right - left)

    note = f"{subtitle} (logarithmic)" if logarithmic else subtitle
    body = [_text(20, 32, title, "text", bold=True), _text(20, 52, note)]
    for number, row in enumerate(rows):
        y, colour = top + number * step, BLUE if row.strong else GREY
        body.append(_text(left - 10, y + 14, row.title, "text", "end", row.strong))
        width = max(1.0, place(row.value) - left)
        body.append(f'<rect class="f{colour}" x="{left}" y="{y}" width="{width:.1f}" height="18" rx="2"/>')
        if row.high > row.low > 0:
            from_x, to_x, middle = place(row.low), place(row.high), y + 9
            body.append(f'<path class="grid none" stroke-width="2" d="M{from_x:.1f} {middle} L{to_x:.1f} {middle}"/>')
        body.append(_text(place(max(row.value, row.high)) + 8, y + 14, short(row.value), "text"))
    return frame(top + len(rows) * step + 16, title, note, body)
