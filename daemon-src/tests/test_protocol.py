"""What needs no socket: framing, the event reader, the demo's words, the journal line."""

from __future__ import annotations

import json
import socket

import pytest

from streaming_daemon import http_response as http
from streaming_daemon.access_log import StreamRecord, format_record, quote
from streaming_daemon.backends.demo import _ANSWER, tokenize
from streaming_daemon.backends.sse import Event, SSEError, SSEReader
from streaming_daemon.session import peer_name

STREAM = (
    "\ufeffdata: first\n\n"
    ": a comment\n\n"
    "event: named\r\ndata: two\r\ndata:lines\r\n\r\n"
    "data: old\rdata: macs\r\r"
    "id: 7\nretry: 10\nignored\n\n"
    'data: {"content":"日本 😀"}\n\n'
    "data\n\n"
    "data: never dispatched"
).encode()
EVENTS = [
    Event("", "first"),
    Event("named", "two\nlines"),
    Event("", "old\nmacs"),
    Event("", '{"content":"日本 😀"}'),
    Event("", ""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_events_do_not_depend_on_how_the_bytes_were_cut(size: int) -> None:
    reader = SSEReader(1000)
    events = []
    for start in range(0, len(STREAM), size):
        events += reader.feed(STREAM[start : start + size])
    assert events == EVENTS


def test_events_do_not_depend_on_where_the_bytes_were_cut_in_two() -> None:
    for cut in range(len(STREAM)):
        reader = SSEReader(1000)
        assert reader.feed(STREAM[:cut]) + reader.feed(STREAM[cut:]) == EVENTS, cut


def test_an_event_comes_with_the_byte_that_completes_it() -> None:
    reader = SSEReader(1000)
    assert reader.feed(b"data: a\r\n\r") == [Event("", "a")]
    assert reader.feed(b"\ndata: b\r\n\r") == [Event("", "b")]


@pytest.mark.parametrize("endless", [b"data: " + b"x" * 60, b"data: 123456789\n" * 6])
def test_an_endless_event_is_an_error_not_a_growing_buffer(endless: bytes) -> None:
    reader = SSEReader(50)
    with pytest.raises(SSEError, match="longer than 50 bytes"):
        reader.feed(endless)


def test_many_short_events_in_one_portion_are_not_one_long_event() -> None:
    assert len(SSEReader(50).feed(b"data: 1234567890\n\n" * 100)) == 100


@pytest.mark.parametrize("text", ["plain", 'a "quote" \\ and\nline\r\x00', "日本語 👨‍👩‍👧 é", "\u2028", ""])
def test_a_content_event_is_one_line_of_json(text: str) -> None:
    event = http.content_event(text)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert b"\n" not in event[:-2]
    assert b"\r" not in event
    assert json.loads(event[6:].decode("utf-8")) == {"content": text}


def test_text_is_not_escaped_without_need() -> None:
    assert http.content_event("日本 😀") == 'data: {"content":"日本 😀"}\n\n'.encode()


def test_halves_of_a_surrogate_pair_survive_as_escapes() -> None:
    assert http.content_event("\ud83d") == b'data: {"content":"\\ud83d"}\n\n'


def test_an_error_response_is_complete_and_counted_in_bytes() -> None:
    raw = http.error_response(429, "rate", "später 😀", "7")
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert b"\r\nRetry-After: 7" in head
    assert f"\r\nContent-Length: {len(body)}\r\n".encode() in head
    assert json.loads(body) == {"error": {"type": "rate", "message": "später 😀"}}


def test_the_demo_is_cut_between_words_and_never_inside_a_character() -> None:
    tokens = tokenize(_ANSWER)
    assert "".join(tokens) == _ANSWER
    assert len(tokens) > 150
    for whole in (" 👨‍👩‍👧", " 🇪🇺", " 日本語", " 中文", " café", "."):
        assert whole in tokens, whole


@pytest.mark.parametrize("text", ["", "  ", "a\n\nb", "a,b;c—d", "🚀🚀 x", "ไทย नमस्ते"])
def test_tokens_joined_are_the_text(text: str) -> None:
    assert "".join(tokenize(text)) == text


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("alice", "alice"),
        ("[::1]:80", "[::1]:80"),
        ("", "-"),
        ("a b", '"a b"'),
        ("x outcome=done", '"x outcome=done"'),
        ("a\nstream id=forged", '"a\\nstream id=forged"'),
        ('"', '"\\""'),
        ("é\x1b[31m\u2028", '"\\u00e9\\u001b[31m\\u2028"'),
        ("\ud800", '"\\ud800"'),
    ],
)
def test_nothing_from_outside_can_forge_a_field_or_a_line(value: str, quoted: str) -> None:
    assert quote(value) == quoted


def test_the_line_of_a_stream() -> None:
    record = StreamRecord(
        "u1", "r1", "10.0.0.1:5", "al ice", "GET", "/a b", "demo", "client_gone", 200, 3, 456, 0.0012, 2.5
    )
    assert format_record(record) == (
        'stream id=u1 request_id=r1 client=10.0.0.1:5 user="al ice" method=GET path="/a b" backend=demo '
        "outcome=client_gone status=200 "
        "events=3 bytes=456 first_event_ms=1.2 duration_ms=2500"
    )


@pytest.mark.parametrize(
    ("listen", "connect", "expected"),
    [("127.0.0.1", "127.0.0.1", "127.0.0.1:"), ("::", "127.0.0.1", "127.0.0.1:"), ("::", "::1", "[::1]:")],
)
def test_a_client_is_named_as_apache_names_it(listen: str, connect: str, expected: str) -> None:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    server = socket.create_server((listen, 0), family=family, dualstack_ipv6=family == socket.AF_INET6)
    with server, socket.create_connection((connect, server.getsockname()[1])) as client:
        accepted, _ = server.accept()
        with accepted:
            assert peer_name(accepted.fileno()) == f"{expected}{client.getsockname()[1]}"


def test_a_byte_order_mark_in_mid_stream_is_none_where_the_event_is_passed_on_first() -> None:
    stream = b"data: a\n\n\xef\xbb\xbfdata: hidden\ndata: b\n\n"
    first, second = SSEReader(1000, raw=True).feed(stream)
    assert (first.data, second.data) == ("a", "b")
    assert [event.data for event in SSEReader(1000).feed(second.raw)] == ["b"]
