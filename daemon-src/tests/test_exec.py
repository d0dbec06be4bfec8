"""Answers of local programs."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeDaemon
from daemon_harness import Daemon, tcp_pair, wait_for

DATA = {"prompt": 'what\'s "up"; $(id)\n日本 😀', "request_id": "r1"}


class Program:
    """A daemon whose backend is a Python program."""

    def __init__(self, make_daemon: MakeDaemon, directory: Path) -> None:
        self._make_daemon = make_daemon
        self._directory = directory

    def __call__(self, source: str, more: str = "", server: str = "") -> Daemon:
        script = self._directory / "program.py"
        script.write_text("import json, os, signal, sys, time\n" + source)
        command = json.dumps([sys.executable, "-u", str(script)])
        text = f'{server}\n[backend]\ndefault = "p"\n[backends.p]\ntype = "exec"\ncommand = {command}\n{more}\n'
        return self._make_daemon(text).start()


@pytest.fixture
def program(make_daemon: MakeDaemon, tmp_path: Path) -> Program:
    return Program(make_daemon, tmp_path)


def alive(pid: int) -> bool:
    """Whether there is such a process, and no mere zombie of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_program_gets_the_data_on_standard_input_and_nowhere_else(program: Program) -> None:
    source = "print(json.dumps([json.load(sys.stdin), sys.argv[1:], dict(os.environ), os.getcwd()]))"
    daemon = program(source, 'environment = { GREETING = "hi" }')
    response = daemon.ask(DATA)
    assert response.complete
    data, arguments, environment, directory = json.loads(response.text)
    assert data == DATA
    assert (arguments, directory) == ([], "/")
    environment.pop("LC_CTYPE", None)
    assert set(environment) == {"PATH", "LANG", "HOME", "TMPDIR", "GREETING"}


def test_the_program_has_no_descriptor_of_the_daemons(program: Program) -> None:
    """With the listening socket it could take other users' handoffs. uvloop closes nothing that is inheritable."""
    source = (
        "sys.stdin.read(); kept = os.listdir('/proc/self/fd')\n"
        "links = {n: os.readlink(f'/proc/self/fd/{n}') for n in kept if os.path.islink(f'/proc/self/fd/{n}')}\n"
        "print(json.dumps(links))"
    )
    links = json.loads(program(source).ask(DATA).text)
    own = {links[number] for number in "012"}
    others = {link for link in links.values() if not link.startswith("/proc")} - own
    assert others == set()


def test_text_is_passed_on_as_it_comes_and_no_character_is_cut(program: Program) -> None:
    source = """
for byte in "日本 😀é".encode():
    os.write(1, bytes([byte])); time.sleep(0.002)
"""
    response = program(source).ask(DATA)
    assert response.complete
    assert response.text == "日本 😀é"
    assert len(response.texts) > 2


def test_lines_are_events_and_joined_they_are_the_output(program: Program) -> None:
    source = 'os.write(1, "a\\n\\nb\\u2028c\\r\\nd".encode())'
    assert program(source, 'format = "lines"').ask(DATA).texts == ["a\n", "\n", "b\u2028c\r\n", "d"]


def test_events_are_passed_on_as_they_are(program: Program) -> None:
    source = 'os.write(1, b": c\\n\\nevent: x\\r\\ndata: 1\\r\\n\\r\\ndata: 2\\ndata: 3\\n\\ndata: [DONE]\\n\\n")'
    response = program(source, 'format = "sse"').ask(DATA)
    assert response.events == ["event: x\ndata: 1", "data: 2\ndata: 3", "data: [DONE]"]


def test_nothing_at_all_is_an_answer_too(program: Program) -> None:
    response = program("pass").ask(DATA)
    assert response.complete
    assert response.texts == []


def test_a_program_that_does_not_read_its_input_is_none_the_worse(program: Program) -> None:
    big = {"prompt": "x" * 150_000}
    assert program('sys.stdin.close(); print("ok")').ask(big).text == "ok\n"


def test_a_failure_before_the_first_byte_is_a_real_status(program: Program) -> None:
    daemon = program('print("bad \\x1b thing", file=sys.stderr); sys.exit(3)')
    response = daemon.ask(DATA)
    assert response.status == 502
    assert response.json["error"]["type"] == "backend_error"
    daemon.wait_log("ended with exit status 3")
    daemon.wait_log(r'stderr: "bad \\u001b thing"')


def test_a_failure_in_mid_answer_ends_the_stream_with_an_error_event(program: Program) -> None:
    daemon = program('os.write(1, b"half"); os.kill(os.getpid(), signal.SIGKILL)')
    response = daemon.ask(DATA)
    assert (response.status, response.texts) == (200, ["half"])
    assert response.error["type"] == "backend_error"
    daemon.wait_log("ended with signal 9")


def test_what_a_program_says_to_the_journal_is_bounded(program: Program) -> None:
    daemon = program('print("y" * 100000, file=sys.stderr)\nfor n in range(1000): print("line", n, file=sys.stderr)')
    assert daemon.ask(DATA).complete
    daemon.wait_log("more is left out")
    lines = [line for line in daemon.log().splitlines() if "stderr: " in line]
    assert len(lines) <= 21
    assert max(map(len, lines)) < 300


@pytest.mark.parametrize(("source", "status"), [("time.sleep(60)", 504), ('os.write(1, b"a"); time.sleep(60)', 200)])
def test_silence_ends_the_program(program: Program, source: str, status: int) -> None:
    daemon = program(f"print(os.getpid(), file=sys.stderr)\n{source}", "first_event_timeout = 1\nidle_timeout = 0.3")
    response = daemon.ask(DATA)
    assert response.status == status
    error: Any = response.json["error"] if status == 504 else response.error
    assert error["type"] == "backend_timeout"
    pid = int(daemon.wait_log("stderr: [0-9]+").rpartition(" ")[2])
    wait_for(lambda: not alive(pid), "the program to be ended")


def test_a_client_that_hangs_up_ends_the_program_and_its_children(program: Program) -> None:
    source = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if not child:
    time.sleep(60)
print(os.getpid(), child)
time.sleep(60)
"""
    daemon = program(source, 'format = "lines"')
    client = daemon.hand(DATA, pair=tcp_pair)
    client.read_until(b"\\n")
    pids = [int(word) for word in json.loads(client.received.rpartition(b"data: ")[2])["content"].split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    client.close()
    daemon.wait_log("stream id=r1 .*outcome=client_gone")
    # It does not listen to SIGTERM, so SIGKILL has to come.
    wait_for(lambda: not any(map(alive, pids)), "program and child to be ended")


def test_a_program_does_not_outlive_the_worker_that_is_killed(program: Program) -> None:
    daemon = program("print(os.getpid())\ntime.sleep(60)", 'format = "lines"')
    client = daemon.hand(DATA)
    pid = int(json.loads(client.read_until(b"\\n").rpartition(b"data: ")[2])["content"])
    [worker] = daemon.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not alive(pid), "the program to be ended")
    client.close()


def test_children_that_outlive_the_program_do_not_keep_the_answer_open(program: Program) -> None:
    source = """
child = os.fork()
if not child:
    time.sleep(60)
os.write(1, str(child).encode())
os._exit(0)
"""
    begin = time.monotonic()
    response = program(source).ask(DATA)
    assert response.complete
    wait_for(lambda: not alive(int(response.text)), "the child to be ended")
    assert time.monotonic() - begin < 10


def test_one_program_too_many_is_told_to_come_back(program: Program) -> None:
    daemon = program('os.write(1, b"a"); time.sleep(60)', "max_processes = 1")
    first = daemon.hand(DATA)
    first.read_until(b'"a"')
    response = daemon.ask(DATA)
    assert (response.status, response.headers["retry-after"]) == (503, "5")
    first.close()
    # The place is free again when the program is gone.
    assert wait_for(lambda: again(daemon), "a place")


def again(daemon: Daemon) -> bool:
    client = daemon.hand(DATA)
    try:
        return b" 200 " in client.read_until(b"\r\n\r\n")
    finally:
        client.close()


def test_a_client_that_does_not_read_stops_the_program(program: Program) -> None:
    source = """
n = 0
while n < 2000:
    os.write(1, b"x" * 16000); n += 1
    os.write(2, b"") if n % 100 else print(n, file=sys.stderr)
"""
    daemon = program(source, "idle_timeout = 0.5", "[server]\nwrite_timeout = 20")
    client = daemon.hand(DATA)
    client.read_until(b"xxx")
    before = ""
    while daemon.log() != before:
        before = daemon.log()
        time.sleep(0.7)
    assert "2000" not in before
    response = client.finish()
    assert response.complete
    assert len(response.text) == 2000 * 16000


def test_no_descriptor_and_no_zombie_is_left_of_programs_that_are_over(program: Program) -> None:
    daemon = program('print("x")')
    [worker] = daemon.workers()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{worker}/fd"))

    assert daemon.ask(DATA).complete
    before = descriptors()
    for _ in range(5):
        assert daemon.ask(DATA).complete
    wait_for(lambda: descriptors() <= before, f"{before} descriptors again")
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    assert children == []
