"""One timer for thousands of deadlines.

A stream that held its own loop timer would cost more memory than everything else about it. Instead each object with a
deadline sits in the set of the 10 ms slot in which it is due, and the loop knows one timer: that of the earliest slot.
An object has at most one deadline; whoever has several keeps the earliest here and looks at all of them when woken.
"""

from __future__ import annotations

import asyncio
import heapq
import math

GRANULARITY = 0.01
# uvloop rounds timers to milliseconds and may fire early: an unbounded re-arm for "now" would spin.
_SHORTEST = 0.001
_IDLE = 0
# So many are woken before the loop looks for what else has happened: a slot of thousands would keep handoffs waiting.
_PORTION = 32


class Timed:
    """Base of objects with a deadline. ``on_timer`` runs once per deadline, never early, about 10 ms late at most."""

    __slots__ = ("_tick",)

    def __init__(self) -> None:
        self._tick = _IDLE

    def on_timer(self, now: float) -> None:
        """The deadline has come; ``now`` is the loop's time."""
        raise NotImplementedError


class TimerWheel:
    """All deadlines of one event loop, in the loop's own time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, set[Timed]] = {}
        self._ticks: list[int] = []
        self._fired = 0
        self._armed: tuple[int, asyncio.Handle] | None = None

    def now(self) -> float:
        return self._loop.time()

    def set(self, item: Timed, when: float) -> None:
        """Wake ``item`` at ``when``, instead of any deadline it had."""
        tick = max(math.ceil(when / GRANULARITY), self._fired + 1)
        if item._tick == tick:
            return
        if item._tick != _IDLE:
            self._remove(item)
        slot = self._slots.get(tick)
        if slot is None:
            slot = self._slots[tick] = set()
            heapq.heappush(self._ticks, tick)
            if self._armed is None or tick < self._armed[0]:
                self._arm()
        slot.add(item)
        item._tick = tick

    def cancel(self, item: Timed) -> None:
        """Forget the deadline of ``item``, if it has one."""
        if item._tick != _IDLE:
            self._remove(item)
            item._tick = _IDLE

    def _remove(self, item: Timed) -> None:
        slot = self._slots[item._tick]
        slot.discard(item)
        if not slot:
            # Its number stays in the heap until its time comes; an integer costs less than searching for it.
            del self._slots[item._tick]

    def _arm(self) -> None:
        if self._armed is not None:
            self._armed[1].cancel()
            self._armed = None
        if self._ticks:
            tick = self._ticks[0]
            if tick <= self._fired:
                # The rest of a portion: on the loop's next turn, behind what has come in meanwhile.
                self._armed = (tick, self._loop.call_soon(self._fire))
                return
            delay = max(_SHORTEST, tick * GRANULARITY - self._loop.time())
            self._armed = (tick, self._loop.call_later(delay, self._fire))

    def _fire(self) -> None:
        self._armed = None
        now = self._loop.time()
        # Anything set from here on lands behind the slots of this round, so that nobody can hold the loop for ever.
        self._fired = due = int(now / GRANULARITY)
        left = _PORTION
        try:
            while self._ticks and self._ticks[0] <= due:
                tick = self._ticks[0]
                while (slot := self._slots.get(tick)) is not None:
                    if not left:
                        return
                    left -= 1
                    item = next(iter(slot))
                    self.cancel(item)
                    item.on_timer(now)
                heapq.heappop(self._ticks)
        finally:
            self._arm()
