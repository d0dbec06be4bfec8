"""Counts what backends are asked and how they answer, between whoever asks and the backend.

A ``Metered`` is a backend that counts for its worker's slot of the board; see there for what the words mean. An answer
that nobody wants any more (``cancel``) is a request without a duration.
"""

from __future__ import annotations

import time

from .. import board
from ..board import Slot, backend_block, observe
from ..envelope import Header, Request
from ..handoff import Handoff
from .base import Backend, Call, Failure, Sink, Usage


class Metered:
    """``backend``, and nobody can tell the difference."""

    def __init__(self, backend: Backend, slot: Slot) -> None:
        self._backend = backend
        self._slot = slot
        self._block = backend_block(slot, backend.name)
        self.name = backend.name
        self.passes_on = bool(getattr(backend, "passes_on", False))

    def start(self, handoff: Handoff, request: Request | None, sink: Sink) -> Call:
        call = self._backend.start(handoff, request, _MeteredSink(sink, self._slot, self._block))
        self._slot[self._block + board.BACKEND_REQUESTS] += 1
        return call

    def close(self) -> None:
        self._backend.close()


class _MeteredSink:
    """Passes everything on. ``content`` and ``events`` are called for every few words of every answer."""

    __slots__ = ("_begun", "_block", "_sink", "_slot", "_started")

    def __init__(self, sink: Sink, slot: Slot, block: int) -> None:
        self._sink = sink
        self._slot = slot
        self._block = block
        self._started = time.monotonic()
        self._begun = False

    def head(self, status: int, headers: tuple[Header, ...]) -> None:
        self._begin()
        self._sink.head(status, headers)

    def body(self, data: bytes) -> None:
        self._slot[self._block + board.BACKEND_EVENTS] += 1
        self._sink.body(data)

    def content(self, texts: list[str]) -> None:
        if not self._begun:
            self._begin()
        self._slot[self._block + board.BACKEND_EVENTS] += len(texts)
        self._sink.content(texts)

    def events(self, events: list[bytes]) -> None:
        if not self._begun:
            self._begin()
        self._slot[self._block + board.BACKEND_EVENTS] += len(events)
        self._sink.events(events)

    def usage(self, usage: Usage) -> None:
        self._slot[self._block + board.TOKENS_PROMPT] += usage.prompt_tokens or 0
        self._slot[self._block + board.TOKENS_COMPLETION] += usage.completion_tokens or 0
        self._sink.usage(usage)

    def done(self) -> None:
        self._end()
        self._sink.done()

    def failed(self, failure: Failure) -> None:
        self._slot[self._block + board.BACKEND_ERRORS] += 1
        self._end()
        self._sink.failed(failure)

    def _begin(self) -> None:
        self._begun = True
        observe(self._slot, board.BACKEND_TTFB, time.monotonic() - self._started, self._block)

    def _end(self) -> None:
        observe(self._slot, board.BACKEND_DURATION, time.monotonic() - self._started, self._block)
