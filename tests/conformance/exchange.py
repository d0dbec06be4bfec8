"""A client that is handed to a daemon, directly or through Apache, and what it got.

The contract is docs/wire-protocol.md. Nothing here knows which daemon it talks to.
"""

from __future__ import annotations

import array
import base64
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

PATIENCE = 20.0
"""Seconds after which a case that waits has failed; a daemon in order takes a small part of it."""

ALL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
SEALS = {
    "memfd": ALL_SEALS,
    "memfd without seals": 0,
    "memfd without F_SEAL_WRITE": ALL_SEALS & ~fcntl.F_SEAL_WRITE,
    "memfd without F_SEAL_SHRINK": ALL_SEALS & ~fcntl.F_SEAL_SHRINK,
}
PIECE = re.compile(r"[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+$")
FIELD = re.compile(r"(data|event|id|retry): .*|:.*")


class Failed(AssertionError):
    """A daemon did not do what the contract says."""


class Invisible(Exception):
    """What a case wants to see cannot be seen from here."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Failed(message)


def wait_until_closed(what: str, *inodes: int) -> None:
    """Wait until no process has any of them open."""
    wait_for(lambda: not visible(*inodes), f"{what} closed")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        require(time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(0.05)  # the interval of a bounded poll


def echo(data: dict[str, Any]) -> list[str]:
    """The pieces that a daemon with the vocabulary answers to this data: see README.md."""
    pieces = PIECE.findall(data["prompt"])
    return [pieces[index % len(pieces)] for index in range((data.get("demo") or {}).get("tokens", len(pieces)))]


def bytes_of(text: object) -> bytes:
    """A text of the test vectors, or of a case: see tests/vectors/README.md."""
    if text is None:
        return b"\0"
    if not isinstance(text, dict):
        raise TypeError(f"{text!r}: allowed are utf8 and base64")
    if "base64" in text:
        return base64.b64decode(text["base64"])
    filler = "x" * text["pad"] if "pad" in text else "[" * text["nest"] + "]" * text["nest"] if "nest" in text else "%"
    return str(text["utf8"]).replace("%", filler).encode()


@dataclass
class Response:
    """Everything a client got, and how its connection ended."""

    raw: bytes
    reset: bool
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    def __post_init__(self) -> None:
        head, end, self.body = self.raw.partition(b"\r\n\r\n")
        require(
            end, f"no complete head in {len(self.raw)} bytes: {self.raw[:200]!r}{', then RST' if self.reset else ''}"
        )
        first, *lines = head.decode("utf-8").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9][0-9]) [ -~]*", first)
        if not match:
            raise Failed(f"not a status line: {first!r}")
        self.status = int(match[1])
        for line in lines:
            name, colon, value = line.partition(":")
            require(colon and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name), f"not a header: {line!r}")
            self.headers.append((name.lower(), value.strip()))
        if self.header("transfer-encoding") is not None:
            require(
                self.header("transfer-encoding") == "chunked", f"Transfer-Encoding: {self.header('transfer-encoding')}"
            )

    def header(self, name: str) -> str | None:
        """The value of a header that must not be there twice."""
        values = [value for key, value in self.headers if key == name]
        require(len(values) < 2, f"{name} is there {len(values)} times")
        return values[0] if values else None

    @property
    def content(self) -> bytes:
        """The body without its chunks; it must be all there."""
        if self.header("transfer-encoding") is None:
            length = self.header("content-length")
            require(length is None or int(length) == len(self.body), f"Content-Length {length}, body {len(self.body)}")
            return self.body
        parts, at = [], 0
        while True:
            end = self.body.find(b"\r\n", at)
            size = self.body[at:end] if end >= 0 else b""
            require(re.fullmatch(rb"[0-9A-Fa-f]+", size), f"not a chunk: {self.body[at : at + 60]!r}, at byte {at}")
            length, at = int(size, 16), end + 2
            require(self.body[at + length : at + length + 2] == b"\r\n", f"a chunk of {length} bytes is cut off")
            parts.append(self.body[at : at + length])
            at += length + 2
            if not length:
                require(at == len(self.body), f"bytes behind the last chunk: {self.body[at : at + 60]!r}")
                return b"".join(parts)

    @property
    def events(self) -> list[str]:
        """The events of a stream, comments left out. Each must be whole UTF-8, and a line must have the form of one."""
        content = self.content
        require(content.endswith(b"\n\n"), f"the stream does not end with an empty line: {content[-60:]!r}")
        events = []
        for event in content[:-2].split(b"\n\n"):
            try:
                text = event.decode("utf-8")
            except UnicodeDecodeError as error:
                raise Failed(f"an event is not UTF-8: {error}") from None
            for line in text.split("\n"):
                require(FIELD.fullmatch(line), f"not a line of an event: {line[:100]!r}")
            if not text.startswith(":"):
                events.append(text)
        return events

    @property
    def texts(self) -> list[str]:
        """The text of every content event."""
        texts = []
        for event in self.events:
            if event.startswith("data: {"):
                value = json.loads(event.removeprefix("data: "))
                require(isinstance(value.get("content"), str), f"no content in {event[:100]!r}")
                texts.append(value["content"])
        return texts


class Client:
    """The browser's end of a connection."""

    def __init__(self, sock: socket.socket, inode: int | None = None) -> None:
        self.sock = sock
        self.received = bytearray()
        self.inode = inode
        sock.settimeout(PATIENCE)

    def read_until(self, text: bytes) -> None:
        while text not in self.received:
            try:
                part = self.sock.recv(65536)
            except TimeoutError:
                raise Failed(
                    f"{self.sock.gettimeout():.0f} s without {text!r}; so far {bytes(self.received[:300])!r}"
                ) from None
            require(part, f"ended before {text!r}: {bytes(self.received[-300:])!r}")
            self.received += part

    def finish(self, *, keep: bool = False) -> Response:
        """Read to the end; the response."""
        reset = False
        try:
            while part := self.sock.recv(65536):
                self.received += part
        except ConnectionResetError:
            reset = True
        except TimeoutError:
            raise Failed(f"{PATIENCE:.0f} s without an end; the last was {bytes(self.received[-200:])!r}") from None
        if not keep:
            self.sock.close()
        return Response(bytes(self.received), reset)

    def leave(self) -> None:
        self.sock.close()


def envelope(data: bytes | None, payload: bool, changes: dict[str, Any]) -> bytes:
    message: dict[str, Any] = {
        "handoff": 2,
        "id": "conformance",
        "method": "GET",
        "uri": "/stream",
        "protocol": "HTTP/1.1",
        "host": "chat.example",
        "client": {"addr": "203.0.113.9", "port": 40001},
        "peer": {"addr": "10.0.0.2", "port": 33012},
        "scheme": "http",
        "target": "llm",
        "headers": [],
        "response_headers": [],
        "status": 200,
        "unread_body": 0,
        "prefetched": 0,
        "data": None if data is None or payload else data.decode(),
    }
    if payload:
        message["payload"] = {"memfd": True, "length": len(data or b"")}
    return json.dumps({**message, **changes}, ensure_ascii=False, separators=(",", ":")).encode()


def memfd(content: bytes, kind: str) -> int:
    """The second descriptor, of a kind that the vectors name."""
    if kind == "file":
        fd = os.open(os.environ.get("TMPDIR", "/tmp"), os.O_TMPFILE | os.O_RDWR)
        os.write(fd, content)
        return fd
    if kind == "pipe":
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        return reading
    fd = os.memfd_create("conformance", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS[kind])
    return fd


def visible(*inodes: int) -> bool:
    """Whether some process has one of these sockets or pipes open, as far as this user may look."""
    names = {f"{kind}:[{inode}]" for kind in ("socket", "pipe") for inode in inodes}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                for fd in os.scandir(process / "fd"):
                    if os.readlink(fd.path) in names:
                        return True
            except OSError:  # it ended meanwhile, or is another user's
                continue
    return False


def tcp_pair(receive_buffer: int = 0, send_buffer: int = 0) -> tuple[socket.socket, socket.socket]:
    """(the browser's end, the one that is handed over), over loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        ours = socket.socket()
        if receive_buffer:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
    if send_buffer:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    theirs.setblocking(False)
    return ours, theirs


class Direct:
    """As the module does it, without Apache."""

    def __init__(self, path: str) -> None:
        self.path = path

    def connect(self) -> socket.socket:
        for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
            sock = socket.socket(socket.AF_UNIX, kind)
            sock.settimeout(PATIENCE)
            try:
                sock.connect(self.path)
            except OSError as error:
                sock.close()
                if error.errno != errno.EPROTOTYPE or kind == socket.SOCK_STREAM:
                    raise Failed(f"cannot connect to {self.path}: {error.strerror}") from None
            else:
                return sock
        raise AssertionError

    def send(self, message: bytes, fds: Iterable[int], *, ack: str = "") -> None:
        """One message with descriptors. ``ack``: "read" the daemon's byte first, or only wait for it: "unread"."""
        with self.connect() as sock:
            if (
                len(message) > 200_000
            ):  # more than Apache would send; twice the system's default is allowed to everybody
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            if ack:
                try:
                    byte = sock.recv(2, 0 if ack == "read" else socket.MSG_PEEK)
                except TimeoutError:
                    byte = b""
                require(byte == b"\x06", f"{byte!r} instead of the acknowledgement, 0x06")
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            try:
                sent = sock.sendmsg([message], ancillary if len(ancillary[0][2]) else [], socket.MSG_NOSIGNAL)
                while sent < len(message):
                    sent += sock.send(message[sent:])
            except TimeoutError:
                raise Failed(f"the daemon did not take the message within {PATIENCE:.0f} s") from None

    def hand(self, case: dict[str, Any], form: str) -> Client:
        data = data_of(case)
        payload = form == "envelope" and case.get("payload", False)
        message = (
            data if form == "plain" else envelope(data if "data" in case else None, payload, case.get("envelope", {}))
        )
        if "tail" in case:
            message += case["tail"].encode() + b"x"
        ours, theirs = tcp_pair(case.get("receive_buffer", 0), case.get("send_buffer", 0))
        with theirs:
            if case.get("sends"):
                ours.sendall(b"x" * case["sends"])
            owned = [memfd(data, "memfd")] if payload else []
            try:
                self.send(message, [theirs.fileno(), *owned], ack=case.get("ack", ""))
            finally:
                for fd in owned:
                    os.close(fd)
            return Client(ours, os.fstat(theirs.fileno()).st_ino)


def data_of(case: dict[str, Any]) -> bytes:
    """The application's data of a case."""

    if "raw" in case:
        return str(case["raw"]).encode()
    if "data" not in case:
        return b"\0"
    return json.dumps(case["data"], ensure_ascii=False).encode()


def _server_side(client: socket.socket) -> list[str]:
    """The fields of the other end of a client's connection in the kernel's table, or none."""
    local, remote = f":{client.getpeername()[1]:04X}", f":{client.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(local) and fields[2].endswith(remote):
            return fields
    return []


def established(client: socket.socket) -> bool:
    """Whether the server's end has neither sent FIN nor RST yet."""
    try:
        fields = _server_side(client)
    except OSError:  # no longer connected: RST
        return False
    return bool(fields) and fields[3] == "01"


class ThroughApache:
    """A private httpd, whose module hands the client over; ``targets`` has the name per form."""

    def __init__(self, port: int, targets: dict[str, str]) -> None:
        self.port = port
        self.targets = targets

    def hand(self, case: dict[str, Any], form: str) -> Client:
        data = data_of(case)
        changes = case.get("envelope", {})
        method, protocol = changes.get("method", "GET"), changes.get("protocol", "HTTP/1.1")
        target = self.targets["ack" if case.get("ack") else form]
        sock = socket.socket()
        if case.get("receive_buffer"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, case["receive_buffer"])
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", self.port))
        query, body = f"t={target}", b""
        if case.get("payload") or len(data) > 2000:
            # As PHP does with what is too long for a header: the application prints it, and that is the data.
            query += "&from=response-body&read=copy"
            method, body = "POST", data
        elif data != b"\0":
            query += f"&d={quote(data)}"
        for name, value in changes.get("response_headers", []):
            query += f"&set={quote(f'{name}:{value}')}"
        lines = [f"{method} /t?{query} {protocol}", "Host: chat.example"]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + body + b"x" * case.get("sends", 0))
        return Client(sock)

    def inode(self, client: Client) -> int | None:
        """Of the server's end, as the kernel's table has it."""
        fields = _server_side(client.sock)
        return int(fields[9]) or None if fields else None
