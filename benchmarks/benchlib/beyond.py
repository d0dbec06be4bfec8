# SPDX-License-Identifier: Apache-2.0
"""Beyond one process's descriptors: as many streams as the machine allows.

One daemon with as many workers as are needed, and as many generators, each a process with descriptors of its own. Both
ends of every connection are on this machine, so the kernel pays for a stream twice what it pays on a host. Before it
begins the scenario counts what the machine has of everything a stream needs; the report names what is short first.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib import daemon, door, tools
from benchlib.cpu import cpu_of, split_cores, tree, used_since
from benchlib.figures import figure, rounds
from benchlib.point import pss
from benchlib.report import spread, table
from benchlib.tools import BUILD, BenchmarkError, Talker, spawn, wait_until

SPARE = 1000
"""Descriptors of a process that are not for streams."""

GENERATOR = 20_000
"""MAX_CLIENTS of src/streams.c."""

MEMORY_PER_STREAM = 16_384
"""Bytes that are set aside for a stream before it is known: both ends of its connection, and the daemon's part."""


@dataclass(frozen=True, slots=True)
class Settings:
    levels: tuple[int, ...]  # streams; those that the machine does not allow become the most that it does
    rate: float  # handoffs per second, all generators together
    window: float  # seconds of a look: a whole interval at least, or nobody says anything
    pace: float  # events per second of each stream


QUICK = Settings((500, 1500), 2000.0, 2.0, 1.0)
FULL = Settings((10_000, 50_000, 100_000, 200_000), 6000.0, 10.0, 0.1)


def number(path: str) -> int | None:
    """The first number of a file of the kernel's; None where there is no such file."""
    try:
        return int(Path(path).read_text().split()[0])
    except FileNotFoundError:
        return None


def available() -> int:
    """Bytes of memory that could be used without swapping."""
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


def kernel_memory() -> int:
    """Bytes of the kernel's objects, sockets and descriptors among them, and of what is in TCP's buffers."""
    slab = Path("/proc/meminfo").read_text().split("\nSlab:")[1].split()[0]
    pages = Path("/proc/net/sockstat").read_text().split("TCP: ")[1].split("mem ")[1].split()[0]
    return int(slab) * 1024 + int(pages) * resource.getpagesize()


def limits() -> dict[str, int]:
    """What limits streams here, and to how many. Nine tenths of each: others need some too."""
    found = {"memory": available() // MEMORY_PER_STREAM}
    files, opened = number("/proc/sys/fs/file-max"), number("/proc/sys/fs/file-nr")
    if files is not None:
        found["open files of the whole system (fs.file-max)"] = (files - (opened or 0)) // 2
    tracked, most = (number(f"/proc/sys/net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    if tracked is not None and most is not None:
        found["connections that the firewall tracks (nf_conntrack_max)"] = most - tracked
    low, high = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    # src/streams.c: 200 source addresses; a listener of each generator's own.
    found["pairs of addresses and ports"] = (high - low) * 200
    processes = number("/proc/sys/kernel/pid_max") or 32_768
    found["descriptors of all processes that there can be"] = processes // 4 * (per_process() - SPARE)
    return {what: int(value * 0.9) for what, value in found.items()}


def allowed(levels: Sequence[int], most: Mapping[str, int]) -> tuple[str, list[int]]:
    """What is short first, and the levels that can be reached; one that cannot becomes the most that can."""
    nearest = min(most, key=lambda what: most[what])
    return nearest, sorted({min(level, most[nearest]) for level in levels})


def per_process() -> int:
    """Descriptors of one process (ulimit -Hn)."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], GENERATOR)


@contextmanager
def serving(directory: Path, workers: int, cores: set[int]) -> Iterator[tuple[Path, int]]:
    """The daemon: the socket it takes handoffs at, and its supervisor."""
    config, sock, log = directory / "config.toml", directory / "daemon.sock", directory / "log"
    text = daemon.CONFIG.format(directory=directory, backend="demo", url="http://localhost:1/v1", model="x")
    text = text.replace(
        "workers = 1\nmax_streams = 12000", f"workers = {workers}\nmax_streams = {per_process() - SPARE}"
    )
    config.write_text(text)
    command = [daemon.PYTHON, "-m", "streaming_daemon", "--config", str(config), "--socket", str(sock)]
    command += ["--control", str(directory / "control.sock")]
    with log.open("wb") as out:
        environ = {**os.environ, "PYTHONPATH": str(daemon.DAEMON)}
        started = spawn(command, cores, stdout=out, stderr=out, env=environ)
    try:
        wait_until(
            started,
            lambda: sock.exists() and "serving" in log.read_text(),
            lambda: "the daemon did not start",
        )
        yield sock, started.pid
    except BenchmarkError as error:
        raise BenchmarkError(f"{error}\n{log.read_text()[-2000:]}") from None
    finally:
        door.end(started)


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """level -> what was seen, the limits, and which of them is the nearest."""
    most = limits()
    nearest, levels = allowed(settings.levels, most)
    room = per_process() - SPARE
    processes = -(-levels[-1] // room)
    workers = processes + 1  # handoffs do not spread so evenly that all are full at the same time
    ours, others = split_cores()
    looks: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="beyond-bench-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        sock, supervisor = stack.enter_context(serving(directory, workers, ours))
        message = directory / "message"
        message.write_bytes(daemon.envelope(1000, settings.pace, ""))
        generators: list[Talker] = []
        for index in range(processes):
            own = directory / f"message-{index}"
            # Clients of several generators have numbers of their own, and so users and ids.
            own.write_bytes(message.read_bytes().replace(b"user-@", b"user-%d-@" % index))
            generators.append(Talker([str(BUILD / "streams"), str(sock), str(own), str(room), "steps"], others))
            stack.callback(generators[-1].stop)
        base_pss, base_memory = pss(tree([supervisor])), kernel_memory()
        for level in levels:
            looks[str(level)] = look(level, generators, supervisor, settings, base_pss, base_memory)
            say(f"{level:,} streams: {looks[str(level)]['live']:,.0f} live")
    return {
        "levels": looks,
        "limits": most,
        "nearest": nearest,
        "workers": workers,
        "generators": processes,
        "descriptors": per_process(),
        "pace": settings.pace,
    }


def look(
    level: int, generators: list[Talker], supervisor: int, settings: Settings, base_pss: int, base_memory: int
) -> dict[str, float]:
    """Grows to so many streams and looks at them. Raises BenchmarkError where streams failed."""
    share, rest = divmod(level, len(generators))
    for index, generator in enumerate(generators):
        generator.say(f"grow {share + (index < rest)} {settings.rate / len(generators)} 20")
    opened = [generator.hear() for generator in generators]
    live = sum(report["live"] for report in opened)
    if live != level:
        failures = [report["failures"] for report in opened]
        raise BenchmarkError(f"{level} streams were opened, {live} are live; failures were {failures}")
    # Whose streams were there first has not read since: what waits for him is not late.
    for generator in generators:
        generator.say("count 1")
    for generator in generators:
        generator.hear()
    pids = tree([supervisor])
    before = cpu_of(pids)
    for generator in generators:
        generator.say(f"count {settings.window} {1000 / settings.pace}")
    counted = [generator.hear() for generator in generators]
    used = used_since(before, cpu_of(pids))
    events = sum(report["events"] for report in counted)
    if not events:
        raise BenchmarkError("no events came")
    due = sum(report["due"] for report in counted)
    return {
        "live": live,
        "handoffs_per_second": level / max(report["seconds"] for report in opened),
        "first_p99_ms": max(report["first_event_ms"]["p99"] for report in opened),
        "late_p99_ms": max(report["lateness_ms"]["p99"] for report in counted),
        "complete": 1 - sum(report["behind"] for report in counted) / max(1, due),
        "cpu_s_per_million": used / 1e3 / events,
        "daemon_share": used / 1e9 / settings.window,
        "generator_share": sum(report["cpu_seconds"] / report["seconds"] for report in counted),
        "pss_per_stream": (pss(pids) - base_pss) / level,
        # Both ends of the connection.
        "kernel_per_stream": max(0, kernel_memory() - base_memory) / level,
    }


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of several rounds' documents; the limits are the first round's."""
    samples: dict[str, dict[str, list[float]]] = {}
    missing: dict[str, str] = {}
    for document in parts:
        missing |= document["missing"]
        for level, seen in document.get("levels", {}).items():
            for what, value in seen.items():
                samples.setdefault(level, {}).setdefault(what, []).append(value)
    return {**parts[0], "rounds": len(parts), "samples": samples, "missing": missing}


def facts(document: dict[str, Any]) -> dict[str, str]:
    """What docs/performance.md says, by name."""
    levels = sorted(document["samples"], key=int)
    if not levels:
        return {}
    cells = document["samples"][levels[-1]]
    daemon_bytes, kernel_bytes = (figure(cells[what]).median for what in ("pss_per_stream", "kernel_per_stream"))
    host_bytes = daemon_bytes + kernel_bytes / 2
    return {
        "beyond_streams": f"{int(levels[-1]):,}",
        "beyond_interval": f"{1 / document['pace']:g}",
        "beyond_workers": str(document["workers"]),
        "beyond_nearest": document["nearest"],
        "beyond_limits": limits_table(document).strip(),
        "beyond_bytes": f"{daemon_bytes:,.0f}",
        "beyond_kernel_bytes": f"{kernel_bytes / 2:,.0f}",
        "beyond_cpu": f"{figure(cells['cpu_s_per_million']).median:,.0f}",
        "beyond_late": f"{figure(cells['late_p99_ms']).median:,.0f}",
        **{
            f"beyond_gb_{name}": f"{host_bytes * streams / 1e9:,.2g}"
            for name, streams in (("10k", 1e4), ("100k", 1e5), ("1m", 1e6))
        },
        **{
            f"beyond_cores_{name}": f"{figure(cells['cpu_s_per_million']).median * streams / 1e6:,.2g}"
            for name, streams in (("10k", 1e4), ("100k", 1e5), ("1m", 1e6))
        },
    }


def limits_table(document: dict[str, Any]) -> str:
    """The nearest one first, and bold."""
    rows = [
        [f"**{what}**" if what == document["nearest"] else what, f"{value:,}"]
        for what, value in sorted(document["limits"].items(), key=lambda pair: pair[1])
    ]
    return table(["limit", "streams"], rows)


COLUMNS = (
    ("live", "live", 0),
    ("handoffs_per_second", "handoffs/s", 0),
    ("first_p99_ms", "first event p99 ms", 1),
    ("late_p99_ms", "event late, p99 ms", 1),
    ("complete", "events that came", 4),
    ("cpu_s_per_million", "CPU s per million events", 1),
    ("pss_per_stream", "daemon's PSS per stream, B", 0),
    ("kernel_per_stream", "kernel's memory per stream, both ends, B", 0),
    ("daemon_share", "daemon, cores", 2),
    ("generator_share", "generators, cores", 2),
)


def report(document: dict[str, Any]) -> str:
    text = (
        "## Beyond one process's descriptors\n\n"
        f"Medians of {rounds(document['rounds'])}, quartiles in brackets. One daemon with {document['workers']} "
        f"workers, {document['generators']} generators,\n{document['descriptors']:,} descriptors each; an event every "
        f"{1 / document['pace']:g} seconds and stream. *The kernel's memory* is its objects (Slab) and TCP's\n"
        "buffers, of both ends of every connection; a host has one of them. *Events that came*: the share of "
        "those that were due since\neach stream's first one, but for the last quarter of an interval; how late they "
        "came, another column says.\n\n"
        "What this machine would have allowed, and what is short first:\n\n"
    )
    text += limits_table(document)
    levels = sorted(document["samples"], key=int)
    rows = [
        [f"{int(level):,}", *(spread(figure(document["samples"][level][what]), digits) for what, _, digits in COLUMNS)]
        for level in levels
    ]
    text += "\n" + table(["streams", *(title for _, title, _ in COLUMNS)], rows)
    if levels:
        said = facts(document)
        text += (
            f"\nExtrapolated from {said['beyond_streams']} streams to a host that has one end of each, at one event "
            "per second and stream: the\ndaemon's memory and the kernel's, and the daemon's cores.\n\n"
        )
        text += table(
            ["streams", "memory, GB", "cores"],
            [[title, said[f"beyond_gb_{k}"], said[f"beyond_cores_{k}"]] for k, title in
             (("10k", "10,000"), ("100k", "100,000"), ("1m", "1,000,000"))],
        )  # fmt: skip
    return text


def build() -> None:
    tools.build("point", module=False)
