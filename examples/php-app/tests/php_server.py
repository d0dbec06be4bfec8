"""The application under `php -S`, and a client that speaks HTTP to it as a browser or a script would."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

APP = Path(__file__).resolve().parents[1]
PASSWORD = "correct horse"


@dataclass
class Response:
    status: int
    headers: list[tuple[str, str]]
    body: str

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) < 2, f"{name} is there {len(values)} times"
        return values[0] if values else None

    @property
    def error(self) -> dict[str, str]:
        """The JSON error; fails if this is anything but a complete one that hands nothing off."""
        assert self.header("Content-Type") == "application/json", self
        assert self.header("X-Socket-Handoff") is None, self
        assert self.header("X-Handoff-Data") is None, self
        assert self.header("X-Handoff-Data-From") is None, self
        assert self.header("Cache-Control") == "no-store", self
        error: dict[str, str] = json.loads(self.body)["error"]
        assert set(error) == {"type", "message"}, self
        return error

    @property
    def handoff(self) -> dict[str, Any]:
        """The data given to the daemon; fails if this is anything but a handoff."""
        assert self.status == 200, self
        assert self.header("X-Socket-Handoff") == "llm", self
        value = self.header("X-Handoff-Data")
        if value is None:
            assert self.header("X-Handoff-Data-From") == "response-body", self
            value = self.body
        else:
            assert (self.header("X-Handoff-Data-From"), self.body) == (None, ""), self
        data: dict[str, Any] = json.loads(value)
        return data


@dataclass
class Client:
    """Keeps cookies and the last token, as a browser with one tab."""

    port: int
    cookies: dict[str, str] = field(default_factory=dict)
    csrf: str = ""

    def request(
        self,
        method: str,
        path: str,
        body: bytes | str | dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        headers = dict(headers or {})
        if isinstance(body, dict):
            body = urllib.parse.urlencode(body)
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            response = Response(answer.status, answer.getheaders(), answer.read().decode())
        finally:
            connection.close()
        for name, value in response.headers:
            if name.lower() == "set-cookie":
                key, _, rest = value.partition("=")
                self.cookies[key] = rest.partition(";")[0]
        return response

    def get(self, path: str, **headers: str) -> Response:
        return self.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def session(self) -> dict[str, Any]:
        session: dict[str, Any] = json.loads(self.get("/session.php").body)
        self.csrf = session["csrf"]
        return session

    def log_in(self, user: str = "demo", password: str = PASSWORD) -> Response:
        self.session()
        response = self.request("POST", "/login.php", {"user": user, "password": password, "csrf": self.csrf})
        self.session()
        return response

    def ask(self, body: bytes | str | dict[str, str] | None, **headers: str) -> Response:
        sent = {"X-CSRF-Token": self.csrf} | {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", "/stream.php", body, sent)

    def ask_json(self, value: object) -> Response:
        return self.ask(json.dumps(value), Content_Type="application/json")


@dataclass
class Server:
    port: int
    config: Path
    sessions: Path
    log: Path
    pid: int

    def cpu_seconds(self) -> float:
        """What the server's one process has computed since its start, which other processes do not lengthen."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, proc(5)

    def client(self) -> Client:
        return Client(self.port)

    def logged_in(self) -> Client:
        client = self.client()
        response = client.log_in()
        assert response.status == 303, response
        return client

    def write_config(self, **changes: object) -> None:
        values = {"target": "llm", "user": "demo", "password_hash": password_hash()} | changes
        # PHP reads JSON's strings in single quotes as they are, apart from the two characters escaped here.
        literal = json.dumps(values).replace("\\", "\\\\").replace("'", "\\'")
        self.config.write_text(f"<?php return json_decode('{literal}', true);")


_hashes: dict[int, str] = {}


def password_hash(cost: int = 4) -> str:
    if cost not in _hashes:
        code = f"echo password_hash({PASSWORD!r}, PASSWORD_BCRYPT, ['cost' => {cost}]);"
        _hashes[cost] = subprocess.run(["php", "-r", code], check=True, capture_output=True, text=True).stdout
    return _hashes[cost]


StartServer = Callable[..., Server]
