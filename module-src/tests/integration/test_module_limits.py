# SPDX-License-Identifier: Apache-2.0
"""An unprivileged process may have no more descriptors under way than it may open (unix(7), ETOOMANYREFS)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from handoff_httpd import MPM, ErrorLog, Httpd, wait_until
from handoff_standin import Client, Daemon, answer_ok, fetch

LIMIT = 100
TOO_MANY = "too many descriptors wait for the daemon"


@pytest.fixture(scope="module")
def server(built: None, run_dir: Path) -> Iterator[Httpd]:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: needs root, so that httpd runs as a user of whom nothing else is under way")
    httpd = Httpd(mpm=MPM, run=run_dir, open_files=LIMIT)
    try:
        port = httpd.port("main")
        httpd.start(f"""
Listen 127.0.0.1:{port}
LogFormat "%q result=%{{handoff-result}}n" t
CustomLog {httpd.root}/logs/access t
SocketHandoffTarget llm unix:{run_dir}/ok/d.sock envelope=on maxfails=1
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


def test_too_many_descriptors_under_way_are_a_503_and_the_target_is_not_skipped(
    httpd: Httpd, target: Path, log: ErrorLog
) -> None:
    clients: list[Client] = []
    hanging = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        hanging.bind(str(target))
        target.chmod(0o666)
        hanging.listen(4 * LIMIT)
        while not log.matching(TOO_MANY):
            assert len(clients) <= LIMIT + 1
            clients.append(Client(httpd.port("main")).get("/t?t=llm"))
            wait_until(
                lambda: len(log.matching(f"client handed to|{TOO_MANY}")) == len(clients), "it is under way, or refused"
            )
        answer = fetch(httpd.port("main"), "/t?t=llm&one-too-many")
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert b"</html>" in answer.body
        log.expect(f"Too many references.*{TOO_MANY} .* raise Apache's LimitNOFILE", times=2)
        assert len(clients) > LIMIT // 2
        assert "result=daemon-busy" in httpd.access_line("one-too-many")
    finally:
        hanging.close()
        target.unlink()
        for client in clients:
            client.sock.close()
    with Daemon(target, answer=answer_ok):
        assert fetch(httpd.port("main"), "/t?t=llm").status == 200
