# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md and its charts, written from a run that is kept in benchmarks/results.

The text is benchmarks/performance.md.in; every {name} in it is a figure of the run, so that no sentence can be older
than what it says. A name that the run has no figure for is an error, and nothing is written.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchlib import parts, summary
from benchlib.tools import BENCHMARKS, ROOT, BenchmarkError

TEMPLATE = BENCHMARKS / "performance.md.in"
DOCS = ROOT / "docs"
CHARTS = ("point-150.svg", "point-memory.svg", "daemon-memory.svg", "daemon-cpu.svg")
"""Of the run, those that the page shows; in docs/ they are called performance-*.svg."""


def facts(name: str) -> dict[str, str]:
    """All figures of a run by name."""
    directory = parts.results_directory(name)
    documents = {}
    for part in parts.PARTS:
        path = directory / f"{part.key}.json"
        if not path.exists():
            raise BenchmarkError(f"{path.relative_to(ROOT)} is missing: a run that is published has every scenario")
        documents[part.key] = json.loads(path.read_text())
    found = {"run": name, "about": summary.about(documents), "caution": summary.caution(documents)}
    for part in parts.PARTS:
        found |= part.facts(documents[part.key])
    return found


def render(name: str) -> dict[Path, str]:
    """path -> text of everything that is written, and nothing is."""
    found = facts(name)
    text = TEMPLATE.read_text()
    unknown = sorted(set(re.findall(r"\{(\w+)\}", text)) - set(found))
    if unknown:
        raise BenchmarkError(f"{TEMPLATE.name}: the run '{name}' has no figure for {', '.join(unknown)}")
    files = {DOCS / "performance.md": re.sub(r"\{(\w+)\}", lambda match: found[match[1]], text)}
    for chart in CHARTS:
        path = parts.results_directory(name) / chart
        if not path.exists():
            raise BenchmarkError(f"{path.relative_to(ROOT)} is missing")
        files[DOCS / f"performance-{chart}"] = path.read_text()
    return files


def publish(name: str) -> list[Path]:
    """Writes the page and its charts; what was written."""
    files = render(name)
    for path, text in files.items():
        path.write_text(text)
    return sorted(path.relative_to(ROOT) for path in files)
