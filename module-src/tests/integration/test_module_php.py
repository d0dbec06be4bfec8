# SPDX-License-Identifier: Apache-2.0
"""With PHP itself: PHP-FPM under every MPM, mod_php under prefork."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from handoff_httpd import ErrorLog, Httpd, wait_until
from handoff_php import KINDS, php_server
from handoff_standin import Client, Daemon, fetch, response


@pytest.fixture(scope="module", params=KINDS)
def php(request: pytest.FixtureRequest, built: None, run_dir: Path) -> Iterator[Httpd]:
    """Applications name paths, as they do with the original module."""
    with php_server(request.param, run_dir, f"SocketHandoffAllowedPrefix {run_dir}/ok/") as server:
        yield server


@pytest.fixture
def httpd(php: Httpd) -> Httpd:
    """The error log that must stay clean is this server's."""
    return php


def test_a_script_that_sets_the_headers_and_ends_is_handed_off(httpd: Httpd, daemon: Daemon) -> None:
    with Client(httpd.port("main")) as client:
        client.get(f"/stream.php?t={daemon.path}&q=hello", "X-Socket-Handoff: /run/evil")
        handoff = daemon.next()
        assert json.loads(handoff.data) == {
            "prompt": "hello",
            "method": "GET",
            "seen": None,
            "body": 0,
        }
        handoff.finish(response(b"data: hi\n\n"))
        assert client.rest() == response(b"data: hi\n\n")


@pytest.mark.parametrize("size", [0, 10, 300_000])
def test_a_posted_body_is_read_by_php_and_not_left_for_the_daemon(httpd: Httpd, daemon: Daemon, size: int) -> None:
    with Client(httpd.port("main")) as client:
        client.post(f"/stream.php?t={daemon.path}", b"p" * size)
        handoff = daemon.next()
        data = json.loads(handoff.data)
        assert (data["method"], data["body"]) == ("POST", size)
        assert handoff.readable() == b""
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")


def test_a_script_that_flushes_and_works_on_is_not_killed(httpd: Httpd, daemon: Daemon) -> None:
    mark = httpd.root / "logs" / "mark"
    with Client(httpd.port("main")) as client:
        client.get(f"/working.php?t={daemon.path}&mark={mark}")
        daemon.next().finish(response(b"ok"))
        assert client.rest() == response(b"ok")
    wait_until(lambda: mark.exists() and mark.read_text() == "done", "the script ran to its end")
    mark.unlink()
    line = httpd.access_line("mark=")
    assert "st=200 b=- X=- O=0" in line


def test_a_plain_page_and_a_head_request_are_served_as_ever(httpd: Httpd, daemon: Daemon) -> None:
    assert fetch(httpd.port("main"), "/plain.php").body == b"plain php"
    answer = fetch(httpd.port("main"), f"/stream.php?t={daemon.path}", method="HEAD")
    assert answer.status == 200
    assert daemon.count == 0


def test_a_script_with_an_error_status_is_handed_off_nevertheless(httpd: Httpd, daemon: Daemon) -> None:
    with Client(httpd.port("main")) as client:
        client.get(f"/failing.php?t={daemon.path}")
        daemon.next().finish(response(b"ok"))
        assert client.rest() == response(b"ok")


@pytest.mark.parametrize(("output", "status", "result"), [("", 503, "-"), ("&output", 500, "application-failed")])
def test_php_that_is_killed_after_it_asked_is_an_error_and_no_handoff(
    httpd: Httpd, daemon: Daemon, log: ErrorLog, output: str, status: int, result: str
) -> None:
    """PHP keeps its headers until there is output: before that, Apache has not heard that it asked."""
    if "proxy_fcgi" not in (httpd.root / "conf/httpd.conf").read_text():
        pytest.skip("NOT APPLICABLE: mod_php would kill httpd itself")
    query = f"t={daemon.path}&killed{output}"
    answer = fetch(httpd.port("main"), f"/dying.php?{query}")
    assert answer.status == status
    assert daemon.count == 0
    log.expect("proxy_fcgi:error .*AH01067")
    log.expect("proxy_fcgi:error .*AH01075")
    assert httpd.access_line(f"{query} ").endswith(f" result={result}")


def test_a_refused_path_and_a_missing_daemon_are_told_to_the_client(httpd: Httpd, log: ErrorLog, target: Path) -> None:
    assert fetch(httpd.port("main"), "/stream.php?t=/tmp/x").status == 403
    log.expect("handoff refused: the path")
    answer = fetch(httpd.port("main"), f"/stream.php?t={target}")
    assert answer.status == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["content-type"].startswith("text/html")
    log.expect("there is no such socket")


def test_twelve_streams_leave_apache_and_php_free(httpd: Httpd, daemon: Daemon) -> None:
    clients = [Client(httpd.port("main")).get(f"/stream.php?t={daemon.path}&q={n}") for n in range(12)]
    handoffs = [daemon.next() for _ in clients]
    assert fetch(httpd.port("main"), "/plain.php").body == b"plain php"
    for handoff in handoffs:
        handoff.finish(response(json.loads(handoff.data)["prompt"].encode()))
    for n, client in enumerate(clients):
        assert client.rest() == response(b"%d" % n)
        client.sock.close()


@pytest.mark.parametrize("again", range(3))
def test_an_errordocument_may_be_a_php_page(httpd: Httpd, log: ErrorLog, target: Path, again: int) -> None:
    """Under mod_php the page runs while the first script's handler is still being called."""
    answer = fetch(httpd.port("main"), f"/stream.php?t={target}&errorpage={again}")
    assert answer.status == 503
    assert answer.headers.get("x-sorry") == "yes"
    assert answer.body == f"sorry: 503 /stream.php?t={target}&errorpage={again}".encode()
    log.expect("there is no such socket")
    assert fetch(httpd.port("main"), "/plain.php").body == b"plain php"
