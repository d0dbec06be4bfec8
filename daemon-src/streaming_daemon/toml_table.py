"""One table of a TOML file being taken apart: a getter per kind of value.

The rules of this room: a getter says what it allows in the words of the error that somebody reads who gave it
something else; every error names the file, the line, the key and the value, and none repeats the value of anything that
might hold a secret. What the keys are, and what they are for, is ``config``'s.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from . import toml_lines

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PREFIX = re.compile(r"/(?:[A-Za-z0-9._~-]+/)*")
_UNIX_URL = re.compile(r"unix:/[A-Za-z0-9._@+/-]+(?::/[A-Za-z0-9._~/-]*)?")


class ConfigError(Exception):
    """The file cannot be used. ``errors`` holds one complete sentence per problem."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass(frozen=True, slots=True)
class Key:
    """One key that somebody asked for, as the reference shows it; ``allowed`` completes "allowed is ...".

    ``path`` has the names of the tables around it; in arrays of tables, ``*`` for the number.
    """

    path: tuple[str, ...]
    default: object
    allowed: str


@dataclass(slots=True)
class File:
    """What all tables of one file share while it is being read."""

    name: str
    lines: Mapping[toml_lines.Path, int]
    errors: list[str]
    seen: list[Key]


class Table:
    """One TOML table being taken apart: each getter consumes a key, ``finish`` complains about those left over."""

    def __init__(self, file: File, path: toml_lines.Path, data: object) -> None:
        self._file = file
        self._path = path
        self._known: list[str] = []
        self._data: dict[str, Any] = {}
        if isinstance(data, dict):
            self._data = data
        else:
            self.error("", f" = {_show(data)}: allowed is a table, written as [{_dotted(path)}]")

    def where(self, key: str = "") -> str:
        """File, line and key, with which every error begins."""
        path = (*self._path, key) if key else self._path
        line = toml_lines.nearest(self._file.lines, path)
        return f"{self._file.name}{f':{line}' if line else ''}: {_dotted(path)}"

    def error(self, key: str, text: str) -> None:
        """Refuse the file because of ``key``; ``text`` goes on behind its name."""
        self._file.errors.append(f"{self.where(key)}{text}")

    def has(self, key: str) -> bool:
        return key in self._data

    def given(self) -> list[str]:
        """The keys that the file has, in its order."""
        return list(self._data)

    def tables(self, key: str) -> list[Table]:
        """An array of tables; absent is empty."""
        self._known.append(key)
        value = self._data.get(key, [])
        if isinstance(value, list):
            return [Table(self._file, (*self._path, key, index), item) for index, item in enumerate(value)]
        self.error(key, f" = {_show(value)}: allowed is an array of tables, each written as [[{key}]]")
        return []

    def table(self, key: str) -> Table:
        self._known.append(key)
        return Table(self._file, (*self._path, key), self._data.get(key, {}))

    def boolean(self, key: str, default: bool) -> bool:
        form = "true or false"
        value = self._take(key, default, form)
        if isinstance(value, bool):
            return value
        return self._refuse(key, value, form, default)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        form = f"an integer from {low} to {high}"
        value = self._take(key, default, form)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        return self._refuse(key, value, form, default)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        form = f"a number from {low:g} to {high:g}"
        value = self._take(key, default, form)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and low <= number <= high:
                return number
        return self._refuse(key, value, form, default)

    def text(self, key: str, default: str, longest: int) -> str:
        form = f"a string of 1 to {longest} printable characters"
        value = self._take(key, default, form)
        if isinstance(value, str) and 0 < len(value) <= longest and value.isprintable():
            return value
        return self._refuse(key, value, form, default)

    def choice(self, key: str, default: str | None, allowed: tuple[str, ...]) -> str:
        form = "one of " + ", ".join(f'"{name}"' for name in allowed)
        value = self._take(key, default, form)
        if isinstance(value, str) and value in allowed:
            return value
        if value is None:
            self.error(key, f": is missing: allowed is {form}")
            return ""
        return self._refuse(key, value, form + did_you_mean(value, allowed), default or "")

    def texts(
        self, key: str, default: tuple[str, ...] | None, each: re.Pattern[str], form: str, *, single: bool = False
    ) -> tuple[str, ...]:
        """Strings that match ``each``; ``single``: one may stand without its array. With None as default the key must
        be there and not be empty."""
        value = self._take(key, None if default is None else list(default), form)
        if value is None:
            self.error(key, f": is missing: allowed is {form}")
            return ()
        items = [value] if single and isinstance(value, str) else value
        if not isinstance(items, list) or not (items or default is not None):
            return self._refuse(key, value, form, default or ())
        for item in items:
            if not isinstance(item, str) or not each.fullmatch(item):
                return self._refuse(key, item, form, default or ())
        return tuple(items)

    def names(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """Names out of ``allowed``, each once."""
        form = "an array of the names of " + (
            "(other) backends: " if allowed else "other backends, of which there are none"
        )
        form += ", ".join(f'"{name}"' for name in allowed)
        value = self._take(key, [], form)
        if not isinstance(value, list):
            return self._refuse(key, value, form, ())
        for item in value:
            if item not in allowed:
                return self._refuse(key, item, form + did_you_mean(item, allowed), ())
        return tuple(dict.fromkeys(value))

    def strings(self, key: str, name: re.Pattern[str]) -> Mapping[str, str]:
        """A table of strings."""
        form = 'a table of strings, like { LANG = "C.UTF-8" }, without NUL'
        value = self._take(key, {}, form)
        if isinstance(value, dict):
            if all(name.fullmatch(key) and isinstance(text, str) and "\0" not in text for key, text in value.items()):
                return dict(value)
            # A value may be a secret, although that is not the place for one.
            self.error(key, f": (values not shown): allowed is {form}")
            return {}
        return self._refuse(key, value, form, {})

    def path_prefix(self, key: str) -> str | None:
        form = 'a path that begins and ends with "/", like "/files/"'
        value = self._take(key, None, form)
        if value is None or (isinstance(value, str) and _PREFIX.fullmatch(value) and "/../" not in value):
            return value
        return self._refuse(key, value, form, None)

    def url(self, key: str, default: str | None, *, slash: bool = False, network: bool = False) -> str:
        """A base URL, without the last slash unless ``slash`` says that it means something; ``network``: no Unix socket
        but perhaps nothing at all."""
        form = 'a URL like "https://host/v1" with scheme http or https, and no user, query or fragment'
        form += (
            ", or an empty string for none"
            if network
            else ', or a Unix socket with a path behind it, like "unix:/run/proxy.sock:/v1"'
        )
        value = self._take(key, default, form)
        if value is None:
            self.error(key, f": is missing: allowed is {form}")
            return ""
        default = default or ""
        if not isinstance(value, str):
            return self._refuse(key, value, form, default)
        if value == "" if network else _UNIX_URL.fullmatch(value):
            return value
        if "@" in value or "?" in value:
            # Either may carry a password or a key, and this sentence ends up in a journal.
            self.error(key, f": (value not shown): allowed is {form}")
            return default
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if usable and not parts.fragment and value.isascii() and value.isprintable() and " " not in value:
            return value if slash else value.rstrip("/")
        return self._refuse(key, value, form, default)

    def path(self, key: str, default: str) -> str:
        form = "an absolute path, or an empty string for none"
        value = self._take(key, default, form)
        if isinstance(value, str) and (value == "" or (value.startswith("/") and value.isprintable())):
            return value
        return self._refuse(key, value, form, default)

    def local_address(self, key: str, default: str) -> str:
        form = (
            '"off", "unix:" and a path or a name in the runtime directory, or a loopback address and port like '
            '"127.0.0.1:9464"'
        )
        value = self._take(key, default, form)
        if isinstance(value, str) and value.isprintable():
            if value == "off" or (value.startswith("unix:") and 0 < len(value.removeprefix("unix:").encode()) < 108):
                return value
            host, _, port = value.rpartition(":")
            with contextlib.suppress(ValueError):
                loopback = ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
                if loopback and port.isdecimal() and 0 < int(port) < 65536:
                    return value
        return self._refuse(key, value, form, default)

    def credential(self, key: str) -> str | None:
        form = "the name of a systemd credential (letters, digits, '_', '.' and '-'), for example \"openai_api_key\""
        value = self._take(key, None, form)
        if value is None:
            return None
        if isinstance(value, str) and value.startswith("sk-"):
            self.error(
                key,
                f": (value not shown, it looks like a key): allowed is {form}; put the key itself into the "
                "credential's file",
            )
            return None
        if isinstance(value, str) and NAME.fullmatch(value):
            return value
        return self._refuse(key, value, form, None)

    def finish(self) -> None:
        """Report every key that no getter asked for."""
        for key in self._data:
            if key not in self._known:
                allowed = ", ".join(self._known)
                close = did_you_mean(key, tuple(self._known))
                self.error(key, f": unknown key{close}; allowed here: {allowed}")

    def _take(self, key: str, default: object, form: str) -> object:
        """The value of a key; every getter says with ``form`` what is allowed."""
        self._known.append(key)
        path = tuple("*" if isinstance(part, int) else part for part in self._path)
        self._file.seen.append(Key((*path, key), default, form))
        return self._data.get(key, default)

    def _refuse(self, key: str, value: object, form: str, default: T) -> T:
        self.error(key, f" = {_show(value)}: allowed is {form}")
        return default


def _dotted(path: toml_lines.Path) -> str:
    """A path as people write it: ``routes[1].backend``, counted from 1 as people count."""
    text = ""
    for part in path:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + (value if len(value) <= 80 else value[:77] + "...") + '"'
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, dict):
        return "a table"
    return "an array" if isinstance(value, list) else "a date or time"


def did_you_mean(value: object, allowed: tuple[str, ...]) -> str:
    # Only for those who have misspelt something; clients wait while the others start.
    import difflib  # noqa: PLC0415 - see above

    close = difflib.get_close_matches(str(value), allowed, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
