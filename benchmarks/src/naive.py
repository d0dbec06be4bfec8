# SPDX-License-Identifier: Apache-2.0
"""The daemon that one would write first: asyncio, one task per stream, its streams, its sleep.

usage: naive.py SOCKET [MODEL-PORT]

Takes plain messages and envelopes and answers with "tokens" events at "tokens_per_second", or relays what the model at
127.0.0.1:MODEL-PORT says. No limits, no deadlines, no logs. The contender of benchmarks/daemon; prints "ready".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return chunk(b"data: " + json.dumps({"content": text}).encode() + b"\n\n")


async def demo(data: dict[str, Any]) -> AsyncIterator[str]:
    options = data["demo"]
    for number in range(options["tokens"]):
        if number:
            await asyncio.sleep(1 / options["tokens_per_second"])
        yield " word"


async def relay(port: int, data: dict[str, Any]) -> AsyncIterator[str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    messages = [{"role": "user", "content": data["prompt"]}]
    body = json.dumps({"model": data["model"], "messages": messages, "stream": True}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: model\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await reader.readuntil(b"\r\n\r\n")
    while size := int(await reader.readline(), 16):
        data = await reader.readexactly(size)
        await reader.readline()
        for line in data.split(b"\n"):
            if line.startswith(b"data: {"):
                text = json.loads(line[6:])["choices"][0]["delta"].get("content")
                if text:
                    yield text
    writer.close()


async def answer(client: socket.socket, message: bytes, port: int) -> None:
    value = json.loads(message)
    data = json.loads(value["data"])
    _, writer = await asyncio.open_connection(sock=client)
    with contextlib.suppress(ConnectionError):
        writer.write(HEAD)
        async for text in relay(port, data) if port else demo(data):
            writer.write(event(text))
            await writer.drain()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()


async def take(peer: socket.socket, port: int) -> None:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(peer, readable.set_result, None)
    await readable
    loop.remove_reader(peer)
    with peer:
        message, fds, _, _ = socket.recv_fds(peer, 65536, 1)
    client = socket.socket(fileno=fds[0])
    client.setblocking(False)
    await answer(client, message, port)


async def main(path: str, port: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen(4096)
    server.setblocking(False)
    print("ready", flush=True)
    tasks = set()
    while True:
        peer, _ = await asyncio.get_running_loop().sock_accept(server)
        task = asyncio.create_task(take(peer, port))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.install()
    except ImportError:
        pass
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))
