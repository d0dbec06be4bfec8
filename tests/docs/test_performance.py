"""docs/performance.md and its charts are what benchmarks/run --publish writes from the run that the page names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# E402: benchlib is no installed package, it lies beside the benchmarks' commands.
sys.path.insert(0, str(ROOT / "benchmarks"))

from benchlib import publish  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"


def test_the_page_and_its_charts_are_those_of_the_run_that_it_names() -> None:
    named = re.search(r"`benchmarks/run --publish ([\w-]+)`", PAGE.read_text())
    assert named, "the page no longer says which run it was written from"
    stale = [path.name for path, text in publish.render(named[1]).items() if path.read_text() != text]
    assert stale == [], f"write them anew: benchmarks/run --publish {named[1]}"
