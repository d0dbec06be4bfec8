# SPDX-License-Identifier: Apache-2.0
"""PHP scripts that hand off to a declared target with an envelope: large data, cookies, status."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from handoff_httpd import MPM, ErrorLog, Httpd
from handoff_php import KINDS, php_server
from handoff_standin import Client, Daemon, fetch, response


@pytest.fixture(scope="module", params=KINDS)
def php(request: pytest.FixtureRequest, built: None, run_dir: Path) -> Iterator[Httpd]:
    declared = f"SocketHandoffTarget rich unix:{run_dir}/ok/d.sock envelope=on\nSocketHandoffAllow rich"
    with php_server(request.param, run_dir, declared) as server:
        yield server


@pytest.fixture
def httpd(php: Httpd) -> Httpd:
    """The error log that must stay clean is this server's."""
    return php


@pytest.mark.parametrize("flush", ["", "&flush"])
@pytest.mark.parametrize("size", [0, 10, 65_537, 1_000_000])
def test_a_script_may_write_its_data_as_its_body(httpd: Httpd, daemon: Daemon, size: int, flush: str) -> None:
    """Where a header is limited to 8 KB by FastCGI; cookies and status go with it."""
    with Client(httpd.port("main")) as client:
        client.get(f"/large.php?n={size}{flush}")
        handoff = daemon.next()
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")
    envelope = handoff.envelope
    if size > 65536:
        assert (envelope["data"], handoff.payload) == (None, b"x" * size)
    else:
        assert (envelope["data"], handoff.payload) == ("x" * size, None)
    assert envelope["status"] == 201
    told = {name.lower(): value for name, value in envelope["response_headers"]}
    assert told.pop("set-cookie").startswith("sid=abc; ")
    assert told.pop("cache-control") == "no-store"
    assert set(told) <= {"x-powered-by"}


def test_a_header_of_8100_bytes_passes_and_a_longer_one_is_no_handoff(
    httpd: Httpd, daemon: Daemon, log: ErrorLog
) -> None:
    """mod_proxy_fcgi's limit, which is why the body may be the data."""
    with Client(httpd.port("main")) as client:
        client.get("/header.php?n=8100")
        handoff = daemon.next()
        assert handoff.envelope["data"] == "x" * 8100
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")
    with Client(httpd.port("main")) as client:
        client.get("/header.php?n=20000", "Connection: close")
        if MPM == "prefork" and "proxy_fcgi" not in (httpd.root / "conf/httpd.conf").read_text():
            handoff = daemon.next()  # mod_php knows no such limit
            assert handoff.envelope["data"] == "x" * 20_000
            handoff.finish(response(b"ok"))
            client.rest()
        else:
            assert client.answer().status == 500
            assert daemon.count == 1
            for line in ("Premature end of script headers", "AH01070", "AH01075"):
                log.expect(f"proxy_fcgi:error .*{line}")


def test_a_script_whose_output_php_compresses_is_refused(httpd: Httpd, daemon: Daemon, log: ErrorLog) -> None:
    assert fetch(httpd.port("main"), "/compressed.php", "Accept-Encoding: gzip").status == 500
    assert daemon.accepted == 0
    log.expect("is encoded .Content-Encoding: gzip., .* such as PHP's zlib.output_compression")
    with Client(httpd.port("main")) as client:
        client.get("/compressed.php")
        handoff = daemon.next()
        assert handoff.envelope["data"] == "x" * 9000
        handoff.finish(response(b"ok"))
        client.rest()
