"""A stand-in for an OpenAI-compatible server that misbehaves on request."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon_harness import TIMEOUT

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


class Request:
    """One request as the server saw it, and the means to answer it."""

    def __init__(self, sock: socket.socket, head: bytes, body: bytes) -> None:
        self._sock = sock
        lines = head.decode("ascii").split("\r\n")
        self.line = lines[0]
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        self.json: Any = json.loads(body) if body else None
        self.closed = threading.Event()

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def chunk(self, *parts: bytes) -> None:
        """Chunks of a chunked body, in one write; an empty one ends it."""
        self.send(b"".join(b"%x\r\n%b\r\n" % (len(data), data) for data in parts))

    def event(self, text: str) -> None:
        self.chunk(event(text))

    def end(self) -> None:
        # In one write: whoever has seen the one has seen the other, so the connection is free when the client has all.
        self.chunk(b"data: [DONE]\n\n", b"")

    def wait_closed(self) -> None:
        """Wait for the daemon to close the connection."""
        try:
            while self._sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        self.closed.set()

    def reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


Script = Callable[[Request], None]


def event(text: str) -> bytes:
    """One content event, spaced as llama-cpp-python does it."""
    return b"data: " + json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


def error(status: int, code: str, headers: str = "", message: str = "no") -> bytes:
    body = json.dumps({"error": {"message": message, "type": "test", "code": code}}).encode()
    head = (
        f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


class FakeLLM:
    """Answers every request by running ``script``; a connection is kept for the next request while it can be read."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None, path: Path | None = None) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.connections = 0
        self._tls = tls
        self.port = 0
        if path is None:
            self._server = socket.create_server(("127.0.0.1", 0))
            self.port = int(self._server.getsockname()[1])
        else:
            self._server = socket.create_server(str(path), family=socket.AF_UNIX)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        # A blocked accept does not notice a close.
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for sock in self._open:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT)
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            self._open.append(sock)
            while True:
                data = b""
                while b"\r\n\r\n" not in data:
                    chunk = sock.recv(65536)
                    if not chunk:
                        return
                    data += chunk
                head, _, body = data.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                while len(body) < length:
                    body += sock.recv(65536)
                request = Request(sock, head, body)
                self.requests.append(request)
                self.script(request)
        except OSError:
            return
        finally:
            sock.close()


def fill(server: socket.socket) -> list[socket.socket]:
    """Let ``server`` answer nobody any more: its backlog is full, and the kernel drops who knocks."""
    fillers = []
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(server.getsockname())
        fillers.append(filler)
    return fillers
