"""The timer wheel on a loop whose clock the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from streaming_daemon.wheel import GRANULARITY, Timed, TimerWheel


class FakeLoop:
    """The part of a loop that the wheel uses. ``early`` makes timers fire too early, as uvloop's may."""

    def __init__(self, early: float = 0.0) -> None:
        self.clock = 1000.0
        self.early = early
        self.timers: list[FakeTimer] = []
        self.fired = 0

    def time(self) -> float:
        return self.clock

    def call_later(self, delay: float, action: Callable[[], None]) -> FakeTimer:
        assert delay > 0
        timer = FakeTimer(self, self.clock + delay, action)
        self.timers.append(timer)
        return timer

    def call_soon(self, action: Callable[[], None]) -> FakeTimer:
        self.timers.append(timer := FakeTimer(self, self.clock, action))
        return timer

    def advance(self, seconds: float) -> None:
        end = self.clock + seconds
        while self.timers and (timer := min(self.timers, key=lambda timer: timer.when)).when - self.early <= end:
            self.timers.remove(timer)
            self.clock = max(self.clock, timer.when - self.early)
            self.fired += 1
            timer.action()
        self.clock = end


class FakeTimer:
    def __init__(self, loop: FakeLoop, when: float, action: Callable[[], None]) -> None:
        self.loop = loop
        self.when = when
        self.action = action

    def cancel(self) -> None:
        self.loop.timers.remove(self)


class Item(Timed):
    def __init__(self, action: Callable[[float], Any] | None = None) -> None:
        super().__init__()
        self.woken: list[float] = []
        self.action = action

    def on_timer(self, now: float) -> None:
        self.woken.append(now)
        if self.action is not None:
            self.action(now)


def make(early: float = 0.0) -> tuple[FakeLoop, TimerWheel]:
    loop = FakeLoop(early)
    return loop, TimerWheel(cast(asyncio.AbstractEventLoop, loop))


def test_deadlines_are_never_early_and_at_most_a_slot_late() -> None:
    for early in (0.0, 0.0009):
        loop, wheel = make(early)
        items = [(Item(), 1000 + number * 0.0137) for number in range(1, 200)]
        for item, when in reversed(items):
            wheel.set(item, when)
        loop.advance(5)
        for item, when in items:
            assert len(item.woken) == 1
            assert when <= item.woken[0] <= when + GRANULARITY + 0.002


def test_a_timer_that_fires_early_does_not_spin() -> None:
    loop, wheel = make(early=0.0009)
    wheel.set(Item(), 1001)
    loop.advance(5)
    assert loop.fired <= 12


def test_setting_again_replaces_the_deadline_and_cancel_removes_it() -> None:
    loop, wheel = make()
    sooner, later, never = Item(), Item(), Item()
    wheel.set(sooner, 1009)
    wheel.set(sooner, 1001)
    wheel.set(later, 1001)
    wheel.set(later, 1003)
    wheel.set(never, 1002)
    wheel.cancel(never)
    wheel.cancel(never)
    loop.advance(20)
    assert [round(now) for now in sooner.woken] == [1001]
    assert [round(now) for now in later.woken] == [1003]
    assert never.woken == []


def test_one_of_a_slot_may_cancel_another() -> None:
    loop, wheel = make()
    pair: list[Item] = []

    def cancel_both(now: float) -> None:
        for item in pair:
            wheel.cancel(item)

    for _ in range(2):
        pair.append(Item(cancel_both))
        wheel.set(pair[-1], 1001)
    loop.advance(5)
    assert len(pair[0].woken) + len(pair[1].woken) == 1


def test_an_item_that_is_always_due_does_not_hold_the_loop() -> None:
    loop, wheel = make()
    item = Item()
    item.action = lambda now: wheel.set(item, now - 1) if len(item.woken) < 1000 else None
    wheel.set(item, 999)
    loop.advance(0.05)
    assert 3 <= len(item.woken) <= 8


def test_an_error_in_one_does_not_silence_the_others() -> None:
    loop, wheel = make()

    def fail(now: float) -> None:
        raise RuntimeError

    faulty, sound = Item(fail), Item()
    wheel.set(faulty, 1001)
    wheel.set(sound, 1002)
    raised = 0
    for _ in range(400):
        try:
            loop.advance(0.01)
        except RuntimeError:
            raised += 1
    assert raised == 1
    assert len(sound.woken) == 1


def test_nothing_is_kept_of_what_is_over() -> None:
    loop, wheel = make()
    for number in range(1000):
        item = Item()
        wheel.set(item, 1000 + number / 100)
        if number % 2:
            wheel.cancel(item)
    loop.advance(20)
    assert wheel._slots == {}
    assert wheel._ticks == []
    assert loop.timers == []


def test_a_slot_of_many_lets_others_have_their_turn() -> None:
    order: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wheel = TimerWheel(loop)
        when = wheel.now() + 0.03
        for _ in range(200):
            wheel.set(Item(lambda _: order.append("due") or loop.call_soon(order.append, "other")), when)
        while len(order) < 400:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert order.count("due") == 200
    assert order.index("other") < 100, "all 200 were woken before anybody else had a turn"
