"""The laws of parsers and writers, over what hypothesis makes up. Bounded: the same hundred cases in every run."""

from __future__ import annotations

import json
import math
import re
import tomllib
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="python3 -m pip install hypothesis, as pinned in script/requirements-test.txt")

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from daemon_harness import envelope, unchunk
from properties import examples, law_of_bounds, law_of_data, law_of_messages, law_of_streams, read
from streaming_daemon import http_response as http
from streaming_daemon.access_log import StreamRecord, Visit, format_combined, format_json, format_pairs, quote
from streaming_daemon.config import Config, loads
from streaming_daemon.envelope import unpack
from streaming_daemon.handoff import HandoffError, parse_data
from streaming_daemon.toml_lines import lines_of
from streaming_daemon.toml_table import ConfigError, Key

# The same cases in every run, and no clock: a busy machine is no failure.
bounded = settings(
    max_examples=examples(100),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

TOKEN = st.from_regex(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,12}", fullmatch=True)
FRAMING = st.sampled_from(
    ["Transfer-Encoding", "content-length", "CONNECTION", "Content-Type", "X-Accel-Buffering", "Set-Cookie", "Date"]
)
NAMES = TOKEN | FRAMING
# Everything that Python calls a line end, and what else is nasty, more often than it would come by itself.
NASTY = st.sampled_from(list('\r\n\0\x0b\x0c\x1c\x85\u2028\u2029 \t"\\,;:=<>\x7f\xff€👋\ud83d\udc4b\ufeff'))
TEXT = st.text(st.characters() | NASTY, max_size=40)
ONE_LINE = TEXT.filter(lambda text: not set(text) & set("\r\n\0"))
HEADERS = st.lists(st.tuples(NAMES, ONE_LINE), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
CUTS = st.lists(st.integers(0, 10_000), max_size=8)


# --- messages -----------------------------------------------------------------------------------

MEMBERS = [*sorted(json.loads(envelope())), "payload", "memfd", "length"]


@bounded
@given(st.binary(max_size=200))
@example(b'{"handoff":2}')
@example(b'{"handoff": 9999999999999999999999}')
@example(b"\0")
def test_any_bytes_are_a_message_or_refused(message: bytes) -> None:
    law_of_messages(message)


@bounded
@given(st.dictionaries(st.sampled_from(MEMBERS), JSON, min_size=1, max_size=3))
def test_an_envelope_with_members_of_any_kind_is_understood_or_refused(changes: dict[str, Any]) -> None:
    law_of_messages(json.dumps({**json.loads(envelope()), **changes}).encode())


@bounded
@given(st.integers(0, 600), st.binary(min_size=1, max_size=3))
def test_an_envelope_with_bytes_overwritten_is_understood_or_refused(at: int, junk: bytes) -> None:
    message = envelope({"prompt": "x"}, headers=[["accept", "*/*"]])
    at %= len(message)
    law_of_messages(message[:at] + junk + message[at + len(junk) :])


@bounded
@given(
    id=ONE_LINE,
    method=TOKEN,
    uri=TEXT,
    headers=HEADERS,
    response_headers=HEADERS,
    status=st.integers(100, 999),
    port=st.integers(0, 65535),
    data=st.none() | TEXT,
    user=TEXT,
)
def test_what_an_envelope_says_is_what_is_understood(port: int, data: str | None, **members: Any) -> None:
    client = {"addr": "2001:db8::1", "port": port}
    # As ASCII: a half of a surrogate pair has no other form.
    message = json.dumps({**json.loads(envelope(data)), **members, "client": client}).encode()
    parcel = unpack(message, "envelope")
    assert parcel.request is not None
    assert parcel.request.client.port == port
    assert parcel.data == (data or "")
    for name, value in members.items():
        got = getattr(parcel.request, name)
        assert got == (tuple(tuple(pair) for pair in value) if isinstance(value, list) else value)


@bounded
@given(st.lists(st.tuples(NAMES, TEXT), min_size=1, max_size=3))
def test_a_header_of_more_than_one_line_never_gets_in(pairs: list[tuple[str, str]]) -> None:
    assume(any(set(value) & set("\r\n\0") for _, value in pairs))
    for where in ("headers", "response_headers"):
        message = json.dumps({**json.loads(envelope()), where: pairs}).encode()
        with pytest.raises(HandoffError, match=where):
            unpack(message)


# --- the application's data ---------------------------------------------------------------------

DATA_MEMBERS = st.sampled_from(
    (
        *("prompt", "messages", "model", "max_tokens", "temperature", "user", "user_id", "request_id", "demo"),
        *("resume", "backend", "tokens", "tokens_per_second", "id", "after", "role", "content"),
    )
)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(DATA_MEMBERS | TEXT, inner, max_size=4),
    max_leaves=12,
)


@bounded
@given(DATA | st.dictionaries(DATA_MEMBERS, DATA, max_size=4))
def test_any_json_is_data_or_refused(value: Any) -> None:
    law_of_data(json.dumps(value))
    law_of_data(json.dumps(value).encode())


@bounded
@given(DATA_MEMBERS, st.sampled_from([str, lambda s: [s], lambda s: {s: s}, lambda s: [{"role": s, s: s}]]))
def test_an_error_about_data_never_quotes_it(member: str, wrap: Any) -> None:
    secret = "s3cr3t-s3cr3t-s3cr3t"
    try:
        parse_data(json.dumps({member: wrap(secret)}))
    except HandoffError as error:
        assert secret not in str(error)


# --- configuration ------------------------------------------------------------------------------


def every_key() -> list[Key]:
    """What the reference lists, found the same way."""
    seen: list[Key] = []
    types = "".join(f'[backends.{kind}]\ntype = "{kind}"\n' for kind in ("demo", "openai", "anthropic", "exec", "http"))
    with pytest.raises(ConfigError):
        loads(f'[backend]\ndefault = "demo"\n[[routes]]\n{types}', "x", seen)
    return seen


KEYS = every_key()
TOML_VALUE = st.recursive(
    st.booleans()
    | st.integers(-(10**20), 10**20).filter(lambda number: abs(number) < 2**63)
    | st.floats()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
    | st.sampled_from(["sk-x", "unix:/run/x.sock:/v1", "https://[", "http://h:99999", "/", "..", "a-*", "127.0.0.1:1"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def toml(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    # A JSON string is a TOML basic string, if it has no DEL in it.
    return json.dumps(value, ensure_ascii=False).replace("Infinity", "inf").replace("\x7f", "\\u007f")


@st.composite
def files(draw: st.DrawFn) -> str:
    """A file of known keys with values of any kind."""
    text = ""
    tables: dict[tuple[str, ...], list[str]] = {}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique_by=lambda key: key.path)):
        *table, name = key.path
        tables.setdefault(tuple(table), []).append(f"{name} = {toml(draw(TOML_VALUE))}")
    for path, lines in tables.items():
        if path and path[-1] == "*":
            text += f"[[{path[0]}]]\n"
        elif path:
            text += f"[{'.'.join(path)}]\n"
        text = text + "\n".join(lines) + "\n" if path else "\n".join(lines) + "\n" + text
    return text


@bounded
@given(files())
def test_any_values_of_known_keys_are_a_configuration_or_errors_with_their_lines(text: str) -> None:
    tomllib.loads(text)
    try:
        assert isinstance(loads(text, "FILE"), Config)
    except ConfigError as error:
        assert error.errors
        for sentence in error.errors:
            assert sentence.startswith("FILE:") and "\n" not in sentence
            number = re.match(r"FILE:(\d+):", sentence)
            assert number is None or int(number[1]) <= text.count("\n") + 1


@bounded
@given(st.text(max_size=80) | st.text(alphabet="[]\"'=.#\n ab1{},\\", max_size=40))
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    try:
        loads(text, "FILE")
    except ConfigError as error:
        assert error.errors


@bounded
@given(st.text(alphabet="[]\"'=.#\n ab1{},\\", max_size=60))
def test_lines_are_found_in_whatever_tomllib_reads(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assume(False)
    lines = lines_of(text)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
    assert set(data) == {path[0] for path in lines}


# --- server-sent events, read -------------------------------------------------------------------

LINE = st.one_of(
    st.sampled_from(
        [b"data", b"data:", b"data: ", b"event", b"event:x", b"error: e", b"id: 1", b": c", b"", b"retry:"]
    ),
    st.binary(max_size=12),
    st.binary(max_size=12).map(lambda value: b"data: " + value),
    TEXT.map(lambda value: b"data:" + value.encode("utf-8", "surrogatepass")),
)
STREAM = st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\r\r", b"\r\n\r\n"])), max_size=12)


@bounded
@given(STREAM, CUTS, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_events_do_not_depend_on_how_they_are_cut_and_are_the_standards(
    lines: list[tuple[bytes, bytes]], cuts: list[int], raw: bool, bom: bytes
) -> None:
    law_of_streams(bom + b"".join(line + end for line, end in lines), cuts, raw=raw)


@bounded
@given(st.binary(max_size=200), CUTS)
@example(b"data: \xf0\x9f\x91\x8b\r", [8])
def test_any_bytes_are_a_stream(data: bytes, cuts: list[int]) -> None:
    law_of_streams(data, cuts)
    law_of_bounds(data, cuts, 16)


@bounded
@given(STREAM, CUTS, st.integers(1, 40))
def test_no_stream_makes_its_reader_keep_more_than_it_may(
    lines: list[tuple[bytes, bytes]], cuts: list[int], most: int
) -> None:
    law_of_bounds(b"".join(line + end for line, end in lines), cuts, most)


# --- what goes to the client --------------------------------------------------------------------


@bounded
@given(TEXT)
def test_a_text_is_exactly_one_event_of_whole_characters(text: str) -> None:
    event = http.content_event(text)
    (got,) = read(event, [])
    assert event.endswith(b"}\n\n")
    # Strictly: a replaced character would be a lost one.
    value = json.loads(event.decode("utf-8", "strict").removeprefix("data: "))["content"]
    assert value == text or value.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")
    assert json.loads(got.data) == {"content": value}


@bounded
@given(st.text(st.characters(), max_size=40), st.integers(0, 10_000))
def test_a_text_cut_anywhere_comes_together_again(text: str, cut: int) -> None:
    at = cut % (len(text) + 1)
    halves = http.content_event(text[:at]) + http.content_event(text[at:])
    joined = "".join(json.loads(event.data)["content"] for event in read(halves, [cut]))
    assert joined.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


@bounded
@given(TEXT, TEXT)
def test_an_error_is_one_event_called_error(kind: str, message: str) -> None:
    (event,) = read(http.error_event(kind, message), [])
    assert event.name == "error"
    assert set(json.loads(event.data)["error"]) == {"type", "message"}


@bounded
@given(st.lists(st.binary(min_size=1, max_size=30), max_size=5), st.integers(0, 10_000))
def test_chunks_are_what_went_into_them_and_any_less_is_a_cut(datas: list[bytes], cut: int) -> None:
    whole = b"".join(map(http.chunk, datas)) + http.LAST_CHUNK
    assert unchunk(whole) == (b"".join(datas), False)
    if http.LAST_CHUNK not in b"".join(datas):
        body, short = unchunk(whole[: cut % len(whole)])
        assert short
        assert b"".join(datas).startswith(body)


@bounded
@given(STREAM, st.integers(1, 2**53 - 1))
def test_a_number_changes_nothing_of_an_event_but_its_id(lines: list[tuple[bytes, bytes]], number: int) -> None:
    for event in read(b"".join(line + end for line, end in lines), [], raw=True):
        numbered = http.numbered(event.raw, number)
        (again,) = read(numbered, [], raw=True)
        assert again[:2] == event[:2]
        assert re.split(rb"\r\n|\r|\n", numbered)[-3] == b"id: %d" % number


def lines_of_head(head: bytes) -> list[tuple[str, bytes]]:
    """Status line and headers as a careful client reads them."""
    assert head.endswith(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    assert re.fullmatch(rb"HTTP/1\.1 [1-9][0-9]{2} [ -~]*", first), first
    headers = []
    for line in lines:
        assert not set(line) & set(b"\r\n\0"), line
        name, colon, value = line.partition(b":")
        assert colon and re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name), line
        headers.append((name.decode().lower(), value))
    return headers


OURS = ("connection", "transfer-encoding", "content-length", "content-type", "date", "x-accel-buffering")


@bounded
@given(HEADERS, st.booleans())
def test_no_header_of_an_application_changes_how_a_stream_is_framed(own: list[tuple[str, str]], chunked: bool) -> None:
    plain = {name: value for name, value in lines_of_head(http.stream_head((), chunked=chunked)) if name != "date"}
    headers = lines_of_head(http.stream_head(own, chunked=chunked))
    for name in OURS:
        values = [value for other, value in headers if other == name]
        if name == "date":
            assert len(values) == 1
        else:
            assert values == [value for other, value in plain.items() if other == name]
    allowed = [name.lower() for name, _ in own if name.lower() not in http._NEVER]
    assert len(headers) == len(allowed) + len(plain) + 1 - (1 if "cache-control" in allowed else 0)


@bounded
@given(st.integers(200, 599), st.lists(st.tuples(NAMES | TEXT, TEXT), max_size=6), HEADERS, st.integers(-1, 10**6))
def test_no_header_of_a_backend_changes_how_its_response_is_framed(
    status: int, headers: list[tuple[str, str]], own: list[tuple[str, str]], length: int
) -> None:
    chunked = length < 0
    got = lines_of_head(http.passed_head(status, headers, own, length=length, chunked=chunked))
    framing = {
        name: value.strip() for name, value in got if name in ("connection", "transfer-encoding", "content-length")
    }
    expected = {"transfer-encoding": b"chunked"} if chunked else {"content-length": b"%d" % length}
    assert framing == {"connection": b"close", **expected}
    assert len([name for name, _ in got if name in framing]) == len(framing)


@bounded
@given(st.sampled_from([400, 413, 429, 500, 502, 503, 504]), TEXT, TEXT, HEADERS)
def test_an_error_is_one_response_of_the_length_it_says(
    status: int, kind: str, message: str, own: list[tuple[str, str]]
) -> None:
    response = http.error_response(status, kind, message, "5", own=own)
    head, _, body = response.partition(b"\r\n\r\n")
    headers = lines_of_head(head + b"\r\n\r\n")
    assert [int(value) for name, value in headers if name == "content-length"] == [len(body)]
    assert not [name for name, _ in headers if name == "transfer-encoding"]
    assert set(json.loads(body)["error"]) == {"type", "message"}


# --- logs ---------------------------------------------------------------------------------------

RECORDS = st.builds(
    StreamRecord,
    id=TEXT,
    request_id=TEXT,
    client=TEXT | st.sampled_from(["203.0.113.9:1", "[2001:db8::1]:2", "unix"]),
    user=TEXT,
    method=TEXT,
    path=TEXT,
    backend=TEXT,
    outcome=st.sampled_from(["done", "client_gone"]),
    status=st.integers(0, 599),
    events=st.integers(0, 2**63),
    bytes=st.integers(0, 2**63),
    first_event=st.none() | st.floats(0, 1e6),
    duration=st.floats(0, 1e6),
    visit=st.builds(Visit, protocol=TEXT, referer=TEXT, agent=TEXT),
    replay=TEXT,
)
WORD = r"[!#-\[\]-~]|\\[\"\\]|\\x[0-9a-f]{2}"
COMBINED = re.compile(
    rf'(?:{WORD})+ - ((?:{WORD})+) \[\d\d/[A-Z][a-z]{{2}}/\d{{4}}:\d\d:\d\d:\d\d [+-]\d{{4}}\] "(?:{WORD}| )*" '
    rf'(?:\d{{3}}|\d{{1,2}}|-) (?:\d+|-) "((?:{WORD}| )*)" "((?:{WORD}| )*)"'
)
PAIR = r'[a-z_]+=(?:"(?:[ !#-\[\]-~]|\\.)*"|[!#-~][^\s"]*|-)'


def unescaped(text: str) -> str:
    return re.sub(
        rb"\\(?:x([0-9a-f]{2})|(.))", lambda m: bytes([int(m[1], 16)]) if m[1] else m[2], text.encode()
    ).decode()


@bounded
@given(RECORDS)
def test_nobody_can_forge_a_line_or_a_field_of_the_access_log(record: StreamRecord) -> None:
    combined = format_combined(record)
    fields = COMBINED.fullmatch(combined)
    assert fields, combined
    for text, value in zip(fields.groups(), (record.user, record.visit.referer, record.visit.agent), strict=True):
        assert unescaped(text) == (value.encode("utf-8", "replace").decode() or "-")
    pairs = format_pairs(record)
    assert re.fullmatch(rf"{PAIR}(?: {PAIR})*", pairs), pairs
    line = format_json(record)
    assert line.isascii() and "\n" not in line and "\r" not in line
    assert json.loads(line).get("user", "") == record.user


@bounded
@given(st.text(st.characters() | NASTY, max_size=200))
def test_a_quoted_value_is_one_word_and_can_be_read_back(value: str) -> None:
    word = quote(value)
    assert word.isascii() and word.isprintable()
    if word.startswith('"'):
        assert json.loads(word) == value[:128]
    else:
        assert word == (value or "-")
