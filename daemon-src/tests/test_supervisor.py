"""Starting, stopping, reloading and dying: what each means for the streams that run meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import sys
import time
from pathlib import Path

import pytest

from conftest import MakeDaemon
from daemon_harness import KINDS, SOURCE, Client, Daemon, shaped, wait_for

DEAD = "\nraise RuntimeError('a broken release')\n"


def streams(daemon: Daemon, count: int = 5, tokens: int = 30, pace: float = 50) -> list[Client]:
    """Running streams, each past its first event."""
    clients = [daemon.hand(shaped(tokens, pace)) for _ in range(count)]
    for client in clients:
        client.read_until(b"Hello")
    return clients


def assert_whole(clients: list[Client], tokens: int = 30) -> None:
    for client in clients:
        response = client.finish()
        assert response.complete
        assert len(response.texts) == tokens


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    """A directory of releases with ``current`` pointing at ``one``."""
    for name in ("one", "two"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(SOURCE / "streaming_daemon", tmp_path / name / "streaming_daemon", ignore=ignore)
    (tmp_path / "current").symlink_to("one")
    return tmp_path


def switch(releases: Path, name: str) -> None:
    (releases / "next").symlink_to(name)
    (releases / "next").rename(releases / "current")


@pytest.fixture
def released(make_daemon: MakeDaemon, releases: Path) -> Daemon:
    return make_daemon("[server]\nworkers = 2", code=releases / "current").start()


def start_as_systemd_does(daemon: Daemon, fd: int, count: int = 1) -> None:
    """Start with ``fd`` as descriptor 3 and a LISTEN_PID that is right, which only the process itself can know."""
    become = (
        "import os, sys\n"
        f"os.dup2({fd}, 3)\n"
        "os.set_blocking(3, True)\n"
        f"os.environ.update(LISTEN_FDS='{count}', LISTEN_PID=str(os.getpid()))\n"
        "os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", become, *daemon.command("--config", str(daemon.config))]
    daemon.start(wait=False, command=command, pass_fds=(fd,))


def test_systemd_passes_the_socket_and_is_told_of_every_step(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(environ={"WATCHDOG_USEC": "300000"})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(daemon.socket))
        listening.listen(128)
        daemon.environ["RUNTIME_DIRECTORY"] = str(daemon.directory)
        # This client is there before anybody listens to it, as after a crash: systemd keeps the socket.
        early = daemon.hand(shaped(3))
        start_as_systemd_does(daemon, listening.fileno())
        daemon.wait_notified("READY", "1")
        assert early.finish().complete
        daemon.wait_notified("WATCHDOG", "1")
        daemon.wait_notified("WATCHDOG", "1")
        assert daemon.run("--reload", "--wait").returncode == 0
        reloading = daemon.wait_notified("RELOADING", "1")
        assert abs(int(reloading["MONOTONIC_USEC"]) / 1e6 - time.monotonic()) < 20
        assert daemon.wait_notified("READY", "1")["STATUS"].startswith("generation 2, 1 workers")
        assert daemon.ask(shaped(3)).complete
        daemon.signal(signal.SIGTERM)
        daemon.wait_notified("STOPPING", "1")
        assert daemon.wait() == 0
        # The socket is systemd's: a client that comes now waits instead of being refused.
        daemon.hand(shaped(3)).close()


@pytest.mark.parametrize("what", ["nothing", "a file", "a datagram socket", "a socket that does not listen"])
def test_a_wrong_listening_socket_is_a_clear_error(make_daemon: MakeDaemon, what: str) -> None:
    daemon = make_daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if "datagram" in what else socket.SOCK_STREAM) as sock:
        fd = os.open("/dev/null", os.O_RDONLY) if what == "a file" else sock.fileno()
        start_as_systemd_does(daemon, fd, 0 if what == "nothing" else 1)
        assert daemon.wait() == 2
    expected = "no socket to listen on" if what == "nothing" else "expected is a listening AF_UNIX socket"
    assert expected in daemon.log()


def test_a_bad_configuration_exits_with_2_and_one_line_per_error(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nworkers = 1\nworkres = 1").start(wait=False)
    assert daemon.wait() == 2
    (line,) = daemon.log().splitlines()
    assert line.startswith(f'{daemon.config}:3: server.workres: unknown key (did you mean "workers"?); allowed here: ')


def test_a_stale_socket_is_replaced_but_a_live_one_or_a_file_is_not(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(daemon.socket))
    daemon.start()
    assert daemon.ask(shaped(1)).complete
    for kind in KINDS:
        second = daemon.run("--config", str(daemon.config), "--socket", f"{daemon.socket},{kind}")
        assert (second.returncode, second.stderr) == (2, f"--socket {daemon.socket}: Address already in use\n")
    file = daemon.run("--config", str(daemon.config), "--socket", str(daemon.config))
    assert file.returncode == 2
    assert daemon.ask(shaped(1)).complete
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    assert not daemon.socket.exists()
    assert not daemon.control.exists()


def test_sigterm_ends_the_supervisor_at_once_and_no_stream(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    clients = streams(daemon, tokens=100)
    begin = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - begin < 1
    assert daemon.workers() != []
    assert_whole(clients, 100)
    wait_for(lambda: daemon.workers() == [], "workers to leave")


def test_a_restart_loses_no_stream(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    clients = streams(daemon)
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    daemon.start()
    assert daemon.ask(shaped(3)).complete
    assert_whole(clients)


def test_a_killed_supervisor_costs_no_stream(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nworkers = 2").start()
    clients = streams(daemon, 10)
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    assert_whole(clients)
    wait_for(lambda: daemon.workers() == [], "workers to leave")


def test_a_handoff_under_way_when_the_stop_comes_is_served(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nhandoff_timeout = 5").start()
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(daemon.socket))
        # Accepted before the stop: handoffs are taken in order, and this later one has been answered.
        assert daemon.ask(shaped(1)).complete
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        with theirs:
            socket.send_fds(peer, [b'{"demo":{"tokens":3}}'], [theirs.fileno()])
    assert Client(ours).finish().complete
    wait_for(lambda: daemon.workers() == [], "workers to leave")


def test_streams_beyond_the_drain_timeout_are_told(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\ndrain_timeout = 0.3\nlinger_timeout = 0.2").start()
    clients = streams(daemon, 3, 1000, 20)
    stuck = daemon.hand(shaped(100_000))
    daemon.signal(signal.SIGTERM)
    for client in clients:
        response = client.finish()
        assert response.error["type"] == "shutting_down"
        assert b"[DONE]" not in response.raw
        assert not response.reset
    assert len([line for line in daemon.log().splitlines() if "outcome=drained status=200" in line]) >= 3
    # Even one that reads nothing cannot hold the worker.
    wait_for(lambda: daemon.workers() == [], "workers to leave")
    stuck.close()


def test_sigint_ends_the_streams_now_and_waits_for_the_workers(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nworkers = 2\nlinger_timeout = 0.2").start()
    clients = streams(daemon, 3, 1000, 20)
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0
    assert daemon.workers() == []
    for client in clients:
        assert client.finish().error["type"] == "shutting_down"


def test_a_reload_takes_the_new_release_and_loses_no_stream(released: Daemon, releases: Path) -> None:
    old = released.workers()
    assert len(old) == 2
    clients = streams(released, 10, 50)
    switch(releases, "two")
    (releases / "two/streaming_daemon/hello").touch()
    done = released.reload()
    assert (done.returncode, done.stdout) == (0, f"generation 2: 2 workers from {releases}/two\n")
    new = [pid for pid in released.workers() if pid not in old]
    assert len(new) == 2
    assert {os.readlink(f"/proc/{pid}/cwd") for pid in new} == {f"{releases}/two"}
    assert released.ask(shaped(3)).complete
    assert_whole(clients, 50)
    wait_for(lambda: released.workers() == new, "old workers to leave")
    assert released.notified[-1]["READY"] == "1"


def test_sighup_reloads(released: Daemon, releases: Path) -> None:
    old = released.workers()
    switch(releases, "two")
    released.signal(signal.SIGHUP)
    released.wait_notified("RELOADING", "1")
    released.wait_notified("READY", "1")
    wait_for(lambda: not set(released.workers()) & set(old), "old workers to leave")
    assert released.ask(shaped(3)).complete


def break_worker(release: Path) -> str:
    with (release / "streaming_daemon/session.py").open("a") as file:
        file.write(DEAD)
    return "the journal has its last words"


def break_syntax(release: Path) -> str:
    (release / "streaming_daemon/worker.py").write_text("def (:\n")
    return "the journal has its last words"


def remove_release(release: Path) -> str:
    shutil.rmtree(release)
    return f"cannot start a worker in {release}: "


def remove_package(release: Path) -> str:
    shutil.rmtree(release / "streaming_daemon")
    return "ended with status 1"


@pytest.mark.parametrize("damage", [break_worker, break_syntax, remove_release, remove_package])
def test_a_release_that_does_not_start_is_refused(released: Daemon, releases: Path, damage: object) -> None:
    old = released.workers()
    clients = streams(released, tokens=20)
    # The command is the sound release's here: that of a broken one could fail for reasons of its own.
    released.environ["PYTHONPATH"] = str(releases / "one")
    reason = damage(releases / "two")  # type: ignore[operator]
    switch(releases, "two")
    done = released.reload()
    assert done.returncode == 1
    assert done.stderr.startswith("reload failed: generation 2 refused, the old one goes on: ")
    assert reason in done.stderr
    status = released.wait_notified("READY", "1")["STATUS"]
    assert status.startswith("generation 1, 2 workers; error generation 2 refused")
    assert released.workers() == old
    assert released.ask(shaped(3)).complete
    assert_whole(clients, 20)
    # And nothing is stuck: a good release is taken afterwards.
    switch(releases, "one")
    assert released.reload().returncode == 0


def test_a_bad_configuration_is_refused_with_its_reason(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    daemon.config.write_text("[server]\nmax_streams = 0")
    done = daemon.reload()
    assert done.returncode == 1
    assert "server.max_streams = 0: allowed is an integer from 1 to 1000000" in done.stderr
    assert daemon.ask(shaped(3)).complete
    daemon.config.write_text("[server]\nworkers = 3")
    assert "3 workers" in daemon.reload().stdout


def test_a_reload_that_cannot_be_asked_for_fails(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    nobody = daemon.reload()
    assert nobody.returncode == 1
    assert "is the service running?" in nobody.stderr
    assert daemon.run("--reload").returncode == 2


def test_the_control_socket_is_the_users_own_and_refuses_nonsense(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    assert stat.S_IMODE(daemon.control.stat().st_mode) == 0o600
    for request in (b"reboot\n", b"x" * 100, b"\n"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.connect(str(daemon.control))
            sock.sendall(request)
            assert sock.recv(100) == b'error unknown request, allowed is "reload"\n'
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(daemon.control))
    assert daemon.reload().returncode == 0


def test_reloads_asked_for_at_once_are_all_answered(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    socks = []
    for _ in range(3):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(20)
        sock.connect(str(daemon.control))
        sock.sendall(b"reload\n")
        socks.append(sock)
    for sock in socks:
        assert sock.recv(1000).startswith(b"ok generation ")
        sock.close()
    assert len(wait_for(lambda: daemon.workers() if len(daemon.workers()) == 1 else None, "one worker") or []) == 1


def test_a_worker_that_dies_is_replaced_and_only_its_streams_are_lost(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nworkers = 2").start()
    old = daemon.workers()
    clients = streams(daemon, 12)
    os.kill(old[0], signal.SIGKILL)
    daemon.wait_log(f"worker {old[0]} was killed by SIGKILL: its streams are lost")
    wait_for(lambda: len(daemon.workers()) == 2, "a replacement")
    assert old[0] not in daemon.workers()
    assert daemon.ask(shaped(3)).complete
    whole = [response for client in clients if (response := client.finish()).raw.endswith(b"data: [DONE]\n\n")]
    lost = len(clients) - len(whole)
    assert lost + len(whole) == 12
    assert all(response.complete for response in whole)


def test_a_replacement_runs_the_release_of_its_generation(released: Daemon, releases: Path) -> None:
    old = released.workers()
    break_worker(releases / "two")
    switch(releases, "two")
    os.kill(old[0], signal.SIGKILL)
    [new] = wait_for(lambda: [pid for pid in released.workers() if pid not in old], "a replacement")
    assert os.readlink(f"/proc/{new}/cwd") == f"{releases}/one"
    wait_for(lambda: released.ask(shaped(1)).complete, "an answer")


def test_a_worker_told_to_leave_by_somebody_else_is_replaced_at_once(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    clients = streams(daemon, tokens=20)
    [old] = daemon.workers()
    os.kill(old, signal.SIGTERM)
    daemon.wait_log(f"worker {old} was told to leave by somebody else")
    assert daemon.ask(shaped(3)).complete
    assert_whole(clients, 20)
    wait_for(lambda: len(daemon.workers()) == 1, "the old worker to leave")


def test_a_worker_ignores_sighup_of_the_whole_group(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    clients = streams(daemon, tokens=20)
    for pid in daemon.workers():
        os.kill(pid, signal.SIGHUP)
    assert_whole(clients, 20)


def test_without_uvloop_everything_is_the_same(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none/uvloop.py").write_text("raise ImportError('not here')\n")
    daemon = make_daemon()
    daemon.environ["PYTHONPATH"] = f"{tmp_path}/none:{daemon.environ['PYTHONPATH']}"
    daemon.start()
    client = daemon.hand(shaped(50, 100, prompt="p"))
    assert daemon.reload().returncode == 0
    response = client.finish()
    assert response.complete
    assert len(response.texts) == 50
    assert daemon.ask(b"[]").status == 400
