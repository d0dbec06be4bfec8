"""The client's end of a stream: its descriptor, and what the kernel did not take yet.

Writes go straight to the descriptor. A buffer exists only while the kernel refuses bytes; over ``BUFFER_HIGH`` the
backend is paused until the client has read, and a client that lets ``BUFFER_MOST`` wait is dropped. What is written,
and when a stream ends, is the session's, which is one of these: an object of its own would cost each stream memory.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

from . import board
from .limits import BUFFER_HIGH, BUFFER_LOW, BUFFER_MOST
from .wheel import Timed

if TYPE_CHECKING:
    from .backends.base import Call
    from .streams import Streams

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Client(Timed):
    """One client that is written to. Times are the loop's."""

    __slots__ = ("_blocked_since", "_bytes", "_call", "_fd", "_last_write", "_out", "_paused", "_streams")

    def __init__(self, streams: Streams, client: socket.socket) -> None:
        """``client`` belongs to this object from now on."""
        super().__init__()
        self._streams = streams
        # -1 once it is somebody else's, or closed.
        self._fd = client.detach()
        # Who is told to wait while the client does not read.
        self._call: Call | None = None
        self._bytes = 0
        self._last_write = streams.wheel.now()
        # What the kernel did not take yet; None is the normal case and costs nothing.
        self._out: bytearray | None = None
        self._blocked_since = 0.0
        self._paused = False

    @property
    def waiting(self) -> int:
        """Bytes that the client has not read."""
        return len(self._out) if self._out is not None else 0

    def drop(self, outcome: str) -> None:
        """End the stream at once, whatever the client has or has not read."""
        raise NotImplementedError

    def drop_slow(self, outcome: str) -> None:
        """Drop a client that does not read, and with RST: what it did not read would stay in the kernel for minutes."""
        self._reset()
        self.drop(outcome)

    def _schedule(self) -> None:
        """Something has changed that a deadline depends on."""
        raise NotImplementedError

    def _emptied(self) -> None:
        """Everything that had to wait is with the client. May end the stream."""
        raise NotImplementedError

    def _send(self, data: bytes) -> None:
        """Write ``data`` or keep it until the client reads. May end the stream."""
        if self._fd < 0 or not data:
            return
        streams = self._streams
        if self._out is not None:
            self._out += data
            streams.memory.buffer(len(data))
        else:
            self._last_write = now = streams.wheel.now()
            try:
                written = os.write(self._fd, data)
            except BlockingIOError:
                written = 0
            except OSError:
                self.drop("client_gone")
                return
            self._bytes += written
            streams.slot[board.BYTES_SENT] += written
            if written == len(data):
                return
            self._out = bytearray(data[written:])
            streams.memory.buffer(len(self._out))
            streams.blocked.add(self)
            self._blocked_since = now
            streams.loop.add_writer(self._fd, self._writable)
            self._schedule()
        if len(self._out) > BUFFER_MOST:
            self.drop_slow("buffer_full")
            return
        if not self._paused and len(self._out) > BUFFER_HIGH and self._call is not None:
            self._paused = True
            streams.slot[board.PAUSES] += 1
            self._call.pause()
        if streams.memory.full:
            streams.relieve()

    def _writable(self) -> None:
        if self._out is None:
            return
        try:
            written = os.write(self._fd, self._out)
        except BlockingIOError:
            return
        except OSError:
            self.drop("client_gone")
            return
        self._bytes += written
        self._streams.slot[board.BYTES_SENT] += written
        self._blocked_since = self._last_write = self._streams.wheel.now()
        self._streams.memory.buffer(-written)
        del self._out[:written]
        if not self._out:
            self._unblock()
            self._emptied()
        if self._paused and self.waiting <= BUFFER_LOW:
            self._paused = False
            if self._call is not None:
                self._call.resume()

    def _unblock(self) -> None:
        self._streams.memory.buffer(-self.waiting)
        self._streams.blocked.discard(self)
        self._out = None
        self._streams.loop.remove_writer(self._fd)

    def _reset(self) -> None:
        """Let the close that follows be seen as an error."""
        borrowed = socket.socket(fileno=self._fd)
        try:
            borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        finally:
            borrowed.detach()
