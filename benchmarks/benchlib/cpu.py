# SPDX-License-Identifier: Apache-2.0
"""CPU time of processes from /proc, in nanoseconds, and the cores that they may use.

The first number of /proc/PID/task/TID/schedstat is what the scheduler counted for a thread: utime plus stime of
/proc/PID/stat, but a tick there is 10 ms. Threads that ended are missing, so measure what keeps its threads.
On the loopback a packet is received in the system call that sent it: the peer's part of TCP is paid by the sender.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def cpu_ns(pids: Iterable[int]) -> int:
    """CPU time of all threads of these processes so far."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def split_cores() -> tuple[set[int], set[int]]:
    """One core for the server under test, and the others for everything that plays a part around it.

    One is enough to compare what requests cost, and it leaves as much as can be to those who must not be the limit.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others) or {first}
