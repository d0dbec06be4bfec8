"""A browser of the load balancer: curl over TLS, with HTTP/2 or HTTP/1.1, a cookie jar, and events as they come."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode


@dataclass(slots=True)
class Reply:
    """One response: protocol ("2" or "1.1"), status, headers in lower case, body."""

    protocol: str
    status: int
    headers: list[tuple[str, str]]
    body: str


@dataclass(slots=True)
class Stream:
    """A stream that is being read, with the moment (time.monotonic) at which each event came."""

    process: subprocess.Popen[str]
    events: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def read(self) -> Iterator[str]:
        """The data of further events; ends with the response. AssertionError where curl found it cut."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("data: "):
                self.events.append(line[6:].rstrip("\n"))
                self.times.append(time.monotonic())
                yield self.events[-1]
        code = self.process.wait(timeout=30)
        assert code == 0, (code, self.process.stderr.read() if self.process.stderr else "", self.events[-3:])

    def read_first(self) -> str:
        return next(self.read())

    def read_to_done(self, tokens: int) -> None:
        """Read to the end, and assert that every event came."""
        for _ in self.read():
            pass
        assert self.events[-1:] == ["[DONE]"], self.events[-3:]
        assert len(self.events) == tokens + 1


@dataclass(slots=True)
class Browser:
    """One user's browser; ``jar`` is the file of its cookies."""

    address: str
    jar: Path
    csrf: str = ""
    http: str = "--http2"

    def command(self, path: str, *options: str) -> list[str]:
        return [
            *("curl", "--silent", "--show-error", "--insecure", "--no-buffer", self.http, "--max-time", "120"),
            *("--cookie", str(self.jar), "--cookie-jar", str(self.jar), *options),
            path if path.startswith("http") else f"https://{self.address}{path}",
        ]

    def get(self, path: str, *options: str) -> Reply:
        """One request, read to its end; redirects are not followed."""
        done = subprocess.run(self.command(path, "--include", *options), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        head, _, body = done.stdout.partition("\n\n")
        status, *lines = head.splitlines()
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        protocol, number = status.split()[:2]
        return Reply(protocol.removeprefix("HTTP/"), int(number), headers, body)

    def log_in(self, password: str) -> None:
        self.csrf = json.loads(self.get("/session.php").body)["csrf"]
        form = urlencode({"user": "demo", "password": password, "csrf": self.csrf})
        assert self.get("/login.php", "--data", form).status == 303
        session = json.loads(self.get("/session.php").body)
        assert session["user"] == "demo", session
        self.csrf = session["csrf"]

    def stream(self, tokens: int, pace: float, *options: str) -> Stream:
        """Ask for ``tokens`` tokens at ``pace`` tokens a second."""
        query = urlencode({"prompt": "edge", "tokens": tokens, "pace": pace})
        command = self.command(f"/stream.php?{query}", "--fail", *options)
        return Stream(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

    def cookies(self) -> dict[str, list[str]]:
        """Name -> the fields of curl's cookie jar: domain, subdomains, path, secure, expires, name, value."""
        rows = [line.removeprefix("#HttpOnly_").split("\t") for line in self.jar.read_text().splitlines()]
        return {row[5]: row for row in rows if len(row) == 7}
