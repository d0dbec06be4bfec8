# SPDX-License-Identifier: Apache-2.0
"""How figures are written down: Markdown tables, medians with their spread, aims and whether they were met."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchlib.figures import Figure
from benchlib.tools import BenchmarkError


def spread(value: Figure, digits: int = 0) -> str:
    """The median and the quartiles: 12 (11-13)."""
    return f"{value.median:,.{digits}f} ({value.low:,.{digits}f}-{value.high:,.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(map(_line, lines)) + "\n"


@dataclass(frozen=True, slots=True)
class Aim:
    """What is promised, and what was measured. ``at_least``: the limit is one from below."""

    text: str
    limit: float
    value: Figure
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value.median >= self.limit if self.at_least else self.value.median <= self.limit

    @property
    def verdict(self) -> str:
        return "met" if self.met else "**missed**"

    def row(self, digits: int) -> list[str]:
        bound = f"{'≥' if self.at_least else '≤'} {self.limit:,g}"
        return [self.text, bound, spread(self.value, digits), self.verdict]


def aims_table(aims: Iterable[Aim], digits: Callable[[Aim], int], first: str = "aim") -> str:
    """What is promised and what was measured; ``digits`` says how many there are behind a value's point."""
    rows = [aim.row(digits(aim)) for aim in aims]
    return "\n".join([f"| {first} | limit | measured | |", "|---|---:|---:|---|", *map(_line, rows)]) + "\n"


def filled(template: Path, found: Mapping[str, str], name: str) -> str:
    """The template's text with a run's figures for its {names}. Raises BenchmarkError for names that have none."""
    text = template.read_text()
    unknown = sorted(set(re.findall(r"\{(\w+)\}", text)) - set(found))
    if unknown:
        raise BenchmarkError(f"{template.name}: the run '{name}' has no figure for {', '.join(unknown)}")
    text = re.sub(r"\{(\w+)\}", lambda match: found[match[1]], text)
    # Where a figure is a paragraph, and a run has none.
    return re.sub(r"\n{3,}", "\n\n", text)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
