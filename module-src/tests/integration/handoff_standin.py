# SPDX-License-Identifier: Apache-2.0
"""A daemon and a client for the integration tests.

The daemon does what docs/wire-protocol.md asks of one, and records in what state each client
arrived. The client is a bare socket, so that a test sees every byte and how the connection ended.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import queue
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 10.0
"""Seconds after which a test that waits gives up; nothing here takes a tenth of it."""

OURS = re.compile(rb"x-(socket-handoff|handoff-data)", re.IGNORECASE)


def response(body: bytes, *, head: str = "HTTP/1.1 200 OK") -> bytes:
    """What a daemon sends for a plain handoff."""
    return f"{head}\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n".encode() + body


@dataclass(slots=True)
class Handoff:
    """One client as the daemon got it."""

    data: bytes
    client: socket.socket
    payload: bytes | None = None  # what the second descriptor held
    nonblocking: bool = field(init=False)
    options: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        flags = fcntl.fcntl(self.client.fileno(), fcntl.F_GETFL)
        self.nonblocking = bool(flags & os.O_NONBLOCK)
        tcp = socket.IPPROTO_TCP
        linger = self.client.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        self.options = {
            "nodelay": self.client.getsockopt(tcp, socket.TCP_NODELAY),
            "cork": self.client.getsockopt(tcp, socket.TCP_CORK),
            "keepalive": self.client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "linger": struct.unpack("ii", linger),
        }
        self.client.settimeout(PATIENCE)

    @property
    def envelope(self) -> dict[str, Any]:
        """The message as an envelope."""
        value = json.loads(self.data)
        assert isinstance(value, dict)
        return value

    def readable(self) -> bytes:
        """What the daemon could read from the client right now."""
        self.client.setblocking(False)
        try:
            return self.client.recv(1 << 20)
        except BlockingIOError:
            return b""
        finally:
            self.client.settimeout(PATIENCE)

    def read(self, size: int) -> bytes:
        """What the client sends, exactly so many bytes and then nothing more for now."""
        data = b""
        while len(data) < size:
            part = self.client.recv(1 << 20)
            assert part, f"the client ended after {len(data)} of {size} bytes"
            data += part
        assert len(data) == size and self.readable() == b"", "more than that"
        return data

    def finish(self, reply: bytes = b"") -> None:
        """Send the reply and FIN; the rest of the lingering close goes on in the background."""
        try:
            self.client.sendall(reply)
            self.client.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        threading.Thread(target=self._linger, daemon=True).start()

    def _linger(self) -> None:
        with self.client:
            self.client.settimeout(2.0)
            try:
                while self.client.recv(65536):
                    pass
            except OSError:
                pass


def read_payload(fd: int) -> bytes:
    """The contents of a sealed memfd; it is closed."""
    try:
        wanted = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & wanted == wanted, "the payload is not sealed"
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        data = bytearray()
        while part := os.pread(fd, 1 << 20, len(data)):
            data += part
        return bytes(data)
    finally:
        os.close(fd)


class Daemon:
    """Listens on a Unix socket; gives each handoff to `answer`, or to a queue for the test."""

    def __init__(
        self,
        path: Path,
        *,
        kind: int = socket.SOCK_SEQPACKET,
        answer: Callable[[Handoff], None] | None = None,
        mode: int = 0o666,
        backlog: int = 64,
        ack: bytes | None = None,
    ) -> None:
        self.path = path
        self.accepted = 0
        self._ack = ack
        self.handoffs: queue.Queue[Handoff] = queue.Queue()
        self.count = 0
        self._answer = answer
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, kind)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        path.chmod(mode)
        self._listener.listen(backlog)
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Daemon:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE)
        while not self.handoffs.empty():
            self.handoffs.get().client.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            with conn:
                try:
                    if self._ack:
                        conn.sendall(self._ack)
                    handoff = self._receive(conn)
                except OSError:
                    handoff = None  # Apache hung up
            if handoff is None:
                continue
            self.count += 1
            if self._answer is None:
                self.handoffs.put(handoff)
            else:
                thread = threading.Thread(target=self._answer, args=(handoff,), daemon=True)
                thread.start()
                self._threads = [t for t in self._threads if t.is_alive()] + [thread]

    @staticmethod
    def _receive(conn: socket.socket) -> Handoff | None:
        conn.settimeout(PATIENCE)
        data = b""
        fds = array.array("i")
        while True:
            part, control, flags, _ = conn.recvmsg(1 << 20, socket.CMSG_SPACE(4 * fds.itemsize))
            for level, what, value in control:
                assert (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                fds.frombytes(value)
            assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            if not part:
                break
            data += part
        if not fds:
            return None
        assert len(fds) in (1, 2)
        return Handoff(data, socket.socket(fileno=fds[0]), read_payload(fds[1]) if len(fds) == 2 else None)

    def next(self) -> Handoff:
        """The next client, waiting for it."""
        return self.handoffs.get(timeout=PATIENCE)


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP/1 response off the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """A TCP connection to the server under test.

    Raises ConnectionResetError where the connection ends with RST, and AssertionError where one of
    the two handoff headers ever shows up.
    """

    def __init__(self, port: int, *, rcvbuf: int | None = None) -> None:
        self.sock = socket.socket()
        if rcvbuf is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self._buffer = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()

    def send(self, data: bytes) -> Client:
        self.sock.sendall(data)
        return self

    def get(self, uri: str, *headers: str, method: str = "GET", proto: str = "HTTP/1.1") -> Client:
        lines = [f"{method} {uri} {proto}", "Host: localhost", *headers, "", ""]
        return self.send("\r\n".join(lines).encode())

    def post(self, uri: str, body: bytes, *headers: str) -> Client:
        return self.get(uri, f"Content-Length: {len(body)}", *headers, method="POST").send(body)

    def _more(self, size: int = 65536) -> bool:
        part = self.sock.recv(size)
        self._buffer += part
        assert not OURS.search(self._buffer[:65536]), self._buffer[:2000]
        return bool(part)

    def rest(self, *, step: int = 65536) -> bytes:
        """Everything until the server's FIN."""
        parts = [self._buffer]
        self._buffer = b""
        while part := self.sock.recv(step):
            parts.append(part)
        everything = b"".join(parts)
        assert not OURS.search(everything[: 1 << 20]), everything[:2000]
        return everything

    def _head(self) -> tuple[int, dict[str, str]]:
        while b"\r\n\r\n" not in self._buffer:
            assert self._more(), f"the connection ended inside a head: {self._buffer!r}"
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        pairs = (line.split(":", 1) for line in lines[1:])
        return int(lines[0].split()[1]), {k.strip().lower(): v.strip() for k, v in pairs}

    def answer(self, *, head_only: bool = False) -> Answer:
        """The next response, complete; leaves what follows it in place."""
        status, headers = self._head()
        if head_only or status in (204, 304) or status < 200:
            return Answer(status, headers, b"")
        if "content-length" in headers:
            need = int(headers["content-length"])
            while len(self._buffer) < need:
                assert self._more(), f"the body ended after {len(self._buffer)} of {need} bytes"
            body, self._buffer = self._buffer[:need], self._buffer[need:]
            return Answer(status, headers, body)
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return Answer(status, headers, self._chunks())
        return Answer(status, headers, self.rest())

    def _chunks(self) -> bytes:
        body = b""
        while True:
            while b"\r\n" not in self._buffer:
                assert self._more(), "the connection ended inside a chunk's head"
            line, self._buffer = self._buffer.split(b"\r\n", 1)
            size = int(line.split(b";")[0], 16)
            while len(self._buffer) < size + 2:
                assert self._more(), "the connection ended inside a chunk"
            body += self._buffer[:size]
            self._buffer = self._buffer[size + 2 :]
            if size == 0:
                return body

    def expect_reset_or_fin(self) -> None:
        """The server has let go of the connection, in whatever way."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass


def fetch(port: int, uri: str, *headers: str, method: str = "GET") -> Answer:
    """One request on its own connection."""
    with Client(port) as client:
        return client.get(uri, "Connection: close", *headers, method=method).answer(head_only=method == "HEAD")


def answer_ok(handoff: Handoff) -> None:
    """Answers a client with the first bytes of its own data."""
    handoff.finish(response(b"data: " + handoff.data[:100] + b"\n\n"))
