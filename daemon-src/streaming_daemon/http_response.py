"""What goes to the client: heads, JSON error bodies, server-sent events, and the way a connection is ended.

Everything but ``LingeringClose`` is pure. The wire message does not tell the client's protocol version, so a response
is never chunked: it ends where the connection ends, which HTTP/1.0 and 1.1 both understand.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from .wheel import Timed, TimerWheel

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

_encode_text = json.JSONEncoder(ensure_ascii=False).encode
_encode_ascii = json.JSONEncoder(ensure_ascii=True).encode
_DRAIN_CHUNK = 65536
_DRAIN_MOST = 16 * _DRAIN_CHUNK


def stream_head() -> bytes:
    """Status line and headers of a stream."""
    return (
        "HTTP/1.1 200 OK\r\n"
        f"Date: {_date()}\r\n"
        "Content-Type: text/event-stream; charset=utf-8\r\n"
        "Cache-Control: no-cache\r\n"
        "Connection: close\r\n"
        "X-Accel-Buffering: no\r\n"
        "\r\n"
    ).encode("ascii")


def error_response(status: int, kind: str, message: str, retry_after: str | None = None) -> bytes:
    """A complete response for a client that has not been sent anything yet."""
    body = _dump(error_body(kind, message))
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Date: {_date()}\r\n"
        "Content-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n"
    )
    if retry_after:
        head += f"Retry-After: {retry_after}\r\n"
    return (head + "\r\n").encode("ascii") + body


def content_event(text: str) -> bytes:
    """One chunk of the answer."""
    try:
        return b'data: {"content":' + _encode_text(text).encode() + b"}\n\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair: some servers cut an emoji's escape in two. Escaped, the client can join the halves.
        return b'data: {"content":' + _encode_ascii(text).encode() + b"}\n\n"


def error_event(kind: str, message: str) -> bytes:
    """What ends a stream that cannot go on, instead of ``DONE``."""
    return b"event: error\ndata: " + _dump(error_body(kind, message)) + b"\n\n"


def error_body(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message}}


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _date() -> str:
    return formatdate(time.time(), usegmt=True)


class LingeringClose(Timed):
    """Ends a connection whose response is complete: FIN, then read and forget what the client still sends, then close.

    A bare close with unread bytes in the socket makes the kernel send RST, and RST destroys whatever part of the
    answer the client has not read yet. Takes over ``fd``; ``closed`` is called once it is closed.
    """

    __slots__ = ("_closed", "_fd", "_loop", "_seen", "_wheel")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        fd: int,
        timeout: float,
        closed: Callable[[LingeringClose], None],
    ) -> None:
        super().__init__()
        self._loop = loop
        self._wheel = wheel
        self._fd = fd
        self._seen = 0
        self._closed = closed
        wheel.set(self, wheel.now() + timeout)
        loop.add_reader(fd, self._readable)

    def start(self) -> None:
        """Send FIN and read what is already there."""
        try:
            borrowed = socket.socket(fileno=self._fd)
            try:
                borrowed.shutdown(socket.SHUT_WR)
            finally:
                borrowed.detach()
        except OSError:
            self._finish()
        else:
            self._readable()

    def on_timer(self, now: float) -> None:
        self._finish()

    def _readable(self) -> None:
        try:
            while self._seen < _DRAIN_MOST:
                data = os.read(self._fd, _DRAIN_CHUNK)
                if not data:
                    break
                self._seen += len(data)
        except BlockingIOError:
            return
        except OSError:
            pass
        self._finish()

    def _finish(self) -> None:
        self._wheel.cancel(self)
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._closed(self)
