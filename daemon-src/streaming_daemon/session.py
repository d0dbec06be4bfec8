"""One stream: from its handoff through its backend to the client's last byte.

States of a ``Session`` and what moves it on:

    STARTING   nothing sent; waits for a backend     -> STREAMING by the first of an answer, by patience's end
                                                        (``head_after``) or by a probe
                                                     -> FINISHING by a failure (a real HTTP status)
    STREAMING  head sent, events flow                -> FINISHING by done, failure, ``max_duration``, end of the drain
    FINISHING  everything is produced, some of it is still in the buffer  -> ENDED when the buffer is empty
    ENDED      logged; the descriptor belongs to a LingeringClose or is closed

Any of them goes to ENDED when the client is gone, does not read for ``write_timeout``, or waits for more than the
worker's memory has room for. Until the first byte of an answer another backend may be asked (``Attempts``). Where the
answer may be continued, an ``Answer`` stands between stream and backend, and survives the stream.

There is no task, transport or loop timer per stream: writes go straight to the descriptor (``Client``), and all
deadlines share one entry on the wheel.
"""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from . import board
from . import http_response as http
from .access_log import NO_TRACE, NO_VISIT, StreamRecord, Trace, Visit, log, question, quote, visit
from .attempts import Attempts
from .backends.base import EXHAUSTED, Backend, Failure, Usage
from .client import Client
from .envelope import Header, Request, unpack
from .handoff import MAX_ID, Handoff, HandoffError, parse_data
from .limits import (
    NO_DESCRIPTORS,
    RETRY_AFTER,
    Refusal,
    address_key,
    without_port,
)
from .payload import data_of
from .replay import Answer, MissedError, key_of, wanted_after
from .siblings import Passed
from .tracing import parent_of

if TYPE_CHECKING:
    from .streams import Streams

# The client did not have its answer yet and is not there to get it: it may come back for it.
_MAY_COME_BACK = frozenset({"client_gone", "write_timeout", "buffer_full", "resumed"})
_BODILESS = frozenset({204, 304})


class State(Enum):
    STARTING = 1
    STREAMING = 2
    FINISHING = 3
    ENDED = 4


class Session(Client):
    """One stream; the Sink of its backend's call, or the Reader of its answer. Times are the loop's."""

    __slots__ = (
        "_address",
        "_answer",
        "_attempts",
        "_backend",
        "_begun",
        "_chunked",
        "_client",
        "_events",
        "_first_event",
        "_id",
        "_interim",
        "_left",
        "_limit",
        "_method",
        "_modern",
        "_outcome",
        "_own",
        "_path",
        "_raw",
        "_replay",
        "_request_id",
        "_started",
        "_state",
        "_status",
        "_trace",
        "_tries",
        "_usage",
        "_user",
        "_visit",
    )

    def __init__(self, streams: Streams, client: socket.socket) -> None:
        super().__init__(streams, client)
        # Known once the message has been read, or has turned out to be useless.
        self._client = ""
        self._id = ""
        self._request_id = ""
        self._user = ""
        self._method = ""
        self._path = ""
        self._visit: Visit = NO_VISIT
        self._trace: Trace = NO_TRACE
        # Which limit refused it.
        self._limit = ""
        # The application's headers, until they are sent.
        self._own: tuple[Header, ...] = ()
        self._state = State.STARTING
        self._outcome = "done"
        self._status = 0
        self._events = 0
        self._started = self._last_write
        # A backend has begun to answer; an event was there to be sent.
        self._begun = False
        self._first_event: float | None = None
        # Who else could be asked, until the first byte of an answer.
        self._attempts: Attempts | None = None
        self._answer: Answer | None = None
        # It goes on with an answer that another stream began.
        self._replay = False
        self._backend = ""
        self._tries = 1
        self._usage: Usage | None = None
        # What it is counted for besides its user; None where it has no place of its own.
        self._address: str | None = None
        # The client speaks HTTP/1.1; it may be sent an interim response; what is sent goes in chunks.
        self._modern = self._interim = self._chunked = False
        # The response is the backend's own, and nothing of ours belongs into it; bytes of it to come, -1 if not known.
        self._raw = False
        self._left = -1

    def begin(self, message: bytes, fds: list[int], *, passed_on: bool) -> None:
        """Read the message and start the backend, or answer with the error. ``fds`` came behind the client's;
        ``passed_on``: another worker says that the answer is here."""
        if not passed_on:
            self._streams.slot[board.HANDOFFS] += 1
        try:
            self._streams.hangups.add(self._fd, self)
            parcel = unpack(message, self._streams.listen.message)
            request = parcel.request
            if request is not None:
                self._introduce(request)
            else:
                self._client = peer_name(self._fd)
            if request is None and fds:
                log.warning("a handoff carried %d descriptors, expected is one: kept the first", len(fds) + 1)
            handoff = parse_data(data_of(parcel, fds, self._streams.listen.max_payload))
            self._request_id = handoff.request_id or ""
            self._id = self._id or self._request_id or os.urandom(6).hex()
            self._user = (handoff.user or "")[:MAX_ID] or self._user
            if self._streams.content:
                question(self._id, handoff)
            candidates = self._streams.router.choose(handoff, request)
            self._choose(candidates[0])
            if self._method == "HEAD" and not self._raw:
                # What a GET would begin with, and no backend is asked for it.
                self._finish(self._take_head(), "done")
            elif self._streams.answers is None and handoff.asks_nothing and not self._raw:
                self._missed("no answers are kept (resume.buffer = 0)")
            elif handoff.resume is None or self._streams.answers is None or self._raw:
                self._start(Attempts(candidates, handoff, request))
            elif not self._continue(handoff, request, passed_on, message, fds):
                able = [backend for backend in candidates if not passes_on(backend)]
                self._start(Attempts(able, handoff, request), key_of(handoff, request))
            self._schedule()
        except HandoffError as error:
            self._id = self._id or os.urandom(6).hex()
            self._client = self._client or peer_name(self._fd)
            hint = f" ({error.hint})" if error.hint else ""
            log.warning("id=%s bad handoff: %s%s: correct what was sent", quote(self._id), error, hint)
            if error.status == 413:
                self._limit = "payload"
            self._answer_with(error.status, "bad_request", "invalid_request", str(error))
        except Exception:
            # A fault of ours must not leave a client waiting for ever.
            log.exception("id=%s cannot start the answer", quote(self._id))
            self._answer_with(500, "backend_error", "internal_error", "The answer could not be started.")

    def begin_refused(self, message: bytes, refusal: Refusal) -> None:
        """Instead of ``begin``, where there is no room for it."""
        self._streams.slot[board.HANDOFFS] += 1
        try:
            self._streams.hangups.add(self._fd, self)
            request = unpack(message, self._streams.listen.message).request
            if request is not None:
                self._introduce(request)
        except (HandoffError, OSError) as error:
            log.warning("bad handoff: %s", error)
        self._id = self._id or os.urandom(6).hex()
        self._client = self._client or peer_name(self._fd)
        self._refuse(refusal)

    def _introduce(self, request: Request) -> None:
        """Keep what the stream needs of the request until it ends: the log's words, and the application's headers."""
        self._id = request.id[:MAX_ID]
        self._client = str(request.client)
        self._user = (request.user or "")[:MAX_ID]
        # The same few words for most streams.
        self._method = sys.intern(request.method[:MAX_ID])
        self._path = sys.intern(request.uri.partition("?")[0][:MAX_ID])
        self._visit = visit(request)
        if self._streams.traced:
            self._trace = parent_of(request)
        self._own = request.response_headers
        self._modern = request.protocol == "HTTP/1.1"
        # A client that waits for "100 Continue" would send its body.
        self._interim = self._modern and request.unread_body == 0

    def _start(self, attempts: Attempts, key: str = "") -> None:
        """Ask the first backend, if there is a place; with ``key`` the answer may be continued."""
        streams = self._streams
        address = address_key(without_port(self._client)) if streams.limit.by_address else ""
        refusal = streams.limit.admit(self._user, address, self._fd, streams.wheel.now())
        if refusal is not None:
            self._refuse(refusal)
            return
        streams.roster.begin(self._fd, self._id)
        if key and streams.answers is not None:
            self._answer = self._call = streams.answers.open(key, attempts, (self._user, address), self, self._id)
            self._answer.begin()
        else:
            self._address = address
            self._attempts = attempts
            self._call = attempts.first(self)
            board.observe(streams.slot, board.HANDOFF_DURATION, streams.wheel.now() - self._started)

    def _continue(
        self, handoff: Handoff, request: Request | None, passed_on: bool, message: bytes, fds: Sequence[int]
    ) -> bool:
        """Go on with an answer that is known here or in another worker; false where there is none to go on with."""
        streams = self._streams
        after = wanted_after(handoff, request)
        key = key_of(handoff, request)
        answer = streams.answers.get(key) if streams.answers is not None else None
        if answer is not None and streams.limit.crowded(self._fd):
            # Its place is the answer's, or none at all, but its descriptor is its own.
            self._refuse(NO_DESCRIPTORS)
            return True
        if answer is not None:
            self._read_on(answer, after)
            return True
        passed = Passed.NOBODY if passed_on else streams.pass_on(key, message, [self._fd, *fds])
        if passed is Passed.YES:
            self._leave()
        elif passed is Passed.BUSY:
            sorry = "The answer cannot be continued at the moment; try again."
            self._answer_with(503, "overloaded", "overloaded", sorry, str(RETRY_AFTER))
        elif after or passed_on or handoff.asks_nothing:
            self._missed(f"no answer of that name for event {after + 1}")
        else:
            return False
        return True

    def _read_on(self, answer: Answer, after: int) -> None:
        try:
            events, outcome = answer.attach(self, after)
        except MissedError as error:
            self._missed(str(error))
            return
        self._answer = answer
        self._call = None if outcome else answer
        self._begun = self._replay = True
        self._streams.roster.begin(self._fd, self._id)
        if outcome and not events:
            # Everything is there. A browser that is told so comes back no more.
            self._status = 204
            own, self._own = self._own, ()
            self._finish(http.empty_response(204, own=own), outcome)
        elif outcome:
            self.events(events[:-1])
            self.last(events[-1], outcome)
        else:
            self.events(events)

    def _missed(self, detail: str) -> None:
        self._streams.slot[board.REPLAY_MISSES] += 1
        log.info("id=%s cannot be continued: %s", quote(self._id), detail)
        self._answer_with(410, "bad_request", "resume_expired", "The answer cannot be continued; please ask again.")

    def _refuse(self, refusal: Refusal) -> None:
        self._limit = refusal.limit
        retry = str(refusal.retry_after)
        self._answer_with(refusal.status, "overloaded", refusal.kind, refusal.message, retry)

    def _choose(self, backend: Backend) -> None:
        self._backend = backend.name
        self._raw = passes_on(backend)

    # Sink, and Reader

    def head(self, status: int, headers: tuple[Header, ...]) -> None:
        if self._state is not State.STARTING:
            if self._state is State.STREAMING:
                # The head went out while another backend was being asked.
                self._fail("backend_protocol", "The answer cannot be passed on any more.")
            return
        self._answered()
        self._raw = True
        self._state = State.STREAMING
        self._status = status
        own, self._own = self._own, ()
        bodiless = self._method == "HEAD" or status in _BODILESS
        self._left = http.length_of(headers)
        self._chunked = self._modern and self._left < 0 and status not in _BODILESS
        length = self._left if status not in _BODILESS else -1
        head = http.passed_head(status, headers, own, length=length, chunked=self._chunked)
        if bodiless:
            self._finish(head, "done")
        else:
            self._send(head)
            self._schedule()

    def body(self, data: bytes) -> None:
        if self._state is not State.STREAMING or not data:
            return
        if self._left >= 0:
            data = data[: self._left]
            self._left -= len(data)
        self._events += 1
        self._streams.slot[board.EVENTS] += 1
        self._send(self._framed(data))

    def content(self, texts: list[str]) -> None:
        self.events([http.content_event(text) for text in texts])

    def events(self, events: list[bytes]) -> None:
        if self._state not in (State.STARTING, State.STREAMING):
            return
        starting = self._state is State.STARTING
        self._begun = True
        if events:
            self._answered()
            self._events += len(events)
            self._streams.slot[board.EVENTS] += len(events)
        self._send(self._framed(b"".join(events)))
        if starting:
            # The next deadline is a heartbeat, and that may be sooner.
            self._schedule()

    def usage(self, usage: Usage) -> None:
        self._usage = usage

    def done(self) -> None:
        self._call = None
        if self._raw:
            if self._left > 0:
                self._cut("backend_error")
            else:
                self._finish(self._framed(b"", last=True), "done")
        else:
            self.last(http.DONE, "done")

    def last(self, event: bytes, outcome: str) -> None:
        self._finish(self._framed(event, last=True), outcome)

    def failed(self, failure: Failure) -> None:
        self._call = None
        log.warning("id=%s backend=%s: %s", quote(self._id), quote(self._name_of_backend()), failure.detail)
        if self._try_another(failure):
            return
        if failure.kind == EXHAUSTED:
            self._limit = "descriptors"
        if self._state is State.STARTING:
            self._answer_with(failure.status, "backend_error", failure.kind, failure.message, failure.retry_after)
        else:
            self._fail(failure.kind, failure.message)

    def superseded(self) -> None:
        self.drop("resumed")

    def _answered(self) -> None:
        """The first of an answer is here: nobody else will be asked."""
        self._begun = True
        self._attempts = None
        if self._first_event is None:
            self._first_event = self._streams.wheel.now() - self._started

    def _try_another(self, failure: Failure) -> bool:
        """Ask the next backend, where nothing of an answer was sent."""
        attempts = self._attempts
        if attempts is None or not failure.retryable or self._state not in (State.STARTING, State.STREAMING):
            return False
        # A comment may have been sent meanwhile, and behind that goes only what is made of events.
        unfit = None if self._state is State.STARTING else passes_on
        if self._method == "HEAD":
            # Only what passes a response on knows how to answer without a body.
            unfit = _makes_events
        self._call = attempts.next(self, skip=unfit)
        if self._call is None:
            return False
        self._tries = attempts.tries
        self._choose(attempts.backend)
        return True

    # What else can happen to a stream

    def end_early(self, kind: str, message: str) -> None:
        """The worker has to go before the answer is complete."""
        if self._state is State.STARTING:
            self._answer_with(503, "drained", kind, message, str(RETRY_AFTER))
        elif self._state is State.STREAMING:
            self._fail(kind, message, "drained")

    def drop(self, outcome: str) -> None:
        """End the stream at once, whatever the client has or has not read."""
        if self._state is State.ENDED:
            return
        self._outcome = outcome
        fd = self._end()
        os.close(fd)

    def hung_up(self, certain: bool) -> None:
        if certain:
            self.drop("client_gone")
        elif self._raw:
            # Nothing of ours may stand between the backend's bytes, but before them an interim response may.
            if self._state is State.STARTING and self._interim:
                self._send(http.CONTINUE)
            elif self._state in (State.STARTING, State.STREAMING):
                # Elsewhere nothing can be asked: who stops sending is believed to be gone, as by other proxies.
                self.drop("client_gone")
        elif self._state in (State.STARTING, State.STREAMING):
            # FIN alone may be a client that is merely done with sending. Only a write tells: it makes the kernel of a
            # client that has closed answer with RST, which arrives here as a certain hang-up.
            self._send(self._framed(http.PING))

    def on_timer(self, now: float) -> None:
        config = self._streams.config
        if self._out is not None and now >= min(self._blocked_since + config.write_timeout, self._last_moment()):
            self.drop_slow("write_timeout")
            return
        if self._state in (State.STARTING, State.STREAMING):
            if config.max_duration and now >= self._started + config.max_duration:
                self._late("stream_timeout", "The answer took too long and ends here.")
                return
            if not self._begun and config.first_event_timeout and now >= self._started + config.first_event_timeout:
                self._late("first_event_timeout", "No answer has begun in time.")
                return
            due = self._comment_due()
            if due and now >= due:
                self._streams.slot[board.HEARTBEATS] += 1
                self._send(self._framed(http.PING))
        self._schedule()

    def _late(self, kind: str, message: str) -> None:
        log.warning("id=%s backend=%s: %s", quote(self._id), quote(self._name_of_backend()), message)
        if self._state is State.STARTING:
            self._answer_with(504, "timeout", kind, message)
        else:
            self._fail(kind, message, "timeout")

    def _last_moment(self) -> float:
        """Until when the client may read what was produced for it in time, however steadily it does."""
        config = self._streams.config
        if not config.max_duration or self._state is not State.FINISHING:
            return math.inf
        return self._started + config.max_duration + config.write_timeout

    def _comment_due(self) -> float:
        """When the client has to be sent a comment, 0 for never."""
        config = self._streams.config
        if self._raw or self._out is not None:
            return 0
        if self._state is State.STARTING:
            return config.head_after and self._started + config.head_after
        return config.heartbeat and self._last_write + config.heartbeat

    # Writing

    def _answer_with(self, status: int, outcome: str, kind: str, message: str, retry_after: str | None = None) -> None:
        self._status = status
        own, self._own = self._own, ()
        head_only = self._method == "HEAD"
        self._finish(http.error_response(status, kind, message, retry_after, own=own, head_only=head_only), outcome)

    def _fail(self, kind: str, message: str, outcome: str = "backend_error") -> None:
        """End a stream that has begun, without the rest of its answer."""
        if self._raw:
            self._cut(outcome)
        else:
            self.last(http.error_event(kind, message), outcome)

    def _cut(self, outcome: str) -> None:
        """End a response that is the backend's own before it is complete, so that the client can tell."""
        if not self._chunked and self._left < 0:
            # Only the connection says where it ends, so it must not end in order.
            self._reset()
            self.drop(outcome)
        else:
            self._finish(b"", outcome)

    def _take_head(self) -> bytes:
        """The head of the stream if it has not been sent; makes it sent."""
        if self._state is not State.STARTING:
            return b""
        self._state = State.STREAMING
        self._status = 200
        self._chunked = self._modern
        own, self._own = self._own, ()
        return http.stream_head(own, chunked=self._chunked)

    def _framed(self, data: bytes, *, last: bool = False) -> bytes:
        """``data`` as a part of the stream: behind the head where that was not sent, and in a chunk."""
        head = self._take_head() if self._state is State.STARTING else b""
        if self._chunked:
            data = (http.chunk(data) if data else b"") + (http.LAST_CHUNK if last else b"")
        return head + data if head else data

    def _finish(self, last: bytes, outcome: str) -> None:
        if self._state is State.ENDED:
            return
        self._state = State.FINISHING
        self._outcome = outcome
        self._cancel_call()
        self._send(last)
        if self._state is State.FINISHING:
            if self._out is None:
                self._complete()
            else:
                # Whatever else there was to wait for, now it is the client alone.
                self._schedule()

    def _schedule(self) -> None:
        """Set the one deadline: the earliest of all that may come."""
        if self._state is State.ENDED:
            return
        streams = self._streams
        config = streams.config
        due = math.inf
        if self._out is not None:
            due = min(self._blocked_since + config.write_timeout, self._last_moment())
        if self._state is not State.FINISHING:
            if config.max_duration:
                due = min(due, self._started + config.max_duration)
            if config.first_event_timeout and not self._begun:
                due = min(due, self._started + config.first_event_timeout)
            comment = self._comment_due()
            if comment:
                due = min(due, comment)
        if due < math.inf:
            streams.wheel.set(self, due)

    # Ending

    def _emptied(self) -> None:
        if self._state is State.FINISHING:
            self._complete()
        else:
            # The next deadline is a heartbeat again, and that may be sooner.
            self._schedule()

    def _complete(self) -> None:
        self._streams.linger(self._end())

    def _cancel_call(self) -> None:
        """Let go of the backend. An answer that may be continued goes on where its client may come back."""
        call, self._call = self._call, None
        self._attempts = None
        if call is None:
            return
        if self._answer is not None and self._may_come_back():
            self._answer.detach(self)
        else:
            call.cancel()

    def _may_come_back(self) -> bool:
        return self._outcome in _MAY_COME_BACK or (self._answer is not None and self._answer.complete)

    def _leave(self) -> None:
        """Another worker answers: this one was never asked."""
        streams = self._streams
        self._state = State.ENDED
        streams.wheel.cancel(self)
        streams.hangups.remove(self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)
        streams.forget(self)

    def _end(self) -> int:
        """Let go of everything but the descriptor, which the caller gets."""
        streams = self._streams
        self._state = State.ENDED
        if self._out is not None:
            self._unblock()
        fd, self._fd = self._fd, -1
        self._cancel_call()
        streams.wheel.cancel(self)
        streams.hangups.remove(fd)
        if self._address is not None:
            streams.limit.free(self._user, self._address)
        streams.roster.end(fd)
        record = StreamRecord(
            id=self._id,
            request_id=self._request_id,
            client=self._client,
            user=self._user,
            method=self._method,
            path=self._path,
            backend=self._name_of_backend(),
            outcome=self._outcome,
            status=self._status,
            events=self._events,
            bytes=self._bytes,
            first_event=self._first_event,
            duration=streams.wheel.now() - self._started,
            visit=self._visit,
            tries=self._answer.tries if self._answer is not None else self._tries,
            limit=self._limit,
            replay=self._answer.name if self._answer is not None and self._replay else "",
            prompt_tokens=self._usage.prompt_tokens if self._usage is not None else None,
            completion_tokens=self._usage.completion_tokens if self._usage is not None else None,
            trace=self._trace,
        )
        streams.ended(self, record)
        return fd

    def _name_of_backend(self) -> str:
        return self._answer.backend_name if self._answer is not None else self._backend


def _makes_events(backend: Backend) -> bool:
    return not passes_on(backend)


def passes_on(backend: Backend) -> bool:
    """Whether its responses are passed on as they are, head and all."""
    return bool(getattr(backend, "passes_on", False))


def peer_name(fd: int) -> str:
    """``address:port`` of the client at ``fd``, ``unix`` for a local one, empty where it is gone already.

    Apache listens on IPv6 sockets for both families; an IPv4 client is written as Apache's own log writes it, not as
    an IPv4-mapped address (RFC 4291 section 2.5.5.2).
    """
    client = socket.socket(fileno=fd)
    try:
        if client.family == socket.AF_UNIX:
            return "unix"
        address = client.getpeername()
    except OSError:
        return ""
    finally:
        client.detach()
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
