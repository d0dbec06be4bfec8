"""Server-sent events, read. Pure: bytes in any portions in, events out; see the WHATWG HTML standard, section 9.2.6.

One field more than the standard's is understood: ``error:``, with which llama.cpp reports that an answer broke off. It
counts as data of an event of that name.
"""

from __future__ import annotations

from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"


class SSEError(ValueError):
    """The bytes are no event stream this reader will follow."""


class Event(NamedTuple):
    """One dispatched event. ``data`` has its lines joined by LF; ``name`` is empty where the stream gave none. ``raw``
    are the lines as they came, each ended by LF, and the blank one behind them, for who asked for that."""

    name: str
    data: str
    raw: bytes = b""


class SSEReader:
    """Cuts a byte stream into events. Lines may end in LF, CR or CRLF, and a portion may end anywhere."""

    __slots__ = ("_after_cr", "_data", "_first", "_most", "_name", "_raw", "_size", "_tail")

    def __init__(self, most: int, *, raw: bool = False) -> None:
        self._most = most
        # The line that is not complete yet; None is the normal case, as servers send whole events.
        self._tail: bytearray | None = None
        self._after_cr = False
        self._first = True
        self._name = b""
        self._data: list[bytes] = []
        self._raw: list[bytes] | None = [] if raw else None
        self._size = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next portion; returns the events it completes. Raises SSEError for one above ``most`` bytes."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if not chunk:
            return []
        # A CR ends its line at once, as waiting for a possible LF could delay an event by a whole portion.
        self._after_cr = chunk.endswith(b"\r")
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._tail is not None:
            self._tail += chunk
            if b"\n" not in chunk:
                self._check()
                return []
            chunk = bytes(self._tail)
            self._tail = None
        lines = chunk.split(b"\n")
        tail = lines.pop()
        if tail:
            self._tail = bytearray(tail)
        events: list[Event] = []
        for line in lines:
            self._line(line, events)
        if tail or self._size:
            self._check()
        return events

    def _line(self, line: bytes, events: list[Event]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch(events)
            return
        if self._raw is not None:
            self._raw.append(line)
        name, _, value = line.partition(b":")
        self._size += len(line) + 1
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name == b"event":
            self._name = value.removeprefix(b" ")
        elif name == b"error":
            self._name = b"error"
            self._data.append(value.removeprefix(b" "))
        elif not name and self._raw is None:
            # Comments may go on for ever; nothing of them is kept.
            self._size -= len(line) + 1

    def _dispatch(self, events: list[Event]) -> None:
        data = self._data
        raw = b""
        if self._raw is not None:
            if data:
                raw = b"\n".join([*self._raw, b"", b""])
                if raw.startswith(_BOM):
                    # Passed on as the beginning of a response it would be a mark, and the line mean something else.
                    raw = b":\n" + raw
            self._raw = []
        if data:
            text = data[0] if len(data) == 1 else b"\n".join(data)
            name = self._name.decode("utf-8", "replace") if self._name else ""
            events.append(Event(name, text.decode("utf-8", "replace"), raw))
            self._data = []
        self._name = b""
        self._size = 0

    def _check(self) -> None:
        if len(self._tail or b"") + self._size > self._most:
            raise SSEError(f"an event is longer than {self._most} bytes")
