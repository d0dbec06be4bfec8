"""What goes to the client: heads, JSON error bodies, server-sent events, and the way a connection is ended.

Everything but ``LingeringClose`` is pure. A stream is chunked (RFC 9112 section 7.1) for a client that is known to
speak HTTP/1.1: its end can then be told from a cut. For all others it ends where the connection ends.

The application's own headers (of an envelope) come behind those of this daemon: cookies, other origins' permission,
caching. How a response is framed and what type it has is decided here alone. That their names are tokens and their
values single lines was made sure of where they came in.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from .wheel import Timed, TimerWheel

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
# An interim response (RFC 9110 section 15.2) means nothing to a client that did not ask for it, and may be sent where a
# comment may not: before a head that is the backend's to say.
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Headers = Sequence[tuple[str, str]]

# Not the application's to say: how the response is framed (RFC 9112 section 6), what is between two hops (RFC 9110
# section 7.6.1), what describes the body that was thrown away (section 8), what is between it and Apache's module.
_NEVER = frozenset(
    {
        *("date", "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
        *("content-type", "content-length", "content-encoding", "content-language", "content-location"),
        *("content-range", "content-md5", "digest", "content-digest", "repr-digest"),
        *("etag", "last-modified", "accept-ranges"),
        *("x-accel-buffering", "x-socket-handoff", "x-handoff-data", "x-handoff-data-from"),
    }
)
# An error is ours: an application that wants its answer cached did not mean this one.
_NEVER_IN_ERRORS = _NEVER | {"cache-control", "expires", "pragma", "retry-after"}

# Of a backend's response that is passed on as it is: only what belongs to the connection it came over stays behind.
_NEVER_PASSED = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"),
        *("te", "trailer", "transfer-encoding", "upgrade", "content-length"),
        *("x-socket-handoff", "x-handoff-data", "x-handoff-data-from"),
    }
)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

_NO_CACHE = "Cache-Control: no-cache\r\n"
_CHUNKED = "Transfer-Encoding: chunked\r\n"
_encode_text = json.JSONEncoder(ensure_ascii=False).encode
_encode_ascii = json.JSONEncoder(ensure_ascii=True).encode
_DRAIN_CHUNK = 65536
_DRAIN_MOST = 16 * _DRAIN_CHUNK


def chunk(data: bytes) -> bytes:
    """``data``, which is not empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def numbered(event: bytes, number: int) -> bytes:
    """A complete event with ``number`` as its id, whatever id it has: a client keeps the last of them."""
    if event.endswith(b"\r\n\r\n"):
        return b"%bid: %d\r\n\r\n" % (event[:-2], number)
    if event.endswith(b"\n\n"):
        return b"%bid: %d\n\n" % (event[:-1], number)
    return b"%bid: %d\r\r" % (event[:-1], number)


def stream_head(own: Headers = (), *, chunked: bool = False) -> bytes:
    """Status line and headers of a stream; ``own`` are the application's, in its order."""
    lines = [f"{name}: {value}\r\n" for name, value in own if name.lower() not in _NEVER]
    cache = any(name.lower() == "cache-control" for name, _ in own)
    return (
        "HTTP/1.1 200 OK\r\n"
        f"Date: {_date()}\r\n"
        "Content-Type: text/event-stream; charset=utf-8\r\n"
        f"{'' if cache else _NO_CACHE}"
        "Connection: close\r\n"
        f"{_CHUNKED if chunked else ''}"
        "X-Accel-Buffering: no\r\n"
        f"{''.join(lines)}"
        "\r\n"
    ).encode("utf-8", "replace")


def passed_head(status: int, headers: Headers, own: Headers, *, length: int = -1, chunked: bool = False) -> bytes:
    """The head of a backend's response that is passed on as it is, and of what the application adds to it; ``length``
    of its body, -1 where it is not known.

    A header of the backend wins over the application's of the same name, except cookies: both are sent.
    """
    named = {
        name.strip().lower() for header, value in headers if header.lower() == "connection" for name in value.split(",")
    }
    theirs = [
        (name, value)
        for name, value in headers
        if name.lower() not in _NEVER_PASSED and name.lower() not in named and is_header(name, value)
    ]
    known = {name.lower() for name, _ in theirs} - {"set-cookie"}
    # In the very bytes that the backend sent, see backends.passthrough.
    passed = "".join([f"{name}: {value}\r\n" for name, value in theirs]).encode("utf-8", "surrogateescape")
    lines = "".join([f"{name}: {value}\r\n" for name, value in own if name.lower() not in _NEVER | known])
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    head = (
        f"HTTP/1.1 {status} {phrase}\r\n"
        f"{'' if 'date' in known else f'Date: {_date()}' + chr(13) + chr(10)}"
        "Connection: close\r\n"
        f"{'' if length < 0 else f'Content-Length: {length}' + chr(13) + chr(10)}"
        f"{_CHUNKED if chunked else ''}"
    )
    return head.encode("ascii") + passed + lines.encode("utf-8", "replace") + b"\r\n"


def length_of(headers: Headers) -> int:
    """What Content-Length says, -1 where it says nothing that can be relied on."""
    lengths = {value.strip() for name, value in headers if name.lower() == "content-length"}
    text = lengths.pop() if len(lengths) == 1 else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


def is_header(name: str, value: str) -> bool:
    """Whether it can be written as one line."""
    return bool(_TOKEN.fullmatch(name)) and not any(character in value for character in "\r\n\0")


def empty_response(status: int, *, own: Headers = ()) -> bytes:
    """A complete response that has no body by its status."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in own if name.lower() not in _NEVER_IN_ERRORS])
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nDate: {_date()}\r\nCache-Control: no-store\r\n"
    return f"{head}Connection: close\r\n{lines}\r\n".encode("utf-8", "replace")


def error_response(
    status: int, kind: str, message: str, retry_after: str | None = None, *, own: Headers = (), head_only: bool = False
) -> bytes:
    """A complete response for a client that has not been sent anything yet. ``head_only`` answers HEAD."""
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
    head += "".join([f"{name}: {value}\r\n" for name, value in own if name.lower() not in _NEVER_IN_ERRORS])
    return (head + "\r\n").encode("utf-8", "replace") + (b"" if head_only else body)


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
    return _date_of(int(time.time()))


# All streams of a second begin with the same.
@functools.lru_cache(maxsize=1)
def _date_of(second: int) -> str:
    return formatdate(second, usegmt=True)


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
            # With its kind said, whatever it is: not saying it costs three system calls to find out.
            borrowed = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, self._fd)
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
