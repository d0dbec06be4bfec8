"""A real daemon in a temporary directory, and clients that are handed to it the way Apache does it."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

SOURCE = Path(__file__).resolve().parent.parent
# Generous: what it bounds is a failure, and a loaded machine is none. No test passes by waiting for it.
TIMEOUT = 30.0
KINDS = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, timeout: float = TIMEOUT) -> T:
    """Wait until ``condition`` is true and return its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.005)  # the interval of a bounded poll
    return value


@dataclass
class Response:
    """What a client got until the connection ended; ``reset`` where it did not end with FIN."""

    raw: bytes
    reset: bool = False
    head: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    # Chunked, and ended without its last chunk.
    cut: bool = False

    def __post_init__(self) -> None:
        head, _, self.body = self.raw.partition(b"\r\n\r\n")
        self.head = head.decode("utf-8")
        lines = self.head.split("\r\n")
        if lines[0]:
            self.status = int(lines[0].split(" ")[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        if "transfer-encoding" in self.headers and self.body:
            self.body, self.cut = unchunk(self.body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The events with data, one string each, comments left out."""
        assert self.body.endswith(b"\n\n"), self.body[-200:]
        return [block for block in self.body.decode("utf-8").split("\n\n") if block and not block.startswith(":")]

    @property
    def texts(self) -> list[str]:
        """The content of every content event."""
        datas = [event.removeprefix("data: ") for event in self.events if event.startswith("data: {")]
        return [json.loads(data)["content"] for data in datas]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def complete(self) -> bool:
        return self.status == 200 and not self.reset and not self.cut and self.events[-1] == "data: [DONE]"

    @property
    def error(self) -> Any:
        """The error of the last event, which must be one."""
        name, _, data = self.events[-1].partition("\n")
        assert name == "event: error", self.events[-1]
        return json.loads(data.removeprefix("data: "))["error"]


def unchunk(data: bytes) -> tuple[bytes, bool]:
    """The body in chunks, and whether its end is missing."""
    body = b""
    while data:
        size, end, rest = data.partition(b"\r\n")
        length = int(size, 16) if end else 0
        if not end or len(rest) < length + 2:
            return body + rest[:length], True
        assert rest[length : length + 2] == b"\r\n", data[:200]
        body, data = body + rest[:length], rest[length + 2 :]
        if not length:
            assert not data, data
            return body, False
    return body, True


class Client:
    """The browser's end of a connection that was handed off."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        sock.settimeout(TIMEOUT)

    def read_until(self, text: bytes) -> bytes:
        """Read until ``text`` has come; returns everything so far."""
        while text not in self.received:
            chunk = self.sock.recv(65536)
            assert chunk, f"ended before {text!r}: {bytes(self.received[-300:])!r}"
            self.received += chunk
        return bytes(self.received)

    def finish(self) -> Response:
        """Read to the end."""
        reset = False
        try:
            while chunk := self.sock.recv(65536):
                self.received += chunk
        except ConnectionResetError:
            reset = True
        self.sock.close()
        return Response(bytes(self.received), reset)

    def gone(self) -> bool:
        """Whether the daemon has let go of the connection (reads and forgets)."""
        self.sock.settimeout(0)
        try:
            return not self.sock.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self.sock.close()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """(browser, server) of one TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    return client, accepted


def send_message(path: str | Path, kind: str, data: bytes, fds: Iterable[int]) -> None:
    """What the module does: connect, one message, close."""
    with socket.socket(socket.AF_UNIX, KINDS[kind]) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(str(path))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = sock.sendmsg([data], ancillary if len(ancillary[0][2]) else [])
        while sent < len(data):
            sent += sock.send(data[sent:])


def sealed_memfd(content: bytes, seals: int = 0x000F) -> int:
    """A payload as the module makes it; all four seals unless told otherwise."""
    fd = os.memfd_create("payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def envelope(data: object = None, **changes: object) -> bytes:
    """An envelope as the module writes it, with some members changed; ``data`` is text or anything JSON can say."""
    message: dict[str, object] = {
        "handoff": 2,
        "id": "aSNwZH8AAAEAAB7bQ0gAAAAA",
        "method": "GET",
        "uri": "/stream.php?prompt=s3cr3t",
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
        "data": data if data is None or isinstance(data, str) else json.dumps(data, ensure_ascii=False),
    }
    return json.dumps({**message, **changes}, ensure_ascii=False, separators=(",", ":")).encode()


class Daemon:
    """One daemon: a supervisor started as a subprocess, and every worker it ever had."""

    def __init__(
        self,
        directory: Path,
        config: str = "",
        *,
        kind: str = "seqpacket",
        code: Path = SOURCE,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.kind = kind
        self.code = code
        self.socket = directory / "daemon.sock"
        self.control = directory / "control.sock"
        self.config = directory / "config.toml"
        self.config.write_text(with_one_worker(config))
        self._log = directory / "log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / f"notify{len(list(directory.iterdir()))}"))
        # As a manager does: read at once. The kernel keeps ten messages for those who do not.
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen_to_notifications, daemon=True).start()
        self.environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
            "NOTIFY_SOCKET": self._notify.getsockname(),
            **(environ or {}),
        }
        self.notified: list[dict[str, str]] = []
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "streaming_daemon", *arguments]

    def start(
        self,
        *,
        wait: bool = True,
        command: list[str] | None = None,
        pass_fds: tuple[int, ...] = (),
        descriptors: int | None = None,
    ) -> Daemon:
        """``descriptors``: the daemon's soft limit, by prlimit(1): this process needs more than that for itself."""
        if command is None:
            command = self.command("--config", str(self.config), "--socket", f"{self.socket},{self.kind}")
            command += ["--control", str(self.control)]
        if descriptors is not None:
            command = ["prlimit", f"--nofile={descriptors}:", *command]
        # What the last one said is no sign of this one.
        self.drain_notifications()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=self.environ, stderr=log, stdout=log, pass_fds=pass_fds
            )
        if wait:
            self.wait_notified("READY", "1")
        return self

    def _listen_to_notifications(self) -> None:
        with self._notify:
            while message := self._notify.recv(4096):
                self._messages.put(message.decode())

    def wait_notified(self, name: str, value: str, timeout: float = 3 * TIMEOUT) -> dict[str, str]:
        """Wait for the next notification that says ``name=value``."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"not notified within {timeout} s: {name}={value}; {self.notified}") from None
            fields = dict(line.split("=", 1) for line in message.split("\n"))
            self.notified.append(fields)
            if fields.get(name) == value:
                return fields

    def drain_notifications(self) -> None:
        """Take what has come into ``notified``, and wait for nothing."""
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._messages.get_nowait()
                self.notified.append(dict(line.split("=", 1) for line in message.split("\n")))

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(TIMEOUT)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command of the same program."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def reload(self) -> subprocess.CompletedProcess[str]:
        return self.run("--control", str(self.control), "--reload", "--wait")

    def workers(self) -> list[int]:
        """The workers of this daemon that are alive, orphans too."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    arguments = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"--worker" in arguments and str(self.config).encode() in arguments:
                    found.append(int(entry.name))
        return sorted(found)

    def log(self) -> str:
        return self._log.read_text()

    def wait_log(self, pattern: str, timeout: float = TIMEOUT) -> str:
        """Wait for a log line that matches; returns the line."""

        def line() -> str:
            match = re.search(f"^.*{pattern}.*$", self.log(), re.MULTILINE)
            return match.group() if match else ""

        return wait_for(line, f"log line {pattern!r}", timeout)

    def hand(
        self,
        data: object = b"",
        *,
        pair: Callable[[], tuple[socket.socket, socket.socket]] = socket_pair,
        fds: Iterable[int] = (),
    ) -> Client:
        """Hand a fresh client to the daemon; ``data`` is bytes, or anything JSON can say; ``fds`` come behind it."""
        ours, theirs = pair()
        with theirs:
            send_message(self.socket, self.kind, encode(data), [theirs.fileno(), *fds])
        return Client(ours)

    def ask(self, data: object = b"", **options: Any) -> Response:
        return self.hand(data, **options).finish()

    def close(self) -> None:
        """End every process of this daemon, without the courtesies that other tests are about."""
        if self.process is not None:
            if "COVERAGE_PROCESS_START" in os.environ:
                # Who is killed does not say what it has covered.
                self.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(TIMEOUT / 3)
            self.process.kill()
            self.process.wait(TIMEOUT)
            for pid in self.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self._notify.getsockname())


def with_one_worker(config: str) -> str:
    """The configuration with one worker where it says nothing of workers: most tests are about what one does."""
    if "workers" in config:
        return config
    if "[server]" in config:
        return config.replace("[server]\n", "[server]\nworkers = 1\n", 1)
    return f"{config}\n[server]\nworkers = 1\n"


def encode(data: object) -> bytes:
    return data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()


def shaped(tokens: int, pace: float = 10000, **more: object) -> dict[str, object]:
    """Handoff data for a demo answer of so many tokens at such a pace."""
    return {"demo": {"tokens": tokens, "tokens_per_second": pace}, **more}
