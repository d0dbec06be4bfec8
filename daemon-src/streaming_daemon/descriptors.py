"""The descriptors of this process: who may have which, and how a lack of them is told from another fault.

The kernel gives the lowest number that is free, so the number that something got says how full the table is below it.
The numbers have three regions:

    below ``ceiling()``    what lasts: streams, and the connections and programs of backends
    up to ``end()``        clients who are told 503, for as long as that takes
    all above              what lasts for a moment: a peer and the descriptors of its message, the resolver's files and
                           sockets, certificates that are looked up

Whoever got a number above his region gives it back. So the last region is empty whenever it is needed, and neither a
name that cannot be looked up nor a certificate that is not found means that there was no descriptor for it. Where it
may mean that all the same, because the whole host has no file left or somebody else has filled the table, ``shortages``
says so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource

# errno of a process (EMFILE) or a host (ENFILE) without descriptors.
LACK = (errno.EMFILE, errno.ENFILE)
_RESERVED = 64
_LAST = 24


class Shortages:
    """How often this process has found that descriptors are short. A count and no time: whoever remembers what it was
    knows whether there was a shortage since, however long ago that is."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def note(self) -> None:
        self.count += 1


# The table is the process's, and so is what is known of it.
shortages = Shortages()


def ceiling() -> int:
    """The first descriptor that no stream and no backend may have."""
    limit = _limit()
    return limit - min(_RESERVED, limit // 3)


def end() -> int:
    """The first descriptor that nothing may keep."""
    limit = _limit()
    return limit - min(_LAST, limit // 6)


def lowest() -> int:
    """The number that the next descriptor will have, ``end()`` or more where there is none."""
    try:
        fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in LACK:
            raise
        return max(end(), _limit())
    os.close(fd)
    return fd


def room(count: int, below: int) -> bool:
    """Whether so many descriptors below ``below`` are free."""
    try:
        Reservation(count, below).release()
    except OSError as error:
        if error.errno not in LACK:
            raise
        return False
    return True


def lacking_since(count: int) -> bool:
    """Whether descriptors are short now, or were since ``shortages.count`` was ``count``."""
    if lowest() >= end():
        shortages.note()
    return shortages.count != count


def make_table(count: int) -> None:
    """Have the kernel make the table of this process large enough for ``count`` descriptors, or as many as are allowed.

    It would do so when they are needed, doubling the table each time, and with a second thread in the process (that of
    faulthandler, or of the resolver) waits for an RCU grace period every time: 10 to 25 ms in which nobody is served
    (expand_fdtable, fs/file.c). A table never shrinks.
    """
    last = min(count, _limit()) - 1
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        # Not dup2(2), which would close what is there.
        os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, last))
    except OSError as error:
        # EINVAL: the limit was lowered meanwhile. EMFILE: there is something at its very end, so it is large enough.
        if error.errno not in (errno.EINVAL, *LACK):
            raise
    finally:
        os.close(fd)


class Reservation:
    """Some descriptors kept for one that is about to open as many; ``release`` it immediately before that.

    Nothing else of the loop comes between then, and what it opens gets the numbers that were reserved.
    """

    __slots__ = ("_below", "_count", "_fds")

    def __init__(self, count: int, below: int) -> None:
        """Raises OSError with EMFILE or ENFILE where there are fewer than ``count`` descriptors below ``below``."""
        self._count = count
        self._below = below
        self._fds: list[int] = []
        self.reserve()

    def reserve(self) -> None:
        """Once more, after ``release``."""
        try:
            while len(self._fds) < self._count:
                self._fds.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
                if self._fds[-1] >= self._below:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        except OSError as error:
            self.release()
            if error.errno in LACK:
                shortages.note()
            raise

    def release(self) -> None:
        """Give them back; once is enough."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def _limit() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if limit == resource.RLIM_INFINITY else limit
