"""The configuration file: TOML in, frozen dataclasses out.

The rules of this room: every key has its type, its range and its default here and nowhere else; a file is either
wholly valid or refused with *all* its errors at once. How a table is taken apart, and what an error says, is
``toml_table``'s.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import toml_lines
from .toml_table import NAME, ConfigError, File, Key, Table

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
# A member of the handoff data that may be passed on; not those that decide how the answer is read.
_MEMBER = re.compile(r"(?!stream$|stream_options$|n$|messages$|input$)[A-Za-z0-9_.-]{1,64}")
_ARGUMENT = re.compile(r"[^\x00]{1,4096}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_PATH = re.compile(r"/[!-~]{0,1000}")
_HEADER = re.compile(
    r"(?!(?:host|connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|content-.*|expect|user-agent)$)"
    r"[a-z0-9][a-z0-9-]{0,63}",
    re.IGNORECASE,
)


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
    top = Table(File(name, toml_lines.lines_of(text), errors, [] if seen is None else seen), (), data)
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


def warnings_of(config: Config) -> list[str]:
    """What is allowed and hardly meant: a sentence each, with key, value and what to write instead."""
    warnings = []
    for name, backend in config.backends.items():
        url = getattr(backend, "url", "") or getattr(backend, "base_url", "")
        credential = getattr(backend, "api_key_credential", None)
        host = urlsplit(url).hostname if url.startswith("http://") else None
        if credential and host and not _is_local(host):
            key = "url" if isinstance(backend, HttpConfig) else "base_url"
            warnings.append(
                f'backends.{name}.{key} = "{url}": the key in the credential {credential} crosses the network in plain '
                "text; use https, or a proxy on this host"
            )
    return warnings


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _server(table: Table) -> ServerConfig:
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


def _listen(table: Table) -> ListenConfig:
    default = ListenConfig()
    config = ListenConfig(
        message=table.choice("message", default.message, MESSAGES),
        ack=table.boolean("ack", default.ack),
        max_payload=table.integer("max_payload", default.max_payload, 0, 1024**3),
    )
    table.finish()
    return config


def _limits(table: Table) -> LimitsConfig:
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


def _resume(table: Table) -> ResumeConfig:
    default = ResumeConfig()
    config = ResumeConfig(
        buffer=table.integer("buffer", default.buffer, 0, _LARGEST_KEPT),
        away=table.number("away", default.away, 0, 3600),
        keep=table.number("keep", default.keep, 0, 3600),
    )
    table.finish()
    return config


def _log(table: Table) -> LogConfig:
    default = LogConfig()
    config = LogConfig(
        level=table.choice("level", default.level, LEVELS),
        content=table.boolean("content", default.content),
    )
    table.finish()
    return config


def _access_log(table: Table) -> AccessLogConfig:
    default = AccessLogConfig()
    config = AccessLogConfig(
        path=table.path("path", default.path),
        format=table.choice("format", default.format, LOG_FORMATS),
    )
    table.finish()
    return config


def _metrics(table: Table) -> MetricsConfig:
    config = MetricsConfig(listen=table.local_address("listen", MetricsConfig().listen))
    table.finish()
    return config


def _tracing(table: Table) -> TracingConfig:
    default = TracingConfig()
    config = TracingConfig(
        endpoint=table.url("endpoint", default.endpoint, network=True),
        ratio=table.number("ratio", default.ratio, 0, 1),
    )
    table.finish()
    return config


def _backends(top: Table, errors: list[str]) -> dict[str, BackendConfig | None]:
    """The ``[backends.*]`` tables; a faulty one stays in as None so that its name still counts as defined."""
    if not top.has("backends"):
        return {"demo": DemoConfig()}
    tables = top.table("backends")
    result: dict[str, BackendConfig | None] = {}
    for name in tables.given():
        if not NAME.fullmatch(name):
            tables.error(name, ": allowed are names of letters, digits, '_', '.' and '-'")
        table = tables.table(name)
        kind = table.choice("type", None, BACKEND_TYPES)
        others = tuple(other for other in tables.given() if other != name)
        reader = _READERS.get(kind)
        result[name] = None
        if reader is not None:
            result[name] = reader(table, others)
            table.finish()
    if not result and not errors:
        tables.error("", ": is empty: allowed is at least one table like [backends.demo]")
    return result


def _demo(table: Table, others: tuple[str, ...]) -> DemoConfig:
    pace = table.number("tokens_per_second", DemoConfig().tokens_per_second, 0.1, 10000)
    return DemoConfig(pace, table.names("fallback", others))


def _model(table: Table, default: ModelConfig) -> dict[str, Any]:
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


def _openai(table: Table, others: tuple[str, ...]) -> OpenAIConfig:
    default = OpenAIConfig()
    return OpenAIConfig(
        **_model(table, default),
        api=table.choice("api", default.api, APIS),
        include_usage=table.boolean("include_usage", default.include_usage),
        fallback=table.names("fallback", others),
    )


def _anthropic(table: Table, others: tuple[str, ...]) -> AnthropicConfig:
    default = AnthropicConfig()
    return AnthropicConfig(
        **_model(table, default),
        max_tokens=table.integer("max_tokens", default.max_tokens, 1, 10_000_000),
        fallback=table.names("fallback", others),
    )


def _exec(table: Table, others: tuple[str, ...]) -> ExecConfig:
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


def _http(table: Table, others: tuple[str, ...]) -> HttpConfig:
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


_READERS: Mapping[str, Callable[[Table, tuple[str, ...]], BackendConfig]] = {
    "demo": _demo,
    "openai": _openai,
    "anthropic": _anthropic,
    "exec": _exec,
    "http": _http,
}


def _route(table: Table, backends: tuple[str, ...]) -> Route:
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
