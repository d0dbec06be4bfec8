"""The file with a line per stream: what it says, that nobody can forge it, and that it disturbs no stream."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from daemon_harness import envelope
from streaming_daemon import access_log, board
from streaming_daemon.access_log import (
    AccessLog,
    LogFile,
    StreamRecord,
    Visit,
    format_combined,
    format_json,
    format_pairs,
    format_record,
    question,
    visit,
)
from streaming_daemon.board import Board
from streaming_daemon.config import LOG_FORMATS, AccessLogConfig
from streaming_daemon.envelope import unpack
from streaming_daemon.handoff import parse_data

RECORD = StreamRecord(
    id="aSNwZH8AAAEAAB7bQ0gAAAAA",
    request_id="r-1",
    client="203.0.113.9:40001",
    user="alice",
    method="GET",
    path="/stream.php",
    backend="openai",
    outcome="done",
    status=200,
    events=3,
    bytes=345,
    first_event=0.4312,
    duration=1.5,
    visit=Visit("HTTP/1.1", "https://chat.example/page", "Mozilla/5.0 (X11)"),
)
# The Combined Log Format as log analysers read it.
COMBINED = re.compile(
    r"(?P<host>\S+) - (?P<user>\S+) \[(?P<time>\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "
    r'"(?P<request>(?:[^"\\]|\\.)*)" (?P<status>\d{3}|-) (?P<bytes>\d+|-) '
    r'"(?P<referer>(?:[^"\\]|\\.)*)" "(?P<agent>(?:[^"\\]|\\.)*)"'
)
NASTY = 'a"b\\c\nd\te\x1b[31m é 漢\x7f'


def change(**changes: Any) -> StreamRecord:
    return dataclasses.replace(RECORD, **changes)


def combined(record: StreamRecord) -> dict[str, str]:
    match = COMBINED.fullmatch(format_combined(record))
    assert match, format_combined(record)
    return match.groupdict()


def test_combined_is_what_log_analysers_read() -> None:
    found = combined(RECORD)
    del found["time"]
    assert found == {
        "host": "203.0.113.9",
        "user": "alice",
        "request": "GET /stream.php HTTP/1.1",
        "status": "200",
        "bytes": "345",
        "referer": "https://chat.example/page",
        "agent": "Mozilla/5.0 (X11)",
    }


@pytest.mark.parametrize(
    ("client", "host"),
    [("[2001:db8::1]:443", "2001:db8::1"), ("2001:db8::1", "2001:db8::1"), ("unix", "unix"), ("", "-")],
)
def test_combined_has_the_clients_address_without_its_port(client: str, host: str) -> None:
    assert combined(change(client=client))["host"] == host


def test_combined_of_a_plain_message_has_dashes_where_nothing_is_known() -> None:
    found = combined(change(user="", method="", path="", status=0, bytes=0, visit=Visit()))
    del found["time"], found["host"]
    assert set(found.values()) == {"-"}


@pytest.mark.parametrize("write", [format_combined, format_json, format_pairs, format_record])
@pytest.mark.parametrize("name", ["id", "request_id", "client", "user", "method", "path", "backend", "referer"])
def test_nobody_can_forge_a_line_or_a_field(write: Any, name: str) -> None:
    record = change(visit=Visit(NASTY, NASTY, NASTY)) if name == "referer" else change(**{name: NASTY})
    line = write(record)
    assert line.isascii()
    assert line.isprintable()
    if write is format_combined:
        assert COMBINED.fullmatch(line), line


def test_json_has_every_figure_and_nothing_that_is_unknown() -> None:
    record = change(tries=2, limit="", replay="ans", prompt_tokens=7, completion_tokens=None)
    found = json.loads(format_json(record))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found.pop("pid") == os.getpid()
    assert found == {
        "id": "aSNwZH8AAAEAAB7bQ0gAAAAA",
        "request_id": "r-1",
        "client": "203.0.113.9:40001",
        "user": "alice",
        "method": "GET",
        "path": "/stream.php",
        "protocol": "HTTP/1.1",
        "status": 200,
        "outcome": "done",
        "backend": "openai",
        "tries": 2,
        "replay": "ans",
        "events": 3,
        "bytes": 345,
        "first_event_ms": 431.2,
        "duration_ms": 1500.0,
        "prompt_tokens": 7,
        "referer": "https://chat.example/page",
        "user_agent": "Mozilla/5.0 (X11)",
    }


def test_pairs_begin_with_the_time() -> None:
    assert re.match(r"time=\S+Z id=aSNwZH8AAAEAAB7bQ0gAAAAA request_id=r-1 ", format_pairs(RECORD))


def test_the_line_says_more_only_where_there_is_more() -> None:
    assert "tries=" not in format_record(RECORD)
    line = format_record(change(tries=2, limit="user", replay="x y", prompt_tokens=1, completion_tokens=2))
    assert line.endswith(' tries=2 limit=user replay="x y" prompt_tokens=1 completion_tokens=2')


def test_a_visit_keeps_no_query_of_the_referring_page_and_equal_strings_once() -> None:
    headers = [["Referer", "https://chat.example/ask?q=s3cr3t#x"], ["USER-AGENT", "curl/8"], ["Cookie", "s3cr3t"]]
    requests = [unpack(envelope(headers=headers), "auto").request for _ in range(2)]
    assert requests[0] is not None
    assert requests[1] is not None
    one, two = visit(requests[0]), visit(requests[1])
    assert one == Visit("HTTP/1.1", "https://chat.example/ask", "curl/8")
    assert one.agent is two.agent
    assert "s3cr3t" not in repr(one)


@pytest.mark.parametrize("name", LOG_FORMATS)
def test_each_stream_is_one_line_of_the_file_in_the_format_asked_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / "access.log"
    observer = AccessLog(AccessLogConfig(str(path), name))
    observer.finished(RECORD)
    observer.finished(change(outcome="client_gone"))
    observer.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    start = {"combined": "203.0.113.9 - alice [", "json": '{"time":"', "pairs": "time="}[name]
    assert all(line.startswith(start) for line in lines)
    assert path.stat().st_mode & 0o007 == 0


def test_a_rotated_file_is_followed_without_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "_CHECK_INTERVAL", 0.0)
    path = tmp_path / "access.log"
    file = LogFile(str(path))
    file.write("one")
    path.rename(tmp_path / "access.log.1")
    file.write("two")
    path.unlink()
    file.write("three")
    assert (tmp_path / "access.log.1").read_text() == "one\n"
    assert path.read_text() == "three\n"


def lines_about(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "access log" in record.getMessage()]


def test_a_full_disk_is_reported_once_and_every_lost_line_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    shared, number = Board.private()
    file = LogFile("/dev/full", shared.slot(number))
    for _ in range(5):
        file.write("line")
    assert shared.total(board.LOG_ERRORS) == 5
    assert lines_about(caplog) == [
        "access log /dev/full cannot be written: No space left on device: its lines are lost until it can"
    ]


def test_a_file_that_comes_back_is_reported_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_log, "_CHECK_INTERVAL", 0.0)
    path = tmp_path / "new" / "access.log"
    file = LogFile(str(path))
    for _ in range(3):
        file.write("lost")
    path.parent.mkdir()
    file.write("kept")
    file.write("kept")
    assert path.read_text() == "kept\nkept\n"
    assert lines_about(caplog) == [
        f"access log {path} cannot be written: No such file or directory: its lines are lost until it can",
        f"access log {path} is written again; 3 lines are missing",
    ]


def test_half_a_line_on_a_disk_that_fills_up_does_not_begin_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "access.log"
    file = LogFile(str(path))
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        file.write("half of it is lost")
    file.write("whole")
    assert path.read_text() == "hal\nwhole\n"


def test_a_pipe_that_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    file = LogFile(str(path))
    file.write("nobody listens")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        file = LogFile(str(path))
        for _ in range(100):
            file.write("x" * 4000)
    finally:
        os.close(reader)
        file.close()


def test_a_question_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    question("id 1", parse_data(b'{"prompt":"two\\nlines"}'))
    assert [record.getMessage() for record in caplog.records] == [
        'question id="id 1" {"prompt": "two\\nlines", "messages": []}'
    ]
