"""Responses of any HTTP server, passed on as they are."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from conftest import MakeDaemon, MakeLLM
from daemon_harness import Daemon, envelope, tcp_pair, wait_for
from llm_server import Request, Script

pytest.importorskip("httptools")

from streaming_daemon.backends.passthrough import below, end_to_end
from streaming_daemon.handoff import HandoffError

BODY = bytes(range(256)) * 300


def answer(head: str, body: bytes = b"") -> Script:
    return lambda request: request.send(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)


class Upstream:
    def __init__(self, make_daemon: MakeDaemon, make_llm: MakeLLM) -> None:
        self._make_daemon = make_daemon
        self._make_llm = make_llm

    def __call__(self, script: Script, more: str = "", url: str = "") -> Daemon:
        self.server = self._make_llm(script)
        url = url or f"http://127.0.0.1:{self.server.port}/base"
        text = f'[backend]\ndefault = "u"\n[backends.u]\ntype = "http"\nurl = "{url}"\n{more}\n'
        return self._make_daemon(text).start()


@pytest.fixture
def upstream(make_daemon: MakeDaemon, make_llm: MakeLLM) -> Upstream:
    return Upstream(make_daemon, make_llm)


def test_status_headers_and_body_arrive_as_they_are(upstream: Upstream) -> None:
    head = f"HTTP/1.1 206 Partial\nContent-Type: image/x-any\nContent-Length: {len(BODY)}\nContent-Range: bytes 0-1/9"
    head += "\nX-Own: 1\nSet-Cookie: a=1\nSet-Cookie: b=2\nConnection: keep-alive, X-Hop\nX-Hop: 1\nKeep-Alive: x"
    response = upstream(answer(head, BODY)).ask({"request_id": "r1"})
    assert response.status == 206
    assert response.body == BODY
    assert not response.reset
    for name, value in {"content-type": "image/x-any", "content-range": "bytes 0-1/9", "x-own": "1"}.items():
        assert response.headers[name] == value
    assert response.headers["content-length"] == str(len(BODY))
    assert response.head.count("Set-Cookie: ") == 2
    assert response.headers["connection"] == "close"
    assert "x-hop" not in response.headers
    assert "keep-alive" not in response.headers


def test_bytes_of_a_header_that_are_no_utf_8_pass_as_they_are(upstream: Upstream) -> None:
    name = b'attachment; filename="caf\xe9.pdf"'
    lines = b"Content-Disposition: " + name + b"\r\nX-New: caf\xc3\xa9\r\n"
    daemon = upstream(lambda request: request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + lines + b"\r\nhi"))
    assert lines in daemon.hand({}).read_until(b"\r\n\r\nhi")


def test_what_follows_a_response_is_no_part_of_it_and_ends_the_connection(upstream: Upstream) -> None:
    second = b"HTTP/1.1 404 Not Found\r\nX-Second: 1\r\nContent-Length: 3\r\n\r\nbad"
    daemon = upstream(lambda request: request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi" + second))
    for count in (1, 2):
        response = daemon.ask({})
        assert (response.status, response.body) == (200, b"hi")
        assert "x-second" not in response.headers
        assert upstream.server.connections == count


@pytest.mark.parametrize("status", [200, 301, 404, 500, 599])
def test_every_status_is_the_upstreams_own(upstream: Upstream, status: int) -> None:
    head = f"HTTP/1.1 {status} Whatever\nLocation: /x\nContent-Length: 2"
    response = upstream(answer(head, b"no")).ask({})
    assert (response.status, response.body, response.headers["location"]) == (status, b"no", "/x")


def test_a_chunked_body_arrives_without_the_chunks(upstream: Upstream) -> None:
    def script(request: Request) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n")
        for start in range(0, len(BODY), 999):
            request.chunk(BODY[start : start + 999])
        request.send(b"0\r\nX-T: 1\r\n\r\n")

    response = upstream(script).ask({})
    assert response.body == BODY
    assert "transfer-encoding" not in response.headers


def test_a_body_may_end_with_its_connection(upstream: Upstream) -> None:
    def script(request: Request) -> None:
        request.send(b"HTTP/1.0 200 OK\r\n\r\n" + BODY)
        request._sock.shutdown(socket.SHUT_RDWR)

    response = upstream(script).ask({})
    assert response.body == BODY
    assert not response.reset


def test_a_body_that_is_cut_off_is_a_reset_and_not_a_short_file(upstream: Upstream) -> None:
    def script(request: Request) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        request.chunk(b"half")
        request._sock.shutdown(socket.SHUT_RDWR)

    daemon = upstream(script)
    response = daemon.hand({"request_id": "r1"}, pair=tcp_pair).finish()
    assert response.reset
    daemon.wait_log("stream id=r1 .*outcome=backend_error")


def test_a_response_that_never_comes_is_a_status_of_our_own(upstream: Upstream) -> None:
    response = upstream(lambda request: request.wait_closed(), "first_byte_timeout = 0.3").ask({})
    assert (response.status, response.json["error"]["type"]) == (504, "backend_timeout")


def test_the_request_is_the_configurations(upstream: Upstream) -> None:
    daemon = upstream(answer("HTTP/1.1 204 No Content"))
    assert daemon.ask({"prompt": "x", "url": "http://elsewhere/"}).status == 204
    [request] = upstream.server.requests
    assert request.line == "GET /base HTTP/1.1"
    assert set(request.headers) == {"host", "user-agent", "accept-encoding"}
    assert request.json is None


def test_a_post_brings_the_data(upstream: Upstream) -> None:
    data = {"prompt": "日本", "anything": [1, {"a": None}]}
    daemon = upstream(answer("HTTP/1.1 200 OK\nContent-Length: 0"), 'method = "POST"')
    assert daemon.ask(data).status == 200
    [request] = upstream.server.requests
    assert request.line == "POST /base HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    assert request.json == data


def test_only_listed_headers_of_the_client_go_along(upstream: Upstream) -> None:
    daemon = upstream(answer("HTTP/1.1 200 OK\nContent-Length: 0"), 'headers = ["Range", "cookie"]')
    sent = [["range", "bytes=0-1"], ["Cookie", "a=1"], ["Authorization", "Basic x"], ["Host", "evil"]]
    assert daemon.ask(envelope({}, headers=sent)).status == 200
    [request] = upstream.server.requests
    assert request.headers["range"] == "bytes=0-1"
    assert request.headers["cookie"] == "a=1"
    assert "authorization" not in request.headers
    assert request.headers["host"] == f"127.0.0.1:{upstream.server.port}"


def test_head_is_asked_of_the_upstream(upstream: Upstream) -> None:
    response = upstream(answer("HTTP/1.1 200 OK\nContent-Length: 700\nETag: x")).ask(envelope({}, method="HEAD"))
    assert upstream.server.requests[0].line == "HEAD /base HTTP/1.1"
    assert (response.status, response.headers["etag"], response.headers["content-length"]) == (200, "x", "700")
    assert response.body == b""


def test_connections_are_used_again(upstream: Upstream) -> None:
    daemon = upstream(answer("HTTP/1.1 200 OK\nContent-Length: 2", b"ok"))
    for _ in range(5):
        assert daemon.ask({}).body == b"ok"
    assert upstream.server.connections == 1


def test_a_unix_socket_is_an_upstream_too(make_daemon: MakeDaemon, make_llm: MakeLLM, tmp_path: Path) -> None:
    path = tmp_path / "up.sock"
    server = make_llm(answer("HTTP/1.1 200 OK\nContent-Length: 2", b"ok"), path=path)
    url = f"unix:{path}:/base"
    daemon = make_daemon(f'[backend]\ndefault = "u"\n[backends.u]\ntype = "http"\nurl = "{url}"\n').start()
    assert [daemon.ask({}).body for _ in range(2)] == [b"ok", b"ok"]
    assert server.requests[0].line == "GET /base HTTP/1.1"
    assert server.requests[0].headers["host"] == "localhost"
    assert server.connections == 1


def test_a_client_that_hangs_up_cancels_the_request(upstream: Upstream) -> None:
    def script(request: Request) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        request.chunk(b"begin")
        request.wait_closed()

    client = upstream(script).hand({}, pair=tcp_pair)
    client.read_until(b"begin")
    client.close()
    wait_for(upstream.server.requests[0].closed.is_set, "the request to be given up")


def test_a_path_below_the_prefix_may_be_chosen_and_no_other(upstream: Upstream) -> None:
    daemon = upstream(answer("HTTP/1.1 200 OK\nContent-Length: 0"), 'path_prefix = "/files/"')
    assert daemon.ask({"path": "/files/a%20b.pdf?x=1"}).status == 200
    assert upstream.server.requests[0].line == "GET /base/files/a%20b.pdf?x=1 HTTP/1.1"
    response = daemon.ask({"path": "/files/../etc"})
    assert response.status == 400
    assert response.json["error"]["message"].startswith("path is a string of another form, allowed is a path below")
    assert len(upstream.server.requests) == 1


GOOD = ["/f/", "/f/a", "/f/a/b.c", "/f/a?b=/../c", "/f/%41", "/f/a/", "/f/...", "/f/~x;v=1"]
BAD = [
    "",
    "/",
    "/f",
    "/g/a",
    "/f/../g",
    "/f/./a",
    "/f/..",
    "/f/%2e%2e/g",
    "/f/%2E./g",
    "/f/a%2fb",
    "/f/a%5cb",
    "/f/a\\b",
    "/f//a",
    "/f/a b",
    "/f/a\r\nX: y",
    "/f/a?b\r\nX: y",
    "/f/é",
    "/f/%",
    "/f/%4",
    "/f/%00",
    "/f/..;/a",
    "/f/.;x=1/a",
    "/f/%252e%252e/a",
    "/f/%25252f",
    "/f/a#b",
    "//f/a",
    "http://h/f/a",
    7,
    ["/f/"],
]


@pytest.mark.parametrize("path", GOOD)
def test_a_good_path(path: str) -> None:
    assert below(path, "/f/") == path


@pytest.mark.parametrize("path", BAD, ids=json.dumps)
def test_a_bad_path(path: object) -> None:
    with pytest.raises(HandoffError):
        below(path, "/f/")


def test_without_a_prefix_there_is_no_path_to_choose() -> None:
    assert below(None, None) is None
    with pytest.raises(HandoffError, match="path is there"):
        below("/", None)


def test_a_header_that_could_end_its_line_is_left_out() -> None:
    assert list(end_to_end([(b"A", b"b\x00c"), (b"B", b"x\ry"), (b"C", b"ok")])) == [("C", "ok")]


def test_headers_between_two_hops_are_left_out_whoever_names_them() -> None:
    hop = [
        (b"Connection", b"close, X-Mine"),
        (b"x-mine", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"TE", b"trailers"),
    ]
    assert list(end_to_end([*hop, (b"Upgrade", b"h2c"), (b"X-Yours", b"1")])) == [("X-Yours", "1")]
