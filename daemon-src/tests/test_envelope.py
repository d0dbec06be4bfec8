"""The envelope, by the vectors that all implementations share; and the rule that tells it from a plain message."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_harness import sealed_memfd
from streaming_daemon.envelope import MAX_HEADERS, MAX_VALUES, Endpoint, Parcel, unpack
from streaming_daemon.handoff import HandoffError
from streaming_daemon.payload import PayloadTooLargeError, data_of

PATH = Path(__file__).resolve().parents[2] / "tests/vectors/envelope.json"
VECTORS: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text("utf-8"))
MOST = 8 * 1024 * 1024
ALL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def bytes_of(value: Any) -> bytes:
    """A text as the vectors write it (tests/vectors/README.md)."""
    if isinstance(value, str):
        return value.encode()
    if set(value) <= {"base64"}:
        return base64.b64decode(value["base64"])
    if "utf8" not in value:
        return json.dumps(value, ensure_ascii=False).encode()
    text = str(value["utf8"])
    for name, stuff in (("pad", "x"), ("nest", "[")):
        if name in value:
            assert text.count("%") == 1
            text = text.replace("%", stuff * value[name] + ("]" * value[name] if name == "nest" else ""))
    return text.encode()


def received(value: Any) -> Any:
    """What a receiver gets of what there was to say: a text that is not UTF-8 arrives as ISO-8859-1."""
    if isinstance(value, list):
        return [received(item) for item in value]
    if isinstance(value, dict) and set(value) & {"utf8", "base64"}:
        raw = bytes_of(value)
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode()
        return raw.decode("latin-1")
    return value


@contextlib.contextmanager
def descriptors(vector: dict[str, Any]) -> Iterator[list[int]]:
    """The descriptors behind the client's."""
    content = bytes_of(vector.get("payload", ""))
    kind = vector.get("second", "memfd")
    fds: list[int] = []
    if vector["descriptors"] > 1:
        if kind.startswith("memfd"):
            lacking = kind.removeprefix("memfd").removeprefix(" without ")
            missing = ALL_SEALS if lacking == "seals" else getattr(fcntl, lacking, 0)
            fds.append(sealed_memfd(content, ALL_SEALS & ~missing))
        elif kind == "file":
            with tempfile.TemporaryFile() as file:
                file.write(content)
                file.flush()
                fds.append(os.dup(file.fileno()))
        else:
            assert kind == "pipe"
            reader, writer = os.pipe()
            os.write(writer, content)
            os.close(writer)
            fds.append(reader)
    fds += [os.open(os.devnull, os.O_RDONLY) for _ in range(vector["descriptors"] - 2)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def named(section: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", VECTORS[section], ids=[vector["name"] for vector in VECTORS[section]])


def assert_understood(vector: dict[str, Any], form: str) -> None:
    parcel = unpack(bytes_of(vector["message"]), form)
    assert parcel.request is not None, "taken for a plain message"
    said = {name: received(value) for name, value in vector["envelope"].items() if name != "data"}
    got = parcel.request._asdict()
    got |= {name: got[name]._asdict() for name in ("client", "peer")}
    got |= {name: [list(pair) for pair in got[name]] for name in ("headers", "response_headers")}
    assert got == {"user": None, **said}
    with descriptors(vector) as fds:
        data = data_of(parcel, fds, MOST)
    expected = received(vector["envelope"]["data"]) if "payload" not in vector else bytes_of(vector["payload"])
    assert (data or b"") == (expected or b"")


@named("sent")
@pytest.mark.parametrize("form", ["auto", "envelope"])
def test_what_the_module_sends_is_understood(vector: dict[str, Any], form: str) -> None:
    assert_understood(vector, form)


@named("accepted")
def test_what_an_envelope_may_be_is_understood(vector: dict[str, Any]) -> None:
    assert_understood(vector, "envelope")


@named("refused")
def test_what_no_envelope_may_be_is_refused(vector: dict[str, Any]) -> None:
    if vector["descriptors"] == 0:
        return  # refused before anybody reads it: test_streams.test_a_message_without_descriptor_is_refused
    with descriptors(vector) as fds, pytest.raises(HandoffError) as caught:
        data_of(unpack(bytes_of(vector["message"]), "envelope"), fds, MOST)
    assert caught.value.status == 400
    assert str(caught.value).startswith(vector["field"])


GOOD: dict[str, Any] = VECTORS["sent"][0]
SMALLEST: dict[str, Any] = json.loads(bytes_of(GOOD["message"]))


def envelope(**changes: Any) -> bytes:
    return json.dumps({**SMALLEST, **changes}, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        (b"", True),
        (b"\0", True),
        (b"{}", True),
        (b'{"prompt":"a","handoff":2}', True),
        (b' {"handoff":2}', True),
        (b'{ "handoff":2}', True),
        (b'{"handoff": "2"}', True),
        (b'{"handoff":2.0}', True),
        (b'{"handoff":2e0}', True),
        (b'{"handoff":true}', True),
        (b'{"handoff":{"to":"llm"}}', True),
        (b'{"handoff":2', True),
        (b'{"handoff":2}', False),
        (b'{"handoff":2,', False),
        (b'{"handoff": 2 ,', False),
        (b'{"handoff":-1}', False),
        (b'{"handoff":3}', False),
        (b'{"handoff":2,"prompt":"a"}', False),
        (b'{"handoff":2,"handoff":"x"}', False),
    ],
)
def test_the_first_bytes_alone_tell_an_envelope_from_a_plain_message(message: bytes, plain: bool) -> None:
    if plain:
        assert unpack(message) == Parcel(None, message)
    else:
        # None of these is a good one: what begins like an envelope is never taken for an application's data.
        with pytest.raises(HandoffError):
            unpack(message)


def test_where_only_plain_messages_may_come_nothing_is_an_envelope() -> None:
    assert unpack(envelope(), "plain").request is None


@pytest.mark.parametrize("message", [b"", b"\0", b'{"prompt":"a"}', b"[]"])
def test_where_only_envelopes_may_come_nothing_else_is_accepted(message: bytes) -> None:
    with pytest.raises(HandoffError):
        unpack(message, "envelope")


@pytest.mark.parametrize("field", ["headers", "response_headers"])
@pytest.mark.parametrize(
    "pair",
    [
        *[["A", f"b{end}Set-Cookie: c"] for end in ("\r\n", "\n", "\r", "\0")],
        *[[f"A{bad}", "b"] for bad in ("\r\n", ":", " ", "\0", "é", '"')],
        ["", "b"],
    ],
)
def test_nothing_that_could_end_a_header_line_gets_past(field: str, pair: list[str]) -> None:
    with pytest.raises(HandoffError, match=rf"^{field}\[1\] is a (value|pair) "):
        unpack(envelope(**{field: [["Good", "\t one value; ü"], pair]}))


@pytest.mark.parametrize("method", ["", "GET / HTTP/1.1", "G\nET", "GET\r\n"])
def test_a_method_is_a_token(method: str) -> None:
    with pytest.raises(HandoffError, match=r"^method "):
        unpack(envelope(method=method))


@pytest.mark.parametrize("nest", [100, 900, 3_000])
def test_deep_nesting_is_an_error_not_a_crash(nest: int) -> None:
    with pytest.raises(HandoffError, match=r"^the message is nested too deeply, allowed is at most 100 arrays"):
        unpack(b'{"handoff":2,"x":' + b"[" * nest + b"]" * nest + b"}")


def test_a_version_of_thousands_of_digits_is_an_error_not_a_crash() -> None:
    with pytest.raises(HandoffError):
        unpack(b'{"handoff":' + b"9" * 100_000 + b"}")


def test_a_member_that_is_there_twice_is_refused_wherever_it_is() -> None:
    """The first would be what another one checks, the last what this one does."""
    good = envelope()
    for bad in (
        good[:-1] + b',"user":"admin","user":"eve"}',
        good.replace(b'"client":{', b'"client":{"addr":"192.0.2.1",'),
        good[:-1] + b',"new":[{"a":1,"a":1}]}',
    ):
        with pytest.raises(HandoffError, match=r"^the message is JSON that has a name twice"):
            unpack(bad)


def test_an_envelope_has_a_bounded_number_of_headers_and_values() -> None:
    for name in ("headers", "response_headers"):
        assert unpack(envelope(**{name: [["A", "x"]] * MAX_HEADERS})).request is not None
        with pytest.raises(HandoffError, match=rf"^{name} is an array of 1001, allowed is an array of at most 1000 "):
            unpack(envelope(**{name: [["A", "x"]] * (MAX_HEADERS + 1)}))
    # It, its members, two endpoints of two, two empty lists that count as two, and the one that is more.
    room = MAX_VALUES - 1 - len(json.loads(envelope())) - 4 - 2 - 1
    assert unpack(envelope(more=[0] * room)).request is not None
    with pytest.raises(HandoffError, match=r"^the message is of too many values, allowed is at most 10000"):
        unpack(envelope(more=[0] * (room + 1)))


def test_an_error_never_repeats_a_value() -> None:
    for changes in ({"id": ["s3cr3t"]}, {"response_headers": [["A", "s3cr3t\n"]]}, {"data": {"prompt": "s3cr3t"}}):
        with pytest.raises(HandoffError) as caught:
            unpack(envelope(**changes))
        assert "s3cr3t" not in str(caught.value)


def test_a_payload_beyond_the_maximum_is_not_even_read() -> None:
    parcel = unpack(envelope(data=None, payload={"memfd": True, "length": 11}))
    fd = sealed_memfd(b"x" * 11)
    try:
        assert data_of(parcel, [fd], 11) == b"x" * 11
        with pytest.raises(PayloadTooLargeError, match="11 bytes long, allowed is at most 10") as caught:
            data_of(parcel, [fd], 10)
    finally:
        os.close(fd)
    assert caught.value.status == 413


def test_a_payload_is_read_from_its_beginning_wherever_its_offset_is() -> None:
    fd = sealed_memfd(b"hello")
    try:
        os.lseek(fd, 3, os.SEEK_SET)
        parcel = unpack(envelope(data=None, payload={"memfd": True, "length": 5}))
        assert data_of(parcel, [fd], MOST) == b"hello"
        assert os.lseek(fd, 0, os.SEEK_CUR) == 3
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint("192.0.2.7", 80), "192.0.2.7:80"),
        (Endpoint("2001:db8::7", 80), "[2001:db8::7]:80"),
        (Endpoint("192.0.2.7", 0), "192.0.2.7"),
        (Endpoint("2001:db8::7", 0), "2001:db8::7"),
    ],
)
def test_an_endpoint_as_text(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text
