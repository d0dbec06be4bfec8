"""How a backend's server is reached, where its name has several addresses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from llm_server import fill
from streaming_daemon.wheel import TimerWheel

pytest.importorskip("httptools")

from streaming_daemon.backends.http_client import Client

DEAD, ALIVE, CLOSED, ALSO_DEAD = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which one address accepts, two never answer, and one refuses."""
    with contextlib.ExitStack() as stack:
        alive, *dead = free_on_all(ALIVE, DEAD, ALSO_DEAD)
        for sock in (alive, *dead):
            stack.enter_context(sock)
        alive.listen()
        for sock in dead:
            sock.listen(0)
            for filler in fill(sock):
                stack.enter_context(filler)
        yield int(alive.getsockname()[1])


def free_on_all(*addresses: str) -> list[socket.socket]:
    """Sockets at one port of all addresses. What is free at the first may be somebody's connection at another."""
    for attempt in range(50):
        sockets = [socket.socket() for _ in addresses]
        try:
            for sock, address in zip(sockets, addresses, strict=True):
                sock.bind((address, sockets[0].getsockname()[1]))
        except OSError as error:
            for sock in sockets:
                sock.close()
            if error.errno != errno.EADDRINUSE or attempt == 49:
                raise
        else:
            return sockets
    raise AssertionError("unreachable")


def reach(port: int, *addresses: str, timeout: float = 3.0) -> str:
    """The address that a connection has in the end."""

    async def play() -> str:
        loop = asyncio.get_running_loop()
        client = Client(f"http://many.invalid:{port}", loop, TimerWheel(loop), connect_timeout=timeout, most_idle=1)

        async def resolved(*_: Any, **__: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        loop.getaddrinfo = resolved
        connection = await client.connect()
        assert connection._transport is not None
        address = str(connection._transport.get_extra_info("peername")[0])
        connection.abort()
        return address

    return asyncio.run(play())


@pytest.mark.parametrize("before", [(), (DEAD,), (CLOSED,), (DEAD, CLOSED, ALSO_DEAD)])
def test_addresses_are_tried_in_their_order_and_no_dead_one_takes_all_the_time(
    port: int, before: tuple[str, ...]
) -> None:
    assert reach(port, *before, ALIVE, CLOSED) == ALIVE


def test_where_nobody_answers_it_is_a_timeout(port: int) -> None:
    with pytest.raises(TimeoutError):
        reach(port, DEAD, ALSO_DEAD, timeout=0.4)


def test_where_one_refuses_that_is_what_is_told_with_all_the_others(port: int) -> None:
    with pytest.raises(ConnectionRefusedError) as caught:
        reach(port, DEAD, CLOSED, timeout=0.4)
    assert caught.value.__notes__[0].startswith(f"{DEAD}: no answer, {CLOSED}: ")
    with pytest.raises(ConnectionRefusedError) as caught:
        reach(port, CLOSED)
    assert not hasattr(caught.value, "__notes__")
