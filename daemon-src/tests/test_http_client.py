"""How a backend's server is reached, where its name has several addresses."""

from __future__ import annotations

import asyncio
import contextlib
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
        alive = stack.enter_context(socket.create_server((ALIVE, 0)))
        number = int(alive.getsockname()[1])
        for address in (DEAD, ALSO_DEAD):
            dead = stack.enter_context(socket.socket())
            dead.bind((address, number))
            dead.listen(0)
            for filler in fill(dead):
                stack.enter_context(filler)
        yield number


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
