"""Answers /metrics, /healthz, /readyz and /status, on a socket that all workers of a generation share.

Whichever worker accepts a request answers it for all of them, from the board. Anything that goes wrong here is the
asking client's own trouble: a request has a few seconds, a few kilobytes and one of a few places, and nothing waits.

    /metrics   Prometheus' text; 503 where python3-prometheus-client is missing
    /healthz   200 while every worker's loop turns, otherwise 503
    /readyz    200 while some worker takes handoffs and has room for a stream, otherwise 503
    /status    the same numbers as JSON, for ``python3 -m streaming_daemon top``
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from http import HTTPStatus

from . import board, metrics
from .access_log import log
from .board import Board, Slot
from .wheel import Timed, TimerWheel

_MAX_PEERS = 32
_MAX_REQUEST = 8192
# More than a request may have: closing with bytes unread would reset the connection under the answer.
_READ = 65536
_TIMEOUT = 5.0
_RESOURCE_PAUSE = 1.0
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"


class MetricsServer(Timed):
    """One worker's share in the socket. ``exposition`` is None where /metrics cannot be written."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        sock: socket.socket,
        *,
        shared: Board,
        slot: Slot,
        exposition: metrics.Exposition | None,
    ) -> None:
        super().__init__()
        self.loop = loop
        self.wheel = wheel
        self._shared = shared
        self._slot = slot
        self._exposition = exposition
        self._sock: socket.socket | None = sock
        self._peers: set[_Peer] = set()
        sock.setblocking(False)

    def start(self) -> None:
        if self._sock is not None:
            self.loop.add_reader(self._sock.fileno(), self._acceptable)

    def stop(self) -> None:
        """Accept no more; whoever is being answered gets the answer."""
        if self._sock is not None:
            self.wheel.cancel(self)
            self.loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def on_timer(self, now: float) -> None:
        self.start()

    def done(self, peer: _Peer) -> None:
        self._peers.discard(peer)

    def _acceptable(self) -> None:
        if self._sock is None:
            return
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # Out of descriptors, most likely; the handoffs' listener says so.
            self.loop.remove_reader(self._sock.fileno())
            self.wheel.set(self, self.wheel.now() + _RESOURCE_PAUSE)
            return
        if len(self._peers) >= _MAX_PEERS:
            sock.close()
            return
        sock.setblocking(False)
        peer = _Peer(self, sock)
        self._peers.add(peer)
        peer.begin()

    def answer(self, request: bytes) -> bytes:
        """The whole response to the head of a request."""
        line, _, rest = request.partition(b"\r\n")
        words = line.decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, "expected is an HTTP/1 request\n")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD\n", allow="GET, HEAD")
        self._slot[board.SCRAPES] += 1
        response = self._get(target.partition("?")[0], rest.decode("latin-1"))
        return response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == "HEAD" else response

    def _get(self, path: str, headers: str) -> bytes:
        if path == "/metrics":
            if self._exposition is None:
                sorry = f"/metrics needs the package {metrics.PACKAGE}; install it and reload the daemon\n"
                return _response(HTTPStatus.SERVICE_UNAVAILABLE, sorry)
            text, kind = self._exposition.render(self._shared, _header(headers, "accept"))
            return _response(HTTPStatus.OK, text, kind)
        if path == "/status":
            return _response(HTTPStatus.OK, _dumps(metrics.report(self._shared)), _JSON)
        if path == "/healthz":
            return self._health()
        if path == "/readyz":
            return self._readiness()
        return _response(HTTPStatus.NOT_FOUND, "/metrics, /healthz, /readyz, /status\n")

    def _health(self) -> bytes:
        totals = self._shared.totals()
        hung = [worker.pid for worker in metrics.workers(totals, board.now_ms()) if worker.state == "hung"]
        body = {
            "status": "hung" if hung else "ok",
            "active_streams": totals.words[board.ACTIVE],
            "active_connections": metrics.connections(totals),
            "workers": len(totals.slots),
            "hung": hung,
        }
        return _response(HTTPStatus.SERVICE_UNAVAILABLE if hung else HTTPStatus.OK, _dumps(body), _JSON)

    def _readiness(self) -> bytes:
        totals = self._shared.totals()
        accepting = [each for each in metrics.workers(totals, board.now_ms()) if each.state == "accepting"]
        room = sum(max(0, worker.capacity - worker.streams) for worker in accepting)
        status = "ready" if room else "full" if accepting else "not accepting"
        body = {"status": status, "workers": len(accepting), "room": room}
        return _response(HTTPStatus.OK if room else HTTPStatus.SERVICE_UNAVAILABLE, _dumps(body), _JSON)


class _Peer(Timed):
    """One connection: a request in, a response out, gone."""

    __slots__ = ("_data", "_out", "_server", "_sock")

    def __init__(self, server: MetricsServer, sock: socket.socket) -> None:
        super().__init__()
        self._server = server
        self._sock = sock
        self._data = b""
        self._out = memoryview(b"")

    def begin(self) -> None:
        self._server.wheel.set(self, self._server.wheel.now() + _TIMEOUT)
        self._server.loop.add_reader(self._sock.fileno(), self._readable)

    def on_timer(self, now: float) -> None:
        self._close()

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        self._data += data
        head, end, _ = self._data.partition(b"\r\n\r\n")
        if end:
            self._reply(self._answer(head))
        elif len(self._data) >= _MAX_REQUEST:
            self._reply(_response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too much\n"))

    def _answer(self, head: bytes) -> bytes:
        try:
            return self._server.answer(head)
        except Exception:
            # A fault of ours, and the streams' loop is not the place to die of it.
            log.exception("cannot answer a request on the metrics socket")
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR, "the journal says why\n")

    def _reply(self, response: bytes) -> None:
        self._server.loop.remove_reader(self._sock.fileno())
        self._out = memoryview(response)
        self._server.loop.add_writer(self._sock.fileno(), self._writable)
        self._writable()

    def _writable(self) -> None:
        try:
            self._out = self._out[self._sock.send(self._out) :]
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        if not self._out:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            self._close()

    def _close(self) -> None:
        fd = self._sock.fileno()
        if fd < 0:
            return
        self._server.wheel.cancel(self)
        self._server.loop.remove_reader(fd)
        self._server.loop.remove_writer(fd)
        self._sock.close()
        self._server.done(self)


def _response(status: HTTPStatus, body: str | bytes, kind: str = _TEXT, allow: str = "") -> bytes:
    data = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
    head += f"Allow: {allow}\r\n" if allow else ""
    return (head + "Cache-Control: no-store\r\nConnection: close\r\n\r\n").encode() + data


def _header(headers: str, name: str) -> str:
    for line in headers.split("\r\n"):
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return ""


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
