"""The access log as a log analyser of Debian's reads it: GoAccess counts what was sent."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from conftest import MakeDaemon
from daemon_harness import Daemon, envelope, shaped, wait_for
from test_observed import config, start

CLIENTS = {"203.0.113.1": 3, "203.0.113.2": 2, "2001:db8::7": 1}
AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
# What an analyser could stumble over: quotes, escapes, and everything that is not ASCII.
NASTY = 'a "quoted\\" agent\t\x1b[31m é 漢'


def analysed(path: Path) -> dict[str, Any]:
    program = shutil.which("goaccess")
    assert program is not None, "goaccess is missing: script/bootstrap installs it"
    report = path.with_name("report.json")
    command = [program, str(path), "--log-format=COMBINED", "--no-global-config", f"--output={report}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def hits(report: dict[str, Any], panel: str) -> dict[str, int]:
    """What a panel of the report lists; a status is below its class there."""
    rows = [item for row in report[panel]["data"] for item in row.get("items", [row])]
    return {row["data"]: row["hits"]["count"] for row in rows}


def message(client: str, agent: str, **more: Any) -> bytes:
    data = more or shaped(2)
    return envelope(data, headers=[["User-Agent", agent]], client={"addr": client, "port": 40001}, user="ada")


def test_goaccess_counts_every_stream_and_understands_every_line(make_daemon: MakeDaemon) -> None:
    daemon: Daemon = start(make_daemon, config("max_streams = 1", workers=1, log="combined"))
    sent: Counter[str] = Counter()
    for client, count in CLIENTS.items():
        for number in range(count):
            assert daemon.ask(message(client, NASTY if number else AGENT)).complete
            sent[client] += 1
    running = daemon.hand(message("203.0.113.8", AGENT, **shaped(100000, 50)))
    running.read_until(b"data: ")
    for _ in range(2):
        assert daemon.ask(message("203.0.113.9", AGENT)).status == 503
        sent["203.0.113.9"] += 1
    running.close()
    sent["203.0.113.8"] += 1
    path = daemon.directory / "access.log"
    # The one that was left is the last line.
    wait_for(lambda: len(path.read_text().splitlines()) == sum(sent.values()), "all lines")
    report = analysed(path)
    general = report["general"]
    assert general["total_requests"] == general["valid_requests"] == sum(sent.values()), path.read_text()
    assert general["failed_requests"] == 0, path.read_text()
    hosts = hits(report, "hosts")
    assert {client: hosts.get(client) for client in sent} == dict(sent)
    statuses = {status[:3]: count for status, count in hits(report, "status_codes").items()}
    assert statuses == {"200": sum(CLIENTS.values()) + 1, "503": 2}
    assert hits(report, "requests") == {"/stream.php": sum(sent.values())}
    written = sum(int(line.split('" ')[1].split()[1]) for line in path.read_text().splitlines())
    assert general["bandwidth"] == written
