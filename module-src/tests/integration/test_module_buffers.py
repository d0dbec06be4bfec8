# SPDX-License-Identifier: Apache-2.0
"""On a host whose sockets take less than others do (net.core.wmem_default) data goes beside the message sooner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from handoff_httpd import BUILD, MPM, SANITIZED, ErrorLog, Httpd
from handoff_standin import Client, Daemon, fetch, response

LIMIT = 65536 - 32


@pytest.fixture(scope="module")
def server(built: None, run_dir: Path) -> Iterator[Httpd]:
    if SANITIZED:
        pytest.skip("NOT TESTED under sanitizers: their runtime must come before a preloaded library")
    httpd = Httpd(mpm=MPM, run=run_dir, extra_environment={"LD_PRELOAD": str(BUILD / "small_buffers.so")})
    try:
        port = httpd.port("main")
        httpd.start(f"""
Listen 127.0.0.1:{port}
SocketHandoffTarget env unix:{run_dir}/ok/d.sock envelope=on
SocketHandoffTarget plain unix:{run_dir}/ok/d.sock
SocketHandoffAllow All
<Location />
    SetHandler handoff-test
</Location>
""")
        yield httpd
    finally:
        httpd.stop()


@pytest.fixture
def httpd(server: Httpd) -> Httpd:
    """The error log that must stay clean is this server's."""
    return server


@pytest.mark.parametrize("by", ["from=response-body&body={size}", "dn={size}"])
@pytest.mark.parametrize("size", [4_000, 60_000, 64_500, 65_300, 65_536])
def test_data_that_the_socket_does_not_take_comes_as_a_memfd(httpd: Httpd, daemon: Daemon, size: int, by: str) -> None:
    with Client(httpd.port("main")) as client:
        client.get(f"/t?t=env&{by.format(size=size)}")
        handoff = daemon.next()
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")
    assert len(handoff.data) <= LIMIT
    data = handoff.payload if handoff.payload is not None else handoff.envelope["data"].encode()
    assert data == (b"d" if by.startswith("dn") else b"b") * size
    assert (handoff.payload is None) == (size <= 64_500), "and none that it does"


def test_data_that_grows_in_json_comes_as_a_memfd_sooner(httpd: Httpd, daemon: Daemon) -> None:
    with Client(httpd.port("main")) as client:
        client.get("/t?t=env&from=response-body&ctl=12000")
        handoff = daemon.next()
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")
    assert handoff.payload == b"\x01" * 12_000


def test_a_plain_message_says_how_much_the_socket_takes(httpd: Httpd, daemon: Daemon, log: ErrorLog) -> None:
    assert fetch(httpd.port("main"), "/t?t=plain&dn=65536").status == 500
    assert daemon.count == 0
    log.expect(f"has 65536 bytes, a message takes {LIMIT}")
