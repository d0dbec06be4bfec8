# SPDX-License-Identifier: Apache-2.0
"""The point: how many streams a site can hold open before its plain pages suffer.

A climb is one contender with one number of workers: a fresh server, streams opened level by level and kept, and at
each level a look at everything. While it looks, a prober asks for a plain PHP page at a steady rate. A
contender whose plain page no longer comes is asked for the highest level at once, and not for those between. After the
largest size's climb a fresh server is asked for a lot of short streams: how many of them are complete to their last
byte in twice the time that one of them takes, counted from when the last was asked for?

The server has one core, everything that plays a part around it (clients, prober, model) the others.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib import door, tools
from benchlib.cpu import cpu_of, split_cores, tree, used_since
from benchlib.daemon import Model, memory
from benchlib.door import CONTENDERS, Contender, Door
from benchlib.tools import BUILD, BenchmarkError, Talker

PACE = 1.0
"""Events per second of each stream."""

ENDLESS = 100_000
"""Events: nobody comes to the end of a climb's stream."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Seconds, streams, per second."""

    workers: tuple[int, ...]
    levels: tuple[int, ...]
    rate: float  # at which streams are opened
    patience: float  # for the first event, and for a plain page
    settle: float  # between the last first event and a look
    window: float  # of a look
    probes: float  # plain pages
    short: int  # streams of the last lot
    tokens: int  # events of each of them
    contenders: tuple[str, ...] = tuple(c.key for c in CONTENDERS)

    @property
    def grace(self) -> float:
        """For the last lot to be complete, from when the last of it was asked for."""
        return 2 * self.tokens / PACE

    def levels_of(self, workers: int) -> list[int]:
        """What is far beyond a small site's workers looks all the same: there the highest level is enough."""
        top = max(self.levels)
        return [level for level in self.levels if level <= 4 * workers or workers == max(self.workers) or level == top]


QUICK = Settings((25,), (10, 100, 400), 400.0, 1.5, 0.3, 1.5, 100.0, 100, 3)
FULL = Settings((25, 150), (10, 100, 1000, 8000), 1000.0, 2.0, 0.7, 2.0, 160.0, 2000, 4)

Look = dict[str, float]
Samples = dict[str, dict[str, dict[str, Look]]]
"""workers -> contender -> level -> what; JSON's keys are text"""


def first_events(opened: dict[str, Any]) -> Look:
    """How long those that were opened last waited for theirs; nothing where none of them has one, which is not 0 ms."""
    latency = opened["first_event_ms"]
    return {"first_p99_ms": latency["p99"]} if latency["max"] > 0 else {}


def cost_of_events(look: Look, idle: Look) -> float | None:
    """CPU seconds per million events, without what the plain pages cost: that is what they cost without streams.

    None where not all of the pages are answered, for then their part is not known, or no event came. Of few events
    the cost may be less than what the pages' differs by, and the difference below nothing: it counts as it is, for
    without it the median of the rounds would be too high."""
    if not look["events"] or min(look["answered"], idle["answered"]) <= 0.99:
        return None
    spent = look["cpu_s"] / look["seconds"] - idle["cpu_s"] / idle["seconds"]
    return spent * look["seconds"] / look["events"] * 1e6


def pss(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        # A worker that has just ended has no memory.
        with suppress(OSError, IndexError):
            total += memory([pid])["Pss"]
    return total


@dataclass(slots=True)
class World:
    """What stands around every contender."""

    directory: Path
    ours: set[int]
    others: set[int]
    model: Model

    def climb(
        self, contender: Contender, workers: int, settings: Settings, say: Callable[[str], None]
    ) -> dict[str, Look]:
        """level -> what was seen there. Raises BenchmarkError where nothing could be."""
        self.model.check()
        with door.opened(contender, self.directory, workers, self.ours, self.model.port) as place:
            page = self._file("page", door.request(door.get("/page.php"), 0, 1).replace(b"@" * 8, b"f" * 8))
            prober = Talker(
                [str(BUILD / "prober"), str(place.port), str(page), str(settings.probes), str(settings.patience)],
                self.others,
                nice=-10,
            )
            try:
                self._warm(place, prober, settings)
                looks = self._levels(place, prober, settings, say)
            finally:
                prober.stop()
        if workers == max(settings.workers) and contender.ends:
            # A server of its own: the one that was climbed may still be busy with clients that are gone.
            with door.opened(contender, self.directory, workers, self.ours, self.model.port) as place:
                looks["short"] = self._short(place, settings)
        return looks

    def _file(self, name: str, text: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(text)
        return path

    def _streams(self, place: Door, many: int, tokens: int) -> Talker:
        wanted = self._file("request", door.request(place.contender.request, tokens, PACE))
        return Talker([str(BUILD / "streams"), f"tcp:{place.port}", str(wanted), str(many), "steps"], self.others)

    def _warm(self, place: Door, prober: Talker, settings: Settings) -> None:
        """A page and a stream, to their ends: what does not work now never will."""
        seen = prober.ask("count 0.5")
        if not seen["right"]:
            raise BenchmarkError(f"{place.contender.key}: no plain page comes: {seen}")
        streams = self._streams(place, 5, ENDLESS)
        try:
            opened = streams.ask(f"grow 5 50 {max(5.0, settings.patience)}")
            if opened["live"] != 5:
                raise BenchmarkError(
                    f"{place.contender.key}: of 5 streams {opened['live']} begin: {opened['failures']}"
                )
        finally:
            streams.stop()
        # Until everybody has noticed that they left: the model's next token shows it.
        time.sleep(1.5 / PACE)

    def _levels(self, place: Door, prober: Talker, settings: Settings, say: Callable[[str], None]) -> dict[str, Look]:
        looks: dict[str, Look] = {}
        streams, rate = self._streams(place, max(settings.levels), ENDLESS), min(settings.rate, place.contender.rate)
        try:
            idle = self._look(place, streams, prober, settings, 0)
            looks["0"] = idle
            alive = True
            for level in settings.levels_of(place.workers):
                if not alive and level != max(settings.levels):
                    continue
                if place.publisher is not None:
                    place.publisher.channels = level
                opened = streams.ask(f"grow {level} {rate} {settings.patience}")
                # Not a sleep: what is not read meanwhile would be late.
                streams.ask(f"count {settings.settle}")
                look = self._look(place, streams, prober, settings, level)
                look |= first_events(opened)
                cost = cost_of_events(look, idle)
                if cost is not None:
                    look["cpu_s_per_million"] = cost
                looks[str(level)] = look
                alive = look["answered"] > 0.5
                say(
                    f"{place.contender.key}, {place.workers} workers, {level} streams: {look['live']:.0f} live, "
                    f"page p99 {look['p99_ms']:.1f} ms, {look['answered']:.0%} answered"
                )
            return looks
        finally:
            streams.stop()

    @staticmethod
    def _look(place: Door, streams: Talker, prober: Talker, settings: Settings, level: int) -> Look:
        before = cpu_of(tree(place.roots))
        prober.say(f"count {settings.window}")
        began = time.monotonic()
        counted = streams.ask(f"count {settings.window} {1000 / PACE}")
        used = used_since(before, cpu_of(tree(place.roots)))
        seconds = time.monotonic() - began
        page = prober.hear()
        if place.publisher is not None and place.publisher.failed:
            raise BenchmarkError(f"nothing could be published any more: {place.publisher.failed}")
        live = counted["live"]
        look = {
            "wanted": level,
            "live": live,
            "waiting": counted["waiting"],
            "failed": level - live - counted["waiting"],
            "answered": page["right"] / max(1, page["asked"]),
            "p50_ms": page["latency_ms"]["p50"],
            "p99_ms": page["latency_ms"]["p99"],
            "events": counted["events"],
            "cpu_s": used / 1e9,
            "seconds": seconds,
            "pss": pss(tree(place.roots)),
            "generator_share": counted["cpu_seconds"] / counted["seconds"],
            "prober_share": page["cpu_seconds"] / page["seconds"],
        }
        if live and place.contender.timed:
            look["complete"] = 1 - counted["behind"] / max(1, counted["due"])
            look["late_p99_ms"] = counted["lateness_ms"]["p99"]
        if live:
            look["pss_per_stream"] = look["pss"] / live
        return look

    def _short(self, place: Door, settings: Settings) -> Look:
        """Short streams, all asked for at the usual rate: how many are complete when ``grace`` is over?"""
        streams = self._streams(place, settings.short, settings.tokens)
        try:
            streams.ask(f"grow {settings.short} {settings.rate} 0")
            ended = streams.ask(f"finish {settings.grace}")
            return {
                "wanted": settings.short,
                "completed": ended["completed"],
                "failed": ended["failures"]["handoff"] + ended["failures"]["status"] + ended["failures"]["cut"],
                "waiting": ended["waiting"],
            }
        finally:
            streams.stop()


@contextmanager
def world() -> Iterator[World]:
    ours, others = split_cores()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="point-bench-")))
        directory.chmod(0o755)
        model = Model(others, [])
        stack.callback(model.stop)
        yield World(directory, ours, others, model)


def build() -> None:
    tools.build("point")


def measure_round(number: int, settings: Settings, say: Callable[[str], None]) -> tuple[Samples, dict[str, str]]:
    """All contenders with all sizes, in an order of the round's own; and what cannot be measured, with the reason."""
    samples: Samples = {}
    missing: dict[str, str] = {}
    climbs = [(c, workers) for c in CONTENDERS if c.key in settings.contenders for workers in settings.workers]
    random.Random(number).shuffle(climbs)
    with world() as around:
        for done, (contender, workers) in enumerate(climbs):
            try:
                looks = around.climb(contender, workers, settings, say)
            except BenchmarkError as error:
                missing[f"{contender.key}, {workers} workers"] = str(error)
                say(f"{contender.key}, {workers} workers CANNOT be measured: {error}")
                continue
            samples.setdefault(str(workers), {})[contender.key] = looks
            say(f"{done + 1} of {len(climbs)} climbs")
    return samples, missing
