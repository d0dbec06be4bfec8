"""Whether this worker takes the next handoff, or leaves it to one that has fewer streams.

Every worker is woken by every handoff (an exclusive wake-up goes to the same one again and again: 1499 of 1500 at 300
a second). Whoever has more than ``_LEAD`` and a tenth more streams than another worker *steps back*: it stops watching
the sockets for a moment. The rules that keep a handoff from being stuck:

    A worker steps back only for one that is watching at this moment, and has less. The least loaded of those that
    watch therefore never steps back.
    It looks again after ``_PAUSE``. When there still is a handoff and nobody has taken any since, the other one is
    busy, hung or stopped: it is not waited for in the next ``_DISTRUST`` seconds.
    A worker whose loop has not turned for ``_STALE`` is not waited for at all.

A worker at its stream limit could only say 503. While another one has room, watching or not, it leaves the handoff to
that one for as long as ``_PATIENCE``, counted from when it first saw that handoff; whenever somebody has taken one, it
is the next that waits. One that is ready and has not been told to take handoffs yet has room too. Where nobody has, it
says 503 at once.
"""

from __future__ import annotations

from .board import ACCEPTED, ACCEPTING, ACTIVE, CAPACITY, DRAINING, HEARTBEAT, PENDING, Board, Slot, now_ms
from .wheel import Timed, TimerWheel

_LEAD = 4
_TENTH = 10
_PAUSE = 0.01
# How late after the pause a wake-up still is about the handoff for which the worker stepped back.
_SOON = 0.005
_DISTRUST = 0.25
_STALE = 3000
# No longer than anybody waits before an application has answered; longer than a worker is busy with one thing.
_PATIENCE = 2.0
# Not looked at for so long, a handoff that is there is another one.
_SEPARATE = 0.5
# What ACCEPTING says: takes handoffs and watches; takes handoffs and has stepped back for a moment.
WATCHING, STEPPED_BACK = 1, 2


class Watcher:
    """What can be told to stop and go on watching: a ``Listener``."""

    __slots__ = ()

    def pause(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError


class Balance(Timed):
    """One worker's view of the others; all its listeners step back together."""

    __slots__ = (
        "_board",
        "_distrusted",
        "_full_seen",
        "_full_since",
        "_number",
        "_others",
        "_resumed",
        "_seen",
        "_seen_last",
        "_slot",
        "_watchers",
        "_wheel",
    )

    def __init__(self, wheel: TimerWheel, board: Board, number: int) -> None:
        super().__init__()
        self._wheel = wheel
        self._board = board
        self._number = number
        self._slot = board.slot(number)
        self._watchers: list[Watcher] = []
        self._others: list[Slot] = []
        self._distrusted: dict[int, float] = {}
        self._seen = -1
        self._resumed = 0.0
        # What the others had taken when this worker, being full, left them a handoff, and since when.
        self._full_seen = -1
        self._full_since = 0.0
        self._seen_last = 0.0

    def start(self, watchers: list[Watcher]) -> None:
        """From now on this worker takes handoffs."""
        self._watchers = watchers
        self._slot[ACCEPTING] = WATCHING
        self.refresh()
        for watcher in watchers:
            watcher.start()

    def stop(self) -> None:
        """It takes no more; the watchers are the caller's to stop."""
        self._slot[ACCEPTING] = 0
        self._wheel.cancel(self)
        self._watchers = []

    def refresh(self) -> None:
        """Look who else there is; to be called about once a second."""
        recent = now_ms() - _STALE
        others = [self._board.slot(number) for number in self._board.taken() if number != self._number]
        self._others = [slot for slot in others if slot[HEARTBEAT] > recent]

    def mine(self) -> bool:
        """Whether to take a handoff now. Where not, the watchers have been paused."""
        own = self._slot[ACTIVE] + self._slot[PENDING]
        if 0 < self._slot[CAPACITY] <= own:
            return self._mine_though_full()
        if own <= _LEAD or not self._others:
            return True
        less = self._with_less(own)
        if not less:
            return True
        taken = sum(slot[ACCEPTED] for slot in self._others)
        now = self._wheel.now()
        if taken == self._seen and now - self._resumed < _SOON:
            for number in less:
                self._distrusted[number] = now + _DISTRUST
            self._seen = -1
            return True
        self._seen = taken
        self.step_back(_PAUSE)
        return False

    def _mine_though_full(self) -> bool:
        """Whether it is time to say 503."""
        # Not what was seen up to a second ago: the others may be just starting.
        self.refresh()
        if not any(_has_room(slot) for slot in self._others):
            return True
        now = self._wheel.now()
        taken = sum(slot[ACCEPTED] for slot in self._others)
        if taken != self._full_seen or now - self._seen_last > _SEPARATE:
            self._full_seen, self._full_since = taken, now
        self._seen_last = now
        if now - self._full_since >= _PATIENCE:
            return True
        self.step_back(_PAUSE)
        return False

    def step_back(self, seconds: float) -> None:
        """Take nothing for a moment, and let the others know."""
        self._slot[ACCEPTING] = STEPPED_BACK
        for watcher in self._watchers:
            watcher.pause()
        self._wheel.set(self, self._wheel.now() + seconds)

    def on_timer(self, now: float) -> None:
        if not self._watchers:
            return
        self._slot[ACCEPTING] = WATCHING
        self._resumed = self._wheel.now()
        for watcher in self._watchers:
            watcher.start()

    def _with_less(self, own: int) -> list[int]:
        """The others, by their place in the list, for which it is right to step back."""
        found = []
        for number, slot in enumerate(self._others):
            load = slot[ACTIVE] + slot[PENDING]
            if own > load + _LEAD + load // _TENTH and slot[ACCEPTING] == WATCHING:
                until = self._distrusted.get(number)
                if until is None or until < self._wheel.now():
                    found.append(number)
        return found


def _has_room(slot: Slot) -> bool:
    """Whether a worker may begin one more stream, now or when it has been told to go."""
    capacity = slot[CAPACITY]
    if slot[DRAINING] and not slot[ACCEPTING]:
        return False
    return not capacity or slot[ACTIVE] + slot[PENDING] < capacity
