"""The configuration file: TOML in, frozen dataclasses out.

The rules of this room: every key has its type, its range and its default here and nowhere else; a file is either
wholly valid or refused with *all* its errors at once, each naming the file, the key, the value and what is allowed.
No error repeats the value of an unknown key or of anything that might hold a secret.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

LEVELS = ("debug", "info", "warning", "error")
BACKEND_TYPES = ("demo", "openai")
T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class ConfigError(Exception):
    """The file cannot be used. ``errors`` holds one complete sentence per problem."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Table ``[server]``; all times in seconds."""

    workers: int = 1
    max_streams: int = 4000
    handoff_timeout: float = 5.0
    write_timeout: float = 30.0
    linger_timeout: float = 2.0
    drain_timeout: float = 300.0
    heartbeat: float = 15.0

    @property
    def worker_count(self) -> int:
        """Worker processes to run: ``workers``, or one per usable core where that is 0."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """A ``[backends.*]`` table of type ``demo``."""

    tokens_per_second: float = 20.0


@dataclass(frozen=True, slots=True)
class OpenAIConfig:
    """A ``[backends.*]`` table of type ``openai``; all times in seconds."""

    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o-mini"
    api_key_credential: str | None = None
    connect_timeout: float = 10.0
    first_event_timeout: float = 60.0
    idle_timeout: float = 60.0


BackendConfig = DemoConfig | OpenAIConfig


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file."""

    server: ServerConfig = field(default_factory=ServerConfig)
    log_level: str = "info"
    default_backend: str = "demo"
    backends: Mapping[str, BackendConfig] = field(default_factory=lambda: {"demo": DemoConfig()})


def load(path: str | Path) -> Config:
    """Read and check one file; raises ConfigError."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not valid UTF-8 at byte {error.start}"]) from error
    return loads(text, str(path))


def loads(text: str, name: str) -> Config:
    """Check the text of a file called ``name``; raises ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{name}: not valid TOML: {error}"]) from error
    errors: list[str] = []
    top = _Table(name, "", data, errors)
    server = _server(top.table("server"))
    log = top.table("log")
    level = log.choice("level", "info", LEVELS)
    log.finish()
    backends = _backends(top, errors)
    backend = top.table("backend")
    default = backend.choice("default", "demo" if "demo" in backends else next(iter(backends), "demo"), tuple(backends))
    backend.finish()
    top.finish()
    if errors:
        raise ConfigError(errors)
    return Config(server, level, default, {key: value for key, value in backends.items() if value is not None})


def _server(table: _Table) -> ServerConfig:
    default = ServerConfig()
    config = ServerConfig(
        workers=table.integer("workers", default.workers, 0, 64),
        max_streams=table.integer("max_streams", default.max_streams, 1, 1_000_000),
        handoff_timeout=table.number("handoff_timeout", default.handoff_timeout, 0.1, 60),
        write_timeout=table.number("write_timeout", default.write_timeout, 0.1, 3600),
        linger_timeout=table.number("linger_timeout", default.linger_timeout, 0, 60),
        drain_timeout=table.number("drain_timeout", default.drain_timeout, 0, 86400),
        heartbeat=table.number("heartbeat", default.heartbeat, 0, 3600),
    )
    table.finish()
    return config


def _backends(top: _Table, errors: list[str]) -> dict[str, BackendConfig | None]:
    """The ``[backends.*]`` tables; a faulty one stays in as None so that its name still counts as defined."""
    if not top.has("backends"):
        return {"demo": DemoConfig()}
    tables = top.table("backends")
    result: dict[str, BackendConfig | None] = {}
    for name in tables.keys():  # noqa: SIM118 - a _Table is no mapping
        if not _NAME.fullmatch(name):
            errors.append(f"{tables.where(name)}: allowed are names of letters, digits, '_', '.' and '-'")
        table = tables.table(name)
        kind = table.choice("type", None, BACKEND_TYPES)
        if kind == "demo":
            result[name] = DemoConfig(table.number("tokens_per_second", DemoConfig().tokens_per_second, 0.1, 10000))
            table.finish()
        elif kind == "openai":
            result[name] = _openai(table)
            table.finish()
        else:
            result[name] = None
    if not result and not errors:
        errors.append(f"{tables.where()}: is empty: allowed is at least one table like [backends.demo]")
    return result


def _openai(table: _Table) -> OpenAIConfig:
    default = OpenAIConfig()
    return OpenAIConfig(
        base_url=table.url("base_url", default.base_url),
        model=table.text("model", default.model, 200),
        api_key_credential=table.credential("api_key_credential"),
        connect_timeout=table.number("connect_timeout", default.connect_timeout, 0.1, 300),
        first_event_timeout=table.number("first_event_timeout", default.first_event_timeout, 0.1, 3600),
        idle_timeout=table.number("idle_timeout", default.idle_timeout, 0.1, 3600),
    )


class _Table:
    """One TOML table being taken apart: each getter consumes a key, ``finish`` complains about those left over."""

    def __init__(self, file: str, path: str, data: object, errors: list[str]) -> None:
        self._file = file
        self._path = path
        self._errors = errors
        self._known: list[str] = []
        self._data: dict[str, Any] = {}
        if isinstance(data, dict):
            self._data = data
        else:
            errors.append(f"{self.where()} = {_show(data)}: allowed is a table, written as [{path}]")

    def where(self, key: str = "") -> str:
        return f"{self._file}: " + ".".join(part for part in (self._path, key) if part)

    def has(self, key: str) -> bool:
        return key in self._data

    def keys(self) -> list[str]:
        return list(self._data)

    def table(self, key: str) -> _Table:
        path = f"{self._path}.{key}" if self._path else key
        return _Table(self._file, path, self._take(key, {}), self._errors)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self._take(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        return self._refuse(key, value, f"an integer from {low} to {high}", default)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self._take(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and low <= number <= high:
                return number
        return self._refuse(key, value, f"a number from {low:g} to {high:g}", default)

    def text(self, key: str, default: str, longest: int) -> str:
        value = self._take(key, default)
        if isinstance(value, str) and 0 < len(value) <= longest and value.isprintable():
            return value
        return self._refuse(key, value, f"a string of 1 to {longest} printable characters", default)

    def choice(self, key: str, default: str | None, allowed: tuple[str, ...]) -> str:
        value = self._take(key, default)
        if isinstance(value, str) and value in allowed:
            return value
        form = "one of " + ", ".join(f'"{name}"' for name in allowed)
        if value is None:
            self._errors.append(f"{self.where(key)}: is missing: allowed is {form}")
            return ""
        return self._refuse(key, value, form + _did_you_mean(value, allowed), default or "")

    def url(self, key: str, default: str) -> str:
        value = self._take(key, default)
        form = 'a URL like "https://host/v1" with scheme http or https, and no user, query or fragment'
        if not isinstance(value, str):
            return self._refuse(key, value, form, default)
        if "@" in value or "?" in value:
            # Either may carry a password or a key, and this sentence ends up in a journal.
            self._errors.append(f"{self.where(key)}: (value not shown): allowed is {form}")
            return default
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if usable and not parts.fragment and value.isascii() and value.isprintable() and " " not in value:
            return value.rstrip("/")
        return self._refuse(key, value, form, default)

    def credential(self, key: str) -> str | None:
        value = self._take(key, None)
        if value is None:
            return None
        form = "the name of a systemd credential (letters, digits, '_', '.' and '-'), for example \"openai_api_key\""
        if isinstance(value, str) and value.startswith("sk-"):
            self._errors.append(
                f"{self.where(key)}: (value not shown, it looks like a key): allowed is {form}; "
                "put the key itself into the credential's file"
            )
            return None
        if isinstance(value, str) and _NAME.fullmatch(value):
            return value
        return self._refuse(key, value, form, None)

    def finish(self) -> None:
        """Report every key that no getter asked for."""
        for key in self._data:
            if key not in self._known:
                allowed = ", ".join(self._known)
                self._errors.append(
                    f"{self.where(key)}: unknown key{_did_you_mean(key, tuple(self._known))}; allowed here: {allowed}"
                )

    def _take(self, key: str, default: object) -> object:
        self._known.append(key)
        return self._data.get(key, default)

    def _refuse(self, key: str, value: object, form: str, default: T) -> T:
        self._errors.append(f"{self.where(key)} = {_show(value)}: allowed is {form}")
        return default


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


def _did_you_mean(value: object, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value), allowed, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
