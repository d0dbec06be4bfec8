"""What a failed test on a host says beside its assertion."""

from __future__ import annotations

from typing import Any

import pytest

LOGS = (
    ("journal", "journalctl --no-pager -n 40 -u streaming-daemon.socket -u streaming-daemon.service"),
    ("HAProxy's log, where there is one", "journalctl --no-pager -n 40 -u haproxy.service -t haproxy"),
    ("Apache's error log", "tail -n 20 /var/log/apache2/error.log /var/log/apache2/handoff-app-error.log"),
)


def add_logs(item: pytest.Item, outcome: Any) -> None:
    """Add the journal and Apache's error logs of the host to the report; for the hook pytest_runtest_makereport."""
    report = outcome.get_result()
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and host is not None:
        for title, command in LOGS:
            report.sections.append((f"{title} of {host.backend.hostname}", host.run(command).stdout))
