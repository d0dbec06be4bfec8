"""What hardly ever happens to a stream, with streams of the test's own loop and backends that misbehave on order."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon_harness import Response, envelope, send_message
from streaming_daemon import http_response as http
from streaming_daemon import limits, listener
from streaming_daemon.access_log import StreamRecord
from streaming_daemon.config import ListenConfig, ServerConfig
from streaming_daemon.envelope import Request
from streaming_daemon.handoff import Handoff
from streaming_daemon.listener import Listener
from streaming_daemon.streams import Streams
from streaming_daemon.wheel import TimerWheel

Script = Callable[[Any], None]


class Backend:
    """Does with the sink what the script says, as soon as it may; is its own call."""

    def __init__(self, script: Script | None, *, passes_on: bool = False) -> None:
        self.name = "scripted"
        self.passes_on = passes_on
        self.script = script
        self.cancelled = self.paused = False

    def start(self, handoff: Handoff, request: Request | None, sink: Any) -> Backend:
        if self.script is not None:
            asyncio.get_running_loop().call_soon(self.script, sink)
        return self

    def close(self) -> None: ...

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None: ...

    def cancel(self) -> None:
        self.cancelled = True


class Router:
    def __init__(self, *backends: Backend) -> None:
        self.backends = backends

    def choose(self, handoff: Handoff, request: Request | None) -> list[Backend]:
        if not self.backends:
            raise RuntimeError("a fault of ours")
        return list(self.backends)

    def close(self) -> None: ...


class Room:
    """Streams of one loop, one client of theirs, and what was logged."""

    def __init__(self, *backends: Backend, **server: Any) -> None:
        self.records: list[StreamRecord] = []
        loop = asyncio.get_running_loop()
        self.streams = Streams(
            loop, TimerWheel(loop), ServerConfig(**server), Router(*backends), [self], listen=ListenConfig()  # type: ignore[arg-type]
        )  # fmt: skip
        self.client, theirs = socket.socketpair()
        self.client.setblocking(False)
        theirs.setblocking(False)
        self.streams.open(theirs, envelope({"prompt": "x"}), [])

    def finished(self, record: StreamRecord) -> None:
        self.records.append(record)

    async def response(self) -> Response:
        data, reset = bytearray(), False
        try:
            while piece := await asyncio.get_running_loop().sock_recv(self.client, 1 << 20):
                data += piece
        except ConnectionError:
            reset = True
        self.client.close()
        while len(self.streams):
            await asyncio.sleep(0.01)
        self.streams.close()
        return Response(bytes(data), reset)


def played(*backends: Backend, **server: Any) -> tuple[Response, StreamRecord]:
    """What the client got, and the one record of it."""

    async def play() -> tuple[Response, StreamRecord]:
        room = Room(*backends, **server)
        async with asyncio.timeout(20):
            response = await room.response()
        (record,) = room.records
        return response, record

    return asyncio.run(play())


def test_a_fault_of_the_daemons_own_is_a_500_and_not_a_client_that_waits() -> None:
    response, record = played()
    assert response.status == 500
    assert response.json["error"]["type"] == "internal_error"
    assert record.outcome == "backend_error"


def test_a_stream_that_has_not_begun_when_the_worker_leaves_is_told_to_come_back() -> None:
    async def play() -> tuple[Response, Backend]:
        backend = Backend(None)
        room = Room(backend)
        room.streams.end_all("shutting_down", "Please ask again.")
        return await room.response(), backend

    response, backend = asyncio.run(play())
    assert response.status == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json["error"]["type"] == "shutting_down"
    assert backend.cancelled


def test_a_response_passed_on_that_is_shorter_than_it_said_can_be_told_from_a_whole_one() -> None:
    def script(sink: Any) -> None:
        sink.head(200, (("Content-Length", "10"),))
        sink.body(b"only")
        sink.done()

    response, record = played(Backend(script, passes_on=True))
    assert response.headers["content-length"] == "10"
    assert response.body == b"only"
    assert record.outcome == "backend_error"


def test_a_response_passed_on_that_is_longer_than_it_said_ends_where_it_said() -> None:
    def script(sink: Any) -> None:
        sink.head(200, (("Content-Length", "4"),))
        sink.body(b"only")
        sink.body(b"HTTP/1.1 200 OK\r\n\r\nsmuggled")
        sink.done()

    response, _ = played(Backend(script, passes_on=True))
    assert response.body == b"only"


def test_a_backend_that_does_not_stop_when_it_is_paused_costs_its_client_the_stream_and_not_the_memory() -> None:
    backend = Backend(None)
    most = 0

    def flood(sink: Any) -> None:
        nonlocal most
        for _ in range(2 * limits.BUFFER_MOST // 65536):
            sink.events([b"data: " + bytes(65536).replace(b"\0", b"x") + b"\n\n"])
            most = max(most, sink.waiting)

    backend.script = flood
    response, record = played(backend)
    assert backend.paused
    assert record.outcome == "buffer_full"
    assert not response.body.endswith(http.DONE)
    assert most <= limits.BUFFER_MOST + 70_000


def test_a_response_that_comes_after_a_comment_was_sent_is_an_error_of_the_stream() -> None:
    def script(sink: Any) -> None:
        sink.content([])
        sink.head(200, (("Content-Type", "text/html"),))

    response, _ = played(Backend(script))
    assert response.error["type"] == "backend_protocol"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_the_number_of_an_event_comes_before_its_blank_line_whatever_ends_its_lines(end: bytes) -> None:
    event = b"data: x" + end + end
    assert http.numbered(event, 7) == b"data: x" + end + b"id: 7" + end + end


def test_of_too_many_peers_that_deliver_nothing_the_oldest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MAX_PENDING", 3)
    path = str(tmp_path / "s")

    async def play() -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        got: list[bytes] = []
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.bind(path)
        server.listen(16)
        server.setblocking(False)

        def receive(client: socket.socket, message: bytes, fds: list[int]) -> None:
            got.append(message)
            client.close()

        taker = Listener(loop, TimerWheel(loop), server, 30.0, receive)
        taker.start()
        peers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
        for peer in peers:
            peer.connect(path)
            peer.setblocking(False)
        dropped = await loop.sock_recv(peers[0], 1)
        assert dropped == b""
        waiting = taker.pending
        ours, theirs = socket.socketpair()
        # Whoever has something to deliver is served all the same.
        send_message(path, "seqpacket", json.dumps({}).encode(), [theirs.fileno()])
        while not got:
            await asyncio.sleep(0.01)
        taker.stop()
        for sock in (*peers, ours, theirs):
            sock.close()
        return waiting, got[0]

    assert asyncio.run(play()) == (3, b"{}")
