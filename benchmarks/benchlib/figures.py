# SPDX-License-Identifier: Apache-2.0
"""Medians, spread and ratios.

A figure is what one contender showed in each round; all contenders are measured in every round. A ratio is formed
within each round first, so that a machine that was slow for a while was slow for both sides of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of several rounds, and the quartiles as its spread."""

    median: float
    low: float
    high: float
    rounds: int

    def as_json(self) -> dict[str, float]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def figure(values: Sequence[float]) -> Figure:
    """Raises ValueError where there is nothing to take a median of."""
    if not values:
        raise ValueError("a figure of no rounds at all")
    if len(values) == 1:
        return Figure(values[0], values[0], values[0], 1)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(statistics.median(values), low, high, len(values))


def rounds(number: int) -> str:
    """1 round, 3 rounds."""
    return f"{number} round" if number == 1 else f"{number} rounds"


def ratio(values: Sequence[float], base: Sequence[float]) -> Figure:
    """Round by round values/base. Both sides must have been measured in the same rounds."""
    return figure([value / other for value, other in zip(values, base, strict=True)])
