"""What a backend is asked and answers is counted under its name, and passed on as if nobody had counted."""

from __future__ import annotations

from typing import Any

import pytest

from streaming_daemon import board as b
from streaming_daemon.backends.base import Call, Failure, Sink, Usage
from streaming_daemon.backends.meter import Metered
from streaming_daemon.board import Board
from streaming_daemon.handoff import Handoff, HandoffError

FAILURE = Failure(502, "backend_error", "sorry", "why")


class Source:
    """A backend that remembers its sink."""

    name = "source"
    sink: Sink
    error: HandoffError | None = None

    def start(self, handoff: Handoff, request: object, sink: Sink) -> Call:
        if self.error:
            raise self.error
        self.sink = sink
        return Quiet()

    def close(self) -> None: ...


class Quiet:
    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def cancel(self) -> None: ...


class Heard:
    """A sink that remembers what it heard."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.calls.append((name, *values))


class Bench:
    def __init__(self) -> None:
        self.board, number = Board.private()
        self.source = Source()
        self.backend = Metered(self.source, self.board.slot(number))
        self.heard = Heard()

    def start(self) -> Sink:
        self.backend.start(Handoff(), None, self.heard)
        return self.source.sink

    def counted(self, index: int) -> int:
        return self.board.totals().backends["source"][index]

    def observed(self, histogram: b.Histogram) -> int:
        words = self.board.totals().backends["source"]
        return sum(words[histogram.index : histogram.index + len(histogram.bounds) + 1])


def test_everything_is_passed_on_in_order() -> None:
    bench = Bench()
    sink = bench.start()
    usage = Usage(3, 4, 7)
    sink.content([])
    sink.content(["a", "b"])
    sink.events([b"data: x\n\n"])
    sink.usage(usage)
    sink.done()
    assert bench.heard.calls == [
        ("content", []),
        ("content", ["a", "b"]),
        ("events", [b"data: x\n\n"]),
        ("usage", usage),
        ("done",),
    ]
    assert [bench.counted(index) for index in (b.BACKEND_REQUESTS, b.BACKEND_EVENTS, b.BACKEND_ERRORS)] == [1, 3, 0]
    assert [bench.counted(index) for index in (b.TOKENS_PROMPT, b.TOKENS_COMPLETION)] == [3, 4]
    assert bench.observed(b.BACKEND_TTFB) == bench.observed(b.BACKEND_DURATION) == 1


def test_a_response_passed_on_as_it_is_begins_with_its_head() -> None:
    bench = Bench()
    sink = bench.start()
    sink.head(200, (("a", "b"),))
    assert bench.observed(b.BACKEND_TTFB) == 1
    sink.body(b"x")
    sink.done()
    assert [call[0] for call in bench.heard.calls] == ["head", "body", "done"]
    assert bench.observed(b.BACKEND_TTFB) == 1


def test_a_failure_before_an_answer_is_an_error_without_a_first_byte() -> None:
    bench = Bench()
    bench.start().failed(FAILURE)
    assert bench.heard.calls == [("failed", FAILURE)]
    assert bench.counted(b.BACKEND_ERRORS) == 1
    assert (bench.observed(b.BACKEND_TTFB), bench.observed(b.BACKEND_DURATION)) == (0, 1)


def test_a_handoff_that_is_refused_is_no_request() -> None:
    bench = Bench()
    bench.source.error = HandoffError("prompt", "", "is missing")
    with pytest.raises(HandoffError):
        bench.start()
    assert bench.counted(b.BACKEND_REQUESTS) == 0


@pytest.mark.parametrize("passes_on", [True, False])
def test_a_metered_backend_is_like_the_one_it_meters(passes_on: bool) -> None:
    source = Source()
    source.passes_on = passes_on  # type: ignore[attr-defined]
    board, number = Board.private()
    metered = Metered(source, board.slot(number))
    assert (metered.name, metered.passes_on) == ("source", passes_on)
