"""An HTTP/1.1 client for answers that take minutes, on connections that are used again.

Three objects: a ``Client`` is one server and the idle connections to it, a ``_Connection`` is one TCP, TLS or Unix
connection with its parser, and an ``Exchange`` is one request with its response. An exchange has a connection from the
moment that connects until the response is complete; a connection without an exchange is idle in the pool, reading off
the end of a response, or closed.

Whoever uses it derives from ``Exchange`` and overrides the four methods at its end. ``on_head`` and ``on_body`` are
called within the parser and only take notes. ``on_portion`` and ``on_end`` are called when the parser is done with a
portion of bytes, and only they, and what they call, may cancel: the parser must not be pulled out from under itself.

HTTP/2 is left out. One connection for many streams saves handshakes, and the pool saves most of them too; its price
here would be a library that costs 20 us per frame or one that costs 50 KB per stream. A server that needs it is
reached through a local proxy, as ``unix:/run/proxy.sock:/v1``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from .. import descriptors
from ..wheel import Timed, TimerWheel

IDLE_SECONDS = 30.0
# How long the end of a response may take to follow its last event before the connection is not worth keeping.
_TRAILER_SECONDS = 2.0
# Header lines of a response; more is nobody's honest answer.
_MAX_HEADERS = 200
_PARSER_ERRORS = (httptools.HttpParserError, httptools.HttpParserUpgrade)
_UNIX = re.compile(r"unix:(?P<socket>/[^:]+)(?::(?P<path>/.*)?)?")

Pair = tuple[bytes, bytes]


class Client:
    """One server, as its base URL names it: ``http://``, ``https://`` or ``unix:/path/of.sock:/path``."""

    def __init__(
        self,
        base_url: str,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        *,
        connect_timeout: float,
        most_idle: int,
    ) -> None:
        self.loop = loop
        self.wheel = wheel
        self.connect_timeout = connect_timeout
        # For the metrics: connections that were made, requests that did without making one.
        self.opened = 0
        self.reused = 0
        self._most_idle = most_idle
        self._idle: list[_Connection] = []
        self._tls: ssl.SSLContext | None = None
        unix = _UNIX.fullmatch(base_url)
        self._socket = unix["socket"] if unix else ""
        url = urlsplit("http://localhost" + (unix["path"] or "") if unix else base_url)
        self.authority = url.netloc
        self.path = url.path.rstrip("/")
        self.full_path = url.path or "/"
        self._host = url.hostname or ""
        self._is_literal = _is_literal(self._host)
        self._ceiling = descriptors.ceiling()
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self.where = self._socket or f"{self._host}:{self._port}"
        if url.scheme == "https":
            self._tls = ssl.create_default_context()

    def take_idle(self) -> _Connection | None:
        """A connection that was good when last seen; it may have been closed by the other side since."""
        while self._idle:
            # The last one in: the fewer are in use, the more of the others grow old enough to be closed.
            connection = self._idle.pop()
            if connection.usable():
                self.reused += 1
                return connection
        return None

    async def connect(self) -> _Connection:
        """A new connection; raises TimeoutError, NoDescriptorError, OSError, or ValueError for a name that DNS cannot
        encode."""
        before = descriptors.shortages.count
        try:
            # Before anything else, so that nobody waits for a name whose address he could do nothing with.
            reserved = descriptors.Reservation(1, self._ceiling)
            try:
                deadline = self.loop.time() + self.connect_timeout
                async with asyncio.timeout_at(deadline):
                    connection = await self._reach(reserved, deadline)
            finally:
                reserved.release()
        except OSError as error:
            if error.errno in descriptors.LACK or (_is_vague(error) and descriptors.lacking_since(before)):
                raise NoDescriptorError(f"no descriptor was left: {error}") from error
            raise
        self.opened += 1
        return connection

    async def _reach(self, reserved: descriptors.Reservation, deadline: float) -> _Connection:
        """``reserved`` is the descriptor for it. Of several addresses the first that answers."""
        if self._socket:
            reserved.release()
            _, connection = await self.loop.create_unix_connection(lambda: _Connection(self), self._socket)
            return connection
        failures: list[tuple[str, OSError]] = []
        addresses = await self._addresses()
        for number, address in enumerate(addresses):
            if failures:
                reserved.reserve()
            reserved.release()
            try:
                # Whoever does not answer leaves as much time to each of the others.
                async with asyncio.timeout((deadline - self.loop.time()) / (len(addresses) - number)):
                    _, connection = await self.loop.create_connection(
                        lambda: _Connection(self),
                        address,
                        self._port,
                        ssl=self._tls,
                        server_hostname=self._host if self._tls is not None else None,
                    )
                    return connection
            except OSError as error:
                failures.append((address, error))
        raise _all_of(failures)

    async def _addresses(self) -> list[str]:
        """Where the server is, in the order in which the resolver would have it tried."""
        if self._is_literal:
            return [self._host]
        # Never an empty list: a name without addresses is an error.
        found = await self.loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose response is complete."""
        if len(self._idle) < self._most_idle:
            self._idle.append(connection)
            self.wheel.set(connection, self.wheel.now() + IDLE_SECONDS)
        else:
            connection.close()

    def give_up_idle(self) -> bool:
        """Close what is kept for later, for somebody who needs the descriptors now; false where there was nothing."""
        idle = list(self._idle)
        for connection in idle:
            connection.abort()
        return bool(idle)

    def forget(self, connection: _Connection) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def close(self) -> None:
        for connection in list(self._idle):
            connection.close()


class Exchange(Timed):
    """One request and its response: connect, send, hand on what comes, mind the deadlines."""

    __slots__ = ("_answered", "_client", "_connection", "_first", "_idle", "_last", "_request", "_reused", "_task")

    def __init__(self, client: Client, request: bytes, first_timeout: float, idle_timeout: float) -> None:
        """``first_timeout`` is for all until ``answered``, ``idle_timeout`` for any silence after it; in seconds."""
        super().__init__()
        self._client = client
        self._request = request
        self._first = first_timeout
        self._idle = idle_timeout
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._answered = False
        self._reused = False
        self._last = client.wheel.now()
        connection = client.take_idle()
        if connection is not None:
            self._reused = True
            self._send(connection)
        else:
            self._task = client.loop.create_task(self._connect())

    # For those who derive

    def answered(self) -> None:
        """The answer proper has begun: from here on silence has its own, maybe shorter, deadline."""
        if not self._answered:
            self._answered = True
            self._last = self._client.wheel.now()
            self._watch()

    def progressed(self) -> None:
        """More of the answer proper: only this, and no comment that a server sends instead, puts the deadline off."""
        if self._answered:
            self._last = self._client.wheel.now()

    def pause(self) -> None:
        """Read nothing until ``resume``; no deadline runs."""
        if self._connection is not None:
            self._connection.pause()
            self._client.wheel.cancel(self)

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()
            self._last = self._client.wheel.now()
            self._watch()

    def abandon(self) -> None:
        """Close the connection, whatever state it is in; nothing is heard of this exchange any more."""
        self._client.wheel.cancel(self)
        if self._task is not None:
            self._task.cancel()
            self._task = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def release(self) -> None:
        """All that matters of the response is here: keep the connection if it may be kept."""
        self._client.wheel.cancel(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def on_head(self, status: int, headers: list[Pair]) -> None:
        """The head of the response. Within the parser."""
        raise NotImplementedError

    def on_body(self, chunk: bytes) -> None:
        """Part of its body. Within the parser."""
        raise NotImplementedError

    def on_portion(self) -> None:
        """The parser is done with a portion of bytes. Not called for the last one."""
        raise NotImplementedError

    def on_end(self, reason: str) -> None:
        """The parser is done with the last portion: the response is complete where ``reason`` is empty, cut off where
        it is not."""
        raise NotImplementedError

    def on_failure(self, kind: str, detail: str) -> None:
        """There is no (more) response. ``kind``: unavailable, timeout, protocol, or exhausted for want of descriptors
        here."""
        raise NotImplementedError

    # Inside

    async def _connect(self) -> None:
        where = self._client.where
        try:
            try:
                connection = await self._client.connect()
            except NoDescriptorError:
                if not self._client.give_up_idle():
                    raise
                # What is closed now is free after this turn of the loop.
                await asyncio.sleep(0)
                connection = await self._client.connect()
        except TimeoutError:
            self._task = None
            self.on_failure("timeout", f"no connection to {where} within {self._client.connect_timeout:g} s")
        except NoDescriptorError as error:
            self._task = None
            self.on_failure("exhausted", f"cannot connect to {where}: {error}: raise LimitNOFILE or lower max_streams")
        except (OSError, ValueError) as error:
            # ValueError: a host name that cannot be encoded for DNS.
            self._task = None
            detail = "; ".join([str(error), *getattr(error, "__notes__", [])])
            self.on_failure("unavailable", f"cannot connect to {where}: {detail}")
        else:
            self._task = None
            if connection.usable():
                self._send(connection)
            else:
                self.on_failure("unavailable", f"{where} closed the connection at once")

    def _send(self, connection: _Connection) -> None:
        self._connection = connection
        request = self._request
        if not self._reused:
            # It will not be sent again.
            self._request = b""
        self._last = self._client.wheel.now()
        self._watch()
        connection.carry(self, request)

    def _watch(self) -> None:
        self._client.wheel.set(self, self._last + (self._idle if self._answered else self._first))

    def on_timer(self, now: float) -> None:
        if now < self._last + (self._idle if self._answered else self._first):
            self._watch()
        elif self._answered:
            self.on_failure("timeout", f"silent for {self._idle:g} s in mid-answer")
        else:
            self.on_failure("timeout", f"no event within {self._first:g} s of the request")

    # From the connection

    def received(self, complete: bool) -> None:
        self._request = b""
        if complete:
            self.on_end("")
        else:
            self.on_portion()

    def lost(self, reason: str, silent: bool, ended: bool) -> None:
        self._connection = None
        self._client.wheel.cancel(self)
        if self._reused and silent:
            # The other side closed an idle connection just as it was taken from the pool: that is nobody's failure.
            self._reused = False
            self._task = self._client.loop.create_task(self._connect())
        else:
            self.on_end("" if ended else reason)

    def broken(self, detail: str) -> None:
        self.on_failure("protocol", detail)


class NoDescriptorError(Exception):
    """There is no descriptor for a connection, or there was none on the way to it."""


def _is_vague(error: OSError) -> bool:
    """Whether its cause may be that a file could not be opened: resolvers and TLS open some, and say anything but that.
    Of a resolver it is "Name or service not known", of a certificate "unable to get local issuer certificate"."""
    return isinstance(error, socket.gaierror | ssl.SSLError)


def _all_of(failures: list[tuple[str, OSError]]) -> OSError:
    """What is told of a server none of whose addresses can be reached: silence is the least that can be said."""
    told = next((error for _, error in failures if not isinstance(error, TimeoutError)), failures[0][1])
    if len(failures) > 1:
        told.add_note(", ".join(f"{address}: {str(error) or 'no answer'}" for address, error in failures))
    return told


def _is_literal(host: str) -> bool:
    """Whether it is an address and no name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class _Connection(Timed, asyncio.Protocol):
    """One connection and the response on it. Holds at most one exchange at a time."""

    __slots__ = (
        "_client",
        "_complete",
        "_delimited",
        "_exchange",
        "_headers",
        "_keep_alive",
        "_parser",
        "_paused",
        "_silent",
        "_status",
        "_surplus",
        "_transport",
    )

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._headers: list[Pair] | None = None
        self._parser: Any = None
        self._status = 0
        # Nothing has come since the request was sent.
        self._silent = True
        self._complete = False
        # Something follows the response, which is nobody's: a second one would be taken for a part of the first.
        self._surplus = False
        # The end of the body is told by something else than the end of the connection.
        self._delimited = False
        self._keep_alive = False
        self._paused = False

    def usable(self) -> bool:
        self._client.wheel.cancel(self)
        return self._transport is not None and not self._transport.is_closing()

    def carry(self, exchange: Exchange, request: bytes) -> None:
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._headers = []
        self._status = 0
        self._silent = True
        self._complete = self._surplus = self._delimited = self._keep_alive = False
        assert self._transport is not None  # noqa: S101 - whoever carries something has just been found usable
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
        """The exchange has what it wants: keep the connection once the response is at its end, if it may be kept."""
        self._exchange = None
        self.resume()
        if self._complete and self._keep_alive:
            self._parser = None
            self._client.keep(self)
        elif self._complete or self._transport is None:
            self.close()
        else:
            self._client.wheel.set(self, self._client.wheel.now() + _TRAILER_SECONDS)

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
        self._exchange = None
        self._client.wheel.cancel(self)
        self._client.forget(self)

    def on_timer(self, now: float) -> None:
        self.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not of this class, only of its kind.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._silent = False
        if self._exchange is None and self._parser is None:
            # Bytes outside of a response.
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except _PARSER_ERRORS as error:
            exchange, self._exchange = self._exchange, None
            if self._complete and exchange is not None:
                # A good response with something behind it.
                self._keep_alive = False
                self._exchange = exchange
                exchange.received(True)
            elif exchange is not None:
                exchange.broken(f"not HTTP: {error}")
            self.close()
            return
        if self._surplus:
            self._keep_alive = False
        if self._exchange is not None:
            self._exchange.received(self._complete)
        elif self._complete:
            self.release()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        exchange = self._exchange
        self._drop()
        if exchange is not None:
            ended = exc is None and self._status != 0 and not self._delimited
            exchange.lost(str(exc) if exc else "connection closed", self._silent, ended)
        self._parser = None

    # httptools

    def on_message_begin(self) -> None:
        self._surplus = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._headers is None or self._complete:
            return
        if len(self._headers) >= _MAX_HEADERS:
            raise ValueError("too many headers")
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        headers = self._headers or []
        self._headers = []
        status = self._parser.get_status_code()
        if status < 200:
            # It comes before the response and says nothing about it.
            return
        # What follows are trailers.
        self._headers = None
        self._status = status
        self._keep_alive = self._parser.should_keep_alive()
        self._delimited = status in (204, 304) or any(
            name.lower() in (b"content-length", b"transfer-encoding") for name, _ in headers
        )
        if self._exchange is not None:
            self._exchange.on_head(status, headers)

    def on_body(self, chunk: bytes) -> None:
        if self._exchange is not None and not self._complete:
            self._exchange.on_body(chunk)

    def on_message_complete(self) -> None:
        if self._status:
            self._complete = True
