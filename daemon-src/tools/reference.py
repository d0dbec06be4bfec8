"""Writes docs/daemon-configuration.md: every key that config.py knows, with the words of config.example.toml.

Keys, defaults and allowed values come from the code that reads them (``config.loads`` tells what it was asked for);
what a key means is the comment beside it, or above it, in the example file. A key without one is an error here.

    python3 tools/reference.py            writes the page
    python3 tools/reference.py --check    exits with 1 where the page is not what would be written
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SOURCE))

from streaming_daemon import config, toml_lines  # noqa: E402

EXAMPLE = SOURCE / "config.example.toml"
PAGE = SOURCE.parent / "docs" / "daemon-configuration.md"

# What is allowed depends on the file here, so the code's own words would be about the example.
_BY_FILE = {
    "default": "the name of a `[backends.*]` table",
    "backend": "the name of a `[backends.*]` table",
    "allow_choice": "an array of names of `[backends.*]` tables",
    "fallback": "an array of names of other `[backends.*]` tables",
}
# Asked for whatever a table is, and shown in its heading.
_HIDDEN = ("type",)
_HEAD = """# Configuration of the streaming daemon

<!-- Written by daemon-src/tools/reference.py from config.py and config.example.toml. Change those. -->

One TOML file, `/etc/streaming-daemon/config.toml` where the roles deploy it; `daemon-src/config.example.toml` shows
every key with its default. A file is valid as a whole or refused as a whole, and every error is one line:

```
python3 -m streaming_daemon --check --config FILE
FILE:3: server.workers = 65: allowed is an integer from 0 to 64
FILE:7: log.levle: unknown key (did you mean "level"?); allowed here: level, content
```

It names file, line, key, value and what is allowed; a value that may be a key or a password is not repeated. The exit
status is 0 for a good file and 2 for another.

A reload (`systemctl reload streaming-daemon`) starts workers with the new file, and they take over when all of them are
ready; a file that is refused makes the reload fail and changes nothing. Streams that are running end under the file
with which they began. `metrics.listen` takes effect with a restart, and so does what stands in the unit
(`LimitNOFILE=`, credentials): the reload says so.

Times are seconds and sizes are bytes. Secrets are never in this file: `*_credential` names a file in
`$CREDENTIALS_DIRECTORY`, which `LoadCredential=` of the unit puts there.
"""


class MissingError(Exception):
    """The example file lacks a key, or what it means."""


def page() -> str:
    text = EXAMPLE.read_text()
    seen: list[config.Key] = []
    config.loads(text, EXAMPLE.name, seen)
    comments = _Comments(text)
    required = _required(tuple(config.BACKEND_TYPES))
    types = {name: table["type"] for name, table in tomllib.loads(text)["backends"].items()}
    parts = [_HEAD]
    for path, keys in _tables(seen).items():
        kind = types.get(path[1], "") if path[0] == "backends" else ""
        parts.append(_heading(path, kind) + "\n")
        about = comments.of_table(path)
        if about:
            parts.append(f"{about}\n")
        rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
        for key in keys:
            name = key.path[-1]
            if name in _HIDDEN and kind:
                continue
            default = "required" if (kind or path[0], name) in required else _shown(key.default)
            allowed = _BY_FILE.get(name, _code(key.allowed)) if path[0] in ("backend", "backends", "routes") else ""
            cells = (f"`{name}`", default, allowed or _code(key.allowed), comments.of(key.path))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _tables(seen: list[config.Key]) -> dict[tuple[str, ...], list[config.Key]]:
    """Keys by the table they are in, in the order in which the code asks, each once."""
    tables: dict[tuple[str, ...], dict[str, config.Key]] = {}
    for key in seen:
        tables.setdefault(key.path[:-1], {}).setdefault(key.path[-1], key)
    return {path: list(keys.values()) for path, keys in tables.items()}


def _heading(path: tuple[str, ...], kind: str) -> str:
    if kind:
        return f'## `[backends.NAME]` with `type = "{kind}"`'
    if path[-1] == "*":
        return f"## `[[{'.'.join(path[:-1])}]]`"
    return f"## `[{'.'.join(path)}]`"


class _Comments:
    """The comments of the example file, by what they stand beside."""

    def __init__(self, text: str) -> None:
        self._rows = text.splitlines()
        self._lines = toml_lines.lines_of(text)

    def of(self, path: tuple[str, ...]) -> str:
        """The meaning of a key; of the same key in another table of its kind, where it is not in its own."""
        for where, line in self._lines.items():
            if _matches(where, path) and (found := self._comment(line)):
                return found
        for where, line in self._lines.items():
            alike = len(where) == len(path) and (where[0], where[-1]) == (path[0], path[-1])
            if alike and (found := self._comment(line)):
                return found
        raise MissingError(f"{EXAMPLE.name}: {'.'.join(path)} is missing, or has no comment that says what it means")

    def of_table(self, path: tuple[str, ...]) -> str:
        for where, line in self._lines.items():
            if _matches(where, path):
                found = self._comment(line)
                return found[:1].upper() + found[1:] + "." if found else ""
        return ""

    def _comment(self, line: int) -> str:
        row = self._rows[line - 1]
        for match in re.finditer("#", row):
            try:
                tomllib.loads(row[: match.start()])
            except tomllib.TOMLDecodeError:
                continue
            return row[match.end() :].strip()
        above = self._rows[line - 2] if line > 1 else ""
        return above.removeprefix("#").strip() if above.startswith("#") else ""


def _matches(where: toml_lines.Path, path: tuple[str, ...]) -> bool:
    return tuple("*" if isinstance(part, int) else part for part in where) == path


def _required(types: tuple[str, ...]) -> set[tuple[str, str]]:
    """(type or table, key) of the keys that must be there: those that are missed where nothing is given."""
    found = set()
    for kind in types:
        for key in _missed(f'[backends.x]\ntype = "{kind}"\n'):
            found.add((kind, key))
    for key in _missed("[[routes]]\n"):
        found.add(("routes", key))
    return found


def _missed(text: str) -> list[str]:
    try:
        config.loads(text, "x")
    except config.ConfigError as error:
        return re.findall(r"\.(\w+): is missing", "\n".join(error.errors))
    return []


def _shown(value: object) -> str:
    if value is None or value in ("", [], {}, ()):
        return "none"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, list | tuple):
        return ", ".join(f'`"{each}"`' for each in value)
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _code(text: str) -> str:
    return re.sub(r'("[^"]*")', r"`\1`", text)


def main(arguments: list[str]) -> int:
    try:
        text = page()
    except (MissingError, config.ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE} is not what the code says: run python3 daemon-src/tools/reference.py", file=sys.stderr)
        return 1
    if arguments:
        print("allowed is --check, or nothing", file=sys.stderr)
        return 2
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
