"""What hypothesis, fuzzer and soak share: settings, strategies, and the laws of each parser as plain functions.

A law takes bytes or text and raises AssertionError where the parser broke it. The property tests ask them with made-up
structures, the fuzz targets with whatever the fuzzer finds.
"""

from __future__ import annotations

import os
import re
from itertools import pairwise

from streaming_daemon.backends.sse import Event, SSEError, SSEReader
from streaming_daemon.envelope import Parcel, unpack
from streaming_daemon.handoff import HandoffError, parse_data

# No header line, no log line and no error text may hold these as they came.
LINE_ENDS = "\r\n\0"
ENOUGH = 1 << 20


def law_of_messages(message: bytes) -> Parcel | None:
    """A message is taken apart or refused, in each form, and nothing else; what is let through cannot end a line."""
    last = None
    for form in ("auto", "envelope", "plain"):
        try:
            parcel = unpack(message, form)
        except HandoffError as error:
            assert form != "plain"
            assert error.status in (400, 413)
            assert not any(end in str(error) for end in LINE_ENDS), error
            continue
        last = parcel
        request = parcel.request
        if request is None:
            assert parcel.data == message
            assert form != "envelope"
        else:
            assert request.method.isascii() and request.method.isprintable() and " " not in request.method
            for name, value in (*request.headers, *request.response_headers):
                assert name.isascii() and ":" not in name and name.isprintable() and " " not in name
                assert not any(end in value for end in LINE_ENDS)
            assert 0 <= request.client.port <= 65535
            assert parcel.payload is None or (parcel.payload >= 0 and parcel.data == "")
        law_of_data(parcel.data)
    return last


def law_of_data(data: bytes | str) -> None:
    """The application's data is understood or refused, and nothing else."""
    try:
        handoff = parse_data(data)
    except HandoffError as error:
        assert not any(end in str(error) for end in LINE_ENDS), error
        return
    assert handoff.max_tokens is None or handoff.max_tokens >= 1
    assert isinstance(handoff.question(), str)
    for message in handoff.messages:
        assert isinstance(message["role"], str)


def law_of_streams(data: bytes, cuts: list[int], *, raw: bool = False) -> list[Event]:
    """However a stream is cut into portions, its events are those that the standard says."""
    whole = read(data, [], raw=raw)
    assert read(data, cuts, raw=raw) == whole, cuts
    assert [event[:2] for event in whole] == by_the_standard(data)
    for event in whole:
        assert "\n" not in event.name and "\r" not in event.name + event.data
        if raw:
            # What is passed on says the same again.
            assert [each[:2] for each in read(event.raw, [])] == [event[:2]]
    return whole


def law_of_bounds(data: bytes, cuts: list[int], most: int) -> None:
    """A reader never keeps more than ``most`` bytes and one portion, and says so."""
    reader = SSEReader(most, raw=True)
    try:
        for portion in portions(data, cuts):
            reader.feed(portion)
            assert len(reader._tail or b"") + reader._size <= most
    except SSEError:
        assert len(data) > most


def read(data: bytes, cuts: list[int], *, raw: bool = False) -> list[Event]:
    reader = SSEReader(ENOUGH, raw=raw)
    events: list[Event] = []
    for portion in portions(data, cuts):
        events += reader.feed(portion)
    return events


def portions(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data`` cut at these places, taken modulo its length."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[first:last] for first, last in pairwise(places)]


def by_the_standard(data: bytes) -> list[tuple[str, str]]:
    """WHATWG HTML 9.2.6, the slow and obvious way; and llama.cpp's ``error:``, as in ``sse``."""
    events: list[tuple[str, str]] = []
    name = b""
    lines: list[bytes] = []
    *complete, _ = re.split(rb"\r\n|\r|\n", data)
    for number, original in enumerate(complete):
        line = original.removeprefix(b"\xef\xbb\xbf") if number == 0 else original
        if not line:
            if lines:
                events.append((name.decode("utf-8", "replace"), b"\n".join(lines).decode("utf-8", "replace")))
            name, lines = b"", []
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            lines.append(value)
        elif field == b"event":
            name = value
        elif field == b"error":
            name = b"error"
            lines.append(value)
    return events


def examples(normal: int) -> int:
    """How often to try; more where somebody has time: PROPERTY_EXAMPLES=50 is fifty times as often."""
    return normal * int(os.environ.get("PROPERTY_EXAMPLES", "1"))
