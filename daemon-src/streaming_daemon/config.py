"""The configuration file: TOML in, frozen dataclasses out.

The rules of this room: every key has its type, its range and its default here and nowhere else; a file is either
wholly valid or refused with *all* its errors at once, each naming the file, the line, the key, the value and what is
allowed.
No error repeats the value of an unknown key or of anything that might hold a secret.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from . import toml_lines

MESSAGES = ("auto", "envelope", "plain")
LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("combined", "json", "pairs")
BACKEND_TYPES = ("demo", "openai", "anthropic", "exec", "http")
OUTPUTS = ("normalised", "passthrough")
APIS = ("chat", "responses")
EXEC_FORMATS = ("text", "lines", "sse")
HTTP_METHODS = ("GET", "POST")
# An answer that is continued is sent at once, and a client may have no more than limits.BUFFER_MOST waiting.
_LARGEST_KEPT = 4_000_000
T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# A member of the handoff data that may be passed on; not those that decide how the answer is read.
_MEMBER = re.compile(r"(?!stream$|stream_options$|n$|messages$|input$)[A-Za-z0-9_.-]{1,64}")
_ARGUMENT = re.compile(r"[^\x00]{1,4096}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_PATH = re.compile(r"/[!-~]{0,1000}")
_PREFIX = re.compile(r"/(?:[A-Za-z0-9._~-]+/)*")
_UNIX_URL = re.compile(r"unix:/[A-Za-z0-9._@+/-]+(?::/[A-Za-z0-9._~/-]*)?")
_HEADER = re.compile(
    r"(?!(?:host|connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|content-.*|expect|user-agent)$)"
    r"[a-z0-9][a-z0-9-]{0,63}",
    re.IGNORECASE,
)


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
class _File:
    """What all tables of one file share while it is being read."""

    name: str
    lines: Mapping[toml_lines.Path, int]
    errors: list[str]
    seen: list[Key]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Table ``[server]``; all times in seconds."""

    # 0 is one per usable core.
    workers: int = 0
    max_streams: int = 4000
    handoff_timeout: float = 5.0
    write_timeout: float = 30.0
    linger_timeout: float = 2.0
    drain_timeout: float = 300.0
    heartbeat: float = 15.0
    # Nothing of the backend came for so long: the head is sent all the same, with a comment. 0: only with the answer.
    head_after: float = 10.0
    # From the handoff to the first event, over all backends that are tried. 0: as long as they may take.
    first_event_timeout: float = 180.0
    # From the handoff to the last byte. 0: no end.
    max_duration: float = 3600.0

    @property
    def worker_count(self) -> int:
        """Worker processes to run: ``workers``, or one per usable core where that is 0."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Table ``[listen]``: what is agreed with Apache's target. ``max_payload`` in bytes."""

    message: str = "auto"
    ack: bool = False
    max_payload: int = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Table ``[limits]``, each for one worker; 0 is no limit. ``user_rate`` in streams per second, ``max_buffered``
    in bytes."""

    streams_per_user: int = 0
    streams_per_address: int = 0
    user_rate: float = 0.0
    user_burst: int = 10
    max_buffered: int = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ResumeConfig:
    """Table ``[resume]``: answers that their clients may continue. ``buffer`` in bytes per answer, 0 is never;
    ``away`` and ``keep`` in seconds: how long a backend goes on for a client that is gone, and how long the events of
    a complete answer are kept."""

    buffer: int = 256 * 1024
    away: float = 60.0
    keep: float = 60.0


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Table ``[log]``: the journal. ``content`` also writes what users ask for; see access_log."""

    level: str = "info"
    content: bool = False


@dataclass(frozen=True, slots=True)
class AccessLogConfig:
    """Table ``[access_log]``: a file with one line per stream, besides the journal's. No ``path``, no file."""

    path: str = ""
    format: str = "combined"


@dataclass(frozen=True, slots=True)
class TracingConfig:
    """Table ``[tracing]``: the OpenTelemetry collector that gets a span per stream; see tracing. ``ratio`` of those
    that come without a decision of their caller."""

    endpoint: str = ""
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Table ``[metrics]``: where /metrics, /healthz and /readyz are answered; see metrics_server."""

    listen: str = "unix:metrics.sock"


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """A ``[backends.*]`` table of type ``demo``. ``fallback``, here and below: the backends to try when this one fails
    before its answer has begun."""

    tokens_per_second: float = 20.0
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the types for the APIs of language models have in common; all times in seconds. ``extra``: members of the
    application's data that are passed on beside those that the type passes on anyway. ``idle_connections``: how many
    connections a worker keeps for the next request."""

    base_url: str = ""
    model: str = ""
    api_key_credential: str | None = None
    output: str = "normalised"
    extra: tuple[str, ...] = ()
    connect_timeout: float = 10.0
    first_event_timeout: float = 60.0
    idle_timeout: float = 60.0
    idle_connections: int = 128
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenAIConfig(ModelConfig):
    """A ``[backends.*]`` table of type ``openai``."""

    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o-mini"
    api: str = "chat"
    include_usage: bool = True


@dataclass(frozen=True, slots=True)
class AnthropicConfig(ModelConfig):
    """A ``[backends.*]`` table of type ``anthropic``. ``max_tokens`` is for handoffs that do not say any."""

    base_url: str = "https://api.anthropic.com/v1"
    model: str = "claude-3-5-haiku-latest"
    max_tokens: int = 4096


@dataclass(frozen=True, slots=True)
class ExecConfig:
    """A ``[backends.*]`` table of type ``exec``; times in seconds. ``max_processes`` is for one worker."""

    command: tuple[str, ...] = ()
    format: str = "text"
    environment: Mapping[str, str] = field(default_factory=dict)
    max_processes: int = 16
    first_event_timeout: float = 60.0
    idle_timeout: float = 60.0
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """A ``[backends.*]`` table of type ``http``; times in seconds. ``headers`` of the client's request go along."""

    url: str = ""
    method: str = "GET"
    path_prefix: str | None = None
    headers: tuple[str, ...] = ("accept", "accept-language", "range", "if-range", "if-none-match", "if-modified-since")
    api_key_credential: str | None = None
    connect_timeout: float = 10.0
    first_byte_timeout: float = 60.0
    idle_timeout: float = 60.0
    idle_connections: int = 128
    fallback: tuple[str, ...] = ()


BackendConfig = DemoConfig | OpenAIConfig | AnthropicConfig | ExecConfig | HttpConfig


@dataclass(frozen=True, slots=True)
class Route:
    """One ``[[routes]]`` table: handoffs that fit everything that is given here go to ``backend``.

    ``path`` holds beginnings of paths; in ``model`` a last ``*`` stands for anything; the others are compared whole.
    ``target`` and ``path`` are known only of envelopes.
    """

    backend: str
    target: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    user: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    output: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file."""

    server: ServerConfig = field(default_factory=ServerConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    access_log: AccessLogConfig = field(default_factory=AccessLogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    default_backend: str = "demo"
    backends: Mapping[str, BackendConfig] = field(default_factory=lambda: {"demo": DemoConfig()})
    # Backends that the application may ask for by name.
    allow_choice: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()


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


def loads(text: str, name: str, seen: list[Key] | None = None) -> Config:
    """Check the text of a file called ``name``; raises ConfigError. ``seen`` receives every key that was asked for."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        number = line[1] if line else text.rstrip().count("\n") + 1
        raise ConfigError([f"{name}:{number}: not valid TOML: {error}"]) from error
    errors: list[str] = []
    top = _Table(_File(name, toml_lines.lines_of(text), errors, [] if seen is None else seen), (), data)
    server = _server(top.table("server"))
    listen = _listen(top.table("listen"))
    limits = _limits(top.table("limits"))
    resume = _resume(top.table("resume"))
    log = _log(top.table("log"))
    access_log = _access_log(top.table("access_log"))
    metrics = _metrics(top.table("metrics"))
    tracing = _tracing(top.table("tracing"))
    backends = _backends(top, errors)
    backend = top.table("backend")
    default = backend.choice("default", "demo" if "demo" in backends else next(iter(backends), "demo"), tuple(backends))
    allow_choice = backend.names("allow_choice", tuple(backends))
    backend.finish()
    routes = tuple(_route(table, tuple(backends)) for table in top.tables("routes"))
    top.finish()
    if errors:
        raise ConfigError(errors)
    return Config(
        server=server,
        listen=listen,
        limits=limits,
        resume=resume,
        log=log,
        access_log=access_log,
        metrics=metrics,
        tracing=tracing,
        default_backend=default,
        backends={key: value for key, value in backends.items() if value is not None},
        allow_choice=allow_choice,
        routes=routes,
    )


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
        head_after=table.number("head_after", default.head_after, 0, 3600),
        first_event_timeout=table.number("first_event_timeout", default.first_event_timeout, 0, 86400),
        max_duration=table.number("max_duration", default.max_duration, 0, 604800),
    )
    table.finish()
    return config


def _listen(table: _Table) -> ListenConfig:
    default = ListenConfig()
    config = ListenConfig(
        message=table.choice("message", default.message, MESSAGES),
        ack=table.boolean("ack", default.ack),
        max_payload=table.integer("max_payload", default.max_payload, 0, 1024**3),
    )
    table.finish()
    return config


def _limits(table: _Table) -> LimitsConfig:
    default = LimitsConfig()
    config = LimitsConfig(
        streams_per_user=table.integer("streams_per_user", default.streams_per_user, 0, 1_000_000),
        streams_per_address=table.integer("streams_per_address", default.streams_per_address, 0, 1_000_000),
        user_rate=table.number("user_rate", default.user_rate, 0, 10_000),
        user_burst=table.integer("user_burst", default.user_burst, 1, 10_000),
        max_buffered=table.integer("max_buffered", default.max_buffered, 0, 1024**4),
    )
    table.finish()
    return config


def _resume(table: _Table) -> ResumeConfig:
    default = ResumeConfig()
    config = ResumeConfig(
        buffer=table.integer("buffer", default.buffer, 0, _LARGEST_KEPT),
        away=table.number("away", default.away, 0, 3600),
        keep=table.number("keep", default.keep, 0, 3600),
    )
    table.finish()
    return config


def _log(table: _Table) -> LogConfig:
    default = LogConfig()
    config = LogConfig(
        level=table.choice("level", default.level, LEVELS),
        content=table.boolean("content", default.content),
    )
    table.finish()
    return config


def _access_log(table: _Table) -> AccessLogConfig:
    default = AccessLogConfig()
    config = AccessLogConfig(
        path=table.path("path", default.path),
        format=table.choice("format", default.format, LOG_FORMATS),
    )
    table.finish()
    return config


def _metrics(table: _Table) -> MetricsConfig:
    config = MetricsConfig(listen=table.local_address("listen", MetricsConfig().listen))
    table.finish()
    return config


def _tracing(table: _Table) -> TracingConfig:
    default = TracingConfig()
    config = TracingConfig(
        endpoint=table.url("endpoint", default.endpoint, network=True),
        ratio=table.number("ratio", default.ratio, 0, 1),
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
            tables.error(name, ": allowed are names of letters, digits, '_', '.' and '-'")
        table = tables.table(name)
        kind = table.choice("type", None, BACKEND_TYPES)
        others = tuple(other for other in tables.keys() if other != name)  # noqa: SIM118 - likewise
        reader = _READERS.get(kind)
        result[name] = None
        if reader is not None:
            result[name] = reader(table, others)
            table.finish()
    if not result and not errors:
        tables.error("", ": is empty: allowed is at least one table like [backends.demo]")
    return result


def _demo(table: _Table, others: tuple[str, ...]) -> DemoConfig:
    pace = table.number("tokens_per_second", DemoConfig().tokens_per_second, 0.1, 10000)
    return DemoConfig(pace, table.names("fallback", others))


def _model(table: _Table, default: ModelConfig) -> dict[str, Any]:
    """What the types for language models have in common."""
    return {
        "base_url": table.url("base_url", default.base_url),
        "model": table.text("model", default.model, 200),
        "api_key_credential": table.credential("api_key_credential"),
        "output": table.choice("output", default.output, OUTPUTS),
        "extra": table.texts("extra", default.extra, _MEMBER, "an array of names of members of the handoff data"),
        "connect_timeout": table.number("connect_timeout", default.connect_timeout, 0.1, 300),
        "first_event_timeout": table.number("first_event_timeout", default.first_event_timeout, 0.1, 3600),
        "idle_timeout": table.number("idle_timeout", default.idle_timeout, 0.1, 3600),
        "idle_connections": table.integer("idle_connections", default.idle_connections, 0, 10_000),
    }


def _openai(table: _Table, others: tuple[str, ...]) -> OpenAIConfig:
    default = OpenAIConfig()
    return OpenAIConfig(
        **_model(table, default),
        api=table.choice("api", default.api, APIS),
        include_usage=table.boolean("include_usage", default.include_usage),
        fallback=table.names("fallback", others),
    )


def _anthropic(table: _Table, others: tuple[str, ...]) -> AnthropicConfig:
    default = AnthropicConfig()
    return AnthropicConfig(
        **_model(table, default),
        max_tokens=table.integer("max_tokens", default.max_tokens, 1, 10_000_000),
        fallback=table.names("fallback", others),
    )


def _exec(table: _Table, others: tuple[str, ...]) -> ExecConfig:
    default = ExecConfig()
    form = 'an array of strings, the first of them the absolute path of a program, like ["/usr/bin/cat", "-u"]'
    command = table.texts("command", None, _ARGUMENT, form)
    if command and not command[0].startswith("/"):
        table.error("command", f' = ["{command[0]}", ...]: allowed is {form}')
    return ExecConfig(
        command=command,
        format=table.choice("format", default.format, EXEC_FORMATS),
        environment=table.strings("environment", _VARIABLE),
        max_processes=table.integer("max_processes", default.max_processes, 1, 10_000),
        first_event_timeout=table.number("first_event_timeout", default.first_event_timeout, 0.1, 3600),
        idle_timeout=table.number("idle_timeout", default.idle_timeout, 0.1, 3600),
        fallback=table.names("fallback", others),
    )


def _http(table: _Table, others: tuple[str, ...]) -> HttpConfig:
    default = HttpConfig()
    return HttpConfig(
        url=table.url("url", None, slash=True),
        method=table.choice("method", default.method, HTTP_METHODS),
        path_prefix=table.path_prefix("path_prefix"),
        headers=table.texts(
            "headers",
            default.headers,
            _HEADER,
            "an array of names of headers that describe the request, not the connection",
        ),
        api_key_credential=table.credential("api_key_credential"),
        connect_timeout=table.number("connect_timeout", default.connect_timeout, 0.1, 300),
        first_byte_timeout=table.number("first_byte_timeout", default.first_byte_timeout, 0.1, 3600),
        idle_timeout=table.number("idle_timeout", default.idle_timeout, 0.1, 3600),
        idle_connections=table.integer("idle_connections", default.idle_connections, 0, 10_000),
        fallback=table.names("fallback", others),
    )


_READERS: Mapping[str, Callable[[_Table, tuple[str, ...]], BackendConfig]] = {
    "demo": _demo,
    "openai": _openai,
    "anthropic": _anthropic,
    "exec": _exec,
    "http": _http,
}


def _route(table: _Table, backends: tuple[str, ...]) -> Route:
    form = "a string or an array of strings, none of them empty"
    route = Route(
        backend=table.choice("backend", None, backends),
        target=table.texts("target", (), _ARGUMENT, form, single=True),
        path=table.texts("path", (), _PATH, form + ', each beginning with "/"', single=True),
        user=table.texts("user", (), _ARGUMENT, form, single=True),
        model=table.texts("model", (), _ARGUMENT, form, single=True),
        output=table.choice("output", "", ("", *OUTPUTS)) or None,
    )
    table.finish()
    return route


class _Table:
    """One TOML table being taken apart: each getter consumes a key, ``finish`` complains about those left over."""

    def __init__(self, file: _File, path: toml_lines.Path, data: object) -> None:
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

    def keys(self) -> list[str]:
        return list(self._data)

    def tables(self, key: str) -> list[_Table]:
        """An array of tables; absent is empty."""
        self._known.append(key)
        value = self._data.get(key, [])
        if isinstance(value, list):
            return [_Table(self._file, (*self._path, key, index), item) for index, item in enumerate(value)]
        self.error(key, f" = {_show(value)}: allowed is an array of tables, each written as [[{key}]]")
        return []

    def table(self, key: str) -> _Table:
        self._known.append(key)
        return _Table(self._file, (*self._path, key), self._data.get(key, {}))

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
        return self._refuse(key, value, form + _did_you_mean(value, allowed), default or "")

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
                return self._refuse(key, item, form + _did_you_mean(item, allowed), ())
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
        if isinstance(value, str) and _NAME.fullmatch(value):
            return value
        return self._refuse(key, value, form, None)

    def finish(self) -> None:
        """Report every key that no getter asked for."""
        for key in self._data:
            if key not in self._known:
                allowed = ", ".join(self._known)
                close = _did_you_mean(key, tuple(self._known))
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


def _did_you_mean(value: object, allowed: tuple[str, ...]) -> str:
    # Only for those who have misspelt something; clients wait while the others start.
    import difflib  # noqa: PLC0415

    close = difflib.get_close_matches(str(value), allowed, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
