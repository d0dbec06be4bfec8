"""Takes handoffs off the listening socket: accept, one message with its descriptors, the client's socket.

The rules of this room: nothing here ever waits for a peer. The message is normally there when its connection is
accepted, so it is read at once; a peer without one gets a reader and a deadline. Whatever is wrong with a message, no
descriptor that came with it survives except the client's, and every refusal is one line in the journal.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable

from .access_log import log
from .limits import ACCEPT_BATCH, MAX_MESSAGE, MAX_PENDING
from .wheel import Timed, TimerWheel

# The most that the kernel passes in one message: with less room it would discard some and could not tell which.
_MAX_FDS = 253
_INT = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * _INT)
_SHORT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RESOURCE_PAUSE = 0.2

Receiver = Callable[[socket.socket, bytes], None]


class Listener(Timed):
    """One listening socket and the peers that have connected to it and not yet delivered."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        sock: socket.socket,
        timeout: float,
        receiver: Receiver,
    ) -> None:
        super().__init__()
        self.loop = loop
        self.wheel = wheel
        self.timeout = timeout
        self.receiver = receiver
        # One for all: a fresh buffer of this size per message costs more than the rest of the handoff.
        self.buffer = bytearray(MAX_MESSAGE)
        self._sock: socket.socket | None = sock
        self._kind = sock.type
        self._pending: dict[_Peer, None] = {}

    def start(self) -> None:
        if self._sock is not None:
            self.loop.add_reader(self._sock.fileno(), self._acceptable)

    def stop(self) -> None:
        """Accept no more; peers already accepted may still deliver. Others that share the socket go on."""
        if self._sock is not None:
            self.wheel.cancel(self)
            self.loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    @property
    def pending(self) -> int:
        return len(self._pending)

    def done(self, peer: _Peer) -> None:
        self._pending.pop(peer, None)

    def on_timer(self, now: float) -> None:
        self.start()

    def _acceptable(self) -> None:
        for _ in range(ACCEPT_BATCH):
            if self._sock is None:
                return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _SHORT_OF_RESOURCES:
                    raise
                # Level-triggered: the loop would call again at once and for ever. The peers wait in the backlog.
                log.error("cannot accept handoffs: %s: raise LimitNOFILE or lower max_streams", error.strerror)
                self.loop.remove_reader(self._sock.fileno())
                self.wheel.set(self, self.wheel.now() + _RESOURCE_PAUSE)
                return
            sock.setblocking(False)
            peer: _Peer = _PacketPeer(self, sock) if self._kind == socket.SOCK_SEQPACKET else _StreamPeer(self, sock)
            if not peer.read():
                if len(self._pending) >= MAX_PENDING:
                    next(iter(self._pending)).drop("too many peers are connected without delivering anything")
                self._pending[peer] = None
                peer.wait()


class _Peer(Timed):
    """One accepted connection until its message is complete."""

    def __init__(self, listener: Listener, sock: socket.socket) -> None:
        super().__init__()
        self._listener = listener
        self._sock = sock
        self._fds: list[int] = []
        self._waiting = False

    def read(self) -> bool:
        """Read what is there; true when this peer is dealt with, for better or worse."""
        raise NotImplementedError

    def wait(self) -> None:
        self._waiting = True
        self._listener.wheel.set(self, self._listener.wheel.now() + self._listener.timeout)
        self._listener.loop.add_reader(self._sock.fileno(), self.read)

    def drop(self, reason: str) -> None:
        """Refuse the message and close everything that came with it."""
        log.warning("handoff refused: %s", reason)
        for fd in self._fds:
            os.close(fd)
        self._close()

    def on_timer(self, now: float) -> None:
        self.drop(f"no complete message within {self._listener.timeout:g} s")

    def _receive(self) -> tuple[int, int] | None:
        """Receive once: bytes in the shared buffer and flags; None where there is nothing yet. Descriptors are kept."""
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into(
                [self._listener.buffer], _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            self.drop(f"cannot be received: {error.strerror}")
            return 0, -1
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % _INT])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            self.drop("its descriptors were cut off: raise LimitNOFILE")
            return 0, -1
        return size, flags

    def _deliver(self, message: bytes) -> None:
        """The message is complete: find the client among its descriptors and pass it on."""
        if not self._fds:
            self.drop("it carries no descriptor")
            return
        client, *others = self._fds
        self._fds = []
        self._close()
        for fd in others:
            os.close(fd)
        if others:
            log.warning("a handoff carried %d descriptors, expected is one: kept the first", len(others) + 1)
        try:
            sock = socket.socket(fileno=client)
        except OSError:
            os.close(client)
            log.warning("handoff refused: its descriptor is no socket")
            return
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            log.warning("handoff refused: its descriptor is no connected stream socket")
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener.receiver(sock, message)

    def _close(self) -> None:
        if self._waiting:
            self._listener.wheel.cancel(self)
            self._listener.loop.remove_reader(self._sock.fileno())
            self._waiting = False
        self._sock.close()
        self._listener.done(self)


class _PacketPeer(_Peer):
    """SOCK_SEQPACKET: the first packet is the message."""

    def read(self) -> bool:
        received = self._receive()
        if received is None:
            return False
        size, flags = received
        if flags == -1:
            return True
        if flags & socket.MSG_TRUNC:
            self.drop(f"it is longer than {MAX_MESSAGE} bytes")
        elif not size and not self._fds:
            self.drop("the peer closed without sending a message")
        else:
            self._deliver(bytes(memoryview(self._listener.buffer)[:size]))
        return True


class _StreamPeer(_Peer):
    """SOCK_STREAM: the message is everything until the peer closes."""

    def __init__(self, listener: Listener, sock: socket.socket) -> None:
        super().__init__(listener, sock)
        self._data = bytearray()

    def read(self) -> bool:
        while True:
            received = self._receive()
            if received is None:
                return False
            size, flags = received
            if flags == -1:
                return True
            if size:
                self._data += memoryview(self._listener.buffer)[:size]
                if len(self._data) > MAX_MESSAGE:
                    self.drop(f"it is longer than {MAX_MESSAGE} bytes")
                    return True
            elif not self._data and not self._fds:
                self.drop("the peer closed without sending a message")
                return True
            else:
                self._deliver(bytes(self._data))
                return True
