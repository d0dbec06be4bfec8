#!/usr/bin/python3
"""Handoffs at a steady rate to a daemon that may be reloaded, restarted and killed meanwhile; and what became of each.

Needs nothing but Python, so that it runs on a host as it does in a test. For every ``--step NAME=COMMAND`` the traffic
is brought to its full level first; the result is one JSON object, written when every stream has ended:

    python3 traffic.py --socket /run/streaming-daemon.sock --step 'reload=systemctl reload streaming-daemon'

The daemon must answer with its demo backend.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

TIMEOUT = 30.0


@dataclass
class Stream:
    """One client. Times of the monotonic clock; ``end`` is "" while it runs."""

    name: str
    phase: str
    sock: socket.socket
    began: float
    first: float | None = None
    raw: bytearray = field(default_factory=bytearray)
    end: str = ""


class Traffic(threading.Thread):
    """``rate`` handoffs a second, of ``seconds`` each; so ``rate * seconds`` of them are alive."""

    def __init__(self, path: str, rate: float = 100, seconds: float = 5.5, kind: int = socket.SOCK_SEQPACKET) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.rate = rate
        self.seconds = seconds
        self.kind = kind
        # Twice as many seconds would be told by the pace just as well; few events leave the processor to the daemon.
        self.tokens = max(2, round(seconds * 2) + 1)
        self.phase = "start"
        self.streams: list[Stream] = []
        self.most = 0
        self.error = ""
        self._running: dict[int, Stream] = {}
        self._epoll = select.epoll()
        self._halt = threading.Event()

    @property
    def live(self) -> int:
        return len(self._running)

    def await_full(self) -> None:
        """Wait until as many are alive as there are to be."""
        deadline = time.monotonic() + self.seconds * 2 + TIMEOUT
        while self.live < self.rate * self.seconds * 0.95:
            if time.monotonic() > deadline or self.error:
                raise AssertionError(f"only {self.live} streams are alive: {self.error}")
            time.sleep(0.02)

    def finish(self) -> None:
        """Hand off no more, and wait until every stream has ended."""
        self._halt.set()
        self.join(self.seconds * 2 + TIMEOUT)

    def whole(self, stream: Stream) -> bool:
        raw = stream.raw
        return stream.end == "FIN" and raw.count(b'"content"') == self.tokens and b"data: [DONE]\n\n" in raw

    @property
    def broken(self) -> list[Stream]:
        return [stream for stream in self.streams if not self.whole(stream)]

    def first_events(self) -> dict[str, dict[str, float]]:
        """Milliseconds to the first event by the phase in which the handoff was: median, 99th of 100, worst."""
        result = {}
        for phase in dict.fromkeys(stream.phase for stream in self.streams):
            times = sorted(
                (stream.first - stream.began) * 1000
                for stream in self.streams
                if stream.phase == phase and stream.first is not None
            )
            if times:
                result[phase] = {
                    "handoffs": len(times),
                    "median_ms": round(times[len(times) // 2], 1),
                    "p99_ms": round(times[int(len(times) * 0.99)], 1),
                    "worst_ms": round(times[-1], 1),
                }
        return result

    def table(self) -> str:
        lines = [f"{len(self.streams)} streams, {self.most} alive at once, {len(self.broken)} not whole"]
        lines.append(f"{'time to first event, ms':<26}{'handoffs':>9}{'median':>9}{'p99':>9}{'worst':>9}")
        for phase, row in self.first_events().items():
            lines.append(f"{phase:<26}" + "".join(f"{value:>9}" for value in row.values()))
        return "\n".join(lines)

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:
            self.error = repr(error)
            raise

    def _run(self) -> None:
        due = time.monotonic()
        while self._running or not self._halt.is_set():
            now = time.monotonic()
            # A generator that was held up does not make up for it by a burst.
            due = max(due, now - 0.1)
            if not self._halt.is_set() and due <= now:
                self._hand()
                due += 1 / self.rate
            wait = 0.05 if self._halt.is_set() else min(0.05, max(0.0, due - time.monotonic()))
            for fd, _ in self._epoll.poll(wait, 256):
                self._read(self._running[fd])

    def _hand(self) -> None:
        ours, theirs = socket.socketpair()
        stream = Stream(f"traffic-{len(self.streams)}", self.phase, ours, time.monotonic())
        shape = {"tokens": self.tokens, "tokens_per_second": (self.tokens - 1) / self.seconds}
        data = json.dumps({"request_id": stream.name, "demo": shape}).encode()
        with theirs, socket.socket(socket.AF_UNIX, self.kind) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(self.path)
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))])
        ours.setblocking(False)
        self.streams.append(stream)
        self._running[ours.fileno()] = stream
        self._epoll.register(ours.fileno(), select.EPOLLIN)
        self.most = max(self.most, len(self._running))

    def _read(self, stream: Stream) -> None:
        try:
            piece = stream.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
            stream.end = "RST"
        if piece:
            if stream.first is None and b"data: " in piece:
                stream.first = time.monotonic()
            stream.raw += piece
            return
        stream.end = stream.end or "FIN"
        self._epoll.unregister(stream.sock.fileno())
        del self._running[stream.sock.fileno()]
        stream.sock.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=5.5, help="how long a stream lasts")
    parser.add_argument("--settle", type=float, default=1.0, help="seconds of traffic after each step")
    parser.add_argument("--step", action="append", default=[], metavar="NAME=COMMAND")
    args = parser.parse_args()
    traffic = Traffic(args.socket, args.rate, args.seconds)
    traffic.start()
    statuses = {}
    for step in args.step:
        name, _, command = step.partition("=")
        traffic.phase = "between"
        traffic.await_full()
        traffic.phase = name
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
        statuses[name] = done.returncode
        time.sleep(args.settle)
    traffic.finish()
    json.dump(
        {
            "streams": len(traffic.streams),
            "most": traffic.most,
            "statuses": statuses,
            "broken": [[stream.name, stream.phase, stream.end, len(stream.raw)] for stream in traffic.broken],
            "first_events": traffic.first_events(),
            "error": traffic.error,
            "pid": os.getpid(),
        },
        sys.stdout,
    )
    return 1 if traffic.broken else 0


if __name__ == "__main__":
    sys.exit(main())
