"""The journal: set-up of logging, and one line per stream.

A line never holds the prompt, the answer or a key. Values that came from outside are quoted where they are not plain,
so that nobody can forge a line or a field.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import dataclass

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_PLAIN = re.compile(r"[A-Za-z0-9_.:/@\[\]+-]{1,128}")
_LONGEST = 128

log = logging.getLogger("streaming_daemon")


class _JournalFormatter(logging.Formatter):
    """Prefixes each line with its syslog priority, which journald takes off again; see sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def setup(level: str) -> None:
    """Log to stderr, for the journal where stderr is the journal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JournalFormatter() if "JOURNAL_STREAM" in os.environ else logging.Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its debug lines are about the selector; its warnings ("slow callback") are wanted.
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))


@dataclass(slots=True)
class StreamRecord:
    """All there is to say about one ended stream. Times in seconds; ``first_event`` is None where none was sent.

    ``outcome``: done, client_gone, write_timeout, backend_error, drained, bad_request, overloaded.
    ``status``: the HTTP status the client was sent, 0 for none.
    """

    id: str
    client: str
    user: str
    backend: str
    outcome: str
    status: int
    events: int
    bytes: int
    first_event: float | None
    duration: float


class AccessLog:
    """Writes a StreamRecord as one line of ``key=value`` pairs."""

    def finished(self, record: StreamRecord) -> None:
        log.info("%s", format_record(record))


def format_record(record: StreamRecord) -> str:
    first = "-" if record.first_event is None else f"{record.first_event * 1000:.1f}"
    return (
        f"stream id={quote(record.id)} client={quote(record.client)} user={quote(record.user)} "
        f"backend={quote(record.backend)} outcome={record.outcome} status={record.status or '-'} "
        f"events={record.events} bytes={record.bytes} first_event_ms={first} duration_ms={record.duration * 1000:.0f}"
    )


def quote(value: str) -> str:
    """``value`` as it stands where it is plain, as an ASCII JSON string where it is not, ``-`` where it is empty."""
    if not value:
        return "-"
    if _PLAIN.fullmatch(value):
        return value
    return json.dumps(value[:_LONGEST])
