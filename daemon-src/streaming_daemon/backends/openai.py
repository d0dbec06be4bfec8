"""OpenAI-compatible chat completions, streamed.

Three objects: ``OpenAIBackend`` keeps the configuration and the idle connections, ``_Connection`` is one TCP or TLS
connection with its HTTP parser, ``_Call`` is one answer. A call has a connection from the moment that connects until
the answer is complete; a connection without a call is idle in the pool, reading off the end of a response, or closed.

No callback of the parser calls the sink: what a portion of bytes brought is collected first and passed on when the
parser is done with it, so that a sink may cancel the call without pulling the parser out from under itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import ssl
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from .. import __version__
from ..config import OpenAIConfig
from ..handoff import Handoff, HandoffError
from ..limits import MAX_EVENT
from ..wheel import Timed, TimerWheel
from .base import BackendSetupError, Failure, Sink
from .sse import Event, SSEError, SSEReader

_MAX_IDLE = 64
_IDLE_SECONDS = 30.0
# How long the end of a response may take to follow its last event before the connection is not worth keeping.
_TRAILER_SECONDS = 2.0
_MAX_ERROR_BODY = 16 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_RETRY_AFTER = re.compile(rb"[0-9]{1,9}|[A-Za-z]{3}, [A-Za-z0-9: ]{20,26}")

_UNAVAILABLE = "The language model service cannot be reached."
_TIMEOUT = "The language model service did not answer in time."
_BROKEN = "The language model service broke off its answer."
_REFUSED = "The language model service refused the request."
_STRANGE = "The language model service sent something that is not an answer."


def _failure(status: int, kind: str, message: str, detail: str, retry_after: str | None = None) -> Failure:
    return Failure(status, f"backend_{kind}", message, detail, retry_after)


def read_credential(name: str) -> str:
    """The key in the systemd credential ``name``; raises BackendSetupError, never with the key in it."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise BackendSetupError(
            f"api_key_credential names {name}, but $CREDENTIALS_DIRECTORY is not set: "
            f"add LoadCredential={name}:FILE to the unit"
        )
    try:
        key = (Path(directory) / name).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise BackendSetupError(f"credential {name} in {directory} cannot be used: {reason}") from None
    if not key or not key.isprintable() or " " in key:
        raise BackendSetupError(f"credential {name} in {directory} must be one line of printable text without spaces")
    return key


class OpenAIBackend:
    """Type ``openai``."""

    def __init__(self, name: str, config: OpenAIConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> None:
        self.name = name
        self.config = config
        self.loop = loop
        self.wheel = wheel
        url = urlsplit(config.base_url)
        self.host = url.hostname or ""
        self.port = url.port or (443 if url.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if url.scheme == "https" else None
        key = read_credential(config.api_key_credential) if config.api_key_credential else None
        self._head = (
            f"POST {url.path.rstrip('/')}/chat/completions HTTP/1.1\r\n"
            f"Host: {url.netloc}\r\n"
            f"User-Agent: streaming-daemon/{__version__}\r\n"
            "Accept: text/event-stream\r\n"
            "Accept-Encoding: identity\r\n"
            "Content-Type: application/json\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")
        ).encode("ascii")
        self._idle: list[_Connection] = []

    def start(self, handoff: Handoff, sink: Sink) -> _Call:
        body: dict[str, Any] = {
            "model": handoff.model or self.config.model,
            "messages": handoff.conversation(),
            "stream": True,
        }
        if handoff.max_tokens is not None:
            body["max_tokens"] = handoff.max_tokens
        if handoff.temperature is not None:
            body["temperature"] = handoff.temperature
        try:
            content = json.dumps(body, separators=(",", ":")).encode("ascii")
        except RecursionError as error:
            # Reading JSON and writing it give up at different depths.
            raise HandoffError("messages", "nested too deeply", "a conversation") from error
        request = self._head + f"Content-Length: {len(content)}\r\n\r\n".encode("ascii") + content
        return _Call(self, sink, request)

    def take_idle(self) -> _Connection | None:
        """A connection that was good when last seen; it may have been closed by the other side since."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
        return None

    def keep(self, connection: _Connection) -> None:
        if len(self._idle) < _MAX_IDLE:
            self._idle.append(connection)
            self.wheel.set(connection, self.wheel.now() + _IDLE_SECONDS)
        else:
            connection.close()

    def forget(self, connection: _Connection) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def close(self) -> None:
        for connection in list(self._idle):
            connection.close()


class _Call(Timed):
    """One answer: connect, send, read events, report."""

    __slots__ = (
        "_announced",
        "_answered",
        "_backend",
        "_connection",
        "_error",
        "_finished",
        "_last",
        "_request",
        "_reused",
        "_sink",
        "_sse",
        "_task",
        "_texts",
    )

    def __init__(self, backend: OpenAIBackend, sink: Sink, request: bytes) -> None:
        super().__init__()
        self._backend = backend
        self._sink: Sink | None = sink
        self._request = request
        self._sse = SSEReader(MAX_EVENT)
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._texts: list[str] = []
        self._answered = False
        self._announced = False
        # The model said why it stopped, or the stream said [DONE]: a connection that ends now ends in order.
        self._finished = False
        self._error: Failure | None = None
        self._last = 0.0
        self._reused = False
        connection = backend.take_idle()
        if connection is not None:
            self._reused = True
            self._send(connection)
        else:
            self._task = backend.loop.create_task(self._connect())

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()
            self._backend.wheel.cancel(self)

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()
            self._last = self._backend.wheel.now()
            self._watch()

    def cancel(self) -> None:
        self._sink = None
        self._backend.wheel.cancel(self)
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def on_timer(self, now: float) -> None:
        config = self._backend.config
        if not self._answered and now >= self._last + config.first_event_timeout:
            late = f"no event within {config.first_event_timeout:g} s of the request"
            self._fail(self._refusal() or _failure(504, "timeout", _TIMEOUT, late))
        elif self._answered and now >= self._last + config.idle_timeout:
            self._fail(_failure(504, "timeout", _TIMEOUT, f"silent for {config.idle_timeout:g} s in mid-answer"))
        else:
            self._watch()

    async def _connect(self) -> None:
        backend = self._backend
        where = f"{backend.host}:{backend.port}"
        try:
            async with asyncio.timeout(backend.config.connect_timeout):
                _, connection = await backend.loop.create_connection(
                    lambda: _Connection(backend), backend.host, backend.port, ssl=backend.tls
                )
        except TimeoutError:
            detail = f"no connection to {where} within {backend.config.connect_timeout:g} s"
            self._task = None
            self._fail(_failure(504, "timeout", _TIMEOUT, detail))
        except (OSError, ValueError) as error:
            # ValueError: a host name that cannot be encoded for DNS.
            self._task = None
            self._fail(_failure(502, "unavailable", _UNAVAILABLE, f"cannot connect to {where}: {error}"))
        else:
            self._task = None
            if connection.usable():
                self._send(connection)
            else:
                self._fail(_failure(502, "unavailable", _UNAVAILABLE, f"{where} closed the connection at once"))

    def _send(self, connection: _Connection) -> None:
        self._connection = connection
        connection.carry(self, self._request)
        self._last = self._backend.wheel.now()
        self._watch()

    def _watch(self) -> None:
        config = self._backend.config
        timeout = config.idle_timeout if self._answered else config.first_event_timeout
        self._backend.wheel.set(self, self._last + timeout)

    # From the connection: body() within the parser, then received(); lost() instead of received() at the end.

    def body(self, chunk: bytes) -> None:
        """Part of the body of a 2xx response."""
        if self._error is not None or self._finished_stream():
            return
        try:
            events = self._sse.feed(chunk)
        except SSEError as error:
            self._error = _failure(502, "protocol", _STRANGE, str(error))
            return
        for event in events:
            self._event(event)
            if self._error is not None or self._finished_stream():
                return

    def received(self) -> None:
        """The parser is done with a portion of bytes: pass on what it brought."""
        connection = self._connection
        if self._sink is None or connection is None:
            return
        if self._answered:
            self._last = self._backend.wheel.now()
        if self._texts or (self._answered and not self._announced):
            if not self._announced:
                self._announced = True
                # From the deadline of the first event to that of the next, which may be sooner.
                self._watch()
            texts, self._texts = self._texts, []
            self._sink.content(texts)
            if self._sink is None:
                return
        if self._error is not None:
            self._fail(self._error)
        elif self._finished_stream():
            self._succeed()
        elif connection.complete:
            self._ended()

    def lost(self, reason: str) -> None:
        """The connection is gone and with it the rest of the response."""
        connection, self._connection = self._connection, None
        if self._sink is None or connection is None:
            return
        if self._reused and connection.silent:
            # The other side closed an idle connection just as it was taken from the pool: that is nobody's failure.
            self._reused = False
            self._backend.wheel.cancel(self)
            self._task = self._backend.loop.create_task(self._connect())
            return
        self._connection = connection
        self._ended(reason)

    def broken(self, detail: str) -> None:
        """The other side does not speak HTTP."""
        self._fail(_failure(502, "protocol", _STRANGE, detail))

    def _ended(self, reason: str = "") -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._fail(refusal)
        elif self._finished:
            self._succeed()
        else:
            detail = "the response ended before the answer did" + (f" ({reason})" if reason else "")
            self._fail(_failure(502, "aborted", _BROKEN, detail))

    def _finished_stream(self) -> bool:
        return self._connection is not None and self._connection.saw_done

    def _event(self, event: Event) -> None:
        if event.data == "[DONE]":
            self._answered = self._finished = True
            if self._connection is not None:
                self._connection.saw_done = True
            return
        try:
            value = json.loads(event.data)
        except (ValueError, RecursionError):
            self._error = _failure(502, "protocol", _STRANGE, "an event is not valid JSON")
            return
        if not isinstance(value, dict):
            self._error = _failure(502, "protocol", _STRANGE, "an event is not a JSON object")
            return
        if value.get("error") or event.name == "error":
            self._error = _failure(502, "error", _BROKEN, f"error in the stream: {_error_code(value)}")
            return
        choices = value.get("choices")
        # The chunk with the usage figures has no choices at all.
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return
        self._answered = True
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(text, str) and text:
            self._texts.append(text)
        if choice.get("finish_reason"):
            self._finished = True

    def _refusal(self) -> Failure | None:
        """What a response that is not an event stream means for the client; None where it is one, or none is here."""
        connection = self._connection
        if connection is None or not connection.status:
            return None
        status = connection.status
        detail = f"status {status} {_error_code(connection.error_body())}"
        if 200 <= status < 300:
            if connection.is_event_stream:
                return None
            return _failure(502, "protocol", _STRANGE, f"status {status} with a body that is not text/event-stream")
        if status == 429:
            message = "The language model service is over its limit; try again later."
            return _failure(429, "rate_limited", message, detail, connection.retry_after)
        if status in (408, 504):
            return _failure(504, "timeout", _TIMEOUT, detail)
        kind, message = ("unavailable", _UNAVAILABLE) if status == 503 else ("error", _REFUSED)
        return _failure(502, kind, message, detail, connection.retry_after)

    def _fail(self, failure: Failure) -> None:
        sink = self._sink
        self.cancel()
        if sink is not None:
            sink.failed(failure)

    def _succeed(self) -> None:
        sink, connection = self._sink, self._connection
        self._connection = None
        self.cancel()
        if connection is not None:
            connection.release()
        if sink is not None:
            sink.done()


class _Connection(Timed, asyncio.Protocol):
    """One connection and the response on it. Holds at most one call at a time."""

    def __init__(self, backend: OpenAIBackend) -> None:
        super().__init__()
        self._backend = backend
        self._transport: asyncio.Transport | None = None
        self._call: _Call | None = None
        self._parser: Any = None
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._error_body = bytearray()
        self._content_type = b""
        self.retry_after: str | None = None
        self.status = 0
        self.silent = True
        self.complete = False
        self.saw_done = False
        self._keep_alive = False
        self._paused = False

    @property
    def is_event_stream(self) -> bool:
        return not self._content_type or self._content_type.split(b";")[0].strip().lower() == b"text/event-stream"

    def error_body(self) -> object:
        try:
            return json.loads(bytes(self._error_body))
        except (ValueError, RecursionError):
            return None

    def usable(self) -> bool:
        self._backend.wheel.cancel(self)
        return self._transport is not None and not self._transport.is_closing()

    def carry(self, call: _Call, request: bytes) -> None:
        self._reset()
        self._call = call
        assert self._transport is not None  # noqa: S101 - connection_made comes before anybody gets to see a connection
        self._transport.write(request)

    def pause(self) -> None:
        if self._transport is not None and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._paused and not self._transport.is_closing():
            self._transport.resume_reading()
        self._paused = False

    def release(self) -> None:
        """The call has its answer: keep the connection once the response is at its end, if it may be kept."""
        self._call = None
        if self.complete and self._keep_alive:
            self._backend.keep(self)
        elif self.complete or self._transport is None:
            self.close()
        else:
            self.resume()
            self._backend.wheel.set(self, self._backend.wheel.now() + _TRAILER_SECONDS)

    def close(self) -> None:
        self._drop()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close without the courtesies of TLS, which could take their time."""
        self._drop()
        if self._transport is not None:
            self._transport.abort()

    def _drop(self) -> None:
        self._call = None
        self._backend.wheel.cancel(self)
        self._backend.forget(self)

    def on_timer(self, now: float) -> None:
        self.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not of this class, only of its kind.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.silent = False
        idle = self._call is None and self.complete
        try:
            if idle:
                raise httptools.HttpParserError("bytes outside of a response")
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            call, self._call = self._call, None
            if call is not None:
                call.received()
                call.broken(f"not HTTP: {error}")
            self.close()
            return
        if self._call is not None:
            self._call.received()
        elif self.complete:
            self.release()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        call = self._call
        self._drop()
        if call is not None:
            call.lost(str(exc) if exc else "connection closed")

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._content_type = value
        elif name == b"retry-after" and _RETRY_AFTER.fullmatch(value):
            self.retry_after = value.decode("ascii")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        # 1xx comes before the response and says nothing about it.
        if status >= 200:
            self.status = status
            self._keep_alive = self._parser.should_keep_alive()

    def on_body(self, chunk: bytes) -> None:
        if self._call is None:
            return
        if 200 <= self.status < 300 and self.is_event_stream:
            self._call.body(chunk)
        elif len(self._error_body) < _MAX_ERROR_BODY:
            self._error_body += chunk

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True


def _error_code(value: object) -> str:
    """The short name of an error as OpenAI's API gives it. Its message is left out: it may quote the key."""
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        for name in ("code", "type"):
            code = str(error.get(name) or "")
            if _TOKEN.fullmatch(code):
                return code
    return "(no error code)"
