"""Half an hour of a bad day in minutes: a real supervisor with its workers, and everything that can go wrong at once.

The promise is a ledger. Every handoff ends in one of these ways, the client and the daemon's journal agree on it, and
nobody waits for ever:

    complete    every event was there, in order, and the end
    client      the client ended it itself, or did not read for longer than it may
    told        an error: a status with a JSON body, or the last event
    lost        its worker was killed; the supervisor names the stream

Three parts: traffic alone, from which memory and descriptors are taken; the same workers with stalled, cut and refusing
backends, a full disk and too few descriptors; and then kill -9 and reloads. SOAK_SECONDS is all of it (default 120),
SOAK_SEED another day.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from daemon_harness import Daemon, envelope, send_message, tcp_pair, unchunk

pytest.importorskip("httptools")

SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
RATE = 30.0  # handoffs per second
MOST = 120  # clients at a time
DESCRIPTORS = 256  # of each worker
PATIENCE = 60.0  # for anything to end
# What a worker may hold more than before: allocators do not give everything back, and caches fill up.
GROWTH = 6 * 1024 * 1024
SPARE_FDS = 12

CONFIG = """
[server]
workers = 2
max_streams = 2000
handoff_timeout = 1.0
write_timeout = 2.0
linger_timeout = 1.0
drain_timeout = 4.0
head_after = 1.0
heartbeat = 1.0
first_event_timeout = 4.0
max_duration = 30.0
[listen]
message = "envelope"
[resume]
away = 3.0
keep = 3.0
[access_log]
path = "{log}/access.log"
format = "json"
[metrics]
listen = "unix:{directory}/metrics.sock"
[backend]
default = "demo"
[[routes]]
model = ["llm-*"]
backend = "llm"
[[routes]]
model = ["nobody"]
backend = "nobody"
[backends.demo]
type = "demo"
[backends.llm]
type = "openai"
base_url = "http://127.0.0.1:{port}/v1"
first_event_timeout = 2.0
idle_timeout = 1.0
[backends.nobody]
type = "openai"
base_url = "unix:/nonexistent.sock"
fallback = ["llm"]
"""


# --- the backend --------------------------------------------------------------------------------


class Model:
    """A language model in all its moods: the name of the model is the mood."""

    words = 12

    def __init__(self) -> None:
        self.port = 0
        self.asked = 0
        self.stalled = False

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Model]:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                assert length is not None
                body = json.loads(await reader.readexactly(int(length[1])))
                self.asked += 1
                if not await self._answer(body["model"], writer):
                    break
        writer.close()

    async def _answer(self, mood: str, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is to be kept."""
        if self.stalled or mood == "llm-silent":
            await asyncio.sleep(20)
            return False
        if mood == "llm-429":
            writer.write(b"HTTP/1.1 429 No\r\nRetry-After: 3\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()
            return True
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(self.words):
            if number == 5 and mood == "llm-cut":
                writer.transport.abort()
                return False
            if number == 5 and mood == "llm-stall":
                await asyncio.sleep(20)
                return False
            await self._event(writer, {"choices": [{"delta": {"content": f" {number}"}}]})
            await asyncio.sleep(0.02)
        await self._event(writer, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return True

    @staticmethod
    async def _event(writer: asyncio.StreamWriter, value: object) -> None:
        data = b"data: " + json.dumps(value).encode() + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()


# --- the ledger ---------------------------------------------------------------------------------


@dataclass
class Entry:
    kind: str
    began: float
    fate: str = "waiting"
    detail: str = ""
    ended: float = 0.0
    received: int = 0


@dataclass
class Answered:
    raw: bytearray = field(default_factory=bytearray)
    reset: bool = False

    def fate(self, *, head_only: bool, words: int) -> tuple[str, str]:
        """What a client would say of it; ``words`` are the events that a complete answer has."""
        if self.reset or not self.raw:
            return "cut", f"reset={self.reset} after {bytes(self.raw[-120:])!r}"
        head, _, body = bytes(self.raw).partition(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        if head_only:
            return ("complete", "") if not body else ("broken", f"HEAD was answered with {body[:80]!r}")
        if status >= 400:
            return ("told", str(status)) if b'"error"' in body else ("broken", f"{status} without a word: {body!r}")
        short = False
        if b"\r\nTransfer-Encoding: chunked" in head:
            body, short = unchunk(body)
        return fate_of_stream(body, words, short=short)


def fate_of_stream(body: bytes, words: int, *, short: bool) -> tuple[str, str]:
    events = [event for event in body.split(b"\n\n") if event and not event.startswith(b":")]
    last = events[-1] if events else b""
    if last.startswith(b"event: error"):
        return "told", last.decode()[:120]
    # Where it may be continued, it has a number too.
    if short or last.partition(b"\n")[0] != b"data: [DONE]":
        return "cut", f"{len(events)} events, chunks short={short}, the last {body[-120:]!r}"
    return ("complete", "") if len(events) - 1 == words else ("broken", f"{len(events) - 1} events of {words}")


class Soak:
    def __init__(self, daemon: Daemon, model: Model) -> None:
        self.daemon = daemon
        self.model = model
        self.random = random.Random(SEED)
        self.ledger: dict[str, Entry] = {}
        self.kills: list[float] = []
        self.reloads = 0
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._kinds: dict[str, tuple[int, Callable[[str, str], Awaitable[None]]]] = {
            "fast": (10, self.fast),
            "old": (3, self.old),
            "long": (2, self.long),
            "head": (2, self.head),
            "half-open": (3, self.half_open),
            "slow": (3, self.slow),
            "stuck": (1, self.stuck),
            "leaving": (4, self.leaving),
            "slamming": (2, self.slamming),
            "nonsense": (1, self.nonsense),
            "mute": (1, self.mute),
            "resuming": (2, self.resuming),
            "llm-good": (6, self.relayed),
            "llm-429": (1, self.relayed),
            "llm-cut": (1, self.relayed),
            "llm-stall": (1, self.relayed),
            "llm-silent": (1, self.relayed),
            "nobody": (1, self.relayed),
        }

    # Traffic

    async def traffic(self, seconds: float) -> None:
        """Clients of all kinds, in random order, at RATE."""
        names = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self._tasks) < MOST:
                self.begin(self.random.choices(names, weights)[0])
            await asyncio.sleep(self.random.expovariate(RATE))

    def begin(self, kind: str) -> None:
        name = f"soak-{next(self._numbers):06}"
        task = asyncio.create_task(self._one(kind, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, kind: str, name: str) -> None:
        entry = self.ledger[name] = Entry(kind, time.monotonic())
        try:
            async with asyncio.timeout(PATIENCE):
                await self._kinds[kind][1](kind, name)
        except TimeoutError:
            entry.fate = "for ever"
        except Exception as error:
            entry.fate, entry.detail = "broken", repr(error)
        entry.ended = time.monotonic()

    async def quiet(self) -> None:
        """Until all clients are done with, and the daemon with them."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        end = time.monotonic() + PATIENCE
        while self.unlogged() - self.unnamed() and time.monotonic() < end:
            await asyncio.sleep(0.1)

    # Clients

    def _hand(self, name: str, data: object, *, small: bool = False, **changes: object) -> socket.socket:
        ours, theirs = tcp_pair() if self.random.random() < 0.3 else socket.socketpair()
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with theirs:
            send_message(self.daemon.socket, "seqpacket", envelope(data, id=name, **changes), [theirs.fileno()])
        ours.setblocking(False)
        return ours

    async def _read(self, sock: socket.socket, answered: Answered, *, pause: float = 0.0, size: int = 65536) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(sock, size):
                answered.raw += data
                if pause:
                    await asyncio.sleep(pause)
        except ConnectionError:
            answered.reset = True
        finally:
            sock.close()

    async def _whole(self, name: str, sock: socket.socket, words: int, **options: float) -> None:
        """Read it all and enter what became of it."""
        answered = Answered()
        head_only = bool(options.pop("head_only", False))
        await self._read(sock, answered, pause=options.get("pause", 0.0), size=int(options.get("size", 65536)))
        entry = self.ledger[name]
        entry.received = len(answered.raw)
        entry.fate, entry.detail = answered.fate(head_only=head_only, words=words)

    def _shape(self, most: int = 60, pace: float = 40.0) -> tuple[dict[str, object], int]:
        tokens = self.random.randint(1, most)
        return {"demo": {"tokens": tokens, "tokens_per_second": pace}}, tokens

    async def fast(self, kind: str, name: str) -> None:
        data, words = self._shape()
        await self._whole(name, self._hand(name, data), words)

    async def long(self, kind: str, name: str) -> None:
        """Longer than a retired worker may take: it is told, where there is a reload."""
        words = 150
        await self._whole(name, self._hand(name, {"demo": {"tokens": words, "tokens_per_second": 15}}), words)

    async def old(self, kind: str, name: str) -> None:
        data, words = self._shape()
        await self._whole(name, self._hand(name, data, protocol="HTTP/1.0"), words)

    async def head(self, kind: str, name: str) -> None:
        data, _ = self._shape()
        await self._whole(name, self._hand(name, data, method="HEAD"), 0, head_only=True)

    async def half_open(self, kind: str, name: str) -> None:
        """Done with sending, as a legal client may be, and reads to the end."""
        data, words = self._shape()
        sock = self._hand(name, data)
        sock.shutdown(socket.SHUT_WR)
        await self._whole(name, sock, words)

    async def slow(self, kind: str, name: str) -> None:
        """Reads more slowly than the answer comes, but reads."""
        words = self.random.randint(400, 1500)
        data = {"demo": {"tokens": words, "tokens_per_second": 5000}}
        await self._whole(name, self._hand(name, data, small=True), words, pause=0.02, size=2048)

    async def stuck(self, kind: str, name: str) -> None:
        """Never reads: it is not the daemon's to wait for."""
        sock = self._hand(name, {"demo": {"tokens": 20000, "tokens_per_second": 10000}}, small=True)
        await asyncio.sleep(4)
        sock.close()
        self.ledger[name].fate = "client"

    async def leaving(self, kind: str, name: str) -> None:
        data, _ = self._shape(most=400)
        sock = self._hand(name, data)
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_recv(sock, 65536)
            await asyncio.sleep(self.random.random())
        sock.close()
        self.ledger[name].fate = "client"

    async def slamming(self, kind: str, name: str) -> None:
        """Gone before anybody looks."""
        data, _ = self._shape()
        self._hand(name, data).close()
        self.ledger[name].fate = "client"

    async def nonsense(self, kind: str, name: str) -> None:
        await self._whole(name, self._hand(name, '{"max_tokens": "many"}'), 0)

    async def mute(self, kind: str, name: str) -> None:
        """A peer that connects and hands nothing over. Nobody is waiting, so nothing is owed."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(self.daemon.socket))
            await asyncio.sleep(2)
        del self.ledger[name]

    async def resuming(self, kind: str, name: str) -> None:
        """Leaves, comes back under another name, and gets what it has missed."""
        data, words = self._shape(most=80)
        data["resume"] = {"id": f"{name}-{SEED:016}"}
        sock = self._hand(name, data)
        got = bytearray()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while got.count(b"\nid: ") < min(3, words) and (piece := await loop.sock_recv(sock, 65536)):
                got += piece
        sock.close()
        self.ledger[name].fate = "client"
        numbers = re.findall(rb"\nid: (\d+)\n", got)
        if not numbers:
            return
        again = f"{name}-again"
        self.ledger[again] = Entry(kind, time.monotonic())
        seen = int(numbers[-1])
        sock = self._hand(again, data, headers=[["Last-Event-ID", str(seen)]])
        answered = Answered()
        await self._read(sock, answered)
        entry = self.ledger[again]
        entry.ended = time.monotonic()
        entry.received = len(answered.raw)
        if answered.raw.startswith(b"HTTP/1.1 204"):
            entry.fate = "complete"
            return
        entry.fate, entry.detail = answered.fate(head_only=False, words=words - seen)

    async def relayed(self, kind: str, name: str) -> None:
        await self._whole(name, self._hand(name, {"prompt": "hello", "model": kind}), Model.words)

    # What goes wrong

    async def crowd(self, number: int) -> None:
        """More clients than there are descriptors; they leave again."""
        socks = []
        for _ in range(number):
            name = f"soak-{next(self._numbers):06}"
            self.ledger[name] = Entry("crowd", time.monotonic(), "client")
            socks.append(self._hand(name, {"demo": {"tokens": 100, "tokens_per_second": 1}}))
        await asyncio.sleep(3)
        answered = Counter(sock_head(sock) for sock in socks)
        print(f"  crowd of {number}: {dict(answered)}")
        assert answered["503"] > 0, "descriptors were to run out"
        for sock in socks:
            sock.close()

    async def full_disk(self, directory: Path | None, seconds: float) -> None:
        if directory is None:
            return
        filler = directory / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        await asyncio.sleep(seconds)
        filler.unlink()

    async def kill(self) -> None:
        victim = self.random.choice(self.daemon.workers())
        self.kills.append(time.monotonic())
        os.kill(victim, signal.SIGKILL)

    async def reload(self) -> None:
        done = await asyncio.to_thread(self.daemon.reload)
        assert done.returncode == 0, done.stderr
        self.reloads += 1

    # The daemon's side of the ledger

    def journal(self) -> dict[str, list[str]]:
        """What the journal says became of each handoff."""
        found: dict[str, list[str]] = {}
        for name, outcome in re.findall(r"^stream id=(soak-\S+) .*?outcome=(\w+)", self.daemon.log(), re.MULTILINE):
            found.setdefault(name, []).append(outcome)
        return found

    def unlogged(self) -> set[str]:
        return set(self.ledger) - set(self.journal())

    def unnamed(self) -> set[str]:
        """Those that a killed worker had taken and not yet entered into its roster: before any byte of an answer, and
        only while one was being killed."""
        return {
            name
            for name, entry in self.ledger.items()
            if entry.fate in ("cut", "client")
            and not entry.received
            and any(entry.began - 1.0 < kill < (entry.ended or math.inf) + 1.0 for kill in self.kills)
        }

    def faults(self) -> list[str]:
        """Everything that is not accounted for."""
        journal = self.journal()
        faults = []
        forgiven = self.unnamed()
        unnamed = 0
        for name, entry in self.ledger.items():
            outcomes = journal.get(name, [])
            if not balanced(entry, outcomes):
                if not outcomes and name in forgiven:
                    unnamed += entry.fate == "cut"
                    continue
                faults.append(f"{name} {entry.kind}: the client says {entry.fate} ({entry.detail}), journal {outcomes}")
        # At most what one turn of a loop takes off the socket.
        if unnamed > 8 * len(self.kills):
            faults.append(f"{unnamed} clients were cut and named by nobody, in {len(self.kills)} kills")
        return faults


def balanced(entry: Entry, outcomes: list[str]) -> bool:
    """Whether client and journal say the same of one handoff."""
    if len(outcomes) != 1:
        return False
    outcome = outcomes[0]
    if entry.fate == "complete":
        return outcome == "done"
    if entry.fate == "told":
        return outcome in ("backend_error", "timeout", "drained", "overloaded", "bad_request")
    if entry.fate == "cut":
        return outcome == "lost" or (entry.kind in ("slow", "stuck") and outcome in ("write_timeout", "buffer_full"))
    return entry.fate == "client"


def sock_head(sock: socket.socket) -> str:
    """The status that has come, if any."""
    try:
        return sock.recv(65536)[9:12].decode() or "nothing"
    except BlockingIOError:
        return "waits"
    except ConnectionError:
        return "reset"


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path | None]:
    """A disk of its own for the access log, where one may be mounted."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "soak", str(directory)]
    tool = shutil.which("mount")
    done = subprocess.run(command, capture_output=True, text=True, check=False) if tool else None
    if done is None or done.returncode != 0:
        why = done.stderr.strip() if done else "no mount(8)"
        warnings.warn(f"NO FULL DISK IN THIS SOAK: {why}", stacklevel=1)
        yield None
        return
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def resident(pid: int) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def settled(pids: list[int], before: dict[int, int]) -> dict[int, int]:
    """Descriptors once idle connections to backends had the time to go."""
    end = time.monotonic() + PATIENCE
    while True:
        now = {pid: descriptors(pid) for pid in pids}
        if all(now[pid] <= before.get(pid, 0) + SPARE_FDS for pid in pids) or time.monotonic() > end:
            return now
        await asyncio.sleep(0.5)


async def soak(daemon: Daemon, model: Model, disk: Path | None) -> None:
    run = Soak(daemon, model)

    def say(part: str) -> None:
        fates = Counter(entry.fate for entry in run.ledger.values())
        outcomes = Counter(outcome for found in run.journal().values() for outcome in found)
        print(f"  {part}: {dict(fates)}; journal {dict(outcomes)}")

    def check(part: str) -> None:
        say(part)
        faults = run.faults()
        assert not faults, f"{part}: {len(faults)} of {len(run.ledger)} handoffs are not accounted for:\n" + "\n".join(
            faults[:40]
        )

    # Traffic alone.
    await run.traffic(SECONDS * 0.2)
    await run.quiet()
    check("traffic alone")
    workers = daemon.workers()
    assert len(workers) == 2
    memory, fds = {pid: resident(pid) for pid in workers}, {pid: descriptors(pid) for pid in workers}
    supervisor, supervisor_fds = resident(daemon.pid), descriptors(daemon.pid)

    # The same workers have a bad time.
    async def trouble() -> None:
        part = SECONDS * 0.4
        await run.crowd(2 * DESCRIPTORS + 100)
        await run.full_disk(disk, part * 0.2)
        model.stalled = True
        await asyncio.sleep(part * 0.15)
        model.stalled = False

    await asyncio.gather(run.traffic(SECONDS * 0.4), trouble())
    await run.quiet()
    check("trouble around the workers")
    assert daemon.workers() == workers, "a worker died of it"
    after = await settled(workers, fds)
    for pid in workers:
        assert after[pid] <= fds[pid] + SPARE_FDS, f"descriptors of {pid}: {fds[pid]} before, {after[pid]} now"
        grown = resident(pid) - memory[pid]
        print(f"  worker {pid}: {memory[pid] >> 10} KiB, {grown >> 10} more; {fds[pid]} descriptors, now {after[pid]}")
        assert grown < GROWTH, f"worker {pid} has grown by {grown >> 10} KiB"
    if disk is not None:
        daemon.wait_log("access log .* cannot be written")
        daemon.wait_log("access log .* is written again")

    # Workers die, and are replaced.
    async def violence() -> None:
        end = time.monotonic() + SECONDS * 0.4
        for action in itertools.cycle((run.kill, run.reload)):
            await asyncio.sleep(SECONDS * 0.4 / 9)
            if time.monotonic() > end:
                return
            await action()

    await asyncio.gather(run.traffic(SECONDS * 0.4), violence())
    await run.quiet()
    check(f"{len(run.kills)} kills and {run.reloads} reloads")
    assert run.kills
    assert run.reloads
    assert "drained" in itertools.chain(*run.journal().values()), "no reload found a stream that was too long for it"
    end = time.monotonic() + PATIENCE
    while len(daemon.workers()) != 2 and time.monotonic() < end:
        await asyncio.sleep(0.1)
    final = daemon.workers()
    assert len(final) == 2, f"old workers stay: {final}"
    now = await settled([*final, daemon.pid], {**dict.fromkeys(final, max(fds.values())), daemon.pid: supervisor_fds})
    for pid in final:
        assert now[pid] <= max(fds.values()) + SPARE_FDS, f"descriptors of {pid}: {now[pid]}"
    assert now[daemon.pid] <= supervisor_fds + 1, f"supervisor's descriptors: {supervisor_fds}, now {now[daemon.pid]}"
    grown = resident(daemon.pid) - supervisor
    print(f"  supervisor: {supervisor >> 10} KiB, {grown >> 10} more; {supervisor_fds} descriptors")
    assert grown < GROWTH, f"the supervisor has grown by {grown >> 10} KiB"
    print(f"  {len(run.ledger)} handoffs, {model.asked} requests to the model: all accounted for")


def test_every_handoff_of_a_bad_day_is_accounted_for(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:

        async def day() -> None:
            async with Model().serve() as model:
                home = tmp_path / "d"
                home.mkdir()
                config = CONFIG.format(log=disk or tmp_path, directory=home, port=model.port)
                daemon = Daemon(home, config)
                limited = ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"]
                command = daemon.command("--config", str(daemon.config), "--socket", f"{daemon.socket},seqpacket")
                try:
                    daemon.start(command=[*limited, *command, "--control", str(daemon.control)], wait=False)
                    await asyncio.to_thread(daemon.wait_notified, "READY", "1")
                    await soak(daemon, model, disk)
                except BaseException:
                    errors = [line for line in daemon.log().splitlines() if not line.startswith("stream id=")]
                    print("\n".join(errors[-60:]))
                    raise
                finally:
                    daemon.close()

        asyncio.run(day())
