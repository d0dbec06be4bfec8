"""Server-sent events, read. Pure: bytes in any portions in, events out; see the WHATWG HTML standard, section 9.2.6."""

from __future__ import annotations

from dataclasses import dataclass

_BOM = b"\xef\xbb\xbf"


class SSEError(ValueError):
    """The bytes are no event stream this reader will follow."""


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event. ``data`` has its lines joined by LF; ``name`` is empty where the stream gave none."""

    name: str
    data: str


class SSEReader:
    """Cuts a byte stream into events. Lines may end in LF, CR or CRLF, and a portion may end anywhere."""

    __slots__ = ("_after_cr", "_data", "_first", "_most", "_name", "_size", "_tail")

    def __init__(self, most: int) -> None:
        self._most = most
        self._tail = bytearray()
        self._after_cr = False
        self._first = True
        self._name = b""
        self._data: list[bytes] = []
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
        self._tail += chunk
        if b"\n" not in chunk:
            self._check()
            return []
        lines = bytes(self._tail).split(b"\n")
        self._tail = bytearray(lines.pop())
        events = []
        for line in lines:
            event = self._line(line)
            if event is not None:
                events.append(event)
        self._check()
        return events

    def _line(self, line: bytes) -> Event | None:
        if self._first:
            self._first = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif name == b"event":
            self._name = value
        return None

    def _dispatch(self) -> Event | None:
        name, data = self._name, self._data
        self._name, self._data, self._size = b"", [], 0
        if not data:
            return None
        return Event(name.decode("utf-8", "replace"), b"\n".join(data).decode("utf-8", "replace"))

    def _check(self) -> None:
        if len(self._tail) + self._size > self._most:
            raise SSEError(f"an event is longer than {self._most} bytes")
