"""Each kind of file gets the action that it needs and no more: the rows of docs/changes.md, tried by the playbook.

What tells the actions apart: a restart gives a service another main process; a graceful reload gives it other workers
below the same one; a socket that was restarted is another inode. A stream runs through all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from front_door import Session, assert_complete
from operator_runs import PROJECT, copy_of_checkout, playbook, replace
from testinfra.host import Host

TOKENS = 300


@dataclass(frozen=True, slots=True)
class State:
    """What is running: main processes, their workers, and the socket as the file system knows it."""

    apache: str
    apache_workers: frozenset[str]
    daemon: str
    daemon_workers: frozenset[str]
    socket: str

    @classmethod
    def of(cls, host: Host) -> State:
        def pid(unit: str) -> str:
            return str(host.check_output(f"systemctl show -p MainPID --value {unit}"))

        def children(parent: str) -> frozenset[str]:
            return frozenset(host.check_output(f"pgrep --parent {parent}").split())

        apache, daemon = pid("apache2.service"), pid("streaming-daemon.service")
        inode = str(host.check_output("stat --format=%i /run/streaming-daemon.sock"))
        return cls(apache, children(apache), daemon, children(daemon), inode)

    def actions_since(self, before: State) -> dict[str, str]:
        """What was done to each of the three between two looks."""

        def action(main: bool, workers: bool) -> str:
            return "restart" if main else "reload" if workers else "none"

        return {
            # Old workers of Apache stay while they have connections; new ones mean that it read its configuration.
            "apache": action(self.apache != before.apache, bool(self.apache_workers - before.apache_workers)),
            "daemon": action(self.daemon != before.daemon, bool(self.daemon_workers - before.daemon_workers)),
            "socket": "restart" if self.socket != before.socket else "none",
        }


@pytest.fixture(scope="module")
def altered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_checkout(tmp_path_factory.mktemp("altered") / "checkout")


@pytest.fixture(scope="module")
def as_it_was(name: str) -> Iterator[None]:
    """The scenario's own state again, whatever these tests did."""
    yield
    restored = playbook(name, "--skip-tags", "verify")
    assert restored.returncode == 0, restored.stdout[-4000:]


# name -> (variables, what is altered in the checkout, the actions that this needs). Each adds to those before it.
CASES: dict[str, tuple[dict[str, object], list[tuple[str, str, str]], dict[str, str]]] = {
    "nothing": ({}, [], {"apache": "none", "daemon": "none", "socket": "none"}),
    "a directive, the daemon's configuration": (
        {"apache_handoff_connect_timeout_ms": 151, "streaming_daemon_heartbeat": 14},
        [],
        {"apache": "reload", "daemon": "reload", "socket": "none"},
    ),
    "the service unit": (
        {},
        [("templates/etc/systemd/system/streaming-daemon.service.j2", "TimeoutStopSec=30s", "TimeoutStopSec=31s")],
        {"apache": "none", "daemon": "restart", "socket": "none"},
    ),
    "the module's binary, the daemon's release": (
        {},
        [
            ("module-src/handoff_version.h", '"0.', '"9.'),
            ("daemon-src/streaming_daemon/__init__.py", '__version__ = "0.', '__version__ = "9.'),
        ],
        {"apache": "restart", "daemon": "reload", "socket": "none"},
    ),
    "the socket unit": (
        {},
        [("templates/etc/systemd/system/streaming-daemon.socket.j2", "Backlog=4096", "Backlog=4095")],
        {"apache": "none", "daemon": "restart", "socket": "restart"},
    ),
}


@pytest.mark.usefixtures("as_it_was")
def test_every_kind_of_file_gets_its_action_and_no_stream_is_dropped(
    host: Host, session: Session, name: str, altered: Path
) -> None:
    found, streams, variables = {}, [], {}
    for case, (more, edits, _) in CASES.items():
        variables |= more
        for path, old, new in edits:
            replace(altered / path, old, new)
        stream = session.open_stream(case, tokens=TOKENS, pace=10)
        stream.read_until(b"data: ")
        streams.append(stream)
        before = State.of(host)
        applied = playbook(name, "--skip-tags", "verify", "--extra-vars", json.dumps(variables), checkout=altered)
        assert applied.returncode == 0, (case, applied.stdout[-4000:])
        found[case] = State.of(host).actions_since(before)
    assert found == {case: actions for case, (_, _, actions) in CASES.items()}
    for stream in streams:
        assert_complete(stream.read_to_end(), TOKENS)


def test_the_table_in_the_documents_says_what_was_tried() -> None:
    text = (PROJECT / "docs" / "changes.md").read_text()
    action = "(none|reload|restart)"
    rows = re.findall(rf"^\| ([^|]+) \|[^|]*\| {action} \| {action} \| {action} \|$", text, re.MULTILINE)
    told = {name: dict(zip(("apache", "daemon", "socket"), actions, strict=True)) for name, *actions in rows}
    for case, (_, _, actions) in CASES.items():
        for service, needed in actions.items():
            of_rows = {told[row][service] for row in case.split(", ")}
            assert needed in of_rows and of_rows <= {needed, "none"}, (case, service)
    tried_elsewhere = {
        *("a credential", "a module newly enabled, the MPM", "the application", "who may read the metrics"),
        "the AppArmor profile, loaded while everything runs",
        "on a load balancer: HAProxy's configuration, a certificate; HAProxy is reloaded",
    }
    assert told.keys() - tried_elsewhere == {row for case in CASES for row in case.split(", ")}
