# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run --profile: where CPU time goes while streams run, as flame graphs and in words.

perf sees all processes of a contender, the kernel included (Debian: linux-perf); py-spy, where somebody has installed
it, sees the functions of the daemon, which for perf are all the interpreter's loop.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from benchlib import door, plot, point
from benchlib.cpu import children, tree
from benchlib.tools import BUILD, BenchmarkError, Talker, checked

STREAMS = 200
PACE = 20.0
SECONDS = 5
WORKERS = 25
PROFILED = ("handoff", "handoff-own")
SHOWN = 15
"""Costs that are named."""

NAMES = ("profile.md", *(f"profile-{key}-{tool}.svg" for key in PROFILED for tool in ("perf", "py-spy")))
"""Of the files that are written."""

Stacks = Counter[tuple[str, ...]]
"""Frames from the root on, and how often they were seen."""


@dataclass(slots=True)
class Node:
    """A frame of a flame graph: samples in it and all that it called."""

    samples: int = 0
    callees: dict[str, Node] = field(default_factory=dict)


def check() -> None:
    """Raises BenchmarkError where neither program is there."""
    if not shutil.which("perf") and not shutil.which("py-spy"):
        raise BenchmarkError("--profile needs perf (apt install linux-perf) or py-spy, and neither is here")


def profile(out: Path, say: Callable[[str], None]) -> None:
    """Leaves NAMES in ``out``, those of the programs that are there. Raises BenchmarkError where nothing can be had."""
    check()
    point.build()
    text = f"# Where CPU time goes\n\n{STREAMS} streams of {PACE:g} events per second, for {SECONDS} seconds.\n"
    with point.world() as world:
        for contender in door.CONTENDERS:
            if contender.key not in PROFILED:
                continue
            for tool, stacks in _measured(world, contender).items():
                name = f"profile-{contender.key}-{tool}.svg"
                (out / name).write_text(flames(f"{contender.title}, by {tool}", stacks))
                text += f"\n## {contender.title}, by {tool}\n\n![flame graph]({name})\n\n{words(stacks)}"
                say(f"profile: {contender.key} by {tool}: {sum(stacks.values())} samples")
    (out / "profile.md").write_text(text)


def _measured(world: point.World, contender: door.Contender) -> dict[str, Stacks]:
    """tool -> what it saw"""
    found: dict[str, Stacks] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="profile-")))
        place = stack.enter_context(door.opened(contender, world.directory, WORKERS, world.ours, world.model.port))
        request = scratch / "request"
        request.write_bytes(door.request(contender.request, point.ENDLESS, PACE))
        streams = Talker(
            [str(BUILD / "streams"), f"tcp:{place.port}", str(request), str(STREAMS), "steps"], world.others
        )
        stack.callback(streams.stop)
        opened = streams.ask(f"grow {STREAMS} {STREAMS} 5")
        if opened["live"] != STREAMS:
            raise BenchmarkError(f"{contender.key}: of {STREAMS} streams {opened['live']} begin: {opened['failures']}")
        if shutil.which("perf"):
            found["perf"] = _perf(place.roots, scratch)
        if shutil.which("py-spy"):
            found["py-spy"] = _py_spy(_daemon_worker(place), scratch)
    return found


def _daemon_worker(place: door.Door) -> int:
    for pid in place.roots:
        if b"streaming_daemon" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return children(pid)[0]
    raise BenchmarkError("no daemon among the contender's processes")


def _perf(roots: list[int], scratch: Path) -> Stacks:
    """By the clock: virtual machines often have no counters of cycles."""
    data = str(scratch / "perf.data")
    for attempt in range(3):
        # perf gives up where one of them ends before it looks at it, as spare children of PHP-FPM do.
        which = ",".join(str(pid) for pid in tree(roots))
        command = ["perf", "record", "-q", "-F", "499", "-e", "cpu-clock", "-g", "-p", which, "-o", data]
        try:
            checked([*command, "sleep", str(SECONDS)])
            break
        except BenchmarkError:
            if attempt == 2:
                raise
    text = checked(["perf", "script", "-i", data, "-F", "comm,ip,sym", "--no-demangle"])
    return folded(text)


def folded(script: str) -> Stacks:
    """What perf script prints: a line with the command, then frames from the inside out, then an empty line."""
    stacks: Stacks = Counter()
    for sample in script.strip().split("\n\n"):
        comm, *frames = sample.splitlines()
        names = [frame.split(None, 1)[1] if " " in frame.strip() else "?" for frame in frames if frame.strip()]
        stacks[(comm.strip(), *reversed(names))] += 1
    return stacks


def _py_spy(pid: int, scratch: Path) -> Stacks:
    raw = scratch / "py-spy.txt"
    checked(["py-spy", "record", "-q", "-d", str(SECONDS), "-r", "200", "-f", "raw", "-o", str(raw), "-p", str(pid)])
    stacks: Stacks = Counter()
    for line in raw.read_text().splitlines():
        frames, _, count = line.rpartition(" ")
        stacks[tuple(frames.split(";"))] += int(count)
    return stacks


def words(stacks: Stacks) -> str:
    """The costs that stand out: where the processor was, and in which process."""
    total = sum(stacks.values())
    own: Counter[tuple[str, str]] = Counter()
    for frames, count in stacks.items():
        own[frames[0], frames[-1]] += count
    lines = [f"- {count / total:.1%} in `{name}` of {process}" for (process, name), count in own.most_common(SHOWN)]
    return "\n".join(lines) + "\n"


def flames(title: str, stacks: Stacks) -> str:
    """A flame graph: width is time, callers below their callees; names are in tooltips too."""
    root = Node()
    for frames, count in stacks.items():
        node = root
        node.samples += count
        for frame in frames:
            node = node.callees.setdefault(frame, Node())
            node.samples += count
    if not root.samples:
        raise BenchmarkError("the profile has no samples")
    depth = max(len(frames) for frames in stacks)
    height = 60 + depth * 16
    body = [f'<text class="text" x="20" y="28" font-weight="600">{escape(title)}</text>']
    _draw(root, 20.0, (plot.WIDTH - 40) / root.samples, height - 30.0, 0, body)
    return plot.frame(height, title, f"{root.samples} samples", body)


def _draw(node: Node, x: float, scale: float, y: float, level: int, body: list[str]) -> None:
    for name, callee in sorted(node.callees.items()):
        width = callee.samples * scale
        if width >= 0.5:  # what is narrower cannot be seen
            colour = (len(name) * 7 + level) % len(plot.LIGHT)
            share = callee.samples * scale / (plot.WIDTH - 40)
            label = escape(name[: int(width / 6.5)]) if width > 30 else ""
            body.append(
                f'<g><title>{escape(name)}: {share:.1%}</title><rect class="f{colour}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{width:.1f}" height="15" opacity="0.55"/><text class="text" font-size="10" x="{x + 2:.1f}" '
                f'y="{y + 11:.1f}">{label}</text></g>'
            )
            _draw(callee, x, scale, y - 16, level + 1, body)
        x += width
