"""Where the log goes: stderr, and for lines that carry fields the journal itself, in its native protocol.

A line to stderr is a line and nothing more. The journal can also keep fields with it (``journalctl HANDOFF_ID=...``),
for which it has a datagram socket: one datagram per entry, ``NAME=value`` lines, values of several lines with their
length in front. Only lines with fields take that way: the journal learns from stderr's connection, once, whose lines
they are, and from a datagram only as long as its sender lives.

A journal that does not keep up must not hold up streams: an entry that would have to wait is dropped, and counted; so
is a line, because stderr is the journal's own socket and does not wait either.
See systemd.exec(5) for $JOURNAL_STREAM and systemd.io/JOURNAL_NATIVE_PROTOCOL for the datagram.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping

SOCKET = "/run/systemd/journal/socket"
_IDENTIFIER = "streaming-daemon"
# Of lines that are begun; more than one is only kept where the first was taken in part.
_MOST_WAITING = 16 * 1024
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

Fields = Mapping[str, str | int | float | None]


def is_stderr(environ: Mapping[str, str]) -> bool:
    """Whether stderr goes to the journal: a variable alone is inherited by much that writes elsewhere."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def handler(environ: Mapping[str, str], path: str = SOCKET) -> logging.Handler:
    """The handler for all that this process logs."""
    if not is_stderr(environ):
        plain = logging.StreamHandler(sys.stderr)
        plain.setFormatter(logging.Formatter())
        return plain
    lines = LineHandler(sys.stderr.fileno())
    lines.setFormatter(_PrefixFormatter())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        return lines
    return JournalHandler(sock, lines)


class _PrefixFormatter(logging.Formatter):
    """Prefixes each line with its syslog priority, which journald takes off again; see sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class LineHandler(logging.Handler):
    """Writes lines to a descriptor and never waits for its reader. What is begun is finished before anything else."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._rest = b""
        self._dropped = 0
        os.set_blocking(fd, False)

    def emit(self, record: logging.LogRecord) -> None:
        data = self._rest
        if len(data) <= _MOST_WAITING:
            if self._dropped:
                data += self._line(_confession(self._dropped, "lines"))
            data += self._line(record)
        try:
            written = os.write(self._fd, data)
        except OSError:
            written = 0
        if not written or data is self._rest:
            self._dropped += 1
            self._rest = self._rest[written:]
        else:
            self._dropped = 0
            self._rest = data[written:]

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode("utf-8", "backslashreplace") + b"\n"


class JournalHandler(logging.Handler):
    """Sends records that have ``fields`` (a function that makes them) to the journal's socket, others to ``lines``."""

    def __init__(self, sock: socket.socket, lines: logging.Handler) -> None:
        super().__init__()
        self._sock = sock
        self._lines = lines
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        fields: Callable[[], Fields] | None = getattr(record, "fields", None)
        if fields is None:
            self._lines.handle(record)
            return
        entry = {
            "MESSAGE": self.format(record),
            "PRIORITY": _PRIORITY.get(record.levelno, 6),
            "SYSLOG_IDENTIFIER": _IDENTIFIER,
            **fields(),
        }
        try:
            self._sock.send(encode(entry))
        except BlockingIOError:
            self._dropped += 1
        except OSError:
            # Too long, or journald was restarted without its socket: the plain line is what is left.
            self._lines.handle(record)
        else:
            self._confess()

    def close(self) -> None:
        self._sock.close()
        super().close()

    def _confess(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._lines.handle(_confession(dropped, "lines about streams"))


def _confession(count: int, what: str) -> logging.LogRecord:
    text = f"the journal did not keep up: {count} {what} are missing"
    return logging.LogRecord(_IDENTIFIER, logging.WARNING, "", 0, text, None, None)


def encode(fields: Fields) -> bytes:
    """One datagram; fields without a value are left out."""
    entry = bytearray()
    for name, value in fields.items():
        if value is None or value == "":
            continue
        data = str(value).encode("utf-8", "replace")
        if b"\n" in data:
            entry += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            entry += name.encode() + b"=" + data + b"\n"
    return bytes(entry)
