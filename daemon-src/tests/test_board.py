"""The shared numbers: what a worker counts is never lost, never counted twice, and never read half-moved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from streaming_daemon import board as b
from streaming_daemon.board import Board, BoardError, backend_block, join, observe

SOURCE = Path(__file__).resolve().parent.parent


def test_totals_are_sums_over_all_workers() -> None:
    board = Board.create(8)
    for streams in (3, 4):
        number = board.allocate(1)
        assert number is not None
        slot = board.slot(number)
        slot[b.ACTIVE] += streams
        slot[b.EVENTS] += 10 * streams
    assert board.total(b.ACTIVE) == 7
    assert board.total(b.EVENTS) == 70
    assert board.totals().words[b.EVENTS] == 70


def test_no_total_goes_back_when_a_worker_is_folded_and_its_slot_used_again() -> None:
    board = Board.create(2)
    first = board.allocate(1)
    assert first == 1
    slot = board.slot(first)
    slot[b.BYTES_SENT] += 1000
    slot[b.PEAK] = 9
    slot[b.ACTIVE] = 2
    observe(slot, b.STREAM_DURATION, 0.5)
    slot[backend_block(slot, "openai") + b.BACKEND_REQUESTS] += 5
    before = board.totals()

    assert board.fold(first) == 2

    after = board.totals()
    assert after.words[b.BYTES_SENT] == before.words[b.BYTES_SENT] == 1000
    assert after.words[b.PEAK] == 9
    assert after.words[b.ACTIVE] == 0
    assert after.words[b.STREAMS_LOST] == 2
    assert after.backends["openai"][b.BACKEND_REQUESTS] == 5
    first_bucket = b.STREAM_DURATION.index
    row = slice(first_bucket, first_bucket + b.STREAM_DURATION.words)
    assert after.words[row] == before.words[row]
    assert board.allocate(2) == first
    assert not any(board.slot(first)[b.ACTIVE : b.ACTIVE + 5])


def test_a_killed_worker_leaves_what_it_counted() -> None:
    board = Board.create(2)
    number = board.allocate(1)
    program = f"""
        import os, signal
        from streaming_daemon import board
        shared, number, reason = board.join({board.fd}, {number})
        assert not reason
        shared.slot(number)[board.EVENTS] += 41
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    worker = subprocess.run(command, pass_fds=[board.fd], env=environment, check=False, timeout=30)
    assert worker.returncode == -signal.SIGKILL
    assert board.total(b.EVENTS) == 41
    assert number is not None
    board.fold(number)
    assert board.total(b.EVENTS) == 41


def test_backends_are_told_apart_by_name_and_not_by_the_order_of_their_first_use() -> None:
    board = Board.create(2)
    for names in (("demo", "openai"), ("openai", "a.name-with_64-characters." * 2 + "twelve.chars")):
        number = board.allocate(1)
        assert number is not None
        slot = board.slot(number)
        for name in names:
            slot[backend_block(slot, name) + b.BACKEND_REQUESTS] += 1
    assert {name: words[b.BACKEND_REQUESTS] for name, words in board.totals().backends.items()} == {
        "demo": 1,
        "openai": 2,
        "a.name-with_64-characters." * 2 + "twelve.chars": 1,
    }
    before = board.totals().backends
    board.fold(2)
    board.fold(1)
    assert board.totals().backends == before


def test_backends_beyond_the_last_block_are_counted_as_other() -> None:
    board, number = Board.private()
    slot = board.slot(number)
    for index in range(b.MAX_BACKENDS + 7):
        slot[backend_block(slot, f"backend{index}") + b.BACKEND_REQUESTS] += 1
    backends = board.totals().backends
    assert len(backends) == b.MAX_BACKENDS
    assert backends["other"][b.BACKEND_REQUESTS] == 8


def test_a_duration_is_counted_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    board, number = Board.private()
    slot = board.slot(number)
    for seconds in (0.0, 0.01, 0.0100001, 1e6):
        observe(slot, b.STREAM_DURATION, seconds)
    first = b.STREAM_DURATION.index
    buckets = slot[first : first + b.STREAM_DURATION.words].tolist()
    assert buckets[:3] == [2, 1, 0]
    assert buckets[-2] == 1
    assert buckets[-1] == pytest.approx((1e6 + 0.0200001) * 1e9)


def test_all_slots_taken_is_no_error_but_a_worker_that_counts_for_itself() -> None:
    board = Board.create(1)
    assert board.allocate(1) == 1
    assert board.allocate(1) is None
    private, number, reason = join(None, None)
    assert reason
    private.slot(number)[b.EVENTS] += 1
    assert board.total(b.EVENTS) == 0


@pytest.mark.parametrize("kind", ["another version", "no board", "short", "a slot too many"])
def test_a_worker_that_cannot_share_counts_on_a_private_board(kind: str, tmp_path: Path) -> None:
    board = Board.create(2)
    fd, number = board.fd, 1
    if kind == "another version":
        board._words[1] = 99
    elif kind == "a slot too many":
        number = 3
    else:
        path = tmp_path / "file"
        path.write_bytes(b"x" if kind == "short" else bytes(100))
        fd = os.open(path, os.O_RDWR)
    private, own, reason = join(fd, number)
    assert reason
    private.slot(own)[b.EVENTS] += 3
    assert private.total(b.EVENTS) == 3
    assert board.total(b.EVENTS) == 0


def test_a_reader_never_sees_numbers_on_their_way_from_a_slot_to_the_past() -> None:
    board = Board.create(4)
    number = board.allocate(1)
    assert number is not None
    board.slot(number)[b.EVENTS] = 1_000
    reader = Board.attach(os.dup(board.fd))
    pid = os.fork()
    if not pid:
        # The child is the supervisor: it folds and starts anew, again and again.
        for _ in range(2_000):
            board.fold(number)
            board.allocate(1)
        os._exit(0)
    seen = set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        seen.add(reader.total(b.EVENTS))
        seen.add(reader.totals().words[b.EVENTS])
    assert seen <= {1_000}


def test_a_number_that_a_fault_made_huge_stops_at_the_largest() -> None:
    board = Board.create(2)
    for _ in range(3):
        number = board.allocate(1)
        assert number is not None
        board.slot(number)[b.EVENTS] = 1 << 62
        board.fold(number)
    assert board.slot(b.PAST)[b.EVENTS] == (1 << 63) - 1


def test_what_was_read_while_a_slot_was_folded_is_read_again() -> None:
    board = Board.create(2)
    number = board.allocate(1)
    assert number is not None
    board.slot(number)[b.EVENTS] = 5
    seen: list[int] = []

    def read() -> int:
        past = board.slot(b.PAST)[b.EVENTS]
        if not seen:
            board.fold(number)
        seen.append(past + board.slot(number)[b.EVENTS])
        return seen[-1]

    assert board._consistent(read) == 5
    assert seen == [0, 5]


def test_a_reader_that_comes_while_a_slot_is_being_folded_reads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board.create(2)
    with board._changing():
        monkeypatch.setattr(b, "_READ_TRIES", 7)
        seen: list[int] = []
        board._consistent(lambda: seen.append(1))
        assert len(seen) == 7
    board._consistent(lambda: seen.append(1))
    assert len(seen) == 8


def test_a_reader_does_not_wait_for_a_supervisor_that_died_while_folding() -> None:
    board = Board.create(1)
    board._words[3] += 1
    assert board.total(b.EVENTS) == 0


def test_the_peak_of_all_workers_is_seen_by_a_beat() -> None:
    board = Board.create(3)
    numbers = [board.allocate(1) for _ in range(3)]
    for number in numbers:
        assert number is not None
        board.slot(number)[b.ACTIVE] = 5
    board.beat(1)
    for number in numbers:
        assert number is not None
        board.slot(number)[b.ACTIVE] = 1
        board.fold(number)
    assert board.totals().peak_streams == 15


def test_the_supervisors_own_counters_live_in_the_past() -> None:
    board = Board.create(1)
    board.slot(b.PAST)[b.RELOADS] += 1
    assert board.totals().words[b.RELOADS] == 1


def test_there_is_no_slot_outside_the_board() -> None:
    board = Board.create(1)
    for number in (-1, 2):
        with pytest.raises(BoardError):
            board.slot(number)


# What older releases wrote must go on meaning the same: these numbers never change.
def test_words_do_not_move_between_releases() -> None:
    assert (b.VERSION, b.SLOT_WORDS, b.MAX_BACKENDS) == (1, 4096, 32)
    assert (b.TAKEN, b.ACTIVE, b.PENDING, b.PEAK, b.ACCEPTED) == (0, 6, 7, 64, 96)
