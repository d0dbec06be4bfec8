"""What benchmarks/run --publish writes into docs/ is there as it would write it, from the runs that the pages name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# E402: benchlib is no installed package, it lies beside the benchmarks' commands.
sys.path.insert(0, str(ROOT / "benchmarks"))

from benchlib import publish  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
OPERATIONS = ROOT / "docs" / "operations.md"


def test_the_page_and_its_charts_are_those_of_the_run_that_it_names() -> None:
    named = re.search(r"`benchmarks/run --publish ([\w-]+)`", PAGE.read_text())
    assert named, "the page no longer says which run it was written from"
    stale = [path.name for path, text in publish.render(named[1]).items() if path.read_text() != text]
    assert stale == [], f"write them anew: benchmarks/run --publish {named[1]}"


def test_what_operations_says_of_a_rollouts_cost_is_of_the_run_that_it_names() -> None:
    """It names none as long as none is kept."""
    named = re.search(r"^<!-- benchmarks/run --publish ([\w-]+) -->$", OPERATIONS.read_text(), re.MULTILINE)
    assert named, "the page no longer says which run its section was written from"
    kept = sorted(path.parent.name for path in (ROOT / "benchmarks/results").glob("*/fleet.json"))
    if named[1] == "none":
        assert kept == [], f"write the section: benchmarks/run --publish {kept[-1]}"
    else:
        written = publish.render(named[1])[OPERATIONS]
        assert written == OPERATIONS.read_text(), f"write it anew: benchmarks/run --publish {named[1]}"
