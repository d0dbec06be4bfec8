"""Which streams a worker is writing, in memory that outlives it: so that those of a dead worker can be named.

One memfd per worker, made by the supervisor and sized by the worker. The entry of a stream is found by its client's
descriptor, which is unique while the stream runs: nothing to allocate, nothing to search, two writes to memory per
stream. An entry is one byte with the length of the id, 0 for none, and the id, cut to what fits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource

_ENTRY = 64
_MOST = 1 << 20


class Roster:
    """The worker's side, to which ``fd`` belongs from now on; without one it is kept for nobody."""

    def __init__(self, fd: int | None = None) -> None:
        # Pages nobody has written to take no memory, so room for every possible descriptor is free.
        self._size = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] % (1 << 63), _MOST) * _ENTRY
        if fd is not None:
            os.ftruncate(fd, self._size)
        self._map = mmap.mmap(-1 if fd is None else fd, self._size)
        if fd is not None:
            os.close(fd)

    def begin(self, fd: int, name: str) -> None:
        """The stream to the client ``fd`` is called ``name``."""
        at = fd * _ENTRY
        if at < self._size:
            data = name.encode("utf-8", "replace")[: _ENTRY - 1]
            self._map[at : at + 1 + len(data)] = bytes((len(data),)) + data

    def end(self, fd: int) -> None:
        """The stream to the client ``fd`` has ended and been logged."""
        at = fd * _ENTRY
        if 0 <= at < self._size:
            self._map[at] = 0


def create() -> int:
    """The descriptor of a new roster, the caller's to close."""
    return os.memfd_create("roster", os.MFD_CLOEXEC)


def unfinished(fd: int) -> list[str]:
    """The streams that a worker, which is gone, has not ended. Never raises: it is read when things are bad enough."""
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        size = os.fstat(fd).st_size // _ENTRY * _ENTRY
        if size:
            with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as table:
                lengths = table[::_ENTRY]
                for number in range(len(lengths)):
                    if length := min(lengths[number], _ENTRY - 1):
                        at = number * _ENTRY + 1
                        names.append(table[at : at + length].decode("utf-8", "replace"))
    return names
