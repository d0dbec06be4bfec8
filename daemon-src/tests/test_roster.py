"""The names of a dead worker's streams: kept by the worker, read by the supervisor, in spite of everything."""

from __future__ import annotations

import os

import pytest

from streaming_daemon import roster
from streaming_daemon.roster import Roster


@pytest.fixture
def fd() -> int:
    return roster.create()


def test_what_has_begun_and_not_ended_is_unfinished(fd: int) -> None:
    book = Roster(os.dup(fd))
    for number in range(5, 40):
        book.begin(number, f"stream-{number}")
    for number in range(7, 40):
        book.end(number)
    assert roster.unfinished(fd) == ["stream-5", "stream-6"]
    book.begin(5, "another")
    assert roster.unfinished(fd) == ["another", "stream-6"]


def test_any_name_fits_and_none_reaches_into_the_next_entry(fd: int) -> None:
    book = Roster(os.dup(fd))
    book.begin(3, "x" * 128)
    book.begin(4, "ü" * 128)
    book.begin(5, "")
    assert roster.unfinished(fd) == ["x" * 63, "ü" * 31 + "�"]


def test_descriptors_beyond_the_table_are_nobodys_fault(fd: int) -> None:
    book = Roster(os.dup(fd))
    book.begin(1 << 40, "far")
    book.end(1 << 40)
    book.end(-1)
    assert roster.unfinished(fd) == []


def test_a_worker_that_never_wrote_and_one_without_a_supervisor_are_fine(fd: int) -> None:
    assert roster.unfinished(fd) == []
    assert roster.unfinished(-1) == []
    Roster().begin(3, "unheard")


def test_memory_is_used_for_streams_and_not_for_room(fd: int) -> None:
    book = Roster(os.dup(fd))
    for number in range(10):
        book.begin(number, "s")
    assert os.fstat(fd).st_blocks * 512 <= 4096
