"""The seam between a stream and its source of text.

``Backend.start`` begins one answer and reports to a ``Sink``: any number of ``content``, then exactly one ``done`` or
``failed``, all from the event loop and never from within ``start`` itself. After ``Call.cancel`` the sink hears nothing
more. Any call of the sink may lead back into ``pause``, ``resume`` or ``cancel`` of the same call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..handoff import Handoff


class BackendSetupError(Exception):
    """The backend cannot work as configured; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no (more) answer.

    ``status``, ``kind``, ``message`` and ``retry_after`` are for the client, who learns nothing about hosts behind this
    one; ``detail`` is for the journal.
    """

    status: int
    kind: str
    message: str
    detail: str
    retry_after: str | None = None


class Sink(Protocol):
    """The stream, as its backend sees it."""

    def content(self, texts: list[str]) -> None:
        """Chunks of the answer, in order, each to become one event. The first call, also with an empty list, says
        that the backend has begun to answer."""

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
    """One configured source of text."""

    @property
    def name(self) -> str: ...

    def start(self, handoff: Handoff, sink: Sink) -> Call:
        """Begin an answer; raises HandoffError where the handoff lacks what this backend needs."""

    def close(self) -> None:
        """Give back what is kept between calls."""
