# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md and its charts, and a section of docs/operations.md, from runs kept in benchmarks/results.

The text is benchmarks/performance.md.in; every {name} in it is a figure of the run, so that no sentence can be older
than what it says. A name that the run has no figure for is an error, and nothing is written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

from benchlib import fleet_report, parts, summary
from benchlib.report import aims_table, filled, table
from benchlib.tools import BENCHMARKS, ROOT, BenchmarkError

TEMPLATE = BENCHMARKS / "performance.md.in"
DOCS = ROOT / "docs"
CHARTS = {
    "performance-point.svg": "point-{workers}.svg",
    "performance-memory.svg": "point-memory.svg",
    "performance-daemon-memory.svg": "daemon-memory.svg",
    "performance-daemon-cpu.svg": "daemon-cpu.svg",
}
"""In docs/, and in the run."""

TOKENS_PER_SECOND = 20
"""Of a language model that somebody reads along with: what the sizing table reckons with."""

MOST_WORKERS = 64
"""Of one daemon (streaming_daemon/config.py): what needs more needs another host."""

SECONDS_PER_STREAM = 30
"""The same of how long an answer takes."""


def facts(name: str) -> dict[str, str]:
    """All figures of a run by name. Raises BenchmarkError where the run has not measured everything."""
    directory = parts.results_directory(name)
    documents = {}
    of_all = [part for part in parts.PARTS if not part.by_name]
    for part in of_all:
        path = directory / f"{part.key}.json"
        if not path.exists():
            raise BenchmarkError(f"{path.relative_to(ROOT)} is missing: a run that is published has every scenario")
        documents[part.key] = json.loads(path.read_text())
    found = {"run": name, "about": summary.about(documents), "caution": summary.caution(documents)}
    for part in of_all:
        found |= part.facts(documents[part.key])
    found["sizing"] = sizes(documents)
    found["targets"] = targets(documents).strip()
    return found


def targets(documents: dict[str, parts.Document]) -> str:
    """What was aimed at, and whether it was met, of all scenarios."""
    aims = (aim for part in parts.PARTS if part.key in documents for aim in part.aims(documents[part.key]))
    return aims_table(aims, lambda aim: 0 if aim.limit >= 1000 else 3, "target")


def sizes(documents: dict[str, parts.Document]) -> str:
    """The sizing table, after what the top of the page warns of: who looks for sizes does not begin to read there."""
    return f"{summary.caution(documents)}\n\n{sizing(documents)}".strip()


def sizing(documents: dict[str, parts.Document]) -> str:
    """A table for hosts with relayed streams: what the run's figures come to for so many of them."""
    try:
        daemon, handoff = documents["daemon"]["samples"], documents["handoff"]["mpms"]["event"]["samples"]
        stream = median(daemon["relay-memory"]["ours"]["rss_per_stream"])
        event = median(daemon["relay"]["ours"]["cpu_s_per_million"])
        base = median(daemon["relay-memory"]["ours"]["base_rss"])
        levels = documents["beyond"]["samples"]
        kernel = median(levels[max(levels, key=int)]["kernel_per_stream"]) / 2
        given = handoff["envelope"]
        handed = median(given[max(given, key=int)]["httpd_cpu_us"])
    except KeyError as error:
        raise BenchmarkError(f"the run has no figure for the sizing table: {error}") from None
    rows = []
    for streams in (1_000, 10_000, 100_000):
        cores = streams * TOKENS_PER_SECOND * event / 1e6
        needed = max(1, math.ceil(cores / 0.7))  # a worker that is always busy answers late
        hosts = math.ceil(needed / MOST_WORKERS)
        workers = min(needed, MOST_WORKERS)
        starts = streams / SECONDS_PER_STREAM
        rows.append(
            [
                f"{streams:,}",
                f"{cores:,.1f}",
                f"{workers}" if hosts == 1 else f"{workers} on each of {hosts} hosts",
                f"{2 * math.ceil(streams / workers) + 1024:,}",
                f"{(streams * stream + workers * hosts * base) / 1e6:,.0f} MB",
                f"{2 * streams * kernel / 1e6:,.0f} MB",
                f"{starts:,.0f}",
                f"{starts * handed / 1e6:.1%}",
            ]
        )
    head = ["streams", "cores for the daemon", "daemon's workers", "`LimitNOFILE=` of each", "daemon's memory",
            "kernel's memory", "new streams/s", "of a core, for Apache's handoffs"]  # fmt: skip
    return table(head, rows)


def render(name: str) -> dict[Path, str]:
    """path -> text of everything that is written, and nothing is.

    A run of the fleet, which is made by itself, is a section of docs/operations.md; one of all others the page here.
    """
    fleet = parts.results_directory(name) / "fleet.json"
    of_fleet: dict[Path, str] = {}
    if fleet.exists():
        document = json.loads(fleet.read_text())
        about = f"{summary.about({'fleet': document})}\n{summary.caution({'fleet': document})}".strip()
        of_fleet[fleet_report.OPERATIONS] = fleet_report.section(name, document, about)
        if not any((fleet.parent / f"{part.key}.json").exists() for part in parts.PARTS if not part.by_name):
            return of_fleet
    found = facts(name)
    files = {**of_fleet, DOCS / "performance.md": filled(TEMPLATE, found, name)}
    for chart, source in CHARTS.items():
        path = parts.results_directory(name) / source.format(**found)
        if not path.exists():
            raise BenchmarkError(f"{path.relative_to(ROOT)} is missing")
        files[DOCS / chart] = path.read_text()
    return files


def publish(name: str) -> list[Path]:
    """Writes the page and its charts; what was written."""
    files = render(name)
    for path, text in files.items():
        path.write_text(text)
    return sorted(path.relative_to(ROOT) for path in files)
