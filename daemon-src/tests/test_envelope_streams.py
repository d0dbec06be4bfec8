"""Clients handed over by envelope to a real daemon: what they get, what is logged, and that nothing leaks."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest

from conftest import MakeDaemon
from daemon_harness import KINDS, Client, Daemon, envelope, sealed_memfd, send_message, shaped, socket_pair, wait_for
from test_streams import HEAD, fields

ACK, NAK = b"\x06", b"\x15"


def payload(length: int, **changes: object) -> bytes:
    return envelope(None, payload={"memfd": True, "length": length}, **changes)


def ask_with_payload(daemon: Daemon, data: bytes, **changes: object) -> Any:
    fd = sealed_memfd(data)
    try:
        return daemon.ask(payload(len(data), **changes), fds=[fd])
    finally:
        os.close(fd)


CHUNKED_HEAD = [*HEAD[:-1], "Transfer-Encoding: chunked", HEAD[-1]]


def lines(head: str) -> list[str]:
    return [line for line in head.split("\r\n") if not line.startswith("Date: ")]


def test_both_messages_are_understood_on_one_socket(either: Daemon) -> None:
    for message in (envelope(shaped(3)), shaped(3), envelope(shaped(3)), b"[]"):
        response = either.ask(message)
        assert response.status == 400 if message == b"[]" else response.complete


def test_the_journal_names_the_true_client_and_what_was_asked_but_no_query(either: Daemon) -> None:
    name = f"env-{either.kind}"
    assert either.ask(envelope(shaped(3, request_id="r-7", prompt="s3cr3t"), id=name, user="ad a")).complete
    line = fields(either.wait_log(f"stream id={name} "))
    assert (line["client"], line["method"], line["path"]) == ("203.0.113.9:40001", "GET", "/stream.php")
    assert (line["request_id"], line["user"], line["outcome"]) == ("r-7", '"ad a"', "done")
    assert "s3cr3t" not in either.log()


def test_the_applications_user_wins_over_apaches(demo: Daemon) -> None:
    demo.ask(envelope(shaped(1, user="ada"), id="two-users", user="apache"))
    assert fields(demo.wait_log("stream id=two-users "))["user"] == "ada"


@pytest.mark.parametrize("data", [None, "", "\0", "{}"])
def test_an_envelope_without_data_is_answered(demo: Daemon, data: str | None) -> None:
    client = demo.hand(envelope(data))
    client.read_until(b"Hello")
    client.close()


@pytest.mark.parametrize("size", [10, 60_000, 100_000, 1_000_000])
def test_a_prompt_in_a_payload_arrives_whole(either: Daemon, size: int) -> None:
    question = "where? " + "x" * size
    data = json.dumps(shaped(5, prompt=question, user="ada")).encode()
    assert ask_with_payload(either, data, id=f"size-{size}").complete
    either.wait_log(f"stream id=size-{size} .*user=ada .*outcome=done")


def test_a_payload_of_another_form_is_told_to_the_client(demo: Daemon) -> None:
    assert ask_with_payload(demo, b"\xff").json["error"]["message"].startswith("the handoff data is not valid UTF-8")
    assert ask_with_payload(demo, b'{"prompt":7}').json["error"]["message"].startswith("prompt is a number")


def test_a_payload_that_is_too_large_is_413(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[listen]\nmax_payload = 100").start()
    assert ask_with_payload(daemon, b"{}" + b" " * 98).status == 200
    response = ask_with_payload(daemon, b"{}" + b" " * 99)
    assert (response.status, response.json["error"]["type"]) == (413, "invalid_request")


OWN = [
    ["Set-Cookie", "a=1; Path=/"],
    ["Set-Cookie", "b=2"],
    ["Access-Control-Allow-Origin", "https://chat.example"],
    ["X-Text", "ä"],
]
NOT_THEIRS = [
    *(["Content-Length", "3"], ["Transfer-Encoding", "chunked"], ["Connection", "keep-alive"], ["Trailer", "X"]),
    *(["content-type", "text/html"], ["Content-Encoding", "gzip"], ["Date", "today"], ["UPGRADE", "h2c"]),
    *(["X-Accel-Buffering", "yes"], ["X-Socket-Handoff", "llm"], ["X-Handoff-Data", "{}"], ["ETag", '"1"']),
    *(["X-Handoff-Data-From", "response-body"], ["Keep-Alive", "timeout=5"], ["TE", "trailers"]),
]


def test_the_applications_headers_reach_the_client_and_do_not_touch_the_framing(either: Daemon) -> None:
    raw = either.ask(envelope(shaped(2), response_headers=[*OWN, *NOT_THEIRS])).raw
    head, _, body = raw.partition(b"\r\n\r\n")
    assert lines(head.decode()) == [*CHUNKED_HEAD, *(f"{name}: {value}" for name, value in OWN)]
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_the_applications_cache_control_replaces_ours(demo: Daemon) -> None:
    head = demo.ask(envelope(shaped(1), response_headers=[["cache-control", "no-store"]])).head
    assert [line for line in lines(head) if "cache" in line.lower()] == ["cache-control: no-store"]


def test_an_error_keeps_cookies_and_origins_but_not_the_wish_to_be_cached(demo: Daemon) -> None:
    cached = [["Cache-Control", "public"], ["Expires", "never"], ["Pragma", "x"], ["Retry-After", "9"]]
    response = demo.ask(envelope("[]", response_headers=[*OWN[:3], *NOT_THEIRS, *cached]))
    assert lines(response.head) == [
        "HTTP/1.1 400 Bad Request",
        "Content-Type: application/json; charset=utf-8",
        f"Content-Length: {len(response.body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(f"{name}: {value}" for name, value in OWN[:3]),
    ]


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b"])
def test_a_header_of_two_lines_is_refused_and_sends_nothing_of_itself(demo: Daemon, value: str) -> None:
    response = demo.ask(envelope(shaped(1), response_headers=[["X-Good", "g"], ["X-Bad", value]]))
    assert response.status == 400
    assert "X-Good" not in response.head
    assert b"X-Evil" not in response.raw


def test_head_is_the_head_of_a_stream_and_asks_no_backend(either: Daemon) -> None:
    message = envelope(shaped(5), method="HEAD", id=f"head-{either.kind}", response_headers=OWN[:1])
    response = either.ask(message)
    assert lines(response.head) == [*CHUNKED_HEAD, "Set-Cookie: a=1; Path=/"]
    assert response.body == b""
    line = fields(either.wait_log(f"stream id=head-{either.kind} "))
    assert (line["method"], line["outcome"], line["status"], line["events"]) == ("HEAD", "done", "200", "0")


def test_head_with_bad_data_is_the_head_of_the_error(demo: Daemon) -> None:
    response = demo.ask(envelope("[]", method="HEAD"))
    assert (response.status, response.body) == (400, b"")
    assert int(response.headers["content-length"]) > 0


def test_http_1_0_is_answered_without_chunks(demo: Daemon) -> None:
    response = demo.ask(envelope(shaped(3), protocol="HTTP/1.0"))
    assert "transfer-encoding" not in response.headers
    assert response.complete


def test_where_only_one_kind_of_message_may_come_the_other_is_refused(make_daemon: MakeDaemon) -> None:
    strict = make_daemon('[listen]\nmessage = "envelope"').start()
    assert strict.ask(envelope(shaped(1))).complete
    assert strict.ask(shaped(1)).json["error"]["message"].startswith("handoff is missing")
    old = make_daemon('[listen]\nmessage = "plain"').start()
    assert old.ask(shaped(1)).complete
    client = old.hand(envelope(shaped(1)))  # to the application's data these members mean nothing
    client.read_until(b"Hello")
    client.close()


BAD: dict[str, tuple[bytes, int]] = {
    "another version": (envelope(shaped(1), handoff=3), 0),
    "cut off": (envelope(shaped(1))[:-9], 0),
    "a member missing": (b'{"handoff":2,"id":"1"}', 0),
    "an injected header": (envelope(shaped(1), response_headers=[["A", "b\r\nc"]]), 0),
    "a payload nobody announced": (envelope(shaped(1)), 1),
    "an announced payload that did not come": (payload(5), 0),
    "a payload of another length": (payload(6), 1),
    "a payload above the maximum": (payload(1 << 40), 1),
    "two payloads": (payload(5), 2),
    "data that is no object": (envelope("[]"), 0),
    "plain, with two descriptors too many": (b"[]", 2),
}


def test_bad_messages_leak_no_descriptor(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nlinger_timeout = 0.2").start()
    [worker] = daemon.workers()

    def open_files() -> int:
        return len(os.listdir(f"/proc/{worker}/fd"))

    assert daemon.ask(envelope(shaped(1))).complete
    # The first client may still be lingering, and then is one of these; a leak would be hundreds.
    before = open_files()
    good = sealed_memfd(b"hello")
    open_one = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.write(open_one, b"hello")
    reader, writer = os.pipe()
    try:
        for _ in range(100):
            for name, (message, count) in BAD.items():
                response = daemon.ask(message, fds=[good] * count)
                assert response.status in (400, 413), (name, response.raw)
            for fd in (open_one, reader):
                assert daemon.ask(payload(5), fds=[fd]).status == 400
            send_message(daemon.socket, daemon.kind, payload(5), [])
            # A client that is no connected socket must not keep its payload either.
            send_message(daemon.socket, daemon.kind, payload(5), [reader, good])
        assert ask_with_payload(daemon, json.dumps(shaped(2)).encode()).complete
        wait_for(lambda: open_files() <= before, f"no more than {before} descriptors")
    finally:
        for fd in (good, open_one, reader, writer):
            os.close(fd)
    assert "Traceback" not in daemon.log()


# ack ------------------------------------------------------------------------------------------------------------------


def greeted_handoff(daemon: Daemon, message: bytes) -> tuple[bytes, Client]:
    """What the module does for a target with ack=on; gives the message whatever the answer is."""
    ours, theirs = socket_pair()
    with theirs, socket.socket(socket.AF_UNIX, KINDS[daemon.kind]) as peer:
        peer.settimeout(5)
        peer.connect(str(daemon.socket))
        answer = peer.recv(1)
        if answer == ACK:
            socket.send_fds(peer, [message], [theirs.fileno()])
    return answer, Client(ours)


@pytest.mark.parametrize("kind", ["seqpacket", "stream"])
def test_with_ack_a_peer_is_greeted_before_it_sends(make_daemon: MakeDaemon, kind: str) -> None:
    daemon = make_daemon("[listen]\nack = true", kind=kind).start()
    answer, client = greeted_handoff(daemon, envelope(shaped(3)))
    assert answer == ACK
    assert client.finish().complete


@pytest.mark.parametrize("kind", ["seqpacket", "stream"])
def test_with_ack_one_stream_too_many_is_declined_before_it_is_sent(make_daemon: MakeDaemon, kind: str) -> None:
    daemon = make_daemon("[server]\nmax_streams = 1\n[listen]\nack = true", kind=kind).start()
    answer, running = greeted_handoff(daemon, envelope(shaped(1000, 1), id="running"))
    assert answer == ACK
    running.read_until(b"Hello")
    answer, client = greeted_handoff(daemon, b"")
    assert (answer, client.finish().raw) == (NAK, b"")
    running.close()
    daemon.wait_log("id=running .*outcome=client_gone")
    answer, client = greeted_handoff(daemon, envelope(shaped(1)))
    assert answer == ACK
    assert client.finish().complete
    assert "handoff refused" not in daemon.log()


@pytest.mark.parametrize("kind", ["seqpacket", "stream"])
def test_with_ack_a_peer_that_does_not_wait_for_it_loses_nothing(make_daemon: MakeDaemon, kind: str) -> None:
    daemon = make_daemon("[server]\nmax_streams = 1\n[listen]\nack = true", kind=kind).start()
    for _ in range(50):
        assert daemon.ask(envelope(shaped(1))).complete
        assert daemon.ask(shaped(1)).complete
    running = daemon.hand(shaped(1000, 1))
    running.read_until(b"Hello")
    assert daemon.ask(shaped(1)).status == 503
    running.close()


def test_without_ack_nothing_is_sent_to_a_peer(either: Daemon) -> None:
    ours, theirs = socket_pair()
    with theirs, socket.socket(socket.AF_UNIX, KINDS[either.kind]) as peer:
        peer.connect(str(either.socket))
        socket.send_fds(peer, [envelope(shaped(1))], [theirs.fileno()])
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
    assert Client(ours).finish().complete
