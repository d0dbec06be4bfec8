#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A whole streaming daemon in one file: one thread, nothing but Python's standard library.

 1. Apache connects to our SOCK_SEQPACKET socket once for every client, sends one message and hangs up.
 2. With the message comes a descriptor (SCM_RIGHTS): the client's TCP connection, which is ours alone from then on.
 3. Where the target says ack=on (here: --ack) we say one byte, 0x06, after accept; until then Apache sends nothing.
 4. A plain message is the application's data, or one NUL byte. It says nothing of the request: never chunk then.
 5. An envelope is a JSON object that begins {"handoff":2 and has the request, the application's headers and its data.
 6. Data that is too large for it is in a second descriptor, a memfd: check its seals and length, then read it from 0.
 7. We write the whole HTTP response, with Connection: close; chunked for HTTP/1.1 only; to HEAD the head only.
 8. At the end: shutdown(SHUT_WR), read and forget what the client still sends, close. A bare close cuts the answer.
 9. What is wrong with a message: 400 to the client who came with it, and every descriptor is closed.
10. recvmsg may say 0 while a message is queued, and ECONNRESET where our 0x06 was not read: receive once more.

All of it is docs/wire-protocol.md. systemd gives us the socket (LISTEN_FDS), see systemd/ beside this file. To try it:

    systemd-socket-activate --seqpacket -l /run/handoff-python.sock ./test_daemon.py

It answers with the words of the data's "prompt"; replace words() by what your daemon is for. Its data is
{"prompt": "…", "demo": {"tokens": n, "tokens_per_second": r}}: that many words, at that pace. All may be missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

MOST_STREAMS = 1000  # more wait in the socket's queue; LimitNOFILE= has to be above it
MOST_MESSAGE = 1 << 18
MOST_PAYLOAD = 8 << 20
MESSAGE_TIMEOUT = 5.0  # seconds for Apache to send what it connected for
WRITE_TIMEOUT = 30.0  # seconds for a client to take one event
LINGER_TIMEOUT = 2.0  # seconds for a client to hang up after the answer
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK

# The application's headers go to the client, but for those that frame the response or describe another body.
NOT_COPIED = {
    *("connection", "content-length", "content-type", "date", "keep-alive", "proxy-connection"),
    *("te", "trailer", "transfer-encoding", "upgrade"),
}
NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Bad(Exception):
    """What is wrong with a message, for the client and the log."""


def parse(text: bytes, what: str) -> dict[str, Any]:
    """Text as a JSON object; no name twice, as two parsers would not agree on which one counts."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            raise ValueError
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError

    try:
        value = json.loads(text.decode(), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Bad(f"{what} must be a JSON object in UTF-8")
    return value


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_integer(low: int, high: int) -> Any:
    return lambda value: type(value) is int and low <= value <= high


def is_end(value: object) -> bool:
    return isinstance(value, dict) and is_text(value.get("addr")) and is_integer(0, 65535)(value.get("port"))


def is_headers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and is_text(pair[0]) and is_text(pair[1]) for pair in value
    )


def is_text_or_null(value: object) -> bool:
    return value is None or is_text(value)


BIG = 2**63 - 1
MEMBERS = {
    **dict.fromkeys(("id", "method", "uri", "protocol", "scheme", "target"), is_text),
    **dict.fromkeys(("host", "data"), is_text_or_null),
    **dict.fromkeys(("client", "peer"), is_end),
    **dict.fromkeys(("headers", "response_headers"), is_headers),
    "handoff": is_integer(2, 2),
    "status": is_integer(100, 999),
    "unread_body": is_integer(-1, BIG),
    "prefetched": is_integer(0, BIG),
}


def parse_envelope(message: bytes) -> dict[str, Any]:
    """Members that we do not know are ignored; one that is missing or of the wrong form spoils the whole."""
    envelope = parse(message, "the message")
    for name, fits in MEMBERS.items():
        if name not in envelope or not fits(envelope[name]):
            raise Bad(f"{name} is missing or wrong")
    if "user" in envelope and not is_text(envelope["user"]):
        raise Bad("user is wrong")
    return envelope


def data_of(envelope: dict[str, Any], extra: list[int]) -> bytes:
    """The application's data, from the envelope or from the memfd behind the client."""
    if "payload" not in envelope:
        if extra:
            raise Bad("a descriptor too many")
        return (envelope["data"] or "").encode("utf-8", "surrogatepass")
    payload = envelope["payload"]
    if (
        len(extra) != 1
        or not isinstance(payload, dict)
        or payload.get("memfd") is not True
        or envelope["data"] is not None
    ):
        raise Bad("payload is wrong")
    try:
        sealed = fcntl.fcntl(extra[0], fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # no memfd at all
        sealed = False
    length = payload.get("length")
    if not sealed or not is_integer(0, MOST_PAYLOAD)(length) or length != os.fstat(extra[0]).st_size:
        raise Bad("payload is not a sealed memfd of that length")
    return os.pread(extra[0], length, 0)


def words(data: bytes) -> tuple[Iterator[str], float]:
    """The answer, piece by piece, and how many pieces a second. Here your own daemon begins."""
    text = data.strip(b"\0 \t\r\n")
    asked = parse(text, "the data") if text else {}
    prompt = asked.get("prompt")
    demo = {} if asked.get("demo") is None else asked["demo"]
    if prompt is not None and not is_text(prompt):
        raise Bad("prompt must be a string")
    pieces = re.findall(r"[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+$", prompt or "Hello from a daemon of one file.")
    if not isinstance(demo, dict):
        raise Bad("demo must be an object")
    tokens = len(pieces) if demo.get("tokens") is None else demo["tokens"]
    pace = 20 if demo.get("tokens_per_second") is None else demo["tokens_per_second"]
    if not is_integer(1, 100_000)(tokens):
        raise Bad("demo.tokens must be an integer from 1 to 100000")
    if type(pace) not in (int, float) or not 0.1 <= pace <= 10_000:
        raise Bad("demo.tokens_per_second must be a number from 0.1 to 10000")
    return (pieces[index % len(pieces)] for index in range(tokens)), pace


def head(status: str, kind: str, more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n".encode("utf-8", "replace")


class Client:
    """The connection of one client. A client that does not read costs itself only: each write has a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.chunked = False
        self.wants_body = True

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(WRITE_TIMEOUT):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def event(self, event: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(event), event) if self.chunked else event)

    async def refuse(self, error: Bad) -> None:
        body = json.dumps({"error": {"type": "bad_request", "message": str(error)}}).encode()
        answer = head(
            "400 Bad Request", "application/json", f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n"
        )
        await self.send(answer + (body if self.wants_body else b""))

    async def close(self) -> None:
        """FIN now; then wait for the client's, because a close with unread bytes resets the connection."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(LINGER_TIMEOUT):
                while await asyncio.get_running_loop().sock_recv(self.sock, 65536):
                    pass
        except OSError:  # the client was faster, or too slow: TimeoutError is one too
            pass


async def answer(client: Client, message: bytes, extra: list[int]) -> None:
    """Understand the message, with the descriptors that came behind the client's, and write the response."""
    try:
        headers: list[list[str]] = []
        if re.match(rb'\{"handoff":-?[0-9]', message):
            envelope = parse_envelope(message)
            client.wants_body = envelope["method"] != "HEAD"
            client.chunked = envelope["protocol"] == "HTTP/1.1" and client.wants_body
            headers = envelope["response_headers"]
            pieces, pace = words(data_of(envelope, extra))
        elif extra:
            raise Bad("a descriptor too many")
        else:
            pieces, pace = words(message)
    except Bad as error:
        await client.refuse(error)
        return
    more = "X-Accel-Buffering: no\r\n"
    if not any(name.lower() == "cache-control" for name, _ in headers):
        more += "Cache-Control: no-cache\r\n"
    if client.chunked:
        more += "Transfer-Encoding: chunked\r\n"
    for name, value in headers:
        if name.lower() not in NOT_COPIED and NAME.fullmatch(name) and not re.search(r"[\r\n\0]", value):
            more += f"{name}: {value}\r\n"
    await client.send(head("200 OK", "text/event-stream; charset=utf-8", more))
    if not client.wants_body:
        return
    for piece in pieces:
        # One event per piece, which is whole characters, never some bytes of one.
        content = json.dumps({"content": piece}, ensure_ascii=False, separators=(",", ":"))
        await client.event(f"data: {content}\n\n".encode("utf-8", "replace"))
        await asyncio.sleep(1 / pace)
    await client.event(b"data: [DONE]\n\n")
    if client.chunked:
        await client.send(b"0\r\n\r\n")


async def receive(apache: socket.socket) -> tuple[bytes, list[int], int]:
    """The one message of this connection: bytes, descriptors, flags. All empty where none comes."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(MESSAGE_TIMEOUT):
        for _ in range(3):
            ready = loop.create_future()
            loop.add_reader(apache, lambda ready=ready: ready.done() or ready.set_result(None))
            try:
                await ready
            finally:
                loop.remove_reader(apache)
            try:
                # Room for as many descriptors as the kernel passes (253): those that are not expected are closed.
                message, fds, flags, _ = socket.recv_fds(apache, MOST_MESSAGE, 253, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                continue
            if message or fds:
                return message, fds, flags
    return b"", [], 0


async def serve(apache: socket.socket, ack: bool) -> None:
    """One handoff, from Apache's connection to the client's end."""
    fds: list[int] = []
    sock: socket.socket | None = None
    try:
        with apache:
            if ack:
                with contextlib.suppress(BrokenPipeError):  # it did not wait for it
                    apache.send(b"\x06")
            message, fds, flags = await receive(apache)
        if not fds:
            return
        sock = socket.socket(fileno=fds[0])  # an OSError where it is no socket
        del fds[0]
        if sock.type != socket.SOCK_STREAM:
            raise OSError("the descriptor is no stream socket")
        sock.setblocking(False)
        client = Client(sock)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            await client.refuse(Bad("the message is too long"))
        else:
            await answer(client, message, fds)
        await client.close()
    except OSError as error:  # the client has left, does not read, or is none; Apache changed its mind
        print(f"handoff ended: {error!r}", file=sys.stderr)
    finally:
        for fd in fds:
            os.close(fd)
        if sock is not None:
            sock.close()


async def main() -> None:
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        sys.exit(
            "start me by a .socket unit with one ListenSequentialPacket=, or by systemd-socket-activate --seqpacket"
        )
    listener = socket.socket(fileno=3)
    listener.setblocking(False)
    slots = asyncio.Semaphore(MOST_STREAMS)
    running = set()
    while True:
        await slots.acquire()
        try:
            apache, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:  # no descriptor left, for now
            print(f"cannot accept: {error}", file=sys.stderr)
            slots.release()
            await asyncio.sleep(0.1)
            continue
        task = asyncio.create_task(serve(apache, "--ack" in sys.argv[1:]))
        running.add(task)  # asyncio itself remembers its tasks only weakly
        task.add_done_callback(lambda done: (running.discard(done), slots.release()))


if __name__ == "__main__":
    asyncio.run(main())
