"""One line per stream: in the journal always, in a file of its own where one is configured.

A line never holds the prompt, the answer or a key. Values that came from outside are quoted where they are not plain,
so that nobody can forge a line or a field. Whoever wants to see what users ask, on a host where that is right, says
``[log] content = true``.

The file is written by all workers, each line with one write at its end. It may be renamed or removed at any time:
within a second everybody writes to a new one. A file that cannot be written, on a full disk perhaps, costs its lines
and nothing else; the journal hears of it once, and again when it works.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import board, journal
from .board import Slot
from .config import AccessLogConfig

if TYPE_CHECKING:
    from .envelope import Request
    from .handoff import Handoff

_PLAIN = re.compile(r"[A-Za-z0-9_.:/@\[\]+-]{1,128}")
_LONGEST = 128
_LONGEST_HEADER = 512
_LONGEST_QUESTION = 16384
_CHECK_INTERVAL = 1.0
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK

log = logging.getLogger("streaming_daemon")


def setup(level: str) -> None:
    """Log to stderr, and to the journal where stderr is the journal."""
    # A third of the time of a stream's line, for what no line says ("Optimization" in Python's logging HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [journal.handler(os.environ)]
    root.setLevel(level.upper())
    # Its debug lines are about the selector; its warnings ("slow callback") are wanted.
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))


@dataclass(frozen=True, slots=True)
class Visit:
    """What only the access log wants to know of a request, kept from its start to its end."""

    protocol: str = ""
    referer: str = ""
    agent: str = ""


NO_VISIT = Visit()

# The headers traceparent and tracestate of a request that is traced; see tracing.
Trace = tuple[str, str]
NO_TRACE: Trace = ("", "")


def visit(request: Request) -> Visit:
    """What to remember of a request. Clients are many and their programs few, so equal visits are kept once."""
    found = {name.lower(): value for name, value in request.headers if name.lower() in ("referer", "user-agent")}
    # A query may hold a prompt or a key, also one of the page that the request came from.
    referer = found.get("referer", "").partition("?")[0].partition("#")[0]
    return _shared_visit(
        request.protocol[:_LONGEST], referer[:_LONGEST_HEADER], found.get("user-agent", "")[:_LONGEST_HEADER]
    )


@functools.lru_cache(1024)
def _shared_visit(protocol: str, referer: str, agent: str) -> Visit:
    return Visit(sys.intern(protocol), sys.intern(referer), sys.intern(agent))


@dataclass(slots=True)
class StreamRecord:
    """All there is to say about one ended stream. Times in seconds; ``first_event`` is None where none was sent.

    ``id`` is the request's, as in Apache's log, where the message is an envelope; ``request_id`` the application's.
    ``path`` is the requested address without its query, which may hold a prompt or a key.
    ``outcome``: done, client_gone, write_timeout, backend_error, drained, bad_request, overloaded.
    ``status``: the HTTP status the client was sent, 0 for none.
    ``tries``: backends asked. ``limit``: the one that refused the stream, as in board.LIMITED. ``replay``: the id of
    the answer that a client came back for. ``prompt_tokens`` and ``completion_tokens`` are what the backend said, None
    where it said nothing. ``trace`` is for tracing alone.
    """

    id: str
    request_id: str
    client: str
    user: str
    method: str
    path: str
    backend: str
    outcome: str
    status: int
    events: int
    bytes: int
    first_event: float | None
    duration: float
    visit: Visit = NO_VISIT
    tries: int = 1
    limit: str = ""
    replay: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    trace: Trace = NO_TRACE


class AccessLog:
    """Observer that writes each StreamRecord to the journal, and to the file of ``config`` where it names one."""

    def __init__(self, config: AccessLogConfig | None = None, slot: Slot | None = None) -> None:
        self._format = _FORMATS[config.format] if config is not None else format_record
        self._file = LogFile(config.path, slot) if config is not None and config.path else None

    def finished(self, record: StreamRecord) -> None:
        if log.isEnabledFor(logging.INFO):
            log.info("%s", format_record(record), extra={"fields": lambda: fields_of(record)})
        if self._file is not None:
            self._file.write(self._format(record))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class LogFile:
    """A file that lines are appended to, whatever happens to it."""

    def __init__(self, path: str, slot: Slot | None = None) -> None:
        self._path = path
        self._slot = slot
        self._fd = -1
        self._identity = (0, 0)
        self._check_at = 0.0
        self._lost = 0
        self._reported = False
        self._broken = False
        self._follow(time.monotonic())

    def write(self, line: str) -> None:
        now = time.monotonic()
        if now >= self._check_at:
            self._follow(now)
        if self._fd < 0:
            self._lose()
            return
        # The rest of a line that did not fit before must not become the beginning of this one.
        data = (("\n" if self._broken else "") + line + "\n").encode("utf-8", "replace")
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self._fail(error)
            self._lose()
            return
        if written < len(data):
            self._broken = True
            self._fail(OSError(0, "the disk is full or a limit is reached"))
            self._lose()
            return
        self._broken = False
        if self._reported:
            log.warning("access log %s is written again; %d lines are missing", self._path, self._lost)
            self._reported = False
            self._lost = 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _follow(self, now: float) -> None:
        """Have the file open that has this name now."""
        self._check_at = now + _CHECK_INTERVAL
        try:
            status = os.stat(self._path)
            if self._fd >= 0 and (status.st_dev, status.st_ino) == self._identity:
                return
        except OSError:
            # It is gone; opening it says whether a new one is possible.
            pass
        self.close()
        self._broken = False
        try:
            self._fd = os.open(self._path, _OPEN, 0o640)
            status = os.fstat(self._fd)
            self._identity = (status.st_dev, status.st_ino)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._reported:
            self._reported = True
            text = "access log %s cannot be written: %s: its lines are lost until it can"
            log.error(text, self._path, error.strerror)

    def _lose(self) -> None:
        self._lost += 1
        if self._slot is not None:
            self._slot[board.LOG_ERRORS] += 1


def question(identity: str, handoff: Handoff) -> None:
    """Log what was asked. Only for ``[log] content = true``."""
    text = json.dumps({"prompt": handoff.prompt, "messages": handoff.messages}, default=str)
    log.info("question id=%s %s", quote(identity), text[:_LONGEST_QUESTION])


def fields_of(record: StreamRecord) -> journal.Fields:
    """A record as fields of the journal."""
    return {f"HANDOFF_{name.upper()}": value for name, value in members(record).items()}


def members(record: StreamRecord) -> dict[str, str | int | float | None]:
    """A record as names and values; None where there is nothing to say."""
    visit = record.visit
    first = record.first_event
    return {
        "id": record.id or None,
        "request_id": record.request_id or None,
        "client": record.client or None,
        "user": record.user or None,
        "method": record.method or None,
        "path": record.path or None,
        "protocol": visit.protocol or None,
        "status": record.status or None,
        "outcome": record.outcome,
        "backend": record.backend or None,
        "tries": record.tries,
        "limit": record.limit or None,
        "replay": record.replay or None,
        "events": record.events,
        "bytes": record.bytes,
        "first_event_ms": None if first is None else round(first * 1000, 1),
        "duration_ms": round(record.duration * 1000, 1),
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "referer": visit.referer or None,
        "user_agent": visit.agent or None,
    }


def format_record(record: StreamRecord) -> str:
    """Format "pairs", and the journal's text: ``stream key=value ...``."""
    first = "-" if record.first_event is None else f"{record.first_event * 1000:.1f}"
    line = (
        f"stream id={quote(record.id)} request_id={quote(record.request_id)} client={quote(record.client)} "
        f"user={quote(record.user)} method={quote(record.method)} path={quote(record.path)} "
        f"backend={quote(record.backend)} outcome={record.outcome} status={record.status or '-'} "
        f"events={record.events} bytes={record.bytes} first_event_ms={first} duration_ms={record.duration * 1000:.0f}"
    )
    # What most streams have nothing to say of.
    if record.tries > 1:
        line += f" tries={record.tries}"
    if record.limit:
        line += f" limit={record.limit}"
    if record.replay:
        line += f" replay={quote(record.replay)}"
    if record.prompt_tokens is not None:
        line += f" prompt_tokens={record.prompt_tokens}"
    if record.completion_tokens is not None:
        line += f" completion_tokens={record.completion_tokens}"
    return line


def format_pairs(record: StreamRecord) -> str:
    return f"time={_iso(_started(record))} {format_record(record).removeprefix('stream ')}"


def format_json(record: StreamRecord) -> str:
    values = {"time": _iso(_started(record)), **members(record), "pid": os.getpid()}
    return json.dumps({name: value for name, value in values.items() if value is not None}, separators=(",", ":"))


def format_combined(record: StreamRecord) -> str:
    """Apache's Combined Log Format, with the true client. The address is without its query."""
    client = record.client
    if client.startswith("["):
        client = client[1:].partition("]")[0]
    elif client.count(":") == 1:
        client = client.partition(":")[0]
    stamp = time.localtime(_started(record))
    when = f"{stamp.tm_mday:02}/{_MONTHS[stamp.tm_mon - 1]}/{time.strftime('%Y:%H:%M:%S %z', stamp)}"
    words = [word for word in (record.method, record.path, record.visit.protocol) if word]
    return (
        f"{_word(client)} - {_word(record.user)} [{when}] {_quoted(' '.join(words))} {record.status or '-'} "
        f"{record.bytes or '-'} {_quoted(record.visit.referer)} {_quoted(record.visit.agent)}"
    )


_FORMATS = {"combined": format_combined, "json": format_json, "pairs": format_pairs}
# The C locale's, whatever the host's is.
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNPRINTABLE = re.compile(rb"[^\x20-\x7e]|[\"\\]")
_UNPRINTABLE_OR_BLANK = re.compile(rb"[^\x21-\x7e]|[\"\\]")


def _started(record: StreamRecord) -> float:
    return time.time() - record.duration


def _iso(when: float) -> str:
    seconds, milliseconds = divmod(round(when * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z"


def _quoted(value: str) -> str:
    return f'"{_escape(_UNPRINTABLE, value)}"' if value else '"-"'


def _word(value: str) -> str:
    return _escape(_UNPRINTABLE_OR_BLANK, value) if value else "-"


def _escape(pattern: re.Pattern[bytes], value: str) -> str:
    """As Apache escapes in its logs: a backslash before quote and backslash, everything unprintable in hexadecimal."""

    def escaped(match: re.Match[bytes]) -> bytes:
        byte = match.group()
        return b"\\" + byte if byte in (b'"', b"\\") else b"\\x%02x" % byte[0]

    return pattern.sub(escaped, value.encode("utf-8", "replace")).decode("ascii")


def quote(value: str) -> str:
    """``value`` as it stands where it is plain, as an ASCII JSON string where it is not, ``-`` where it is empty."""
    if not value:
        return "-"
    if _PLAIN.fullmatch(value):
        return value
    return json.dumps(value[:_LONGEST])
