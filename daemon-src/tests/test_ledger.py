"""Every ended stream is in the totals exactly once, under what became of it."""

from __future__ import annotations

import dataclasses

import pytest

from streaming_daemon import board as b
from streaming_daemon.access_log import StreamRecord
from streaming_daemon.board import Board
from streaming_daemon.ledger import Ledger

RECORD = StreamRecord(
    id="a",
    request_id="r",
    client="192.0.2.1:4711",
    user="alice",
    method="GET",
    path="/stream.php",
    backend="openai",
    outcome="done",
    status=200,
    events=3,
    bytes=300,
    first_event=0.2,
    duration=1.5,
)


def entered(**changes: object) -> b.Totals:
    board, number = Board.private()
    Ledger(board.slot(number)).finished(dataclasses.replace(RECORD, **changes))  # type: ignore[arg-type]
    return board.totals()


@pytest.mark.parametrize("outcome", [*b.STREAMS, "an outcome of a later release"])
def test_every_outcome_is_counted_once(outcome: str) -> None:
    words = entered(outcome=outcome).words
    assert sum(words[index] for index in b.STREAMS.values()) == 1
    assert words[b.STREAMS.get(outcome, b.STREAMS["other"])] == 1


def test_a_client_that_came_back_for_its_answer_has_an_outcome_of_its_own() -> None:
    assert entered(outcome="resumed").words[b.STREAMS["resumed"]] == 1


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("done", None),
        ("bad_request", None),
        ("overloaded", None),
        ("resumed", None),
        ("client_gone", "client_disconnected"),
        ("write_timeout", "slow_client"),
        ("buffer_full", "slow_client"),
        ("timeout", "timeout"),
        ("backend_error", "backend"),
        ("drained", "canceled"),
        ("unheard of", "other"),
    ],
)
def test_a_broken_stream_is_an_error_with_the_reason_that_dashboards_know(outcome: str, reason: str | None) -> None:
    words = entered(outcome=outcome).words
    counted = {value for value, index in b.STREAM_ERRORS.items() if words[index]}
    assert counted == ({reason} if reason else set())
    assert words[b.SLOW_CLIENTS] == (1 if reason == "slow_client" else 0)


def test_a_stream_without_an_event_has_no_time_to_its_first() -> None:
    def count(totals: b.Totals, histogram: b.Histogram) -> int:
        return sum(totals.words[histogram.index : histogram.index + len(histogram.bounds) + 1])

    assert count(entered(first_event=None), b.FIRST_EVENT) == 0
    assert count(entered(first_event=0.0), b.FIRST_EVENT) == 1
    assert count(entered(first_event=None), b.STREAM_DURATION) == 1


def test_a_refused_stream_is_counted_by_the_limit_that_refused_it() -> None:
    words = entered(outcome="overloaded", limit="user", tries=0).words
    assert words[b.LIMITED["user"]] == words[b.REJECTED] == 1
    assert words[b.RETRIES] == 0


def test_retries_and_replays_are_counted() -> None:
    words = entered(tries=3, replay="x").words
    assert (words[b.RETRIES], words[b.REPLAYS]) == (2, 1)
