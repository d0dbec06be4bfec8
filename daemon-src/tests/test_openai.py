"""The OpenAI-compatible backend against a server that does whatever a test wants."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeDaemon, MakeLLM
from daemon_harness import TIMEOUT, Daemon, Response, tcp_pair, wait_for
from llm_server import SSE_HEAD, FakeLLM, Request, Script, error, event, fill

pytest.importorskip("httptools")

KEY = "sk-test-0123456789"
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
PROMPT = {"prompt": "my secret question", "request_id": "r1"}


def config(url: str, more: str = "", server: str = "") -> str:
    backend = f'[backends.llm]\ntype = "openai"\nbase_url = "{url}"\nmodel = "m-1"\n{more}\n'
    return f'{server}\n[backend]\ndefault = "llm"\n{backend}'


class Setup:
    """A daemon before a stand-in server."""

    def __init__(self, make_daemon: MakeDaemon, make_llm: MakeLLM) -> None:
        self._make_daemon = make_daemon
        self._make_llm = make_llm
        self.llm: FakeLLM
        self.daemon: Daemon

    def __call__(
        self, script: Script, more: str = "", server: str = "", tls: ssl.SSLContext | None = None, **options: Any
    ) -> Daemon:
        self.llm = self._make_llm(script, tls=tls)
        self.daemon = self._make_daemon(config(self.llm.url, more, server), **options).start()
        return self.daemon


@pytest.fixture
def setup(make_daemon: MakeDaemon, make_llm: MakeLLM) -> Setup:
    return Setup(make_daemon, make_llm)


def good(request: Request) -> None:
    request.send(SSE_HEAD)
    request.chunk(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
    request.event("Hel")
    request.event("lo")
    request.chunk(b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n')
    request.chunk(b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n')
    request.end()


def assert_error(response: Response, status: int, kind: str) -> None:
    assert response.status == status, response.raw
    assert response.json["error"]["type"] == kind
    assert "127.0.0.1" not in response.raw.decode()
    assert not response.reset


def test_an_answer_is_relayed_chunk_by_chunk(setup: Setup) -> None:
    daemon = setup(good)
    response = daemon.ask(PROMPT)
    assert response.complete
    assert response.texts == ["Hel", "lo"]
    assert "outcome=done status=200 events=2" in daemon.wait_log("stream id=r1")


def test_the_request_carries_what_the_application_asked_for(setup: Setup) -> None:
    daemon = setup(good)
    messages = [
        {"role": "system", "content": "Be ✂ brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ]
    data = {"messages": messages, "model": "m-2", "max_tokens": 5, "temperature": 0.25, "user": "alice"}
    assert daemon.ask(data).complete
    [request] = setup.llm.requests
    assert request.line == "POST /v1/chat/completions HTTP/1.1"
    assert request.headers["host"] == f"127.0.0.1:{setup.llm.port}"
    assert request.headers["accept"] == "text/event-stream"
    assert request.headers["content-type"] == "application/json"
    assert "authorization" not in request.headers
    assert request.json == {
        "model": "m-2",
        "messages": messages,
        "stream": True,
        "max_tokens": 5,
        "temperature": 0.25,
        **STREAMED,
    }


def test_a_prompt_is_sent_as_a_message_to_the_configured_model(setup: Setup) -> None:
    assert setup(good).ask(PROMPT).complete
    sent = setup.llm.requests[0].json
    assert sent == {
        "model": "m-1",
        "messages": [{"role": "user", "content": PROMPT["prompt"]}],
        "stream": True,
        **STREAMED,
    }


def test_the_key_comes_from_the_credential_and_goes_nowhere_else(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "k").write_text(KEY + "\n")
    refusal = error(401, "invalid_api_key", message=f"Incorrect API key provided: {KEY}")
    daemon = setup(
        lambda request: request.send(refusal),
        'api_key_credential = "k"',
        environ={"CREDENTIALS_DIRECTORY": str(tmp_path)},
    )
    response = daemon.ask(PROMPT)
    assert_error(response, 502, "backend_error")
    assert setup.llm.requests[0].headers["authorization"] == f"Bearer {KEY}"
    daemon.wait_log("backend=llm: status 401 invalid_api_key")
    daemon.wait_log("stream id=r1 .*outcome=backend_error status=502")
    for text in (response.raw.decode(), daemon.log()):
        assert KEY not in text
        assert "secret question" not in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("two words\n", "one line of printable"),
        ("", "one line of printable"),
        ("ké", "not ASCII"),
    ],
)
def test_an_unusable_key_keeps_the_daemon_from_starting(
    make_daemon: MakeDaemon, tmp_path: Path, content: str | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / "k").write_text(content)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    daemon = make_daemon(config("http://127.0.0.1:1", 'api_key_credential = "k"'), environ=environ).start(wait=False)
    assert daemon.wait() == 1
    assert "cannot start: credential k in " in daemon.log()
    assert problem in daemon.log()
    assert not content or content.strip() not in daemon.log()


def test_a_missing_parser_keeps_the_daemon_from_starting_and_names_the_package(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    (tmp_path / "httptools.py").write_text("raise ModuleNotFoundError(name='httptools')\n")
    daemon = make_daemon(config("http://127.0.0.1:1"))
    daemon.environ["PYTHONPATH"] = f"{tmp_path}:{daemon.environ['PYTHONPATH']}"
    daemon.start(wait=False)
    assert daemon.wait() == 1
    assert "needs the Python module httptools: install the package python3-httptools" in daemon.log()


def test_nothing_to_answer_is_the_applications_error(setup: Setup) -> None:
    response = setup(good).ask(b"\0")
    assert_error(response, 400, "invalid_request")
    assert response.json["error"]["message"].startswith("prompt is missing")
    assert setup.llm.requests == []


@pytest.mark.parametrize(
    ("upstream", "status", "kind", "retry_after"),
    [
        (error(429, "rate_limit_exceeded", "Retry-After: 17\r\n"), 429, "backend_rate_limited", "17"),
        (error(429, "x", "Retry-After: <script>\r\n"), 429, "backend_rate_limited", None),
        (error(500, "server_error"), 502, "backend_error", None),
        (error(404, "model_not_found"), 502, "backend_error", None),
        (error(503, "overloaded", "Retry-After: 3\r\n"), 502, "backend_unavailable", "3"),
        (error(504, "timeout"), 504, "backend_timeout", None),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", 502, "backend_error", None),
        (b"HTTP/1.1 500 Oops\r\nConnection: close\r\n\r\nplain text to the end", 502, "backend_error", None),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
            502,
            "backend_protocol",
            None,
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 502, "backend_protocol", None),
        (b"", 502, "backend_aborted", None),
    ],
)
def test_a_failure_before_the_first_event_is_a_real_status(
    setup: Setup, upstream: bytes, status: int, kind: str, retry_after: str | None
) -> None:
    def script(request: Request) -> None:
        request.send(upstream)
        if b"Content-Length" not in upstream:
            request._sock.shutdown(socket.SHUT_RDWR)

    response = setup(script).ask(PROMPT)
    assert_error(response, status, kind)
    assert response.headers.get("retry-after") == retry_after
    assert f"outcome=backend_error status={status} events=0" in setup.daemon.wait_log("stream id=r1")


def test_a_refused_connection_is_a_502(make_daemon: MakeDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    daemon = make_daemon(config(f"http://127.0.0.1:{port}/v1")).start()
    assert_error(daemon.ask(PROMPT), 502, "backend_unavailable")
    assert f"cannot connect to 127.0.0.1:{port}" in daemon.wait_log("backend=llm")


def test_a_connection_that_is_never_accepted_is_a_504(make_daemon: MakeDaemon) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = fill(server)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        daemon = make_daemon(config(url, "connect_timeout = 0.3")).start()
        assert_error(daemon.ask(PROMPT), 504, "backend_timeout")
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("head", [b"", SSE_HEAD, b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_silence_before_the_first_event_is_a_504(setup: Setup, head: bytes) -> None:
    def script(request: Request) -> None:
        request.send(head)
        request.wait_closed()

    response = setup(script, "first_event_timeout = 0.3").ask(PROMPT)
    assert_error(response, 504, "backend_timeout")
    wait_for(setup.llm.requests[0].closed.is_set, "the request to be given up")


def test_silence_in_mid_answer_ends_the_stream_with_an_error_event(setup: Setup) -> None:
    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.event("a")
        request.wait_closed()

    response = setup(script, "idle_timeout = 0.3").ask(PROMPT)
    assert (response.status, response.texts) == (200, ["a"])
    assert response.error["type"] == "backend_timeout"
    assert "outcome=backend_error status=200 events=1" in setup.daemon.wait_log("stream id=r1")


def test_comments_are_no_events_and_do_not_put_off_the_end_of_a_silent_answer(setup: Setup) -> None:
    said_all = threading.Event()

    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.event("a")
        with contextlib.suppress(OSError):
            for _ in range(200):
                request.chunk(b": still here\n\n")
                time.sleep(0.05)  # the pace of this server
            said_all.set()

    response = setup(script, "idle_timeout = 0.5").ask(PROMPT)
    assert response.error["type"] == "backend_timeout"
    assert not said_all.is_set()


def test_members_that_a_backend_is_not_sent_are_named_once(setup: Setup) -> None:
    daemon = setup(good, 'extra = ["logprobs"]')
    for _ in range(2):
        assert daemon.ask({**PROMPT, "logprobs": True, "n": 2, "top_logprobs": 3, "bad name\n": 1}).complete
    assert setup.llm.requests[0].json["logprobs"] is True
    told = re.findall("backend llm is not sent member (.*) of the handoff data", daemon.log())
    assert sorted(told) == ["n", "top_logprobs"]


def test_a_long_wait_for_the_first_event_is_filled_with_comments(setup: Setup) -> None:
    pinged = threading.Event()

    def script(request: Request) -> None:
        pinged.wait(TIMEOUT)
        good(request)

    client = setup(script, server="[server]\nhead_after = 0.1\nheartbeat = 0.1").hand(PROMPT)
    client.read_until(b": ping\n\n: ping\n\n")
    pinged.set()
    response = client.finish()
    assert response.complete
    assert response.body.startswith(b": ping\n\n: ping\n\n")
    assert response.texts == ["Hel", "lo"]


@pytest.mark.parametrize("reset", [False, True])
def test_an_answer_that_is_broken_off_ends_with_an_error_event_and_without_done(setup: Setup, reset: bool) -> None:
    relayed = threading.Event()

    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.event("a")
        request.event("b")
        relayed.wait(TIMEOUT)
        if reset:
            request.reset()
        else:
            request._sock.shutdown(socket.SHUT_RDWR)

    client = setup(script).hand(PROMPT)
    client.read_until(b'"b"')
    relayed.set()
    response = client.finish()
    assert response.texts == ["a", "b"]
    assert response.error["type"] == "backend_aborted"
    assert b"[DONE]" not in response.raw


def test_an_answer_that_was_finished_needs_no_done(setup: Setup) -> None:
    def script(request: Request) -> None:
        request.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        request.send(event("all") + b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n')
        request._sock.shutdown(socket.SHUT_RDWR)

    response = setup(script).ask(PROMPT)
    assert response.complete
    assert response.texts == ["all"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"error":{"message":"x","code":"boom"}}', "backend_error"),
        (b"{not json", "backend_protocol"),
        (b"[1]", "backend_protocol"),
        (b"x" * (2 << 20), "backend_protocol"),
    ],
)
def test_an_error_in_the_stream_is_an_error_for_the_client(setup: Setup, first: bool, data: bytes, kind: str) -> None:
    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        if not first:
            request.event("a")
        request.chunk(b"data: " + data + b"\n\n")
        request.wait_closed()

    response = setup(script).ask(PROMPT)
    if first:
        assert_error(response, 502, kind)
    else:
        assert response.texts == ["a"]
        assert response.error["type"] == kind


def test_an_answer_survives_any_cut_line_ending_and_comment(setup: Setup) -> None:
    parts = ["日本", " 😀", "é\n", '"q"', ""]
    events = b": keep-alive\r\n\r\n"
    for part in parts:
        events += (
            b"data:"
            + json.dumps({"choices": [{"delta": {"content": part}}]}, ensure_ascii=False).encode()
            + b"\r\n\r\n"
        )
    events += b'data: {"choices":\ndata:  [{"delta": {"content": "two lines"}}]}\r\r'
    events += b"event: x\ndata: [DONE]\n\n"

    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        size = int(request.json["model"])
        request._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(events), size):
            request.chunk(events[start : start + size])
        request.chunk(b"")

    daemon = setup(script)
    for size in (1, 2, 3, 7, 10_000):
        response = daemon.ask({**PROMPT, "model": str(size)})
        assert response.complete
        assert response.texts == ["日本", " 😀", "é\n", '"q"', "two lines"]


def test_a_surrogate_pair_cut_in_two_reaches_the_client_as_escapes(setup: Setup) -> None:
    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.chunk(b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n')
        request.chunk(b'data: {"choices":[{"delta":{"content":"\\ude00"}}]}\n\n')
        request.end()

    response = setup(script).ask(PROMPT)
    assert response.complete
    assert [event for event in response.events if "content" in event] == [
        'data: {"content":"\\ud83d"}',
        'data: {"content":"\\ude00"}',
    ]


def test_connections_are_used_again_but_a_lost_one_is_nobodys_error(setup: Setup) -> None:
    daemon = setup(good)
    for _ in range(5):
        assert daemon.ask(PROMPT).complete
    assert setup.llm.connections == 1

    def last(request: Request) -> None:
        good(request)
        request._sock.shutdown(socket.SHUT_RDWR)

    setup.llm.script = last
    for _ in range(5):
        assert daemon.ask(PROMPT).complete
    assert setup.llm.connections >= 5


def test_a_request_on_a_kept_connection_that_dies_is_sent_again_on_a_new_one(setup: Setup) -> None:
    daemon = setup(good)
    assert daemon.ask(PROMPT).complete

    def dead(request: Request) -> None:
        setup.llm.script = good
        request.reset()

    setup.llm.script = dead
    assert daemon.ask(PROMPT).complete
    assert len(setup.llm.requests) == 3
    assert setup.llm.connections == 2


@pytest.mark.parametrize("answered", [False, True])
def test_a_client_that_hangs_up_cancels_the_request_within_a_second(setup: Setup, answered: bool) -> None:
    def script(request: Request) -> None:
        if answered:
            request.send(SSE_HEAD)
            request.event("a")
        request.wait_closed()

    daemon = setup(script)
    client = daemon.hand(PROMPT, pair=tcp_pair)
    wait_for(lambda: setup.llm.requests, "the request")
    if answered:
        client.read_until(b'"a"')
    begin = time.monotonic()
    client.close()
    wait_for(setup.llm.requests[0].closed.is_set, "the request to be given up")
    assert time.monotonic() - begin < 1
    daemon.wait_log("stream id=r1 .*outcome=client_gone")


def test_a_client_that_does_not_read_stops_the_server_from_sending(setup: Setup) -> None:
    sent = [0]
    text = "x" * 16000

    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        for _ in range(2000):
            request.event(text)
            sent[0] += 1
        request.end()

    daemon = setup(script, "idle_timeout = 0.5", "[server]\nwrite_timeout = 20")
    client = daemon.hand(PROMPT)
    client.read_until(b"xxx")
    before = -1
    begin = time.monotonic()
    # It has stopped when nothing moves for longer than idle_timeout: a paused backend is not an idle one.
    while sent[0] != before:
        before = sent[0]
        time.sleep(0.7)
        assert time.monotonic() - begin < 10
    assert sent[0] < 1000, "32 MB went somewhere"
    response = client.finish()
    assert response.complete
    assert len(response.texts) == 2000
    assert set(response.texts) == {text}


def test_https_with_a_trusted_certificate(setup: Setup, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    daemon = setup(good, tls=context, environ={"SSL_CERT_FILE": str(certificate)})
    assert [daemon.ask(PROMPT).texts for _ in range(3)] == [["Hel", "lo"]] * 3
    assert setup.llm.connections == 1


def test_https_with_an_unknown_certificate_is_refused(setup: Setup, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    daemon = setup(good, tls=context)
    assert_error(daemon.ask(PROMPT), 502, "backend_unavailable")
    daemon.wait_log("CERTIFICATE_VERIFY_FAILED")
    assert setup.llm.requests == []


def test_no_descriptor_is_left_of_requests_that_are_over(setup: Setup) -> None:
    def script(request: Request) -> None:
        kind = request.json["model"]
        if kind == "good":
            good(request)
        elif kind == "bad":
            request.send(error(500, "x"))
        else:
            request.send(SSE_HEAD)
            request.event("a")
            request.wait_closed()

    daemon = setup(script, server="[server]\nlinger_timeout = 0.1")
    [worker] = daemon.workers()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{worker}/fd"))

    assert daemon.ask({**PROMPT, "model": "good"}).complete
    before = wait_for(descriptors, "descriptors")
    for _ in range(5):
        daemon.ask({**PROMPT, "model": "bad"})
        hung = daemon.hand({**PROMPT, "model": "hang"})
        hung.read_until(b'"a"')
        hung.close()
    assert daemon.ask({**PROMPT, "model": "good"}).complete
    wait_for(lambda: descriptors() <= before, f"{before} descriptors again")
