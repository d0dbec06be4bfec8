# SPDX-License-Identifier: Apache-2.0
"""How benchmarks/run point writes down what it saw: tables, aims, charts. No measurement in here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchlib import plot
from benchlib.door import CONTENDERS, Contender
from benchlib.figures import Figure, figure, ratio, rounds
from benchlib.point import Settings
from benchlib.report import Aim, aims_table, spread, table

BOUND = ("mod_php", "php-fpm", "proxy")
"""Whose stream holds a worker."""

NO_FIGURE = (
    "\n*-*: where less than 99 % of the plain pages are answered their latency has no meaning, and what the events\n"
    "cost cannot be told from what the pages cost, which is what they cost without a stream. Pushpin's events are\n"
    "published by one clock for all streams: a stream's first event says nothing about when the others are due.\n"
    "Where none of the streams that were opened last began, there is no time to their first event.\n"
)

Cells = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
"""workers -> contender -> level -> what -> one value per round"""


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of several rounds' documents; machine and settings are the first one's, load averages all.

    Ratios are formed round by round, so a contender that could not be measured in one of them is left out of all."""
    cells: Cells = {}
    reasons: dict[str, list[str]] = {}
    for document in parts:
        for what, reason in document["missing"].items():
            reasons.setdefault(what, []).append(reason)
        for workers, contenders in document["samples"].items():
            for who, levels in contenders.items():
                for level, look in levels.items():
                    cell = cells.setdefault(workers, {}).setdefault(who, {}).setdefault(level, {})
                    for what, value in look.items():
                        cell.setdefault(what, []).append(value)
    missing: dict[str, str] = {}
    for what, told in reasons.items():
        who, _, workers = what.removesuffix(" workers").partition(", ")
        cells.get(workers, {}).pop(who, None)
        some = f"in {len(told)} of {rounds(len(parts))}, and so left out of all: " if len(told) < len(parts) else ""
        missing[what] = some + told[0]
    samples = {workers: contenders for workers, contenders in cells.items() if contenders}
    return {**parts[0], "rounds": len(parts), "samples": samples, "missing": missing}


@dataclass(frozen=True, slots=True)
class Reading:
    """Merged samples, asked by workers, contender, level and what."""

    cells: Cells

    def workers(self) -> list[str]:
        return sorted(self.cells, key=int)

    def levels(self, workers: str) -> list[str]:
        found = {level for who in self.cells[workers].values() for level in who if level != "short"}
        return sorted(found, key=int)

    def contenders(self, workers: str) -> list[Contender]:
        return [c for c in CONTENDERS if c.key in self.cells[workers]]

    def values(self, workers: str, who: str, level: str, what: str) -> list[float]:
        return self.cells.get(workers, {}).get(who, {}).get(level, {}).get(what, [])

    def of(self, workers: str, who: str, level: str, what: str) -> Figure | None:
        values = self.values(workers, who, level, what)
        return figure(values) if values else None

    def answers(self, workers: str, who: str, level: str) -> bool:
        """Whether the plain page came, for all but one in a hundred, in the median round."""
        answered = self.of(workers, who, level, "answered")
        return answered is not None and answered.median >= 0.99


def aims(document: dict[str, Any]) -> Iterator[Aim]:
    reading = Reading(document["samples"])
    for workers in reading.workers():
        top = reading.levels(workers)[-1]
        for who in ("handoff", "handoff-own"):
            now, idle = (reading.values(workers, who, level, "p99_ms") for level in (top, "0"))
            if now and len(now) == len(idle):
                text = f"plain page's p99 with {int(top):,} streams ({who}, {workers} workers), of its idle value"
                yield Aim(text, 1.5, ratio(now, idle))
        bound = [values for who in BOUND if (values := reading.values(workers, who, top, "answered"))]
        if bound:
            best = figure([max(values) for values in zip(*bound, strict=True)])
            yield Aim(f"plain pages still answered by the best worker-bound contender ({workers} workers)", 0.01, best)
        for who in ("mod_php", "php-fpm"):
            ours, theirs = (reading.values(workers, key, top, "pss_per_stream") for key in ("handoff", who))
            if ours and len(ours) == len(theirs):
                text = f"memory of all processes per live stream, of PHP streaming ({who}, {workers} workers)"
                yield Aim(text, 0.05, ratio(ours, theirs))
        live = reading.values(workers, "handoff", top, "live")
        if live:
            text = f"of {int(top):,} streams wanted, streams live (handoff, {workers} workers)"
            yield Aim(text, 0.999, figure([value / int(top) for value in live]), at_least=True)


def _cell(value: Figure | None, digits: int = 0, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    return spread(Figure(value.median * scale, value.low * scale, value.high * scale, value.rounds), digits)


def page_table(reading: Reading, workers: str) -> str:
    levels = reading.levels(workers)
    rows = []
    for contender in reading.contenders(workers):
        row = [contender.title]
        for level in levels:
            answered = reading.of(workers, contender.key, level, "answered")
            if answered is None:
                row.append("not asked")
            elif not reading.answers(workers, contender.key, level):
                row.append(f"**{answered.median:.0%} answered**")
            else:
                row.append(_cell(reading.of(workers, contender.key, level, "p99_ms"), 1))
        rows.append(row)
    return table(["plain page, p99 ms, with", *(f"{int(level):,}" for level in levels)], rows)


def top_table(reading: Reading, workers: str) -> str:
    top = reading.levels(workers)[-1]
    rows = []
    for contender in reading.contenders(workers):

        def of(what: str, digits: int = 0, scale: float = 1.0, who: str = contender.key) -> str:
            return _cell(reading.of(workers, who, top, what), digits, scale)

        answers = reading.answers(workers, contender.key, top)
        now, idle = (reading.values(workers, contender.key, level, "p99_ms") for level in (top, "0"))
        rows.append(
            [
                contender.title,
                of("live"),
                of("waiting"),
                of("failed"),
                of("first_p99_ms", 0),
                of("answered", 0, 100),
                of("p50_ms", 1) if answers else "-",
                of("p99_ms", 1) if answers else "-",
                spread(ratio(now, idle), 2) if answers and len(now) == len(idle) else "-",
                of("pss", 0, 1e-6),
                of("pss_per_stream", 1, 1e-3),
                of("cpu_s_per_million", 1),
                of("complete", 2, 100),
                of("late_p99_ms", 0),
            ]
        )
    head = [f"{int(top):,} streams wanted", "live", "not begun", "failed", "first event p99 ms", "pages answered, %",
            "page p50 ms", "p99 ms", "p99, of idle", "PSS, MB", "PSS per live stream, KB", "CPU s per million events",
            "events that came, %", "event late, p99 ms"]  # fmt: skip
    return table(head, rows)


def short_table(reading: Reading, workers: str, settings: Settings) -> str:
    rows = []
    for contender in reading.contenders(workers):
        wanted = reading.of(workers, contender.key, "short", "wanted")
        if wanted is None:
            continue
        done, lost = (reading.of(workers, contender.key, "short", what) for what in ("completed", "failed"))
        rows.append([contender.title, f"{wanted.median:,.0f}", _cell(done), _cell(lost)])
    within = f"complete, to [DONE], {settings.grace:g} s after the last was asked for"
    return table([f"{settings.tokens} events each", "asked for", within, "failed"], rows) if rows else ""


def generator_shares(reading: Reading) -> tuple[float, float]:
    """The largest of the clients' and of the prober's shares of one core."""
    looks = [look for who in reading.cells.values() for levels in who.values() for look in levels.values()]
    return tuple(
        max((figure(look[what]).median for look in looks if look.get(what)), default=0.0)
        for what in ("generator_share", "prober_share")
    )  # type: ignore[return-value]  # mypy does not count a generator's elements


def report(document: dict[str, Any]) -> str:
    reading, settings = Reading(document["samples"]), document["settings"]
    clients, prober = generator_shares(reading)
    text = (
        "## The point: streams held open, and the plain page meanwhile\n\n"
        f"Medians of {rounds(document['rounds'])}, quartiles in brackets. Streams with one event per second are opened "
        f"at {settings['rate']:g} per\nsecond and stay; a plain PHP page is asked for {settings['probes']:g} times per "
        f"second and given {settings['patience']:g} s. *Not begun*: no event came\nin that time. Memory is "
        "all processes' PSS, Apache, PHP, daemon and nginx together, whatever they hold without a "
        "stream\nincluded. *Events that came*: of those that were due since each live stream's first one, but for the "
        "last quarter\nof an interval; how late they came, the last column says. The clients needed at most "
        f"{clients:.0%} of a core,\nthe prober {prober:.0%}.\n\n"
    )
    text += aims_table(aims(document), lambda aim: 4)
    for workers in reading.workers():
        text += f"\n### {workers} workers\n\n![plain page](point-{workers}.svg)\n\n"
        text += page_table(reading, workers) + "\n" + top_table(reading, workers) + NO_FIGURE
        short = short_table(reading, workers, Settings(**settings))
        text += f"\n{short}" if short else ""
    text += "\n![memory per stream](point-memory.svg)\n\n" if reading.workers() else ""
    text += "".join(f"- *{c.title}*: {c.note}\n" for c in CONTENDERS)
    return text


def charts(document: dict[str, Any]) -> dict[str, str]:
    """file name -> SVG"""
    reading = Reading(document["samples"])
    found: dict[str, str] = {}
    if not reading.workers():
        return found
    for workers in reading.workers():
        series = []
        for contender in reading.contenders(workers):
            points: list[tuple[float, float | None]] = []
            for level in reading.levels(workers):
                latency = reading.of(workers, contender.key, level, "p99_ms")
                if latency is not None:
                    alive = reading.answers(workers, contender.key, level)
                    points.append((int(level), latency.median if alive else None))
            series.append(plot.Line(contender.title, tuple(points), contender.key == "handoff"))
        found[f"point-{workers}.svg"] = plot.lines(
            "How long a plain PHP page takes while streams are open",
            f"99th percentile, milliseconds; a site with {workers} workers on one core; {rounds(document['rounds'])}",
            "streams that clients want to have open", series,
        )  # fmt: skip
    most = reading.workers()[-1]
    top = reading.levels(most)[-1]
    rows = []
    for contender in reading.contenders(most):
        value = reading.of(most, contender.key, top, "pss_per_stream")
        if value is not None:
            rows.append(
                plot.Bar(
                    contender.title, value.median / 1e3, value.low / 1e3, value.high / 1e3, contender.key == "handoff"
                )
            )
    found["point-memory.svg"] = plot.bars(
        "Memory of all processes per stream that is live",
        f"KB (PSS), {int(top):,} streams wanted, {most} workers",
        rows,
    )
    return found


def facts(document: dict[str, Any]) -> dict[str, str]:
    """What docs/performance.md says, by name."""
    reading = Reading(document["samples"])
    if not reading.workers():
        return {}
    workers = reading.workers()[-1]
    top = reading.levels(workers)[-1]
    clients, prober = generator_shares(reading)
    found = {"workers": workers, "top": f"{int(top):,}"}
    found |= {"point_clients_share": f"{clients * 100:.0f}", "point_prober_share": f"{prober * 100:.0f}"}
    for who in (c.key for c in CONTENDERS):
        for what, name, scale, form in (
            ("p99_ms", "page_p99", 1, ".1f"),
            ("p50_ms", "page_p50", 1, ".1f"),
            ("live", "live", 1, ",.0f"),
            ("answered", "answered", 100, ".0f"),
            ("pss", "pss_mb", 1e-6, ",.0f"),
            ("pss_per_stream", "kb", 1e-3, ",.1f"),
            ("cpu_s_per_million", "cpu", 1, ",.0f"),
            ("late_p99_ms", "late", 1, ",.0f"),
        ):
            value = reading.of(workers, who, top, what)
            # Who stopped answering pages has no cost per event (point.cost_of_events; the page says why), and that is
            # no reason to publish nothing.
            said = "-" if value is None else format(value.median * scale, form)
            found[f"{who.replace('-', '_')}_{name}"] = said
    now, idle = (reading.values(workers, "handoff", level, "p99_ms") for level in (top, "0"))
    if now and len(now) == len(idle):
        found["handoff_page_ratio"] = f"{ratio(now, idle).median:.2f}"
        found["handoff_page_idle"] = f"{figure(idle).median:.1f}"
        used, seconds = (reading.values(workers, "handoff", top, what) for what in ("cpu_s", "seconds"))
        found["handoff_core"] = f"{ratio(used, seconds).median * 100:.0f}"
    for who in ("mod_php", "php-fpm", "x-accel"):
        ours, theirs = (reading.values(workers, key, top, "pss_per_stream") for key in ("handoff", who))
        if ours and len(ours) == len(theirs):
            found[f"memory_ratio_{who.replace('-', '_')}"] = f"{1 / ratio(ours, theirs).median:,.0f}"
    return found
