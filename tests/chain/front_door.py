"""A client of the chain's front door that sees bytes: one TCP connection per request, and how it ended.

Everything here is what a browser or curl could do from outside the host. Times are seconds (time.monotonic).
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlencode


@dataclass(slots=True)
class Answer:
    """One HTTP response read to its end."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    end: str  # "FIN", "RST" or "length" (the connection stayed open, Content-Length was reached)
    seconds: float

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(slots=True)
class Connection:
    """One request on one TCP connection, read piece by piece."""

    address: str
    request: bytes
    receive_buffer: int | None = None
    timeout: float = 60.0
    socket: socket.socket = field(init=False)
    raw: bytearray = field(init=False, default_factory=bytearray)
    began: float = field(init=False, default=0.0)
    end: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.socket = socket.socket()
        if self.receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self.socket.settimeout(self.timeout)
        self.began = time.monotonic()
        self.socket.connect((self.address, 80))
        self.socket.sendall(self.request)

    def read_more(self, size: int = 65536) -> bool:
        """Read once; False at the end of the connection, whose manner is then in `end`."""
        try:
            piece = self.socket.recv(size)
        except ConnectionResetError:
            self.end = "RST"
            return False
        if not piece:
            self.end = "FIN"
            return False
        self.raw += piece
        return True

    def read_until(self, marker: bytes) -> None:
        """Read until `marker` is there; AssertionError with the bytes when the connection ends before it."""
        while marker not in self.raw:
            if not self.read_more():
                raise AssertionError(f"{self.end} before {marker!r}; got {bytes(self.raw[-2000:])!r}")

    def read_to_end(self, pause: float = 0.0, size: int = 65536) -> Answer:
        """Read to the end; `pause` seconds between reads of `size` bytes make a slow reader."""
        while self.read_more(size):
            if pause:
                time.sleep(pause)  # being slow is what this reader is for
            if not pause and self._complete_by_length():
                self.end = "length"
                break
        self.socket.close()
        return self.parse()

    def _complete_by_length(self) -> bool:
        head, separator, body = bytes(self.raw).partition(b"\r\n\r\n") if len(self.raw) < 65536 else (b"", b"", b"")
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        return bool(separator and length and len(body) >= int(length[1]))

    def parse(self) -> Answer:
        head, separator, body = bytes(self.raw).partition(b"\r\n\r\n")
        assert separator, f"no complete response head; {self.end}; got {bytes(self.raw[:2000])!r}"
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        chunked = ("transfer-encoding", "chunked") in ((name.lower(), value.lower()) for name, value in headers)
        if chunked and not self.request.startswith(b"HEAD "):
            body = b"".join(chunks(body))
        return Answer(int(status_line.split()[1]), headers, body, self.end or "open", time.monotonic() - self.began)

    def close(self) -> None:
        self.socket.close()


def chunks(body: bytes) -> Iterator[bytes]:
    """The chunks of a chunked body (RFC 9112 section 7.1); ValueError when it is not complete."""
    while True:
        size, separator, rest = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if not separator or len(rest) < length + 2:
            raise ValueError(f"the chunked body is cut off: {body[-200:]!r}")
        if length == 0:
            return
        yield rest[:length]
        body = rest[length + 2 :]


@dataclass(slots=True)
class Session:
    """A logged-in user of the reference application."""

    address: str
    cookie: str = ""
    csrf: str = ""

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        fields = {"Host": self.address, "Connection": "close", "Cookie": self.cookie, **(headers or {})}
        if body or method == "POST":
            fields.setdefault("Content-Length", str(len(body)))
            fields.setdefault("Content-Type", "application/x-www-form-urlencoded")
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body

    def get(self, path: str, **options: object) -> Answer:
        return Connection(self.address, self.request("GET", path)).read_to_end(**options)  # type: ignore[arg-type]

    def log_in(self, user: str, password: str) -> None:
        answer = self.get("/session.php")
        assert answer.status == 200, (answer.status, answer.body)
        self._keep_cookie(answer)
        form = {"user": user, "password": password, "csrf": json.loads(answer.body)["csrf"]}
        answer = Connection(self.address, self.request("POST", "/login.php", urlencode(form).encode())).read_to_end()
        assert answer.status == 303, (answer.status, answer.body)
        self._keep_cookie(answer)
        answer = self.get("/session.php")
        assert json.loads(answer.body)["user"] == user, answer.body
        self.csrf = json.loads(answer.body)["csrf"]

    def _keep_cookie(self, answer: Answer) -> None:
        cookies = [value.split(";")[0] for name, value in answer.headers if name.lower() == "set-cookie"]
        if cookies:
            self.cookie = cookies[-1]

    def open_stream(self, prompt: str = "chain test", *, tokens: int, pace: float, **options: object) -> Connection:
        """Open a stream of `tokens` tokens at `pace` tokens per second."""
        query = urlencode({"prompt": prompt, "tokens": tokens, "pace": pace})
        request = self.request("GET", f"/stream.php?{query}")
        return Connection(self.address, request, **options)  # type: ignore[arg-type]


def events(body: bytes) -> Iterator[str]:
    """The data fields of a Server-Sent Events body that has one data line per event; comments are left out."""
    for block in body.decode("utf-8").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            yield "\n".join(line.removeprefix("data: ") for line in lines)


def assert_complete(answer: Answer, tokens: int) -> str:
    """Assert that a stream is whole, in order and ended with a FIN; return its text."""
    assert answer.status == 200, (answer.status, answer.body[:2000])
    assert answer.end == "FIN", (answer.end, answer.body[-500:])
    for name, value in answer.headers:
        assert not name.lower().startswith(("x-socket-handoff", "x-handoff")), (name, value)
    *contents, last = events(answer.body)
    assert last == "[DONE]", (last, answer.body[-500:])
    assert len(contents) == tokens, (len(contents), tokens)
    return "".join(json.loads(content)["content"] for content in contents)
