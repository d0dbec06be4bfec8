"""The backends that may answer one handoff, in order, as long as another one may be asked.

Who holds an ``Attempts`` may still turn to the next backend; it lets go of it, and of the conversation in it, with the
first byte of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .backends.base import Backend, Call, Sink
from .envelope import Request
from .handoff import Handoff, HandoffError


class Attempts:
    __slots__ = ("_candidates", "_handoff", "_request", "tries")

    def __init__(self, candidates: Sequence[Backend], handoff: Handoff, request: Request | None) -> None:
        self._candidates = candidates
        self._handoff = handoff
        self._request = request
        self.tries = 0

    @property
    def backend(self) -> Backend:
        """The one that was asked last, or will be asked first."""
        return self._candidates[max(0, self.tries - 1)]

    @property
    def left(self) -> int:
        return len(self._candidates) - self.tries

    def first(self, sink: Sink) -> Call:
        """Ask the first backend; raises HandoffError where the handoff lacks what it needs."""
        self.tries = 1
        return self.backend.start(self._handoff, self._request, sink)

    def next(self, sink: Sink, skip: Callable[[Backend], bool] | None = None) -> Call | None:
        """Ask the next backend that can do with the handoff and is not to be skipped; None where there is none."""
        while self.left:
            self.tries += 1
            if skip is not None and skip(self.backend):
                continue
            try:
                return self.backend.start(self._handoff, self._request, sink)
            except HandoffError:
                continue
        return None
