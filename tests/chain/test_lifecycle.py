"""Streams outlive everything an operator does to Apache and to the daemon."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from front_door import Connection, Session, assert_complete
from testinfra.host import Host

AwaitTrue = Callable[..., None]
TOKENS = 60


def running(session: Session, count: int = 5) -> list[Connection]:
    """Streams of six seconds, each seen to have begun."""
    streams = [session.open_stream(f"lifecycle {n}", tokens=TOKENS, pace=10) for n in range(count)]
    for stream in streams:
        stream.read_until(b"data: ")
    return streams


def main_pid(host: Host, unit: str) -> int:
    return int(host.check_output(f"systemctl show -p MainPID --value {unit}"))


@pytest.mark.parametrize("command", ["systemctl restart apache2", "apache2ctl graceful"])
def test_streams_survive_apache(host: Host, session: Session, command: str) -> None:
    streams = running(session)
    before = main_pid(host, "apache2")
    host.check_output(command)
    if "restart" in command:
        assert main_pid(host, "apache2") != before
    for stream in streams:
        assert_complete(stream.read_to_end(), TOKENS)
    assert_complete(session.open_stream(tokens=5, pace=100).read_to_end(), 5)


def test_streams_survive_a_daemon_reload(host: Host, session: Session) -> None:
    streams = running(session)
    before = main_pid(host, "streaming-daemon")
    workers = worker_pids(host)
    host.check_output("systemctl reload streaming-daemon")
    assert main_pid(host, "streaming-daemon") == before
    assert_complete(session.open_stream(tokens=5, pace=100).read_to_end(), 5)
    assert worker_pids(host) - workers, "a reload starts a new generation of workers"
    for stream in streams:
        assert_complete(stream.read_to_end(), TOKENS)


def test_streams_survive_a_daemon_restart(host: Host, session: Session) -> None:
    streams = running(session)
    before = main_pid(host, "streaming-daemon")
    host.check_output("systemctl restart streaming-daemon")
    assert main_pid(host, "streaming-daemon") != before
    assert_complete(session.open_stream(tokens=5, pace=100).read_to_end(), 5)
    for stream in streams:
        assert_complete(stream.read_to_end(), TOKENS)


@pytest.mark.usefixtures("daemon_runs")
def test_streams_survive_the_death_of_the_supervisor(host: Host, session: Session, await_true: AwaitTrue) -> None:
    streams = running(session)
    before = main_pid(host, "streaming-daemon")
    host.check_output(f"kill -9 {before}")
    assert_complete(session.open_stream(tokens=5, pace=100).read_to_end(), 5)
    for stream in streams:
        assert_complete(stream.read_to_end(), TOKENS)
    await_true(lambda: main_pid(host, "streaming-daemon") not in (0, before), "systemd started a new supervisor")


@pytest.mark.usefixtures("daemon_runs")
def test_a_stopped_daemon_is_started_by_the_next_handoff(host: Host, session: Session) -> None:
    host.check_output("systemctl stop streaming-daemon.service")
    assert host.run("systemctl is-active streaming-daemon.service").stdout.strip() == "inactive"
    assert_complete(session.open_stream(tokens=5, pace=100).read_to_end(), 5)
    assert host.run("systemctl is-active streaming-daemon.service").stdout.strip() == "active"


def test_a_release_that_cannot_start_is_refused_and_the_old_one_serves(host: Host, session: Session) -> None:
    """The link points to a broken release: reload fails, says so, and nothing changes for clients."""
    current = host.check_output("readlink /opt/streaming-daemon/current")
    broken = "/opt/streaming-daemon/releases/0.0.0-broken"
    streams = running(session, 2)
    before = main_pid(host, "streaming-daemon")
    try:
        host.check_output(
            f"mkdir -p {broken}/streaming_daemon && echo 'raise SystemExit(\"broken on purpose\")' "
            f">{broken}/streaming_daemon/__init__.py && ln -sfn {broken} /opt/streaming-daemon/current"
        )
        reload = host.run("systemctl reload streaming-daemon")
        assert reload.rc != 0, "a refused release must make systemctl reload fail"
        assert main_pid(host, "streaming-daemon") == before
        assert_complete(session.open_stream(tokens=5, pace=100).read_to_end(), 5)
    finally:
        host.check_output(f"ln -sfn {current} /opt/streaming-daemon/current && rm -r {broken}")
    host.check_output("systemctl reload streaming-daemon")
    for stream in streams:
        assert_complete(stream.read_to_end(), TOKENS)


def worker_pids(host: Host) -> set[int]:
    main = main_pid(host, "streaming-daemon")
    return {int(pid) for pid in host.check_output(f"ps -o pid= --ppid {main} || true").split()}
