"""Who takes a handoff: the one with the fewest streams, and never nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

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
        for balance, door in zip(self.balances, self.doors, strict=True):
            balance.start([door])
        for balance in self.balances:
            balance.refresh()

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
            asked = [balance.mine() for balance in four.balances]
            assert True in asked
            await four.until(lambda: all(door.watching for door in four.doors))


def test_whatever_the_loads_somebody_takes() -> None:
    asyncio.run(someone_always_takes())
