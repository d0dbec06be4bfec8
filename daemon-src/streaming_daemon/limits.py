"""How much of everything one worker takes on. Sizes in bytes, times in seconds.

The rules of this room: who asks gets an answer at once, a place or a ``Refusal``, and nobody ever waits in line. What
is refused costs the others nothing: a stream that is not admitted uses up neither a place nor a token. All of it counts
for one worker; what is configured is multiplied by the number of workers where a client's streams spread over them.
"""

from __future__ import annotations

import ipaddress
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from . import board, descriptors
from .board import Slot
from .config import LimitsConfig

# A sender gets at most what its socket buffer takes into one message: 208 KiB by default, twice that when it asks.
MAX_MESSAGE = 512 * 1024
# Peers that have connected and not yet sent their message; the oldest is dropped for one more.
MAX_PENDING = 1024
ACCEPT_BATCH = 8
# A client that reads more slowly than its backend writes: pause the backend above, go on below.
BUFFER_HIGH = 64 * 1024
BUFFER_LOW = 16 * 1024
# One event of a backend; longer is not an event but a fault.
MAX_EVENT = 1024 * 1024
# What a backend may still bring after it was paused: an event, and what one read had taken off its connection. A client
# whose buffer grows beyond that is dropped.
BUFFER_MOST = 4 * MAX_EVENT
RETRY_AFTER = 5
# Users whose tokens are remembered. The one not seen for the longest time is forgotten, and begins with all again.
_MOST_BUCKETS = 50_000
_INSTANT = 1e-6


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no stream. ``limit`` is its name in the metrics, ``retry_after`` in seconds."""

    limit: str
    status: int
    kind: str
    message: str
    retry_after: int = RETRY_AFTER


_BUSY = "Too many answers are being written at the moment; try again."
_STREAMS = Refusal("streams", 503, "overloaded", _BUSY)
_MEMORY = Refusal("memory", 503, "overloaded", _BUSY)
NO_DESCRIPTORS = Refusal("descriptors", 503, "overloaded", _BUSY)
_USER = Refusal("user", 429, "too_many_streams", "You have too many answers being written; wait for one to end.")
_ADDRESS = Refusal(
    "address", 429, "too_many_streams", "Too many answers are being written for your address; wait for one to end."
)


class StreamLimit:
    """Counts the running streams of a worker against ``max_streams``."""

    __slots__ = ("_slot", "most")

    def __init__(self, most: int, slot: Slot | None = None) -> None:
        self.most = most
        self._slot = slot or _private_slot()

    @property
    def active(self) -> int:
        return self._slot[board.ACTIVE]

    def enter(self) -> bool:
        """Take a place; false where there is none."""
        if self.active >= self.most:
            return False
        self.take()
        return True

    def take(self) -> None:
        slot = self._slot
        slot[board.ACTIVE] += 1
        slot[board.PEAK] = max(slot[board.PEAK], slot[board.ACTIVE])

    def leave(self) -> None:
        self._slot[board.ACTIVE] -= 1


class Memory:
    """Bytes that wait in this process for clients: those who read slowly, and those who may come back."""

    __slots__ = ("_slot", "most")

    def __init__(self, most: int, slot: Slot) -> None:
        self.most = most
        self._slot = slot

    @property
    def used(self) -> int:
        return self._slot[board.BUFFERED] + self._slot[board.REPLAY_BYTES]

    @property
    def full(self) -> bool:
        return 0 < self.most <= self.used

    def buffer(self, change: int) -> None:
        self._slot[board.BUFFERED] += change

    def replay(self, change: int) -> None:
        self._slot[board.REPLAY_BYTES] += change


class Admission(StreamLimit):
    """Who may have one more stream."""

    __slots__ = ("_addresses", "_buckets", "_ceiling", "_config", "_memory", "_users")

    def __init__(self, config: LimitsConfig, most: int, memory: Memory, slot: Slot) -> None:
        super().__init__(most, slot)
        self._config = config
        self._memory = memory
        self._users: dict[str, int] = {}
        self._addresses: dict[str, int] = {}
        self._buckets = TokenBuckets(config.user_rate, config.user_burst) if config.user_rate else None
        self._ceiling = descriptors.ceiling()

    def crowded(self, fd: int) -> bool:
        """Whether ``fd`` is one of the last descriptors: the kernel gives the lowest that is free."""
        if fd < self._ceiling:
            return False
        descriptors.shortages.note()
        return True

    def admit(self, user: str, address: str, fd: int, now: float) -> Refusal | None:
        """Take a place for one stream, given back with ``free``; otherwise why not. ``address`` as in ``address_key``,
        the same object for the same address, because it is kept as long as the stream."""
        refusal = self._refusal(user, address, fd, now)
        if refusal is not None:
            return refusal
        self.take()
        for counts, name in self._counts(user, address):
            counts[name] = counts.get(name, 0) + 1
        return None

    def free(self, user: str, address: str) -> None:
        """Give back a place that was taken for the same two."""
        self.leave()
        for counts, name in self._counts(user, address):
            left = counts[name] - 1
            if left:
                counts[name] = left
            else:
                del counts[name]

    @property
    def by_address(self) -> bool:
        """Whether anybody wants to know an address."""
        return self._config.streams_per_address > 0

    def _counts(self, user: str, address: str) -> Iterator[tuple[dict[str, int], str]]:
        """Where a stream of these two is counted."""
        if user and self._config.streams_per_user:
            yield self._users, user
        if address and self._config.streams_per_address:
            yield self._addresses, address

    def _refusal(self, user: str, address: str, fd: int, now: float) -> Refusal | None:
        if self.active >= self.most:
            return _STREAMS
        if self.crowded(fd):
            return NO_DESCRIPTORS
        return _MEMORY if self._memory.full else self._personal_refusal(user, address, now)

    def _personal_refusal(self, user: str, address: str, now: float) -> Refusal | None:
        config = self._config
        if user and 0 < config.streams_per_user <= self._users.get(user, 0):
            return _USER
        if address and 0 < config.streams_per_address <= self._addresses.get(address, 0):
            return _ADDRESS
        # Last, because a token is gone once it is taken.
        if user and self._buckets is not None:
            wait = self._buckets.take(user, now)
            if wait:
                seconds = math.ceil(wait)
                return Refusal("rate", 429, "rate_limited", "You ask too often; wait a little.", seconds)
        return None


class TokenBuckets:
    """A bucket per user that holds ``burst`` tokens and fills at ``rate`` per second.

    Of a bucket only one number is kept: when it will be full again. Every token taken makes that later by 1 / rate.
    """

    __slots__ = ("_full_at", "_most", "_rate", "_slack")

    def __init__(self, rate: float, burst: int, most: int = _MOST_BUCKETS) -> None:
        self._rate = rate
        # How far ahead of now that may be for there to be a token.
        self._slack = (burst - 1) / rate
        self._most = most
        # In the order of use, longest ago first.
        self._full_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, user: str, now: float) -> float:
        """Take a token; otherwise returns the seconds until there is one, and takes nothing."""
        full_at = max(now, self._full_at.pop(user, now))
        wait = full_at - now - self._slack
        # What is left of a microsecond is rounding.
        taken = wait < _INSTANT
        self._full_at[user] = full_at + 1 / self._rate if taken else full_at
        if len(self._full_at) > self._most:
            del self._full_at[next(iter(self._full_at))]
        return 0.0 if taken else wait


def without_port(client: str) -> str:
    """The address of ``address``, ``address:port``, ``v6`` or ``[v6]:port``."""
    if client.startswith("["):
        return client[1:].partition("]")[0]
    return client.partition(":")[0] if client.count(":") == 1 else client


def address_key(address: str) -> str:
    """Who counts as one client: an IPv4 address, or the /64 of an IPv6 one, of which a subscriber has them all."""
    if ":" not in address:
        return "" if address == "unix" else sys.intern(address)
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return sys.intern(address)
    if parsed.ipv4_mapped is not None:
        return sys.intern(str(parsed.ipv4_mapped))
    return sys.intern(f"{int(parsed) >> 64:x}/64")


def _private_slot() -> Slot:
    private, number = board.Board.private()
    return private.slot(number)
