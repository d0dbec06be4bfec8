"""The listening socket when descriptors are short: no client is lost for want of one."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from daemon_harness import KINDS, sealed_memfd, send_message
from streaming_daemon import board, descriptors
from streaming_daemon import listener as module
from streaming_daemon.board import Board
from streaming_daemon.listener import Listener
from streaming_daemon.wheel import TimerWheel

# High enough for what the test process has open.
LIMIT = 200


class Room:
    """A listener in a process with few descriptors, and what it was handed."""

    all: ClassVar[list[Room]] = []

    def __init__(self, kind: str, directory: Path, timeout: float) -> None:
        self.all.append(self)
        self.path, self.kind = directory / "s", kind
        self._sock = socket.socket(socket.AF_UNIX, KINDS[kind])
        self._sock.bind(str(self.path))
        self._sock.listen(32)
        self._sock.setblocking(False)
        self.got: list[tuple[bytes, int]] = []
        self.refused: list[bytes] = []
        self.kept: list[socket.socket] = []
        self._fillers: list[int] = []
        shared, number = Board.private()
        self.slot = shared.slot(number)
        loop = asyncio.get_running_loop()
        self.listener = Listener(
            loop, TimerWheel(loop), self._sock, timeout, self._receive, slot=self.slot, refuser=self._refuse
        )

    def fill(self, free: int) -> None:
        """Leave so many descriptors."""
        while True:
            try:
                self._fillers.append(os.dup(0))
            except OSError:
                break
        self.give(free)

    def give(self, count: int) -> None:
        for _ in range(count):
            os.close(self._fillers.pop())

    def empty(self) -> None:
        self.give(len(self._fillers))

    def close(self) -> None:
        self.empty()
        self._sock.close()
        for sock in self.kept:
            sock.close()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)

    def _receive(self, client: socket.socket, message: bytes, fds: list[int]) -> None:
        self.got.append((message, len(fds)))
        self.kept.append(client)

    def _refuse(self, client: socket.socket, message: bytes) -> None:
        self.refused.append(message)
        self.kept.append(client)


@pytest.fixture(autouse=True)
def few() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What another test has forgotten to close must not be closed, and be free, in the middle of this one.
    gc.collect()
    gc.disable()
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, before[1]))
    yield
    gc.enable()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for room in Room.all:
        room.close()
    Room.all.clear()


def hand(room: Room, message: bytes) -> socket.socket:
    """A client with a payload, in the backlog of the socket."""
    ours, theirs = socket.socketpair()
    payload = sealed_memfd(b"x")
    with theirs:
        send_message(room.path, room.kind, message, [theirs.fileno(), payload])
    os.close(payload)
    return ours


kinds = pytest.mark.parametrize("kind", ["seqpacket", "stream"])


@kinds
@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_a_message_without_room_for_its_descriptors_waits_for_it(kind: str, free: int, tmp_path: Path) -> None:
    async def play() -> None:
        room = Room(kind, tmp_path, 30.0)
        clients = [hand(room, b"first"), hand(room, b"second")]
        room.fill(free)
        room.listener.start()
        shortages = descriptors.shortages.count
        if free < 3:
            # It has looked more than once, and taken nothing.
            await room.until(lambda: descriptors.shortages.count >= shortages + 4)
            assert room.got == []
        else:
            await room.until(lambda: room.got)
        room.empty()
        await room.until(lambda: len(room.got) == 2)
        assert sorted(room.got) == [(b"first", 1), (b"second", 1)]
        assert room.refused == []
        for number, client in enumerate(clients):
            room.kept[number].send(b"hello")
            assert client.recv(9) == b"hello"
            client.close()

    asyncio.run(play())


@kinds
def test_a_peer_that_was_accepted_in_time_does_not_lose_its_client_later(kind: str, tmp_path: Path) -> None:
    async def play() -> None:
        room = Room(kind, tmp_path, 30.0)
        room.listener.start()
        peer = socket.socket(socket.AF_UNIX, KINDS[kind])
        peer.connect(str(room.path))
        await room.until(lambda: room.listener.pending)
        ours, theirs = socket.socketpair()
        last = hand(room, b"last")
        # The one that fills the table is what makes it tight.
        room.fill(4)
        await room.until(lambda: room.got)
        socket.send_fds(peer, [b"late"], [theirs.fileno(), theirs.fileno()])
        peer.close()
        room.fill(1)
        looked = descriptors.shortages.count
        await room.until(lambda: descriptors.shortages.count > looked + 2)
        assert [message for message, _ in room.got] == [b"last"]
        room.empty()
        await room.until(lambda: len(room.got) == 2)
        assert room.got[1] == (b"late", 1)
        assert room.listener.pending == 0
        for sock in (ours, theirs, last):
            sock.close()

    asyncio.run(play())


@kinds
def test_a_client_whose_message_has_waited_in_vain_is_refused_and_not_dropped(kind: str, tmp_path: Path) -> None:
    async def play() -> None:
        room = Room(kind, tmp_path, 0.5)
        client = hand(room, b"cut")
        room.fill(2)
        room.listener.start()
        await room.until(lambda: room.refused)
        assert (room.got, room.refused) == ([], [b"cut"])
        assert room.slot[board.HANDOFF_ERRORS["descriptors"]] > 0
        client.close()

    asyncio.run(play())


def test_while_there_is_room_nothing_is_looked_at_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: object) -> bool:
        raise AssertionError("a system call for every handoff")

    async def play() -> None:
        monkeypatch.setattr(module._Peer, "_fits", unwanted)
        monkeypatch.setattr(descriptors, "room", unwanted)
        room = Room("seqpacket", tmp_path, 30.0)
        clients = [hand(room, b"%d" % number) for number in range(3)]
        room.listener.start()
        await room.until(lambda: len(room.got) == 3)
        for client in clients:
            client.close()

    asyncio.run(play())


class Hasty:
    """A socket that says once that its peer has gone, as Linux does where the peer sent and went in that moment."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._said = False

    def recvmsg_into(self, *arguments: object) -> object:
        if not self._said:
            self._said = True
            return 0, [], socket.MSG_CMSG_CLOEXEC, None
        return self._sock.recvmsg_into(*arguments)

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


def test_a_message_that_came_while_its_end_was_looked_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer(listener: Listener, sock: socket.socket) -> object:
        return original(listener, Hasty(sock))

    original = module._PacketPeer
    monkeypatch.setattr(module, "_PacketPeer", peer)

    async def play() -> None:
        room = Room("seqpacket", tmp_path, 30.0)
        client = hand(room, b"late")
        with socket.socket(socket.AF_UNIX, KINDS["seqpacket"]) as empty:
            empty.connect(str(room.path))
        room.listener.start()
        await room.until(lambda: room.slot[board.HANDOFF_ERRORS["network"]])
        assert room.got == [(b"late", 1)]
        assert (room.listener.pending, room.slot[board.HANDOFF_ERRORS["network"]]) == (0, 1)
        client.close()

    asyncio.run(play())
