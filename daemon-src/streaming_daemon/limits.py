"""How much of everything one worker takes on. Sizes in bytes, times in seconds."""

from __future__ import annotations

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
RETRY_AFTER = 5


class StreamLimit:
    """Counts the running streams of a worker against ``max_streams``."""

    __slots__ = ("active", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.active = 0

    def enter(self) -> bool:
        """Take a place; false where there is none."""
        if self.active >= self.most:
            return False
        self.active += 1
        return True

    def leave(self) -> None:
        self.active -= 1
