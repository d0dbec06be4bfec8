"""Any HTTP server, its response passed on as it is: what X-Accel-Redirect is used for elsewhere.

Where the response comes from is the configuration's to say. The application may name a path below ``path_prefix``, if
there is one, and nothing else; of the client's request only the headers listed in ``headers`` go along.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable

from .. import __version__
from ..config import HttpConfig
from ..envelope import Header, Request
from ..handoff import Handoff, HandoffError
from ..limits import RETRY_AFTER
from ..wheel import TimerWheel
from .base import Failure, Sink
from .http_client import Client, Exchange, Pair
from .llm import OVERLOADED, read_credential

# Between two hops (RFC 9110 section 7.6.1), or how this connection and no other is framed.
_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"),
        *("proxy-authentication-info", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
# Everything but letters, digits and what RFC 3986 allows in a path and a query; a percent sign needs two digits.
_PATH = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
# Written so, these would be taken apart by some servers and not by others.
# Also encoded twice: some servers decode twice.
_HIDDEN = re.compile(r"%(?:25)*(?:2[ef]|5c|00)", re.IGNORECASE)
_CONTROL = re.compile(rb"[\x00\r\n]")

_MESSAGES = {
    "unavailable": (502, "The service behind this one cannot be reached."),
    "timeout": (504, "The service behind this one did not answer in time."),
    "protocol": (502, "The service behind this one sent something that is not an answer."),
    "exhausted": (503, OVERLOADED),
    "aborted": (502, "The service behind this one broke off its answer."),
}


class HttpBackend:
    """Type ``http``."""

    # Its responses come with a head of their own.
    passes_on = True

    def __init__(self, name: str, config: HttpConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> None:
        self.name = name
        self.config = config
        self.client = Client(
            config.url, loop, wheel, connect_timeout=config.connect_timeout, most_idle=config.idle_connections
        )
        key = read_credential(config.api_key_credential) if config.api_key_credential else None
        self._wanted = frozenset(name.lower() for name in config.headers)
        self._fixed = (
            f"Host: {self.client.authority}\r\nUser-Agent: streaming-daemon/{__version__}\r\n"
            + (f"Authorization: Bearer {key}\r\n" if key else "")
            + ("" if "accept-encoding" in self._wanted else "Accept-Encoding: identity\r\n")
        )

    def start(self, handoff: Handoff, request: Request | None, sink: Sink) -> HttpCall:
        path = below(handoff.members.get("path"), self.config.path_prefix)
        target = self.client.full_path if path is None else self.client.path + path
        method = self.config.method
        if method == "GET" and request is not None and request.method == "HEAD":
            # The sink wants no more than the head, and ends the call with it.
            method = "HEAD"
        lines = [f"{method} {target} HTTP/1.1\r\n", self._fixed]
        content = b""
        if method == "POST":
            try:
                content = json.dumps(handoff.members).encode("ascii")
            except RecursionError as error:
                raise HandoffError("the handoff data", "nested too deeply", "a JSON object") from error
            lines.append(f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n")
        if request is not None and self._wanted:
            lines += [f"{name}: {value}\r\n" for name, value in request.headers if name.lower() in self._wanted]
        lines.append("\r\n")
        return HttpCall(self, sink, "".join(lines).encode("utf-8", "replace") + content)

    def close(self) -> None:
        self.client.close()


def below(path: object, prefix: str | None) -> str | None:
    """The application's path, where it is one below ``prefix``; raises HandoffError for any other."""
    if path is None:
        return None
    if prefix is None:
        raise HandoffError("path", "", "is there: this backend has only one address")
    form = f"a path below {prefix}, maybe with a query, percent-encoded and without empty, '.' and '..' segments"
    if not isinstance(path, str):
        raise HandoffError("path", "no string", form)
    place, mark, query = path.partition("?")
    segments = place.split("/")[1:]
    if (
        not place.startswith(prefix)
        or not _PATH.fullmatch(place)
        or _HIDDEN.search(place)
        or any(segment.partition(";")[0] in (".", "..") for segment in segments)  # Tomcat takes "..;x" for ".."
        or "" in segments[:-1]
        or not _QUERY.fullmatch(query)
    ):
        raise HandoffError("path", "a string of another form", form)
    return place + mark + query


class HttpCall(Exchange):
    """One response."""

    __slots__ = ("_body", "_ended", "_head", "_sink")

    def __init__(self, backend: HttpBackend, sink: Sink, request: bytes) -> None:
        config = backend.config
        super().__init__(backend.client, request, config.first_byte_timeout, config.idle_timeout)
        self._sink: Sink | None = sink
        self._head: tuple[int, tuple[Header, ...]] | None = None
        self._body: list[bytes] = []

    def cancel(self) -> None:
        self._sink = None
        self.abandon()

    def on_head(self, status: int, headers: list[Pair]) -> None:
        self._head = (status, tuple(end_to_end(headers)))
        self.answered()

    def on_body(self, chunk: bytes) -> None:
        self.progressed()
        self._body.append(chunk)

    def on_portion(self) -> None:
        sink, head = self._sink, self._head
        if sink is not None and head is not None and head[0]:
            # From now on it is only known that there was one.
            self._head = (0, ())
            sink.head(*head)
        if self._sink is not None and self._body and sink is not None:
            body, self._body = self._body, []
            sink.body(body[0] if len(body) == 1 else b"".join(body))

    def on_end(self, reason: str) -> None:
        if reason:
            self.on_failure("aborted", f"the response was cut off ({reason})")
            return
        self.on_portion()
        sink, self._sink = self._sink, None
        self.release()
        if sink is not None:
            sink.done()

    def on_failure(self, kind: str, detail: str) -> None:
        self.on_portion()
        sink = self._sink
        self.cancel()
        if sink is not None:
            status, message = _MESSAGES[kind]
            after = str(RETRY_AFTER) if kind == "exhausted" else None
            sink.failed(Failure(status, f"backend_{kind}", message, detail, after, retryable=self._head is None))


def end_to_end(headers: Iterable[Pair]) -> Iterable[Header]:
    """The headers that are for the client, as text."""
    headers = list(headers)
    dropped = set(_HOP_BY_HOP)
    for name, value in headers:
        if name.lower() == b"connection":
            dropped.update(option.strip().lower() for option in value.decode("latin-1").split(","))
    for name, value in headers:
        if not _CONTROL.search(value):
            text = name.decode("latin-1")
            if text.lower() not in dropped:
                # Bytes that are no UTF-8 are older than it, and pass as they are (RFC 9110 section 5.5).
                yield text, value.decode("utf-8", "surrogateescape")
