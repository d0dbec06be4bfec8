"""Where in a TOML text each key stands, which tomllib does not tell.

The text must be valid already: tomllib has judged it, and this reader only has to find its way. It knows comments,
tables, arrays of tables, dotted and quoted keys, all strings, arrays over several lines and tables written inline.
A path is a tuple as one would index the parsed data: ``("backends", "x", "model")``, ``("routes", 1, "backend")``.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Mapping

Path = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"[ \t]*")
# White space, line ends and comments, as between the values of an array.
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRINGS = (
    re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}(?!")', re.DOTALL),
    re.compile(r"'''.*?'{3,5}(?!')", re.DOTALL),
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)
# Numbers, booleans, dates; a date may hold one blank.
_OTHER = re.compile(r"[^,\]}#\r\n]+")


def lines_of(text: str) -> Mapping[Path, int]:
    """The line, counted from 1, of each key and table; empty where the text is beyond this reader."""
    reader = _Reader(text)
    # What was found until an error is right, and a line is a help, not a need.
    with contextlib.suppress(ValueError):
        reader.read()
    return reader.lines


def nearest(lines: Mapping[Path, int], path: Path) -> int | None:
    """The line of ``path`` or of the closest table around it; None where that is the whole file."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        # The line of _counted, so that nothing is counted twice.
        self._line = 1
        self._counted = 0
        self._last: dict[Path, int] = {}
        self.lines: dict[Path, int] = {}

    def read(self) -> None:
        table: Path = ()
        while self._skip(_SPACE) and self._at < len(self._text):
            line = self._line_here()
            if self._take("[["):
                table = self._array_element(self._key())
                self._expect("]]")
                self.lines[table] = line
            elif self._take("["):
                table = self._resolve((), self._key())
                self._expect("]")
                self._note(table, line)
            else:
                self._pair(table)

    def _pair(self, table: Path) -> None:
        line = self._line_here()
        path = self._resolve(table, self._key())
        for length in range(len(table) + 1, len(path) + 1):
            self._note(path[:length], line)
        self._expect("=")
        self._skip(_BLANK)
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._take("["):
            index = 0
            while self._skip(_SPACE) and not self._take("]"):
                self._note((*path, index), self._line_here())
                self._value((*path, index))
                self._skip(_SPACE)
                self._take(",")
                index += 1
        elif self._take("{"):
            while self._skip(_SPACE) and not self._take("}"):
                self._pair(path)
                self._skip(_SPACE)
                self._take(",")
        elif not self._string():
            self._skip(_OTHER)

    def _key(self) -> list[str]:
        """A key in all its parts."""
        parts = []
        while True:
            self._skip(_BLANK)
            string = self._string()
            parts.append(tomllib.loads(f"k = {string}")["k"] if string else self._match(_BARE))
            self._skip(_BLANK)
            if not self._take("."):
                return parts

    def _resolve(self, table: Path, parts: list[str]) -> Path:
        """The path of a key below ``table``; a part that is an array of tables means its last table."""
        path = table
        for part in parts:
            path = (*path, part)
            if path in self._last:
                path = (*path, self._last[path])
        return path

    def _array_element(self, parts: list[str]) -> Path:
        path = (*self._resolve((), parts[:-1]), parts[-1])
        self._last[path] = self._last.get(path, -1) + 1
        self._note(path, self._line_here())
        return (*path, self._last[path])

    def _note(self, path: Path, line: int) -> None:
        self.lines.setdefault(path, line)

    def _string(self) -> str:
        for pattern in _STRINGS:
            match = pattern.match(self._text, self._at)
            if match:
                self._at = match.end()
                return match.group()
        return ""

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"lost at {self._at}")
        self._at = match.end()
        return match.group()

    def _skip(self, pattern: re.Pattern[str]) -> bool:
        self._match(pattern)
        return True

    def _take(self, token: str) -> bool:
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise ValueError(f"lost at {self._at}")

    def _line_here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line
