"""Clients that come back for the rest of their answer: to the same worker, to another, as somebody else, too late."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeDaemon, MakeLLM
from daemon_harness import Client, Daemon, Response, envelope, sealed_memfd, shaped, tcp_pair, wait_for
from llm_server import Request as LLMRequest
from llm_server import error
from test_streams import fields

ID = "b3JhY2xlLW9mLWRlbHBoaQ"


def resumable(tokens: int, pace: float = 10_000, *, name: str = ID, after: int | None = None, **more: Any) -> Any:
    resume = {"id": name} if after is None else {"id": name, "after": after}
    return shaped(tokens, pace, resume=resume, **more)


def message(data: Any, last: int | None = None, **changes: Any) -> bytes:
    headers = [] if last is None else [["last-event-id", str(last)]]
    return envelope(data, headers=headers, **changes)


def numbers(response: Response) -> list[int]:
    return [int(number) for number in re.findall(r"^id: (\d+)$", response.body.decode(), re.MULTILINE)]


def contents(*responses: Response) -> list[str]:
    """All texts, in order, whatever connection they came over."""
    lines = [line for response in responses for line in response.body.decode().split("\n")]
    return [json.loads(line[6:])["content"] for line in lines if line.startswith("data: {")]


def whole(daemon: Daemon, tokens: int) -> list[str]:
    return contents(daemon.ask(shaped(tokens)))


def cut(client: Client, text: bytes) -> Response:
    """Read until ``text`` and hang up; what came in whole events."""
    raw = client.read_until(text)
    client.close()
    response = Response(raw)
    response.body = response.body[: response.body.rfind(b"\n\n") + 2]
    return response


def test_events_are_numbered_from_one_where_the_application_says_so(demo: Daemon) -> None:
    response = demo.ask(resumable(5, name="numbered-from-one-on"))
    assert numbers(response) == [1, 2, 3, 4, 5, 6]
    assert contents(response) == whole(demo, 5)
    assert response.body.endswith(b"data: [DONE]\nid: 6\n\n")
    assert b"id: " not in demo.ask(shaped(5)).body


@pytest.mark.parametrize("pair", [None, tcp_pair])
def test_a_client_that_comes_back_gets_exactly_the_rest(demo: Daemon, pair: Any) -> None:
    options = {} if pair is None else {"pair": pair}
    name = f"exactly-the-rest-{pair is None}"
    first = cut(demo.hand(message(resumable(60, 100, name=name), id=name), **options), b"id: 20\n\n")
    demo.wait_log(f"stream id={name} .*outcome=client_gone")
    last = numbers(first)[-1]
    rest = demo.ask(message(resumable(60, 100, name=name), last), **options)
    assert rest.status == 200
    assert not rest.cut
    assert numbers(rest) == list(range(last + 1, 62))
    assert contents(first, rest) == whole(demo, 60)


def test_the_application_may_name_the_event_itself(demo: Daemon) -> None:
    name = "the-application-knows"
    first = cut(demo.hand(resumable(30, 100, name=name)), b"id: 10\n\n")
    rest = demo.ask(resumable(30, 100, name=name, after=numbers(first)[-1]))
    assert contents(first, rest) == whole(demo, 30)


def test_what_was_sent_and_never_received_is_sent_again(demo: Daemon) -> None:
    name = "sent-and-not-received"
    cut(demo.hand(message(resumable(40, 100, name=name))), b"id: 20\n\n")
    rest = demo.ask(message(resumable(40, 100, name=name), 3))
    assert numbers(rest) == list(range(4, 42))


def test_without_an_event_the_answer_is_given_from_its_beginning(demo: Daemon) -> None:
    name = "from-its-beginning-again"
    cut(demo.hand(message(resumable(40, 100, name=name))), b"id: 5\n\n")
    assert contents(demo.ask(message(resumable(40, 100, name=name)))) == whole(demo, 40)


@pytest.mark.parametrize("config", ["", "[resume]\nbuffer = 0"], ids=["kept", "turned off"])
def test_who_wants_the_rest_and_asks_nothing_begins_no_answer(make_daemon: MakeDaemon, config: str) -> None:
    fast = '[backends.demo]\ntype = "demo"\ntokens_per_second = 10000\n'
    daemon = make_daemon(fast + config).start()
    only = {"user": "ada", "user_id": 7, "request_id": "r", "prompt": None, "resume": {"id": ID, "after": 0}}
    response = daemon.ask(message(only))
    assert (response.status, json.loads(response.body)["error"]["type"]) == (410, "resume_expired")
    # A question is one whatever it is called, and so is a name without an event.
    for asked in ({**only, "query": "of a program"}, {**only, "resume": {"id": ID[::-1]}}):
        assert b"data: [DONE]\n" in daemon.ask(message(asked)).body


def test_the_backend_goes_on_while_the_client_is_away(make_llm: MakeLLM, make_daemon: MakeDaemon) -> None:
    produced: list[bool] = []

    def script(request: LLMRequest) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in ("one", "two"):
            request.event(word)
        away.wait()
        for word in ("three", "four"):
            request.event(word)
        request.end()
        produced.append(True)

    away = threading.Event()
    llm = make_llm(script)
    daemon = make_daemon(f'[backends.llm]\ntype = "openai"\nbase_url = "{llm.url}"').start()
    data = {"prompt": "count", "resume": {"id": ID}}
    cut(daemon.hand(message(data, id="first")), b"id: 2\n\n")
    daemon.wait_log("stream id=first .*outcome=client_gone")
    away.set()
    wait_for(lambda: produced, "the whole answer without a client")
    response = daemon.ask(message(data, 2))
    assert contents(response) == ["three", "four"]
    assert len(llm.requests) == 1
    # Complete, and read to the end: a browser that asks again is told to stop asking.
    again = daemon.ask(message(data, numbers(response)[-1], response_headers=[["X-Own", "1"]]))
    assert (again.status, again.body, again.headers["x-own"]) == (204, b"", "1")


def test_nobody_else_gets_it(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    owner: dict[str, Any] = {"user": "ada"}
    cut(daemon.hand(message(resumable(500, 50, user="lovelace"), **owner)), b"id: 3\n\n")
    strangers = [
        (message(resumable(500, 50, user="lovelace"), 3, user="eve"), "another user of Apache's"),
        (message(resumable(500, 50, user="lovelace"), 3), "nobody"),
        (message(resumable(500, 50, user="eve"), 3, **owner), "another user of the application's"),
        (message(resumable(500, 50), 3, **owner), "no user of the application's"),
        (message(resumable(500, 50, name=ID[:-1] + "R", user="lovelace"), 3, **owner), "another id"),
    ]
    for asked, who in strangers:
        response = daemon.ask(asked)
        assert (response.status, response.json["error"]["type"]) == (410, "resume_expired"), who
        assert b"content" not in response.body, who
    client = daemon.hand(message(resumable(500, 50, user="lovelace"), 3, **owner))
    client.read_until(b"id: 4\n\n")
    client.close()


@pytest.mark.parametrize("last", [7, 1 << 52])
def test_an_event_that_does_not_exist_yet_cannot_be_continued_from(demo: Daemon, last: int) -> None:
    name = f"that-is-not-there-yet-{last}"
    client = demo.hand(message(resumable(100, 1, name=name)))
    client.read_until(b"id: 1\n\n")
    assert demo.ask(message(resumable(100, 1, name=name), last)).status == 410
    client.close()


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "٣", "9" * 30])
def test_a_last_event_id_of_another_form_is_told_to_the_client(demo: Daemon, value: str) -> None:
    response = demo.ask(envelope(resumable(1), headers=[["Last-Event-ID", value]]))
    assert response.status == 400
    assert response.json["error"]["message"].startswith("Last-Event-ID is of another form")


@pytest.mark.parametrize(
    "resume", ["id", {}, {"id": "short"}, {"id": "x" * 129}, {"id": "with a space in it!"}, {"id": 7}]
)
def test_an_id_that_could_be_guessed_or_is_none_is_refused(demo: Daemon, resume: Any) -> None:
    response = demo.ask(shaped(1, resume=resume))
    assert response.status == 400
    assert response.json["error"]["message"].startswith("resume")


def test_a_client_that_never_comes_back_costs_a_backend_for_so_long_only(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nmax_streams = 1\n[resume]\naway = 0.3").start()
    cut(daemon.hand(message(resumable(1000, 10), id="away")), b"id: 2\n\n")
    daemon.wait_log("stream id=away .*outcome=client_gone")
    # Its backend still runs, and holds the only place.
    assert daemon.ask(shaped(1)).status == 503
    daemon.wait_log("id=away nobody came back")
    assert daemon.ask(shaped(1)).complete
    assert daemon.ask(message(resumable(1000, 10), 2)).status == 410


def test_a_complete_answer_is_kept_for_a_while_only(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[resume]\nkeep = 0.5").start()
    assert daemon.ask(message(resumable(3))).status == 200
    assert numbers(daemon.ask(message(resumable(3), 1))) == [2, 3, 4]
    wait_for(lambda: daemon.ask(message(resumable(3), 4)).status == 410, "the answer to be forgotten")


def test_the_buffer_is_bounded_and_what_fell_out_cannot_be_continued(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[resume]\nbuffer = 4096").start()
    client = daemon.hand(message(resumable(3000, 2000)))
    client.read_until(b"id: 1000\n\n")
    client.close()
    assert daemon.ask(message(resumable(3000), 1)).status == 410


def test_nobody_read_it_so_nothing_of_it_is_dropped(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[resume]\nbuffer = 16384").start()
    first = cut(daemon.hand(message(resumable(2000, 1000), id="paused")), b"id: 50\n\n")
    daemon.wait_log("stream id=paused .*outcome=client_gone")
    # Far more than the buffer takes comes in this time, if the backend is not paused.
    time.sleep(1.0)  # the backend's time, there is nothing to wait for
    rest = daemon.ask(message(resumable(2000), numbers(first)[-1]))
    assert contents(first, rest) == whole(daemon, 2000)


def test_a_second_client_takes_the_place_of_the_first(demo: Daemon) -> None:
    name = "one-reader-at-a-time"
    first = demo.hand(message(resumable(60, 100, name=name), id=name))
    first.read_until(b"id: 10\n\n")
    second = demo.hand(message(resumable(60, 100, name=name), 10, id=f"{name}-2"))
    before, rest = first.finish(), second.finish()
    demo.wait_log(f"stream id={name} .*outcome=resumed")
    assert contents(rest) == whole(demo, 60)[10:]
    assert before.cut


def test_an_error_in_mid_answer_is_what_a_returning_client_hears_too(
    make_llm: MakeLLM, make_daemon: MakeDaemon
) -> None:
    def script(request: LLMRequest) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        request.event("half")
        request.reset()

    llm = make_llm(script)
    daemon = make_daemon(f'[backends.llm]\ntype = "openai"\nbase_url = "{llm.url}"').start()
    data = {"prompt": "p", "resume": {"id": ID}}
    for last in (None, 1):
        response = daemon.ask(message(data, last))
        assert b"event: error\n" in response.body
        assert numbers(response)[-1] == 2
    assert len(llm.requests) == 1


def test_an_error_instead_of_an_answer_is_a_real_status_and_is_not_kept(
    make_llm: MakeLLM, make_daemon: MakeDaemon
) -> None:
    llm = make_llm(lambda request: request.send(error(429, "rate", "Retry-After: 7\r\n")))
    daemon = make_daemon(f'[backends.llm]\ntype = "openai"\nbase_url = "{llm.url}"').start()
    for _ in range(2):
        response = daemon.ask(message({"prompt": "p", "resume": {"id": ID}}))
        assert (response.status, response.headers["retry-after"]) == (429, "7")
    assert len(llm.requests) == 2


def test_the_buffer_can_be_turned_off(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[resume]\nbuffer = 0").start()
    response = daemon.ask(message(resumable(3), 1))
    assert response.complete
    assert numbers(response) == []


# Several workers ------------------------------------------------------------------------------------------------------


def start_workers(make_daemon: MakeDaemon, tmp_path: Path, count: int, config: str = "") -> Daemon:
    runtime = tmp_path / "run"
    runtime.mkdir()
    daemon = make_daemon(f"[server]\nworkers = {count}\n{config}", environ={"RUNTIME_DIRECTORY": str(runtime)})
    return daemon.start()


def links(tmp_path: Path) -> list[str]:
    return [entry.name for entry in os.scandir(tmp_path / "run/answers") if entry.is_symlink()]


def test_the_rest_is_found_in_whichever_worker_has_it(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = start_workers(make_daemon, tmp_path, 3, "[resume]\nkeep = 0.2")
    expected = whole(daemon, 60)
    for turn in range(12):
        name = f"in-whichever-worker-{turn:02}"
        first = cut(daemon.hand(message(resumable(60, 100, name=name), id=name), pair=tcp_pair), b"id: 5\n\n")
        last = numbers(first)[-1]
        rest = daemon.ask(message(resumable(60, 100, name=name), last, id=f"{name}-2"), pair=tcp_pair)
        assert contents(first, rest) == expected
        assert daemon.log().count(f"stream id={name}-2 ") == 1
    wait_for(lambda: not links(tmp_path), "all links to be gone")
    assert (tmp_path / "run/answers").stat().st_mode & 0o777 == 0o700


def test_workers_look_for_each_other_without_a_word_in_the_journal(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = start_workers(make_daemon, tmp_path, 2)
    old = daemon.workers()
    first = cut(daemon.hand(message(resumable(100, 100))), b"id: 5\n\n")
    assert daemon.reload().returncode == 0
    # A killed worker's socket is there until the next one starts.
    os.kill(next(pid for pid in daemon.workers() if pid not in old), signal.SIGKILL)
    daemon.wait_log("worker .* died|worker .* was killed|replac")
    assert contents(first, daemon.ask(message(resumable(100, 100), numbers(first)[-1]))) == whole(daemon, 100)
    assert "refused" not in daemon.log()


def test_a_draining_worker_still_gives_the_rest(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = start_workers(make_daemon, tmp_path, 1)
    first = cut(daemon.hand(message(resumable(200, 100))), b"id: 5\n\n")
    old = daemon.workers()
    assert daemon.reload().returncode == 0
    rest = daemon.ask(message(resumable(200, 100), numbers(first)[-1]))
    assert contents(first, rest) == whole(daemon, 200)
    assert old[0] in daemon.workers() or rest.status == 200


def test_after_a_restart_the_old_worker_still_gives_the_rest(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = start_workers(make_daemon, tmp_path, 1)
    first = cut(daemon.hand(message(resumable(300, 100))), b"id: 5\n\n")
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    daemon.start()
    rest = daemon.ask(message(resumable(300, 100), numbers(first)[-1]))
    assert contents(first, rest) == whole(daemon, 300)


def test_the_answer_of_a_killed_worker_is_gone_and_its_leavings_too(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = start_workers(make_daemon, tmp_path, 1)
    client = daemon.hand(message(resumable(200, 10)))
    client.read_until(b"id: 2\n\n")
    [worker] = daemon.workers()
    assert len(links(tmp_path)) == 1
    os.kill(worker, 9)
    wait_for(lambda: daemon.workers() not in ([], [worker]), "another worker")
    client.close()
    assert daemon.ask(message(resumable(200, 10), 2)).status == 410
    wait_for(lambda: not links(tmp_path), "the dead one's link to be gone")
    assert [entry.name for entry in (tmp_path / "run/answers").iterdir()] == [f"worker-{daemon.workers()[0]}"]


def test_a_payload_goes_along_to_the_other_worker(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = start_workers(make_daemon, tmp_path, 2)
    data = json.dumps(resumable(100, 100, prompt="x" * 300_000)).encode()
    described: dict[str, Any] = {"payload": {"memfd": True, "length": len(data)}}
    for _ in range(6):
        memfd = sealed_memfd(data)
        client = daemon.hand(message(None, **described), fds=[memfd])
        client.read_until(b"id: 3\n\n")
        client.close()
        os.close(memfd)
    assert "Traceback" not in daemon.log()


def test_the_journal_names_the_stream_that_was_continued(demo: Daemon) -> None:
    name = "continued-in-the-journal"
    cut(demo.hand(message(resumable(30, 100, name=name), id="began")), b"id: 3\n\n")
    demo.ask(message(resumable(30, 100, name=name), 3, id="went-on"))
    line = fields(demo.wait_log("stream id=went-on "))
    assert (line["outcome"], line["status"]) == ("done", "200")
    assert name not in demo.log()


def test_a_client_cut_off_by_a_reset_may_come_back_too(demo: Daemon) -> None:
    name = "reset-and-come-back-again"
    client = demo.hand(message(resumable(60, 100, name=name)), pair=tcp_pair)
    client.read_until(b"id: 5\n\n")
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert numbers(demo.ask(message(resumable(60, 100, name=name), 5))) == list(range(6, 62))


def test_answers_nobody_came_back_for_make_room_when_memory_is_short(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[limits]\nmax_buffered = 100000").start()
    for number in range(8):
        name = f"makes-room-for-others-{number}"
        # About 20 KiB each are kept after the end, and more than 100 KB are not.
        assert daemon.ask(message(resumable(200, name=name))).status == 200
    kept = [daemon.ask(message(resumable(200, name=f"makes-room-for-others-{number}"), 1)) for number in range(8)]
    statuses = [response.status for response in kept]
    assert statuses.count(410) >= 1
    assert statuses.count(200) >= 1
    assert daemon.ask(shaped(1)).complete


def test_who_comes_back_when_descriptors_are_short_is_told_to_come_later(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start(descriptors=100)
    first = daemon.ask(message(resumable(20)))
    running = []
    while True:
        running.append(daemon.hand(shaped(1000, 1)))
        if b" 503 " in running[-1].read_until(b"\r\n"):
            break
    back = daemon.ask(message(resumable(20), 5))
    assert (back.status, back.json["error"]["type"]) == (503, "overloaded")
    assert int(back.headers["retry-after"]) > 0
    for client in running:
        client.close()
    wait_for(lambda: daemon.ask(shaped(1)).complete, "descriptors again")
    assert numbers(daemon.ask(message(resumable(20), 5))) == numbers(first)[5:]
