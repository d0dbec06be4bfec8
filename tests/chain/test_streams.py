"""What a client of the front door gets: every byte, in order, and an end it can trust."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest
from front_door import Answer, Connection, Session, assert_complete
from testinfra.host import Host

HandOff = Callable[..., Answer]


def test_an_answer_arrives_token_by_token(session: Session) -> None:
    stream = session.open_stream(tokens=20, pace=10)
    stream.read_until(b"data: ")
    first = time.monotonic() - stream.began
    answer = stream.read_to_end()
    assert_complete(answer, 20)
    assert first < 1.0, f"the first event took {first:.2f} s: something buffers the stream"
    assert answer.seconds > 1.5, f"20 tokens at 10 per second came within {answer.seconds:.2f} s: they were not paced"
    assert (answer.header("Content-Type") or "").startswith("text/event-stream")
    assert answer.header("Connection") == "close"


def test_post_and_get_stream_the_same_answer(session: Session) -> None:
    form = urlencode({"prompt": "same", "tokens": 50, "pace": 1000}).encode()
    post = Connection(
        session.address, session.request("POST", "/stream.php", form, {"X-CSRF-Token": session.csrf})
    ).read_to_end()
    get = session.open_stream("same", tokens=50, pace=1000).read_to_end()
    assert assert_complete(post, 50) == assert_complete(get, 50)


def test_a_slow_reader_gets_every_byte_in_order(session: Session) -> None:
    tokens = 60_000
    quick = session.open_stream("slow", tokens=tokens, pace=10_000).read_to_end()
    slow = session.open_stream("slow", tokens=tokens, pace=10_000, receive_buffer=8192).read_to_end(0.004, 16384)
    assert assert_complete(quick, tokens) == assert_complete(slow, tokens)


def test_bytes_the_client_sends_late_do_not_reset_the_connection(session: Session) -> None:
    """A bare close(2) with unread input would send RST and destroy the tail (RFC 9112 section 9.6)."""
    stream = session.open_stream(tokens=400, pace=200, receive_buffer=8192)
    stream.read_until(b"data: ")
    stream.socket.sendall(b"x" * 100_000)
    assert_complete(stream.read_to_end(), 400)


def test_http_1_0_is_answered_without_chunks(session: Session) -> None:
    query = urlencode({"prompt": "old client", "tokens": 30, "pace": 500})
    request = f"GET /stream.php?{query} HTTP/1.0\r\nHost: x\r\nCookie: {session.cookie}\r\n\r\n".encode()
    answer = Connection(session.address, request).read_to_end()
    assert answer.header("Transfer-Encoding") is None
    assert_complete(answer, 30)


def test_head_is_the_head_of_the_stream(session: Session, host: Host) -> None:
    before = host.check_output("date +%s")
    answer = Connection(session.address, session.request("HEAD", "/stream.php?prompt=x")).read_to_end()
    assert (answer.status, answer.body, answer.end) == (200, b"", "FIN")
    assert (answer.header("Content-Type") or "").startswith("text/event-stream")
    assert answer.header("X-Socket-Handoff") is None and answer.header("X-Handoff-Data") is None
    assert " method=HEAD path=/stream.php " in journal(host, before)


@pytest.mark.parametrize("size", [7_000, 100_000, 1_000_000])
def test_a_long_question_reaches_the_daemon_whole(session: Session, size: int) -> None:
    """Through PHP-FPM's header limit and the limit of a socket's message. The demo repeats how the question begins;
    that nothing is missing at its end is certain because the data is JSON, and test_openai looks at all of it."""
    question = f"begin {'0123456789' * (size // 10)} end"
    form = urlencode({"prompt": question, "tokens": 30, "pace": 10_000}).encode()
    request = session.request("POST", "/stream.php", form, {"X-CSRF-Token": session.csrf})
    text = assert_complete(Connection(session.address, request).read_to_end(), 30)
    assert "begin 01234567890123456789" in text, text


def test_what_php_sets_arrives_at_the_browser(hand_off: HandOff) -> None:
    answer = hand_off("llm", '{"prompt": "x", "demo": {"tokens": 2, "tokens_per_second": 100}}')
    assert_complete(answer, 2)
    cookies = [value.split(";")[0] for name, value in answer.headers if name.lower() == "set-cookie"]
    assert cookies == ["chain=test", "second=2"]
    assert answer.header("X-Chain-Test") == "from PHP"
    assert answer.header("Content-Length") is None, "that was the length of PHP's body"


def test_both_logs_name_the_client_and_the_same_id(session: Session, host: Host) -> None:
    before = host.check_output("date +%s")
    stream = session.open_stream(tokens=3, pace=100)
    name, port = stream.socket.getsockname()[:2]
    assert_complete(stream.read_to_end(), 3)
    line = next(line for line in journal(host, before).splitlines() if f" client={name}:{port} " in line)
    assert " method=GET path=/stream.php " in line
    [request_id] = re.findall(r" id=(\S+) ", line)
    logged = host.check_output(f"grep -F -- {request_id} /var/log/apache2/handoff-app-access.log").splitlines()
    assert len(logged) == 1 and logged[0].startswith(f"{name} "), logged
    assert re.search(rf'" llm sent \d+ {re.escape(request_id)}$', logged[0]), logged


def test_the_status_page_counts_handoffs_and_is_for_the_host_itself(session: Session, host: Host) -> None:
    def sent() -> int:
        url = "http://127.0.0.1/socket-handoff-status?auto"
        page = host.check_output(
            f"python3 -c \"import urllib.request as u; print(u.urlopen('{url}').read().decode())\""
        )
        return int(re.search(r"^llm/sent: (\d+)$", page, re.MULTILINE)[1])  # type: ignore[index]

    before = sent()
    for _ in range(3):
        assert_complete(session.open_stream(tokens=2, pace=100).read_to_end(), 2)
    assert sent() == before + 3
    assert session.get("/socket-handoff-status?auto").status == 403


def journal(host: Host, since: str) -> str:
    return str(host.check_output(f"journalctl -u streaming-daemon --since=@{since} -o cat --no-pager"))


def test_unicode_is_never_split(session: Session) -> None:
    answer = session.open_stream("Zeichen: \U0001f600 \u4e2d\u6587 \U0001d400", tokens=300, pace=5000).read_to_end()
    assert "\ufffd" not in assert_complete(answer, 300)


def test_the_application_keeps_its_own_errors(session: Session) -> None:
    stranger = Session(session.address)
    assert stranger.get("/stream.php?prompt=x").status == 401
    assert session.get("/stream.php").status == 422
    forged = session.request("POST", "/stream.php", b"prompt=x", {"X-CSRF-Token": "forged"})
    assert Connection(session.address, forged).read_to_end().status == 403


@pytest.fixture(scope="module")
def four_workers(host: Host, prefork: bool) -> Iterator[None]:
    """Apache with four workers in all; its usual limits come back afterwards."""
    one_child = ["StartServers 1", "ServerLimit 1", "ThreadLimit 4", "ThreadsPerChild 4", "MinSpareThreads 1"]
    limits = ["StartServers 4", "ServerLimit 4"] if prefork else [*one_child, "MaxSpareThreads 4"]
    lines = "\\n".join([*limits, "MaxRequestWorkers 4"])
    conf = "/etc/apache2/conf-enabled/zz-four-workers.conf"
    host.check_output(f"printf '{lines}\\n' >{conf} && apache2ctl configtest && systemctl restart apache2")
    yield
    host.check_output(f"rm {conf} && apache2ctl configtest && systemctl restart apache2")


@pytest.mark.usefixtures("four_workers")
def test_fifty_streams_on_four_workers_leave_the_site_quick(session: Session, host: Host) -> None:
    streams = [session.open_stream(f"stream {n}", tokens=60, pace=10) for n in range(50)]
    for stream in streams:
        stream.read_until(b"data: ")
    status_page = "urllib.request.urlopen('http://127.0.0.1/server-status?auto', timeout=5)"
    status = host.check_output(f'python3 -c "import urllib.request; print({status_page}.read().decode())"')
    busy = re.search(r"^BusyWorkers: (\d+)", status, re.MULTILINE)
    assert busy and int(busy[1]) <= 1, status  # the one is the status request itself
    seconds = []
    for _ in range(20):
        page = session.get("/plain.php")
        assert page.status == 200
        seconds.append(page.seconds)
    # Not a benchmark: without the handoff the page would wait until a stream ends, six seconds.
    assert max(seconds) < 1.0, f"plain pages took {[f'{s:.3f}' for s in seconds]} s while 50 streams ran"
    with ThreadPoolExecutor(50) as pool:
        for answer in pool.map(Connection.read_to_end, streams):
            assert_complete(answer, 60)


def test_each_stream_leaves_one_line_in_the_journal(session: Session, host: Host) -> None:
    marker = "a prompt that must stay out of the journal"
    before = host.check_output("date +%s")
    assert_complete(session.open_stream(marker, tokens=7, pace=1000).read_to_end(), 7)
    lines = host.check_output(f"journalctl -u streaming-daemon --since=@{before} -o cat").splitlines()
    assert len([line for line in lines if "outcome=done" in line and "events=7 " in line]) == 1, lines
    assert marker not in "\n".join(lines)


def test_the_journal_has_what_is_known_of_a_stream_as_fields(session: Session, host: Host) -> None:
    """By which journalctl finds it; the id is the one in Apache's log."""
    marker = "a prompt that is in no field either"
    before = host.check_output("date +%s")
    stream = session.open_stream(marker, tokens=6, pace=1000)
    name, port = stream.socket.getsockname()[:2]
    assert_complete(stream.read_to_end(), 6)
    line = next(line for line in journal(host, before).splitlines() if f" client={name}:{port} " in line)
    [request_id] = re.findall(r" id=(\S+) ", line)
    found = host.check_output(
        f"journalctl --sync; journalctl -u streaming-daemon HANDOFF_ID={request_id} -o json --no-pager"
    ).splitlines()
    assert len(found) == 1, found
    entry = json.loads(found[0])
    fields = {key.removeprefix("HANDOFF_"): value for key, value in entry.items() if key.startswith("HANDOFF_")}
    expected = {"USER": "demo", "METHOD": "GET", "PATH": "/stream.php", "STATUS": "200", "OUTCOME": "done"}
    assert expected.items() <= fields.items(), fields
    assert fields["EVENTS"] == "6" and int(fields["BYTES"]) > 100 and float(fields["FIRST_EVENT_MS"]) >= 0, fields
    assert entry["MESSAGE"] == line and entry["_SYSTEMD_UNIT"] == "streaming-daemon.service"
    assert marker not in found[0]
