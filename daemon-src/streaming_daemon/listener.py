"""Takes handoffs off the listening socket: accept, one message with its descriptors, the client's socket.

The rules of this room: nothing here ever waits for a peer. The message is normally there when its connection is
accepted, so it is read at once; a peer without one gets a reader and a deadline. Whatever is wrong with a message, no
descriptor that came with it survives except the client's, and every refusal is one line in the journal.

With ``listen.ack`` every peer is greeted with one byte: ACK, or NAK where its client would only be told to come back
later. It is a courtesy that the peer may ignore: a message that comes all the same is received all the same.

Whether to accept at all, and not to leave it to another worker, is asked of ``Balance`` before every single peer.

A message is gone when it is received, and so is a client for whom the kernel finds no descriptor in that moment. A
listener is therefore *tight* from the first descriptor at or beyond ``descriptors.end()`` on, and until some
below it are free again. While it is, it accepts nobody, and looks at a message (MSG_PEEK) before it takes it: one whose
descriptors would be cut off stays where it is, with its client, and is looked at again after a pause. When the time of
its peer is over it is taken as it is: a client who came with it is told 503.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable

from . import descriptors
from .access_log import log
from .balance import Balance, Watcher
from .board import ACCEPTED, HANDOFF_ERRORS, PENDING, Board, Slot
from .limits import ACCEPT_BATCH, MAX_MESSAGE, MAX_PENDING, StreamLimit
from .wheel import Timed, TimerWheel

# The most that the kernel passes in one message: with less room it would discard some and could not tell which.
_MAX_FDS = 253
_INT = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * _INT)
_SHORT_OF_RESOURCES = (*descriptors.LACK, errno.ENOBUFS, errno.ENOMEM)
_RESOURCE_PAUSE = 0.2
# A peer, its client, its payload, and one for whoever else needs one for a moment.
_ROOM = 4

# What docs/wire-protocol.md calls ack.
_ACK, _NAK = b"\x06", b"\x15"

# Gets the client, the message, and the descriptors behind the client's, which are closed when it returns.
Receiver = Callable[[socket.socket, bytes, list[int]], None]
# Gets a client, and a message some of whose descriptors were cut off.
Refuser = Callable[[socket.socket, bytes], None]


class Listener(Timed, Watcher):
    """One listening socket and the peers that have connected to it and not yet delivered."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        sock: socket.socket,
        timeout: float,
        receiver: Receiver,
        *,
        slot: Slot | None = None,
        balance: Balance | None = None,
        greets: StreamLimit | None = None,
        refuser: Refuser | None = None,
    ) -> None:
        super().__init__()
        if slot is None:
            private, number = Board.private()
            slot = private.slot(number)
        self.slot = slot
        self._balance = balance
        self.loop = loop
        self.wheel = wheel
        self.timeout = timeout
        self.receiver = receiver
        self.refuser = refuser
        self._greets = greets
        # One for all: a fresh buffer of this size per message costs more than the rest of the handoff.
        self.buffer = bytearray(MAX_MESSAGE)
        self._sock: socket.socket | None = sock
        self._kind = sock.type
        self._pending: dict[_Peer, None] = {}
        self._end = descriptors.end()
        self.tight = False

    def start(self) -> None:
        if self._sock is not None:
            self.loop.add_reader(self._sock.fileno(), self._acceptable)

    def pause(self) -> None:
        if self._sock is not None:
            self.wheel.cancel(self)
            self.loop.remove_reader(self._sock.fileno())

    def stop(self) -> None:
        """Accept no more; peers already accepted may still deliver. Others that share the socket go on."""
        if self._sock is not None:
            self.pause()
            self._sock.close()
            self._sock = None

    @property
    def pending(self) -> int:
        return len(self._pending)

    def waits(self, peer: _Peer) -> None:
        if len(self._pending) >= MAX_PENDING:
            next(iter(self._pending)).drop("overloaded", "too many peers are connected without delivering anything")
        self._pending[peer] = None
        self.slot[PENDING] += 1

    def done(self, peer: _Peer) -> None:
        if self._pending.pop(peer, peer) is None:
            self.slot[PENDING] -= 1

    def on_timer(self, now: float) -> None:
        self.start()

    def saw(self, fd: int) -> None:
        """A peer or its message brought this descriptor."""
        if fd >= self._end:
            self.tighten()

    def relaxed(self) -> bool:
        """Whether the descriptors that are needed for a moment are free, as far as this listener has looked."""
        if self.tight and descriptors.room(_ROOM, self._end):
            self.tight = False
        return not self.tight

    def tighten(self) -> None:
        self.tight = True
        descriptors.shortages.note()

    def _recover(self) -> None:
        if self._balance is not None:
            self._balance.step_back(_RESOURCE_PAUSE)
        else:
            self.pause()
            self.wheel.set(self, self.wheel.now() + _RESOURCE_PAUSE)

    def _acceptable(self) -> None:
        for _ in range(ACCEPT_BATCH):
            if self._sock is None or (self._balance is not None and not self._balance.mine()):
                return
            if not self.relaxed():
                self._recover()
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
                self.slot[HANDOFF_ERRORS["descriptors"]] += 1
                if error.errno in descriptors.LACK:
                    self.tighten()
                self._recover()
                return
            self.slot[ACCEPTED] += 1
            sock.setblocking(False)
            peer: _Peer = _PacketPeer(self, sock) if self._kind == socket.SOCK_SEQPACKET else _StreamPeer(self, sock)
            if self._greets is not None:
                peer.greet(self._greets.active + len(self._pending) < self._greets.most)
            self.saw(sock.fileno())
            if not peer.read():
                self.waits(peer)
                peer.wait()
            if self.tight:
                # The others wait in the backlog.
                self.slot[HANDOFF_ERRORS["descriptors"]] += 1
                self._recover()
                return


def descriptors_of(ancillary: list[tuple[int, int, bytes]]) -> array.array[int]:
    """Those that came with a message, and are the caller's from now on."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT])
    return fds


class _Peer(Timed):
    """One accepted connection until its message is complete."""

    def __init__(self, listener: Listener, sock: socket.socket) -> None:
        super().__init__()
        self._listener = listener
        self._sock = sock
        self._fds: list[int] = []
        self._waiting = False
        self._deadline = 0.0
        # Its message is there, and descriptors for it are not.
        self._short = False
        # Of its message some were cut off.
        self._cut = False
        self._greeted = False
        self._declined = False

    def greet(self, welcome: bool) -> None:
        """Send the one byte of ack mode, before anything is received."""
        self._greeted = True
        self._declined = not welcome
        # A peer that has sent its message without waiting may be gone already.
        with contextlib.suppress(OSError):
            self._sock.send(_ACK if welcome else _NAK)

    def read(self) -> bool:
        """Read what is there; true when this peer is dealt with, for better or worse."""
        raise NotImplementedError

    def wait(self) -> None:
        self._waiting = True
        self._deadline = self._listener.wheel.now() + self._listener.timeout
        if self._short:
            self._look_later()
        else:
            self._watch()

    def _watch(self) -> None:
        self._listener.wheel.set(self, self._deadline)
        self._listener.loop.add_reader(self._sock.fileno(), self.read)

    def _look_later(self) -> None:
        # A reader would be called again at once, and for ever.
        self._listener.loop.remove_reader(self._sock.fileno())
        self._listener.wheel.set(self, min(self._deadline, self._listener.wheel.now() + _RESOURCE_PAUSE))

    def drop(self, reason: str, text: str) -> None:
        """Refuse the message and close everything that came with it; ``reason`` is what it is counted as."""
        self._refused(reason, text)
        for fd in self._fds:
            os.close(fd)
        self._close()

    def _refused(self, reason: str, text: str) -> None:
        log.warning("handoff refused: %s", text)
        self._listener.slot[HANDOFF_ERRORS[reason]] += 1

    def on_timer(self, now: float) -> None:
        if not self._short:
            self.drop("timeout", f"no complete message within {self._listener.timeout:g} s")
        elif not self.read() and not self._short:
            # All that was there has been read, and it is not all.
            self._watch()

    def _fits(self) -> bool:
        """Whether there is room for all descriptors of the message; otherwise it stays where it is."""
        late = self._waiting and self._listener.wheel.now() >= self._deadline
        if late or self._listener.relaxed():
            self._short = False
            return True
        try:
            _, ancillary, flags, _ = self._sock.recvmsg(1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC | socket.MSG_PEEK)
        except OSError:
            # Nothing there, or an error: the same happens again without looking only.
            self._short = False
            return True
        for fd in descriptors_of(ancillary):
            os.close(fd)
        self._short = bool(flags & socket.MSG_CTRUNC)
        if self._short and self._waiting:
            self._look_later()
        return not self._short

    def _receive(self) -> tuple[int, int] | None:
        """Receive once: bytes in the shared buffer and flags; None where there is nothing yet. Descriptors are kept."""
        if self._listener.tight and not self._fits():
            return None
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into(
                [self._listener.buffer], _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            if self._greeted:
                # The peer closed without reading the greeting. The kernel says so once; the message is behind it.
                self._greeted = False
                return self._receive()
            self.drop("network", f"cannot be received: {error.strerror}")
            return 0, -1
        except OSError as error:
            self.drop("network", f"cannot be received: {error.strerror}")
            return 0, -1
        for fd in descriptors_of(ancillary):
            self._fds.append(fd)
            self._listener.saw(fd)
        if flags & socket.MSG_CTRUNC:
            self._cut = True
            self._listener.tighten()
        return size, flags

    def _deliver(self, message: bytes) -> None:
        """The message is complete: find the client among its descriptors and pass it on."""
        if not self._fds and self._cut:
            self.drop("descriptors", "its descriptors were cut off: raise LimitNOFILE")
            return
        if not self._fds:
            self.drop("invalid", "it carries no descriptor")
            return
        client, *others = self._fds
        self._fds = []
        self._close()
        try:
            self._pass_on(client, message, others)
        finally:
            for fd in others:
                os.close(fd)

    def _pass_on(self, client: int, message: bytes, others: list[int]) -> None:
        try:
            sock = socket.socket(fileno=client)
        except OSError:
            os.close(client)
            self._refused("invalid", "its descriptor is no socket")
            return
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            self._refused("invalid", "its descriptor is no connected stream socket")
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._cut and self._listener.refuser is not None:
            log.warning("some descriptors of a handoff were cut off: raise LimitNOFILE or lower max_streams")
            self._listener.slot[HANDOFF_ERRORS["descriptors"]] += 1
            self._listener.refuser(sock, message)
        else:
            self._listener.receiver(sock, message, others)

    def _left_without(self, size: int, flags: int) -> bool:
        """Whether that was the end of a peer of which nothing has come."""
        return size == 0 and flags != -1 and not self._fds and not self._cut

    def _left(self) -> None:
        """The peer closed without a message, which is what a declined one should do."""
        if self._declined:
            self._close()
        else:
            self.drop("network", "the peer closed without sending a message")

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
        if received is not None and self._left_without(*received):
            # Linux looks whether the queue is empty and then, not in one step, whether the peer has gone: it may have
            # sent and closed in between (unix_dgram_recvmsg, net/unix/af_unix.c). Now that it has gone, this is final.
            received = self._receive()
        if received is None:
            return False
        size, flags = received
        if flags == -1:
            return True
        if flags & socket.MSG_TRUNC:
            self.drop("too_large", f"it is longer than {MAX_MESSAGE} bytes")
        elif self._left_without(size, flags):
            self._left()
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
                    self.drop("too_large", f"it is longer than {MAX_MESSAGE} bytes")
                    return True
            elif not self._data and self._left_without(size, flags):
                self._left()
                return True
            else:
                self._deliver(bytes(self._data))
                return True
