# SPDX-License-Identifier: Apache-2.0
"""Nothing is used up: descriptors and memory stay flat, and a handoff costs nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from handoff_httpd import SANITIZED, WORKERS, ErrorLog, Httpd, wait_until
from handoff_standin import Client, Daemon, fetch, response

Uri = Callable[..., str]


@pytest.mark.parametrize("signal", [11, 6])
def test_a_child_that_crashes_would_fail_its_test(httpd: Httpd, log: ErrorLog, signal: int) -> None:
    """httpd says so with the level notice only, when its main process looks next: the tests' own guard is tested."""
    if signal == 11 and SANITIZED:
        pytest.skip("NOT APPLICABLE: ASan reports that signal itself")
    with Client(httpd.port("main")) as client:
        client.get(f"/t?crash={signal}").expect_reset_or_fin()
    crashes = log.unexpected()
    assert len(crashes) == 1 and "exit signal" in crashes[0]
    wait_until(lambda: len(httpd.children()) >= (WORKERS if httpd.mpm == "prefork" else 1), "another child")
    assert fetch(httpd.port("main"), "/plain.html").status == 200


def test_failed_handoffs_leak_no_descriptor(httpd: Httpd, uri: Uri, log: ErrorLog, run_dir: Path) -> None:
    link = run_dir / "ok" / "link.sock"
    link.symlink_to("d.sock")
    try:
        fetch(httpd.port("main"), f"/t?t={link}")
        before = httpd.descriptors()
        for _ in range(100):
            assert fetch(httpd.port("main"), f"/t?t={link}").status == 403
        wait_until(lambda: httpd.descriptors() <= before, f"back to {before} descriptors")
    finally:
        link.unlink()
    log.expect("a symlink lies on the way", times=101)


def test_the_client_is_closed_in_apache_while_the_stream_runs(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    """The FIN is the daemon's alone: no child keeps a copy of the client's socket."""
    with Client(httpd.port("main")) as client:
        client.get(uri(d="x"))
        handoff = daemon.next()
        inode = Path(f"/proc/self/fd/{handoff.client.fileno()}").readlink()

        def held() -> list[Path]:
            links = []
            for pid in httpd.children():
                for fd in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        links.append(fd.readlink())
            return [link for link in links if link == inode]

        wait_until(lambda: not held(), "Apache has no copy of the client")
        handoff.finish(response(b"bye"))
        assert client.rest() == response(b"bye")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_daemon_that_keeps_the_client_open_does_not_hold_the_worker(
    httpd: Httpd, daemon: Daemon, uri: Uri, method: str
) -> None:
    clients = []
    for _ in range(WORKERS + 1):
        client = Client(httpd.port("main"))
        clients.append(client)
        client.get(uri(d="x"), "Content-Length: 4", method=method).send(b"body")
    handoffs = [daemon.next() for _ in clients]
    assert fetch(httpd.port("main"), "/plain.html").status == 200
    for handoff, client in zip(handoffs, clients, strict=True):
        handoff.finish()
        client.sock.close()
