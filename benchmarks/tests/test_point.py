# SPDX-License-Identifier: Apache-2.0
"""The clients, the prober and the servers of benchmarks/run point do what they say. Nothing here looks at speed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from benchlib import cpu, door, point, tools
from benchlib.tools import BUILD, BenchmarkError, Talker

BENCHMARKS = Path(__file__).resolve().parents[1]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVENT = b'data: {"content":" x"}\n\n'
DONE = b"data: [DONE]\n\n"
PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>\n</html>\n"


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    tools.build("generators", module=False)


@contextmanager
def answering(answer: Callable[[int, socket.socket], None]) -> Iterator[int]:
    """A server with a thread per connection, which is told its number by its request; yields the port."""

    def one(connection: socket.socket) -> None:
        # The generators end their connections by a reset.
        with connection, suppress(OSError):
            request = connection.recv(65536)
            answer(int(request.split()[1].lstrip(b"/") or b"0", 16), connection)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def until_closed(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


@contextmanager
def streams(port: int, most: int, tmp_path: Path) -> Iterator[Talker]:
    request = tmp_path / "request"
    request.write_bytes(b"GET /@@@@@@@@ HTTP/1.1\r\nHost: x\r\n\r\n")
    talker = Talker([str(BUILD / "streams"), f"tcp:{port}", str(request), str(most), "steps"], os.sched_getaffinity(0))
    try:
        yield talker
    finally:
        talker.stop()


def test_each_way_in_which_a_stream_can_go_wrong_is_counted_as_what_it_is(tmp_path: Path) -> None:
    def answer(number: int, connection: socket.socket) -> None:
        if number == 1:
            connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        elif number == 2:
            connection.sendall(HEAD + EVENT)  # and the end, without [DONE]
        elif number == 3:
            pass  # the end, before anything came
        elif number == 4:
            until_closed(connection)  # never begins
        elif number == 5:
            connection.sendall(HEAD + EVENT + DONE)
        else:
            connection.sendall(HEAD + EVENT)
            until_closed(connection)

    with answering(answer) as port, streams(port, 6, tmp_path) as talker:
        talker.ask("grow 6 1000 1")
        seen = talker.ask("count 0.3")
    assert seen["failures"] == {"handoff": 1, "status": 1, "cut": 1, "late": 0}
    assert (seen["streams"], seen["live"], seen["waiting"], seen["completed"]) == (6, 1, 1, 1)


def test_streams_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    def answer(number: int, connection: socket.socket) -> None:
        del number
        connection.sendall(HEAD + EVENT)
        until_closed(connection)

    with answering(answer) as port, streams(port, 20, tmp_path) as talker:
        assert talker.ask("grow 5 1000 5")["live"] == 5
        assert talker.ask("grow 20 1000 5")["live"] == 20
        with pytest.raises(BenchmarkError, match="more than 20 streams"):
            talker.ask("grow 21 1000 5")


def test_an_event_that_does_not_come_is_missed(tmp_path: Path) -> None:
    """Of two streams with an event every 50 ms one stops after the first."""

    def answer(number: int, connection: socket.socket) -> None:
        connection.sendall(HEAD + EVENT)
        while number == 0:
            time.sleep(0.05)  # the pace at which the events are due
            connection.sendall(EVENT)
        until_closed(connection)

    with answering(answer) as port, streams(port, 2, tmp_path) as talker:
        talker.ask("grow 2 1000 5")
        seen = talker.ask("count 1 50")
    assert seen["live"] == 2
    # Half of what is due, and a few more where the machine is busy.
    assert seen["behind"] >= seen["due"] / 2 - 1 > 5


def test_an_end_whose_mark_came_before_the_look_takes_no_event_from_it(tmp_path: Path) -> None:
    """The server's FIN may come long after its last bytes: nothing came in the second look, and not less than that."""
    over = threading.Event()

    def answer(number: int, connection: socket.socket) -> None:
        del number
        connection.sendall(HEAD + EVENT + DONE)
        over.wait(20)

    with answering(answer) as port, streams(port, 1, tmp_path) as talker:
        talker.ask("grow 1 1000 5")
        talker.ask("count 0.3")
        over.set()
        seen = talker.ask("count 0.3")
        assert talker.ask("finish 20")["completed"] == 1
    assert seen["events"] == 0


def test_finish_waits_for_the_last_events_of_all(tmp_path: Path) -> None:
    def answer(number: int, connection: socket.socket) -> None:
        connection.sendall(HEAD + EVENT)
        time.sleep(0.02 * number)  # their ends are apart
        connection.sendall(EVENT + DONE)

    with answering(answer) as port, streams(port, 10, tmp_path) as talker:
        talker.ask("grow 10 1000 5")
        assert talker.ask("finish 20")["completed"] == 10


@pytest.mark.parametrize("ends", [True, False])
def test_loadgen_fails_where_a_stream_does_not_come_to_its_end(ends: bool, tmp_path: Path) -> None:
    def answer(number: int, connection: socket.socket) -> None:
        connection.sendall(HEAD + EVENT + DONE)
        if number == 1 and not ends:
            until_closed(connection)

    request = tmp_path / "request"
    request.write_bytes(b"GET /@@@@@@@@ HTTP/1.1\r\nHost: x\r\n\r\n")
    with answering(answer) as port:
        command = [str(BENCHMARKS / "loadgen"), "streams", f"tcp:{port}", str(request), "--streams", "3"]
        command += ["--seconds", "0.2", "--finish", "20" if ends else "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if ends else 1), done.stdout + done.stderr
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(look)) for look in looks] == ["opened", "seen", "finished"]
    assert looks[-1]["finished"]["completed"] == (3 if ends else 2)


def test_the_prober_tells_right_wrong_and_late_pages_apart(tmp_path: Path) -> None:
    number = iter(range(1_000_000))

    def answer(_: int, connection: socket.socket) -> None:
        kind = next(number) % 3
        if kind == 0:
            connection.sendall(PAGE)
        elif kind == 1:
            connection.sendall(PAGE[:-9])
        else:
            until_closed(connection)

    request = tmp_path / "request"
    request.write_bytes(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with answering(answer) as port:
        talker = Talker([str(BUILD / "prober"), str(port), str(request), "30", "1"], os.sched_getaffinity(0))
        try:
            seen = talker.ask("count 1")
        finally:
            talker.stop()
    assert seen["asked"] == seen["right"] + seen["wrong"] + seen["late"]
    assert min(seen["right"], seen["wrong"], seen["late"]) >= seen["asked"] // 3 - 1 > 5
    assert seen["latency_ms"]["p99"] == 1000.0


@pytest.mark.parametrize("key", ["mod_php", "x-accel", "handoff"])
def test_a_climb_leaves_every_figure_of_every_level(key: str, tmp_path: Path) -> None:
    tools.build("point")
    contender = next(c for c in door.CONTENDERS if c.key == key)
    settings = point.Settings((25,), (2, 4), 50.0, 10.0, 0.1, 1.2, 20.0, 3, 2)
    said: list[str] = []
    with point.world() as world:
        looks = world.climb(contender, 25, settings, said.append)
    assert set(looks) == {"0", "2", "4", "short"}, said
    for level in ("2", "4"):
        seen = looks[level]
        assert (seen["live"], seen["failed"], seen["waiting"]) == (int(level), 0, 0), (level, seen)
        assert seen["answered"] == 1, (level, seen)
        for what in ("p50_ms", "p99_ms", "events", "cpu_s", "pss", "pss_per_stream", "first_p99_ms"):
            assert seen[what] > 0, (level, what)
    assert looks["short"]["completed"] == 3


@pytest.mark.parametrize(("key", "timed"), [("handoff", True), ("pushpin", False)])
def test_lateness_is_looked_at_where_a_streams_own_first_event_says_when_the_others_are_due(
    key: str, timed: bool, tmp_path: Path
) -> None:
    """Pushpin's events have a publisher's clock, and would be late by up to a second of their own."""

    def answer(number: int, connection: socket.socket) -> None:
        del number
        connection.sendall(HEAD + EVENT)
        until_closed(connection)

    contender = next(c for c in door.CONTENDERS if c.key == key)
    place = door.Door(tmp_path, 25, os.sched_getaffinity(0), 1, contender, roots=[os.getpid()])
    settings = point.Settings((25,), (2,), 50.0, 1.0, 0.1, 0.2, 20.0, 3, 2)
    page = tmp_path / "page"
    page.write_bytes(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with answering(answer) as port, streams(port, 2, tmp_path) as talker:
        prober = Talker([str(BUILD / "prober"), str(port), str(page), "20", "1"], os.sched_getaffinity(0))
        try:
            assert talker.ask("grow 2 1000 5")["live"] == 2
            look = point.World._look(place, talker, prober, settings, 2)
        finally:
            prober.stop()
    assert look["live"] == 2 and look["pss_per_stream"] > 0
    assert ("late_p99_ms" in look, "complete" in look) == (timed, timed)


def test_a_server_that_does_not_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    place = door.Door(tmp_path, 25, os.sched_getaffinity(0), 1, door.CONTENDERS[0])
    command = [sys.executable, "-c", "import sys; sys.exit('no such luck')"]
    with (
        pytest.raises(BenchmarkError, match="thing did not start"),
        door.started(place, "thing", command, lambda: False),
    ):
        pass
    assert "no such luck" in place.complaints()


def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    # Rounds that somebody has kept are his.
    command = [str(BENCHMARKS / "run"), "--quick", "--state", str(tmp_path / "state"), "point"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pids: list[int] = []
    left: list[int] = []
    try:
        assert run.stdout
        # The first level of the first climb: everything is there.
        seen = next(line for line in run.stdout if "10 streams: 10 live" in line)
        pids = cpu.tree([run.pid])
        assert len(pids) > 5, seen
        run.terminate()
        run.communicate(timeout=60)
        left = [pid for pid in pids if tools.runs(pid)]
    finally:
        for pid in {run.pid, *left} if run.poll() is None else left:
            os.kill(pid, signal.SIGKILL)
    assert run.returncode != 0
    assert left == []


def test_a_program_has_its_cores_and_its_priority_before_it_does_anything_and_we_keep_ours() -> None:
    """Its threads and children would keep the others; and a thread of ours that holds a lock must not matter."""
    own = os.sched_getaffinity(0)
    one = {max(own)}
    code = "import os; print(sorted(os.sched_getaffinity(0))); print(os.getpriority(os.PRIO_PROCESS, 0), flush=True)"
    talker = Talker([sys.executable, "-c", f"input(); {code}"], one, nice=3)
    try:
        talker.say("go")
        assert talker.hear() == list(one) and talker.hear() == 3
    finally:
        talker.stop()
    assert os.sched_getaffinity(0) == own
    with pytest.raises(FileNotFoundError):
        tools.spawn(["/no/such/program"], one)
    assert os.sched_getaffinity(0) == own


def test_a_thread_that_ends_meanwhile_takes_nothing_from_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or Apache's memory and CPU time would be missing from a figure whenever one of its threads ends."""
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter([path / "4194305", *real(path)]))  # above any PID there is
    own = os.getpid()
    assert own in cpu.tree([own])
    assert cpu.cpu_of([own])[own] > 0
    monkeypatch.undo()
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert cpu.tree([ended.pid]) == [] and cpu.cpu_of([ended.pid]) == {}
    with pytest.raises(BenchmarkError, match=f"have ended: .{ended.pid}"):
        cpu.cpu_ns([own, ended.pid])


def test_a_process_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be measured with whatever comes after it."""
    monkeypatch.setattr(tools, "PATIENCE", 0.05)
    stays = subprocess.Popen(["sleep", "300"])
    try:
        with monkeypatch.context() as deaf:
            deaf.setattr(tools.os, "kill", lambda pid, number: None)
            with pytest.raises(BenchmarkError, match=rf"\[{stays.pid}\] do not end"):
                tools.kill_all([stays.pid])
        monkeypatch.setattr(tools, "PATIENCE", 20.0)
        tools.kill_all([stays.pid])  # and is a zombie until we wait for it
        assert Path(f"/proc/{stays.pid}").exists()
    finally:
        stays.kill()
        stays.wait()


def test_a_climb_leaves_no_process_behind() -> None:
    """Not even workers whose supervisor was killed."""
    parent = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; sleep 300 & sleep 300 & wait"], stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 20
    while len(cpu.tree([parent.pid])) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)  # the interval of a bounded poll
    pids = cpu.tree([parent.pid])
    assert len(pids) == 3
    door.end(parent)
    assert not any(tools.runs(pid) for pid in pids)
