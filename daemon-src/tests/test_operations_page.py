"""docs/daemon-operations.md names the tests that hold its sentences, in italics: they have to be there."""

from __future__ import annotations

import re

from daemon_harness import SOURCE

REPOSITORY = SOURCE.parent
PAGE = (REPOSITORY / "docs/daemon-operations.md").read_text()
PLACES = (*SOURCE.glob("tests/test_*.py"), *REPOSITORY.glob("tests/chain/test_*.py"))
DEFINITION = re.compile(r"^ *(?:async )?def test_(\w+)\(", re.MULTILINE)


def test_every_test_that_the_page_names_exists() -> None:
    named = {" ".join(match.split()) for match in re.findall(r"(?<!\*)\*([^*|]+)\*(?!\*)", PAGE)}
    named -= {"italics", "generation"}
    tests = {name.replace("_", " ") for path in PLACES for name in DEFINITION.findall(path.read_text())}
    assert len(named) > 30
    assert {name for name in named if name.replace(",", "") not in tests} == set()
