"""Every key of a valid TOML text has its line; a text that is beyond the reader costs lines, not errors."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from daemon_harness import SOURCE
from streaming_daemon.toml_lines import Path, lines_of, nearest

HARD = (SOURCE / "tests/hard.toml").read_text()


def paths(data: Any, path: Path = ()) -> Iterator[Path]:
    if path:
        yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from paths(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from paths(value, (*path, index))


@pytest.mark.parametrize("text", [HARD, HARD.replace("\n", "\r\n"), (SOURCE / "config.example.toml").read_text()])
def test_every_key_has_a_line_and_no_line_is_without_a_key(text: str) -> None:
    found = lines_of(text)
    data = tomllib.loads(text)
    # "[a.b]" makes "a" too, which stands nowhere by itself.
    expected = set(paths(data))
    assert set(found) <= expected
    missing = {path for path in expected if path not in found}
    assert missing == {path for path in missing if any(other[: len(path)] == path for other in found)}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("title",), "title = "),
        (("quoted key",), '"quoted key"'),
        (("literal.key", "a\tb", "c"), "'literal.key'."),
        (("many", 1), "  1, 2,"),
        (("many", 2, 0), '  [ "a]"'),
        (("many", 3, "y", "z z"), "  { x = 1"),
        (("tight",), "tight ="),
        (("raw",), "raw ="),
        (("after",), "after ="),
        (("server", "workers", "kind"), "workers.kind"),
        (("server", "workers"), "workers.count"),
        (("spaced", "out table", "k"), "  k   ="),
        (("routes", 0, "match", "deep"), "deep = 1"),
        (("routes", 0, "rules", 1, "n"), "n = 2"),
        (("routes", 1, "path"), 'path = "/b"'),
        (("routes", 1, "match", "deep"), "match.deep = 2"),
        (("routes", 1, "rules", 0, "n"), "n = 3"),
        (("routes", 1, "nothing"), "[[routes]]"),
    ],
)
def test_the_line_is_the_one_with_the_key(path: Path, expected: str) -> None:
    line = nearest(lines_of(HARD), path)
    assert line is not None
    assert HARD.splitlines()[line - 1].startswith(expected)


def test_what_is_nowhere_has_no_line() -> None:
    assert nearest(lines_of(HARD), ("absent", "key")) is None


@pytest.mark.parametrize("text", ["[", "a", "a =", 'a = "', "a = [", "a = {", "[[a]", "= 1", "\0", '"\\x" = 1'])
def test_a_text_that_is_no_toml_is_survived(text: str) -> None:
    lines_of(text)
