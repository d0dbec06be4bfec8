# SPDX-License-Identifier: Apache-2.0
"""The lane with sanitizers finds what it is there to find; where it does not, its silence proves nothing."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from handoff_httpd import BUILD, MPM, ErrorLog, Httpd, wait_until
from handoff_standin import Client


@pytest.fixture
def httpd() -> Iterator[Httpd]:
    run = Path(tempfile.mkdtemp(prefix="handoff-sanitize-"))
    server = Httpd(mpm=MPM, run=run)
    try:
        server.start(f"""
LoadModule handoff_short_lived_module {BUILD}/mod_handoff_short_lived.so
Listen 127.0.0.1:{server.port("main")}
<Location />
    SetHandler handoff-short-lived
</Location>
""")
        yield server
    finally:
        server.stop()
        shutil.rmtree(run)


def reports_of(httpd: Httpd, uri: str) -> str:
    with Client(httpd.port("main")) as client:
        client.get(uri, "Connection: close").expect_reset_or_fin()
    return httpd.sanitizer_reports()


def test_a_socket_from_the_requests_pool_is_a_use_after_free(httpd: Httpd) -> None:
    found: list[str] = []

    def caught() -> bool:
        found.append(reports_of(httpd, "/?short"))
        return "heap-use-after-free" in "".join(found)

    wait_until(caught, "the sanitizer reports the short-lived socket")
    wait_until(httpd.idle, "a new child took the place of the dead one")
    httpd.sanitizer_reports()


def test_a_socket_from_the_connections_pool_is_not(httpd: Httpd) -> None:
    assert reports_of(httpd, "/?long") == ""


def test_undefined_behaviour_of_a_module_is_in_the_error_log(httpd: Httpd) -> None:
    log = ErrorLog(httpd)
    assert log.unexpected() == []
    reports_of(httpd, "/?undefined")
    found: list[str] = []

    def reported() -> bool:
        found.extend(log.unexpected())
        return bool(found)

    wait_until(reported, "UBSan reports the shift")
    assert "mod_handoff_short_lived.c" in found[0]
    assert "runtime error: shift exponent" in found[0]
