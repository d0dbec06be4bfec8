"""Who takes a handoff: the one with the fewest streams, and never nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from conftest import MakeDaemon
from daemon_harness import shaped
from streaming_daemon import balance
from streaming_daemon import board as b
from streaming_daemon.balance import STEPPED_BACK, WATCHING, Balance, Watcher
from streaming_daemon.board import Board, now_ms
from streaming_daemon.wheel import TimerWheel


class Door(Watcher):
    def __init__(self) -> None:
        self.watching = False

    def start(self) -> None:
        self.watching = True

    def pause(self) -> None:
        self.watching = False


class Office:
    """Some workers in one process, all on one loop."""

    def __init__(self, workers: int) -> None:
        self.wheel = TimerWheel(asyncio.get_running_loop())
        self.board = Board.create(8)
        numbers = [self.board.allocate(1) for _ in range(workers)]
        self.slots = [self.board.slot(number or 0) for number in numbers]
        self.balances = [Balance(self.wheel, self.board, number or 0) for number in numbers]
        self.doors = [Door() for _ in numbers]
        for each, door in zip(self.balances, self.doors, strict=True):
            each.start([door])
        for each in self.balances:
            each.refresh()

    def give(self, *active: int) -> None:
        for slot, streams in zip(self.slots, active, strict=True):
            slot[b.ACTIVE] = streams

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def office(workers: int) -> AsyncIterator[Office]:
    yield Office(workers)


async def least_loaded_and_close_ones_take() -> None:
    async with office(3) as three:
        three.give(100, 114, 90)
        assert three.balances[2].mine()
        assert three.balances[0].mine()
        assert not three.balances[1].mine()
        assert [door.watching for door in three.doors] == [True, False, True]
        assert three.slots[1][b.ACCEPTING] == STEPPED_BACK
        await three.until(lambda: three.doors[1].watching)
        assert three.slots[1][b.ACCEPTING] == WATCHING


def test_the_least_loaded_and_those_close_to_it_take() -> None:
    asyncio.run(least_loaded_and_close_ones_take())


async def nobody_waits_for_one_who_does_not_watch() -> None:
    async with office(2) as two:
        two.give(50, 0)
        two.slots[1][b.ACCEPTING] = STEPPED_BACK
        assert two.balances[0].mine()
        two.slots[1][b.ACCEPTING] = 0
        assert two.balances[0].mine()


def test_nobody_steps_back_for_one_that_has_stepped_back_itself_or_drains() -> None:
    asyncio.run(nobody_waits_for_one_who_does_not_watch())


async def a_hung_one_is_not_waited_for_twice() -> None:
    async with office(2) as two:
        two.give(50, 0)
        assert not two.balances[0].mine()
        await two.until(lambda: two.doors[0].watching)
        # Nobody has taken it: this one does, and the next ones too.
        assert two.balances[0].mine()
        assert two.balances[0].mine()
        # Some time later the other one is given a chance again.
        await asyncio.sleep(0.3)
        assert not two.balances[0].mine()
        await two.until(lambda: two.doors[0].watching)
        # It did take something this time.
        two.slots[1][b.ACCEPTED] += 1
        assert not two.balances[0].mine()


def test_a_handoff_waits_one_moment_for_a_worker_that_hangs_and_no_longer() -> None:
    asyncio.run(a_hung_one_is_not_waited_for_twice())


async def a_dead_one_is_not_waited_for() -> None:
    async with office(2) as two:
        two.give(50, 0)
        two.slots[1][b.HEARTBEAT] = now_ms() - 10_000
        two.balances[0].refresh()
        assert two.balances[0].mine()


def test_a_worker_whose_heart_has_stopped_is_not_waited_for_at_all() -> None:
    asyncio.run(a_dead_one_is_not_waited_for())


async def alone() -> None:
    async with office(1) as one:
        one.give(10_000)
        assert one.balances[0].mine()
        one.balances[0].step_back(0.01)
        one.balances[0].stop()
        await asyncio.sleep(0.05)
        assert not one.doors[0].watching
        assert one.slots[0][b.ACCEPTING] == 0


def test_a_worker_alone_takes_all_and_one_that_has_stopped_does_not_start_again() -> None:
    asyncio.run(alone())


async def someone_always_takes() -> None:
    async with office(4) as four:
        # Whatever the loads and in whatever order they look, at least one of them takes.
        for loads in ((0, 0, 0, 0), (5, 10, 20, 40), (40, 20, 10, 5), (1000, 0, 0, 1000), (7, 900, 8, 2)):
            four.give(*loads)
            asked = [each.mine() for each in four.balances]
            assert True in asked
            await four.until(lambda: all(door.watching for door in four.doors))


def test_whatever_the_loads_somebody_takes() -> None:
    asyncio.run(someone_always_takes())


async def full_ones_leave_it() -> None:
    async with office(3) as three:
        for slot in three.slots:
            slot[b.CAPACITY], slot[b.HEARTBEAT] = 3, now_ms()
        three.give(3, 2, 3)
        # As few as they are: who is full can only say 503.
        assert not three.balances[0].mine()
        assert three.balances[1].mine()
        await three.until(lambda: three.doors[0].watching)
        # Also for one who does not watch at this moment.
        three.slots[1][b.ACCEPTING] = STEPPED_BACK
        assert not three.balances[0].mine()
        # Who is about to be full has no room, nor has one who takes none any more.
        three.slots[1][b.PENDING] = 1
        assert three.balances[0].mine()
        three.slots[1][b.PENDING] = 0
        three.slots[1][b.ACCEPTING] = 0
        three.slots[1][b.DRAINING] = 1
        assert three.balances[0].mine()
        # One that is about to begin will have.
        three.slots[1][b.DRAINING] = 0
        assert not three.balances[0].mine()
        await three.until(lambda: three.doors[0].watching)
        # All are full: nobody waits for anything.
        three.slots[1][b.ACCEPTING] = WATCHING
        three.give(3, 3, 3)
        assert [each.mine() for each in three.balances] == [True] * 3


def test_a_full_worker_leaves_a_handoff_to_one_that_has_room() -> None:
    asyncio.run(full_ones_leave_it())


async def patience_ends() -> None:
    async with office(2) as two:
        for slot in two.slots:
            slot[b.CAPACITY], slot[b.HEARTBEAT] = 3, now_ms()
        two.give(3, 0)
        begin = two.wheel.now()
        while not two.balances[0].mine():
            await two.until(lambda: two.doors[0].watching)
        waited = two.wheel.now() - begin
        assert waited >= balance._PATIENCE
        # The other one hangs, which the next need not find out again; once it has taken one, it does not.
        assert two.balances[0].mine()
        two.slots[1][b.ACCEPTED] += 1
        assert not two.balances[0].mine()


def test_the_patience_for_one_that_does_not_take_it_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "_PATIENCE", 0.2)
    asyncio.run(patience_ends())


def test_no_client_is_told_503_while_any_worker_has_room(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nworkers = 2\nmax_streams = 4").start()
    clients = [daemon.hand(shaped(1000, 1)) for _ in range(8)]
    heads = [client.read_until(b"\r\n\r\n").split()[1] for client in clients]
    assert heads == [b"200"] * 8
    assert daemon.ask(shaped(1)).status == 503
    for client in clients:
        client.close()
