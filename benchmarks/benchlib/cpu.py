# SPDX-License-Identifier: Apache-2.0
"""CPU time of processes from /proc, in nanoseconds, and the cores that they may use.

The first number of /proc/PID/task/TID/schedstat is what the scheduler counted for a thread: utime plus stime of
/proc/PID/stat, but a tick there is 10 ms. Threads that ended are missing, so measure what keeps its threads.
On the loopback a packet is received in the system call that sent it: the peer's part of TCP is paid by the sender.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from benchlib.tools import BenchmarkError


def cpu_of(pids: Iterable[int]) -> dict[int, int]:
    """Of all threads of each process that is there, so far."""
    used: dict[int, int] = {}
    for pid in pids:
        with suppress(ProcessLookupError, FileNotFoundError):
            used[pid] = sum(int(text.split()[0]) for text in _of_threads(pid, "schedstat"))
    return used


def used_since(before: dict[int, int], after: dict[int, int]) -> int:
    """Processes that were started in between count from their beginning; those that ended do not count."""
    return sum(max(0, value - before.get(pid, 0)) for pid, value in after.items())


def cpu_ns(pids: Iterable[int]) -> int:
    """CPU time of all threads of these processes so far. Raises BenchmarkError where one of them is gone."""
    wanted = set(pids)
    used = cpu_of(wanted)
    if len(used) < len(wanted):
        raise BenchmarkError(f"processes that were measured have ended: {sorted(wanted - set(used))}")
    return sum(used.values())


def children(pid: int) -> list[int]:
    """Of all threads: which one forked says nothing. Raises FileNotFoundError where there is no such process."""
    return [int(word) for text in _of_threads(pid, "children") for word in text.split()]


def tree(roots: Iterable[int]) -> list[int]:
    """These processes and all below them that are there now."""
    found: list[int] = []
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        with suppress(ProcessLookupError, FileNotFoundError):
            waiting += children(pid)
            found.append(pid)
    return found


def _of_threads(pid: int, name: str) -> Iterator[str]:
    """A file of each thread; one that ends meanwhile takes nothing but its own from its process."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError, FileNotFoundError):
            yield (task / name).read_text()


def split_cores() -> tuple[set[int], set[int]]:
    """One core for the server under test, and the others for everything that plays a part around it.

    One is enough to compare what requests cost, and it leaves as much as can be to those who must not be the limit.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others) or {first}
