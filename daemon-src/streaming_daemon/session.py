"""One stream: from its handoff through its backend to the client's last byte.

States of a ``Session`` and what moves it on:

    STARTING   nothing sent; waits for the backend   -> STREAMING by the first content, a heartbeat or a probe
                                                     -> FINISHING by a failure (a real HTTP status)
    STREAMING  head sent, events flow                -> FINISHING by done, failure or the end of the drain
    FINISHING  everything is produced, some of it is still in the buffer  -> ENDED when the buffer is empty
    ENDED      logged; the descriptor belongs to a LingeringClose or is closed

Any of them goes to ENDED when the client is gone or does not read for ``write_timeout``. There is no task, transport or
loop timer per stream: writes go straight to the descriptor, a buffer exists only while the kernel refuses bytes, and
all deadlines share one entry on the wheel.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from enum import Enum
from typing import Protocol

from . import http_response as http
from .access_log import StreamRecord, log, quote
from .backends.base import Backend, Call, Failure
from .config import ServerConfig
from .handoff import MAX_ID, HandoffError, parse_plain
from .hangup import HangupSet
from .limits import BUFFER_HIGH, BUFFER_LOW, RETRY_AFTER, StreamLimit
from .wheel import Timed, TimerWheel

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class State(Enum):
    STARTING = 1
    STREAMING = 2
    FINISHING = 3
    ENDED = 4


class Observer(Protocol):
    """Wants to hear of every stream that ends: the access log, later also metrics."""

    def finished(self, record: StreamRecord) -> None: ...


class Streams:
    """All streams of one worker and what they share."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        config: ServerConfig,
        backend: Backend,
        observers: list[Observer],
    ) -> None:
        self.loop = loop
        self.wheel = wheel
        self.config = config
        self.backend = backend
        self.hangups = HangupSet(loop)
        self.limit = StreamLimit(config.max_streams)
        self._observers = observers
        self._sessions: set[Session] = set()
        self._lingering: set[http.LingeringClose] = set()

    def __len__(self) -> int:
        return len(self._sessions) + len(self._lingering)

    def open(self, client: socket.socket, message: bytes) -> None:
        """Answer ``client``, whose descriptor belongs to this object from now on."""
        session = Session(self, client)
        self._sessions.add(session)
        session.begin(message)

    def end_all(self, kind: str, message: str) -> None:
        """Tell every stream still running that it ends here."""
        for session in list(self._sessions):
            session.end_early(kind, message)

    def drop_all(self) -> None:
        """Close every client without another word."""
        for session in list(self._sessions):
            session.drop("drained")

    def close(self) -> None:
        self.hangups.close()
        self.backend.close()

    def ended(self, session: Session, record: StreamRecord) -> None:
        self._sessions.discard(session)
        for observer in self._observers:
            observer.finished(record)

    def linger(self, fd: int) -> None:
        closing = http.LingeringClose(self.loop, self.wheel, fd, self.config.linger_timeout, self._lingering.discard)
        self._lingering.add(closing)
        closing.start()


class Session(Timed):
    """One stream; the Sink of its backend call. Times are the loop's."""

    __slots__ = (
        "_blocked_since",
        "_bytes",
        "_call",
        "_client",
        "_counted",
        "_events",
        "_fd",
        "_first_event",
        "_id",
        "_last_write",
        "_out",
        "_outcome",
        "_paused",
        "_started",
        "_state",
        "_status",
        "_streams",
        "_user",
    )

    def __init__(self, streams: Streams, client: socket.socket) -> None:
        super().__init__()
        self._streams = streams
        self._client = peer_name(client)
        self._fd = client.detach()
        self._id = ""
        self._user = ""
        self._state = State.STARTING
        self._outcome = "done"
        self._status = 0
        self._events = 0
        self._bytes = 0
        self._started = self._last_write = streams.wheel.now()
        self._first_event: float | None = None
        self._call: Call | None = None
        # What the kernel did not take yet; None is the normal case and costs nothing.
        self._out: bytearray | None = None
        self._blocked_since = 0.0
        self._paused = False
        self._counted = False

    def begin(self, message: bytes) -> None:
        """Read the message and start the backend, or answer with the error."""
        self._streams.hangups.add(self._fd, self._hung_up)
        try:
            handoff = parse_plain(message)
            self._id = handoff.request_id or os.urandom(6).hex()
            self._user = (handoff.user or "")[:MAX_ID]
            self._counted = self._streams.limit.enter()
            if not self._counted:
                sorry = "Too many answers are being written at the moment; try again."
                self._answer(503, "overloaded", "overloaded", sorry, str(RETRY_AFTER))
                return
            self._call = self._streams.backend.start(handoff, self)
            self._schedule()
        except HandoffError as error:
            self._id = self._id or os.urandom(6).hex()
            log.warning("id=%s bad handoff data: %s: correct what the application sends", quote(self._id), error)
            self._answer(400, "bad_request", "invalid_request", str(error))
        except Exception:
            # A fault of ours must not leave a client waiting for ever.
            log.exception("id=%s cannot start the answer", quote(self._id))
            self._answer(500, "backend_error", "internal_error", "The answer could not be started.")

    # Sink

    def content(self, texts: list[str]) -> None:
        if self._state not in (State.STARTING, State.STREAMING):
            return
        if texts and self._first_event is None:
            self._first_event = self._streams.wheel.now() - self._started
        self._events += len(texts)
        self._send(self._take_head() + b"".join([http.content_event(text) for text in texts]))

    def done(self) -> None:
        self._call = None
        self._finish(self._take_head() + http.DONE, "done")

    def failed(self, failure: Failure) -> None:
        self._call = None
        log.warning("id=%s backend=%s: %s", quote(self._id), quote(self._streams.backend.name), failure.detail)
        if self._state is State.STARTING:
            self._answer(failure.status, "backend_error", failure.kind, failure.message, failure.retry_after)
        else:
            self._finish(http.error_event(failure.kind, failure.message), "backend_error")

    # What else can happen to a stream

    def end_early(self, kind: str, message: str) -> None:
        """The worker has to go before the answer is complete."""
        if self._state is State.STARTING:
            self._answer(503, "drained", kind, message, str(RETRY_AFTER))
        elif self._state is State.STREAMING:
            self._finish(http.error_event(kind, message), "drained")

    def drop(self, outcome: str) -> None:
        """End the stream at once, whatever the client has or has not read."""
        if self._state is State.ENDED:
            return
        self._outcome = outcome
        fd = self._end()
        os.close(fd)

    def _hung_up(self, certain: bool) -> None:
        if certain:
            self.drop("client_gone")
        elif self._state in (State.STARTING, State.STREAMING):
            # FIN alone may be a client that is merely done with sending. Only a write tells: it makes the kernel of a
            # client that has closed answer with RST, which arrives here as a certain hang-up.
            self._send(self._take_head() + http.PING)

    def on_timer(self, now: float) -> None:
        config = self._streams.config
        if self._out is not None:
            if now >= self._blocked_since + config.write_timeout:
                self._reset_and_drop()
                return
        elif config.heartbeat and now >= self._last_write + config.heartbeat:
            self._send(self._take_head() + http.PING)
        self._schedule()

    # Writing

    def _answer(self, status: int, outcome: str, kind: str, message: str, retry_after: str | None = None) -> None:
        self._status = status
        self._finish(http.error_response(status, kind, message, retry_after), outcome)

    def _take_head(self) -> bytes:
        """The head of the stream if it has not been sent; makes it sent."""
        if self._state is not State.STARTING:
            return b""
        self._state = State.STREAMING
        self._status = 200
        return http.stream_head()

    def _finish(self, last: bytes, outcome: str) -> None:
        if self._state is State.ENDED:
            return
        self._state = State.FINISHING
        self._outcome = outcome
        self._cancel_call()
        self._send(last)
        if self._state is State.FINISHING and self._out is None:
            self._complete()

    def _send(self, data: bytes) -> None:
        """Write ``data`` or keep it until the client reads. May end the session."""
        if self._state is State.ENDED or not data:
            return
        if self._out is not None:
            self._out += data
        else:
            self._last_write = now = self._streams.wheel.now()
            try:
                written = os.write(self._fd, data)
            except BlockingIOError:
                written = 0
            except OSError:
                self.drop("client_gone")
                return
            self._bytes += written
            if written == len(data):
                return
            self._out = bytearray(data[written:])
            self._blocked_since = now
            self._streams.loop.add_writer(self._fd, self._writable)
            self._schedule()
        if not self._paused and len(self._out) > BUFFER_HIGH and self._call is not None:
            self._paused = True
            self._call.pause()

    def _writable(self) -> None:
        if self._out is None:
            return
        try:
            written = os.write(self._fd, self._out)
        except BlockingIOError:
            return
        except OSError:
            self.drop("client_gone")
            return
        self._bytes += written
        self._blocked_since = self._last_write = self._streams.wheel.now()
        del self._out[:written]
        if not self._out:
            self._out = None
            self._streams.loop.remove_writer(self._fd)
            if self._state is State.FINISHING:
                self._complete()
                return
            # The next deadline is a heartbeat again, and that may be sooner.
            self._schedule()
        if self._paused and len(self._out or b"") <= BUFFER_LOW:
            self._paused = False
            if self._call is not None:
                self._call.resume()

    def _schedule(self) -> None:
        """Set the one deadline: of the blocked write, or else of the next heartbeat."""
        config = self._streams.config
        if self._state is State.ENDED:
            return
        if self._out is not None:
            self._streams.wheel.set(self, self._blocked_since + config.write_timeout)
        elif config.heartbeat and self._state is not State.FINISHING:
            self._streams.wheel.set(self, self._last_write + config.heartbeat)

    # Ending

    def _complete(self) -> None:
        self._streams.linger(self._end())

    def _reset_and_drop(self) -> None:
        """Drop a client that does not read, and with RST: what it did not read would stay in the kernel for minutes."""
        borrowed = socket.socket(fileno=self._fd)
        try:
            borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        finally:
            borrowed.detach()
        self.drop("write_timeout")

    def _cancel_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def _end(self) -> int:
        """Let go of everything but the descriptor, which the caller gets."""
        streams = self._streams
        self._state = State.ENDED
        self._cancel_call()
        streams.wheel.cancel(self)
        streams.hangups.remove(self._fd)
        if self._out is not None:
            self._out = None
            streams.loop.remove_writer(self._fd)
        if self._counted:
            streams.limit.leave()
        record = StreamRecord(
            id=self._id,
            client=self._client,
            user=self._user,
            backend=streams.backend.name,
            outcome=self._outcome,
            status=self._status,
            events=self._events,
            bytes=self._bytes,
            first_event=self._first_event,
            duration=streams.wheel.now() - self._started,
        )
        fd, self._fd = self._fd, -1
        streams.ended(self, record)
        return fd


def peer_name(client: socket.socket) -> str:
    """``address:port`` of a client, ``unix`` for a local one, empty where it is gone already.

    Apache listens on IPv6 sockets for both families; an IPv4 client is written as Apache's own log writes it, not as
    an IPv4-mapped address (RFC 4291 section 2.5.5.2).
    """
    if client.family == socket.AF_UNIX:
        return "unix"
    try:
        address = client.getpeername()
    except OSError:
        return ""
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
