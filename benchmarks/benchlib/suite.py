# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run: all scenarios side by side, with progress, kept round by round.

Each round of each scenario is a file in the run's state directory as soon as it is over; a second call measures only
what is missing there. A round that was measured with other settings or at another commit is measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchlib import machine, parts, profile, publish, summary
from benchlib.parts import PARTS, Document, Part
from benchlib.tools import CACHE, BenchmarkError


@dataclass(slots=True)
class Run:
    """One run: where its rounds are kept, and what is to be measured."""

    state: Path
    chosen: list[Part]
    quick: bool
    rounds: int | None = None
    versions: dict[str, str] = field(default_factory=dict)  # of what is measured, by name
    # Of the sources as they were when the run began; somebody may be editing them meanwhile.
    commit: str = field(default_factory=machine.commit)
    began: float = field(default_factory=time.monotonic)
    failed: dict[str, str] = field(default_factory=dict)  # scenarios of which a round came to nothing, and why

    def wanted(self, part: Part) -> int:
        return self.rounds or part.rounds[self.quick]

    def file(self, part: Part, number: int) -> Path:
        return self.state / f"{part.key}-{number}.json"

    def kept(self, part: Part, number: int) -> Document | None:
        """A round of this commit, with these settings and versions: one that need not be measured again."""
        try:
            document: Document = json.loads(self.file(part, number).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        same = document.get("asked") == self.asked(part) and document["machine"]["commit"] == self.commit
        return document if same else None

    def asked(self, part: Part) -> Document:
        """What a round is measured with. A contender that was installed since has a version that was not there."""
        # Through JSON, as what is read back has been.
        asked: Document = json.loads(
            json.dumps({"quick": self.quick, "versions": self.versions, **part.settings(self.quick)})
        )
        return asked

    def forget(self) -> None:
        """Drops the kept rounds of the chosen scenarios, and of no other."""
        for part in self.chosen:
            for path in self.state.glob(f"{part.key}-*.json"):
                path.unlink()

    def left(self) -> float:
        """Seconds, from what rounds took so far, or a first guess."""
        seconds = 0.0
        for part in self.chosen:
            documents = [self.kept(part, number) for number in range(self.wanted(part))]
            took = [document["took"] for document in documents if document]
            each = sum(took) / len(took) if took else part.seconds[self.quick]
            seconds += each * documents.count(None)
        return seconds

    def say(self, text: str) -> None:
        print(f"  {clock(time.monotonic() - self.began)}  {text}", flush=True)

    def measure(self) -> None:
        """What is missing, round by round, all scenarios in each. Every round is written as soon as it is over."""
        self.state.mkdir(parents=True, exist_ok=True)
        for number in range(max(self.wanted(part) for part in self.chosen)):
            for part in self.chosen:
                if number >= self.wanted(part) or self.kept(part, number) or part.key in self.failed:
                    continue
                about = {**machine.describe(**self.versions), "commit": self.commit}
                self.say(f"{part.key}, round {number + 1} of {self.wanted(part)}; about {clock(self.left())} to go")
                start = time.monotonic()
                try:
                    document = part.measure(number, self.quick, self._detail(part))
                except BenchmarkError as error:
                    # The others have their figures all the same, and a second call tries this one again.
                    self.failed[part.key] = str(error)
                    self.say(f"{part.key} CANNOT be measured: {error}")
                    continue
                document |= {
                    "asked": self.asked(part),
                    "quick": self.quick,
                    "machine": about,
                    "took": time.monotonic() - start,
                }
                new = self.file(part, number).with_suffix(".new")
                new.write_text(json.dumps(document, indent=1) + "\n")
                new.replace(self.file(part, number))

    def _detail(self, part: Part) -> Callable[[str], None]:
        return lambda text: self.say(f"  {part.key}: {text.splitlines()[0]}")

    def documents(self) -> dict[str, Document]:
        """scenario -> its rounds as one; those that were never measured are not there."""
        found: dict[str, Document] = {}
        for part in self.chosen:
            # What was measured at another commit or otherwise is not of this run, whatever the state directory has.
            rounds = [document for number in range(self.wanted(part)) if (document := self.kept(part, number))]
            if rounds:
                merged = part.merge(rounds)
                merged["loads"] = [document["machine"]["load_before"] for document in rounds]
                merged["took"] = sum(document["took"] for document in rounds)
                del merged["asked"]
                found[part.key] = merged
        return found


def chosen(named: list[str]) -> list[Part]:
    """Those that are named; without names all but those that have to be."""
    return [part for part in PARTS if part.key in named or not (named or part.by_name)]


def clock(seconds: float) -> str:
    """Minutes and seconds: 12:05."""
    return f"{int(seconds) // 60:2d}:{int(seconds) % 60:02d}"


def missing(documents: dict[str, Document], run: Run) -> list[str]:
    """What has no figures, or not all: scenarios, and contenders of scenarios."""
    found = [part.key for part in run.chosen if part.key not in documents or part.key in run.failed]
    return found + [f"{key}: {what}" for key, document in documents.items() for what in document["missing"]]


def write(documents: dict[str, Document], out: Path) -> None:
    """Figures, report and charts. Those of an earlier run make way; whatever else is in the directory stays."""
    out.mkdir(parents=True, exist_ok=True)
    names = [name for part in PARTS for name in (f"{part.key}.json", *part.chart_names)]
    for old in (path for name in (*names, *profile.NAMES) for path in out.glob(name)):
        old.unlink()
    for part in PARTS:
        if part.key in documents:
            # On one line: kept with the sources, a figure per line would be most of their lines.
            (out / f"{part.key}.json").write_text(json.dumps(documents[part.key], separators=(",", ":")) + "\n")
            for name, svg in part.charts(documents[part.key]).items():
                (out / name).write_text(svg)
    (out / "report.md").write_text(summary.report(documents))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="All scenarios, or those that are named, side by side. Scenarios: "
        + "; ".join(f"{part.key} ({part.title}{', only by name' if part.by_name else ''})" for part in PARTS),
    )
    parser.add_argument("scenario", nargs="*", help="which (default: all but those that are measured only by name)")
    parser.add_argument("--quick", action="store_true", help="under five minutes; its figures mean little")
    parser.add_argument("--rounds", type=int, help="of each scenario, instead of its own number")
    parser.add_argument("--fresh", action="store_true", help="measure these scenarios again, also what is there")
    parser.add_argument("--out", type=Path, help="where the report goes (default: .cache/benchmarks/results/run)")
    parser.add_argument("--state", type=Path, help="where rounds are kept (default: in .cache/benchmarks/runs)")
    parser.add_argument("--record", metavar="NAME", help="keep the run in benchmarks/results/NAME and publish it")
    parser.add_argument("--publish", metavar="NAME", help="measure nothing: write what docs/ says of that run")
    parser.add_argument("--profile", action="store_true", help="flame graphs and top costs, after the scenarios")
    options = parser.parse_args(argv)
    unknown = set(options.scenario) - set(parts.names())
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(parts.names())}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: a whole number from 1 on")
    if options.record and options.out:
        parser.error("--record says where the report goes; leave out --out")
    for name in filter(None, (options.record, options.publish)):
        if not name.replace("-", "").replace("_", "").isalnum():
            parser.error(f"'{name}' is no name of a run: letters, digits, - and _")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    # As an interruption: everything that was started ends, and the rounds that are over are kept.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if options.publish:
            return _publish(options.publish)
        return _run(options)
    except BenchmarkError as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        return 1


def _publish(name: str) -> int:
    for path in publish.publish(name):
        print(f"written: {path}")
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.profile:
        # Before half an hour of measuring, not after it.
        profile.check()
    if os.geteuid() != 0:
        raise BenchmarkError("sockets for handoffs are below /run: run this as root")
    parts_chosen = chosen(options.scenario)
    left_out = [part.key for part in PARTS if part.by_name and part not in parts_chosen]
    if left_out:
        print(f"left out, because it is measured only where it is named: {', '.join(left_out)}", flush=True)
    name = options.record or ("quick" if options.quick else "latest")
    state = options.state or CACHE / "runs" / name
    run = Run(state, parts_chosen, options.quick, options.rounds, parts.versions())
    if options.fresh:
        run.forget()
    run.measure()
    documents = run.documents()
    out = parts.results_directory(options.record) if options.record else options.out or CACHE / "results" / "run"
    if not documents:
        raise BenchmarkError("; ".join(run.failed.values()))
    write(documents, out)
    if options.profile:
        profile.profile(out, run.say)
    print(f"\nthe report: {out / 'report.md'}")
    incomplete = missing(documents, run)
    if incomplete:
        print(f"incomplete, could not be measured: {'; '.join(incomplete)}", file=sys.stderr)
        return 1
    return _publish(options.record) if options.record else 0
