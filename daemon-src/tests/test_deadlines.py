"""How long anything may take, what a client sees of it, and how a response is framed."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from conftest import MakeDaemon, MakeLLM
from daemon_harness import TIMEOUT, Daemon, envelope, shaped, socket_pair, tcp_pair, unchunk, wait_for
from llm_server import SSE_HEAD, Script, error
from llm_server import Request as LLMRequest
from test_streams import fields

PROMPT = {"prompt": "why?"}
Setup = Callable[..., Daemon]


@pytest.fixture
def setup(make_llm: MakeLLM, make_daemon: MakeDaemon) -> Setup:
    def make(script: Script, server: str = "") -> Daemon:
        llm = make_llm(script)
        config = f'[server]\n{server}\n[backends.llm]\ntype = "openai"\nbase_url = "{llm.url}"\n'
        daemon: Daemon = make_daemon(config).start()
        daemon.llm = llm  # type: ignore[attr-defined]
        return daemon

    return make


def silent(request: LLMRequest) -> None:
    request.wait_closed()


def endless(request: LLMRequest) -> None:
    request.send(SSE_HEAD)
    request.event("first")
    request.wait_closed()


# Deadlines ------------------------------------------------------------------------------------------------------------


def test_a_stream_that_takes_too_long_ends_with_an_error_event_and_its_backend_is_cancelled(setup: Setup) -> None:
    daemon = setup(endless, "max_duration = 0.5")
    begin = time.monotonic()
    response = daemon.ask(envelope(PROMPT, id="too-long"))
    assert 0.4 < time.monotonic() - begin < 3
    assert response.error["type"] == "stream_timeout"
    assert not response.cut
    assert daemon.llm.requests[0].closed.wait(TIMEOUT)  # type: ignore[attr-defined]
    assert fields(daemon.wait_log("stream id=too-long "))["outcome"] == "timeout"


def test_without_a_first_event_in_time_the_status_says_so(setup: Setup) -> None:
    daemon = setup(silent, "first_event_timeout = 0.3")
    response = daemon.ask(PROMPT)
    assert (response.status, response.json["error"]["type"]) == (504, "first_event_timeout")
    assert daemon.llm.requests[0].closed.wait(TIMEOUT)  # type: ignore[attr-defined]


def test_without_a_first_event_in_time_the_event_says_so_where_the_head_was_sent(setup: Setup) -> None:
    response = setup(silent, "head_after = 0.1\nfirst_event_timeout = 0.5").ask(PROMPT)
    assert response.status == 200
    assert b": ping\n\n" in response.body
    assert response.error["type"] == "first_event_timeout"


def test_an_answer_that_has_begun_has_no_deadline_for_its_first_event(setup: Setup) -> None:
    daemon = setup(endless, "first_event_timeout = 0.2\nmax_duration = 1")
    assert daemon.ask(PROMPT).error["type"] == "stream_timeout"


def test_silence_before_the_answer_is_filled_after_a_while_and_the_status_is_then_fixed(setup: Setup) -> None:
    def script(request: LLMRequest) -> None:
        pinged.wait(TIMEOUT)
        request.send(error(429, "rate"))

    pinged = threading.Event()
    client = setup(script, "head_after = 0.2").hand(PROMPT)
    client.read_until(b": ping\n\n")
    pinged.set()
    response = client.finish()
    assert (response.status, response.error["type"]) == (200, "backend_rate_limited")


def test_the_head_can_wait_for_the_answer_for_ever(setup: Setup) -> None:
    response = setup(silent, "head_after = 0\nheartbeat = 0.1\nfirst_event_timeout = 0.5").ask(PROMPT)
    assert response.status == 504


def test_a_deadline_does_not_free_a_client_from_reading(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nmax_duration = 1.2\nwrite_timeout = 1.0").start()
    stuck = daemon.hand(shaped(100_000, request_id="stuck"))
    line = fields(daemon.wait_log("stream id=stuck "))
    assert line["outcome"] == "write_timeout"
    stuck.close()


def narrow_pair() -> tuple[socket.socket, socket.socket]:
    """The kernel keeps next to nothing for the client, so that it waits in the daemon."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return ours, theirs


def test_who_reads_a_little_now_and_then_does_not_keep_a_stream_for_ever(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nmax_duration = 1.0\nwrite_timeout = 1.5").start()
    client = daemon.hand(shaped(100_000, request_id="drip"), pair=narrow_pair)
    with contextlib.suppress(ConnectionResetError):
        # Often enough for every write_timeout; what waits would take it ten seconds.
        while "stream id=drip" not in daemon.log() and client.sock.recv(700):
            time.sleep(0.1)  # the pace of this client
    assert fields(daemon.wait_log("stream id=drip "))["outcome"] == "write_timeout"
    client.close()


# Hanging up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [socket_pair, tcp_pair])
@pytest.mark.parametrize("begun", [False, True])
def test_who_hangs_up_cancels_the_backends_request_within_a_second(setup: Setup, begun: bool, pair: Any) -> None:
    daemon = setup(endless if begun else silent)
    client = daemon.hand(PROMPT, pair=pair)
    wait_for(lambda: daemon.llm.requests, "the request")  # type: ignore[attr-defined]
    if begun:
        client.read_until(b"first")
    begin = time.monotonic()
    client.close()
    assert daemon.llm.requests[0].closed.wait(TIMEOUT)  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("pair", [socket_pair, tcp_pair])
@pytest.mark.parametrize("begun", [False, True])
def test_who_only_stops_sending_gets_the_rest_and_the_backend_is_not_cancelled(
    setup: Setup, begun: bool, pair: Any
) -> None:
    def script(request: LLMRequest) -> None:
        if begun:
            request.send(SSE_HEAD)
            request.event("first")
        half_closed.wait(TIMEOUT)
        # Longer than a hang-up takes to be noticed.
        assert not request.closed.wait(1.2)
        if not begun:
            request.send(SSE_HEAD)
        request.event("last")
        request.end()

    half_closed = threading.Event()
    daemon = setup(script)
    client = daemon.hand(PROMPT, pair=pair)
    wait_for(lambda: daemon.llm.requests, "the request")  # type: ignore[attr-defined]
    if begun:
        client.read_until(b"first")
    client.sock.shutdown(socket.SHUT_WR)
    half_closed.set()
    response = client.finish()
    assert response.complete
    assert response.texts[-1] == "last"


def test_who_stops_sending_and_then_leaves_cancels_the_backend_with_the_next_heartbeat(setup: Setup) -> None:
    daemon = setup(endless, "heartbeat = 0.3")
    client = daemon.hand(PROMPT, pair=tcp_pair)
    client.read_until(b"first")
    client.sock.shutdown(socket.SHUT_WR)
    client.read_until(b": ping\n\n")
    client.close()
    assert daemon.llm.requests[0].closed.wait(1.5)  # type: ignore[attr-defined]


def test_a_client_that_does_not_read_stops_its_backend(setup: Setup) -> None:
    sent = []

    def script(request: LLMRequest) -> None:
        request.send(SSE_HEAD)
        try:
            for _ in range(20_000):
                request.event("x" * 1000)
                sent.append(1000)
        except OSError:
            # The socket's time is over: nobody reads.
            pass

    daemon = setup(script, "write_timeout = 2")
    client = daemon.hand(PROMPT | {"request_id": "stuck"})
    line = fields(daemon.wait_log("stream id=stuck "))
    assert line["outcome"] == "write_timeout"
    # What the kernel's buffers on both legs hold, and not the 20 MB there are.
    assert sum(sent) < 15_000_000
    client.close()


# Retry ----------------------------------------------------------------------------------------------------------------

WITH_FALLBACK = """
[backend]
default = "first"
[backends.first]
type = "openai"
base_url = "{url}"
fallback = ["second"]
[backends.second]
type = "{kind}"
{more}
"""


def test_another_backend_may_still_answer_behind_a_comment(make_llm: MakeLLM, make_daemon: MakeDaemon) -> None:
    def script(request: LLMRequest) -> None:
        pinged.wait(TIMEOUT)
        request.send(error(503, "down"))

    pinged = threading.Event()
    config = WITH_FALLBACK.format(url=make_llm(script).url, kind="demo", more="")
    daemon = make_daemon(f"[server]\nhead_after = 0.1\n{config}").start()
    client = daemon.hand(shaped(5, prompt="p", request_id="second"))
    client.read_until(b": ping\n\n")
    pinged.set()
    response = client.finish()
    assert response.complete
    assert len(response.texts) == 5
    daemon.wait_log("stream id=second .*backend=second outcome=done")


def test_a_backend_with_a_head_of_its_own_is_not_asked_behind_ours(make_llm: MakeLLM, make_daemon: MakeDaemon) -> None:
    def script(request: LLMRequest) -> None:
        pinged.wait(TIMEOUT)
        request.send(error(503, "down"))

    pinged = threading.Event()
    other = make_llm(lambda request: request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"))
    config = WITH_FALLBACK.format(url=make_llm(script).url, kind="http", more=f'url = "{other.url}"')
    daemon = make_daemon(f"[server]\nhead_after = 0.1\n{config}").start()
    client = daemon.hand(PROMPT)
    client.read_until(b": ping\n\n")
    pinged.set()
    assert client.finish().error["type"] == "backend_unavailable"
    assert other.requests == []
    # Before ours it may be asked.
    pinged.set()
    assert daemon.ask(PROMPT).body == b"hi"


def test_an_answer_that_may_be_continued_is_asked_for_elsewhere_too(make_llm: MakeLLM, make_daemon: MakeDaemon) -> None:
    llm = make_llm(lambda request: request.send(error(503, "down")))
    daemon = make_daemon(WITH_FALLBACK.format(url=llm.url, kind="demo", more="")).start()
    response = daemon.ask(shaped(3, prompt="p", request_id="r", resume={"id": "continued-elsewhere"}))
    assert response.body.endswith(b"data: [DONE]\nid: 4\n\n")
    daemon.wait_log("stream id=r .*backend=second outcome=done")


# Responses that are passed on -----------------------------------------------------------------------------------------


def passing(make_llm: MakeLLM, make_daemon: MakeDaemon, script: Script, server: str = "") -> Daemon:
    text = f'[server]\n{server}\n[backends.u]\ntype = "http"\nurl = "{make_llm(script).url}"\n'
    daemon: Daemon = make_daemon(text).start()
    return daemon


def test_a_body_of_unknown_length_is_chunked_for_who_knows_chunks(make_llm: MakeLLM, make_daemon: MakeDaemon) -> None:
    def script(request: LLMRequest) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nContent-Type: x/y\r\nTransfer-Encoding: chunked\r\n\r\n")
        request.chunk(b"a" * 1000)
        request.chunk(b"b" * 1000)
        request.chunk(b"")

    daemon = passing(make_llm, make_daemon, script)
    response = daemon.ask(envelope({}))
    assert (response.headers["transfer-encoding"], response.cut) == ("chunked", False)
    assert response.body == b"a" * 1000 + b"b" * 1000
    old = daemon.ask(envelope({}, protocol="HTTP/1.0"))
    assert "transfer-encoding" not in old.headers
    assert old.body == response.body


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("length", ["", "Content-Length: 5000\r\n"])
def test_a_body_that_breaks_off_never_looks_complete(
    make_llm: MakeLLM, make_daemon: MakeDaemon, protocol: str, length: str
) -> None:
    def script(request: LLMRequest) -> None:
        coding = "" if length else "Transfer-Encoding: chunked\r\n"
        request.send(f"HTTP/1.1 200 OK\r\n{length}{coding}\r\n".encode())
        request.send(b"x" * 1000) if length else request.chunk(b"x" * 1000)
        seen.wait(TIMEOUT)
        request.reset()

    seen = threading.Event()
    client = passing(make_llm, make_daemon, script).hand(envelope({}, protocol=protocol), pair=tcp_pair)
    client.read_until(b"xxx")
    seen.set()
    response = client.finish()
    whole = len(response.body) == int(response.headers.get("content-length", 0)) if length else True
    assert response.cut or response.reset or not whole


def test_a_silent_upstream_is_given_no_head_and_no_comment(make_llm: MakeLLM, make_daemon: MakeDaemon) -> None:
    server = "head_after = 0.1\nheartbeat = 0.1\nfirst_event_timeout = 0.6"
    response = passing(make_llm, make_daemon, silent, server).ask(envelope({}))
    assert (response.status, response.json["error"]["type"]) == (504, "first_event_timeout")


@pytest.mark.parametrize(
    "message", [envelope({}), envelope({}, protocol="HTTP/1.0"), b"{}"], ids=["1.1", "1.0", "plain"]
)
def test_who_leaves_before_an_upstream_answers_is_noticed_within_a_second(
    make_llm: MakeLLM, make_daemon: MakeDaemon, message: bytes
) -> None:
    requests: list[LLMRequest] = []

    def script(request: LLMRequest) -> None:
        requests.append(request)
        request.wait_closed()

    client = passing(make_llm, make_daemon, script).hand(message, pair=tcp_pair)
    wait_for(lambda: requests, "the request")
    client.close()
    assert requests[0].closed.wait(1)


# Framing --------------------------------------------------------------------------------------------------------------


def test_http_1_1_gets_chunks_that_end_with_the_last_one(either: Daemon) -> None:
    raw = either.ask(envelope(shaped(50))).raw
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    assert b"Connection: close" in head
    assert body.endswith(b"\r\n0\r\n\r\n")
    events, cut = unchunk(body)
    assert not cut
    assert events.count(b"data: {") == 50


@pytest.mark.parametrize("message", [envelope(shaped(5), protocol="HTTP/1.0"), json.dumps(shaped(5)).encode()])
def test_who_may_not_know_chunks_gets_none(either: Daemon, message: bytes) -> None:
    response = either.ask(message)
    assert "transfer-encoding" not in response.headers
    assert response.raw.endswith(b"data: [DONE]\n\n")


def test_a_stream_in_chunks_that_broke_off_in_error_still_ends_in_order(setup: Setup) -> None:
    def script(request: LLMRequest) -> None:
        request.send(SSE_HEAD)
        request.event("half")
        request.reset()

    response = setup(script).ask(envelope(PROMPT))
    assert not response.cut
    assert response.error["type"].startswith("backend_")


def test_errors_before_the_first_byte_are_never_chunked(demo: Daemon) -> None:
    response = demo.ask(envelope("[]"))
    assert "transfer-encoding" not in response.headers
    assert len(response.body) == int(response.headers["content-length"])


def test_a_slow_reader_gets_every_chunk_whole(demo: Daemon) -> None:
    client = demo.hand(envelope(shaped(8_000)), pair=tcp_pair)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while len(client.received) < 100_000:
        client.received += client.sock.recv(997)
    response = client.finish()
    assert response.complete
    assert len(response.texts) == 8_000


# UTF-8 ----------------------------------------------------------------------------------------------------------------


def test_no_event_ever_holds_a_part_of_a_character_however_the_backends_bytes_were_cut(setup: Setup) -> None:
    dice = random.Random(11)  # the same every time: a failure can be run again
    alphabet = 'aé€日😀\u2028\u0000"\\\n\r'
    words = ["".join(dice.choices(alphabet, k=dice.randint(1, 12))) for _ in range(200)]

    def script(request: LLMRequest) -> None:
        request.send(SSE_HEAD)
        stream = b"".join(
            b"data: " + json.dumps({"choices": [{"delta": {"content": word}}]}, ensure_ascii=False).encode() + b"\n\n"
            for word in words
        )
        while stream:
            size = dice.randint(1, 40)
            request.chunk(stream[:size])
            stream = stream[size:]
        request.end()

    raw = setup(script).ask(envelope(PROMPT))
    texts = []
    for block in raw.body.split(b"\n\n"):
        # Each on its own: every event is valid UTF-8, and JSON.
        text = block.decode("utf-8", "strict")
        if text.startswith("data: {"):
            texts.append(json.loads(text[6:])["content"])
    assert "".join(texts) == "".join(words)
