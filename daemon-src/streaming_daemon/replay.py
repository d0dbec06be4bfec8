"""Answers that their clients may continue: numbered events, kept for a while.

An ``Answer`` stands between a backend, whose Sink it is, and a stream, for which it is the Call. Its reader may leave
(``detach``) and another come (``attach``): the backend does not notice. States of an ``Answer``:

    RUNNING, with a reader     events go to the reader and into the buffer
    RUNNING, without           into the buffer; after ``away`` seconds the backend is cancelled and all is forgotten
    COMPLETE                   the last event is in the buffer; ``keep`` seconds later it is forgotten

The buffer holds the newest events, at most so many bytes. Without a reader the backend is paused when half of them are
events that nobody has read, so that none of those is lost; the other half is for what a client had not received yet
when its connection broke.

Who may continue an answer: whoever names its id, which nobody can guess, and is the same user, to Apache and to the
application. An answer has one reader; a new one takes the place of the old, whose connection is dead as a rule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Protocol

from . import http_response as http
from .access_log import log, quote
from .attempts import Attempts
from .backends.base import Call, Failure, Usage
from .config import ResumeConfig
from .envelope import Header, Request
from .handoff import MAX_EVENT_NUMBER, Handoff, HandoffError
from .limits import Admission, Memory
from .wheel import Timed, TimerWheel

_HEADER = "last-event-id"
# What an event costs besides its bytes: the object and its place.
_OVERHEAD = 48


class Reader(Protocol):
    """The stream, as its answer sees it."""

    def events(self, events: list[bytes]) -> None: ...

    def usage(self, usage: Usage) -> None: ...

    def last(self, event: bytes, outcome: str) -> None:
        """The last event of the answer; nothing follows."""

    def failed(self, failure: Failure) -> None:
        """There is no answer, not even one event."""

    def superseded(self) -> None:
        """Another one reads now."""


class Index(Protocol):
    """Tells other workers whose an answer is."""

    def claim(self, key: str) -> None: ...

    def release(self, key: str) -> None: ...


class MissedError(Exception):
    """The events behind the wanted one are not kept any more, or never were."""


class Answers:
    """The answers of one worker that may be continued, by their keys."""

    def __init__(
        self,
        config: ResumeConfig,
        wheel: TimerWheel,
        memory: Memory,
        admission: Admission,
        relieve: Callable[[], None],
        *,
        index: Index | None,
    ) -> None:
        self.config = config
        self.wheel = wheel
        self.memory = memory
        self.admission = admission
        # Called where memory is full, and may cancel any answer, also the one that is being written.
        self.relieve = relieve
        self._index = index
        self._answers: dict[str, Answer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def open(self, key: str, attempts: Attempts, seat: tuple[str, str], reader: Reader, name: str) -> Answer:
        """An answer that nobody knows yet, and the place (user, address) that was taken for it; ``name`` is for the
        log."""
        answer = Answer(self, key, attempts, seat, reader, name=name)
        self._answers[key] = answer
        if self._index is not None:
            self._index.claim(key)
        return answer

    def forget(self, answer: Answer) -> None:
        # Another one may have its name by now.
        if self._answers.get(answer.key) is answer:
            del self._answers[answer.key]
            if self._index is not None:
                self._index.release(answer.key)

    def largest(self) -> Answer | None:
        return max(self._answers.values(), key=lambda answer: answer.size, default=None)

    def end_unread(self) -> None:
        """The worker has to go: end the answers that have no reader to tell."""
        for answer in list(self._answers.values()):
            if not answer.read:
                answer.cancel()


class Answer(Timed):
    """One answer. Sink of its backend's call, Call of its reader."""

    __slots__ = (
        "_answers",
        "_attempts",
        "_call",
        "_events",
        "_next",
        "_outcome",
        "_paused",
        "_reader",
        "_seat",
        "_unread",
        "backend_name",
        "key",
        "name",
        "size",
        "tries",
    )

    def __init__(
        self, answers: Answers, key: str, attempts: Attempts, seat: tuple[str, str], reader: Reader, *, name: str
    ) -> None:
        super().__init__()
        self.key = key
        self.size = 0
        self.backend_name = attempts.backend.name
        self.tries = 0
        self._answers = answers
        self._attempts: Attempts | None = attempts
        self._seat: tuple[str, str] | None = seat
        self._reader: Reader | None = reader
        self.name = name
        self._call: Call | None = None
        self._paused = False
        self._outcome = ""
        # The newest events; the number of the next one. Bytes that came since there was no reader.
        # A list, though it is cut at its front: a deque takes 600 bytes before it has anything in it.
        self._events: list[bytes] = []
        self._next = 1
        self._unread = 0

    @property
    def read(self) -> bool:
        """Whether it has a reader now."""
        return self._reader is not None

    @property
    def complete(self) -> bool:
        """Whether its last event is there."""
        return bool(self._outcome)

    def begin(self) -> None:
        """Start the backend; raises HandoffError, and is forgotten then."""
        assert self._attempts is not None  # noqa: S101 - nothing was tried yet
        try:
            self._call = self._attempts.first(self)
        except BaseException:
            self.cancel()
            raise
        self.tries = 1

    # From streams

    def attach(self, reader: Reader, after: int) -> tuple[list[bytes], str]:
        """Read on behind event ``after``: the events that are there, and the outcome where no others will follow; such
        an answer needs no reader, and does not live any longer for it. Raises MissedError."""
        if after >= self._next:
            raise MissedError(f"event {after} of {self._next - 1}")
        count = self._next - 1 - after
        if count > len(self._events):
            raise MissedError(f"event {after + 1}, the oldest kept is {self._next - len(self._events)}")
        events = self._events[len(self._events) - count :]
        if not self._outcome:
            before, self._reader = self._reader, reader
            if before is not None:
                before.superseded()
            self._answers.wheel.cancel(self)
            self._unread = 0
            self._go_on()
        return events, self._outcome

    def detach(self, reader: Reader) -> None:
        """The reader's client is gone; it may come back."""
        if self._reader is reader:
            self._reader = None
            self._go_on()
            config = self._answers.config
            self._wait(config.keep if self._outcome else config.away)

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._reader = None
        self._answers.wheel.cancel(self)
        self._settle()
        self._clear()
        self._answers.forget(self)

    def pause(self) -> None:
        if self._call is not None and not self._paused:
            self._paused = True
            self._call.pause()

    def resume(self) -> None:
        self._go_on()

    def shed(self) -> None:
        """Memory is short: give up what can be given up without cutting off a reader."""
        if self._reader is None:
            self.cancel()
        else:
            self._clear()

    def on_timer(self, now: float) -> None:
        if not self._outcome:
            log.info("id=%s nobody came back for the rest of the answer", quote(self.name))
        self.cancel()

    # From the backend

    def head(self, status: int, headers: tuple[Header, ...]) -> None:
        """Backends that pass a response on are not asked for answers like this."""

    def body(self, data: bytes) -> None: ...

    def content(self, texts: list[str]) -> None:
        self.events([http.content_event(text) for text in texts])

    def events(self, events: list[bytes]) -> None:
        if self._outcome:
            return
        if events:
            self._attempts = None
        first = self._next
        numbered = [http.numbered(event, first + index) for index, event in enumerate(events)]
        self._keep(numbered)
        if self._reader is not None:
            self._reader.events(numbered)

    def usage(self, usage: Usage) -> None:
        if self._reader is not None:
            self._reader.usage(usage)

    def done(self) -> None:
        self._end(http.DONE, "done")

    def failed(self, failure: Failure) -> None:
        self._call = None
        self._paused = False
        attempts = self._attempts
        if attempts is not None and failure.retryable:
            log.warning("id=%s backend=%s: %s", quote(self.name), quote(self.backend_name), failure.detail)
            self._call = attempts.next(self)
            if self._call is not None:
                self.backend_name, self.tries = attempts.backend.name, attempts.tries
                return
        if self._next == 1 and self._reader is not None:
            # Nothing to continue: the client is told with a real status, and may ask anew under the same id.
            reader, self._reader = self._reader, None
            self.cancel()
            reader.failed(failure)
            return
        log.warning("id=%s backend=%s: %s", quote(self.name), quote(self.backend_name), failure.detail)
        self._end(http.error_event(failure.kind, failure.message), "backend_error")

    # Inside

    def _end(self, event: bytes, outcome: str) -> None:
        if self._outcome:
            return
        self._call = None
        self._settle()
        self._outcome = outcome
        event = http.numbered(event, self._next)
        self._keep([event])
        self._wait(self._answers.config.keep)
        if self._reader is not None:
            self._reader.last(event, outcome)

    def _keep(self, events: list[bytes]) -> None:
        most = self._answers.config.buffer
        self._next += len(events)
        self._events.extend(events)
        added = sum(map(len, events)) + _OVERHEAD * len(events)
        dropped = count = 0
        while self.size + added - dropped > most and count < len(self._events):
            dropped += len(self._events[count]) + _OVERHEAD
            count += 1
        if count:
            del self._events[:count]
        self.size += added - dropped
        self._answers.memory.replay(added - dropped)
        if self._reader is None:
            self._unread += added
            if self._unread > most // 2:
                self.pause()
        if self._answers.memory.full:
            self._answers.relieve()

    def _clear(self) -> None:
        self._events.clear()
        self._answers.memory.replay(-self.size)
        self.size = 0

    def _go_on(self) -> None:
        if self._paused:
            self._paused = False
            if self._call is not None:
                self._call.resume()

    def _settle(self) -> None:
        """Nothing more is wanted of the backend: give back what the running answer holds."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
        self._attempts = None
        seat, self._seat = self._seat, None
        if seat is not None:
            self._answers.admission.free(*seat)

    def _wait(self, seconds: float) -> None:
        wheel = self._answers.wheel
        wheel.set(self, wheel.now() + seconds)


def key_of(handoff: Handoff, request: Request | None) -> str:
    """What a handoff has to be equal in to continue an answer; no secret can be read from it."""
    assert handoff.resume is not None  # noqa: S101 - asked for such handoffs only
    owner = [request.user if request else None, handoff.user, handoff.resume.id]
    return hashlib.blake2b(json.dumps(owner).encode(), digest_size=20).hexdigest()


def wanted_after(handoff: Handoff, request: Request | None) -> int:
    """The last event that the client has, 0 for none: as the application says, or else its browser. Raises
    HandoffError."""
    if handoff.resume is not None and handoff.resume.after is not None:
        return handoff.resume.after
    for name, value in request.headers if request else ():
        if name.lower() == _HEADER and value.strip():
            text = value.strip()
            if text.isascii() and text.isdigit() and len(text) <= len(str(MAX_EVENT_NUMBER)):
                return int(text)
            raise HandoffError("Last-Event-ID", "of another form", "the id of an event of this answer")
    return 0
