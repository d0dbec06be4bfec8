"""Notices clients that hang up, without a reader per client.

The loop watches one descriptor: a private epoll set that holds every client, edge-triggered and only for hang-ups.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from typing import Protocol

_HALF = select.EPOLLRDHUP
_WHOLE = select.EPOLLHUP | select.EPOLLERR
_BATCH = 256


class Watcher(Protocol):
    """Whose client it is. An object and no function, because a bound method for each client is memory too."""

    def hung_up(self, certain: bool) -> None:
        """The client sent FIN (``certain`` false), or the connection is gone (true)."""


class HangupSet:
    """Tells each watcher when its client hangs up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watchers: dict[int, Watcher] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, watcher: Watcher) -> None:
        """Watch ``fd``; a hang-up that has already happened is reported on the next turn of the loop."""
        self._watchers[fd] = watcher
        self._epoll.register(fd, _HALF | select.EPOLLET)

    def remove(self, fd: int) -> None:
        """Stop watching ``fd``; must come before its close.

        The kernel forgets a closed descriptor only when its last copy is closed, and the sender may still have one.
        """
        if self._watchers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _ready(self) -> None:
        for fd, events in self._epoll.poll(0, _BATCH):
            watcher = self._watchers.get(fd)
            if watcher is not None:
                watcher.hung_up(bool(events & _WHOLE))
