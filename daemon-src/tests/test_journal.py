"""Fields reach the journal in its own protocol; where they cannot, the line does, and nobody waits for it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming_daemon import journal
from streaming_daemon.access_log import fields_of
from streaming_daemon.journal import JournalHandler, encode
from test_access_log import RECORD


def decode(entry: bytes) -> dict[str, str]:
    """As journald reads a datagram."""
    found = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", entry)
            value, entry = entry[8 : 8 + size], entry[8 + size + 1 :]
        found[name.decode()] = value.decode()
    return found


class Journal:
    """A journal's socket, and stderr next to it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(10)
        reader, writer = os.pipe()
        self._reader = reader
        self._lines = os.fdopen(reader, "rb", buffering=0)
        self.stderr = os.fdopen(writer, "w", buffering=1)
        status = os.fstat(writer)
        self.environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        self._monkeypatch = monkeypatch
        self.log = logging.Logger("test")
        self.log.addHandler(self.handler(self.environ, path))

    def handler(self, environ: dict[str, str], path: Path) -> logging.Handler:
        """The handler of a process whose stderr is this one's."""
        # In the test itself, because pytest has a stderr of its own for each phase.
        with self._monkeypatch.context() as patched:
            patched.setattr("sys.stderr", self.stderr)
            return journal.handler(environ, str(path))

    def entry(self) -> dict[str, str]:
        return decode(self.sock.recv(65536))

    def line(self) -> str:
        assert select.select([self._reader], [], [], 10)[0], "no line on stderr"
        return self._lines.readline().decode()


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    journal = Journal(tmp_path / "socket", monkeypatch)
    yield journal
    journal.sock.close()
    journal.stderr.close()


def test_a_streams_line_comes_with_its_fields(running: Journal) -> None:
    running.log.info("stream", extra={"fields": lambda: fields_of(RECORD)})
    entry = running.entry()
    assert entry["MESSAGE"] == "stream"
    assert entry["PRIORITY"] == "6"
    assert entry["SYSLOG_IDENTIFIER"] == "streaming-daemon"
    assert entry["HANDOFF_ID"] == RECORD.id
    assert entry["HANDOFF_USER"] == "alice"
    assert entry["HANDOFF_EVENTS"] == "3"
    assert entry["HANDOFF_FIRST_EVENT_MS"] == "431.2"
    assert "HANDOFF_LIMIT" not in entry


def test_other_lines_go_to_stderr_with_their_priority_on_every_line(running: Journal) -> None:
    running.log.error("two\nlines")
    assert (running.line(), running.line()) == ("<3>two\n", "<3>lines\n")


def test_a_value_of_several_lines_cannot_forge_a_field() -> None:
    entry = decode(encode({"A": "one\nB=two", "C": 3, "D": None, "E": ""}))
    assert entry == {"A": "one\nB=two", "C": "3"}


def test_an_entry_that_the_journal_cannot_take_is_a_plain_line(running: Journal) -> None:
    running.sock.close()
    running.log.info("stream", extra={"fields": dict})
    assert running.line() == "<6>stream\n"


def test_a_journal_that_does_not_keep_up_holds_up_nobody_and_hears_of_it(running: Journal) -> None:
    for _ in range(2000):
        running.log.info("stream %s", "x" * 1000, extra={"fields": dict})
    count = 0
    running.sock.setblocking(False)
    while True:
        try:
            running.sock.recv(65536)
            count += 1
        except BlockingIOError:
            break
    assert 0 < count < 2000
    running.log.info("stream", extra={"fields": dict})
    assert running.line() == f"<4>the journal did not keep up: {2000 - count} lines about streams are missing\n"


def test_plain_lines_do_not_wait_for_the_journal_either_and_none_is_cut_in_two(running: Journal) -> None:
    # More than any pipe holds; whoever waited would wait for ever.
    with stuck_after(30):
        for number in range(2000):
            running.log.warning("line %d %s", number, "x" * 1000)
    kept = [running.line() for _ in range(20)]
    # There is room again.
    running.log.warning("later")
    while not kept[-1].endswith("later\n"):
        kept.append(running.line())
    assert all(re.fullmatch(r"<4>line \d+ x{1000}\n", line) for line in kept[:-2])
    numbers = [int(line.split()[1]) for line in kept[:-2]]
    assert numbers == list(range(len(numbers)))
    assert kept[-2] == f"<4>the journal did not keep up: {2000 - len(numbers)} lines are missing\n"


class StuckError(BaseException):
    """No Exception, which a handler of logging would catch, and go on."""


@contextlib.contextmanager
def stuck_after(seconds: int) -> Iterator[None]:
    """Where nothing else ends a system call that waits."""

    def give_up(*_: object) -> None:
        raise StuckError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("stream", ["", "1:2", "nonsense"])
def test_a_variable_that_speaks_of_another_stderr_is_not_believed(running: Journal, stream: str) -> None:
    assert isinstance(running.handler(running.environ, running.path), JournalHandler)
    handler = running.handler({"JOURNAL_STREAM": stream}, running.path)
    assert not isinstance(handler, JournalHandler)


def test_without_the_journals_socket_lines_go_to_stderr(running: Journal, tmp_path: Path) -> None:
    handler = running.handler(running.environ, tmp_path / "none")
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("there")
    assert running.line() == "<4>there\n"


def test_a_stderr_that_is_no_file_is_no_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not journal.is_stderr({"JOURNAL_STREAM": "1:2"})
