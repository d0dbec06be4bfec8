"""The seam between a stream and its source of answers.

``Backend.start`` begins one answer and reports to a ``Sink``, all from the event loop and never from within ``start``
itself. What a sink hears is one of two sequences, with the same end:

    content | events, any number, mixed   -> done | failed   an answer made of events; usage at most once, before done
    head, then body, any number           -> done | failed   a response passed on as it is

After ``Call.cancel`` the sink hears nothing more. Any call of the sink may lead back into ``pause``, ``resume`` or
``cancel`` of the same call. A sink may get nothing but ``failed``: where that failure is ``retryable``, nothing of an
answer was there and another backend may do better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..envelope import Header, Request
from ..handoff import Handoff

# The kind of a failure for want of descriptors in this process, whatever they were needed for.
EXHAUSTED = "backend_exhausted"


class BackendSetupError(Exception):
    """The backend cannot work as configured; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no (more) answer.

    ``status``, ``kind``, ``message`` and ``retry_after`` are for the client, who learns nothing about hosts behind this
    one; ``detail`` is for the journal. ``retryable``: nothing of an answer came, and the fault is this backend's and
    not the request's.
    """

    status: int
    kind: str
    message: str
    detail: str
    retry_after: str | None = None
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What the backend says the answer cost, in tokens; None where it does not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


class Sink(Protocol):
    """The stream, as its backend sees it."""

    def head(self, status: int, headers: tuple[Header, ...]) -> None:
        """The response is the backend's own, with this status and these headers, hop-by-hop ones removed; ``body``
        follows. Comes before anything else, and only from backends that pass a response on."""

    def body(self, data: bytes) -> None:
        """Bytes of the body that ``head`` announced."""

    def content(self, texts: list[str]) -> None:
        """Chunks of the answer, in order, each to become one event. The first call, also with an empty list, says
        that the backend has begun to answer."""

    def events(self, events: list[bytes]) -> None:
        """Complete server-sent events, each with its blank line at the end, to be sent as they are."""

    def usage(self, usage: Usage) -> None:
        """What the answer cost."""

    def done(self) -> None:
        """The answer is complete."""

    def failed(self, failure: Failure) -> None:
        """There will be no (more) answer."""


class Call(Protocol):
    """One running answer."""

    def pause(self) -> None:
        """The client reads too slowly: produce nothing until ``resume``."""

    def resume(self) -> None: ...

    def cancel(self) -> None:
        """Nobody wants the answer any more: give back what it holds, at once."""


class Backend(Protocol):
    """One configured source of answers.

    One that passes responses on (``head`` and ``body``) says so with an attribute ``passes_on``, which is true: while
    it is asked, nothing of ours goes to the client, no comment and no head.
    """

    @property
    def name(self) -> str: ...

    def start(self, handoff: Handoff, request: Request | None, sink: Sink) -> Call:
        """Begin an answer; raises HandoffError where the handoff lacks what this backend needs. ``request`` is None
        where the message was a plain one."""

    def close(self) -> None:
        """Give back what is kept between calls."""
