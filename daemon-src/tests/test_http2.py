"""HTTP/2 to the provider by HAProxy, with the configuration that docs/backends.md offers."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from conftest import MakeDaemon, MakeLLM
from daemon_harness import SOURCE, TIMEOUT, Daemon, tcp_pair, wait_for
from llm_server import SSE_HEAD, FakeLLM, Request

pytest.importorskip("httptools")

HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
PAGE = (SOURCE.parent / "docs/backends.md").read_text()
PROVIDER = """
defaults
    mode http
    option abortonclose
    timeout connect 10s
    timeout client 1h
    timeout server 1h
frontend provider
    bind 127.0.0.1:{port} ssl crt {certificate} alpn h2
    http-request set-header X-Version %[fc_http_major]
    http-request set-header X-Connection %[src_port]
    default_backend model
backend model
    server model 127.0.0.1:{model}
"""


def recipe(directory: Path, port: int, certificate: Path) -> str:
    """The page's configuration, for a provider on this machine."""
    [text] = re.findall(r"```haproxy\n(.*?)```", PAGE, re.DOTALL)
    for old, new in (
        ("unix@/run/llm-egress.sock user streaming-daemon group streaming-daemon", f"unix@{directory}/egress.sock"),
        ("server openai api.openai.com:443", f"server openai 127.0.0.1:{port}"),
        ("ca-file /etc/ssl/certs/ca-certificates.crt", f"ca-file {certificate}"),
        ("sni str(api.openai.com) verifyhost api.openai.com", "sni str(localhost) verifyhost localhost"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return str(text)


@contextmanager
def haproxy(directory: Path, name: str, text: str) -> Iterator[None]:
    assert HAPROXY is not None, "haproxy is missing: script/bootstrap installs it"
    config = directory / f"{name}.cfg"
    # Connections are shared within a thread.
    config.write_text(f"global\n    maxconn 500\n    nbthread 1\n{text}")
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([HAPROXY, "-db", "-f", str(config)], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def listens(address: tuple[str, int] | str) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as sock:
        return sock.connect_ex(address) == 0


class Way:
    """A daemon, the recipe, a provider that speaks nothing but HTTP/2 over TLS, and a model."""

    def __init__(self, daemon: Daemon, llm: FakeLLM) -> None:
        self.daemon = daemon
        self.llm = llm


@pytest.fixture
def way(make_daemon: MakeDaemon, make_llm: MakeLLM, certificate: Path, tmp_path: Path) -> Iterator[Way]:
    llm = make_llm(answer)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with ExitStack() as stack:
        provider = PROVIDER.format(port=port, certificate=certificate, model=llm.port)
        stack.enter_context(haproxy(tmp_path, "provider", provider))
        stack.enter_context(haproxy(tmp_path, "egress", recipe(tmp_path, port, certificate)))
        socket_path = str(tmp_path / "egress.sock")
        wait_for(lambda: listens(("127.0.0.1", port)) and listens(socket_path), "HAProxy to listen")
        config = f'[backends.gpt]\ntype = "openai"\nbase_url = "unix:{socket_path}:/v1"\n'
        yield Way(make_daemon(config).start(), llm)


def answer(request: Request) -> None:
    request.send(SSE_HEAD)
    request.event("Hel")
    request.event("lo")
    request.end()


def test_answers_share_a_connection_of_http_2(way: Way) -> None:
    all_begun = threading.Event()

    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.event("Hel")
        assert all_begun.wait(TIMEOUT)
        request.event("lo")
        request.end()

    way.llm.script = script
    clients = []
    for _ in range(20):
        # One after another: of many at once HAProxy opens connections for those that cannot wait for the first.
        clients.append(way.daemon.hand({"prompt": "p"}))
        clients[-1].read_until(b"Hel")
    all_begun.set()
    assert [client.finish().texts for client in clients] == [["Hel", "lo"]] * 20
    requests = way.llm.requests
    assert {(request.headers["x-version"], request.headers["host"]) for request in requests} == {
        ("2", "api.openai.com")
    }
    assert len({request.headers["x-connection"] for request in requests}) == 1


def test_nothing_waits_in_the_proxy(way: Way) -> None:
    seen = threading.Event()

    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.event("first")
        assert seen.wait(TIMEOUT)
        request.event("second")
        request.end()

    way.llm.script = script
    client = way.daemon.hand({"prompt": "p"})
    client.read_until(b"first")
    seen.set()
    assert client.finish().texts == ["first", "second"]


def test_who_hangs_up_cancels_the_request_at_the_provider(way: Way) -> None:
    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.event("a")
        request.wait_closed()

    way.llm.script = script
    client = way.daemon.hand({"prompt": "p"}, pair=tcp_pair)
    client.read_until(b'"a"')
    begin = time.monotonic()
    client.close()
    wait_for(way.llm.requests[0].closed.is_set, "the request to be given up")
    assert time.monotonic() - begin < 5
