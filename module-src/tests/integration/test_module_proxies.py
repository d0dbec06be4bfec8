# SPDX-License-Identifier: Apache-2.0
"""Backends behind mod_proxy: of all its protocols FastCGI alone is an application of this host's and may hand off."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from handoff_httpd import MPM, ErrorLog, Httpd
from handoff_standin import Client, Daemon, fetch, response

BODY = b"from the backend"
MODULES = ["http", "scgi", "uwsgi", "ajp", "fcgi"]


@pytest.fixture(scope="module")
def server(built: None, run_dir: Path) -> Iterator[Httpd]:
    """A backend of each protocol at one port, or at one socket."""
    httpd = Httpd(mpm=MPM, run=run_dir)
    try:
        port = httpd.port("main")
        tcp = f"127.0.0.1:{httpd.backend}"
        unix = f"unix:{run_dir}/backend.sock"
        have = [name for name in MODULES if httpd.has_module(f"proxy_{name}")]
        passes = "\n".join(f"ProxyPass /pass-{name} {name}://{tcp}/ disablereuse=on retry=0" for name in have)
        httpd.start(f"""
{httpd.load("proxy", *(f"proxy_{name}" for name in have), "rewrite")}
Listen 127.0.0.1:{port}
DocumentRoot {httpd.root}/htdocs
SocketHandoffTarget llm unix:{run_dir}/ok/d.sock
SocketHandoffAllow All
{passes}
ProxyPass /unix-http {unix}|http://a/ disablereuse=on retry=0
ProxyPass /unix-fcgi {unix}|fcgi://b/ disablereuse=on retry=0
<Location /handler-http>
    SetHandler "proxy:http://{tcp}"
</Location>
<Location /handler-scgi>
    SetHandler "proxy:{unix}|scgi://c/"
</Location>
<Location /handler-unix-http>
    SetHandler "proxy:{unix}|http://d/"
</Location>
<Location /handler-fcgi>
    SetHandler "proxy:fcgi://{tcp}"
</Location>
<Location /handler-unix-fcgi>
    SetHandler "proxy:{unix}|fcgi://e/"
</Location>
RewriteEngine On
RewriteRule ^/rewrite-http http://{tcp}/ [P]
RewriteRule ^/rewrite-fcgi fcgi://{tcp}/ [P]
""")
        yield httpd
    finally:
        httpd.stop()


@pytest.fixture
def httpd(server: Httpd) -> Httpd:
    """The error log that must stay clean is this server's."""
    return server


HEADERS = {
    "Content-Type": "text/plain",
    "X-Socket-Handoff": "llm",
    "X-Handoff-Data": "by-the-backend",
    "Content-Length": str(len(BODY)),
}


def lines(first: str) -> bytes:
    return "".join(f"{line}\r\n" for line in [first, *(f"{k}: {v}" for k, v in HEADERS.items()), ""]).encode() + BODY


def ajp() -> bytes:
    """SEND_HEADERS, SEND_BODY_CHUNK and END_RESPONSE of AJP 1.3."""

    def text(value: str) -> bytes:
        return struct.pack(">H", len(value)) + value.encode() + b"\0"

    head = b"\x04" + struct.pack(">H", 200) + text("OK") + struct.pack(">H", len(HEADERS))
    head += b"".join(text(k) + text(v) for k, v in HEADERS.items())
    body = b"\x03" + struct.pack(">H", len(BODY)) + BODY + b"\0"
    return b"".join(b"AB" + struct.pack(">H", len(part)) + part for part in (head, body, b"\x05\x00"))


def fcgi() -> bytes:
    """Two records FCGI_STDOUT, of which the empty one ends it, and FCGI_END_REQUEST, for request 1."""

    def record(kind: int, content: bytes) -> bytes:
        return struct.pack(">BBHHBB", 1, kind, 1, len(content), 0, 0) + content

    return record(6, lines("Status: 200 OK")) + record(6, b"") + record(3, bytes(8))


REPLIES = {
    "http": lines("HTTP/1.1 200 OK"),
    "uwsgi": lines("HTTP/1.1 200 OK"),
    "scgi": lines("Status: 200 OK"),
    "ajp": ajp(),
    "fcgi": fcgi(),
}


@contextmanager
def backend(httpd: Httpd, path: str) -> Iterator[None]:
    """Answers one connection, whatever it asks."""
    over_unix = "unix" in path or path == "handler-scgi"
    listener = socket.socket(socket.AF_UNIX if over_unix else socket.AF_INET)
    name = httpd.run / "backend.sock"
    if over_unix:
        listener.bind(str(name))
        name.chmod(0o666)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", httpd.backend))
    listener.listen()
    listener.settimeout(10)

    def answer() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(10)
            peer.recv(65536)
            peer.sendall(REPLIES[path.rsplit("-", 1)[1]])
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass

    thread = Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        listener.close()
        name.unlink(missing_ok=True)


def needs(httpd: Httpd, path: str) -> None:
    module = f"proxy_{path.rsplit('-', 1)[1]}"
    if not httpd.has_module(module):
        pytest.skip(f"NOT TESTED: mod_{module} is not there")


@pytest.mark.parametrize(
    "path",
    [
        "pass-http",
        "pass-scgi",
        "pass-uwsgi",
        "pass-ajp",
        "unix-http",
        "handler-http",
        "handler-scgi",
        "handler-unix-http",
        "rewrite-http",
    ],
)
def test_a_backend_of_another_protocol_cannot_hand_off(httpd: Httpd, daemon: Daemon, log: ErrorLog, path: str) -> None:
    needs(httpd, path)
    with backend(httpd, path):
        answer = fetch(httpd.port("main"), f"/{path}")
    assert (answer.status, answer.body) == (200, BODY)
    assert daemon.accepted == 0
    log.expect("X-Socket-Handoff is ignored: it came from a proxied backend")


@pytest.mark.parametrize("path", ["pass-fcgi", "unix-fcgi", "handler-fcgi", "handler-unix-fcgi", "rewrite-fcgi"])
def test_a_fastcgi_application_may_hand_off_however_it_is_reached(httpd: Httpd, daemon: Daemon, path: str) -> None:
    with backend(httpd, path), Client(httpd.port("main")) as client:
        client.get(f"/{path}")
        handoff = daemon.next()
        assert handoff.data == b"by-the-backend"
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")
