"""The chain that the examples run through, one for all tests, and an error log that has to stay clean.

EXAMPLES_PHP: fpm (the default) or mod_php.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue

import pytest
from chain import ROOT, Chain, Client, allowed, chain, complaints, openai_api_wiring, snippets_wiring
from openai_server import OpenAIServer

SNIPPETS = ROOT / "examples" / "php-snippets"
HELPER = ROOT / "examples" / "php-helper" / "src" / "SocketHandoff.php"

SCRIPTS = ["send.php", "late.php", "readme.php", "framework.php", "stream.php", "expected.php"]
"""Of the tests; stream.php is the reference application's, which has a README and tests of its own."""


@dataclass(slots=True)
class Search:
    """A search server that is as slow as a test wants: each question waits in ``asked`` for its answer; None: a 500."""

    asked: SimpleQueue[tuple[str, SimpleQueue[bytes | None]]] = field(default_factory=SimpleQueue)
    port: int = 0

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        search = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer: SimpleQueue[bytes | None] = SimpleQueue()
                search.asked.put((self.path, answer))
                found = answer.get(timeout=60)
                self.send_response(500 if found is None else 200)
                self.end_headers()
                self.wfile.write(found or b"")

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: the tests say what went wrong."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.port = server.server_port
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield
            server.shutdown()


@pytest.fixture(scope="session")
def search() -> Iterator[Search]:
    one = Search()
    with one.serve():
        yield one


@pytest.fixture(scope="session")
def server() -> Iterator[OpenAIServer]:
    one = OpenAIServer()
    with one.serve():
        yield one


@pytest.fixture(scope="session")
def site(search: Search, server: OpenAIServer) -> Iterator[Chain]:
    """Apache, PHP-FPM and the daemon, with the snippets as somebody installs them: beside the class."""
    # What PHP finds in its environment; {state} is the directory that it can write to.
    environment = {"SEARCH_URL": f"http://127.0.0.1:{search.port}/", "API_TOKENS": "{state}/api-tokens.php"}
    php = os.environ.get("EXAMPLES_PHP", "fpm")
    # Nothing is allowed but what the READMEs say, and scripts that tests write.
    directives = snippets_wiring() + openai_api_wiring() + allowed(*SCRIPTS)
    with chain(server.url, directives=directives, allow="None", balancer=True, php=php, environment=environment) as one:
        one.install(HELPER, *sorted(SNIPPETS.glob("*.php")))
        yield one


@pytest.fixture(autouse=True)
def error_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """No example makes Apache complain; a test that breaks something on purpose says so by the mark `breaks`."""
    yield
    if "site" in request.fixturenames:
        said = complaints(request.getfixturevalue("site"))
        assert not said or request.node.get_closest_marker("breaks"), said


@pytest.fixture
def client(site: Chain) -> Client:
    return site.client()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "breaks: makes Apache complain, and means to")
