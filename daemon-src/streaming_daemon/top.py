"""``python3 -m streaming_daemon top``: what the service is doing, on a terminal.

Asks the metrics socket for /status at an interval and shows the differences as rates; no terminal, no screen control,
one block of text per interval. ``--once`` shows one interval and ends, ``--json`` prints what was read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from . import metrics_socket
from .config import Config, MetricsConfig, load
from .toml_table import ConfigError

_TIMEOUT = 5.0
_LARGEST = 64 * 1024 * 1024
_CLEAR = "\x1b[H\x1b[J"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_RUNTIME = "/run/streaming-daemon"

Status = Mapping[str, Any]


class TopError(Exception):
    """The service cannot be asked; the text says what to do."""


def main(arguments: Sequence[str]) -> int:
    """Command line ``top``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m streaming_daemon top", description="Shows streams, rates, latencies and backends as they are."
    )
    parser.add_argument("--config", metavar="FILE", help="configuration of the service, for metrics.listen")
    parser.add_argument("--connect", metavar="ADDRESS", help='like metrics.listen: "unix:PATH" or "127.0.0.1:PORT"')
    parser.add_argument("--interval", metavar="SECONDS", type=float, default=2.0, help="default 2")
    parser.add_argument("--once", action="store_true", help="show one interval and exit")
    parser.add_argument("--json", action="store_true", help="print the numbers themselves, once, and exit")
    args = parser.parse_args(arguments)
    if not 0.1 <= args.interval <= 3600:
        parser.error(f"--interval {args.interval:g}: allowed is a number from 0.1 to 3600")
    try:
        where = address(args.connect, args.config)
        if args.json:
            json.dump(fetch(where), sys.stdout, indent=1)
            print()
            return 0
        return _watch(where, args.interval, args.once, sys.stdout)
    except (TopError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 0


def address(connect: str | None, config: str | None) -> str | tuple[str, int]:
    """Where to ask; raises TopError, ConfigError."""
    listen = connect or (load(config) if config else Config(metrics=MetricsConfig())).metrics.listen
    environ = {"RUNTIME_DIRECTORY": os.environ.get("RUNTIME_DIRECTORY") or _RUNTIME}
    try:
        where = metrics_socket.location(listen, environ)
    except ValueError:
        where = None
    if where is None:
        raise TopError(f'{listen}: nothing to connect to: expected is "unix:PATH" or "127.0.0.1:PORT"')
    return where


def fetch(where: str | tuple[str, int]) -> Status:
    """One look at /status; raises TopError."""
    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    data = bytearray()
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(_TIMEOUT)
        try:
            sock.connect(where)
            sock.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while (chunk := sock.recv(65536)) and len(data) < _LARGEST:
                data += chunk
        except OSError as error:
            place = where if isinstance(where, str) else f"{where[0]}:{where[1]}"
            raise TopError(
                f"{place}: {error.strerror or error}: is the service running, and may you ask it?"
            ) from error
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    try:
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise ValueError("no status")
        status = json.loads(body)
    except ValueError as error:
        raise TopError("what answers there is no streaming daemon") from error
    return dict(status)


def _watch(where: str | tuple[str, int], interval: float, once: bool, out: TextIO) -> int:
    live = out.isatty() and not once
    if live:
        out.write(_ENTER)
    try:
        before = fetch(where)
        while True:
            time.sleep(interval)
            try:
                now = fetch(where)
            except TopError as error:
                if once:
                    raise
                # It may be being restarted.
                _show([str(error)], live, out)
                continue
            _show(screen(before, now), live, out)
            if once:
                return 0
            before = now
    finally:
        if live:
            out.write(_LEAVE)
            out.flush()


def _show(lines: list[str], live: bool, out: TextIO) -> None:
    if live:
        size = shutil.get_terminal_size()
        lines = [line[: size.columns] for line in lines[: size.lines - 1]]
        out.write(_CLEAR + "\n".join(lines) + "\n")
    else:
        out.write("\n".join(lines) + "\n\n")
    out.flush()


def screen(before: Status, now: Status) -> list[str]:
    """The lines to show for what happened between two looks."""
    if before["started"] != now["started"]:
        # Another supervisor: its counters have begun anew.
        before = {**now, "values": {}, "histograms": {}, "backends": {}, "time": now["started"]}
    seconds = max(0.001, now["time"] - before["time"])
    change = _Change(before, now, seconds)
    return [*_head(now), "", *_streams(change), "", *_latencies(change), "", *_backends(change), "", *_workers(now)]


class _Change:
    """Two looks, and what lies between them."""

    def __init__(self, before: Status, now: Status, seconds: float) -> None:
        self.before = before
        self.now = now
        self.seconds = seconds

    def value(self, name: str) -> float:
        return _number(self.now["values"].get(name, 0))

    def rate(self, name: str, *, backend: str = "") -> float:
        old, new = self._sources(backend, "values")
        return (_number(new.get(name, 0)) - _number(old.get(name, 0))) / self.seconds

    def quantiles(self, name: str, *, backend: str = "") -> list[float | None]:
        """p50, p90 and p99 of the interval."""
        old, new = self._sources(backend, "histograms")
        if name not in new:
            return [None] * 3
        counts = list(new[name]["counts"])
        if name in old:
            counts = [each - other for each, other in zip(counts, old[name]["counts"], strict=True)]
        return [quantile(new[name]["bounds"], counts, q) for q in (0.5, 0.9, 0.99)]

    def _sources(self, backend: str, kind: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        if backend:
            return self.before["backends"].get(backend, {}), self.now["backends"].get(backend, {})
        return self.before[kind], self.now[kind]


def quantile(bounds: Sequence[float], counts: Sequence[int], q: float) -> float | None:
    """An estimate, as Prometheus makes it: straight within a bucket; the last bound for what lies above it."""
    total = sum(counts)
    if total <= 0:
        return None
    rank = q * total
    low = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and rank <= count:
            return low + (bound - low) * rank / count
        rank -= count
        low = bound
    return bounds[-1]


def _head(now: Status) -> list[str]:
    accepting = [worker for worker in now["workers"] if worker["state"] == "accepting"]
    generation = max((worker["generation"] for worker in accepting), default=0)
    up = _duration(max(0, now["time"] - now["started"]))
    clock = time.strftime("%H:%M:%S", time.localtime(now["time"]))
    serving = f"generation {generation}, {len(accepting)} workers" if accepting else "NOBODY TAKES HANDOFFS"
    return [f"streaming_daemon {now['version']}   up {up}   {serving}   {clock}"]


def _streams(change: _Change) -> list[str]:
    value, rate = change.value, change.rate
    errors = rate("daemon_stream_errors_total") + rate("daemon_handoff_errors_total")
    tokens = sum(rate("daemon_completion_tokens_total", backend=name) for name in change.now["backends"])
    rows = {
        "streams": (
            f"{value('daemon_active_streams'):,.0f} running",
            f"{value('daemon_peak_streams'):,.0f} at most",
            f"{value('daemon_streams_capacity'):,.0f} places",
            f"{_bytes(value('daemon_buffered_bytes'))} waiting",
        ),
        "rates/s": (
            f"{rate('daemon_handoffs_total'):,.1f} handoffs",
            f"{rate('daemon_chunks_sent_total'):,.0f} events",
            f"{tokens:,.0f} tokens",
            f"{_bytes(rate('daemon_bytes_sent_total'))} sent",
        ),
        "trouble/s": (
            f"{errors:,.1f} errors",
            f"{rate('daemon_connections_rejected_total'):,.1f} refused",
            f"{rate('daemon_slow_client_disconnects_total'):,.1f} too slow",
            f"{rate('daemon_backend_retries_total'):,.1f} retried",
        ),
    }
    return [f"{title:<10}" + "".join(f"{cell:>20}" for cell in cells) for title, cells in rows.items()]


def _latencies(change: _Change) -> list[str]:
    rows = ["latency              p50       p90       p99"]
    for title, name in (
        ("handoff", "daemon_handoff_duration_seconds"),
        ("first token", "daemon_time_to_first_token_seconds"),
        ("whole stream", "daemon_stream_duration_seconds"),
    ):
        rows.append(f"  {title:<12}" + "".join(f"{_seconds(each):>10}" for each in change.quantiles(name)))
    return rows


def _backends(change: _Change) -> list[str]:
    rows = ["backend               req/s  errors/s    events/s    tokens/s   first p50   first p99   whole p50"]
    for name in sorted(change.now["backends"]):
        first = change.quantiles("daemon_backend_ttfb_seconds", backend=name)
        whole = change.quantiles("daemon_backend_duration_seconds", backend=name)
        rows.append(
            f"  {name[:16]:<16}"
            f"{change.rate('daemon_backend_requests_total', backend=name):>9,.1f}"
            f"{change.rate('daemon_backend_errors_total', backend=name):>10,.1f}"
            f"{change.rate('daemon_backend_events_total', backend=name):>12,.0f}"
            f"{change.rate('daemon_completion_tokens_total', backend=name):>12,.0f}"
            f"{_seconds(first[0]):>12}{_seconds(first[2]):>12}{_seconds(whole[0]):>12}"
        )
    return rows


def _workers(now: Status) -> list[str]:
    rows = ["worker         pid  generation  state        streams  pending    memory      late"]
    for worker in now["workers"]:
        rows.append(
            f"  {worker['slot']:<4}{worker['pid']:>12}{worker['generation']:>12}  {worker['state']:<10}"
            f"{worker['streams']:>10,}{worker['pending']:>9,}{_bytes(worker['resident']):>10}"
            f"{_seconds(worker['late']):>10}"
        )
    return rows


def _number(value: object) -> float:
    """A value, or the sum of one that has labels."""
    if isinstance(value, Mapping):
        return float(sum(value.values()))
    return float(value) if isinstance(value, int | float) else 0.0


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.001:
        return f"{value * 1e6:.0f} us"
    if value < 1:
        return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text
