"""Between two supervisors: handoffs are answered at once by the workers that are there, and by the new ones alone as
soon as there are any."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import MakeDaemon
from daemon_harness import Daemon, envelope, shaped, wait_for
from streaming_daemon import handover


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd keeps."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "kept.sock"))
        sock.listen(64)
        yield sock


def start(daemon: Daemon, listening: socket.socket) -> None:
    daemon.socket = Path(listening.getsockname())
    daemon.environ["RUNTIME_DIRECTORY"] = str(daemon.directory)
    become = (
        # A unit without NonBlocking=yes makes the one flag that all have a blocking one.
        f"import os, sys\nos.dup2({listening.fileno()}, 3)\nos.set_blocking(3, True)\n"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\nos.execv(sys.executable, sys.argv[1:])"
    )
    command = [*daemon.command()[:1], "-c", become, *daemon.command("--config", str(daemon.config))]
    daemon.start(command=command, pass_fds=(listening.fileno(),))


def log_pids(daemon: Daemon, name: str) -> list[int]:
    """Who has answered the stream ``name``, from the access log."""
    text = (daemon.directory / "access.log").read_text()
    return [int(pid) for pid in re.findall(rf'"id": ?"{name}".*"pid": ?(\d+)', text)]


def ask(daemon: Daemon, name: str) -> int:
    assert daemon.hand(envelope(shaped(2), id=name)).finish().complete
    (pid,) = wait_for(lambda: log_pids(daemon, name), f"the line of {name}")
    return pid


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_handoffs_are_answered_while_there_is_no_supervisor_and_then_by_the_new_one(
    make_daemon: MakeDaemon, listening: socket.socket, end: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon("[server]\nworkers = 2\n")
    with daemon.config.open("a") as config:
        config.write(f'[access_log]\npath = "{daemon.directory}/access.log"\nformat = "json"\n')
    start(daemon, listening)
    wait_for(lambda: len(daemon.workers()) == 2, "two workers")
    old = set(daemon.workers())
    daemon.signal(end)
    daemon.wait()
    for turn in range(5):
        assert ask(daemon, f"between-{turn}") in old
    start(daemon, listening)
    # READY was announced: what comes now is for the new ones.
    wait_for(lambda: not old & set(daemon.workers()), "the old workers to leave, who have nothing to do")
    assert ask(daemon, "after") not in old


def test_without_a_new_supervisor_handoffs_are_taken_for_some_seconds_and_then_wait(
    make_daemon: MakeDaemon, listening: socket.socket
) -> None:
    daemon = make_daemon()
    start(daemon, listening)
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    assert daemon.ask(shaped(2)).complete
    wait_for(lambda: not daemon.workers(), "the workers to leave", handover.SECONDS + 10)
    waiting = daemon.hand(shaped(2))
    start(daemon, listening)
    assert waiting.finish().complete


def test_a_worker_that_is_retired_by_a_reload_stops_at_once(make_daemon: MakeDaemon, listening: socket.socket) -> None:
    daemon = make_daemon()
    start(daemon, listening)
    (old,) = daemon.workers()
    stream = daemon.hand(shaped(1000, 20))
    stream.read_until(b"data: ")
    mark = (daemon.directory / "serving").read_text()
    assert daemon.reload().returncode == 0
    daemon.wait_log("accepting no more handoffs; finishing 1 streams")
    assert old in daemon.workers()
    assert (daemon.directory / "serving").read_text() == mark
    os.kill(old, signal.SIGINT)
    stream.finish()


@pytest.mark.parametrize("kind", ["seqpacket", "stream"])
def test_workers_do_not_stand_still_when_a_start_makes_their_socket_a_blocking_one(
    make_daemon: MakeDaemon, kind: str
) -> None:
    """Whom a handoff woke that another has taken would wait in accept(2) for the next one, and its streams with it."""
    daemon = make_daemon("[server]\nworkers = 4\n", kind=kind)
    with socket.socket(socket.AF_UNIX, getattr(socket, f"SOCK_{kind.upper()}")) as listening:
        listening.bind(str(daemon.directory / "kept.sock"))
        listening.listen(64)
        start(daemon, listening)
        wait_for(lambda: len(daemon.workers()) == 4, "four workers")
        # Each paces its events by its own worker, so one that stands still is seen by its streams.
        streams = [daemon.hand(shaped(200, 100)) for _ in range(40)]
        for stream in streams:
            stream.read_until(b"data: ")
        listening.setblocking(True)
        for _ in range(100):
            assert daemon.ask(shaped(2)).complete
        # No handoff comes any more that would wake anybody.
        for stream in streams:
            assert stream.finish().complete


def test_a_mark_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert handover.mark_path({}) is None
    assert handover.read_mark(None) == handover.read_mark(tmp_path / "serving") == ""
    (tmp_path / "serving").write_bytes(b"\xff")
    assert handover.read_mark(tmp_path / "serving") == ""
    handover.announce(None)
    path = handover.mark_path({"RUNTIME_DIRECTORY": f"{tmp_path}:/elsewhere"})
    handover.announce(path)
    first = handover.read_mark(path)
    handover.announce(path)
    assert handover.read_mark(path) not in ("", first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["serving"]
